//! The answer to a task: right, or wrong in the way asked for.

use fastrand::Rng;

use crate::Fault;
use crate::prompt::{Asked, RowId, Shape, Task};
use crate::tokens::{first_tokens, tokens};
use crate::values::Wanted;

const PROSE: &str = "These tickets are about many things, and it is hard to say which is which.";
const REFUSAL: &str = "I'm sorry, I can't help with that.";

/// A choice of a chat completion.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) content: Option<String>,
    pub(crate) refusal: Option<String>,
    pub(crate) finish_reason: &'static str,
    pub(crate) completion_tokens: u64,
    /// Those of them that came before the answer.
    pub(crate) thinking_tokens: u64,
    /// Ids of the markers of the rows whose right code the content holds.
    pub(crate) answered: Vec<RowId>,
}

/// One item of an answer.
struct Item {
    index: String,
    code: String,
    /// The id of the row it answers rightly.
    answers: Option<RowId>,
}

/// Answers a task, after so many tokens of `thinking`. `enforced` holds the codes a strict schema admits, if there
/// is one. The fault is taken out when it makes no difference (no row to drop),
/// and replaced when it became another.
pub(crate) fn compose(
    task: &Task,
    enforced: Option<&[String]>,
    max_tokens: Option<u64>,
    thinking: u64,
    fault: &mut Option<Fault>,
    rng: &mut Rng,
) -> Answer {
    // A schema of values is not looked into.
    let enforced = enforced.filter(|_| task.wanted.is_none());
    let mut items: Vec<Item> = task.rows.iter().map(|row| right(row, enforced)).collect();
    spoil(&mut items, task, enforced, fault, rng);
    if let Some(wanted) = &task.wanted {
        spoil_values(&mut items, wanted, fault, rng);
    }
    let (mut text, ends) = write(task.shape, &items);
    let mut answered: Vec<(usize, RowId)> =
        ends.into_iter().zip(items).filter_map(|(end, item)| Some((end, item.answers?))).collect();

    let mut finish_reason = "stop";
    let mut refusal = None;
    match fault {
        Some(Fault::EmptyAnswer) => text.clear(),
        Some(Fault::ContentFilter) => {
            text.clear();
            finish_reason = "content_filter";
        }
        Some(Fault::Refusal) => {
            text.clear();
            refusal = Some(REFUSAL.to_owned());
        }
        Some(Fault::MalformedJson) => text.truncate(text.floor_char_boundary(text.len() / 2)),
        Some(Fault::CutByLength) => {
            text = first_tokens(&text, tokens(&text) / 2);
            finish_reason = "length";
        }
        Some(Fault::OnlyProse) => {
            PROSE.clone_into(&mut text);
            answered.clear();
        }
        Some(Fault::SmartQuotes) => {
            text = text.replace("\":", "\u{201d}:").replace(",\"", ",\u{201c}").replace("{\"", "{\u{201c}");
            answered.clear();
        }
        Some(Fault::CutInString) => {
            let cut = text.rfind('"').map_or(0, |end| text.floor_char_boundary(end.saturating_sub(2)));
            text.truncate(cut);
            finish_reason = "length";
        }
        Some(Fault::Prose) => {
            const BEFORE: &str = "Sure! Here are the labels:\n```json\n";
            text = format!("{BEFORE}{text}\n```\nLet me know if I can help further.");
            for (end, _) in &mut answered {
                *end += BEFORE.len();
            }
        }
        _ => {}
    }
    let mut completion_tokens = thinking + tokens(refusal.as_deref().unwrap_or(&text));
    if let Some(max) = max_tokens.filter(|max| *max < completion_tokens) {
        let spoken = refusal.as_mut().unwrap_or(&mut text);
        *spoken = first_tokens(spoken, max.saturating_sub(thinking));
        completion_tokens = max;
        finish_reason = "length";
    }
    answered.retain(|(end, _)| *end <= text.len());
    Answer {
        content: refusal.is_none().then_some(text),
        refusal,
        finish_reason,
        completion_tokens,
        thinking_tokens: thinking.min(completion_tokens),
        answered: answered.into_iter().map(|(_, id)| id).collect(),
    }
}

/// The right item for a row, or the nearest a strict schema admits. A schema
/// whose enums hold no code (a pattern, say) is not looked into further.
fn right(row: &Asked, enforced: Option<&[String]>) -> Item {
    let joined = format!("{}{}", row.index, row.code);
    let admitted = match enforced {
        Some(codes) if !codes.is_empty() => codes.iter().any(|c| *c == row.code || *c == joined),
        _ => true,
    };
    let code = match enforced.and_then(|codes| codes.first()) {
        Some(first) if !admitted => first.clone(),
        _ => row.code.clone(),
    };
    Item { index: row.index.clone(), code, answers: row.id.filter(|_| admitted) }
}

