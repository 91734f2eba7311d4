//! Jobs: `backfill()` and all it checks. See README.md in this folder.

pub mod cause;
mod check;
mod control;
mod estimate;
mod finder;
mod fit;
mod ledger;
mod page;
mod plan;
pub mod settle;
mod status;
mod store;
mod table;
pub mod target;
mod tidy;
mod update;
mod worker;

use std::collections::BTreeSet;
use std::ffi::CStr;

use llm_batch_gateway::protocol::{FromGateway, ToGateway};
use pgrx::datum::{DatumWithOid, JsonB};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{PgXactCallbackEvent, register_xact_callback};

use self::check::{Checked, Given};
use crate::args::required;
use crate::catalog::Target;
use crate::error::{Error, Result};
use crate::failure::failure_point;
use crate::json::Json;
use crate::task::Asked;
use crate::{client, deadline, shared, sql, txn};

/// The limits of a job's spending.
pub struct Budget {
    max_cost: Option<AnyNumeric>,
    max_tokens: Option<i64>,
}

impl Budget {
    fn new(max_cost: Option<AnyNumeric>, max_tokens: Option<i64>) -> Result<Self> {
        let refuse = |name, hint| Err(Error::invalid(format!("\"{name}\" must be greater than zero")).hint(hint));
        if max_cost.as_ref().is_some_and(|n| n.is_nan() || *n <= AnyNumeric::from(0)) {
            return refuse("max_cost", "The budget is in dollars. NULL means no limit.");
        }
        if max_tokens.is_some_and(|n| n <= 0) {
            return refuse("max_tokens", "NULL means no limit.");
        }
        Ok(Self { max_cost, max_tokens })
    }
}

#[allow(clippy::too_many_arguments)]
#[pg_extern(sql = false)]
fn backfill(
    relation: Option<pg_sys::Oid>,
    input: Option<&str>,
    target: Option<&CStr>,
    task: Option<&str>,
    filter: Option<&str>,
    max_cost: Option<AnyNumeric>,
    max_tokens: Option<i64>,
    options: Option<Json>,
) -> std::result::Result<i64, ErrorReport> {
    let given = Given::new(relation, input, check::one_column(target)?, task, filter, options)?;
    Ok(start(given, Budget::new(max_cost, max_tokens)?)?)
}

#[allow(clippy::too_many_arguments)]
#[pg_extern(sql = false)]
fn backfill_targets(
    relation: Option<pg_sys::Oid>,
    input: Option<&str>,
    targets: Option<Json>,
    task: Option<&str>,
    filter: Option<&str>,
    max_cost: Option<AnyNumeric>,
    max_tokens: Option<i64>,
    options: Option<Json>,
) -> std::result::Result<i64, ErrorReport> {
    let given = Given::new(relation, input, check::several_columns(targets)?, task, filter, options)?;
    Ok(start(given, Budget::new(max_cost, max_tokens)?)?)
}

fn start(given: Given, budget: Budget) -> Result<i64> {
    // A snapshot from before the lock of check_alone() would not show the job that the lock waited for.
    // SAFETY: read on the main thread.
    if unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32 {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            "backfill() cannot be called in a REPEATABLE READ or SERIALIZABLE transaction",
        )
        .hint("Call it in a READ COMMITTED transaction."));
    }
    let Checked { target, fields, owner, asked } = given.check(true)?;
    if given.has_deadline {
        deadline::tell_if_useless(asked.stream.policy, &asked.model);
    }
    let Asked { stream, model, models, .. } = asked;
    if budget.max_cost.is_some() {
        models.iter().try_for_each(|(model, price)| price.check(model))?;
    }
    check_alone(&target, &given.beside(), 0)?;
    client::check_came_up(shared::Process::Launcher)?;
    // Before a row is paid for: the model, or one of a route, must answer at all.
    client::ask(&stream, &ToGateway::Probe, |message| match message {
        FromGateway::Probed(None) => Ok(Some(())),
        FromGateway::Probed(Some(stop)) | FromGateway::Stopped(stop) => Err(Error::from_stop(&stop, &model, &stream)),
        _ => Ok(None),
    })?;
    let id = insert(&target, fields, owner, given, budget)?;
    wake_at_commit(id, Wake::Start(owner));
    Ok(id)
}

