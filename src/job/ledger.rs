//! What a job has done and spent: its counters, its failures, its answers that are NULL, its budget.

use std::collections::BTreeSet;

use llm_batch_gateway::protocol::{Allowance, Spent};
use pgrx::datum::DatumWithOid;

use crate::budget::{self, Bill, Funds, Price, UNLIMITED};
use crate::error::{Error, Result};
use crate::task::Asked;
use crate::{sql, txn};

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
                     + u.output * coalesce(u.output_price, 0)) * 0.000001
                   * CASE u.discount WHEN 0 THEN 1 ELSE 1 - u.discount * 0.01 END AS cost,
               (u.maybe_input * coalesce(u.price, 0) * (1 + u.surcharge * 0.01)
                + u.maybe_output * coalesce(u.output_price, 0)) * 0.000001 AS maybe
          FROM ROWS FROM (unnest($18::text[]), unnest($19::text[]::numeric[]), unnest($20::text[]::numeric[]),
                          unnest($21::text[]::numeric[]), unnest($22::bigint[]), unnest($23::bigint[]), unnest($24::bigint[]),
                          unnest($25::bigint[]), unnest($26::bigint[]), unnest($27::bigint[]), unnest($28::bigint[]),
                          unnest($29::bigint[]), unnest($30::bigint[]), unnest($31::bigint[]))
               u (model, price, output_price, cached_price, rows, requests, input, cached, output, maybe_input, maybe_output,
                  written, surcharge, discount)),
    entered AS (
        INSERT INTO llm_batch.job_model AS m
        SELECT s.job_id, u.model, sum(u.rows), sum(u.requests), sum(u.input), sum(u.cached), sum(u.output), sum(u.cost), sum(u.maybe)
          FROM spent u, llm_batch.job_state s, llm_batch.job j
         WHERE s.job_id = $1 AND j.id = s.job_id AND j.home = llm_batch.home()
         GROUP BY s.job_id, u.model
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

/// What was spent on each model, at the normal tier and at the tier "flex", as arrays: the last arguments of WRITE.
fn bill(asked: &Asked, bill: &Bill) -> Vec<DatumWithOid<'static>> {
    let (mut names, mut prices, mut counts) = (Vec::new(), [vec![], vec![], vec![]], [(); 10].map(|()| Vec::new()));
    let by_tier = bill.iter().flat_map(|(place, spent, rows)| {
        let [normal, flex] = spent.by_tier();
        [(place, normal, rows, false), (place, flex, 0, true)]
    });
    for (place, spent, rows, is_flex) in by_tier.filter(|(_, spent, _, is_flex)| !is_flex || *spent != Spent::default())
    {
        let (name, price) = asked.model(place);
        let Price { input, output, cached_input, write_surcharge, flex_discount, .. } =
            price.cloned().unwrap_or_default();
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
            if is_flex { flex_discount.min(100) } else { 0 },
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