/// Applies the faults that change items.
fn spoil(items: &mut Vec<Item>, task: &Task, enforced: Option<&[String]>, fault: &mut Option<Fault>, rng: &mut Rng) {
    let picks_a_row = matches!(fault, Some(Fault::DropId | Fault::InventId | Fault::DoubleId | Fault::UnknownCode));
    if !picks_a_row {
        return;
    }
    // A naive client's answer holds no ids.
    let needs_ids = matches!(fault, Some(Fault::InventId | Fault::DoubleId));
    if items.is_empty() || (needs_ids && task.shape == Shape::Plain) {
        *fault = None;
        return;
    }
    let pick = rng.usize(..items.len());
    let other_code = task.codes.iter().find(|code| **code != items[pick].code);
    match fault {
        Some(Fault::InventId) => {
            let highest = items.iter().filter_map(|item| item.index.parse().ok()).max();
            items[pick].index = (highest.unwrap_or(0u64) + 1000).to_string();
            items[pick].answers = None;
        }
        Some(Fault::DoubleId) if other_code.is_some() || enforced.is_none() => {
            let again = Item {
                index: items[pick].index.clone(),
                code: other_code.cloned().unwrap_or_else(|| unknown(task)),
                answers: None,
            };
            items.insert(pick + 1, again);
        }
        Some(Fault::UnknownCode) if enforced.is_none() => {
            items[pick].code = unknown(task);
            items[pick].answers = None;
        }
        _ => {
            *fault = Some(Fault::DropId);
            items.remove(pick);
        }
    }
}

/// Applies the faults that change the values of one row.
fn spoil_values(items: &mut [Item], wanted: &Wanted, fault: &mut Option<Fault>, rng: &mut Rng) {
    let (Some(of), false) = (fault.clone().filter(Fault::is_of_values), items.is_empty()) else { return };
    let pick = rng.usize(..items.len());
    let item = &mut items[pick];
    let Wanted::Fields(fields) = wanted else {
        // The only value may be of the wrong type, or in quotes.
        match (of, wanted) {
            (Fault::WrongType, Wanted::Text(..)) => "12".clone_into(&mut item.code),
            (Fault::WrongType, _) => "\"high\"".clone_into(&mut item.code),
            (Fault::NumbersAsStrings, Wanted::Score(..)) => item.code = format!("\"{}\"", item.code),
            _ => {
                *fault = None;
                return;
            }
        }
        item.answers = item.answers.filter(|_| *fault == Some(Fault::NumbersAsStrings));
        return;
    };
    let mut fields = fields.clone();
    let mut values = fields.values(&item.code);
    let at = rng.usize(..values.len().max(1));
    match of {
        Fault::DropField => {
            fields.all.remove(at);
            values.remove(at);
        }
        Fault::AddField => {
            let mut added = fields.all[at].clone();
            added.key = fields.all.iter().any(|f| f.key.is_some()).then(|| "x".to_owned());
            fields.all.push(added);
            values.push("1".to_owned());
        }
        Fault::DoubleField => {
            fields.all.push(fields.all[at].clone());
            values.push(values[at].clone());
        }
        Fault::RenameField => {
            let keyed = fields.all.iter_mut().filter(|field| field.key.is_some());
            keyed.for_each(|field| field.key = Some("renamed".to_owned()));
        }
        Fault::SwapFields => values.rotate_left(1),
        Fault::WrongType => {
            values[at] = if values[at].starts_with('"') { "12".to_owned() } else { "\"twelve\"".to_owned() }
        }
        Fault::NumbersAsStrings => {
            for value in values.iter_mut().filter(|v| v.parse::<f64>().is_ok()) {
                *value = format!("\"{value}\"");
            }
        }
        _ => {
            if let Some(date) = values.iter_mut().find(|value| value.starts_with("\"20")) {
                "\"the second of March\"".clone_into(date);
            }
        }
    }
    let written = fields.write(&values);
    let is_same = written == item.code;
    // Numbers in quotes are right all the same, and so is what a fault has not changed.
    item.answers = item.answers.filter(|_| is_same || of == Fault::NumbersAsStrings);
    item.code = written;
    if is_same {
        *fault = None;
    }
}

/// A code the legend lacks.
fn unknown(task: &Task) -> String {
    let mut code = "zz".to_owned();
    while task.codes.contains(&code) {
        code.push('z');
    }
    code
}

/// The answer's text, and where in it each item is complete.
fn write(shape: Shape, items: &[Item]) -> (String, Vec<usize>) {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let (open, close) = match shape {
        Shape::Map | Shape::Values => ("{", "}"),
        Shape::Rows => ("{\"rows\":[", "]}"),
        Shape::Objects | Shape::Strings => ("{\"r\":[", "]}"),
        Shape::Plain => ("", ""),
        Shape::Probe => ("ok", ""),
    };
    let mut text = open.to_owned();
    let mut ends = Vec::with_capacity(items.len());
    for (position, item) in items.iter().enumerate() {
        let Item { index, code, .. } = item;
        if position > 0 {
            text.push(',');
        }
        text.push_str(&match shape {
            Shape::Map => format!("{}:{}", quoted(index), quoted(code)),
            Shape::Values => format!("{}:{code}", quoted(index)),
            Shape::Rows => format!("{{\"id\":{index},{}", code.trim_start_matches('{')),
            Shape::Objects => format!("{{\"i\":{index},\"c\":{}}}", quoted(code)),
            Shape::Strings => quoted(&format!("{index}{code}")),
            Shape::Plain | Shape::Probe => code.clone(),
        });
        ends.push(text.len());
    }
    text.push_str(close);
    (text, ends)
}
