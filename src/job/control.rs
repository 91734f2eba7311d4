//! Functions that control a job: pause, resume, cancel, retry, budget, owner, forget.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use super::check::check_login;
use super::status::{self, Status};
use super::{Budget, Wake, check_alone, wake_at_commit};
use crate::args::required;
use crate::client::check_usable;
use crate::error::{Error, Result};
use crate::{catalog, deadline, model, owner, route, sql, task, txn};

/// The assignment of `cancel()`.
const CANCELLED: &str = "wanted = 'cancelled'";

/// Changes what its owner wants of a job. `change` returns the assignment, if any; `starts`: a worker may have to be
/// started for it, else one that runs is told.
fn control(
    job_id: i64,
    starts: bool,
    who: impl FnOnce(status::Status) -> Result<status::Status>,
    change: impl FnOnce(&status::Status) -> Result<Option<String>>,
) -> Result<bool> {
    check_usable()?;
    let mut status = who(status::status(job_id)?)?;
    let Some(assignment) = change(&status)? else { return Ok(false) };
    let sql = format!("UPDATE llm_batch.job SET {assignment} WHERE id = $1 AND wanted <> 'cancelled' RETURNING 1");
    let changed = txn::as_extension_owner(|| sql::run(&sql, &[job_id.into()]))?;
    // It was cancelled since we looked, by another session that this UPDATE waited for.
    if changed == 0 {
        "cancelled".clone_into(&mut status.status);
        return if assignment == CANCELLED { Ok(false) } else { Err(ended(&status)) };
    }
    let wake = match status.owner.filter(|_| starts) {
        Some(owner) => Wake::Start(owner),
        None if assignment == CANCELLED => Wake::Cancel,
        None => Wake::Tell,
    };
    wake_at_commit(job_id, wake);
    Ok(true)
}

/// A job that was made elsewhere, and came with a dump, is at home here from now on: what is called by these names here is
/// its own. Its table was made anew, in which dropped columns leave no gaps; a column that is missing or of another type
/// is for the worker to tell.
fn here(owner: pg_sys::Oid, relation: pg_sys::Oid) -> String {
    let (owner, relation) = (owner.to_u32(), relation.to_u32());
    let column = |what: &str| {
        format!(
            "target_{what}s = CASE WHEN home = llm_batch.home() THEN target_{what}s ELSE
                 (SELECT array_agg(coalesce(a.{}, 0) ORDER BY u.n) FROM unnest(targets, target_type_names) WITH ORDINALITY u (name, type, n)
                    LEFT JOIN pg_attribute a ON a.attrelid = {relation} AND a.attname = u.name
                         AND format_type(a.atttypid, NULL) = u.type) END",
            if what == "type" { "atttypid" } else { "attnum" }
        )
    };
    format!(
        "home = llm_batch.home(), owner = {owner}, owner_name = pg_get_userbyid({owner}), relation = {relation}, {}, {},
         key_attnums = CASE WHEN home = llm_batch.home() THEN key_attnums ELSE
             (SELECT array_agg(coalesce(a.attnum, 0) ORDER BY k.n) FROM unnest(key_names) WITH ORDINALITY k (name, n)
                LEFT JOIN pg_attribute a ON a.attrelid = {relation} AND a.attname = k.name) END",
        column("attnum"),
        column("type")
    )
}

fn ended(status: &status::Status) -> Error {
    let ended = Error::state(format!("job {} is {}", status.id, status.status));
    match status.relation {
        None => ended.hint(format!(
            "The table {} does not exist any more. llm_batch.forget({}) removes the job.",
            status.table, status.id
        )),
        Some(_) => ended.hint("Call llm_batch.backfill() again for the rows that are still NULL."),
    }
}

