//! Our own tables, read and written as the extension's owner: jobs, their state, their failures.

use std::collections::BTreeSet;

use llm_batch_gateway::protocol::Allowance;
use pgrx::datum::{DatumWithOid, JsonB, TimestampWithTimeZone};
use pgrx::prelude::*;
use serde_json::Value;

use crate::budget::{self, Bill, Funds, Price, UNLIMITED};
use crate::error::{Error, Result};
use crate::job::target::Target;
use crate::options::{OfJob, of_job};
use crate::sql::Row;
use crate::task::Asked;
use crate::{owner, sql, txn, version};

/// A job as its owner sees it.
#[derive(Debug, Clone)]
pub struct Status {
    pub id: i64,
    /// `None`: it was dropped, or is not a role here.
    pub owner: Option<pg_sys::Oid>,
    /// `None`: it is not here.
    pub relation: Option<pg_sys::Oid>,
    table_owner: Option<pg_sys::Oid>,
    pub table: String,
    pub targets: Vec<String>,
    /// Columns that are filled beside the targets.
    pub beside: Vec<String>,
    pub task: String,
    pub status: String,
    /// It is paused, and yet goes on by itself, or has a worker that keeps answers.
    pub has_hope: bool,
}

impl Status {
    /// Checks that the caller is its owner.
    pub fn by_owner(self) -> Result<Self> {
        if owner::is_mine(self.owner) { Ok(self) } else { Err(owner::denied(self.owner, &format!("job {}", self.id))) }
    }

    /// Checks that the caller is its owner or the table's.
    pub fn by_owner_or_tables(self) -> Result<Self> {
        if self.table_owner.is_some() && owner::is_mine(self.table_owner) { Ok(self) } else { self.by_owner() }
    }

    /// Returns true if a role owns its table.
    pub fn is_of_table(&self, role: pg_sys::Oid) -> bool {
        self.table_owner == Some(role)
    }

    /// Its owner and its table, without which it can't go on.
    pub fn check_complete(&self) -> Result<(pg_sys::Oid, pg_sys::Oid)> {
        let Some(owner) = self.owner else {
            return Err(Error::new(PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION, owner::GONE)
                .hint(format!("Set another owner with llm_batch.set_owner({}, …).", self.id)));
        };
        let Some(relation) = self.relation else {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                format!("table {} of job {} does not exist", self.table, self.id),
            )
            .hint(format!("Restore it under this name, or end the job with llm_batch.cancel({}).", self.id)));
        };
        Ok((owner, relation))
    }
}

/// Looks a job up.
pub fn status(id: i64) -> Result<Status> {
    let found = txn::as_extension_owner(|| {
        sql::row(
            "SELECT n.owner, t.oid, t.relowner, p.relation, j.targets::text[], p.task, p.status,
                    llm_batch.goes_on(p.reason) OR coalesce(p.reason = 'owner', false),
                    ARRAY[j.options->>'provenance_column', j.options->>'confidence_column']
               FROM llm_batch.progress p JOIN llm_batch.job j ON j.id = p.job_id
              CROSS JOIN LATERAL (SELECT llm_batch.owner_now(j.owner, j.owner_name, j.home),
                                         llm_batch.relation_now(j.relation, j.relation_name, j.home)) n (owner, relation)
               LEFT JOIN pg_class t ON t.oid = n.relation WHERE p.job_id = $1",
            &[id.into()],
            |r| {
                Ok(Status {
                    id,
                    owner: r.maybe(1)?,
                    relation: r.maybe(2)?,
                    table_owner: r.maybe(3)?,
                    table: r.get(4)?,
                    targets: r.get::<Vec<Option<String>>>(5)?.into_iter().flatten().collect(),
                    task: r.get(6)?,
                    status: r.get(7)?,
                    has_hope: r.get(8)?,
                    beside: r.get::<Vec<Option<String>>>(9)?.into_iter().flatten().collect(),
                })
            },
        )
    })?;
    found.ok_or_else(|| {
        Error::unknown(format!("job {id} does not exist")).hint("The view llm_batch.progress lists your jobs.")
    })
}

/// A job's account, as the log keeps it.
pub fn account(id: i64) -> Result<String> {
    let text = txn::as_extension_owner(|| {
        sql::one::<String>(
            "SELECT format('column %s of %s, task %s, by %s: %s rows done, %s skipped, %s failed, %s superseded, %s requests, %s input and %s output tokens, cost %s',
                           p.target, p.relation, p.task, p.owner, p.rows_done, p.rows_skipped, p.rows_failed, p.rows_superseded,
                           p.requests, p.input_tokens, p.output_tokens, p.cost)
               FROM llm_batch.progress p WHERE p.job_id = $1",
            &[id.into()],
        )
    })?;
    Ok(text.unwrap_or_default())
}

