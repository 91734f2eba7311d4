//! Rows locked, looked at and written. The rows for which the UPDATE raises are found by halving.

use std::collections::{BTreeMap, BTreeSet};

use pgrx::PgSqlErrorCode as Code;
use pgrx::datum::DatumWithOid;

use crate::error::{Error, Result, is_passing};
use crate::job::page::Page;
use crate::job::plan::Plan;
use crate::{process, sql, txn};

/// Errors that should pass in one settlement (waits for locks but the first are of 100 ms), until the rest is left for the
/// next one.
pub const MOST_TRIES: u32 = 20;

/// Errors that should pass, and the last of them.
#[derive(Default)]
pub struct Passing {
    pub tries: u32,
    pub error: Option<Error>,
}

/// Somebody holds a lock.
fn is_lock(code: Code) -> bool {
    matches!(code, Code::ERRCODE_LOCK_NOT_AVAILABLE | Code::ERRCODE_T_R_DEADLOCK_DETECTED)
}

/// A row that was looked at: whether its target was NULL, its input's hash.
pub type Look = (bool, Option<i64>);

pub fn look(plan: &Plan, page: &Page, positions: Vec<i32>) -> Result<BTreeMap<i32, Look>> {
    // Each time, since a trigger of the statement before may have changed it.
    sql::set_local("search_path", &plan.search_path)?;
    let mut args = page.args();
    args.push(positions.into());
    let rows = sql::rows_mut(&plan.look, &args, |r| Ok((r.get::<i32>(1)?, (r.get::<bool>(2)?, r.maybe::<i64>(3)?))))?;
    Ok(rows.into_iter().collect())
}

/// Returns true if all of these rows can still be seen, with the text that was claimed.
pub fn is_as_sent(plan: &Plan, page: &Page, positions: &[i32]) -> Result<bool> {
    let seen = look(plan, page, positions.to_vec())?;
    let hash = |position: i32| page.hashes.get(position as usize - 1).copied();
    Ok(positions.iter().all(|p| seen.get(p).is_some_and(|(_, found)| *found == hash(*p))))
}

/// A row that can be seen and is not locked, and yet can't be locked by us, is out of reach of UPDATE.
pub fn is_out_of_reach(plan: &Plan, page: &Page, position: i32) -> Result<bool> {
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
pub struct Todo {
    pub position: i32,
    /// Without any it is only looked at.
    pub values: Vec<Option<String>>,
    pub by: Option<String>,
    pub confidence: Option<f64>,
    pub hash: i64,
}

/// The result of trying to write rows; a row that is nowhere in it could not be locked.
#[derive(Default)]
pub struct Tried {
    pub seen: BTreeMap<i32, Look>,
    /// Rows that there was something to write to.
    pub missing: BTreeSet<i32>,
    /// True if something that was written is NULL after the UPDATE.
    pub written: BTreeMap<i32, bool>,
    /// The errors that the UPDATE raised.
    pub raised: BTreeMap<i32, Error>,
    /// The write alone raised what should pass.
    pub refused: BTreeMap<i32, Error>,
    /// The write waited for a lock of someone else's in vain, or was not tried any more.
    pub blocked: BTreeSet<i32>,
}

/// Locks rows, looks at them and writes those that are as they were. If the statement raises, the rows it raises for are
/// found by halving, so that the others are written.
pub fn write(plan: &Plan, page: &Page, rows: &[Todo], passing: &mut Passing) -> Result<Tried> {
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
                    if let Some((look, is_missing)) = look {
                        tried.seen.insert(position, look);
                        tried.missing.extend(is_missing.then_some(position));
                    }
                    is_still_null.map(|is| tried.written.insert(position, is));
                }
                continue;
            }
            Err(e) => e,
        };
        let is_told_to_end = e.code == Code::ERRCODE_QUERY_CANCELED && process::is_told_to_end();
        if is_told_to_end || is_of_the_table(plan, e.code)? {
            return Err(e);
        }
        if part.len() == rows.len() {
            // An error of looking is one that every write would raise.
            look(plan, page, part.iter().map(|t| t.position).collect())?;
        }
        // It may be what one row alone needs: a lock on what its label refers to, something of its trigger.
        let (is_lock, passes) = (is_lock(e.code), is_passing(e.code));
        if is_lock {
            sql::set_local("lock_timeout", "100ms")?;
        }
        if passes {
            passing.tries += 1;
            passing.error = Some(e.clone());
            if passing.tries > MOST_TRIES {
                tried.blocked.extend(part.iter().map(|t| t.position));
                continue;
            }
        }
        match part {
            [one] if is_lock => drop(tried.blocked.insert(one.position)),
            [one] if passes => drop(tried.refused.insert(one.position, e)),
            [one] => drop(tried.raised.insert(one.position, e)),
            _ => {
                let (first, second) = part.split_at(part.len() / 2);
                todo.push(second);
                todo.push(first);
            }
        }
    }
    Ok(tried)
}

type Found = (i32, Option<(Look, bool)>, Option<bool>);

fn write_part(plan: &Plan, page: &Page, part: &[Todo]) -> Result<Vec<Found>> {
    sql::set_local("search_path", &plan.search_path)?;
    let mut args: Vec<DatumWithOid> = page.args();
    args.push(part.iter().map(|t| t.position).collect::<Vec<i32>>().into());
    args.push(part.iter().map(|t| t.hash).collect::<Vec<i64>>().into());
    for target in 0..plan.targets {
        let value = |t: &Todo| t.values.get(target).cloned().flatten();
        args.push(part.iter().map(value).collect::<Vec<Option<String>>>().into());
    }
    if plan.has_provenance {
        args.push(part.iter().map(|t| t.by.clone()).collect::<Vec<Option<String>>>().into());
    }
    if plan.has_confidence {
        args.push(part.iter().map(|t| t.confidence).collect::<Vec<Option<f64>>>().into());
    }
    sql::rows_mut(&plan.write, &args, |r| {
        let look = |is_null| Ok::<_, Error>(((is_null, r.maybe::<i64>(3)?), r.get::<bool>(4)?));
        Ok((r.get::<i32>(1)?, r.maybe::<bool>(2)?.map(look).transpose()?, r.maybe::<bool>(5)?))
    })
}

/// Errors that every row would meet. A trigger may be denied something for one row; the right to write the column is
/// another matter. Table and columns were looked at in this transaction: what is missing else is missing in user code.
fn is_of_the_table(plan: &Plan, code: Code) -> Result<bool> {
    Ok(code == Code::ERRCODE_INSUFFICIENT_PRIVILEGE && sql::one::<bool>(&plan.may_update, &[])? != Some(true))
}
