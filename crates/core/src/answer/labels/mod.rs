//! Reading labels: a code can be recognized wherever it stands, so answers of many shapes are read.
//! Each reading of the text makes claims: this number has this label. Stricter
//! readings go first, and a looser one is heard only for a row of which the stricter say nothing. Within a reading, two
//! labels for a row are none. Thinking is cut off before; an answer that is cut off in the middle loses rows and
//! changes none.

mod json;
mod lines;

use std::collections::{HashMap, HashSet};

use super::{is_of_another, number};
use crate::codes::Legend;

/// The verdict on one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The index of the row's label.
    Label(usize),
    /// The answer does not name the row.
    Missing,
    /// The answer names the row with a code that is not in the legend.
    UnknownCode,
    /// The answer names the row more than once, and not with the same code.
    Contradicted,
}

/// Holds `text` against the ids that were asked; the verdicts are in the order of `ids`. A last line without an end
/// counts only as far as it could not go on to another label. `None` if it answers another request.
pub(super) fn read(text: &str, ids: &[u16], legend: &Legend) -> Option<Vec<Verdict>> {
    let index = ids.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let mut claims = Claims { index, legend, of: vec![Row::default(); ids.len()], others: HashSet::new() };
    // A bracket is more often a part of prose than a brace is.
    let mut found = json::read(text, &['{'], &mut claims);
    if claims.is_empty() {
        found = json::read(text, &['{', '['], &mut claims);
    }
    lines::read(text, &found.covered, &mut claims);
    if claims.is_empty() {
        // All of it may be JSON within a JSON string.
        let whole =
            serde_json::from_str::<String>(text.trim().trim_matches('`').trim_start_matches("json").trim()).ok();
        if let Some(inner) = whole.or(found.only_string) {
            json::read(&inner, &['{', '['], &mut claims);
        }
    }
    let verdicts: Vec<Verdict> = claims.of.iter().map(Row::verdict).collect();
    let named = verdicts.iter().filter(|v| **v != Verdict::Missing).count();
    (!is_of_another(named, claims.others.len())).then_some(verdicts)
}

/// The layout of a claim, the strictest first.
#[derive(Debug, Clone, Copy)]
enum Reading {
    /// As it was asked for: a number is the key of a code, or before it in one string, or `i` and `c`.
    Asked,
    /// In an object or a list that has one number and one label, or the number is the key of such a one.
    Member,
    /// In a list under its label.
    Grouped,
    /// On a line.
    Line,
}

const READINGS: usize = 4;

/// The claims on one row, by reading.
#[derive(Debug, Clone)]
struct Row {
    of: [Verdict; READINGS],
    /// It is named with what is no label.
    is_named: bool,
}

impl Default for Row {
    fn default() -> Self {
        Self { of: [Verdict::Missing; READINGS], is_named: false }
    }
}

impl Row {
    fn verdict(&self) -> Verdict {
        let other = if self.is_named { Verdict::UnknownCode } else { Verdict::Missing };
        self.of.iter().copied().find(|v| *v != Verdict::Missing).unwrap_or(other)
    }
}

/// The rows that were asked, and the claims on them.
struct Claims<'a> {
    index: HashMap<u16, usize>,
    legend: &'a Legend,
    of: Vec<Row>,
    /// Numbers that something is said of and that were not asked.
    others: HashSet<u16>,
}

impl Claims<'_> {
    fn claim(&mut self, row: usize, reading: Reading, now: Verdict) {
        let Some(slot) = self.of.get_mut(row).and_then(|r| r.of.get_mut(reading as usize)) else { return };
        *slot = match *slot {
            Verdict::Missing => now,
            before if before == now => now,
            _ => Verdict::Contradicted,
        };
    }

    /// A row is named, by what gives it no label.
    fn name(&mut self, row: usize) {
        if let Some(r) = self.of.get_mut(row) {
            r.is_named = true;
        }
    }

    /// A number that was not asked, if the text is one.
    fn other(&mut self, text: &str) {
        self.others.extend(number(text).filter(|id| !self.index.contains_key(id)));
    }

    fn is_empty(&self) -> bool {
        self.of.iter().all(|r| r.verdict() == Verdict::Missing)
    }

    /// The row of a text that is an asked number and nothing else.
    fn row(&self, text: &str) -> Option<usize> {
        self.index.get(&number(text)?).copied()
    }

    /// The row of a text that is an asked number, with what may stand around it: `#417`, `id 417`, `**417**`.
    fn row_loosely(&self, text: &str) -> Option<usize> {
        let (before, id, after) = around_number(text)?;
        (is_name(before) && after.trim_matches(WRAPPERS).is_empty()).then(|| self.index.get(&id).copied()).flatten()
    }

    /// The label that a text is, without regard to what may stand around it.
    fn label(&self, text: &str) -> Option<usize> {
        let ends = |c: char| c.is_whitespace() || matches!(c, ',' | ';' | '.' | '!');
        let first = self.legend.resolve(text);
        let bare = text.trim().trim_end_matches(ends).trim_matches(WRAPPERS);
        let next = || self.legend.resolve(bare);
        let last = || self.legend.resolve(bare.trim_end_matches(ends));
        // "A = billing", if both sides are the same label.
        let both = || {
            let (code, label) = bare.split_once([':', '=', '(', '-'])?;
            let [code, label] =
                [code, label].map(|s| self.legend.resolve(s.trim_matches(WRAPPERS).trim_end_matches(')')));
            code.filter(|_| code == label)
        };
        first.or_else(next).or_else(last).or_else(both)
    }
}

/// Signs that may stand around a number or a label.
const WRAPPERS: [char; 18] = [
    ' ', '\t', '*', '_', '`', '"', '\'', '<', '>', '[', ']', '\u{201c}', '\u{201d}', '\u{2018}', '\u{2019}', '\u{ab}',
    '\u{bb}', '#',
];

/// The first digits of a text, if they are three and stand alone: what is before them, their number, what is after them.
fn around_number(text: &str) -> Option<(&str, u16, &str)> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let (before, rest) = text.split_at_checked(start)?;
    let (digits, after) = rest.split_at_checked(3)?;
    let stands_alone = !after.starts_with(|c: char| c.is_alphanumeric() || c == '_')
        && !before.ends_with(|c: char| c.is_alphanumeric() || c == '-' || c == '.');
    stands_alone.then(|| number(digits)).flatten().map(|id| (before, id, after))
}

/// Returns true if a text only announces the number of a row.
fn is_name(text: &str) -> bool {
    let word = text.trim_end_matches([':', '=', '.']).trim_matches(WRAPPERS);
    let word = word.trim_end_matches([':', '=', '.', '#']).trim_matches(WRAPPERS);
    ["", "id", "row", "item", "no", "nr", "number", "text", "entry", "line", "input"]
        .iter()
        .any(|name| word.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests;
