//! Counting tokens with OpenAI's o200k vocabulary. Other models' tokenizers differ; the measured ratio corrects that.
//!
//! The tables are read in place, out of the library's file: they take no memory of the process' own, and there is
//! nothing to load.

mod hash;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::LazyLock;

use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};

/// All tokens, one after the other, in the order in which they are merged.
static BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/o200k.bytes"));
/// The start of each token; four bytes each, as in the next one.
static STARTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/o200k.starts"));
/// One more than the number of the token that has this place; 0: nobody has it.
static PLACES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/o200k.places"));

/// Longer pieces of text are counted in parts: there are hardly any, and the work on a piece grows a little faster than
/// its length.
const MOST_PIECE: usize = 4096;

/// The pieces of text of o200k. The last character of a match of the second pattern belongs to the next piece: the
/// pattern stands for a negative look-ahead.
static PIECES: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let words = [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+$",
    ]
    .join("|");
    Regex::new_many(&[&words, r"\s+\s", r"\s+"]).ok()
});
const LOOKS_AHEAD: usize = 1;

fn number(table: &[u8], i: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*table.get(i * 4..)?.first_chunk()?))
}

/// The number of a token: those with smaller ones are merged first.
fn token(bytes: &[u8]) -> Option<u32> {
    for place in hash::places(bytes) {
        let id = number(PLACES, place)?.checked_sub(1)?;
        let (start, end) = (number(STARTS, id as usize)?, number(STARTS, id as usize + 1)?);
        if BYTES.get(start as usize..end as usize) == Some(bytes) {
            return Some(id);
        }
    }
    None
}

/// Tokens of a piece: of the pairs of neighbours that are a token together, the one that comes first in the vocabulary is
/// merged, until none is.
fn merged(piece: &[u8]) -> usize {
    if token(piece).is_some() {
        return 1;
    }
    // By where they begin: where each token ends, and where the one before begins.
    let n = piece.len();
    let mut ends: Vec<usize> = (1..=n).collect();
    let mut before: Vec<usize> = (0..n).map(|i| i.saturating_sub(1)).collect();
    let mut pairs = BinaryHeap::new();
    let pair = |pairs: &mut BinaryHeap<_>, start: usize, end: usize| {
        if let Some(id) = piece.get(start..end).and_then(token) {
            pairs.push(Reverse((id, start, end)));
        }
    };
    for i in 2..=n {
        pair(&mut pairs, i - 2, i);
    }
    let mut count = n;
    while let Some(Reverse((_, start, end))) = pairs.pop() {
        // A part that was merged otherwise meanwhile is no longer this pair: a part ends where the next one begins.
        let Some(middle) = ends.get(start).copied() else { continue };
        if ends.get(middle) != Some(&end) {
            continue;
        }
        count -= 1;
        if let Some(first) = ends.get_mut(start) {
            *first = end;
        }
        if let Some(second) = ends.get_mut(middle) {
            // Nothing begins here any more.
            *second = usize::MAX;
        }
        if let Some(left) = before.get(start).copied().filter(|left| *left < start) {
            pair(&mut pairs, left, end);
        }
        if let Some(right_end) = ends.get(end).copied() {
            if let Some(b) = before.get_mut(end) {
                *b = start;
            }
            pair(&mut pairs, start, right_end);
        }
    }
    count
}

/// The end of the first piece, if it is what most are: a word of small letters, with what stands before it. The text
/// behind it decides whether the word goes on; if it may, the pattern decides.
fn word(text: &[u8]) -> Option<usize> {
    let before = usize::from(text.first().is_some_and(|c| c.is_ascii_punctuation() || *c == b' '));
    let letters = text.get(before..)?.iter().take_while(|c| c.is_ascii_lowercase()).count();
    let end = before + letters;
    let goes_on = text.get(end).is_some_and(|c| !c.is_ascii() || *c == b'\'');
    (letters > 0 && !goes_on).then_some(end)
}

/// Tokens of a text.
pub fn count(text: &str) -> usize {
    // A character a token, should the pattern ever not be understood.
    let Some(pieces) = PIECES.as_ref() else { return text.chars().count() };
    #[cfg(test)]
    tests::COUNTED.set(tests::COUNTED.get() + text.len());
    let (mut rest, mut count) = (text, 0);
    let find = |rest: &str| {
        let found = pieces.find(Input::new(rest).anchored(Anchored::Yes))?;
        let is_less = found.pattern().as_usize() == LOOKS_AHEAD;
        Some(if is_less { rest.floor_char_boundary(found.end() - 1) } else { found.end() })
    };
    while let Some(end) = word(rest.as_bytes()).or_else(|| find(rest)) {
        let (piece, after) = rest.split_at(end);
        count += piece.as_bytes().chunks(MOST_PIECE).map(merged).sum::<usize>();
        rest = after;
    }
    count
}

