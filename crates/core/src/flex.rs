//! The tier "flex" of a model: half the price, as long as the provider has capacity to spare.
//!
//! Without capacity a request is refused and costs nothing. It says nothing of the limits, nor of requests at the normal
//! tier: so that wait is apart from theirs. One try at a time goes out meanwhile, each after a longer wait.

use crate::options::ServiceTier;

/// The first wait, ms; doubled with each further refusal.
const FIRST_WAIT: u64 = 1_000;
/// The longest, ms.
const LONGEST_WAIT: u64 = 60_000;
/// Refusals in a row after which tasks that may are asked at the normal tier.
const ENOUGH: u32 = 3;
/// Time that an answer may take at this tier, ms.
pub const TIMEOUT: u64 = 900_000;

/// The tier at which a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// As the task says.
    Flex,
    /// The normal one.
    Default,
    /// Not before this time (ms).
    Until(u64),
}

/// The capacity of a model at that tier.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flex {
    /// In a row.
    refusals: u32,
    /// When (ms) a request was last refused.
    refused_at: u64,
    /// Nothing goes at this tier before (ms).
    until: u64,
}

impl Flex {
    /// The tier of the next request. `is_refused`: the server does not know the tier.
    pub fn turn(&self, now: u64, tier: ServiceTier, is_refused: bool) -> Turn {
        match tier {
            ServiceTier::Default => Turn::Default,
            ServiceTier::FlexOrDefault if is_refused => Turn::Default,
            _ if now >= self.until => Turn::Flex,
            ServiceTier::FlexOrDefault if self.refusals >= ENOUGH => Turn::Default,
            _ => Turn::Until(self.until),
        }
    }

    /// A request goes out at this tier. Its answer may take minutes: the next one is tried after the wait.
    pub fn sent(&mut self, now: u64) {
        if self.refusals > 0 {
            self.until = now + wait(self.refusals);
        }
    }

    /// One was answered.
    pub fn answered(&mut self) {
        *self = Self::default();
    }

    /// One that was sent at `sent` (ms) was refused. Those that were under way together count once. The wait, ms.
    pub fn refused(&mut self, now: u64, sent: u64, said: Option<u64>) -> u64 {
        if self.refusals == 0 || sent >= self.refused_at {
            self.refusals = self.refusals.saturating_add(1);
            self.refused_at = now;
        }
        let wait = said.unwrap_or(0).min(LONGEST_WAIT).max(wait(self.refusals));
        self.until = self.until.max(now + wait);
        wait
    }
}

fn wait(refusals: u32) -> u64 {
    (FIRST_WAIT << refusals.saturating_sub(1).min(10)).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ServiceTier::{Flex as Strict, FlexOrDefault};

    #[test]
    fn without_capacity_one_try_goes_at_a_time_each_after_a_longer_wait() {
        let (mut flex, mut now, mut waits) = (Flex::default(), 10_000, Vec::new());
        assert_eq!(flex.turn(now, Strict, false), Turn::Flex);
        for _ in 0..8 {
            flex.sent(now);
            // Another one was under way with it.
            waits.push(flex.refused(now + 1, now, None));
            flex.refused(now + 1, now, None);
            let Turn::Until(at) = flex.turn(now + 1, Strict, false) else { panic!() };
            now = at;
        }
        assert_eq!(waits, [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
        flex.sent(now);
        assert_eq!(flex.turn(now, Strict, false), Turn::Until(now + 60_000));
        flex.answered();
        assert_eq!(flex.turn(now, Strict, false), Turn::Flex);
        assert_eq!(flex.refused(now, now, Some(5_000)), 5_000);
    }

    #[test]
    fn tasks_that_may_are_asked_at_the_normal_tier_after_some_refusals() {
        let (mut flex, mut now) = (Flex::default(), 10_000);
        for _ in 0..ENOUGH {
            assert_eq!(flex.turn(now, FlexOrDefault, false), Turn::Flex);
            now += flex.refused(now, now, None);
        }
        assert_eq!(flex.turn(now - 1, FlexOrDefault, false), Turn::Default);
        assert_eq!(flex.turn(now - 1, Strict, false), Turn::Until(now));
        // And once the wait is over, one tries again.
        assert_eq!(flex.turn(now, FlexOrDefault, false), Turn::Flex);
        flex.sent(now);
        assert_eq!(flex.turn(now, FlexOrDefault, false), Turn::Default);
        assert_eq!(flex.turn(now, FlexOrDefault, true), Turn::Default);
        assert_eq!(Flex::default().turn(0, Strict, true), Turn::Flex, "it may not pay more");
        assert_eq!(Flex::default().turn(0, ServiceTier::Default, false), Turn::Default);
    }
}
