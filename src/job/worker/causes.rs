//! Finds out why the UPDATE of a row raised: because of the row, which is then listed, or because of its label or the kind
//! of the error, which ends the run before all such rows are paid for.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use crate::error::Error;
use crate::job::plan::Plan;
use crate::job::settle::{Answer, sqlstate};
use crate::job::store::Failure;

/// Rows of a cause that could not be written, one after the other, until it is at fault.
const ENOUGH: usize = 3;
/// The same for a cause of which a row was written after such a row: then it was the row.
const ENOUGH_MIXED: usize = 30;

/// What may be at fault, beside the row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A label.
    Label(String),
    /// Where values are not labels: the error's SQLSTATE.
    State(String),
}

impl Cause {
    /// Of an answer whose UPDATE raised.
    pub fn of(plan: &Plan, answer: &Answer, e: &Error) -> Self {
        let label = answer.values.as_ref().filter(|_| plan.has_labels).and_then(|values| values.first().cloned());
        label.flatten().map_or_else(|| Self::State(sqlstate(e.code)), Self::Label)
    }

    /// Whether a row that has these values would have met it too.
    fn is_refuted(&self, written: &BTreeSet<String>) -> bool {
        match self {
            Self::Label(label) => written.contains(label),
            Self::State(_) => !written.is_empty(),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "label \"{label}\""),
            Self::State(state) => write!(f, "error {state}"),
        }
    }
}

#[derive(Default)]
struct Suspect {
    /// Rows that could not be written since one of the cause was.
    rows: Vec<Failure>,
    is_mixed: bool,
    is_guilty: bool,
}

#[derive(Default)]
pub(super) struct Suspects(HashMap<Cause, Suspect>);

/// What a settlement has shown.
pub(super) struct Verdicts {
    /// Rows that are at fault themselves.
    pub rows: Vec<Failure>,
    /// A cause that is, and what was raised last.
    pub guilty: Option<(Cause, String)>,
}

impl Suspects {
    /// `written`: first values of rows that were written; `raised`: rows that were not, and why.
    pub fn judge(&mut self, written: &BTreeSet<String>, raised: Vec<(Cause, Failure)>) -> Verdicts {
        let mut verdicts = Verdicts { rows: Vec::new(), guilty: None };
        for (cause, failure) in raised {
            let suspect = self.0.entry(cause).or_default();
            // Rows of what is at fault are given back.
            if !suspect.is_guilty {
                suspect.rows.push(failure);
            }
        }
        for (cause, suspect) in self.0.iter_mut().filter(|(_, s)| !s.rows.is_empty()) {
            if cause.is_refuted(written) {
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