/// Bytes of a text that are counted at a time.
const PART: usize = 4096;

/// The longest beginning of `text` whose JSON string has at most `most` tokens. Each byte is counted twice, and those where
/// it ends some more times.
pub fn beginning(text: &str, most: usize) -> &str {
    let quoted = |text: &str| count(&llm_batch_core::prompt::quote(text));
    // A token is at least one byte; so what is looked at is bounded, whatever the text.
    let text = text.get(..text.floor_char_boundary(most.saturating_mul(32))).unwrap_or_default();
    // The whole parts that fit.
    let (mut end, mut tokens) = (0, 0);
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
    let mut high = loop {
        let next = text.floor_char_boundary(end + PART);
        let more = quoted(part(end, next)).saturating_sub(if end > 0 { 2 } else { 0 });
        if next == end || tokens + more > most {
            break next;
        }
        (end, tokens) = (next, tokens + more);
    };
    // And of the next part.
    let mut low = end;
    while low < high {
        let middle = text.ceil_char_boundary(low + (high - low).div_ceil(2));
        if tokens + quoted(part(end, middle)).saturating_sub(if end > 0 { 2 } else { 0 }) <= most {
            low = middle;
        } else {
            high = text.floor_char_boundary(middle - 1);
        }
    }
    // A token more is possible where parts meet.
    while low > PART && quoted(part(0, low)) > most {
        low = text.floor_char_boundary(low - low / 64);
    }
    part(0, low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    thread_local! {
        /// Bytes that this thread has counted.
        pub(super) static COUNTED: Cell<usize> = const { Cell::new(0) };
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// As the crate does that the tables are from, which holds itself against OpenAI's own.
        #[test]
        fn counts_are_those_of_o200k(any in "\\PC{0,80}", near in "[a-zA-ZäÉßñ日本語한 \n\r\t.,'0-9{}\":/-]{0,120}", again in 1usize..60) {
            let o200k = bpe_openai::o200k_base();
            for text in [&any, &near, &any.repeat(again), &near.repeat(again)] {
                // The pieces of these stay below the length from which on they are counted in parts.
                if o200k.split(text).all(|piece| piece.len() <= MOST_PIECE) {
                    prop_assert_eq!(count(text), o200k.count(text.as_str()), "{:?}", text);
                }
            }
        }
    }

    #[test]
    fn every_token_counts_as_one_and_long_pieces_are_bounded() {
        let bpe = &bpe_openai::o200k_base().bpe;
        for id in 0..bpe.num_tokens() as u32 {
            assert_eq!(token(bpe.token_bytes(id)), Some(id));
        }
        let long = "ab".repeat(500_000);
        let exact = bpe_openai::o200k_base().count(long.as_str());
        assert!((exact..exact + exact / 50).contains(&count(&long)), "{} {exact}", count(&long));
    }

    #[test]
    fn ids_are_one_token_each_way() {
        for id in 100..1000 {
            assert_eq!(count(&id.to_string()), 1);
        }
    }

    #[test]
    fn a_long_beginning_is_found_in_a_few_passes() {
        for word in ["word and ", "\"\n", "  ", "\u{e4}\u{df}", "<|x|>", "qzxjkvw"] {
            let text = word.repeat((1 << 20) / word.len());
            for most in [1_000, 12_000] {
                COUNTED.set(0);
                let b = beginning(&text, most);
                let counted = COUNTED.get();
                let quoted = llm_batch_core::prompt::quote(b);
                assert!(counted < 3 * quoted.len() + (128 << 10), "{word}: {counted} bytes for {}", quoted.len());
                let tokens = count(&quoted);
                assert!(tokens <= most, "{word}: {tokens} of {most}");
                assert!(tokens * 20 > most * 19 || b.len() >= most * 32 - 4, "{word}: {tokens} of {most}");
            }
        }
    }

    #[test]
    fn a_beginning_is_as_long_as_fits() {
        for text in ["größer und größer, 日本語 and more of it", "\n\n\n\"\"\"", ""] {
            for most in 2..20 {
                let b = beginning(text, most);
                let size = |t: &str| count(&llm_batch_core::prompt::quote(t));
                assert!(size(b) <= most, "{b}");
                if let Some(c) = text[b.len()..].chars().next() {
                    // Not longer by a character; token counts need not rise evenly, so allow a little.
                    assert!(size(&format!("{b}{c}")) + 2 > most, "{b}");
                }
            }
        }
    }
}
