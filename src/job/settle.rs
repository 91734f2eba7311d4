//! Writing answers: one short transaction for all that have arrived.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::Verdict;
use pgrx::PgSqlErrorCode as Code;
use pgrx::datum::DatumWithOid;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::job::page::{self, Page};
use crate::job::plan::Plan;
use crate::job::store::Failure;
use crate::{sql, txn};

/// An answer to write: which row, what became of it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub page: Rc<Page>,
    /// The row's position in the page, from 1.
    pub position: i32,
    pub verdict: Verdict,
    /// The label, by name: what the task's labels are may change before it is written.
    pub label: Option<String>,
    pub attempts: u32,
    /// It was paid for with another row.
    pub reused: bool,
    /// Since when its row has been found locked.
    pub locked_since: Option<Instant>,
}

/// How long a row that others hold locked is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// Waits for locks in vain in one settlement, each but the first of 100 ms, until the rest is left for the next one.
const MOST_TIMEOUTS: u32 = 20;

/// What became of the answers.
#[derive(Debug, Default)]
pub struct Settled {
    pub done: i64,
    pub superseded: i64,
    /// Rows among those done whose answer was paid for with another row.
    pub reused: i64,
    pub failures: Vec<Failure>,
    /// Labels that were written, and rows that the UPDATE of a label raised for: the label's fault, or the row's.
    pub written: BTreeSet<String>,
    pub raised: Vec<(String, Failure)>,
    /// The row is locked by another transaction: to be tried again.
    pub locked: Vec<Answer>,
    /// The input has changed since it was sent: the answer is for a text that is no more.
    pub changed: Vec<(Value, u32)>,
}

/// Errors that say nothing about a row: the transaction is tried again as a whole.
pub fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::ERRCODE_T_R_SERIALIZATION_FAILURE
            | Code::ERRCODE_T_R_DEADLOCK_DETECTED
            | Code::ERRCODE_LOCK_NOT_AVAILABLE
            | Code::ERRCODE_OUT_OF_MEMORY
            | Code::ERRCODE_DISK_FULL
            | Code::ERRCODE_TOO_MANY_CONNECTIONS
            | Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED
            | Code::ERRCODE_INSUFFICIENT_RESOURCES
            | Code::ERRCODE_QUERY_CANCELED
    )
}

/// Writes answers, inside a transaction of the caller's that will commit.
pub fn settle(plan: &Plan, answers: &[Answer]) -> Result<Settled> {
    let mut settled = Settled::default();
    let mut by_page: HashMap<*const Page, Vec<&Answer>> = HashMap::new();
    for a in answers {
        by_page.entry(Rc::as_ptr(&a.page)).or_default().push(a);
    }
    let mut timeouts = 0;
    for answers in by_page.into_values() {
        settle_page(plan, &answers, &mut timeouts, &mut settled)?;
    }
    if timeouts > 0 {
        sql::set_local("lock_timeout", "2s")?;
    }
    Ok(settled)
}

/// A row that was looked at: whether its target was NULL, its input's hash.
type Look = (bool, Option<i64>);

fn look(plan: &Plan, page: &Page, positions: Vec<i32>) -> Result<BTreeMap<i32, Look>> {
    // Each time, since a trigger of the statement before may have changed it.
    sql::set_local("search_path", &plan.search_path)?;
    let mut args = page.args();
    args.push(positions.into());
    let rows = sql::rows_mut(&plan.look, &args, |r| Ok((r.get::<i32>(1)?, (r.get::<bool>(2)?, r.maybe::<i64>(3)?))))?;
    Ok(rows.into_iter().collect())
}

/// Whether all of these rows can still be seen, with the text that was claimed.
pub fn is_as_sent(plan: &Plan, page: &Page, positions: &[i32]) -> Result<bool> {
    let seen = look(plan, page, positions.to_vec())?;
    let hash = |position: i32| page.hashes.get(position as usize - 1).copied();
    Ok(positions.iter().all(|p| seen.get(p).is_some_and(|(_, found)| *found == hash(*p))))
}

/// A row that is to be listed.
struct Listed {
    position: i32,
    is_skip: bool,
    class: String,
    attempts: u32,
    detail: String,
    /// The label that the UPDATE raised for.
    raised: Option<String>,
}

impl Listed {
    fn new(answer: &Answer, class: impl Into<String>, detail: impl Into<String>) -> Self {
        let (class, detail) = (class.into(), detail.into());
        Self { position: answer.position, is_skip: false, class, attempts: answer.attempts, detail, raised: None }
    }
}

