//! The task that a prompt states.
//!
//! The system message holds a legend, a line `Labels:` and then one line per
//! label up to an empty line, each `CODE` or `CODE = LABEL` with an optional
//! `: description`. It also tells the answer's shape by an example. The user
//! message has one line per row, `417: "the row's text as a JSON string"`, and
//! the text carries a marker `#r000123:billing#`: the row's id and right label.
//! In place of the label, `?` stands for the first one.

use std::fmt;

use crate::request::Chat;
use crate::values::Wanted;

/// The longest row text kept as a marker's label, in bytes.
const MAX_LABEL_BYTES: usize = 200;

/// A prompt that was understood.
#[derive(Debug, PartialEq)]
pub(crate) struct Task {
    pub(crate) shape: Shape,
    /// The values asked for, if the answer is not a code.
    pub(crate) wanted: Option<Wanted>,
    /// The codes of the legend, in its order.
    pub(crate) codes: Vec<String>,
    pub(crate) rows: Vec<Asked>,
}

/// A row of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Its number in the prompt, in digits; empty for a naive client.
    pub(crate) index: String,
    /// The id of its marker, if it has one.
    pub(crate) id: Option<RowId>,
    /// The right code, or the right answer in JSON if the task wants none.
    pub(crate) code: String,
}

/// A marker's id as written, in little room: its digits after a 1, so that
/// leading zeros count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowId(u64);

impl RowId {
    /// Reads up to 18 digits.
    fn read(digits: &str) -> Option<Self> {
        let is_id = (1..=18).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        is_id.then(|| Self(digits.bytes().fold(1, |number, digit| number * 10 + u64::from(digit - b'0'))))
    }
}

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().get(1..).unwrap_or_default())
    }
}

/// The shape of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `{"417":"billing"}`
    Map,
    /// `{"417":["billing",12.5]}`: values in JSON
    Values,
    /// `{"rows":[{"id":417,"label":"billing"}]}`: values in JSON by their names
    Rows,
    /// `{"r":[{"i":417,"c":"billing"}]}`
    Objects,
    /// `{"r":["417billing"]}`
    Strings,
    /// The label alone, for a client that asks one row at a time.
    Plain,
    /// No row was asked.
    Probe,
}

impl Task {
    pub(crate) fn read(chat: &Chat) -> Self {
        let wanted = Wanted::read(&chat.system);
        let legend = if wanted.is_some() { Vec::new() } else { legend(&chat.system) };
        let ask = |index: &str, text: &str| {
            let marker = markers(text).next();
            let (id, label) = (marker.and_then(|(id, _)| RowId::read(id)), marker.map(|(_, label)| label));
            let code = match &wanted {
                Some(wanted) => wanted.right(marker.and_then(|(id, _)| id.parse().ok()).unwrap_or(0), label, text),
                None => right_code(&legend, label),
            };
            Asked { index: index.to_owned(), id, code }
        };
        let mut rows: Vec<Asked> =
            chat.user.split('\n').filter_map(numbered).map(|(index, text)| ask(index, &text)).collect();
        let shape = if !rows.is_empty() {
            if matches!(&wanted, Some(Wanted::Fields(fields)) if fields.is_object) {
                Shape::Rows
            } else if wanted.is_some() {
                Shape::Values
            } else if chat.system.contains(r#"{"r":[{"i":"#) {
                Shape::Objects
            } else if chat.system.contains(r#"{"r":[""#) {
                Shape::Strings
            } else {
                Shape::Map
            }
        } else if markers(&chat.user).count() == 1 {
            rows.push(ask("", &chat.user));
            Shape::Plain
        } else {
            Shape::Probe
        };
        Self { shape, wanted, codes: legend.into_iter().map(|(code, _)| code).collect(), rows }
    }
}

/// Pairs of code and label.
fn legend(system: &str) -> Vec<(String, String)> {
    system
        .lines()
        .skip_while(|line| *line != "Labels:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .map(|line| {
            let head = line.split_once(": ").map_or(line, |(head, _)| head);
            let (code, label) = head.split_once(" = ").unwrap_or((head, head));
            (code.to_owned(), label.to_owned())
        })
        .collect()
}

