//! `estimate()`: what a job would take, from a sample of its rows. The gateway packs and counts it as it would a job's
//! rows, and sends nothing.

use std::ffi::CStr;

use llm_batch_core::limiter::Limits;
use llm_batch_gateway::protocol::{Estimate, FromGateway, Item, ToGateway, most_text};
use pgrx::datum::{Interval, JsonB};
use pgrx::iter::TableIterator;
use pgrx::name;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::check::{Checked, Given, one_column, several_columns};
use super::plan::{Rows, cut};
use crate::budget::Price;
use crate::error::{Error, Result};
use crate::json::Json;
use crate::task::Asked;
use crate::text::Text;
use crate::{asking, client, provenance, shared, sql, txn};

/// Most rows of a sample, less than may be without an outcome.
const MOST_ROWS: i32 = 4_000;
/// Rows of a sample by default.
const DEFAULT_ROWS: i32 = 1_000;
/// Most bytes of their text, about: a frame holds them even if every byte is escaped.
const MOST_BYTES: f64 = 2_097_152.0;

/// The rows that a job would find.
struct Population {
    /// Rows with text.
    rows: i64,
    /// Those that would be sent: of rows with the same text one, where answers are reused.
    sent: i64,
    sample: Vec<Sampled>,
}

/// A text, and what keeps it apart from others.
type Sampled = (String, Option<String>);

