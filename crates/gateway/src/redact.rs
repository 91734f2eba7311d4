//! Keys are removed from what is said: whole, in parts, and as they may be written.

use llm_batch_core::trouble;

const REDACTED: &str = "[redacted]";

/// Bytes of what a provider says that are looked at: far more than is shown.
const MOST_SAID: usize = 16 << 10;

/// A provider's words, without keys, on a line.
pub fn presentable(said: &str, key: &str) -> String {
    // On a line first: then what the cut leaves of a key, which may not be found, is too far behind to be shown.
    // Characters that are dropped later on would join the parts of a key around them.
    let said: String = said.chars().filter(|c| !trouble::is_format(*c)).collect();
    let words = said.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    let head = line.get(..line.floor_char_boundary(MOST_SAID)).unwrap_or_default();
    trouble::one_line(&redact(head, key))
}

/// A way in which a key may be written.
struct Writing {
    /// Each of its characters in all forms.
    characters: Vec<Vec<String>>,
    /// The bytes that it may begin with.
    begins: [bool; 256],
    /// So many of them are a part of a key.
    part: usize,
    /// The characters behind it belong to it too.
    goes_on: bool,
}

/// A shorter key is quoted where it stands as a whole alone.
const LONG_KEY: usize = 12;

/// The ways to write a key: as it is; in base64 by itself, or behind a name as in `Basic`; in hex.
fn writings(key: &str) -> Vec<Writing> {
    let of = |text: &str, part: usize, goes_on: bool| {
        let characters: Vec<Vec<String>> = text.chars().map(forms).collect();
        let mut begins = [false; 256];
        for byte in characters.iter().take(1).flatten().filter_map(|form| form.bytes().next()) {
            begins[usize::from(byte.to_ascii_lowercase())] = true;
            begins[usize::from(byte.to_ascii_uppercase())] = true;
        }
        Writing { characters, begins, part: if text.len() > LONG_KEY { part } else { usize::MAX }, goes_on }
    };
    let mut all = vec![of(key, 6, false)];
    // A shorter key may stand anywhere.
    let long = |text: &String| text.len() >= 8;
    all.extend((0..3).map(|before| base64(key, before)).filter(long).map(|text| of(&text, 8, true)));
    let hex: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    all.extend(Some(hex).filter(long).map(|text| of(&text, 16, true)));
    all
}

/// The characters of base64 that stand for a key where so many bytes (modulo 3) are before it.
fn base64(key: &str, before: usize) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = key.bytes().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    // Those of the first sign that are not shared with what is before.
    let first = (6 - before * 8 % 6) % 6;
    let signs = bits.get(first..).unwrap_or_default().chunks_exact(6);
    let sign = |bits: &[u8]| bits.iter().fold(0, |sum, bit| sum << 1 | usize::from(*bit));
    signs.filter_map(|bits| SIGNS.get(sign(bits))).map(|sign| char::from(*sign)).collect()
}