/// The code of a label; without one, or with one the legend lacks, that of the
/// first label. A naive client's prompt has no legend: the label is the code.
fn right_code(legend: &[(String, String)], label: Option<&str>) -> String {
    let wanted = label.filter(|label| *label != "?");
    let found = legend.iter().find(|(_, label)| Some(label.as_str()) == wanted);
    match (found.or(legend.first()), wanted) {
        (Some((code, _)), _) => code.clone(),
        (None, Some(label)) => label.to_owned(),
        (None, None) => "ok".to_owned(),
    }
}

/// Number and text of a row's line. Line ends and quotes within the text are
/// escaped, so a text cannot make up another row.
fn numbered(line: &str) -> Option<(&str, String)> {
    let (index, text) = line.split_once(": ")?;
    let is_number = (1..=18).contains(&index.len()) && index.bytes().all(|b| b.is_ascii_digit());
    // JSON has no numbers with leading zeros, and an answer may hold it as one.
    if !is_number || (index.len() > 1 && index.starts_with('0')) {
        return None;
    }
    // A hint about the answer before may follow.
    let text = text
        .rfind("\" (asked again: ")
        .and_then(|end| text.get(..=end))
        .filter(|_| text.ends_with(')'))
        .unwrap_or(text);
    Some((index, serde_json::from_str(text).ok()?))
}

/// Ids and labels of the markers in a text.
fn markers(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.match_indices("#r").filter_map(|(at, opening)| {
        let rest = &text[at + opening.len()..];
        let (id, rest) = rest.split_once(':')?;
        let (label, _) = rest.split_once('#')?;
        let good_id = (1..=18).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
        let good_label = (1..=MAX_LABEL_BYTES).contains(&label.len()) && !label.contains('\n');
        (good_id && good_label).then_some((id, label))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legends_with_codes_labels_and_descriptions() {
        let system = "Choose.\nLabels:\nbilling\na1 = bug = or not: it: breaks\nplain: a = b\n\nno";
        let pair = |code: &str, label: &str| (code.to_owned(), label.to_owned());
        assert_eq!(legend(system), [pair("billing", "billing"), pair("a1", "bug = or not"), pair("plain", "plain"),]);
        assert!(legend("Some Labels:\nx").is_empty());
    }

    #[test]
    fn row_texts_cannot_make_up_rows() {
        assert_eq!(numbered(r#"417: "a\n418: \"b\" #r1:x#""#), Some(("417", "a\n418: \"b\" #r1:x#".to_owned())));
        for line in [
            r#"417: "a" b"#,
            "417: a",
            r#"x417: "a""#,
            r#"07: "a""#,
            r#": "a""#,
            "417: \"a\tb\"",
            r#"417: 5"#,
            r#"9999999999999999999999: "a""#,
        ] {
            assert_eq!(numbered(line), None, "{line}");
        }
    }

    #[test]
    fn markers_anywhere_and_broken_ones_nowhere() {
        let found: Vec<_> = markers("é#r#r000123:billing# #r:x# #rx:y# #r5:?##r6:a\nb# #r7:").collect();
        assert_eq!(found, [("000123", "billing"), ("5", "?")]);
    }

    #[test]
    fn ids_are_kept_as_written() {
        for id in ["0", "000123", "123", "000000000000000000", "999999999999999999"] {
            assert_eq!(RowId::read(id).unwrap().to_string(), id);
        }
        assert_ne!(RowId::read("000123"), RowId::read("123"));
        for id in ["", "x", "+1", "1999999999999999999"] {
            assert_eq!(RowId::read(id), None, "{id}");
        }
    }

    #[test]
    fn labels_to_codes() {
        let legend = legend("Labels:\na = first\nb = second\n");
        assert_eq!(right_code(&legend, Some("second")), "b");
        assert_eq!(right_code(&legend, Some("?")), "a");
        assert_eq!(right_code(&legend, Some("third")), "a");
        assert_eq!(right_code(&legend, None), "a");
        assert_eq!(right_code(&[], Some("third")), "third");
    }
}
