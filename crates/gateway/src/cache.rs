//! Answers that were paid for, for later rows of the same text.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// Bytes of an entry, with what the table around it takes.
const ENTRY: usize = 60;

/// What stands for a text under the settings it is asked with. 128 bits of hashes whose keys nobody knows: that two
/// texts share one is as likely as a broken disk, and cannot be brought about.
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

/// Labels by text, the most recent ones: when the young half is full, the old half is forgotten.
#[derive(Debug, Default)]
pub struct Cache {
    young: HashMap<TextKey, u32>,
    old: HashMap<TextKey, u32>,
}

impl Cache {
    pub fn get(&mut self, key: TextKey, bytes: usize) -> Option<u32> {
        if let Some(label) = self.young.get(&key) {
            return Some(*label);
        }
        let label = self.old.remove(&key)?;
        self.put(key, label, bytes);
        Some(label)
    }

    /// Keeps a label; `bytes` is what the whole cache may take.
    pub fn put(&mut self, key: TextKey, label: u32, bytes: usize) {
        let half = bytes / ENTRY / 2;
        if self.young.len() >= half {
            self.old = std::mem::take(&mut self.young);
        }
        if half > 0 {
            self.young.insert(key, label);
        } else {
            self.old = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_recent_answers_are_kept_within_its_bytes() {
        let mut c = Cache::default();
        let bytes = 20 * ENTRY;
        for key in 0..100 {
            c.put(key, key as u32, bytes);
            assert!(c.young.len() + c.old.len() <= 20);
            // One that is used stays.
            assert_eq!(c.get(0, bytes), Some(0));
        }
        assert_eq!(c.get(99, bytes), Some(99));
        assert_eq!(c.get(50, bytes), None);
        c.put(1, 1, 0);
        assert_eq!((c.get(1, 0), c.get(99, 0)), (None, None));
    }

    #[test]
    fn keys_differ_by_scope_and_text() {
        let k = Keys::default();
        assert_eq!(k.of(1, "b"), k.of(1, "b"));
        assert_ne!(k.of(1, "b"), k.of(2, "b"));
        assert_ne!(k.of(1, "b"), k.of(1, "c"));
    }
}
