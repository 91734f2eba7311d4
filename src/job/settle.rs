//! Writing answers: one short transaction for all that have arrived.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::Verdict;
use pgrx::PgSqlErrorCode as Code;

use crate::checks::{self, Refused};
use crate::error::{Error, Result, is_passing};
use crate::job::cause::Cause;
use crate::job::fit;
use crate::job::ledger::Failure;
use crate::job::page::{self, Page};
use crate::job::plan::Plan;
use crate::job::update::{MOST_TRIES, Passing, Todo, Tried, is_out_of_reach, look, write};
use crate::sql;

/// An answer to write: which row, what became of it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub page: Rc<Page>,
    /// The row's position in the page, from 1.
    pub position: i32,
    pub verdict: Verdict,
    /// The value of each target, if there is an answer: what the task's fields are may change before it is written.
    pub values: Option<Vec<Option<String>>>,
    /// The row's provenance, if the job has a column for that.
    pub by: Option<String>,
    /// The probability of the answer, if the provider gave one.
    pub confidence: Option<f64>,
    /// Answers to the row so far.
    pub attempts: u32,
    /// The text that was sent, for a row that may have to be asked again.
    pub text: String,
    pub isolation: Option<String>,
    /// The task's checks have taken it.
    pub is_judged: bool,
    /// It was paid for with another row.
    pub reused: bool,
    /// Since when its row has been found locked.
    pub locked_since: Option<Instant>,
    /// Since when writing it has raised an error that should pass, while other rows could be written.
    pub refused_since: Option<Instant>,
}

/// Time for which a row is tried again that others hold locked, or whose write raises what should pass.
const PATIENCE: Duration = Duration::from_secs(600);
/// Most rows that are at fault themselves if they meet a lack of disk or memory: if more do, the server lacks it.
pub const FEW: usize = 3;

/// The result of a settlement.
#[derive(Debug, Default)]
pub struct Settled {
    pub done: i64,
    pub superseded: i64,
    /// Rows among those done whose answer was paid for with another row.
    pub reused: i64,
    pub failures: Vec<Failure>,
    /// Rows that have had NULL as an answer: a hash of key and input.
    pub nulls: Vec<i64>,
    /// Labels that were written, and rows that the UPDATE raised for: its cause's fault, or the row's.
    pub written: BTreeSet<String>,
    pub raised: Vec<(Cause, Failure)>,
    /// The row is locked by another transaction, or can't be written for another reason that should pass: to be tried again.
    pub locked: Vec<Answer>,
    /// A value does not fit its column, and the row may be asked again: what the model is told, and people.
    pub unfit: Vec<(Answer, String, String)>,
    /// The input has changed since it was sent: the answer is for a text that is no more.
    pub changed: Vec<(String, u32)>,
}

/// Returns true if an error says nothing about the job: the same may succeed the next time.
pub fn says_nothing(code: Code) -> bool {
    is_passing(code) || code == Code::ERRCODE_INTERNAL_ERROR
}

/// Rows that errors which should pass have kept from being written.
#[derive(Default)]
struct Hindered {
    passing: Passing,
    /// Rows that were tried alone, and what their write raised.
    refused: Vec<(Answer, Error)>,
}

impl Hindered {
    /// Returns true if every row may meet the same error: then nothing is done, and all rows are kept. It is not so if
    /// others were written.
    fn is_for_all(&self, done: i64, others: Others) -> bool {
        let may_be = |(answer, e): &(Answer, Error)| match is_scarce(e.code) {
            true => answer.refused_since.is_none() || !self.are_few(others),
            false => answer.refused_since.is_none() && others != Others::None,
        };
        done == 0 && (self.passing.tries > MOST_TRIES || self.refused.iter().any(may_be))
    }

    fn are_few(&self, others: Others) -> bool {
        self.refused.len() <= FEW && others != Others::Refused
    }
}

/// Rows that are to be written besides the answers at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Nothing, now or later.
    None,
    /// Rows that can tell whose fault an error is.
    Some,
    /// Among them some that were refused before.
    Refused,
}

/// The server lacks what every row needs, or a row's trigger says so.
fn is_scarce(code: Code) -> bool {
    matches!(code, Code::ERRCODE_DISK_FULL | Code::ERRCODE_OUT_OF_MEMORY)
}

