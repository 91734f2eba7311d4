//! Finds out why the UPDATE of a row raised, or the task's checks refused it: because of the row, which is then listed,
//! or because of its label or the kind of the error, which ends the run before all such rows are paid for.

use std::collections::{BTreeSet, HashMap};

use super::doubt::Doubt;
use crate::job::cause::Cause;
use crate::job::ledger::Failure;

/// Rows of a cause that could not be written, one after the other, until it is at fault.
const ENOUGH: usize = 3;
/// The same for a cause of which a row was written after such a row: then it was the row.
const ENOUGH_MIXED: usize = 30;

#[derive(Default)]
struct Suspect {
    /// Rows that could not be written since one of the cause was.
    rows: Vec<Failure>,
    is_mixed: bool,
    is_guilty: bool,
}

#[derive(Default)]
pub(super) struct Suspects(HashMap<Cause, Suspect>);

/// The verdicts of a settlement.
pub(super) struct Verdicts {
    /// Rows that are at fault themselves.
    pub rows: Vec<Failure>,
    /// A cause that is, and what was raised last.
    pub guilty: Option<(Cause, String)>,
}

impl Suspects {
    /// `written`: first values of rows that were written; `raised`: rows that were not, and why; `doubt`: whether
    /// answers are taken at all.
    pub fn judge(&mut self, written: &BTreeSet<String>, raised: Vec<(Cause, Failure)>, doubt: &Doubt) -> Verdicts {
        let mut verdicts = Verdicts { rows: Vec::new(), guilty: None };
        for (cause, failure) in raised {
            let suspect = self.0.entry(cause).or_default();
            // Rows of what is at fault are given back.
            if !suspect.is_guilty {
                suspect.rows.push(failure);
            }
        }
        for (cause, suspect) in self.0.iter_mut().filter(|(_, s)| !s.rows.is_empty()) {
            if cause.is_refuted(written) || matches!(cause, Cause::Refused(class) if doubt.is_refuted(class)) {
                suspect.is_mixed = true;
                verdicts.rows.append(&mut suspect.rows);
            }
        }
        for (cause, suspect) in &mut self.0 {
            let enough = if suspect.is_mixed { ENOUGH_MIXED } else { ENOUGH };
            if suspect.rows.len() >= enough {
                suspect.is_guilty = true;
                verdicts.guilty = suspect.rows.pop().map(|row| (cause.clone(), row.detail));
                suspect.rows.clear();
            }
        }
        verdicts
    }

    pub fn is_empty(&self) -> bool {
        self.0.values().all(|s| s.rows.is_empty())
    }

    /// Nothing more is to come of which their causes could be found at fault.
    pub fn take(&mut self) -> Vec<Failure> {
        self.0.values_mut().flat_map(|s| std::mem::take(&mut s.rows)).collect()
    }
}
