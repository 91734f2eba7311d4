//! The provider's own words: its message without the parts that quote the request.
//!
//! Many quote the text that they refuse, and a text may say anything. Letters and digits alone are compared, since quotes
//! are escaped in many ways.

use std::collections::HashSet;

use serde::de::IgnoredAny;
use serde_json::Deserializer;

/// Letters and digits in a row that stand in a text too, from which on they are quoted from it.
const RUN: usize = 12;
/// A shorter text is quoted where it stands as a whole, if it has at least so many.
const SHORTEST: usize = 3;
/// Bytes of a message that are looked at.
const MOST_MESSAGE: usize = 16 << 10;
/// Longest name of a character in HTML.
const MOST_NAME: usize = 8;

/// A letter or digit, in lower case, and where it stands.
#[derive(Clone, Copy)]
struct Mark {
    byte: u8,
    start: usize,
    end: usize,
}

/// The letters and digits of a text, without those of escapes (of JSON, Python, HTML and URLs).
fn marks(text: &str) -> impl Iterator<Item = Mark> {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let start = at;
            let byte = *bytes.get(at)?;
            at += 1;
            let hex = |from: usize, n: usize| {
                let digits = text.get(from..from + n)?;
                u32::from_str_radix(digits, 16).ok().map(|code| (code, from + n))
            };
            let (code, end) = match byte {
                b'\\' => {
                    while bytes.get(at) == Some(&b'\\') {
                        at += 1;
                    }
                    match bytes.get(at) {
                        Some(b'u') => hex(at + 1, 4).unwrap_or((0, at + 1)),
                        Some(b'x') => hex(at + 1, 2).unwrap_or((0, at + 1)),
                        Some(b'n' | b'r' | b't' | b'b' | b'f' | b'v') => (0, at + 1),
                        _ => (0, at),
                    }
                }
                b'%' => hex(at, 2).unwrap_or((0, at)),
                b'&' => {
                    let name = bytes.get(at..bytes.len().min(at + MOST_NAME)).unwrap_or_default();
                    let end = name.iter().position(|b| !b.is_ascii_alphanumeric() && *b != b'#');
                    (0, end.filter(|n| name.get(*n) == Some(&b';')).map_or(at, |n| at + n + 1))
                }
                _ => (byte.into(), at),
            };
            at = end;
            if let Some(byte) = u8::try_from(code).ok().filter(u8::is_ascii_alphanumeric) {
                return Some(Mark { byte: byte.to_ascii_lowercase(), start, end });
            }
        }
    })
}

/// The runs of a message, by what they are.
struct Runs {
    /// Each with the number of its first letter, in order.
    all: Vec<(u128, usize)>,
    /// A bit for each that may be among them: most are found not to be by it.
    bits: Vec<u64>,
}

/// A run with one letter more, and without its first one if it is full.
fn longer(run: u128, byte: u8) -> u128 {
    (run << 8 | u128::from(byte)) & ((1 << (8 * RUN)) - 1)
}

