//! Functions for many rows: `llm_classify_batch()`, `llm_classify_array()`, `llm_run_batch()`, `llm_run_array()`.

use std::cell::RefCell;

use llm_batch_gateway::protocol::{Allowance, Outcome, Verdict};
use pgrx::datum::AnyElement;
use pgrx::iter::TableIterator;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{AnyArray, FromDatum, name};

use crate::ask::{Asking, ask};
use crate::asking;
use crate::blank::has_text;
use crate::client::check_usable;
use crate::error::{Error, Result};
use crate::isolation;
use crate::json::Json;
use crate::options::{OfCall, of_call};
use crate::process::current_user;
use crate::question::ad_hoc;
use crate::scalar::author;
use crate::task::{self, Asked};
use crate::text::{self, Text};
use crate::verb::Verb;

#[derive(Default)]
struct Answer {
    value: Option<String>,
    status: &'static str,
    detail: Option<String>,
    /// The probability of the value, if the provider gave one.
    confidence: Option<f32>,
}

/// Rows without their ids: their text, and what keeps them apart.
type Page = Vec<(Option<Text>, Option<String>)>;

/// Asks about rows as `page` yields them (at most so many at a call), and returns answers in their order. An empty page
/// is the end.
fn answers_of(asked: Asked, limit: Allowance, page: &mut dyn FnMut(usize) -> Result<Page>) -> Result<Vec<Answer>> {
    let answers: RefCell<Vec<Answer>> = RefCell::new(Vec::new());
    let spec = asked.stream.task.spec.clone();
    // The position among the rows that are asked about → the position among all rows.
    let places: RefCell<Vec<usize>> = RefCell::new(Vec::new());
    let mut source = |n: usize| -> Result<Vec<Asking>> {
        let mut texts = Vec::new();
        // A page may consist of rows without text; only the end of the rows ends them.
        while texts.is_empty() {
            let rows = page(n)?;
            if rows.is_empty() {
                break;
            }
            for (text, isolation) in rows {
                let mut answers = answers.borrow_mut();
                let mut answer = Answer::default();
                match text.map(Text::checked).transpose() {
                    Err(e) => {
                        answer.status = "failed";
                        answer.detail = Some(format!("{}: {}", text::INVALID, text::detail(&e)));
                    }
                    Ok(Some(text)) if has_text(&text) => {
                        places.borrow_mut().push(answers.len());
                        texts.push((text, isolation));
                    }
                    Ok(_) => {
                        answer.status = "skipped";
                        answer.detail = Some("empty: the input is NULL, empty or white space".to_owned());
                    }
                }
                answers.push(answer);
            }
        }
        Ok(texts)
    };
    let mut sink = |o: Outcome| {
        let at = places.borrow().get(o.n as usize).copied().unwrap_or(usize::MAX);
        if let Some(answer) = answers.borrow_mut().get_mut(at) {
            match o.verdict {
                Verdict::Answer(values) => {
                    answer.confidence = o.confidence.map(|c| c as f32);
                    answer.value = spec.to_text(&values);
                    answer.status = "ok";
                }
                Verdict::Skip { class, detail } => {
                    answer.status = "skipped";
                    answer.detail = Some(format!("{class}: {detail}"));
                }
                Verdict::Fail { class, detail } => {
                    answer.status = "failed";
                    answer.detail = Some(format!("{class}: {detail}"));
                }
                Verdict::Withdrawn => {}
            }
        }
    };
    ask(asked, limit, &mut source, &mut sink)?;
    Ok(answers.into_inner())
}

