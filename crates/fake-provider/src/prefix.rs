//! Prompt caching, as far as bills show it.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// Shorter system messages are not cached, in tokens.
const LEAST_TOKENS: u64 = 1_024;
/// Tokens are cached in steps of this.
const STEP: u64 = 128;
/// Most prefixes that are remembered; then all are forgotten.
const MOST: usize = 10_000;

/// The system messages seen.
#[derive(Default)]
pub(crate) struct Prefixes {
    state: RandomState,
    /// By hash: that two collide is less likely than any other error.
    seen: HashSet<u64>,
}

impl Prefixes {
    /// Tokens of this system message that are cached, since it was seen before, and
    /// of those that are written into the cache now.
    pub(crate) fn cached(&mut self, system: &str, tokens: u64) -> [u64; 2] {
        if tokens < LEAST_TOKENS {
            return [0; 2];
        }
        if self.seen.len() == MOST {
            self.seen.clear();
        }
        let is_new = self.seen.insert(self.state.hash_one(system));
        let tokens = tokens / STEP * STEP;
        if is_new { [0, tokens] } else { [tokens, 0] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_time_and_long_ones_only() {
        let mut prefixes = Prefixes::default();
        assert_eq!([1, 2, 3].map(|_| prefixes.cached("a", 1_300)), [[0, 1_280], [1_280, 0], [1_280, 0]]);
        assert_eq!([1, 2].map(|_| prefixes.cached("b", 1_024)), [[0, 1_024], [1_024, 0]]);
        assert_eq!([1, 2].map(|_| prefixes.cached("c", 1_023)), [[0, 0], [0, 0]]);
        for other in 0..MOST {
            prefixes.cached(&format!("{other}"), 1_024);
        }
        assert!(prefixes.seen.len() <= MOST);
    }
}