/// One job a column, be it a target or one beside them: refuses a second one on one of the columns of the same
/// partition tree. Holds locks until the transaction ends, so that two can't start at the same time.
fn check_alone(target: &Target, beside: &[&str], except: i64) -> Result<()> {
    // Not an advisory lock: anyone could take that, and hold up others' jobs for ever. Two names with the same hash wait
    // for each other in vain, and no longer than that.
    let hash = |name: &str| name.bytes().fold(0u16, |hash, byte| hash.wrapping_mul(31).wrapping_add(u16::from(byte)));
    let names: Vec<String> =
        target.columns.iter().map(|c| c.name.as_str()).chain(beside.iter().copied()).map(str::to_owned).collect();
    // In one order, so that no two wait for each other.
    let hashes: BTreeSet<u16> = names.iter().map(|name| hash(name)).collect();
    for name in hashes {
        // SAFETY: takes a lock on the main thread inside a transaction; may raise. Relations themselves are locked by
        // other tags, so that this one is ours alone.
        unsafe {
            pg_sys::LockDatabaseObject(pg_sys::RelationRelationId, target.root, name, pg_sys::ExclusiveLock as i32);
        }
    }
    // As a statement that writes: it has a snapshot of its own, of after the lock.
    let other = txn::as_extension_owner(|| {
        sql::rows_mut(
            "SELECT j.id, (SELECT min(c) FROM unnest(f.columns) c WHERE c = ANY ($2)) FROM llm_batch.job j JOIN llm_batch.progress p ON p.job_id = j.id
              CROSS JOIN LATERAL (SELECT llm_batch.relation_now(j.relation, j.relation_name, j.home)) n (relation)
              CROSS JOIN LATERAL (SELECT j.targets::text[] || (j.options->>'provenance_column')
                                                                 || (j.options->>'confidence_column')) f (columns)
              WHERE coalesce(pg_partition_root(n.relation)::oid, n.relation) = $1 AND f.columns && $2
                AND p.status IN ('running', 'paused') AND j.id <> $3 LIMIT 1",
            &[target.root.into(), names.into(), except.into()],
            |r| Ok((r.get::<i64>(1)?, r.get::<String>(2)?)),
        )
    })?;
    if let Some((other, column)) = other.into_iter().next() {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            format!("job {other} already fills column \"{column}\" of {}", target.name),
        )
        .hint(format!(
            "Wait for the job with CALL llm_batch.wait({other}), or cancel it with llm_batch.cancel({other})."
        )));
    }
    Ok(())
}

fn insert(
    target: &Target,
    fields: Vec<Option<String>>,
    owner: pg_sys::Oid,
    given: Given,
    budget: Budget,
) -> Result<i64> {
    let args: Vec<DatumWithOid> = vec![
        owner.into(),
        target.relation.into(),
        target.name.as_str().into(),
        target.columns.iter().map(|c| c.name.clone()).collect::<Vec<String>>().into(),
        target.columns.iter().map(|c| c.attnum).collect::<Vec<i16>>().into(),
        target.columns.iter().map(|c| c.type_oid).collect::<Vec<pg_sys::Oid>>().into(),
        target.columns.iter().map(|c| c.typmod).collect::<Vec<i32>>().into(),
        target.key_names.clone().into(),
        target.key_attnums.clone().into(),
        given.input.into(),
        given.filter.into(),
        given.task.into(),
        JsonB(given.options).into(),
        txn::search_path()?.into(),
        budget.max_cost.into(),
        budget.max_tokens.into(),
        fields.into(),
    ];
    let id = txn::as_extension_owner(|| {
        let id = sql::one_mut::<i64>(
            "INSERT INTO llm_batch.job (owner, owner_name, relation, relation_name, targets, target_attnums, target_types,
                 target_type_names, target_typmods, key_names, key_attnums, input, filter, task, options, search_path, home,
                 max_cost, max_tokens, fields)
             VALUES ($1, pg_get_userbyid($1), $2, $3, $4::name[], $5, $6,
                     (SELECT array_agg(format_type(u.t, NULL) ORDER BY u.n) FROM unnest($6) WITH ORDINALITY u (t, n)), $7, $8::name[], $9, $10, $11, $12,
                     $13, $14, llm_batch.home(), $15, $16, $17) RETURNING id",
            &args,
        )?;
        sql::run("INSERT INTO llm_batch.job_state (job_id) VALUES ($1)", &[id.into()])?;
        Ok(id)
    })?;
    required(id, "id")
}

/// The worker that is told of a change of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// A worker of this role, which is started if none runs.
    Start(pg_sys::Oid),
    /// A worker that runs.
    Tell,
    /// A worker that runs, and that is to end soon.
    Cancel,
}

/// Wakes a job when the transaction commits. After a commit nothing may raise: this writes to shared memory alone.
fn wake_at_commit(job: i64, wake: Wake) {
    let database = crate::process::my_database();
    register_xact_callback(PgXactCallbackEvent::Commit, move || {
        match wake {
            Wake::Start(owner) => shared::want(database, job, owner.to_u32(), shared::now()),
            Wake::Tell | Wake::Cancel => shared::poke(database, job, wake == Wake::Cancel),
        }
        failure_point!("woken");
    });
    // A prepared transaction is committed by another session, which knows nothing of this: a search finds the job.
    register_xact_callback(PgXactCallbackEvent::Prepare, move || {
        shared::want(database, 0, 0, shared::now());
    });
}