fn answers_of_query(query: &str, known: task::Known, limit: Allowance) -> Result<Vec<Row<String>>> {
    let asked = known.stream(current_user(), true)?;
    let mut ids = Vec::new();
    let answers = Spi::connect(|client| -> Result<_> {
        let mut cursor = client.try_open_cursor(query, &[])?;
        answers_of(asked, limit, &mut |n| {
            let rows = cursor.fetch(n as libc::c_long)?;
            if !matches!(rows.columns()?, 2 | 3) {
                return Err(Error::new(
                    PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                    format!("the query must return two columns, id and input, or three, not {}", rows.columns()?),
                )
                .hint("Write it as 'SELECT id, body FROM …'. Rows with different values of a third column never share a request."));
            }
            if rows.is_empty() {
                return Ok(Vec::new());
            }
            let rows = output(rows)?.into_iter().map(|(id, text, isolation)| {
                ids.push(id);
                (text, isolation)
            });
            Ok(rows.collect())
        })
    })?;
    Ok(as_rows(ids, answers))
}

fn answers_of_array(
    ids: AnyArray,
    inputs: Vec<Option<Text>>,
    known: task::Known,
    limit: Allowance,
) -> Result<Vec<Row<AnyElement>>> {
    let ids = elements(ids);
    if ids.len() != inputs.len() {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_ARRAY_ELEMENT_ERROR,
            "\"ids\" and \"inputs\" must have the same number of elements",
        )
        .detail(format!("\"ids\" has {}, \"inputs\" has {}.", ids.len(), inputs.len()))
        .hint("Build both from the same rows, as in SELECT array_agg(id), array_agg(body) FROM …"));
    }
    let asked = known.stream(current_user(), true)?;
    let mut inputs = inputs.into_iter();
    let answers = answers_of(asked, limit, &mut |n| Ok(inputs.by_ref().take(n).map(|input| (input, None)).collect()))?;
    Ok(as_rows(ids, answers))
}

/// The elements of an array, which live as long as the current memory context.
fn elements(array: AnyArray) -> Vec<Option<AnyElement>> {
    // SAFETY: the datum is an array, which is not NULL, of the type that it comes with; so is its copy, and its elements
    // are of the type of its elements.
    unsafe {
        let copy = pg_sys::pg_detoast_datum_copy(array.datum().cast_mut_ptr());
        let copy = Array::<pg_sys::Datum>::from_polymorphic_datum(pg_sys::Datum::from(copy), false, array.oid());
        let kind = pg_sys::get_element_type(array.oid());
        let element = |e: Option<pg_sys::Datum>| e.and_then(|e| AnyElement::from_polymorphic_datum(e, false, kind));
        copy.iter().flat_map(|array| array.iter().map(element)).collect()
    }
}

/// A row of a query: id, input, and what keeps it apart, if there is a third column.
type Output = (Option<String>, Option<Text>, Option<String>);

/// Every row as text, by its types' output functions. Takes the table that holds them, because it reads what SPI left
/// last.
fn output(rows: pgrx::spi::SpiTupleTable<'_>) -> Result<Vec<Output>> {
    let mut out = Vec::with_capacity(rows.len());
    let has_isolation = rows.columns()? == 3;
    // SAFETY: SPI_tuptable is the table that the fetch just before left, with `numvals` rows; SPI_getvalue returns a
    // palloc'd string or NULL. `rows` refers to the table and is not used any more when it is freed.
    unsafe {
        let table = pg_sys::SPI_tuptable;
        if table.is_null() {
            return Ok(out);
        }
        let value = |tuple: pg_sys::HeapTuple, column: i32| {
            let text = pg_sys::SPI_getvalue(tuple, (*table).tupdesc, column);
            (!text.is_null()).then(|| {
                let owned = std::ffi::CStr::from_ptr(text).to_owned();
                pg_sys::pfree(text.cast());
                owned
            })
        };
        let text = |tuple, column| value(tuple, column).map(|v| Text::new(v.into_bytes()));
        for i in 0..(*table).numvals as usize {
            let tuple = *(*table).vals.add(i);
            let isolation = if has_isolation {
                Some(isolation::digest(value(tuple, 3).as_deref().map(std::ffi::CStr::to_bytes))?)
            } else {
                None
            };
            out.push((text(tuple, 1).map(|id| id.lossy()), text(tuple, 2), isolation));
        }
        pg_sys::SPI_freetuptable(table);
    }
    Ok(out)
}

