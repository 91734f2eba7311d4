//! A job as its worker reads it, and how its runs begin and end. Our tables are read and written as the extension's owner.

use pgrx::datum::{JsonB, TimestampWithTimeZone};
use pgrx::prelude::*;
use serde_json::Value;

use crate::error::Result;
use crate::job::ledger::release;
use crate::job::status::account;
use crate::job::target::Target;
use crate::options::{OfJob, of_job};
use crate::sql::Row;
use crate::{sql, txn, version};

/// A job as its worker needs it.
#[derive(Debug, Clone)]
pub struct Job {
    pub id: i64,
    /// `None`: it was dropped.
    pub owner: Option<pg_sys::Oid>,
    pub relation: pg_sys::Oid,
    pub targets: Vec<Target>,
    pub key_names: Vec<String>,
    pub key_attnums: Vec<i16>,
    pub input: String,
    pub filter: Option<String>,
    /// Dollars, as SQL writes them, and tokens.
    pub budget: (Option<String>, Option<i64>),
    pub task: String,
    /// Those of the task.
    pub options: Value,
    pub isolation: Option<String>,
    pub provenance: Option<String>,
    pub confidence: Option<String>,
    pub has_deadline: bool,
    pub search_path: String,
    pub wanted: String,
    pub epoch: i32,
    pub retry_epoch: i32,
    /// It is to run now: not ended, not paused for longer.
    pub is_due: bool,
    /// Its home, which is here.
    pub home: String,
    /// The rows have been counted.
    pub is_counted: bool,
    pub retried_epoch: i32,
    pub has_failures: bool,
    /// NULL has been an answer, to rows that a pass may come to.
    pub has_nulls: bool,
    pub max_attempts: u32,
    /// The run before could write nothing.
    pub was_unwritable: bool,
    /// The number of runs, this one included, that have begun since one did a row.
    pub starts: i32,
}

/// Reads a job; `None` if it is gone, or not at home here, or nothing of the extension can be used.
pub fn load(id: i64) -> Result<Option<Job>> {
    if version::installed()?.is_none_or(|v| v != version::LIBRARY) {
        return Ok(None);
    }
    txn::as_extension_owner(|| {
        sql::row(
            "SELECT j.relation::oid, j.targets::text[], j.target_attnums, j.target_types, j.key_names::text[], j.key_attnums,
                    j.input, j.filter, j.task, j.options, j.search_path, j.wanted, j.epoch, j.retry_epoch,
                    j.wanted = 'running' AND (s.epoch < j.epoch OR s.status = 'running'
                        OR (s.status = 'paused' AND s.resume_at IS NOT NULL AND s.resume_at <= clock_timestamp())),
                    s.rows_total IS NOT NULL, s.retried_epoch,
                    EXISTS (SELECT FROM llm_batch.row_failure f WHERE f.job_id = j.id),
                    j.max_cost::text, j.max_tokens, j.home, llm_batch.owner_now(j.owner, j.owner_name, j.home),
                    j.fields, EXISTS (SELECT FROM llm_batch.row_null n WHERE n.job_id = j.id)
               FROM llm_batch.job j JOIN llm_batch.job_state s ON s.job_id = j.id
              WHERE j.id = $1 AND j.home = llm_batch.home()",
            &[id.into()],
            |r| {
                let OfJob { task: options, isolation, provenance, confidence, deadline } = of_job(r.get::<JsonB>(10)?.0)?;
                Ok(Job {
                    id,
                    owner: r.maybe(22)?,
                    relation: r.get(1)?,
                    targets: targets(r)?,
                    key_names: r.get::<Vec<Option<String>>>(5)?.into_iter().flatten().collect(),
                    key_attnums: r.get::<Vec<Option<i16>>>(6)?.into_iter().flatten().collect(),
                    input: r.get(7)?,
                    filter: r.maybe(8)?,
                    budget: (r.maybe(19)?, r.maybe(20)?),
                    home: r.get(21)?,
                    task: r.get(9)?,
                    isolation,
                    provenance,
                    confidence,
                    has_deadline: deadline.is_some(),
                    options,
                    search_path: r.get(11)?,
                    wanted: r.get(12)?,
                    epoch: r.get(13)?,
                    retry_epoch: r.get(14)?,
                    is_due: r.get(15)?,
                    is_counted: r.get(16)?,
                    retried_epoch: r.get(17)?,
                    has_failures: r.get(18)?,
                    has_nulls: r.get(24)?,
                    max_attempts: 3,
                    was_unwritable: false,
                    starts: 0,
                })
            },
        )
    })
}