/// Writes answers, inside a transaction of the caller's that will commit.
pub fn settle(plan: &Plan, answers: &[Answer], others: Others) -> Result<Settled> {
    let mut settled = Settled::default();
    let mut by_page: HashMap<*const Page, Vec<&Answer>> = HashMap::new();
    for a in answers {
        by_page.entry(Rc::as_ptr(&a.page)).or_default().push(a);
    }
    let mut hindered = Hindered::default();
    for answers in by_page.into_values() {
        settle_page(plan, &answers, &mut hindered, &mut settled)?;
    }
    if hindered.is_for_all(settled.done, others)
        && let Some(e) = hindered.passing.error.take()
    {
        return Err(e);
    }
    if hindered.passing.tries > 0 {
        sql::set_local("lock_timeout", "2s")?;
    }
    let are_few = hindered.are_few(others);
    for (mut answer, e) in hindered.refused {
        if is_over(answer.refused_since) && (are_few || !is_scarce(e.code)) {
            let listed = Listed::new(&answer, "write_error", e.with_state());
            name_rows(plan, &answer.page, vec![listed], Vec::new(), &mut settled)?;
        } else {
            answer.refused_since.get_or_insert_with(Instant::now);
            settled.locked.push(answer);
        }
    }
    Ok(settled)
}

/// Until the end of the transaction, rows are looked up by their keys' index.
pub fn by_key() -> Result<()> {
    for path in ["enable_hashjoin", "enable_mergejoin", "enable_seqscan"] {
        sql::set_local(path, "off")?;
    }
    Ok(())
}

/// A row that is to be listed.
struct Listed {
    position: i32,
    is_skip: bool,
    class: String,
    attempts: u32,
    detail: String,
    /// The cause, if the UPDATE raised or the task's checks refused.
    raised: Option<Cause>,
}

impl Listed {
    fn new(answer: &Answer, class: impl Into<String>, detail: impl Into<String>) -> Self {
        let (class, detail) = (class.into(), detail.into());
        Self { position: answer.position, is_skip: false, class, attempts: answer.attempts, detail, raised: None }
    }
}

fn settle_page(plan: &Plan, answers: &[&Answer], hindered: &mut Hindered, settled: &mut Settled) -> Result<()> {
    let Some(page) = answers.first().map(|a| Rc::clone(&a.page)) else { return Ok(()) };
    let by_position: BTreeMap<i32, &Answer> = answers.iter().map(|a| (a.position, *a)).collect();
    let hash = |position: i32| page.hashes.get(position as usize - 1).copied();
    let todo: Vec<Todo> = by_position
        .values()
        .map(|a| Todo {
            position: a.position,
            values: a.values.clone().unwrap_or_else(|| vec![None; plan.targets]),
            by: a.values.as_ref().and(a.by.clone()),
            confidence: a.confidence,
            hash: hash(a.position).unwrap_or_default(),
        })
        .collect();
    let mut tried = write(plan, &page, &todo, &mut hindered.passing)?;
    find_nulls(plan, &page, &by_position, &mut tried)?;

    let mut missing: Vec<i32> = Vec::new();
    let mut changed: Vec<(i32, u32)> = Vec::new();
    let mut listed: Vec<Listed> = Vec::new();
    let mut nulls: Vec<i32> = Vec::new();
    for (position, answer) in &by_position {
        if let Some(e) = tried.raised.remove(position) {
            listed.extend(raised(plan, answer, &e, settled)?);
        } else if let Some(e) = tried.refused.remove(position) {
            hindered.refused.push(((*answer).clone(), e));
        } else if tried.blocked.contains(position) {
            if is_over(answer.locked_since) {
                listed.push(Listed::new(answer, "not_written", "its UPDATE waited for another transaction each time"));
            } else {
                settled.locked.push((*answer).clone());
            }
        } else if let Some((is_null, found)) = tried.seen.get(position) {
            if !is_null {
                settled.superseded += 1;
            } else if *found != hash(*position) {
                changed.push((*position, answer.attempts));
            } else {
                let written = tried.written.get(position).copied();
                if written == Some(false) && matches!(answer.verdict, Verdict::Answer(_)) {
                    // Only labels are asked for by name. Others may be large.
                    let label = answer.values.as_ref().filter(|_| plan.has_labels).and_then(|values| values.first());
                    settled.written.insert(label.cloned().flatten().unwrap_or_default());
                }
                if note(answer, written, tried.missing.contains(position), settled, &mut listed) {
                    nulls.push(*position);
                }
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
                Some((true, _)) if is_over(answer.locked_since) => {
                    listed.push(Listed::new(answer, "not_written", "the row stayed locked by another transaction"));
                }
                Some((true, _)) => settled.locked.push((*answer).clone()),
            }
        }
    }
    name_rows(plan, &page, listed, changed, settled)?;
    if !nulls.is_empty() {
        settled.nulls.extend(page::digest(&plan.digest, &page, nulls)?.into_iter().map(|(_, hash)| hash));
    }
    Ok(())
}

