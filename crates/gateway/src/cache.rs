//! Answers that were paid for, for later rows of the same text.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use llm_batch_core::task::Answer;

/// Bytes of an entry, with what the table around it takes.
const ENTRY: usize = 76;

/// Identifies a text under the settings it is asked with. 128 bits of hashes whose keys nobody knows: a collision is as
/// likely as a broken disk, and cannot be brought about.
pub type TextKey = u128;

/// Makes keys of texts.
#[derive(Debug, Default)]
pub struct Keys(RandomState, RandomState);

impl Keys {
    /// `scope` is the key of what the text is asked with, see `Group::scope`.
    pub fn of(&self, scope: TextKey, text: &str) -> TextKey {
        let half = |state: &RandomState| u128::from(state.hash_one((scope, text)));
        half(&self.0) << 64 | half(&self.1)
    }
}

/// An answer, and its probability if the provider gave one.
pub type Known = (Answer, Option<f64>);

/// Answers by text, the most recent ones: when the young half is full, the old half is forgotten.
#[derive(Debug, Default)]
pub struct Cache {
    young: Half,
    old: Half,
}

/// Answers and the bytes that they take.
#[derive(Debug, Default)]
struct Half {
    answers: HashMap<TextKey, Known>,
    bytes: usize,
}

/// An answer of more than this part of a half is not kept: it would drive out too many others.
const LARGEST_PART: usize = 64;

fn bytes_of((answer, _): &Known) -> usize {
    let text = |value: &Option<String>| value.as_ref().map_or(0, String::len) + size_of::<Option<String>>();
    ENTRY + answer.0.iter().map(text).sum::<usize>()
}

impl Half {
    fn put(&mut self, key: TextKey, answer: Known) {
        self.bytes += bytes_of(&answer);
        self.bytes -= self.answers.insert(key, answer).map_or(0, |old| bytes_of(&old));
    }
}

impl Cache {
    pub fn get(&mut self, key: TextKey, bytes: usize) -> Option<Known> {
        if let Some(answer) = self.young.answers.get(&key) {
            return Some(answer.clone());
        }
        let answer = self.old.answers.remove(&key)?;
        self.old.bytes -= bytes_of(&answer);
        self.put(key, answer.clone(), bytes);
        Some(answer)
    }

    /// Keeps an answer; `bytes` is what the whole cache may take.
    pub fn put(&mut self, key: TextKey, answer: Known, bytes: usize) {
        let half = bytes / 2;
        let size = bytes_of(&answer);
        // The cache may have become smaller.
        if self.young.bytes > half {
            self.old = std::mem::take(&mut self.young);
        }
        if half < ENTRY {
            self.old = Half::default();
        }
        if size > half || size > (ENTRY * 2).max(half / LARGEST_PART) {
            return;
        }
        if self.young.bytes + size > half {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.put(key, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Known {
        (Answer(vec![Some(text.to_owned())]), Some(0.5))
    }

    #[test]
    fn the_most_recent_answers_are_kept_within_their_bytes() {
        let mut c = Cache::default();
        let bytes = 20 * bytes_of(&answer("10"));
        for key in 0..100u128 {
            c.put(key, answer(&key.to_string()), bytes);
            assert!(c.young.bytes + c.old.bytes <= bytes);
            let sum = |half: &Half| half.answers.values().map(bytes_of).sum::<usize>();
            assert_eq!((sum(&c.young), sum(&c.old)), (c.young.bytes, c.old.bytes));
            // One that is used stays.
            assert_eq!(c.get(0, bytes), Some(answer("0")));
        }
        assert_eq!(c.get(99, bytes), Some(answer("99")));
        assert_eq!(c.get(50, bytes), None);
        c.put(1, answer("1"), 0);
        assert_eq!((c.get(1, 0), c.get(99, 0)), (None, None));
        // One that would drive out many others is not kept.
        c.put(2, answer("2"), 100_000);
        c.put(3, answer(&"x".repeat(1_000)), 100_000);
        assert_eq!((c.get(2, 100_000), c.get(3, 100_000)), (Some(answer("2")), None));
    }

    #[test]
    fn an_answer_that_is_not_kept_drives_out_none() {
        let (mut c, bytes) = (Cache::default(), 20 * bytes_of(&answer("10")));
        (0..10u128).for_each(|key| c.put(key, answer("10"), bytes));
        c.put(90, answer(&"x".repeat(bytes)), bytes);
        c.put(91, answer(&"x".repeat(bytes / 4)), bytes);
        assert!((0..10).all(|key| c.get(key, bytes).is_some()));
        assert_eq!((c.get(90, bytes), c.get(91, bytes)), (None, None));
    }

    #[test]
    fn keys_differ_by_scope_and_text() {
        let k = Keys::default();
        assert_eq!(k.of(1, "b"), k.of(1, "b"));
        assert_ne!(k.of(1, "b"), k.of(2, "b"));
        assert_ne!(k.of(1, "b"), k.of(1, "c"));
    }
}