/// Deletes a job, with all that belongs to it; the log keeps its account.
pub fn forget(id: i64, why: &str) -> Result<()> {
    let account = account(id)?;
    let gone = txn::as_extension_owner(|| {
        let gone = sql::run("DELETE FROM llm_batch.job WHERE id = $1", &[id.into()])?;
        sql::run("DELETE FROM llm_batch.row_null WHERE job_id = $1", &[id.into()])?;
        Ok(gone)
    })?;
    if gone > 0 {
        pgrx::log!("llm_batch job {id} is forgotten{why}: {account}");
    }
    Ok(())
}

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

/// Which of these keys (JSON, by position from 1) are listed as failures.
pub fn failed_among(id: i64, keys: Vec<Option<String>>) -> Result<Vec<i64>> {
    txn::as_extension_owner(|| {
        // For each row its own look into the index: planned while the table is small, a join reads all of the job's rows.
        sql::rows(
            "SELECT u.i FROM unnest($2::text[]::jsonb[]) WITH ORDINALITY u (key, i)
              CROSS JOIN LATERAL (SELECT FROM llm_batch.row_failure f WHERE f.job_id = $1 AND f.key = u.key OFFSET 0) f",
            &[id.into(), keys.into()],
            |r| r.get::<i64>(1),
        )
    })
}

/// Which of these rows have had NULL as an answer, by the hashes of key and input.
pub fn null_among(id: i64, rows: Vec<i64>) -> Result<BTreeSet<i64>> {
    let found = txn::as_extension_owner(|| {
        // As above.
        sql::rows(
            "SELECT u.hash FROM unnest($2::bigint[]) u (hash)
               CROSS JOIN LATERAL (SELECT FROM llm_batch.row_null n WHERE n.job_id = $1 AND n.key_hash = u.hash OFFSET 0) n",
            &[id.into(), rows.into()],
            |r| r.get::<i64>(1),
        )
    })?;
    Ok(found.into_iter().collect())
}

/// Notes rows that have had NULL as an answer, by the hashes of key and input.
fn note_nulls(id: i64, rows: &[i64]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    sql::run(
        "INSERT INTO llm_batch.row_null (job_id, key_hash) SELECT $1, unnest($2::bigint[]) ON CONFLICT DO NOTHING",
        &[id.into(), rows.to_vec().into()],
    )
    .map(|_| ())
}

/// The number of listed rows that killed what worked on them.
pub fn crashes(id: i64) -> Result<i64> {
    txn::as_extension_owner(|| {
        let crashes = "SELECT count(*) FROM llm_batch.row_failure WHERE job_id = $1 AND class = 'crash'";
        Ok(sql::one::<i64>(crashes, &[id.into()])?.unwrap_or(0))
    })
}

/// A row to list.
#[derive(Debug)]
pub struct Failure {
    /// JSON.
    pub key: String,
    pub is_skip: bool,
    pub class: String,
    pub attempts: u32,
    pub detail: String,
}

/// Changes since the last write.
#[derive(Debug, Default)]
pub struct Delta {
    pub done: i64,
    pub superseded: i64,
    pub reused: i64,
    /// Rows that have had NULL as an answer.
    pub nulls: Vec<i64>,
    pub spent: Bill,
    pub rows_per_second: f64,
    pub tokens_per_minute: f64,
    /// Rows were done, as far as they can be.
    pub is_progress: bool,
}