/// Counts the rows and draws a sample; as the owner of the job that would be. Of a job whose rows are kept apart the
/// sample is a stretch of its key, in whose order a job takes its rows: how full requests get depends on how many rows
/// with the same value it meets together. The gateway then sees which texts come again.
fn look(
    rows: &Rows,
    stretch: Option<&[String]>,
    is_reused: bool,
    most_text: usize,
    pack: i64,
    most: i64,
) -> Result<Population> {
    let is_reused = is_reused && stretch.is_none();
    let Rows { from, todo, has_text, .. } = rows;
    let text = cut(&rows.input, most_text);
    let isolation = &rows.isolation;
    let group = if is_reused { format!("GROUP BY {}", rows.hash(0)) } else { String::new() };
    let counted = sql::rows_once(
        &format!(
            "SELECT COALESCE(pg_catalog.sum(q.\"llm_batch n\"), 0)::pg_catalog.int8, pg_catalog.count(*),
                    COALESCE(pg_catalog.sum(q.\"llm_batch b\"), 0)::pg_catalog.float8
               FROM (SELECT {n} AS \"llm_batch n\", {b} AS \"llm_batch b\" FROM {from} WHERE {todo} AND {has_text} {group}) q",
            n = if is_reused { "pg_catalog.count(*)" } else { "1" },
            b = aggregate(is_reused, &format!("pg_catalog.octet_length({text})")),
        ),
        &[],
        |r| Ok((r.get::<i64>(1)?, r.get::<i64>(2)?, r.get::<f64>(3)?)),
    )?;
    let (count, sent, bytes) = counted.into_iter().next().unwrap_or_default();
    let mean = bytes / sent.max(1) as f64;
    // With fewer rows than a request holds, each row would pay more for the instructions.
    let most = most.max(pack).min((MOST_BYTES / mean.max(1.0)) as i64).max(1);
    // A part of a request in the sample would count as a whole one for each time the sample fits into the table.
    let wanted = if sent > most && most > pack { most - most % pack } else { most.min(sent) };
    if let Some(key) = stretch {
        let sample = sql::rows_once(
            &format!(
                "SELECT {text}, {isolation} FROM {from} WHERE {todo} AND {has_text} ORDER BY {}
                 OFFSET (SELECT (pg_catalog.random() OPERATOR(pg_catalog.*) {})::pg_catalog.int8) LIMIT {wanted}",
                key.iter().map(|column| sql::name(column)).collect::<Vec<_>>().join(", "),
                (sent - wanted).max(0),
            ),
            &[],
            |r| Ok((r.get::<Text>(1)?.lossy(), r.maybe::<String>(2)?)),
        )?;
        return Ok(Population { rows: count, sent, sample });
    }
    // More are drawn than are wanted, from all over the table.
    let part = (2 * wanted + 20) as f64 / sent.max(1) as f64;
    let (drawn, group) = if is_reused {
        // Texts are drawn by their hash: all rows of a text, which are then taken as one, or none of them.
        let hash = rows.hash(shared::now());
        let threshold = (part * 2_f64.powi(63)) as i64;
        let drawn = format!("({hash} OPERATOR(pg_catalog.&) {}) OPERATOR(pg_catalog.<=) {threshold}", i64::MAX);
        (drawn, format!("GROUP BY {hash}"))
    } else {
        (format!("pg_catalog.random() OPERATOR(pg_catalog.<) {part}::pg_catalog.float8"), String::new())
    };
    let texts = sql::rows_once(
        &format!(
            "SELECT {} FROM {from} WHERE {todo} AND {has_text} AND {drawn} {group} ORDER BY pg_catalog.random()",
            aggregate(is_reused, &text)
        ),
        &[],
        |r| Ok((r.get::<Text>(1)?.lossy(), None)),
    )?;
    Ok(Population { rows: count, sent, sample: balanced(texts, wanted, mean) })
}

/// One of the rows with the same text stands for all.
fn aggregate(is_reused: bool, expression: &str) -> String {
    if is_reused { format!("pg_catalog.min({expression})") } else { expression.to_owned() }
}

/// Chooses so many of the texts that their mean length is that of all texts: chance would be some per cent off.
fn balanced(texts: Vec<Sampled>, wanted: i64, mean: f64) -> Vec<Sampled> {
    let (mut long, mut short): (Vec<_>, Vec<_>) = texts.into_iter().partition(|(t, _)| t.len() as f64 > mean);
    let mut sample = Vec::new();
    let mut bytes = 0;
    for n in 0..wanted {
        let next = if bytes as f64 <= n as f64 * mean {
            long.pop().or_else(|| short.pop())
        } else {
            short.pop().or_else(|| long.pop())
        };
        let Some(text) = next else { break };
        bytes += text.0.len();
        sample.push(text);
    }
    sample
}

fn estimate_of(given: &Given, most_rows: i32) -> Result<(Population, Estimate, Asked)> {
    if !(1..=MOST_ROWS).contains(&most_rows) {
        return Err(Error::invalid("\"sample_rows\" must be between 1 and 4000"));
    }
    let Checked { target, fields, owner, asked } = given.check(false)?;
    let stream = &asked.stream;
    let (input, filter, isolation) = (given.input, given.filter, given.isolation.as_deref());
    let (column, task) = (given.provenance.as_deref(), given.task);
    let known = column.map(|column| provenance::Known { column, task, version: asked.version });
    let targets: Vec<_> =
        target.columns.iter().map(|c| c.name.as_str()).zip(fields.iter().map(Option::as_deref)).collect();
    let rows = Rows::new(&target.name, target.is_partitioned, input, &targets, filter, isolation, known.as_ref());
    let options = &stream.task.options;
    let pack = i64::from(options.max_rows_per_request.max(1));
    let most_text = most_text(stream.model.max_request_tokens);
    let stretch = isolation.map(|_| target.key_names.as_slice());
    let population = asking::refused(|| {
        txn::as_role(owner, || look(&rows, stretch, options.reuse, most_text, pack, i64::from(most_rows)))
    })?;
    let item = |((text, isolation), n): (&Sampled, u64)| Item {
        n,
        text: text.clone(),
        isolation: isolation.clone(),
        again: None,
    };
    let items = population.sample.iter().zip(0..).map(item).collect();
    let estimate = client::ask(stream, &ToGateway::Estimate(items), |message| match message {
        FromGateway::Estimated(estimate) => Ok(Some(estimate)),
        _ => Ok(None),
    })?;
    Ok((population, estimate, asked))
}

/// Dollars, if the prices are known.
fn cost(price: &Price, input: i64, output: i64) -> Result<Option<AnyNumeric>> {
    sql::one(
        "SELECT pg_catalog.trim_scale((($1::pg_catalog.numeric OPERATOR(pg_catalog.*) $3) OPERATOR(pg_catalog.+)
                                       ($2::pg_catalog.numeric OPERATOR(pg_catalog.*) $4)) OPERATOR(pg_catalog.*) 0.000001)",
        &[price.input.as_deref().into(), price.output.as_deref().into(), input.into(), output.into()],
    )
}

/// The time that the tightest limit takes.
fn duration(limits: Limits, inputs: i64, requests: i64, input: i64, output: i64) -> Option<Interval> {
    let limits = [
        (inputs, limits.inputs_per_minute),
        (requests, limits.requests_per_minute),
        (input.saturating_add(output), limits.tokens_per_minute),
        (input, limits.input_tokens_per_minute),
        (output, limits.output_tokens_per_minute),
    ];
    let minutes = limits.iter().filter_map(|(n, limit)| Some(*n as f64 / (*limit)? as f64)).reduce(f64::max)?;
    Interval::new(0, 0, ((minutes * 60.0).ceil() * 1e6) as i64).ok()
}

/// The row that `estimate()` returns.
type Estimated = (i64, i64, i64, i64, Option<AnyNumeric>, Option<Interval>, i64, Option<JsonB>);

fn estimated(given: &Given, sample_rows: Option<i32>) -> Result<Estimated> {
    let (population, estimate, asked) = estimate_of(given, sample_rows.unwrap_or(DEFAULT_ROWS))?;
    let sample = population.sample.len() as i64;
    let scale = |n: u64| (n as i128 * i128::from(population.sent) / i128::from(sample.max(1))) as i64;
    // The last request may be small, and is one nevertheless.
    let requests = scale(estimate.requests).max(i64::from(estimate.requests > 0));
    let (input, output) = (scale(estimate.input_tokens), scale(estimate.output_tokens));
    let example = estimate.example.and_then(|text| serde_json::from_str(&text).ok()).map(JsonB);
    let price = asked.model(0).1.cloned().unwrap_or_default();
    let cost = cost(&price, input, output)?;
    let duration = duration(asked.stream.limits(), population.sent, requests, input, output);
    Ok((population.rows, requests, input, output, cost, duration, sample, example))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[allow(clippy::too_many_arguments)]
#[pg_extern(sql = false)]
fn estimate(
    relation: Option<pg_sys::Oid>,
    input: Option<&str>,
    target: Option<&CStr>,
    task: Option<&str>,
    filter: Option<&str>,
    options: Option<Json>,
    sample_rows: Option<i32>,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(rows, i64),
            name!(requests, i64),
            name!(input_tokens, i64),
            name!(output_tokens, i64),
            name!(cost, Option<AnyNumeric>),
            name!(duration, Option<Interval>),
            name!(sample_rows, i64),
            name!(example_request, Option<JsonB>),
        ),
    >,
    ErrorReport,
> {
    let given = Given::new(relation, input, one_column(target)?, task, filter, options)?;
    Ok(TableIterator::once(estimated(&given, sample_rows)?))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[allow(clippy::too_many_arguments)]
#[pg_extern(sql = false)]
fn estimate_targets(
    relation: Option<pg_sys::Oid>,
    input: Option<&str>,
    targets: Option<Json>,
    task: Option<&str>,
    filter: Option<&str>,
    options: Option<Json>,
    sample_rows: Option<i32>,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(rows, i64),
            name!(requests, i64),
            name!(input_tokens, i64),
            name!(output_tokens, i64),
            name!(cost, Option<AnyNumeric>),
            name!(duration, Option<Interval>),
            name!(sample_rows, i64),
            name!(example_request, Option<JsonB>),
        ),
    >,
    ErrorReport,
> {
    let given = Given::new(relation, input, several_columns(targets)?, task, filter, options)?;
    Ok(TableIterator::once(estimated(&given, sample_rows)?))
}
