//! JSON as it is written by models that write it nearly: with comments, a comma before a closing bracket, words of Python,
//! line ends within strings. What is inside strings stays.

/// Deepest nesting that is looked at.
const MOST_DEPTH: usize = 64;

/// The object or list with which a text begins, and its length there. It may be no JSON yet.
pub(super) fn value(text: &str) -> Option<(String, usize)> {
    let mut json = String::new();
    let mut open: Vec<char> = Vec::new();
    let mut rest = text.strip_prefix(['{', '['])?;
    open.extend(text.chars().next());
    json.extend(&open);
    while !open.is_empty() {
        let next = beyond_comments(rest);
        if next.len() < rest.len() {
            // Numbers and words on both sides are two.
            json.push(' ');
        }
        let first = next.chars().next()?;
        let len = match first {
            '"' => {
                let inside = next.get(1..)?;
                let end = end_of_string(inside)?;
                json.push_str(&string(inside.get(..end)?));
                end + 2
            }
            '}' | ']' => {
                if (open.pop() == Some('{')) != (first == '}') {
                    return None;
                }
                let end = json.trim_end().strip_suffix(',').map_or(json.len(), str::len);
                json.truncate(end);
                json.push(first);
                1
            }
            // A comment without an end.
            '/' => return None,
            c if c.is_ascii_alphabetic() => {
                let len = next.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(next.len());
                let word = next.get(..len)?;
                json.push_str(match word {
                    "True" => "true",
                    "False" => "false",
                    "None" => "null",
                    word => word,
                });
                len
            }
            c => {
                if matches!(c, '{' | '[') {
                    open.push(c);
                }
                json.push(c);
                c.len_utf8()
            }
        };
        if open.len() > MOST_DEPTH {
            return None;
        }
        rest = next.get(len..)?;
    }
    Some((json, text.len() - rest.len()))
}

/// A text from behind the spaces and comments with which it begins.
pub(super) fn beyond_comments(mut text: &str) -> &str {
    loop {
        text = text.trim_start();
        let rest = match text.strip_prefix("//") {
            Some(comment) => comment.split_once('\n'),
            None => text.strip_prefix("/*").and_then(|comment| comment.split_once("*/")),
        };
        match rest {
            Some((_, rest)) => text = rest,
            None => return text,
        }
    }
}

/// Finds the end of a string that is already open.
pub(super) fn end_of_string(inside: &str) -> Option<usize> {
    let mut is_escaped = false;
    inside.bytes().position(|b| {
        let is_end = b == b'"' && !is_escaped;
        is_escaped = b == b'\\' && !is_escaped;
        is_end
    })
}

/// A string of JSON, of an inside that may have control characters as they are, and apostrophes behind a backslash.
pub(super) fn string(inside: &str) -> String {
    let mut json = String::from("\"");
    let mut chars = inside.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('\'') => json.push('\''),
                next => json.extend(['\\'].into_iter().chain(next)),
            },
            c if c < ' ' => json.push_str(&format!("\\u{:04x}", c as u32)),
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_nearly_json_is_made_so() {
        for (text, json) in [
            (r#"["a",1,] rest"#, r#"["a",1]"#),
            ("[1, // one, \"two\"\n 2 /* three */]", "[1, 2 ]"),
            (r#"{"a":True,"b":[None,False],}"#, r#"{"a":true,"b":[null,false]}"#),
            ("[\"a\n\tb\"]", r#"["a\u000a\u0009b"]"#),
            (r#"["it\'s","\\"]"#, r#"["it's","\\"]"#),
            (r#"["True, // x ,]"]"#, r#"["True, // x ,]"]"#),
        ] {
            assert_eq!(value(text).unwrap().0, json, "{text}");
        }
        for no in ["", "\"a\"", "[1", "[1}", "{\"a", "[1 /* ", "[/]"] {
            assert_eq!(value(no), None, "{no}");
        }
        // Two numbers are not one.
        assert!(serde_json::from_str::<serde_json::Value>(&value("[1/**/2]").unwrap().0).is_err());
    }

    proptest! {
        /// What is JSON stays what it is.
        #[test]
        fn json_stays(texts in proptest::collection::vec(".{0,9}", 0..4), n: i32) {
            let all = serde_json::json!({"a": texts, "n": [n, null, true, {"b": {}}]});
            for text in [all.to_string(), serde_json::to_string_pretty(&all).unwrap()] {
                let (json, end) = value(&text).unwrap();
                prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), all.clone());
                prop_assert_eq!(end, text.len());
            }
        }

        #[test]
        fn never_panics(text in r#"[\[\]{}"/*:,\\0-9a-zN'\n ]{0,60}"#) {
            if let Some((_, end)) = value(&text) {
                prop_assert!(text.get(..end).is_some());
            }
        }
    }
}