fn settle_page(plan: &Plan, answers: &[&Answer], timeouts: &mut u32, settled: &mut Settled) -> Result<()> {
    let Some(page) = answers.first().map(|a| Rc::clone(&a.page)) else { return Ok(()) };
    let by_position: BTreeMap<i32, &Answer> = answers.iter().map(|a| (a.position, *a)).collect();
    let hash = |position: i32| page.hashes.get(position as usize - 1).copied();
    let todo: Vec<Todo> = by_position
        .values()
        .map(|a| Todo { position: a.position, label: a.label.clone(), hash: hash(a.position).unwrap_or_default() })
        .collect();
    let mut tried = write(plan, &page, &todo, timeouts)?;
    still_null(plan, &page, &mut tried)?;

    let mut missing = Vec::new();
    let mut changed: Vec<(i32, u32)> = Vec::new();
    let mut listed: Vec<Listed> = Vec::new();
    for (position, answer) in &by_position {
        if let Some(detail) = tried.raised.remove(position) {
            let raised = answer.label.clone();
            listed.push(Listed { raised, ..Listed::new(answer, "write_error", detail) });
        } else if tried.blocked.contains(position) {
            settled.locked.push((*answer).clone());
        } else if let Some((is_null, found)) = tried.seen.get(position) {
            if !is_null {
                settled.superseded += 1;
            } else if *found != hash(*position) {
                changed.push((*position, answer.attempts));
            } else {
                note(answer, tried.written.get(position).copied(), settled, &mut listed);
            }
        } else {
            missing.push(*position);
        }
    }
    if !missing.is_empty() {
        let seen = look(plan, &page, missing.clone())?;
        for answer in missing.iter().filter_map(|p| by_position.get(p)) {
            let position = answer.position;
            match seen.get(&position) {
                // Deleted, or filled by someone else.
                None | Some((false, _)) => settled.superseded += 1,
                Some((true, found)) if *found != hash(position) => changed.push((position, answer.attempts)),
                Some((true, _)) if is_out_of_reach(plan, &page, position)? => {
                    listed.push(Listed::new(answer, "not_written", "row security hides the row from UPDATE"));
                }
                Some((true, _)) if is_over(answer) => {
                    listed.push(Listed::new(answer, "not_written", "the row stayed locked by another transaction"));
                }
                Some((true, _)) => settled.locked.push((*answer).clone()),
            }
        }
    }
    name_rows(plan, &page, listed, changed, settled)
}

/// Whether a row has been locked for too long.
fn is_over(answer: &Answer) -> bool {
    let Some(since) = answer.locked_since else { return false };
    #[cfg(feature = "failure_points")]
    if llm_batch_gateway::failure::pass("patience", "").is_some() {
        return true;
    }
    since.elapsed() > LOCK_PATIENCE
}

/// What became of a row that was as it had been. `written`: whether it is still NULL after the UPDATE.
fn note(answer: &Answer, written: Option<bool>, settled: &mut Settled, listed: &mut Vec<Listed>) {
    match (&answer.verdict, written) {
        (Verdict::Label(_), Some(false)) => {
            settled.done += 1;
            settled.reused += i64::from(answer.reused);
            settled.written.extend(answer.label.clone());
        }
        (Verdict::Label(_), Some(true)) => listed.push(Listed::new(
            answer,
            "not_written",
            "the column is still NULL after the UPDATE; a trigger may have set it",
        )),
        (Verdict::Label(_), None) if answer.label.is_none() => {
            listed.push(Listed::new(answer, "unknown_code", "no such label"));
        }
        (Verdict::Label(_), None) => listed.push(Listed::new(
            answer,
            "not_written",
            "the UPDATE left the row out; a trigger may have returned NULL",
        )),
        (Verdict::Skip { class, detail }, _) => {
            listed.push(Listed { is_skip: true, ..Listed::new(answer, class, detail) });
        }
        (Verdict::Fail { class, detail }, _) => listed.push(Listed::new(answer, class, detail)),
        (Verdict::Withdrawn, _) => {}
    }
}

/// Gives rows that are listed or have changed their keys.
fn name_rows(
    plan: &Plan,
    page: &Page,
    listed: Vec<Listed>,
    changed: Vec<(i32, u32)>,
    settled: &mut Settled,
) -> Result<()> {
    let positions: Vec<i32> = listed.iter().map(|l| l.position).chain(changed.iter().map(|c| c.0)).collect();
    if positions.is_empty() {
        return Ok(());
    }
    let keys = page::describe(&plan.describe, page, positions)?;
    let key = |position: i32| keys.get(&position).cloned().unwrap_or(Value::Null);
    for Listed { position, is_skip, class, attempts, detail, raised } in listed {
        let failure = Failure { key: key(position), is_skip, class, attempts, detail };
        match raised {
            Some(label) => settled.raised.push((label, failure)),
            None => settled.failures.push(failure),
        }
    }
    settled.changed.extend(changed.into_iter().map(|(position, attempts)| (key(position), attempts)));
    Ok(())
}

/// A row that can be seen and is not locked, and yet can't be locked by us, is out of reach of UPDATE.
fn is_out_of_reach(plan: &Plan, page: &Page, position: i32) -> Result<bool> {
    let tried = txn::sub(|| {
        let mut args = page.args();
        args.push(position.into());
        sql::run(&plan.try_lock, &args)
    });
    match tried {
        Ok(rows) => Ok(rows == 0),
        Err(e) if e.code == Code::ERRCODE_LOCK_NOT_AVAILABLE => Ok(false),
        Err(e) => Err(e),
    }
}

