//! `llm_classify()` and `llm_classify_batch()`: streams of one row and of a query's rows. The same path as a job's.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use llm_batch_gateway::protocol::{FromGateway, Item, Stream, ToGateway, Verdict, most_text};
use pgrx::datum::JsonB;
use pgrx::iter::TableIterator;
use pgrx::name;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use crate::classifier::{self, Asked};
use crate::client::{Client, Received, check_loaded};
use crate::error::{Error, Result};
use crate::model::current_user;

/// Rows of a statement that are under way at the same time.
const WINDOW_ROWS: usize = 2_000;
/// Bytes of their text.
const WINDOW_BYTES: usize = 4 << 20;
/// Rows taken from a query at a time.
const FETCH: usize = 100;

thread_local! {
    /// The connection of the last statement and what was opened on it: a scalar function is called row by row.
    static KEPT: RefCell<Option<(Client, Stream)>> = const { RefCell::new(None) };
}

/// Asks about rows as `source` yields them (at most so many at a call; none: the end), and hands what became of each,
/// by its position, to `sink`.
fn ask(
    asked: &Asked,
    source: &mut dyn FnMut(usize) -> Result<Vec<String>>,
    sink: &mut dyn FnMut(usize, Verdict),
) -> Result<()> {
    let stream = &asked.stream;
    let kept = KEPT.with_borrow_mut(Option::take);
    let mut client = match kept {
        Some((client, opened)) if opened == *stream => match if_fresh(client)? {
            Some(client) => client,
            None => Client::open(stream)?,
        },
        _ => Client::open(stream)?,
    };
    let most_text = most_text(stream.model.max_request_tokens);
    let mut fetched: VecDeque<String> = VecDeque::new();
    let mut pending: BTreeMap<u64, String> = BTreeMap::new();
    let mut bytes = 0;
    let mut next = 0;
    let mut ended = false;
    loop {
        let mut items = Vec::new();
        while pending.len() < WINDOW_ROWS {
            if fetched.is_empty() && !ended {
                fetched.extend(source(FETCH)?);
                ended = fetched.is_empty();
            }
            let Some(mut text) =
                fetched.pop_front_if(|t| pending.is_empty() || bytes + t.len().min(most_text) <= WINDOW_BYTES)
            else {
                break;
            };
            text.truncate(text.floor_char_boundary(most_text));
            bytes += text.len();
            pending.insert(next, text.clone());
            items.push(Item { n: next, text });
            next += 1;
        }
        send(&mut client, items)?;
        if pending.is_empty() {
            KEPT.set(Some((client, stream.clone())));
            return Ok(());
        }
        match client.receive(Duration::from_secs(60))? {
            Received::Message(FromGateway::Outcomes { outcomes, .. }) => {
                for o in outcomes {
                    // What was withdrawn is followed by the reason: the stream is stopped.
                    if o.verdict != Verdict::Withdrawn
                        && let Some(text) = pending.remove(&o.n)
                    {
                        bytes -= text.len();
                        sink(o.n as usize, o.verdict);
                    }
                }
            }
            Received::Message(FromGateway::Stopped(stop)) => return Err(Error::from_stop(&stop, &asked.model)),
            Received::Message(_) | Received::Nothing => {}
            Received::Lost => {
                client = Client::open(stream)?;
                let items = pending.iter().map(|(n, text)| Item { n: *n, text: text.clone() }).collect();
                send(&mut client, items)?;
            }
        }
    }
}

/// A connection, if nothing has come on it since it was last used: a stop of back then says nothing about today.
fn if_fresh(mut client: Client) -> Result<Option<Client>> {
    Ok(matches!(client.receive(Duration::ZERO)?, Received::Nothing).then_some(client))
}

/// Sends rows in frames that are small enough.
fn send(client: &mut Client, items: Vec<Item>) -> Result<()> {
    let mut frame = Vec::new();
    let mut bytes = 0;
    for item in items {
        bytes += item.text.len();
        frame.push(item);
        if bytes > 1 << 20 {
            client.send(&ToGateway::Items(std::mem::take(&mut frame)))?;
            bytes = 0;
        }
    }
    if frame.is_empty() { Ok(()) } else { client.send(&ToGateway::Items(frame)) }
}

/// A label, or its absence with the reason as a warning.
fn classify_one(input: &str, known: classifier::Known) -> Result<Option<String>> {
    if input.is_empty() {
        return Ok(None);
    }
    let asked = known.stream(current_user(), true)?;
    let mut source = vec![input.to_owned()];
    let mut got = None;
    ask(&asked, &mut |_| Ok(std::mem::take(&mut source)), &mut |_, verdict| got = Some(verdict))?;
    match got {
        Some(Verdict::Label(i)) => Ok(asked.stream.task.labels.get(i as usize).map(|l| l.label.clone())),
        Some(Verdict::Skip { class, detail } | Verdict::Fail { class, detail }) => {
            ereport!(
                WARNING,
                PgSqlErrorCode::ERRCODE_WARNING,
                "the model gave no label for a text",
                format!("{class}: {detail}")
            );
            Ok(None)
        }
        Some(Verdict::Withdrawn) | None => Ok(None),
    }
}