/// Enters counters, of the job and of its models. What was paid is multiplied and never divided: exact to the last digit.
const WRITE: &str = "
    WITH spent AS (
        SELECT u.*, ((u.input - u.cached) * coalesce(u.price, 0) + u.cached * coalesce(u.cached_price, u.price, 0)
                     + u.written * coalesce(u.price, 0) * u.surcharge * 0.01
                     + u.output * coalesce(u.output_price, 0)) * 0.000001 AS cost,
               (u.maybe_input * coalesce(u.price, 0) * (1 + u.surcharge * 0.01)
                + u.maybe_output * coalesce(u.output_price, 0)) * 0.000001 AS maybe
          FROM ROWS FROM (unnest($18::text[]), unnest($19::text[]::numeric[]), unnest($20::text[]::numeric[]),
                          unnest($21::text[]::numeric[]), unnest($22::bigint[]), unnest($23::bigint[]), unnest($24::bigint[]),
                          unnest($25::bigint[]), unnest($26::bigint[]), unnest($27::bigint[]), unnest($28::bigint[]),
                          unnest($29::bigint[]), unnest($30::bigint[]))
               u (model, price, output_price, cached_price, rows, requests, input, cached, output, maybe_input, maybe_output,
                  written, surcharge)),
    entered AS (
        INSERT INTO llm_batch.job_model AS m
        SELECT s.job_id, u.model, u.rows, u.requests, u.input, u.cached, u.output, u.cost, u.maybe
          FROM spent u, llm_batch.job_state s, llm_batch.job j
         WHERE s.job_id = $1 AND j.id = s.job_id AND j.home = llm_batch.home()
            ON CONFLICT (job_id, model) DO UPDATE
           SET rows_answered = m.rows_answered + excluded.rows_answered, requests = m.requests + excluded.requests,
               input_tokens = m.input_tokens + excluded.input_tokens,
               cached_input_tokens = m.cached_input_tokens + excluded.cached_input_tokens,
               output_tokens = m.output_tokens + excluded.output_tokens, cost = m.cost + excluded.cost,
               cost_unconfirmed = m.cost_unconfirmed + excluded.cost_unconfirmed)
    UPDATE llm_batch.job_state s
       SET rows_done = rows_done + $2, rows_skipped = rows_skipped + $3, rows_failed = rows_failed + $4,
           rows_superseded = rows_superseded + $5, rows_reused = rows_reused + $6,
           requests = requests + $7, input_tokens = input_tokens + $8,
           cached_input_tokens = cached_input_tokens + $9, output_tokens = output_tokens + $10,
           cost = cost + (SELECT coalesce(sum(u.cost), 0) FROM spent u),
           tokens_unconfirmed = tokens_unconfirmed + $11 + $12,
           cost_unconfirmed = cost_unconfirmed + (SELECT coalesce(sum(u.maybe), 0) FROM spent u),
           cost_reserved = greatest(cost_reserved - $13 * 0.000000000001, 0),
           tokens_reserved = greatest(tokens_reserved - $14, 0),
           rows_per_second = $15, tokens_per_minute = $16, updated_at = now(),
           starts = greatest(starts - $17::int, 0)
      FROM llm_batch.job j
     WHERE s.job_id = $1 AND j.id = s.job_id AND j.home = llm_batch.home()
 RETURNING j.max_cost IS NOT NULL OR j.max_tokens IS NOT NULL,
           CASE WHEN j.max_cost IS NOT NULL THEN
               greatest(least(floor((j.max_cost - s.cost - s.cost_unconfirmed - s.cost_reserved) * 1000000000000), 9000000000000000000), 0)::bigint END,
           CASE WHEN j.max_tokens IS NOT NULL THEN
               greatest(j.max_tokens - s.input_tokens - s.output_tokens - s.tokens_unconfirmed - s.tokens_reserved, 0) END,
           floor(s.cost_reserved * 1000000000000)::bigint, s.tokens_reserved,
           concat_ws(' and ', '$' || trim_scale(s.cost + s.cost_unconfirmed) || ' of $' || trim_scale(j.max_cost),
                     s.input_tokens + s.output_tokens + s.tokens_unconfirmed || ' of ' || j.max_tokens || ' tokens')";

/// Writes failures and counters; what the job's budget then has, if there is one and the job still exists.
pub fn write<'a>(
    id: i64,
    asked: &Asked,
    delta: &Delta,
    failures: impl IntoIterator<Item = &'a Failure>,
) -> Result<Option<Account>> {
    txn::as_extension_owner(|| {
        let (skipped, failed) = list(id, failures)?;
        let count = |n: u64| DatumWithOid::from(i64::try_from(n).unwrap_or(i64::MAX));
        let spent = &delta.spent.total();
        let taken = budget::taken(spent, asked.stream.budget.unwrap_or_default());
        let mut args: Vec<DatumWithOid> = vec![
            id.into(),
            delta.done.into(),
            skipped.into(),
            failed.into(),
            delta.superseded.into(),
            delta.reused.into(),
            count(spent.requests),
            count(spent.input_tokens),
            count(spent.cached_input_tokens),
            count(spent.output_tokens),
            count(spent.unconfirmed_input_tokens),
            count(spent.unconfirmed_output_tokens),
            count(taken.cost),
            count(taken.tokens),
            delta.rows_per_second.into(),
            delta.tokens_per_minute.into(),
            i32::from(delta.is_progress).into(),
        ];
        args.extend(bill(asked, &delta.spent));
        // One statement, which sees the row of the job's state or does not: the accounts of its models agree with it even
        // while a dump is restored over a job that runs, and one of the two tables is not filled yet.
        let accounts = sql::rows_mut(WRITE, &args, |r| {
            let limited = |column| Ok::<_, Error>(r.maybe::<i64>(column)?.map_or(UNLIMITED, |n| n.max(0) as u64));
            Ok(r.get::<bool>(1)?.then_some(Account {
                funds: Funds {
                    free: Allowance { cost: limited(2)?, tokens: limited(3)? },
                    reserved: Allowance { cost: limited(4)?, tokens: limited(5)? },
                },
                spent: r.get(6)?,
            }))
        })?;
        // The job is there, and stays until we have committed: its state's row is ours.
        if !accounts.is_empty() {
            note_nulls(id, &delta.nulls)?;
        }
        Ok(accounts.into_iter().flatten().next())
    })
}