type Row<Id> = (Option<Id>, Option<String>, String, Option<String>, Option<f32>);

fn as_rows<Id>(ids: Vec<Option<Id>>, answers: Vec<Answer>) -> Vec<Row<Id>> {
    ids.into_iter().zip(answers).map(|(id, a)| (id, a.value, a.status.to_owned(), a.detail, a.confidence)).collect()
}

/// A row without its probability.
fn labelled<Id>((id, label, status, detail, _): Row<Id>) -> (Option<Id>, Option<String>, String, Option<String>) {
    (id, label, status, detail)
}

/// The task of this name, which must be one that the verb asks, and what the statement may spend.
fn named(verb: Verb, task: Text, options: Json) -> Result<(task::Known, Allowance)> {
    asking::check()?;
    check_usable()?;
    let OfCall { task: options, limit } = of_call(options.0)?;
    let name = task.checked()?;
    let known = task::load(&name, &options)?;
    verb.check_kind(&name, &known.task.spec)?;
    Ok((known, limit))
}

fn query_by_task(verb: Verb, query: Text, task: Text, options: Json) -> Result<Vec<Row<String>>> {
    let (known, limit) = named(verb, task, options)?;
    answers_of_query(&query.checked()?, known, limit)
}

fn array_by_task(
    verb: Verb,
    ids: AnyArray,
    inputs: Vec<Option<Text>>,
    task: Text,
    options: Json,
) -> Result<Vec<Row<AnyElement>>> {
    let (known, limit) = named(verb, task, options)?;
    answers_of_array(ids, inputs, known, limit)
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_classify_batch(
    query: Text,
    task: Text,
    options: Json,
) -> std::result::Result<
    TableIterator<
        'static,
        (name!(id, Option<String>), name!(label, Option<String>), name!(status, String), name!(detail, Option<String>)),
    >,
    ErrorReport,
> {
    Ok(TableIterator::new(query_by_task(Verb::named("classify")?, query, task, options)?.into_iter().map(labelled)))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_run_batch(
    query: Text,
    task: Text,
    options: Json,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(id, Option<String>),
            name!(value, Option<String>),
            name!(status, String),
            name!(detail, Option<String>),
            name!(confidence, Option<f32>),
        ),
    >,
    ErrorReport,
> {
    Ok(TableIterator::new(query_by_task(Verb::named("run")?, query, task, options)?))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_classify_batch_labels(
    query: Text,
    labels: Vec<Option<Text>>,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> std::result::Result<
    TableIterator<
        'static,
        (name!(id, Option<String>), name!(label, Option<String>), name!(status, String), name!(detail, Option<String>)),
    >,
    ErrorReport,
> {
    asking::check()?;
    check_usable()?;
    let (known, limit) = ad_hoc(Verb::named("classify_labels")?, &text::all(labels)?, options.0, author(fcinfo))?;
    Ok(TableIterator::new(answers_of_query(&query.checked()?, known, limit)?.into_iter().map(labelled)))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_classify_array(
    ids: AnyArray,
    inputs: Vec<Option<Text>>,
    task: Text,
    options: Json,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(id, Option<AnyElement>),
            name!(label, Option<String>),
            name!(status, String),
            name!(detail, Option<String>),
        ),
    >,
    ErrorReport,
> {
    Ok(TableIterator::new(
        array_by_task(Verb::named("classify")?, ids, inputs, task, options)?.into_iter().map(labelled),
    ))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_run_array(
    ids: AnyArray,
    inputs: Vec<Option<Text>>,
    task: Text,
    options: Json,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(id, Option<AnyElement>),
            name!(value, Option<String>),
            name!(status, String),
            name!(detail, Option<String>),
            name!(confidence, Option<f32>),
        ),
    >,
    ErrorReport,
> {
    Ok(TableIterator::new(array_by_task(Verb::named("run")?, ids, inputs, task, options)?))
}
