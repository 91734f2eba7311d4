//! Writing answers: one short transaction for all that have arrived.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::Verdict;
use pgrx::PgSqlErrorCode as Code;
use pgrx::datum::{DatumWithOid, JsonB};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::job::page::Page;
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
    pub attempts: u32,
    /// It was paid for with another row.
    pub reused: bool,
    /// Since when its row has been found locked.
    pub locked_since: Option<Instant>,
}

/// How long a row that others hold locked is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);

/// What became of the answers.
#[derive(Debug, Default)]
pub struct Settled {
    pub done: i64,
    pub superseded: i64,
    /// Rows among those done whose answer was paid for with another row.
    pub reused: i64,
    pub failures: Vec<Failure>,
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
pub fn settle(plan: &Plan, labels: &[String], answers: &[Answer]) -> Result<Settled> {
    let mut settled = Settled::default();
    let mut by_page: HashMap<*const Page, Vec<&Answer>> = HashMap::new();
    for a in answers {
        by_page.entry(Rc::as_ptr(&a.page)).or_default().push(a);
    }
    for answers in by_page.into_values() {
        settle_page(plan, labels, &answers, &mut settled)?;
    }
    Ok(settled)
}

/// What a row looks like now: whether its target is NULL, its input's hash.
type Look = BTreeMap<i32, (bool, Option<i64>)>;

fn look(plan: &Plan, query: &str, page: &Page, positions: Vec<i32>) -> Result<Look> {
    // Each time, since a trigger of the statement before may have changed it.
    sql::set_local("search_path", &plan.search_path)?;
    let mut args = page.args();
    args.push(positions.into());
    let rows = sql::rows_mut(query, &args, |r| Ok((r.get::<i32>(1)?, (r.get::<bool>(2)?, r.maybe::<i64>(3)?))))?;
    Ok(rows.into_iter().collect())
}

fn settle_page(plan: &Plan, labels: &[String], answers: &[&Answer], settled: &mut Settled) -> Result<()> {
    let Some(page) = answers.first().map(|a| Rc::clone(&a.page)) else { return Ok(()) };
    let by_position: BTreeMap<i32, &Answer> = answers.iter().map(|a| (a.position, *a)).collect();
    let locked = look(plan, &plan.lock, &page, by_position.keys().copied().collect())?;
    let missing: Vec<i32> = by_position.keys().filter(|p| !locked.contains_key(p)).copied().collect();
    let mut changed: Vec<(i32, u32)> = Vec::new();
    let mut listed: Vec<(i32, bool, String, u32, String)> = Vec::new();
    let has_changed = |position: i32, hash: Option<i64>| hash != page.hashes.get(position as usize - 1).copied();

    if !missing.is_empty() {
        let seen = look(plan, &plan.look, &page, missing.clone())?;
        for position in missing {
            let Some(answer) = by_position.get(&position) else { continue };
            match seen.get(&position) {
                // Deleted, or filled by someone else.
                None | Some((false, _)) => settled.superseded += 1,
                Some((true, hash)) if has_changed(position, *hash) => changed.push((position, answer.attempts)),
                Some((true, _)) if is_out_of_reach(plan, &page, position)? => listed.push((
                    position,
                    false,
                    "not_written".to_owned(),
                    answer.attempts,
                    "row security hides the row from UPDATE".to_owned(),
                )),
                Some((true, _)) if answer.locked_since.is_some_and(|t| t.elapsed() > LOCK_PATIENCE) => listed.push((
                    position,
                    false,
                    "not_written".to_owned(),
                    answer.attempts,
                    "the row stayed locked by another transaction".to_owned(),
                )),
                Some((true, _)) => settled.locked.push((*answer).clone()),
            }
        }
    }

    let mut writes: Vec<(i32, String)> = Vec::new();
    for (position, (is_null, hash)) in locked {
        let Some(answer) = by_position.get(&position) else { continue };
        if !is_null {
            settled.superseded += 1;
        } else if has_changed(position, hash) {
            changed.push((position, answer.attempts));
        } else {
            match &answer.verdict {
                Verdict::Label(i) => match labels.get(*i as usize) {
                    Some(label) => writes.push((position, label.clone())),
                    None => {
                        listed.push((position, false, "unknown_code".into(), answer.attempts, "no such label".into()))
                    }
                },
                Verdict::Skip { class, detail } => {
                    listed.push((position, true, class.clone(), answer.attempts, detail.clone()));
                }
                Verdict::Fail { class, detail } => {
                    listed.push((position, false, class.clone(), answer.attempts, detail.clone()));
                }
                Verdict::Withdrawn => {}
            }
        }
    }
    let (mut unwritten, mut blocked) = (Vec::new(), Vec::new());
    let mut done = write(plan, &page, &writes, &mut unwritten, &mut blocked)?;
    if !done.is_empty() {
        // What a trigger made NULL again after the UPDATE would be asked again for ever.
        let mut args = page.args();
        args.push(done.clone().into());
        for position in sql::rows_mut(&plan.still_null, &args, |r| r.get::<i32>(1))? {
            done.retain(|p| *p != position);
            unwritten.push((position, "not_written", STILL_NULL.to_owned()));
        }
    }
    settled.done += done.len() as i64;
    settled.reused += done.iter().filter(|p| by_position.get(p).is_some_and(|a| a.reused)).count() as i64;
    settled.locked.extend(blocked.iter().filter_map(|p| by_position.get(p)).map(|a| (*a).clone()));
    for (position, class, detail) in unwritten {
        let attempts = by_position.get(&position).map_or(1, |a| a.attempts);
        listed.push((position, false, class.to_owned(), attempts, detail));
    }

    let positions: Vec<i32> = listed.iter().map(|l| l.0).chain(changed.iter().map(|c| c.0)).collect();
    if !positions.is_empty() {
        let mut args = page.args();
        args.push(positions.into());
        let keys: BTreeMap<i32, Value> =
            sql::rows(&plan.describe, &args, |r| Ok((r.get::<i32>(1)?, r.get::<JsonB>(2)?.0)))?.into_iter().collect();
        let key = |position: i32| keys.get(&position).cloned().unwrap_or(Value::Null);
        for (position, is_skip, class, attempts, detail) in listed {
            settled.failures.push(Failure { key: key(position), is_skip, class, attempts, detail });
        }
        settled.changed.extend(changed.into_iter().map(|(position, attempts)| (key(position), attempts)));
    }
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

/// Why a row counts as not written that the UPDATE did reach.
const STILL_NULL: &str = "the column is still NULL after the UPDATE; a trigger may have set it";

/// Writes labels to locked rows; the rows that the UPDATE reached. If the statement raises, the rows it raises for are found
/// by halving, so that the others are written.
fn write(
    plan: &Plan,
    page: &Page,
    writes: &[(i32, String)],
    unwritten: &mut Vec<(i32, &'static str, String)>,
    blocked: &mut Vec<i32>,
) -> Result<Vec<i32>> {
    // Halves still to write; a list instead of recursion.
    let mut todo: Vec<&[(i32, String)]> = vec![writes];
    let mut done = Vec::new();
    while let Some(part) = todo.pop() {
        if part.is_empty() {
            continue;
        }
        let result = txn::sub(|| {
            let mut args: Vec<DatumWithOid> = page.args();
            args.push(part.iter().map(|w| w.0).collect::<Vec<i32>>().into());
            args.push(part.iter().map(|w| w.1.clone()).collect::<Vec<String>>().into());
            sql::rows_mut(&plan.update, &args, |r| Ok((r.get::<i32>(1)?, r.get::<bool>(2)?)))
        });
        match result {
            Ok(rows) => {
                let written: BTreeMap<i32, bool> = rows.into_iter().collect();
                for (position, _) in part {
                    match written.get(position) {
                        Some(false) => done.push(*position),
                        Some(true) => unwritten.push((*position, "not_written", STILL_NULL.to_owned())),
                        None => unwritten.push((
                            *position,
                            "not_written",
                            "the UPDATE left the row out; a trigger may have returned NULL".to_owned(),
                        )),
                    }
                }
            }
            // A lock may be on something that one row alone needs, such as what its label refers to.
            Err(e)
                if e.code != Code::ERRCODE_LOCK_NOT_AVAILABLE
                    && (is_passing(e.code) || is_of_the_table(plan, e.code)?) =>
            {
                return Err(e);
            }
            Err(e) => match part {
                [(position, _)] if e.code == Code::ERRCODE_LOCK_NOT_AVAILABLE => blocked.push(*position),
                [(position, _)] => unwritten.push((*position, "write_error", sqlstate_and_text(&e))),
                _ => {
                    let (first, second) = part.split_at(part.len() / 2);
                    todo.push(second);
                    todo.push(first);
                }
            },
        }
    }
    Ok(done)
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