/// The place of a run's bit.
fn bit(run: u128) -> (usize, u64) {
    let mixed = ((run as u64) ^ ((run >> 40) as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 46;
    (mixed as usize / 64, 1 << (mixed % 64))
}

impl Runs {
    fn of(message: &[Mark]) -> Self {
        let (mut all, mut bits, mut run) = (Vec::new(), vec![0; (1 << 18) / 64], 0);
        for (n, mark) in message.iter().enumerate() {
            run = longer(run, mark.byte);
            if n + 1 >= RUN {
                all.push((run, n + 1 - RUN));
                let (word, mask) = bit(run);
                if let Some(word) = bits.get_mut(word) {
                    *word |= mask;
                }
            }
        }
        all.sort_unstable();
        Self { all, bits }
    }

    /// Returns true if a run may stand somewhere.
    fn has(&self, run: u128) -> bool {
        let (word, mask) = bit(run);
        self.bits.get(word).is_some_and(|word| word & mask != 0)
    }

    /// The numbers of the first letters of a run, wherever it stands.
    fn find(&self, run: u128) -> impl Iterator<Item = usize> {
        let first = if self.has(run) { self.all.partition_point(|(other, _)| *other < run) } else { self.all.len() };
        let rest = self.all.get(first..).unwrap_or_default();
        rest.iter().take_while(move |(other, _)| *other == run).map(|(_, at)| *at)
    }
}

/// The beginning of a message, with blanks for what stands in these texts of the request: its messages, whose lines may be
/// rows.
pub fn own_words(message: &str, texts: &[String]) -> String {
    let message = message.get(..message.floor_char_boundary(MOST_MESSAGE)).unwrap_or_default();
    let letters: Vec<Mark> = marks(message).collect();
    let runs = Runs::of(&letters);
    let mut is_quoted = vec![false; message.len()];
    let mut blank = |first: usize, length: usize| {
        let (Some(first), Some(last)) = (letters.get(first), letters.get(first + length - 1)) else { return };
        if let Some(part) = is_quoted.get_mut(first.start..last.end) {
            part.fill(true);
        }
    };
    // A run that was blanked is not looked for again: a text may repeat one run without end.
    let (mut runs_seen, mut words_seen) = (HashSet::new(), HashSet::new());
    for line in texts.iter().flat_map(|text| text.lines()) {
        // The number of a row is no part of its text.
        let row = line.split_once(": ").filter(|(n, _)| n.bytes().all(|b| b.is_ascii_digit()));
        let line = row.map_or(line, |(_, row)| text_of(row));
        let (mut run, mut length) = (0, 0);
        for mark in marks(line) {
            (run, length) = (longer(run, mark.byte), length + 1);
            if length >= RUN && runs.has(run) && runs_seen.insert(run) {
                runs.find(run).for_each(|at| blank(at, RUN));
            }
        }
        if (SHORTEST..RUN).contains(&length) {
            let word: Vec<u8> = marks(line).map(|mark| mark.byte).collect();
            if words_seen.insert(word.clone()) {
                whole(message, &letters, &word).for_each(|at| blank(at, length));
            }
        }
    }
    message.char_indices().map(|(at, c)| if is_quoted.get(at) == Some(&true) { ' ' } else { c }).collect()
}

/// The text of a row, without what stands behind it where it is asked again.
fn text_of(row: &str) -> &str {
    let mut values = Deserializer::from_str(row).into_iter::<IgnoredAny>();
    let is_text = matches!(values.next(), Some(Ok(_)));
    row.get(..values.byte_offset()).filter(|_| is_text).unwrap_or(row)
}

/// The places where these letters stand as a word or words.
fn whole<'a>(message: &'a str, letters: &'a [Mark], word: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let is_border = |before: Option<&Mark>, after: Option<&Mark>| match before.zip(after) {
        Some((before, after)) => !matches!(message.get(before.end..after.start), Some("" | "_")),
        None => true,
    };
    letters.windows(word.len()).enumerate().filter_map(move |(at, here)| {
        let is_here = here.iter().map(|mark| mark.byte).eq(word.iter().copied());
        let before = at.checked_sub(1).and_then(|n| letters.get(n));
        (is_here && is_border(before, here.first()) && is_border(here.last(), letters.get(at + word.len())))
            .then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_quoted_is_blanked_however_it_is_escaped() {
        let texts = |text: &str| vec![format!("417: {}\n902: \"rpd\"\n", crate::prompt::quote(text))];
        let text = "a \"b\"\n<max_tokens at most 16>\\ \u{e4} insufficient_quota & json_schema";
        let once = serde_json::to_string(text).unwrap();
        for quoted in [
            text.to_owned(),
            once.clone(),
            serde_json::to_string(&once).unwrap(),
            text.replace('<', "&lt;").replace('"', "&quot;").replace('&', "&amp;"),
            text.replace('<', "%3C").replace('\n', "%0a"),
            text.replace('\n', "\\n").replace('\u{e4}', "\\u00e4").replace('<', "\\u003C"),
            text.to_uppercase(),
        ] {
            let words = own_words(&format!("Invalid input: {quoted} (max_tokens 32)"), &texts(text)).to_lowercase();
            assert!(!["quota", "schema", "most"].iter().any(|word| words.contains(word)), "{words}");
            assert!(words.contains("invalid input") && words.contains("(max_tokens 32)"), "{words}");
        }
        let words = own_words("per day (RPD): Limit 5. No rpd_x, xrpd.", &texts("max"));
        assert_eq!(words, "per day (   ): Limit 5. No rpd_x, xrpd.");
        assert_eq!(own_words("max_tokens at most 16", &texts("max")), "max_tokens at most 16");
        // The hint behind a text that is asked again is not part of the text.
        let again = |text: &str| vec![crate::prompt::row(417, &crate::prompt::quote(text), Some("one of the labels"))];
        assert_eq!(own_words("no rpd here", &again("rpd")), "no     here");
        let text = "a\" (asked again: insufficient_quota";
        assert!(!own_words(&format!("bad: {text}"), &again(text)).contains("quota"));
    }

    proptest! {
        #[test]
        fn of_a_quoted_text_nothing_is_left(before in "\\PC{0,40}", text in "[ -~\n]{1,80}", after in "\\PC{0,40}") {
            let texts = [crate::prompt::row(417, &crate::prompt::quote(&text), None)];
            let said = format!("{before} \u{2014} {text} \u{2014} {after}");
            let words = own_words(&said, &texts);
            prop_assert_eq!(words.chars().count(), said.chars().count());
            let key = "insufficient_quota";
            let poison = format!("{text} {key} {text}");
            let texts = [crate::prompt::row(417, &crate::prompt::quote(&poison), None)];
            let said = format!("input \u{2014} {poison}");
            prop_assert!(!own_words(&said, &texts).contains(key));
        }
    }
}