/// Waits until what was changed together with the job, such as its owner's rights, is known here.
pub fn hear_all(id: i64) -> Result<()> {
    let changed_by = txn::as_extension_owner(|| {
        sql::one::<i64>("SELECT j.xmin::text::bigint FROM llm_batch.job j WHERE j.id = $1", &[id.into()])
    })?;
    if let Some(xid) = changed_by.and_then(|xid| u32::try_from(xid).ok()) {
        txn::wait_for(xid.into());
    }
    Ok(())
}

/// The columns of the job that `load()` reads.
fn targets(r: &Row) -> Result<Vec<Target>> {
    let names = r.get::<Vec<Option<String>>>(2)?.into_iter().flatten();
    let attnums = r.get::<Vec<Option<i16>>>(3)?.into_iter().flatten();
    let types = r.get::<Vec<Option<pg_sys::Oid>>>(4)?.into_iter().flatten();
    let fields = r.get::<Vec<Option<String>>>(23)?;
    let all = names.zip(attnums).zip(types).zip(fields);
    Ok(all.map(|(((name, attnum), type_oid), field)| Target::new(name, attnum, type_oid, field)).collect())
}

/// Counts a run that is about to begin, before anything can kill it: how many there were since one did a row, and the
/// job's last error. One that was told to end does not count; an end in order, a `resume()` and ten quiet minutes make
/// a new beginning.
pub fn count_start(id: i64, told: bool) -> Result<(i32, Option<String>)> {
    let counted = txn::as_extension_owner(|| {
        sql::rows_mut(
            "UPDATE llm_batch.job_state s
                SET starts = CASE WHEN s.epoch = j.epoch AND s.updated_at > now() - interval '10 minutes' THEN s.starts ELSE 0 END + $2,
                    updated_at = now()
               FROM llm_batch.job j WHERE s.job_id = $1 AND j.id = s.job_id RETURNING s.starts, s.last_error",
            &[id.into(), i32::from(!told).into()],
            |r| Ok((r.get::<i32>(1)?, r.maybe::<String>(2)?)),
        )
    })?;
    Ok(counted.into_iter().next().unwrap_or_default())
}

/// A run ends in order, or by an error that says nothing about the job.
pub fn interrupted(id: i64, error: Option<&str>) -> Result<()> {
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job_state
                SET starts = CASE WHEN $2 IS NULL THEN 0 ELSE starts END,
                    reason = CASE WHEN $2 IS NOT NULL AND status = 'running' THEN NULL ELSE reason END, last_error = coalesce($2, last_error) WHERE job_id = $1",
            &[id.into(), error.into()],
        )
        .map(|_| ())
    })
}

/// Begins a run: the state becomes that of the present epoch, and failures from before a `retry_failed()` are forgotten.
pub fn begin(job: &Job) -> Result<()> {
    txn::as_extension_owner(|| {
        if job.retry_epoch > job.retried_epoch {
            sql::run(
                "WITH gone AS (DELETE FROM llm_batch.row_failure WHERE job_id = $1 RETURNING state)
                 UPDATE llm_batch.job_state SET retried_epoch = $2,
                        rows_skipped = rows_skipped - (SELECT count(*) FROM gone WHERE state = 'skipped'),
                        rows_failed = rows_failed - (SELECT count(*) FROM gone WHERE state = 'failed')
                  WHERE job_id = $1",
                &[job.id.into(), job.retry_epoch.into()],
            )?;
        }
        sql::run(
            "UPDATE llm_batch.job_state SET status = 'running', reason = NULL, resume_at = NULL, epoch = $2,
                    last_error = CASE WHEN reason = 'locked' THEN NULL ELSE last_error END,
                    started_at = coalesce(started_at, now()), updated_at = now()
              WHERE job_id = $1",
            &[job.id.into(), job.epoch.into()],
        )?;
        Ok(())
    })
}

