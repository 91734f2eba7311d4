//! Finds out why the UPDATE of a row raised: because of the row, which is then listed, or because of its label, which ends
//! the run before all rows of that label are paid for.

use std::collections::{BTreeSet, HashMap};

use crate::job::store::Failure;

/// Rows of a label that could not be written, one after the other, until the label is at fault.
const ENOUGH: usize = 3;
/// The same for a label that was written after such a row: then it was the row.
const ENOUGH_MIXED: usize = 30;

#[derive(Default)]
struct Suspect {
    /// Rows that could not be written since one of the label was.
    rows: Vec<Failure>,
    is_mixed: bool,
    is_guilty: bool,
}

#[derive(Default)]
pub(super) struct Suspects(HashMap<String, Suspect>);

/// What a settlement has shown.
pub(super) struct Verdicts {
    /// Rows that are at fault themselves.
    pub rows: Vec<Failure>,
    /// A label that is, and what was raised last.
    pub label: Option<(String, String)>,
}

impl Suspects {
    /// `written`: labels of rows that were written; `raised`: rows that were not, and their labels.
    pub fn judge(&mut self, written: &BTreeSet<String>, raised: Vec<(String, Failure)>) -> Verdicts {
        let mut verdicts = Verdicts { rows: Vec::new(), label: None };
        for (label, failure) in raised {
            let suspect = self.0.entry(label).or_default();
            // Rows of a label that is at fault are given back.
            if !suspect.is_guilty {
                suspect.rows.push(failure);
            }
        }
        for label in written {
            if let Some(suspect) = self.0.get_mut(label).filter(|s| !s.rows.is_empty()) {
                suspect.is_mixed = true;
                verdicts.rows.append(&mut suspect.rows);
            }
        }
        for (label, suspect) in &mut self.0 {
            let enough = if suspect.is_mixed { ENOUGH_MIXED } else { ENOUGH };
            if suspect.rows.len() >= enough {
                suspect.is_guilty = true;
                verdicts.label = suspect.rows.pop().map(|row| (label.clone(), row.detail));
                suspect.rows.clear();
            }
        }
        verdicts
    }

    pub fn is_empty(&self) -> bool {
        self.0.values().all(|s| s.rows.is_empty())
    }

    /// Nothing more is to come of which their labels could be found at fault.
    pub fn take(&mut self) -> Vec<Failure> {
        self.0.values_mut().flat_map(|s| std::mem::take(&mut s.rows)).collect()
    }
}
