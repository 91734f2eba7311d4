//! Counting tokens, by the o200k vocabulary.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// Most counts that are remembered; then all are forgotten.
const MOST_COUNTS: usize = 1_000;

/// Remembers the counts of texts that come with every request: instructions,
/// schemas.
#[derive(Default)]
pub(crate) struct Counts {
    state: RandomState,
    /// By hash: that two collide is less likely than any other error.
    counts: HashMap<u64, u64>,
}

impl Counts {
    /// Tokens of a text that is likely to come again.
    pub(crate) fn tokens(&mut self, text: &str) -> u64 {
        if self.counts.len() == MOST_COUNTS {
            self.counts.clear();
        }
        *self.counts.entry(self.state.hash_one(text)).or_insert_with(|| tokens(text))
    }
}

/// Tokens of a text.
pub(crate) fn tokens(text: &str) -> u64 {
    bpe_openai::o200k_base().count(text) as u64
}

/// The first `count` tokens of a text. Where they end within a character, the
/// part of that character is left out.
pub(crate) fn first_tokens(text: &str, count: u64) -> String {
    let tokenizer = bpe_openai::o200k_base();
    let tokens = tokenizer.encode(text);
    (0..=tokens.len().min(count as usize)).rev().find_map(|end| tokenizer.decode(&tokens[..end])).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_right_and_not_too_much() {
        let mut counts = Counts::default();
        for _ in 0..2 {
            for text in ["", "a", "Sort them, please.", "a\u{e9}\u{4f60}"] {
                assert_eq!(counts.tokens(text), tokens(text), "{text}");
            }
        }
        for number in 0..2 * MOST_COUNTS {
            counts.tokens(&number.to_string());
        }
        assert!(counts.counts.len() <= MOST_COUNTS);
    }
}