/// Why a job is paused, or what is in its way.
pub fn reason(id: i64) -> Result<Option<String>> {
    txn::as_extension_owner(|| sql::one("SELECT reason FROM llm_batch.job_state WHERE job_id = $1", &[id.into()]))
}

/// Shows what is in the way of a job's run (reason, text) and when it is tried again; or that nothing is.
pub fn show(id: i64, epoch: i32, status: &str, why: Option<(&str, &str)>, resume_at: Option<i64>) -> Result<()> {
    let resume_at = resume_at.and_then(|at| TimestampWithTimeZone::try_from(at).ok());
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job_state s
                SET status = $3, reason = $4, last_error = $5, resume_at = $6, epoch = $2, updated_at = now()
               FROM llm_batch.job j
              WHERE s.job_id = $1 AND j.id = s.job_id AND j.epoch = $2 AND j.home = llm_batch.home()
                AND s.status IN ('running', 'paused')",
            &[
                id.into(),
                epoch.into(),
                status.into(),
                why.map(|w| w.0).into(),
                why.map(|w| w.1).into(),
                resume_at.into(),
            ],
        )
        .map(|_| ())
    })
}

/// Enters how many rows there are to fill, and how many of these have no text.
pub fn count(id: i64, total: i64, empty: i64) -> Result<()> {
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job_state SET rows_total = $2, rows_skipped = rows_skipped + $3, updated_at = now() WHERE job_id = $1",
            &[id.into(), total.into(), empty.into()],
        )
        .map(|_| ())
    })
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Done,
    Failed(String),
    Cancelled,
    /// Reason, text, and when it goes on by itself: microseconds as Postgres counts them.
    Paused(&'static str, Option<String>, Option<i64>),
}

/// Enters how a run of an epoch ended. False, and nothing is entered, if the job is done but was given more to do
/// meanwhile, or is gone. In doubt, what the gateway was allowed may have been spent.
pub fn end(id: i64, epoch: i32, outcome: &Outcome, in_doubt: bool) -> Result<bool> {
    let (status, reason, error, resume_at) = match outcome {
        Outcome::Done => ("done", None, None, None),
        Outcome::Failed(error) => ("failed", None, Some(error.clone()), None),
        Outcome::Cancelled => ("cancelled", None, None, None),
        Outcome::Paused(reason, error, at) => ("paused", Some(*reason), error.clone(), *at),
    };
    let resume_at = resume_at.and_then(|at| TimestampWithTimeZone::try_from(at).ok());
    let entered = txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job_state s
                SET status = $3, reason = $4, last_error = CASE WHEN $3 <> 'done' THEN coalesce($5, last_error) END,
                    resume_at = $6, epoch = $2, updated_at = now(),
                    rows_superseded = CASE WHEN $3 = 'done'
                        THEN greatest(s.rows_total - s.rows_done - s.rows_skipped - s.rows_failed, s.rows_superseded)
                        ELSE s.rows_superseded END,
                    rows_total = CASE WHEN $3 = 'done'
                        THEN greatest(s.rows_total, s.rows_done + s.rows_skipped + s.rows_failed + s.rows_superseded)
                        ELSE s.rows_total END,
                    rows_per_second = NULL, tokens_per_minute = NULL, starts = 0
               FROM llm_batch.job j
              WHERE s.job_id = $1 AND j.id = s.job_id AND (j.epoch = $2 OR $3 <> 'done')
          RETURNING 1",
            &[id.into(), epoch.into(), status.into(), reason.into(), error.into(), resume_at.into()],
        )
    })?;
    if entered == 1 {
        release(id, in_doubt)?;
    }
    if entered == 1 && matches!(outcome, Outcome::Done | Outcome::Failed(_) | Outcome::Cancelled) {
        let payload = format!("{{\"job\": {id}, \"status\": \"{status}\"}}");
        // A session that listens and never reads can fill the queue. Then no commit with a notification succeeds.
        sql::run(
            "SELECT pg_catalog.pg_notify('llm_batch', $1) WHERE pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.9",
            &[payload.into()],
        )?;
        if !matches!(outcome, Outcome::Cancelled) {
            pgrx::log!("llm_batch job {id} is {status}: {}", account(id)?);
        }
    }
    // If the job's row is gone, there is nothing to enter.
    Ok(entered == 1 || !matches!(outcome, Outcome::Done))
}