/// The UPDATE raised for this row: a value that does not fit its column is asked again, all else is listed.
fn raised(plan: &Plan, answer: &Answer, e: &Error, settled: &mut Settled) -> Result<Option<Listed>> {
    // Labels were looked at before the job began: no other answer would fit.
    let values = answer.values.as_deref().filter(|_| !plan.has_labels).unwrap_or_default();
    Ok(match fit::unfit(&plan.columns, values)? {
        Some(Refused { hint: Some(hint), detail, .. }) if answer.attempts < plan.max_attempts => {
            settled.unfit.push((answer.clone(), hint, detail));
            None
        }
        Some(Refused { class, detail, .. }) => {
            let raised = Some(Cause::Refused(class.to_owned()));
            Some(Listed { raised, ..Listed::new(answer, class, detail) })
        }
        None => {
            let values = answer.values.as_ref().filter(|_| plan.has_labels);
            let raised = Some(Cause::of(values.and_then(|values| values.first()?.as_ref()), e.code));
            Some(Listed { raised, ..Listed::new(answer, "write_error", e.with_state()) })
        }
    })
}

/// Returns true if a row has been tried again for long enough.
fn is_over(since: Option<Instant>) -> bool {
    let Some(since) = since else { return false };
    #[cfg(feature = "failure_points")]
    if llm_batch_gateway::failure::pass("patience", "").is_some() {
        return true;
    }
    since.elapsed() > PATIENCE
}

/// Notes the fate of a row that was as it had been. `written`: something of it is NULL after the UPDATE; `is_missing`:
/// there was something to write. Returns true if the row is done, and yet has a NULL that was the answer.
fn note(
    answer: &Answer,
    written: Option<bool>,
    is_missing: bool,
    settled: &mut Settled,
    listed: &mut Vec<Listed>,
) -> bool {
    let values = answer.values.as_deref().unwrap_or_default();
    match (&answer.verdict, written) {
        (Verdict::Answer(_), Some(false)) => {
            settled.done += 1;
            settled.reused += i64::from(answer.reused);
            return values.contains(&None);
        }
        (Verdict::Answer(_), None) if !is_missing => {
            settled.done += 1;
            settled.reused += i64::from(answer.reused);
            return true;
        }
        (Verdict::Answer(_), Some(true)) => listed.push(Listed::new(
            answer,
            "not_written",
            "the column is still NULL after the UPDATE; a trigger may have set it",
        )),
        (Verdict::Answer(_), None) => listed.push(Listed::new(
            answer,
            "not_written",
            "the UPDATE left the row out; a trigger may have returned NULL",
        )),
        (Verdict::Skip { class, detail }, _) => {
            listed.push(Listed { is_skip: true, ..Listed::new(answer, class, detail) });
        }
        (Verdict::Fail { class, detail }, _) => {
            let is_of_checks = [checks::FAILED, checks::RAISED].contains(&class.as_str());
            let raised = is_of_checks.then(|| Cause::Refused(class.clone()));
            listed.push(Listed { raised, ..Listed::new(answer, class, detail) });
        }
        (Verdict::Withdrawn, _) => {}
    }
    false
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
    let key = |position: i32| keys.get(&position).cloned().unwrap_or_default();
    for Listed { position, is_skip, class, attempts, detail, raised } in listed {
        let failure = Failure { key: key(position), is_skip, class, attempts, detail };
        match raised {
            Some(cause) => settled.raised.push((cause, failure)),
            None => settled.failures.push(failure),
        }
    }
    settled.changed.extend(changed.into_iter().map(|(position, attempts)| (key(position), attempts)));
    Ok(())
}

/// Finds values that a trigger made NULL again after the UPDATE: their rows would be asked again for ever.
fn find_nulls(plan: &Plan, page: &Page, answers: &BTreeMap<i32, &Answer>, tried: &mut Tried) -> Result<()> {
    let Some(query) = plan.nulls.as_ref().filter(|_| !tried.written.is_empty()) else { return Ok(()) };
    let mut args = page.args();
    args.push(tried.written.keys().copied().collect::<Vec<i32>>().into());
    for (position, nulls) in sql::rows_mut(query, &args, |r| Ok((r.get::<i32>(1)?, r.get::<Vec<Option<bool>>>(2)?)))? {
        let values = answers.get(&position).and_then(|a| a.values.as_deref()).unwrap_or_default();
        if values.iter().zip(nulls).any(|(value, is_null)| value.is_some() && is_null == Some(true)) {
            tried.written.insert(position, true);
        }
    }
    Ok(())
}
