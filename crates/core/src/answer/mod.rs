//! Reading an answer: which row got which values. The text is untrusted; anything may be in it.
//!
//! Every answer carries the id of its row, so a model that drops, repeats or invents one can't shift the others. What is
//! thought is cut off before; what is cut off in the middle loses rows and changes none.

mod labels;
#[cfg(test)]
mod shapes;
mod tidy;
mod values;
mod vectors;

use crate::prompt;
use crate::task::{Answer, Kind, Unfit};
use crate::thinking;
use serde_json::value::RawValue;

/// The verdict on one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its values.
    Answer(Answer),
    /// The answer does not name the row.
    Missing,
    /// The answer names the row with what is no answer of the task.
    Unfit(Unfit),
    /// The answer names the row more than once, and not with the same values.
    Contradicted,
    /// It is refused for this row, and not for others.
    Refused,
}

/// Holds `text` against the ids that were asked; the verdicts are in the order of `ids`. A last line without an end
/// counts only as far as it could not go on to another label. `None` if most of its numbers were not asked: it answers
/// another request, and what it says of a number that both have is not said of this row.
pub fn read(text: &str, ids: &[u16], kind: &dyn Kind) -> Option<Vec<Verdict>> {
    if kind.has_vectors() {
        return vectors::read(text, ids, kind);
    }
    let text = thinking::spoken(text);
    let Some(legend) = kind.legend() else { return values::read(&text, ids, kind) };
    let answer = |code: &String| {
        let quoted = RawValue::from_string(prompt::quote(code)).ok()?;
        kind.read(&quoted).ok()
    };
    let answers: Vec<Option<Answer>> = legend.codes().iter().map(answer).collect();
    let verdict = |of: labels::Verdict| match of {
        labels::Verdict::Label(i) => {
            answers.get(i).cloned().flatten().map_or_else(|| Verdict::Unfit(Unfit::unknown_code()), Verdict::Answer)
        }
        labels::Verdict::Missing => Verdict::Missing,
        labels::Verdict::UnknownCode => Verdict::Unfit(Unfit::unknown_code()),
        labels::Verdict::Contradicted => Verdict::Contradicted,
    };
    Some(labels::read(&text, ids, legend)?.into_iter().map(verdict).collect())
}

/// Beside numbers that were asked, so many others say nothing: models invent some, most of all where they are asked about
/// one row.
const FEW_OTHERS: usize = 2;

/// Returns true if an answer answers another request. `named`: its rows that were asked; `others`: its rows that were
/// not.
fn is_of_another(named: usize, others: usize) -> bool {
    others > if named == 0 { 0 } else { named.max(FEW_OTHERS) }
}

/// Returns true if a text is an answer in words, with nothing in it that could be JSON.
pub fn is_prose(text: &str) -> bool {
    let text = thinking::spoken(text);
    !text.trim().is_empty() && !text.contains(['{', '['])
}

/// A text of three digits.
fn number(text: &str) -> Option<u16> {
    let digits = text.as_bytes();
    (digits.len() == 3 && digits.iter().all(u8::is_ascii_digit)).then(|| text.parse().ok()).flatten()
}
