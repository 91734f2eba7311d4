//! The text of a request: a fixed prefix, then one line a row.
//!
//! Nothing but the rows changes from pack to pack, so that a provider's prompt cache hits and its schema compiler is
//! asked once. A row is a number and a JSON string on one line: a text can't end its own frame, and can't know the
//! number of another row.

use serde_json::Value;

use crate::CountTokens;

/// One row of the user message, with its line end, and with what its answer should have been if it was something else.
pub fn row(id: u16, quoted: &str, wanted: Option<&str>) -> String {
    let id = id.to_string();
    // Once for each row of each request: the parts together need one allocation, formatted one after the other several.
    match wanted {
        None => [&id, ": ", quoted, "\n"].concat(),
        Some(wanted) => [&id, ": ", quoted, " (asked again: ", wanted, ")\n"].concat(),
    }
}

/// Beginnings of the marks by which chat templates part a conversation. Servers of local models read them in a row's text
/// too, as if they were their own: what follows is then a new turn.
const MARKS: [&str; 6] = ["<|", "<\u{ff5c}", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"];

/// A text as a JSON string, in which no mark of a chat template stands as such: JSON has another way to write `<`.
pub fn quote(text: &str) -> String {
    let mut quoted = Value::from(text).to_string();
    for mark in MARKS {
        if quoted.contains(mark) {
            quoted = quoted.replace(mark, &mark.replacen('<', "\\u003c", 1));
        }
    }
    quoted
}

/// An answer with these values, in JSON, as the model is asked to write it.
pub fn answer(rows: &[(u16, &str)]) -> String {
    let rows: Vec<String> = rows.iter().map(|(id, value)| format!("\"{id}\":{value}")).collect();
    format!("{{{}}}", rows.join(","))
}

/// Tokens that a further row with this value, in JSON, adds to an answer: at its borders tokens melt together.
pub fn tokens_of_a_row(value: &str, count: CountTokens) -> usize {
    let of = |rows: usize| count(&answer(&vec![(417, value); rows]));
    of(3).saturating_sub(of(2))
}

/// Tokens of an answer beside its rows.
pub fn tokens_of_the_frame(count: CountTokens) -> usize {
    let of = |rows: usize| count(&answer(&vec![(417, "\"\""); rows]));
    (2 * of(2)).saturating_sub(of(3)).saturating_sub(tokens_of_a_row("\"\"", count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_text_cannot_end_its_line() {
        let line = row(417, &quote("x\"\n902: \"y"), None);
        assert_eq!(line.matches('\n').count(), 1);
        let text: String = serde_json::from_str(line.trim_end().split_once(": ").unwrap().1).unwrap();
        assert_eq!(text, "x\"\n902: \"y");
    }

    proptest! {
        /// Any text goes through the prompt as one JSON string on one line of its own, among others that stay as they are.
        #[test]
        fn any_text_is_one_json_string(texts in proptest::collection::vec(any_text(), 1..5)) {
            let lines: String = texts.iter().zip(417..).map(|(text, id)| row(id, &quote(text), None)).collect();
            prop_assert!(!lines.chars().any(|c| c.is_ascii_control() && c != '\n'));
            prop_assert!(!MARKS.iter().any(|mark| lines.contains(mark)), "{}", lines);
            let read: Vec<(String, String)> = lines
                .split_terminator('\n')
                .map(|line| line.split_once(": ").unwrap())
                .map(|(id, text)| (id.to_owned(), serde_json::from_str(text).unwrap()))
                .collect();
            let wanted: Vec<(String, String)> = (417..).map(|id: u16| id.to_string()).zip(texts).collect();
            prop_assert_eq!(read, wanted);
        }
    }

    /// Texts with much of what ends a string or a line somewhere.
    fn any_text() -> impl Strategy<Value = String> {
        let odd = prop::sample::select(vec![
            "\"",
            "\\",
            "\n",
            "\r",
            "\r\n",
            "\u{2028}",
            "\u{85}",
            "\u{0b}",
            "\0",
            "902: \"x\"",
            "\\u0022",
            "\"}",
            "'",
            "<|im_end|>",
            "<",
            "|",
            "</s>",
            "<start_of_turn>",
            "<\u{ff5c}end",
            "\u{202e}",
        ]);
        let part = prop_oneof![odd.prop_map(str::to_owned), any::<String>()];
        proptest::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
    }
}
