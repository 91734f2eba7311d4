//! Jobs: `backfill()` and all it checks. See README.md in this folder.

mod control;
mod page;
mod plan;
mod settle;
pub mod store;
mod worker;

use std::ffi::CStr;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::{FromGateway, Stream, ToGateway};
use pgrx::datum::{DatumWithOid, JsonB};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{PgXactCallbackEvent, register_xact_callback};
use serde_json::{Value, json};

use crate::catalog::{self, Target, Use};
use crate::classifier::{self, Asked};
use crate::client::{Client, Received, check_loaded};
use crate::error::{Error, Result};
use crate::model::{current_user, from_name, required};
use crate::{shared, sql, txn};

/// What a job may spend.
pub struct Budget {
    max_cost: Option<AnyNumeric>,
    max_tokens: Option<i64>,
}

impl Budget {
    fn new(max_cost: Option<AnyNumeric>, max_tokens: Option<i64>) -> Result<Self> {
        let refuse = |name, hint| Err(Error::invalid(format!("\"{name}\" must be greater than zero")).hint(hint));
        if max_cost.as_ref().is_some_and(|n| n.is_nan() || *n <= AnyNumeric::from(0)) {
            return refuse("max_cost", "It is in dollars; NULL is no limit.");
        }
        if max_tokens.is_some_and(|n| n <= 0) {
            return refuse("max_tokens", "NULL is no limit.");
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
    options: Option<JsonB>,
) -> std::result::Result<i64, ErrorReport> {
    let budget = Budget::new(max_cost, max_tokens)?;
    let options = options.map_or(json!({}), |o| if o.0.is_null() { json!({}) } else { o.0 });
    let id = start(
        required(relation, "relation")?,
        required(input, "input")?,
        &from_name(required(target, "target")?),
        required(task, "task")?,
        filter,
        budget,
        options,
    )?;
    Ok(id)
}

fn start(
    relation: pg_sys::Oid,
    input: &str,
    column: &str,
    task: &str,
    filter: Option<&str>,
    budget: Budget,
    options: Value,
) -> Result<i64> {
    check_loaded()?;
    // SAFETY: reads shared state on the main thread.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            "cannot execute backfill() during recovery",
        ));
    }
    // A snapshot of before the lock of check_alone() would not show the job it waited for.
    // SAFETY: read on the main thread.
    if unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32 {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            "backfill() can't be called in a REPEATABLE READ or SERIALIZABLE transaction",
        )
        .hint("Call it at READ COMMITTED."));
    }
    let target = catalog::target(relation, column)?;
    let owner = owner_of(&target)?;
    let Asked { stream, model, price } = classifier::load(task, &options)?.stream(owner, false)?;
    if budget.max_cost.is_some() {
        price.check(&model)?;
    }
    check_rights(&target, owner)?;
    catalog::check_expression(&target, input, Use::Input)?;
    if let Some(filter) = filter {
        catalog::check_expression(&target, filter, Use::Filter)?;
    }
    let search_path = search_path()?;
    // A domain's CHECK and a table's expressions may call functions of whoever owns them: never with more rights than
    // the job will have.
    txn::as_role(owner, || {
        catalog::check_labels(&target, stream.task.labels.iter().map(|l| l.label.as_str()))?;
        sql::run(
            &format!(
                "SELECT ({input}\n)::pg_catalog.text, {} FROM ONLY {} WHERE ({}\n) LIMIT 0",
                sql::name(column),
                target.name,
                filter.unwrap_or("true")
            ),
            &[],
        )
    })?;
    check_alone(&target, 0)?;
    probe(&stream, &model)?;
    let id = insert(&target, owner, input, filter, budget, task, options, &search_path)?;
    wake_at_commit(id, owner);
    Ok(id)
}

/// A job runs as whoever starts it; a superuser's job on another role's table runs as that table's owner, since what
/// its triggers and expressions do must not be done as a superuser.
fn owner_of(target: &Target) -> Result<pg_sys::Oid> {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    let is_superuser = unsafe { pg_sys::superuser_arg(current_user()) };
    let owner = if is_superuser { target.owner } else { current_user() };
    let role = sql::row(
        "SELECT r.rolname::pg_catalog.text, r.rolcanlogin FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) $1",
        &[owner.into()],
        |r| Ok((r.get::<String>(1)?, r.get::<bool>(2)?)),
    )?;
    match role {
        Some((_, true)) => Ok(owner),
        Some((name, false)) => Err(Error::new(
            PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
            format!("role \"{name}\" can't own a job because it can't log in"),
        )
        .hint(format!(
            "A job's worker connects as its owner: ALTER ROLE {} LOGIN, or start it as another role.",
            sql::name(&name)
        ))),
        None => Err(Error::unknown("the job's owner does not exist")),
    }
}