/// What was spent on each model, as arrays: the last arguments of WRITE.
fn bill(asked: &Asked, bill: &Bill) -> Vec<DatumWithOid<'static>> {
    let (mut names, mut prices, mut counts) = (Vec::new(), [vec![], vec![], vec![]], [(); 9].map(|()| Vec::new()));
    for (place, spent, rows) in bill.iter() {
        let (name, price) = asked.model(place);
        let Price { input, output, cached_input, write_surcharge, .. } = price.cloned().unwrap_or_default();
        names.push(name.to_owned());
        prices.iter_mut().zip([input, output, cached_input]).for_each(|(all, price)| all.push(price));
        let more = [
            rows,
            spent.requests,
            spent.input_tokens,
            spent.cached_input_tokens,
            spent.output_tokens,
            spent.unconfirmed_input_tokens,
            spent.unconfirmed_output_tokens,
            spent.written_input_tokens,
            write_surcharge,
        ];
        counts.iter_mut().zip(more).for_each(|(all, n)| all.push(i64::try_from(n).unwrap_or(i64::MAX)));
    }
    let mut args: Vec<DatumWithOid> = vec![names.into()];
    args.extend(prices.map(DatumWithOid::from));
    args.extend(counts.map(DatumWithOid::from));
    args
}

/// Lists failures: how many rows were skipped, and how many failed, that were not listed before.
fn list<'a>(id: i64, failures: impl IntoIterator<Item = &'a Failure>) -> Result<(i64, i64)> {
    let (mut skipped, mut failed) = (0, 0);
    for f in failures {
        let state = if f.is_skip { "skipped" } else { "failed" };
        let new = sql::run(
            "INSERT INTO llm_batch.row_failure (job_id, key, state, class, attempts, detail)
             SELECT s.job_id, $2::jsonb, $3, $4, $5, $6 FROM llm_batch.job_state s WHERE s.job_id = $1
                 ON CONFLICT (job_id, key) DO NOTHING RETURNING 1",
            &[
                id.into(),
                f.key.as_str().into(),
                state.into(),
                f.class.as_str().into(),
                (f.attempts as i32).into(),
                f.detail.as_str().into(),
            ],
        )? as i64;
        if f.is_skip {
            skipped += new;
        } else {
            failed += new;
        }
    }
    Ok((skipped, failed))
}

/// The budget of a job.
pub struct Account {
    pub funds: Funds,
    /// The spending and the budget, in words.
    pub spent: String,
}

/// Enters what the gateway is about to be allowed.
pub fn reserve(id: i64, allowance: Allowance) -> Result<()> {
    let limited = |n: u64| if n == UNLIMITED { 0 } else { i64::try_from(n).unwrap_or(i64::MAX) };
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job_state SET cost_reserved = cost_reserved + $2 * 0.000000000001, tokens_reserved = tokens_reserved + $3
              WHERE job_id = $1",
            &[id.into(), limited(allowance.cost).into(), limited(allowance.tokens).into()],
        )
        .map(|_| ())
    })
}

/// Takes back what the gateway was allowed and has not reported as spent. In doubt it may have been spent.
pub fn release(id: i64, in_doubt: bool) -> Result<()> {
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.job_state
                SET cost_unconfirmed = cost_unconfirmed + CASE WHEN $2 THEN cost_reserved ELSE 0 END, cost_reserved = 0,
                    tokens_unconfirmed = tokens_unconfirmed + CASE WHEN $2 THEN tokens_reserved ELSE 0 END, tokens_reserved = 0
              WHERE job_id = $1 AND (cost_reserved > 0 OR tokens_reserved > 0)",
            &[id.into(), in_doubt.into()],
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
                SET status = $3, reason = $4, last_error = coalesce($5, last_error), resume_at = $6, epoch = $2, updated_at = now(),
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
        sql::run("SELECT pg_catalog.pg_notify('llm_batch', $1)", &[payload.into()])?;
        if !matches!(outcome, Outcome::Cancelled) {
            pgrx::log!("llm_batch job {id} is {status}: {}", account(id)?);
        }
    }
    // If the job's row is gone, there is nothing to enter.
    Ok(entered == 1 || !matches!(outcome, Outcome::Done))
}