/// Takes a key, and what looks like a part of one, out of a text.
fn redact(text: &str, key: &str) -> String {
    let keys = if key.is_empty() { Vec::new() } else { writings(key) };
    let to_its_end =
        |rest: &str| rest.find(|c: char| c.is_whitespace() || "\"'`<>,;()".contains(c)).unwrap_or(rest.len());
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut is_in_a_word) = (text, false);
    while let Some(c) = rest.chars().next() {
        let first = usize::from(rest.bytes().next().unwrap_or_default());
        let found = keys.iter().filter(|key| key.begins[first]).find_map(|key| {
            let (found, length) = beginning(rest, &key.characters);
            let is_whole = found == key.characters.len();
            (is_whole || found >= key.part).then_some((length, !is_whole || key.goes_on))
        });
        let (mut length, goes_on) = match found {
            Some(found) => found,
            None if rest.starts_with("sk-") && !is_in_a_word => (3, true),
            None => (0, false),
        };
        if length == 0 {
            out.push(c);
            length = c.len_utf8();
            is_in_a_word = c.is_alphanumeric();
        } else {
            if goes_on {
                length += to_its_end(rest.get(length..).unwrap_or_default());
            }
            if !out.ends_with(REDACTED) {
                out.push_str(REDACTED);
            }
            is_in_a_word = false;
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    out
}

/// The forms of a key's character when it is quoted: as it is, or as JSON, URLs and HTML escape it.
fn forms(c: char) -> Vec<String> {
    let n = u32::from(c);
    let mut forms = vec![
        c.to_string(),
        format!("\\{c}"),
        format!("%{n:02x}"),
        format!("\\u{n:04x}"),
        format!("&#{n};"),
        format!("&#x{n:x};"),
    ];
    let name = match c {
        '&' => "&amp;",
        '<' => "&lt;",
        '>' => "&gt;",
        '"' => "&quot;",
        '\'' => "&apos;",
        // In URLs base64 has other signs.
        '+' => "-",
        '/' => "_",
        _ => return forms,
    };
    forms.push(name.to_owned());
    forms
}

/// Counts the characters of a key at the beginning of a text, and the bytes that they take.
fn beginning(text: &str, key: &[Vec<String>]) -> (usize, usize) {
    let is_here = |at: usize, form: &String| text.as_bytes().get(at..at + form.len()).is_some_and(|t| is_form(t, form));
    let mut found = (0, 0);
    // A key's backslash may be quoted or may quote what follows: all ways are tried.
    let (mut ends, mut longer) = (vec![0], Vec::new());
    for (n, forms) in key.iter().enumerate() {
        for at in ends.drain(..).flat_map(|at| [at, if n > 0 { behind_gap(text, at) } else { at }]) {
            longer.extend(forms.iter().filter(|form| is_here(at, form)).map(|form| at + form.len()));
        }
        longer.sort_unstable();
        longer.dedup();
        let Some(last) = longer.last() else { break };
        found = (n + 1, *last);
        std::mem::swap(&mut ends, &mut longer);
    }
    found
}

/// Most characters of white space that part a key.
const MOST_GAP: usize = 8;

/// The position at which a key goes on that is parted by white space, which may be escaped.
fn behind_gap(text: &str, mut at: usize) -> usize {
    for _ in 0..MOST_GAP {
        at += match text.as_bytes().get(at..).unwrap_or_default() {
            [b' ' | b'\t' | b'\n' | b'\r', ..] => 1,
            [b'\\', b't' | b'n' | b'r', ..] => 2,
            _ => break,
        };
    }
    at
}

/// Escapes, hex and whole messages are written in small or in capital letters.
fn is_form(bytes: &[u8], form: &str) -> bool {
    bytes.eq_ignore_ascii_case(form.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::MAX_ANSWER;

    #[test]
    fn keys_and_parts_of_them_are_redacted() {
        let key = "secret-0123456789";
        for text in [
            "key secret-0123456789 is",
            "key secret-0***6789 is",
            "key sk-abc***x is",
            "key secret-0123456789secret-0123 is",
        ] {
            assert_eq!(redact(text, key), "key [redacted] is", "{text}");
        }
        assert_eq!(redact("{\"a\":\"'secret-01234\"}", key), "{\"a\":\"'[redacted]\"}");
        assert_eq!(redact("is secret\\/0123\\/4567 wrong", "secret/0123/4567"), "is [redacted] wrong");
        // As escaped by JSON, URLs and HTML, in part or in whole.
        let key = "a/b+c\"d\\e=f0123456789";
        for text in [
            "a/b+c\"d\\e=f0123456789",
            "a\\/b+c\\\"d\\\\e=f0123456789",
            "a%2Fb%2bc%22d%5Ce%3Df0123456789",
            "a\\u002Fb+c\\u0022d\\u005ce=f0123456789",
            "a&#47;b&#x2B;c&#34;d&#92;e=f0123456789",
            "%61%2f%62+c\"d\\e=f0123456789",
            "a%2Fb%2bc%22d***",
            "a/b+c&quot;d\\e=f0123456789",
        ] {
            assert_eq!(redact(&format!("the key {text} is"), key), "the key [redacted] is", "{text}");
        }
        assert_eq!(redact("ä a/b é", key), "ä a/b é");
        assert_eq!(redact("a task-force", ""), "a task-force");
        assert_eq!(redact("short key", "key"), "short [redacted]");
        // With characters that end a part of a key elsewhere, at its beginning and further on.
        assert_eq!(redact("key \"secret*** is", "\"secret-0123456789\""), "key [redacted] is");
        assert_eq!(redact("key <a,b,c,d,e*** is", "<a,b,c,d,e,f,g,h>"), "key [redacted] is");
    }

    #[test]
    fn keys_in_base64_and_hex_and_in_parts_are_redacted() {
        let key = "secret-0123456789-abcdef";
        let hex: String = key.bytes().map(|byte| format!("{byte:02X}")).collect();
        for text in [
            "SECRET-0123456789-ABCDEF",
            "secret-0123\n456789-abcdef",
            "secret-01234\\n  56789-abcdef",
            "s e c r e t - 0 1 2 3 4 5 6 7 8 9 - a b c d e f",
            "secret-012 3456***",
            "c2VjcmV0LTAxMjM0NTY3ODktYWJjZGVm",
            "c2VjcmV0LTAxMjM0NTY3ODktYWJjZGVm==",
            "c2VjcmV0LTAxMjM0***",
            hex.as_str(),
            &hex.to_lowercase(),
        ] {
            assert_eq!(redact(&format!("the key {text} is"), key), "the key [redacted] is", "{text}");
            assert_eq!(presentable(&format!("the key {text} is"), key), "the key [redacted] is", "{text}");
        }
        // "a:", "ab:" and "abc:" before it, and something behind.
        for basic in [
            "YTpzZWNyZXQtMDEyMzQ1Njc4OS1hYmNkZWY=",
            "YWI6c2VjcmV0LTAxMjM0NTY3ODktYWJjZGVm",
            "YWJjOnNlY3JldC0wMTIzNDU2Nzg5LWFiY2RlZiE=",
        ] {
            let redacted = redact(&format!("Authorization: Basic {basic} is"), key);
            assert!(redacted.starts_with("Authorization: Basic YW") || redacted.contains("Basic YT"), "{redacted}");
            assert!(redacted.ends_with("[redacted] is") && redacted.len() < 50, "{redacted}");
        }
        assert_eq!(redact("c2Vj is no secret", key), "c2Vj is no [redacted]");
    }

    #[test]
    fn a_long_answer_is_redacted_in_one_pass() {
        let long = "sk- secret ".repeat(MAX_ANSWER / 11);
        let redacted = redact(&long, "secret-0123456789");
        assert!(!redacted.contains("sk-") && !redacted.contains("secret"));
    }
    #[test]
    fn nothing_of_a_key_is_shown_where_the_text_is_cut() {
        let key = "secret-0123456789";
        for (what, text) in [("spaces", " "), ("words", "x "), ("a word", "x"), ("keys", "secret-0123456789 ")] {
            for before in MOST_SAID - 40..MOST_SAID + 5 {
                let said = format!("{}{key} and {}", text.repeat(before / text.len()), "more ".repeat(100));
                let shown = presentable(&said, key);
                assert!(shown.chars().count() <= 301 && !shown.contains('s'), "{what}, {before}: {shown}");
                assert!(!shown.is_empty());
            }
        }
        let hidden: Vec<String> = key.chars().map(String::from).collect();
        assert_eq!(presentable(&format!("a {} b", hidden.join("\u{200b}")), key), "a [redacted] b");
        assert_eq!(presentable(&format!("HTTP status 500: {}", "[".repeat(MAX_ANSWER)), key).chars().count(), 301);
    }

    proptest::proptest! {
        #[test]
        fn no_text_gives_a_key_away(
            before in "\\PC{0,40}",
            key in "[!-~]{8,40}",
            picks in proptest::collection::vec(0_usize..8, 40),
            after in "\\PC{0,40}",
        ) {
            // Each character as somebody's quoting may write it.
            let quoted: String =
                key.chars().zip(&picks).map(|(c, pick)| forms(c).get(*pick).cloned().unwrap_or(c.to_string())).collect();
            let redacted = redact(&format!("{before}{quoted}{after}"), &key);
            proptest::prop_assert!(!redacted.contains(&key) && !redacted.contains(&quoted), "{redacted}");
            proptest::prop_assert!(redacted.contains(REDACTED));
            proptest::prop_assert_eq!(redact(&redacted, &key), redacted.clone());
            // Of a long key a part is enough.
            let (long, shown) = (format!("{key}{key}"), key.chars().take(7).collect::<String>());
            let redacted = redact(&format!("{before} {shown}*** {after}"), &long);
            proptest::prop_assert!(redacted.contains(REDACTED) && !redacted.contains(&shown), "{redacted}");
        }
    }
}