#[pg_extern(sql = false)]
fn llm_classify(input: &str, task: &str) -> std::result::Result<Option<String>, ErrorReport> {
    check_loaded()?;
    Ok(classify_one(input, classifier::load(task, &json!({}))?)?)
}

#[pg_extern(sql = false)]
fn llm_classify_labels(
    input: &str,
    labels: Vec<Option<String>>,
    options: JsonB,
) -> std::result::Result<Option<String>, ErrorReport> {
    check_loaded()?;
    Ok(classify_one(input, classifier::from_labels(labels, &options.0)?)?)
}

#[derive(Default)]
struct Answer {
    id: Option<String>,
    label: Option<String>,
    status: &'static str,
    detail: Option<String>,
}

fn classify_query(query: &str, known: classifier::Known) -> Result<Vec<Answer>> {
    let asked = known.stream(current_user(), true)?;
    let answers: RefCell<Vec<Answer>> = RefCell::new(Vec::new());
    // The position among the rows that are asked about → the position among all rows.
    let places: RefCell<Vec<usize>> = RefCell::new(Vec::new());
    Spi::connect(|client| -> Result<()> {
        let mut cursor = client.try_open_cursor(query, &[])?;
        let mut source = |n: usize| -> Result<Vec<String>> {
            let mut texts = Vec::new();
            // A page may consist of rows without text; only the end of the query ends the rows.
            loop {
                let rows = cursor.fetch(n as libc::c_long)?;
                if rows.columns()? != 2 {
                    return Err(Error::new(
                        PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                        format!("the query must return two columns, id and input, not {}", rows.columns()?),
                    )
                    .hint("Write it as 'SELECT id, body FROM …'."));
                }
                if rows.is_empty() {
                    return Ok(texts);
                }
                for (id, text) in output(rows) {
                    let mut answers = answers.borrow_mut();
                    match text.filter(|t| !t.is_empty()) {
                        Some(text) => {
                            places.borrow_mut().push(answers.len());
                            texts.push(text);
                            answers.push(Answer { id, ..Answer::default() });
                        }
                        None => {
                            let detail = Some("empty: the input is NULL or empty".to_owned());
                            answers.push(Answer { id, status: "skipped", detail, ..Answer::default() });
                        }
                    }
                }
                if !texts.is_empty() {
                    return Ok(texts);
                }
            }
        };
        let mut sink = |n: usize, verdict: Verdict| {
            let at = places.borrow().get(n).copied().unwrap_or(usize::MAX);
            if let Some(answer) = answers.borrow_mut().get_mut(at) {
                match verdict {
                    Verdict::Label(i) => {
                        answer.label = asked.stream.task.labels.get(i as usize).map(|l| l.label.clone());
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
        ask(&asked, &mut source, &mut sink)
    })?;
    Ok(answers.into_inner())
}

/// The two columns of every row as text, by their types' output functions. Takes the table that holds them, because it
/// reads what SPI left last.
fn output(rows: pgrx::spi::SpiTupleTable<'_>) -> Vec<(Option<String>, Option<String>)> {
    let mut out = Vec::with_capacity(rows.len());
    // SAFETY: SPI_tuptable is the table that the fetch just before left, with `numvals` rows; SPI_getvalue returns a
    // palloc'd string or NULL. `rows` refers to the table and is not used any more when it is freed.
    unsafe {
        let table = pg_sys::SPI_tuptable;
        if table.is_null() {
            return out;
        }
        let value = |tuple: pg_sys::HeapTuple, column: i32| {
            let text = pg_sys::SPI_getvalue(tuple, (*table).tupdesc, column);
            (!text.is_null()).then(|| {
                let owned = std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned();
                pg_sys::pfree(text.cast());
                owned
            })
        };
        for i in 0..(*table).numvals as usize {
            let tuple = *(*table).vals.add(i);
            out.push((value(tuple, 1), value(tuple, 2)));
        }
        pg_sys::SPI_freetuptable(table);
    }
    out
}

type Row = (Option<String>, Option<String>, String, Option<String>);

fn as_rows(answers: Vec<Answer>) -> impl Iterator<Item = Row> {
    answers.into_iter().map(|a| (a.id, a.label, a.status.to_owned(), a.detail))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_classify_batch(
    query: &str,
    task: &str,
    options: JsonB,
) -> std::result::Result<
    TableIterator<
        'static,
        (name!(id, Option<String>), name!(label, Option<String>), name!(status, String), name!(detail, Option<String>)),
    >,
    ErrorReport,
> {
    check_loaded()?;
    Ok(TableIterator::new(as_rows(classify_query(query, classifier::load(task, &options.0)?)?)))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_classify_batch_labels(
    query: &str,
    labels: Vec<Option<String>>,
    options: JsonB,
) -> std::result::Result<
    TableIterator<
        'static,
        (name!(id, Option<String>), name!(label, Option<String>), name!(status, String), name!(detail, Option<String>)),
    >,
    ErrorReport,
> {
    check_loaded()?;
    Ok(TableIterator::new(as_rows(classify_query(query, classifier::from_labels(labels, &options.0)?)?)))
}