/// A row to write.
struct Todo {
    position: i32,
    /// None: it is only looked at.
    label: Option<String>,
    hash: i64,
}

/// What came of trying to write rows; a row that is nowhere in it could not be locked.
#[derive(Default)]
struct Tried {
    seen: BTreeMap<i32, Look>,
    /// Whether the target was NULL after the UPDATE.
    written: BTreeMap<i32, bool>,
    /// What the UPDATE raised.
    raised: BTreeMap<i32, String>,
    /// The write waited for a lock of someone else's in vain.
    blocked: BTreeSet<i32>,
}

/// Locks rows, looks at them and writes those that are as they were. If the statement raises, the rows it raises for are
/// found by halving, so that the others are written.
fn write(plan: &Plan, page: &Page, rows: &[Todo], timeouts: &mut u32) -> Result<Tried> {
    // Halves still to write; a list instead of recursion.
    let mut todo: Vec<&[Todo]> = vec![rows];
    let mut tried = Tried::default();
    while let Some(part) = todo.pop() {
        if part.is_empty() {
            continue;
        }
        let e = match txn::sub(|| write_part(plan, page, part)) {
            Ok(found) => {
                for (position, look, is_still_null) in found {
                    look.map(|look| tried.seen.insert(position, look));
                    is_still_null.map(|is| tried.written.insert(position, is));
                }
                continue;
            }
            Err(e) => e,
        };
        // A lock may be on something that one row alone needs, such as what its label refers to.
        let is_lock = e.code == Code::ERRCODE_LOCK_NOT_AVAILABLE;
        if !is_lock && (is_passing(e.code) || is_of_the_table(plan, e.code)?) {
            return Err(e);
        }
        if part.len() == rows.len() {
            // What looking raises, every write would.
            look(plan, page, part.iter().map(|t| t.position).collect())?;
        }
        if is_lock {
            *timeouts += 1;
            sql::set_local("lock_timeout", "100ms")?;
            if *timeouts > MOST_TIMEOUTS {
                if tried.written.is_empty() {
                    return Err(e);
                }
                tried.blocked.extend(part.iter().map(|t| t.position));
                continue;
            }
        }
        match part {
            [one] if is_lock => drop(tried.blocked.insert(one.position)),
            [one] => drop(tried.raised.insert(one.position, sqlstate_and_text(&e))),
            _ => {
                let (first, second) = part.split_at(part.len() / 2);
                todo.push(second);
                todo.push(first);
            }
        }
    }
    Ok(tried)
}

type Found = (i32, Option<Look>, Option<bool>);

fn write_part(plan: &Plan, page: &Page, part: &[Todo]) -> Result<Vec<Found>> {
    sql::set_local("search_path", &plan.search_path)?;
    let mut args: Vec<DatumWithOid> = page.args();
    args.push(part.iter().map(|t| t.position).collect::<Vec<i32>>().into());
    args.push(part.iter().map(|t| t.label.clone()).collect::<Vec<Option<String>>>().into());
    args.push(part.iter().map(|t| t.hash).collect::<Vec<i64>>().into());
    sql::rows_mut(&plan.write, &args, |r| {
        let look = r.maybe::<bool>(2)?.map(|is_null| Ok::<_, Error>((is_null, r.maybe::<i64>(3)?))).transpose()?;
        Ok((r.get::<i32>(1)?, look, r.maybe::<bool>(4)?))
    })
}

/// What a trigger made NULL again after the UPDATE would be asked again for ever.
fn still_null(plan: &Plan, page: &Page, tried: &mut Tried) -> Result<()> {
    let Some(query) = plan.still_null.as_ref().filter(|_| !tried.written.is_empty()) else { return Ok(()) };
    let mut args = page.args();
    args.push(tried.written.keys().copied().collect::<Vec<i32>>().into());
    for position in sql::rows_mut(query, &args, |r| r.get::<i32>(1))? {
        tried.written.insert(position, true);
    }
    Ok(())
}

/// Errors that every row would meet. A trigger may be denied something for one row; the right to write the column is
/// another matter. Table and columns were looked at in this transaction: what is missing else is missing in user code.
fn is_of_the_table(plan: &Plan, code: Code) -> Result<bool> {
    Ok(code == Code::ERRCODE_INSUFFICIENT_PRIVILEGE && sql::one::<bool>(&plan.may_update, &[])? != Some(true))
}

fn sqlstate_and_text(e: &Error) -> String {
    format!("{}: {}", sqlstate(e.code), e.message)
}

/// The five characters of an SQLSTATE.
fn sqlstate(code: Code) -> String {
    let mut packed = code as i32;
    (0..5)
        .map(|_| {
            let c = char::from(((packed & 0x3F) as u8).wrapping_add(b'0'));
            packed >>= 6;
            c
        })
        .collect()
}
