//! What a job's owner may do with it later.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use super::{Budget, check_alone, store, wake_at_commit};
use crate::client::check_usable;
use crate::error::{Error, Result};
use crate::model::{self, required};
use crate::{catalog, classifier, sql, txn};

/// What its owner wants of a job is changed by `change`, which returns whether it changed anything.
fn control(job_id: i64, change: impl FnOnce(&store::Status) -> Result<Option<String>>) -> Result<bool> {
    check_usable()?;
    let status = store::status(job_id)?;
    let Some(assignment) = change(&status)? else { return Ok(false) };
    txn::as_extension_owner(|| {
        sql::run(&format!("UPDATE llm_batch.job SET {assignment} WHERE id = $1"), &[job_id.into()])
    })?;
    wake_at_commit(job_id, status.owner);
    Ok(true)
}

/// A job that was made elsewhere, and came with a dump, is at home here from now on. Its table was made anew, in which
/// dropped columns leave no gaps; a column that is missing is for the worker to tell.
const HERE: &str = "home = llm_batch.home(),
    target_attnum = CASE WHEN home = llm_batch.home() THEN target_attnum ELSE coalesce(
        (SELECT a.attnum FROM pg_attribute a WHERE a.attrelid = relation AND a.attname = target), target_attnum) END,
    key_attnums = CASE WHEN home = llm_batch.home() THEN key_attnums ELSE
        (SELECT array_agg(coalesce(a.attnum, 0) ORDER BY k.n) FROM unnest(key_names) WITH ORDINALITY k (name, n)
           LEFT JOIN pg_attribute a ON a.attrelid = relation AND a.attname = k.name) END";

fn ended(status: &store::Status) -> Error {
    Error::state(format!("job {} is {}", status.id, status.status))
        .hint("A new llm_batch.backfill() goes on with the rows that are still NULL.")
}

#[pg_extern(sql = false)]
fn pause(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, |s| match (s.status.as_str(), s.reason.as_deref()) {
        ("running", _) | ("paused", Some("provider_down" | "quota" | "no_worker_slot")) => {
            Ok(Some("wanted = 'paused'".to_owned()))
        }
        ("paused", _) => Ok(None),
        _ => Err(ended(s)),
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn resume(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, |s| match s.status.as_str() {
        "paused" => Ok(Some(format!("wanted = 'running', epoch = epoch + 1, {HERE}"))),
        "running" => Ok(None),
        _ => Err(ended(s)),
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn cancel(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, |s| match s.status.as_str() {
        "running" | "paused" => Ok(Some("wanted = 'cancelled'".to_owned())),
        _ => Ok(None),
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn alter_job(
    job_id: Option<i64>,
    max_cost: Option<AnyNumeric>,
    max_tokens: Option<i64>,
) -> std::result::Result<(), ErrorReport> {
    let job_id = required(job_id, "job_id")?;
    let Budget { max_cost, max_tokens } = Budget::new(max_cost, max_tokens)?;
    check_usable()?;
    let status = store::status(job_id)?;
    if !matches!(status.status.as_str(), "running" | "paused") {
        return Err(ended(&status).into());
    }
    if max_cost.is_some() {
        let model = classifier::load(&status.task, &json!({}))?.model;
        model::load(&model)?.price.check(&model)?;
    }
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job SET max_cost = coalesce($2, max_cost), max_tokens = coalesce($3, max_tokens) WHERE id = $1",
            &[job_id.into(), max_cost.into(), max_tokens.into()],
        )
    })?;
    // A worker that runs looks at it at once.
    wake_at_commit(job_id, status.owner);
    Ok(())
}

#[pg_extern(sql = false)]
fn retry_failed(job_id: i64) -> std::result::Result<bool, ErrorReport> {
    let changed = control(job_id, |s| {
        if s.status == "cancelled" || s.status == "failed" {
            return Err(ended(s));
        }
        let listed = txn::as_extension_owner(|| {
            sql::one::<bool>("SELECT true FROM llm_batch.row_failure WHERE job_id = $1 LIMIT 1", &[job_id.into()])
        })?;
        if listed.is_none() {
            return Ok(None);
        }
        if s.status == "done" {
            let target = catalog::target(s.relation, &s.target)?;
            check_alone(&target, job_id)?;
        }
        Ok(Some(format!("wanted = 'running', epoch = epoch + 1, retry_epoch = epoch + 1, {HERE}")))
    })?;
    Ok(changed)
}

#[pg_extern(sql = false)]
fn refuse_transaction_block(what: &str) -> std::result::Result<(), ErrorReport> {
    // SAFETY: reads the transaction's state on the main thread.
    if unsafe { pg_sys::IsTransactionBlock() } {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            format!("{what} cannot run inside a transaction block"),
        )
        .hint("Commit first: a job starts when the transaction that made it commits.")
        .into());
    }
    Ok(())
}
