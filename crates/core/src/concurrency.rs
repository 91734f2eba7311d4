//! The number of requests that may be under way at the same time, found by trying.
//!
//! It doubles with every round of answers until something speaks against it, then grows by one a round. It is halved when
//! the provider refuses or breaks, and shrinks when answers take much longer than the fastest did: then requests only wait
//! at the other end, as they do with a local server that answers one at a time.

use crate::limiter::Tokens;

/// The number at the start, without known limits.
const START: f64 = 4.0;
/// The number at the start with a provider that keeps limits: the limits hold requests back, and this is only the
/// bound.
const START_LIMITED: f64 = 64.0;
/// The most it grows to.
const MOST: f64 = 256.0;
/// The part of it that is left after a refusal or a failure.
const CUT: f64 = 0.5;
/// A latency of so many times the least is taken for waiting.
const WAITING: f64 = 3.0;
/// The factor of the least time at which a time is cut: a few answers that took ages, on a server that stood still, say
/// little.
const MOST_COUNTED: f64 = 1.2 * WAITING;
/// Tokens of answers that take as long as a request without any: makes short and long answers comparable.
const BASE_TOKENS: f64 = 40.0;

/// The number of requests that may be under way.
#[derive(Debug)]
pub struct Concurrency {
    limit: f64,
    /// Doubling still.
    is_new: bool,
    /// Latency a token of the answer, ms: the least, and of late.
    least: Option<f64>,
    recent: f64,
    /// Latency of late, ms.
    latency: f64,
    /// Requests sent before this time (ms) say nothing new about what was wrong then.
    heeded: u64,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { limit: START, is_new: true, least: None, recent: 0.0, latency: 0.0, heeded: 0 }
    }
}

impl Concurrency {
    /// Most requests that may be under way.
    pub fn allowed(&self) -> usize {
        self.limit as usize
    }

    /// Latency of late, ms, if anything has been answered.
    pub fn latency(&self) -> Option<u64> {
        self.least.map(|_| self.latency as u64)
    }

    /// The provider keeps limits. If nothing has spoken against it yet, more may be under way from the start.
    pub fn has_limits(&mut self) {
        if self.is_new {
            self.limit = self.limit.max(START_LIMITED);
        }
    }

    /// A request that was sent at `sent` (ms), was answered at `now` (ms) with so many tokens; those
    /// of a prompt count as a twentieth, since they are read faster than others are written. `in_flight`
    /// were under way by then, it included.
    pub fn answered(&mut self, sent: u64, now: u64, tokens: Tokens, in_flight: usize) {
        let latency = now.saturating_sub(sent).max(1) as f64;
        let each = latency / (tokens.output as f64 + tokens.input as f64 / 20.0 + BASE_TOKENS);
        // A request that was alone, or as good as that, tells what an answer takes at least nowadays.
        let is_alone = in_flight <= 1 || self.allowed() == 1;
        let least = self.least.filter(|_| !is_alone).map_or(each, |least| least.min(each));
        let weight = if self.least.is_none() { 1.0 } else { 0.1 };
        let counted = |each: f64| each.min(MOST_COUNTED * least);
        self.recent = counted(self.recent) + weight * (counted(each) - counted(self.recent));
        self.latency += weight * (latency - self.latency);
        self.least = Some(least);
        if self.recent > WAITING * least {
            if sent >= self.heeded {
                self.heeded = now;
                self.is_new = false;
                self.limit = (self.limit * 0.9).max(1.0);
            }
        } else if in_flight * 2 >= self.allowed() {
            // Only what was used up has proved useful.
            self.limit = (self.limit + if self.is_new { 1.0 } else { 1.0 / self.limit }).min(MOST);
        }
    }

    /// A request that was sent at `sent` (ms) was refused or broke off at `now` (ms).
    pub fn troubled(&mut self, sent: u64, now: u64) {
        if sent >= self.heeded {
            self.heeded = now;
            self.is_new = false;
            self.limit = (self.limit * CUT).max(1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(output: u64) -> Tokens {
        Tokens { input: 0, output }
    }

    /// A client with always something to send; the server answers `slots` requests at a time in `service` ms each, the
    /// others wait. Returns the mean allowed in the second half.
    fn run(slots: usize, service: u64, spread: u64, answers: usize) -> f64 {
        let mut c = Concurrency::default();
        let mut free = vec![0_u64; slots];
        let mut under_way: Vec<(u64, u64)> = Vec::new();
        let (mut now, mut sum, mut random) = (0, 0, fastrand::Rng::with_seed(1));
        for i in 0..answers {
            while under_way.len() < c.allowed() {
                let slot = free.iter_mut().min().unwrap();
                *slot = (*slot).max(now) + service + random.u64(..=spread);
                under_way.push((now, *slot));
            }
            let (at, _) = under_way.iter().enumerate().min_by_key(|(_, u)| u.1).unwrap();
            let (sent, done) = under_way.swap_remove(at);
            now = done;
            c.answered(sent, now, of(100), under_way.len() + 1);
            if i >= answers / 2 {
                sum += c.allowed();
            }
        }
        sum as f64 / (answers / 2) as f64
    }

    #[test]
    fn a_server_of_one_slot_is_not_flooded_and_a_large_one_is_used() {
        let one = run(1, 1_000, 0, 10_000);
        assert!((1.0..8.0).contains(&one), "{one}");
        let many = run(1_000, 1_000, 500, 4_000);
        assert!(many > 200.0, "{many}");
    }

    #[test]
    fn a_server_that_stood_still_once_is_not_taken_for_a_slow_one() {
        // Its first answers, or some in the middle.
        for before in [0, 40] {
            let mut c = Concurrency::default();
            let mut now = 0;
            for i in 0..before + 22 {
                let latency = if (before..before + 2).contains(&i) { 10_000 } else { 20 };
                c.answered(now, now + latency, of(100), 2);
                now += latency;
            }
            assert!(c.allowed() >= 2, "{before}: {}", c.allowed());
        }
    }

    #[test]
    fn trouble_halves_it_once_for_all_that_was_under_way() {
        let mut c = Concurrency { limit: 64.0, ..Concurrency::default() };
        for sent in 0..20 {
            c.troubled(sent, 100);
        }
        assert_eq!(c.allowed(), 32);
        c.troubled(200, 300);
        assert_eq!(c.allowed(), 16);
        for i in 0..16 {
            c.answered(400, 500, of(10), 16);
            assert!(i > 14 || c.allowed() == 16);
        }
        assert!(c.allowed() <= 17);
    }

    proptest! {
        #[test]
        fn stays_within_its_bounds(events in proptest::collection::vec((any::<bool>(), 0u64..1 << 40, 0u64..1 << 40, 0u64..1 << 30, 0usize..1_000), 0..200)) {
            let mut c = Concurrency::default();
            for (ok, sent, now, tokens, in_flight) in events {
                if ok { c.answered(sent, now, of(tokens), in_flight) } else { c.troubled(sent, now) }
                prop_assert!((1..=MOST as usize).contains(&c.allowed()));
            }
        }
    }
}