#[pg_extern(sql = false)]
fn pause(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, false, Status::by_owner_or_tables, |s| match s.status.as_str() {
        "running" => Ok(Some("wanted = 'paused'".to_owned())),
        "paused" => Ok(s.has_hope.then(|| "wanted = 'paused'".to_owned())),
        _ => Err(ended(s)),
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn resume(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, true, Status::by_owner, |s| match s.status.as_str() {
        "paused" => {
            let (owner, relation) = s.check_complete()?;
            Ok(Some(format!("wanted = 'running', epoch = epoch + 1, {}", here(owner, relation))))
        }
        "running" => Ok(None),
        _ => Err(ended(s)),
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn cancel(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, false, Status::by_owner_or_tables, |s| match s.status.as_str() {
        "running" | "paused" => {
            pgrx::log!("llm_batch job {job_id} is cancelled: {}", status::account(job_id)?);
            Ok(Some(CANCELLED.to_owned()))
        }
        _ => Ok(None),
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn alter_job(
    job_id: Option<i64>,
    max_cost: Option<AnyNumeric>,
    max_tokens: Option<i64>,
    deadline: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    let job_id = required(job_id, "job_id")?;
    let Budget { max_cost, max_tokens } = Budget::new(max_cost, max_tokens)?;
    check_usable()?;
    let status = status::status(job_id)?.by_owner()?;
    if !matches!(status.status.as_str(), "running" | "paused") {
        return Err(ended(&status).into());
    }
    let asked = || Ok::<_, Error>(task::load(&status.task, &json!({}))?.model);
    if max_cost.is_some() {
        for model in route::models(&asked()?)?.0 {
            model::load(&model)?.price.check(&model)?;
        }
    }
    let is_none = deadline.is_some_and(deadline::is_none);
    let deadline = deadline.filter(|_| !is_none).map(deadline::resolve).transpose()?;
    if deadline.is_some() {
        let model = asked()?;
        deadline::tell_if_useless(route::models(&model)?.1, &model);
    }
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job SET max_cost = coalesce($2, max_cost), max_tokens = coalesce($3, max_tokens),
                    options = CASE WHEN $5 THEN options - 'deadline'
                                   WHEN $4 IS NULL THEN options
                                   ELSE options || jsonb_build_object('deadline', $4) END
              WHERE id = $1",
            &[job_id.into(), max_cost.into(), max_tokens.into(), deadline.into(), is_none.into()],
        )
    })?;
    // A worker that runs looks at it at once.
    wake_at_commit(job_id, Wake::Tell);
    Ok(())
}

#[pg_extern(sql = false)]
fn retry_failed(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, true, Status::by_owner, |s| {
        if s.status == "cancelled" || s.status == "failed" {
            return Err(ended(s));
        }
        let listed = txn::as_extension_owner(|| {
            sql::one::<bool>("SELECT true FROM llm_batch.row_failure WHERE job_id = $1 LIMIT 1", &[job_id.into()])
        })?;
        if listed.is_none() {
            return Ok(None);
        }
        let (owner, relation) = s.check_complete()?;
        if s.status == "done" {
            let target = catalog::target(relation, &s.targets)?;
            check_alone(&target, &s.beside.iter().map(String::as_str).collect::<Vec<_>>(), job_id)?;
        }
        Ok(Some(format!("wanted = 'running', epoch = epoch + 1, retry_epoch = epoch + 1, {}", here(owner, relation))))
    })?;
    Ok(changed)
}

/// By the rules of `ALTER … OWNER TO`; the table's owner may give away a job that has no owner any more.
#[pg_extern(sql = false)]
fn set_job_owner(job_id: i64, new_owner: pg_sys::Oid) -> std::result::Result<(), ErrorReport> {
    check_usable()?;
    let status = status::status(job_id)?;
    let status = if status.owner.is_some() { status.by_owner()? } else { status.by_owner_or_tables()? };
    let (role, _) = owner::new(new_owner)?;
    check_login(new_owner)?;
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    if unsafe { pg_sys::superuser_arg(new_owner) } && !status.is_of_table(new_owner) {
        return Err(Error::denied(format!("superuser \"{role}\" cannot own a job on another role's table"))
            .detail(
                "The triggers of the table and the expressions of the job would run with the rights of a superuser.",
            )
            .hint("Give the job to the table's owner.")
            .into());
    }
    // The rights of an owner that is gone, such as after a restore without its roles, are not known: it counts as no
    // superuser. SAFETY: as above.
    let is_raised = |old| status.owner != Some(new_owner) && !unsafe { pg_sys::superuser_arg(old) };
    // SAFETY: as above.
    if unsafe { pg_sys::superuser_arg(new_owner) } && status.owner.is_none_or(is_raised) {
        return Err(Error::denied(format!("superuser \"{role}\" cannot take over a job that no superuser owned"))
            .detail("The expressions of the job, which its owner wrote, would run with the rights of a superuser.")
            .hint(format!("Cancel the job with llm_batch.cancel({job_id}), then call llm_batch.backfill()."))
            .into());
    }
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job SET owner = $2, owner_name = $3::name WHERE id = $1",
            &[job_id.into(), new_owner.into(), role.into()],
        )
    })?;
    wake_at_commit(job_id, Wake::Start(new_owner));
    Ok(())
}

#[pg_extern(sql = false)]
fn forget(job_id: i64) -> std::result::Result<(), ErrorReport> {
    check_usable()?;
    let status = status::status(job_id)?.by_owner_or_tables()?;
    if matches!(status.status.as_str(), "running" | "paused") {
        return Err(Error::state(format!("job {job_id} is {}", status.status))
            .hint(format!("Wait until the job ends, or cancel it with llm_batch.cancel({job_id})."))
            .into());
    }
    status::forget(job_id, "")?;
    Ok(())
}

#[pg_extern(sql = false)]
fn refuse_transaction_block(what: &str) -> std::result::Result<(), ErrorReport> {
    // SAFETY: reads the transaction's state on the main thread.
    if unsafe { pg_sys::IsTransactionBlock() } {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            format!("{what} cannot run inside a transaction block"),
        )
        .hint("Commit first: a job starts when the transaction that created it commits.")
        .into());
    }
    Ok(())
}
