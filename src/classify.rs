//! `llm_classify()` and `llm_classify_batch()`: streams of one row and of a query's rows. The same path as a job's.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use llm_batch_gateway::protocol::{Allowance, FromGateway, Item, Stream, ToGateway, Verdict, most_text};
use pgrx::datum::JsonB;
use pgrx::iter::TableIterator;
use pgrx::name;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use crate::budget::UNLIMITED;
use crate::classifier::{self, Asked};
use crate::client::{Client, LostInVain, Received, WINDOW_ROWS, check_usable};
use crate::error::{Error, Result};
use crate::isolation;
use crate::model::current_user;
use crate::statement::{self, Purse};

/// Bytes of their text.
const WINDOW_BYTES: usize = 4 << 20;
/// Rows taken from a query at a time.
const FETCH: usize = 100;

/// A text, and what keeps it apart from others.
type Asking = (String, Option<String>);

/// The connection of the last call, with nothing under way, and what was opened on it.
struct Kept {
    client: Client,
    stream: Stream,
    purse: Purse,
}

thread_local! {
    /// A scalar function is called row by row.
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

/// Asks about rows as `source` yields them (at most so many at a call; none: the end), and hands what became of each, by
/// its position, to `sink`. The statement spends no more than `limit`.
fn ask(
    mut asked: Asked,
    limit: Allowance,
    source: &mut dyn FnMut(usize) -> Result<Vec<Asking>>,
    sink: &mut dyn FnMut(usize, Verdict),
) -> Result<()> {
    if limit != (Allowance { cost: UNLIMITED, tokens: UNLIMITED }) {
        asked = asked.with_budget(limit.cost != UNLIMITED)?;
    }
    let Asked { stream, model, price } = asked;
    let mut purse = Purse::new(limit, price, stream.budget);
    let mut client = match KEPT.take() {
        // What a stream was allowed holds for one budget.
        Some(kept) if kept.stream == stream && (stream.budget.is_none() || kept.purse.is_same(&purse)) => {
            match if_fresh(kept)? {
                Some(Kept { client, purse: kept, .. }) => {
                    if stream.budget.is_some() {
                        purse = kept;
                    }
                    client
                }
                None => Client::open(&stream)?,
            }
        }
        kept => {
            close(kept);
            Client::open(&stream)?
        }
    };
    let most_text = most_text(stream.model.max_request_tokens);
    let mut fetched: VecDeque<Asking> = VecDeque::new();
    let mut pending: BTreeMap<u64, Item> = BTreeMap::new();
    let mut bytes = 0;
    let mut next = 0;
    let mut ended = false;
    let mut lost = LostInVain::default();
    loop {
        let mut items = Vec::new();
        while pending.len() < WINDOW_ROWS {
            if fetched.is_empty() && !ended {
                fetched.extend(source(FETCH)?);
                ended = fetched.is_empty();
            }
            let fits =
                |asking: &mut Asking| pending.is_empty() || bytes + asking.0.len().min(most_text) <= WINDOW_BYTES;
            let Some((mut text, isolation)) = fetched.pop_front_if(fits) else { break };
            text.truncate(text.floor_char_boundary(most_text));
            bytes += text.len();
            let item = Item { n: next, text, isolation };
            pending.insert(next, item.clone());
            items.push(item);
            next += 1;
        }
        send(&mut client, items)?;
        if pending.is_empty() {
            close(KEPT.replace(Some(Kept { client, stream, purse })));
            return Ok(());
        }
        match client.receive(Duration::from_secs(60))? {
            Received::Message(FromGateway::Outcomes { outcomes, spent }) => {
                lost.answered();
                purse.spend(&spent, outcomes.iter().filter(|o| o.verdict != Verdict::Withdrawn).count() as u64);
                if let Some(more) = purse.top_up() {
                    client.send(&ToGateway::Allow(more))?;
                }
                for o in outcomes {
                    // What was withdrawn is followed by the reason: the stream is stopped.
                    if o.verdict != Verdict::Withdrawn
                        && let Some(item) = pending.remove(&o.n)
                    {
                        bytes -= item.text.len();
                        sink(o.n as usize, o.verdict);
                    }
                }
            }
            Received::Message(FromGateway::Stopped(stop)) => return Err(Error::from_stop(&stop, &model)),
            Received::Message(FromGateway::Exhausted { least, full }) => {
                client.send(&ToGateway::Allow(purse.grant(least, full, &stream)?))?;
            }
            Received::Message(_) | Received::Nothing => {}
            Received::Lost => {
                lost.another()?;
                purse.release(true);
                client = Client::open(&stream)?;
                send(&mut client, pending.values().cloned().collect())?;
            }
        }
    }
}

/// A connection, if nothing has come on it since it was last used: a stop of back then says nothing about today.
fn if_fresh(mut kept: Kept) -> Result<Option<Kept>> {
    if matches!(kept.client.receive(Duration::ZERO)?, Received::Nothing) {
        return Ok(Some(kept));
    }
    close(Some(kept));
    Ok(None)
}

/// Nothing is under way on a connection that was kept: what it was allowed was not spent.
fn close(kept: Option<Kept>) {
    if let Some(mut kept) = kept {
        kept.purse.release(false);
    }
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
fn classify_one(input: &str, known: classifier::Known, limit: Allowance) -> Result<Option<String>> {
    if input.is_empty() {
        return Ok(None);
    }
    let asked = known.stream(current_user(), true)?;
    let labels = asked.stream.task.labels.clone();
    let mut source = vec![(input.to_owned(), None)];
    let mut got = None;
    ask(asked, limit, &mut |_| Ok(std::mem::take(&mut source)), &mut |_, verdict| got = Some(verdict))?;
    match got {
        Some(Verdict::Label(i)) => Ok(labels.get(i as usize).map(|l| l.label.clone())),
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
    check_usable()?;
    Ok(classify_one(input, classifier::load(task, &json!({}))?, statement::limit(&mut json!({}))?)?)
}

#[pg_extern(sql = false)]
fn llm_classify_labels(
    input: &str,
    labels: Vec<Option<String>>,
    mut options: JsonB,
) -> std::result::Result<Option<String>, ErrorReport> {
    check_usable()?;
    let limit = statement::limit(&mut options.0)?;
    Ok(classify_one(input, classifier::from_labels(labels, &options.0)?, limit)?)
}

#[derive(Default)]
struct Answer {
    id: Option<String>,
    label: Option<String>,
    status: &'static str,
    detail: Option<String>,
}

fn classify_query(query: &str, known: classifier::Known, limit: Allowance) -> Result<Vec<Answer>> {
    let asked = known.stream(current_user(), true)?;
    let labels = asked.stream.task.labels.clone();
    let answers: RefCell<Vec<Answer>> = RefCell::new(Vec::new());
    // The position among the rows that are asked about → the position among all rows.
    let places: RefCell<Vec<usize>> = RefCell::new(Vec::new());
    Spi::connect(|client| -> Result<()> {
        let mut cursor = client.try_open_cursor(query, &[])?;
        let mut source = |n: usize| -> Result<Vec<Asking>> {
            let mut texts = Vec::new();
            // A page may consist of rows without text; only the end of the query ends the rows.
            loop {
                let rows = cursor.fetch(n as libc::c_long)?;
                if !matches!(rows.columns()?, 2 | 3) {
                    return Err(Error::new(
                        PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                        format!("the query must return two columns, id and input, or three, not {}", rows.columns()?),
                    )
                    .hint("Write it as 'SELECT id, body FROM …'; a third column keeps rows apart that differ in it."));
                }
                if rows.is_empty() {
                    return Ok(texts);
                }
                for [id, text, isolation] in output(rows)? {
                    let mut answers = answers.borrow_mut();
                    match text.filter(|t| !t.is_empty()) {
                        Some(text) => {
                            places.borrow_mut().push(answers.len());
                            texts.push((text, isolation));
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
                        answer.label = labels.get(i as usize).map(|l| l.label.clone());
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
        ask(asked, limit, &mut source, &mut sink)
    })?;
    Ok(answers.into_inner())
}

/// A row of a query: id, input, and what keeps it apart, if there is a third column.
type Output = [Option<String>; 3];

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
        let text = |tuple, column| value(tuple, column).map(|v| v.to_string_lossy().into_owned());
        for i in 0..(*table).numvals as usize {
            let tuple = *(*table).vals.add(i);
            let isolation = if has_isolation {
                Some(isolation::digest(value(tuple, 3).as_deref().map(std::ffi::CStr::to_bytes))?)
            } else {
                None
            };
            out.push([text(tuple, 1), text(tuple, 2), isolation]);
        }
        pg_sys::SPI_freetuptable(table);
    }
    Ok(out)
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
    mut options: JsonB,
) -> std::result::Result<
    TableIterator<
        'static,
        (name!(id, Option<String>), name!(label, Option<String>), name!(status, String), name!(detail, Option<String>)),
    >,
    ErrorReport,
> {
    check_usable()?;
    let limit = statement::limit(&mut options.0)?;
    Ok(TableIterator::new(as_rows(classify_query(query, classifier::load(task, &options.0)?, limit)?)))
}

// pgrx reads the columns off the signature, so that it can't be an alias.
#[allow(clippy::type_complexity)]
#[pg_extern(sql = false)]
fn llm_classify_batch_labels(
    query: &str,
    labels: Vec<Option<String>>,
    mut options: JsonB,
) -> std::result::Result<
    TableIterator<
        'static,
        (name!(id, Option<String>), name!(label, Option<String>), name!(status, String), name!(detail, Option<String>)),
    >,
    ErrorReport,
> {
    check_usable()?;
    let limit = statement::limit(&mut options.0)?;
    Ok(TableIterator::new(as_rows(classify_query(query, classifier::from_labels(labels, &options.0)?, limit)?)))
}
