//! Separates what a model thinks aloud from its answer.
//!
//! Models that think put it between marks, if their server does not take it out. It is no answer: it may name every
//! row with every label. Templates open the thought in the prompt, so that only its end is in the answer.

use std::borrow::Cow;

/// Marks (in lower case) at which a thought begins.
const OPENING: [&str; 12] = [
    "<think>",
    "<thinking>",
    "<thought>",
    "<reasoning>",
    "<reflection>",
    "<seed:think>",
    "[think]",
    "\u{25c1}think\u{25b7}",
    "<|begin_of_thought|>",
    "<|start_thinking|>",
    "<|channel|>analysis",
    "<|channel|>commentary",
];
/// Marks (in lower case) at which it ends.
const CLOSING: [&str; 11] = [
    "</think>",
    "</thinking>",
    "</thought>",
    "</reasoning>",
    "</reflection>",
    "</seed:think>",
    "[/think]",
    "\u{25c1}/think\u{25b7}",
    "<|end_of_thought|>",
    "<|end_thinking|>",
    "<|channel|>final",
];
/// The start of an answer whose marks of channels a server has dropped, and not the words between them.
const BARE: (&str, &str) = ("analysis", "assistantfinal");

/// The mark that ends the head of a channel, and its greatest distance (bytes) from the channel's name.
const MESSAGE: &[u8] = b"<|message|>";
const MOST_HEAD: usize = 48;

/// A text without what is thought in it: blocks are cut out; an end without a beginning cuts what is before it, a
/// beginning without an end what is after it. A mark in a JSON string is text.
pub fn spoken(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let is_bare = text.trim_start().starts_with(BARE.0) && text.contains(BARE.1);
    let mut kept: Vec<&str> = Vec::new();
    // The start of the spoken part; `None` while the model thinks.
    let mut from = (!is_bare).then_some(0);
    let mut before = b' ';
    let mut at = 0;
    let mut is_whole = !is_bare;
    while let Some(&byte) = bytes.get(at) {
        let mut step = 1;
        match byte {
            b'"' if matches!(before, b'{' | b'[' | b',' | b':') => step = json_string(bytes, at).unwrap_or(1),
            b'<' | b'[' | 0xe2 | b'a' => {
                if let Some(length) = mark(bytes, at, &OPENING) {
                    if let Some(from) = from.take() {
                        kept.extend(text.get(from..at).filter(|part| !part.is_empty()));
                    }
                    (step, is_whole) = (length, false);
                } else if let Some(length) =
                    mark(bytes, at, &CLOSING).or_else(|| mark(bytes, at, &[BARE.1]).filter(|_| is_bare))
                {
                    if from.is_some() {
                        kept.clear();
                    }
                    // A channel's name may be followed by more, up to its own mark.
                    let head = bytes.get(at + length..bytes.len().min(at + length + MOST_HEAD)).unwrap_or_default();
                    let more = head.windows(MESSAGE.len()).position(|w| w == MESSAGE).filter(|_| byte == b'<');
                    step = length + more.map_or(0, |n| n + MESSAGE.len());
                    from = Some(at + step);
                    is_whole = false;
                }
            }
            _ => {}
        }
        if !byte.is_ascii_whitespace() {
            before = byte;
        }
        at += step;
    }
    if is_whole {
        return Cow::Borrowed(text);
    }
    kept.extend(from.and_then(|from| text.get(from..)).filter(|part| !part.is_empty()));
    Cow::Owned(kept.join("\n"))
}

/// The length of one of these marks that is here.
fn mark(bytes: &[u8], at: usize, marks: &[&str]) -> Option<usize> {
    let is_here = |m: &&&str| bytes.get(at..at + m.len()).is_some_and(|b| b.eq_ignore_ascii_case(m.as_bytes()));
    marks.iter().find(is_here).map(|m| m.len())
}

/// The length of the JSON string that begins here. A quote that is not followed by what follows a string in JSON ends
/// none.
fn json_string(bytes: &[u8], at: usize) -> Option<usize> {
    let mut end = at + 1;
    loop {
        match bytes.get(end)? {
            b'\\' => end += 2,
            b'"' => break,
            b'\n' => return None,
            _ => end += 1,
        }
    }
    let after = bytes.get(end + 1..)?.iter().find(|b| !b.is_ascii_whitespace())?;
    matches!(after, b',' | b':' | b'}' | b']').then_some(end + 1 - at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_thought_is_cut_off() {
        for (text, want) in [
            ("{\"417\":\"bug\"}", "{\"417\":\"bug\"}"),
            ("<think>{\"417\":\"bug\"}</think>A", "A"),
            ("<Thinking>a</thinking>\nA", "\nA"),
            ("[THINK]a[/THINK]A", "A"),
            ("a</think>A", "A"),
            ("a <think> b</think> c</think>A", "A"),
            ("<think>a</think>A<think>b</think>B", "A\nB"),
            ("<think>a", ""),
            ("A<think>a", "A"),
            (
                "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>A",
                "A",
            ),
            ("<|channel|>analysis<|message|>a", ""),
            ("analysisWe see.assistantfinal{}", "{}"),
            ("analysis of it: {}", "analysis of it: {}"),
            // In a JSON string it is text; between quotes of a thought it is not.
            (
                "{\"417\":\"bug\",\"a\": \"x</think>y\" , \"b\":\"<think>\"}",
                "{\"417\":\"bug\",\"a\": \"x</think>y\" , \"b\":\"<think>\"}",
            ),
            ("<think>like {\"417\": \"x</think>{\"417\":\"bug\"}", "{\"417\":\"bug\"}"),
            ("<think>{\"417\":\"</think>\"} a", ""),
        ] {
            assert_eq!(spoken(text), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(
            parts in proptest::collection::vec(
                prop::sample::select(vec!["<think>", "</think>", "\"", "{", ":", ",", "}", "\\", "\n", "ä", "a", "[", "\u{25c1}"]), 0..40)
        ) {
            let text = parts.concat();
            prop_assert!(spoken(&text).len() <= text.len() + 40);
        }
    }
}