fn check_rights(target: &Target, owner: pg_sys::Oid) -> Result<()> {
    let reads = target.key_names.iter().map(|name| (name, "SELECT"));
    for (column, right) in [(&target.column, "UPDATE")].into_iter().chain(reads) {
        let may = sql::one::<bool>(
            "SELECT pg_catalog.has_column_privilege($1, $2, $3, $4)",
            &[owner.into(), target.relation.into(), column.as_str().into(), right.into()],
        )?;
        if may != Some(true) {
            return Err(Error::denied(format!("permission denied for column \"{column}\" of {}", target.name))
                .hint("The job's owner needs SELECT on the key, the target and the input, and UPDATE on the target."));
        }
    }
    Ok(())
}

/// The caller's search_path, without what is his session's alone.
fn search_path() -> Result<String> {
    let path = sql::one::<String>(
        "SELECT pg_catalog.string_agg(pg_catalog.quote_ident(s.name), ', ' ORDER BY s.n)
           FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) WITH ORDINALITY s (name, n)
          WHERE NOT pg_catalog.starts_with(s.name, 'pg_temp')",
        &[],
    )?;
    Ok(path.unwrap_or_else(|| "pg_catalog".to_owned()))
}

/// One job a column: refuses a second one on the same column of the same partition tree. Holds a lock until the
/// transaction ends, so that two can't start at the same time.
fn check_alone(target: &Target, except: i64) -> Result<()> {
    sql::run(
        "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('llm_batch'), pg_catalog.hashtext($1))",
        &[format!("{} {}", target.root.to_u32(), target.column).into()],
    )?;
    let other = txn::as_extension_owner(|| {
        sql::one::<i64>(
            "SELECT j.id FROM llm_batch.job j JOIN llm_batch.progress p ON p.job_id = j.id
              WHERE j.root = $1::regclass AND j.target = $2::name AND p.status IN ('running', 'paused') AND j.id <> $3 LIMIT 1",
            &[target.root.into(), target.column.as_str().into(), except.into()],
        )
    })?;
    if let Some(other) = other {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            format!("job {other} fills column \"{}\" of {} already", target.column, target.name),
        )
        .hint(format!("Wait for it with CALL llm_batch.wait({other}), or end it with llm_batch.cancel({other}).")));
    }
    Ok(())
}

/// Asks the model whether it answers at all, before a row is paid for.
fn probe(stream: &Stream, model: &str) -> Result<()> {
    let ask = || -> Result<Client> {
        let mut client = Client::open(stream)?;
        client.send(&ToGateway::Probe)?;
        Ok(client)
    };
    let mut client = ask()?;
    let start = Instant::now();
    loop {
        match client.receive(Duration::from_secs(5))? {
            Received::Message(FromGateway::Probed(None)) => return Ok(()),
            Received::Message(FromGateway::Probed(Some(stop)) | FromGateway::Stopped(stop)) => {
                return Err(Error::from_stop(&stop, model));
            }
            Received::Message(_) | Received::Nothing => {}
            Received::Lost if start.elapsed() > Duration::from_secs(60) => {
                return Err(Error::new(
                    PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE,
                    "lost the connection to the llm_batch gateway",
                ));
            }
            Received::Lost => client = ask()?,
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn insert(
    target: &Target,
    owner: pg_sys::Oid,
    input: &str,
    filter: Option<&str>,
    budget: Budget,
    task: &str,
    options: Value,
    search_path: &str,
) -> Result<i64> {
    let args: Vec<DatumWithOid> = vec![
        owner.into(),
        target.relation.into(),
        target.root.into(),
        target.name.as_str().into(),
        target.column.as_str().into(),
        target.attnum.into(),
        target.type_oid.into(),
        target.typmod.into(),
        target.key_names.clone().into(),
        target.key_attnums.clone().into(),
        input.into(),
        filter.into(),
        task.into(),
        JsonB(options).into(),
        search_path.into(),
        store::cluster().into(),
        budget.max_cost.into(),
        budget.max_tokens.into(),
    ];
    let id = txn::as_extension_owner(|| {
        let id = sql::one_mut::<i64>(
            "INSERT INTO llm_batch.job (owner, relation, root, relation_name, target, target_attnum, target_type,
                 target_typmod, key_names, key_attnums, input, filter, task, options, search_path, cluster, max_cost, max_tokens)
             VALUES ($1::regrole, $2::regclass, $3::regclass, $4, $5::name, $6, $7::regtype, $8, $9::name[], $10, $11, $12, $13, $14, $15, $16, $17, $18) RETURNING id",
            &args,
        )?;
        sql::run("INSERT INTO llm_batch.job_state (job_id) VALUES ($1)", &[id.into()])?;
        Ok(id)
    })?;
    required(id, "id")
}

/// Wakes a job when the transaction commits. After a commit nothing may raise: this writes to shared memory alone.
fn wake_at_commit(job: i64, owner: pg_sys::Oid) {
    let database = crate::worker::my_database();
    register_xact_callback(PgXactCallbackEvent::Commit, move || {
        shared::want(database, job, owner.to_u32(), shared::now());
    });
    // A prepared transaction is committed by another session, which knows nothing of this: a search finds the job.
    register_xact_callback(PgXactCallbackEvent::Prepare, move || {
        shared::want(database, 0, 0, shared::now());
    });
}
