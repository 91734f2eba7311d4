//! Limits as a provider's answers state them, and which of them hold.
//!
//! Only an answer that was served says what the limits are: what a refusal claims may be anything. Even so, what was let
//! through just now can't be above the limit; and what is not said again fades.

use super::window::Window;
use super::{Amounts, Caps, KINDS, Limits, MINUTE, Tokens, amounts};

/// A provider may let through what was saved up: that often the limit within a minute.
const SAVED_UP: u64 = 2;

/// The limits that hold, of those that a provider states.
#[derive(Debug)]
pub struct Stated {
    limits: Caps,
    /// When (ms) each was last said.
    said: Amounts,
    /// The amounts served within the last minute.
    served: Window,
}

impl Stated {
    /// As an earlier gateway knew it. It is `now` (ms).
    pub fn new(limits: Limits, now: u64) -> Self {
        Self { limits: limits.caps(), said: [now; KINDS], served: Window::new(MINUTE, 0) }
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        let [
            requests_per_minute,
            tokens_per_minute,
            input_tokens_per_minute,
            output_tokens_per_minute,
            inputs_per_minute,
        ] = self.limits;
        Limits {
            requests_per_minute,
            tokens_per_minute,
            input_tokens_per_minute,
            output_tokens_per_minute,
            inputs_per_minute,
        }
    }

    /// A request was served at `now` (ms) that took so much, and its answer says that these are the limits. One of 0 says
    /// that there is none of this kind.
    pub fn serves(&mut self, now: u64, took: Tokens, say: Limits) {
        let took = amounts(took.into());
        self.served.forget(now);
        self.served.add(Window::slot(now), took);
        let each = self.limits.iter_mut().zip(&mut self.said).zip(say.caps()).zip(took).zip(self.served.sum);
        for ((((limit, said), says), took), sum) in each {
            let can_be = |n: &u64| *n > 0 && *n >= took && n.saturating_mul(SAVED_UP) >= sum;
            if let Some(n) = says.filter(can_be) {
                (*limit, *said) = (Some(n), now);
            } else if now >= *said + MINUTE || !limit.as_ref().is_some_and(can_be) {
                *limit = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(n: impl Into<Option<u64>>) -> Limits {
        Limits { tokens_per_minute: n.into(), ..Limits::default() }
    }

    fn requests(n: impl Into<Option<u64>>) -> Limits {
        Limits { requests_per_minute: n.into(), ..Limits::default() }
    }

    const SMALL: Tokens = Tokens { input: 90, output: 10 };

    #[test]
    fn what_is_said_holds_until_it_is_not_said_for_a_minute() {
        let mut h = Stated::new(Limits::default(), 0);
        h.serves(0, SMALL, tokens(6_000));
        assert_eq!(h.limits(), tokens(6_000));
        h.serves(59_999, SMALL, tokens(None));
        h.serves(59_999, SMALL, tokens(0));
        assert_eq!(h.limits(), tokens(6_000));
        h.serves(60_000, SMALL, tokens(None));
        assert_eq!(h.limits(), tokens(None));
        // Whatever is said last: it may rise and fall.
        for n in [6_000, 600_000, 3_000] {
            h.serves(60_000, SMALL, tokens(n));
            assert_eq!(h.limits(), tokens(n));
        }
    }

    #[test]
    fn what_was_served_shows_what_no_limit_can_be() {
        let mut h = Stated::new(Limits::default(), 0);
        h.serves(0, SMALL, tokens(99));
        assert_eq!(h.limits(), tokens(None));
        h.serves(0, SMALL, tokens(100));
        assert_eq!(h.limits(), tokens(100));
        // More than it was served at once.
        h.serves(0, Tokens { input: 101, output: 0 }, tokens(None));
        assert_eq!(h.limits(), tokens(None));
        // A provider that says absurd things says nothing of the one that was said before.
        let mut h = Stated::new(Limits::default(), 0);
        h.serves(0, SMALL, requests(60));
        h.serves(1, SMALL, requests(1));
        assert_eq!(h.limits(), requests(1), "two may have been saved up");
        h.serves(2, SMALL, requests(60));
        h.serves(3, SMALL, requests(1));
        assert_eq!(h.limits(), requests(60));
    }

    proptest! {
        /// Whatever is said, the limits that hold let through at least what was served at once, and half of what was in a minute.
        #[test]
        fn no_limit_is_below_what_was_served(
            all in proptest::collection::vec((0_u64..30_000, 1_u64..5_000, proptest::option::of(0_u64..20_000)), 1..60)
        ) {
            let (mut h, mut now, mut served) = (Stated::new(Limits::default(), 0), 0, Vec::new());
            for (pause, took, said) in all {
                now += pause;
                served.push((now, took));
                h.serves(now, Tokens { input: took, output: 0 }, tokens(said));
                let sum: u64 = served.iter().filter(|(at, _)| at + MINUTE > now).map(|(_, took)| took).sum();
                if let Some(limit) = h.limits().tokens_per_minute {
                    prop_assert!(limit >= took && limit * SAVED_UP >= sum, "{limit} {took} {sum}");
                }
            }
        }
    }
}
