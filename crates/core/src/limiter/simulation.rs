//! The limiter against providers of both kinds, under a virtual clock.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use proptest::prelude::*;

use super::*;

/// Tokens a minute, and of a request of 50 rows with its answer.
pub(super) const TPM: u64 = 500_000;
pub(super) const PACK: u64 = 2_660;
pub(super) const LATENCY: u64 = 1_900;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Rolling,
    Bucket,
}

/// A provider whose limit is kept over `window` ms, with another client that takes the part `other` of it, come what
/// may, from `from` (ms) on.
pub(super) struct Provider {
    kind: Kind,
    window: u64,
    cap: u64,
    log: VecDeque<(u64, u64)>,
    sum: u64,
    /// The bucket's level.
    level: f64,
    pub at: u64,
    other: f64,
    from: u64,
    taken: u64,
}

impl Provider {
    pub fn new(kind: Kind, window: u64, other: f64, from: u64) -> Self {
        let cap = TPM * window / MINUTE;
        Self { kind, window, cap, log: VecDeque::new(), sum: 0, level: cap as f64, at: 0, other, from, taken: 0 }
    }

    fn charge(&mut self, at: u64, n: u64) {
        self.pass(at);
        self.log.push_back((at, n));
        self.sum += n;
        self.level -= n as f64;
    }

    fn pass(&mut self, at: u64) {
        while let Some((t, n)) = self.log.front().copied()
            && t + self.window <= at
        {
            self.log.pop_front();
            self.sum -= n;
        }
        let back = (at - self.at) as f64 * self.cap as f64 / self.window as f64;
        self.level = (self.level + back).min(self.cap as f64);
        self.at = at;
    }

    fn left(&self) -> u64 {
        match self.kind {
            Kind::Rolling => self.cap.saturating_sub(self.sum),
            Kind::Bucket => self.level.max(0.0) as u64,
        }
    }

    /// Admits a request or refuses it. The second value is the amount left then.
    pub fn admit(&mut self, at: u64, n: u64) -> (bool, u64) {
        if self.other > 0.0 && at > self.from {
            let due = ((at - self.from) as f64 * self.other * TPM as f64 / MINUTE as f64) as u64;
            while self.taken + 1_000 <= due {
                self.taken += 1_000;
                let t = self.from + (self.taken as f64 / (self.other * TPM as f64 / MINUTE as f64)) as u64;
                self.charge(t.max(self.at), 1_000);
            }
        }
        self.pass(at);
        let goes = n <= self.left();
        if goes {
            self.charge(at, n);
        }
        (goes, self.left())
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    /// Tokens of a request; and by how much they vary, in thousandths.
    pack: u64,
    spread: u64,
    kind: Kind,
    window: u64,
    other: f64,
    from: u64,
    says_left: bool,
    says_wait: bool,
    seconds: u64,
    seed: u64,
}

#[derive(Debug, Default)]
struct Seen {
    sent: u64,
    /// 429s: all, and those later than 5 s after the other client came.
    refused: u64,
    refused_later: u64,
    /// Part of the limit used after the first minute: by us, by all.
    used: f64,
    used_by_all: f64,
    most_in_flight: usize,
}

/// A client that always has rows to send, packed by the same rules as the gateway's.
fn run(case: Case) -> Seen {
    let mut random = fastrand::Rng::with_seed(case.seed);
    let start = 3_600_000;
    let mut provider = Provider::new(case.kind, case.window, case.other, start + case.from);
    provider.at = start;
    let mut limiter = Limiter::new(limits_of(TPM), start, start);
    let mut answers: BinaryHeap<Reverse<(u64, u64)>> = BinaryHeap::new();
    let mut under_way: Vec<Option<(Grant, u64, bool, u64)>> = Vec::new();
    let (mut now, end, settled) = (start, start + case.seconds * 1000, start + MINUTE);
    let mut seen = Seen::default();
    let (mut ours, mut failures) = (0, 0);
    let mut want = case.pack;
    while now < end {
        let estimate = |n: u64| Tokens { input: n * 92 / 100 + n / 100, output: n * 8 / 100 };
        let fitting = limiter.fitting(now, estimate(want).into());
        let mut size = limiter.even(fitting).map_or(want, |whole| (want as f64 * fitting / whole) as u64);
        let mut tried = limiter.reserve(now, estimate(size), Class::Bulk, 1.0);
        if let Err(Refusal::Until { part, .. }) = tried
            && part >= 0.35
        {
            size = (size as f64 * part) as u64 - 10;
            tried = limiter.reserve(now, estimate(size), Class::Bulk, part).or(tried);
        }
        match tried {
            Ok(grant) => {
                let arrives = now + 5 + random.u64(..15);
                let (goes, left) = provider.admit(arrives.max(provider.at), size);
                let back = if goes { LATENCY * (70 + random.u64(..80)) / 100 } else { 10 };
                answers.push(Reverse((arrives + back, under_way.len() as u64)));
                under_way.push(Some((grant, size, goes, left)));
                seen.sent += 1;
                if goes && arrives >= settled {
                    ours += size;
                }
                seen.most_in_flight = seen.most_in_flight.max(answers.len());
                want = case.pack * (1000 - case.spread + random.u64(..2 * case.spread)) / 1000;
            }
            Err(Refusal::TooLarge) => unreachable!(),
            Err(Refusal::Until { at, .. }) => {
                let next = answers.peek().map_or(u64::MAX, |Reverse((t, _))| *t);
                assert!(at > now);
                now = at.min(next);
            }
        }
        while let Some(Reverse((t, i))) = answers.peek().copied()
            && t <= now
        {
            answers.pop();
            let (grant, size, goes, left) = under_way[i as usize].take().unwrap();
            let left = Left { tokens: case.says_left.then_some(left), ..Left::default() };
            if goes {
                failures = 0;
                limiter.settle(grant, Tokens { input: size * 92 / 100, output: size - size * 92 / 100 }, left);
            } else {
                failures += 1;
                seen.refused += 1;
                seen.refused_later += u64::from(t > start + case.from + 5_000);
                limiter.refused(now, grant, left);
                limiter.penalize(now + if case.says_wait { 200 } else { 250 << failures.min(5) });
            }
        }
    }
    let all = (end - settled) as f64 * TPM as f64 / MINUTE as f64;
    seen.used = ours as f64 / all;
    seen.used_by_all = seen.used + case.other * (end - settled.max(start + case.from)) as f64 / (end - settled) as f64;
    seen
}

pub(super) fn limits_of(tpm: u64) -> Limits {
    Limits { tokens_per_minute: Some(tpm), ..Limits::default() }
}

fn kinds() -> impl Strategy<Value = (Kind, u64)> {
    (prop_oneof![Just(Kind::Rolling), Just(Kind::Bucket)], prop_oneof![Just(6_000), Just(60_000)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Alone on the account: nothing is refused, and nearly all of the limit is used.
    #[test]
    fn the_limit_is_used_and_never_passed((kind, window) in kinds(), says_left: bool, seed: u64) {
        let seen = run(Case { pack: PACK, spread: 20, kind, window, other: 0.0, from: 0, says_left, says_wait: true, seconds: 300, seed });
        prop_assert_eq!(seen.refused, 0);
        prop_assert!(seen.used >= 0.97, "{:?}", seen);
        prop_assert!(seen.most_in_flight as u64 <= 2 * TPM * LATENCY / MINUTE / PACK, "{:?}", seen);
    }

    /// So it is with requests of which few fit into a window.
    #[test]
    fn large_requests_use_the_limit(pack in 7_000u64..20_000, spread in 1u64..150, says_left: bool, seed: u64) {
        let case = Case { pack, spread, kind: Kind::Rolling, window: MINUTE, other: 0.0, from: 0, says_left, says_wait: true, seconds: 300, seed };
        let seen = run(case);
        prop_assert_eq!(seen.refused, 0);
        prop_assert!(seen.used >= 0.96, "{:?}", seen);
    }

    /// Another client takes half of the limit, and the provider says what is left: it is given way.
    #[test]
    fn another_client_is_noticed(
        (kind, window) in kinds(), from in prop_oneof![Just(0u64), 0u64..200_000], says_wait: bool, seed: u64,
    ) {
        let seen = run(Case { pack: PACK, spread: 20, kind, window, other: 0.5, from, says_left: true, says_wait, seconds: 900, seed });
        prop_assert!(seen.refused_later * 100 <= 2 * seen.sent, "{:?}", seen);
        prop_assert!(seen.used_by_all >= 0.86, "{:?}", seen);
    }

    /// The same where the provider says nothing: it is found out by refusals, of which there are few.
    #[test]
    fn another_client_is_found_out((kind, window) in kinds(), says_wait: bool, seed: u64) {
        let seen = run(Case { pack: PACK, spread: 20, kind, window, other: 0.5, from: 0, says_left: false, says_wait, seconds: 900, seed });
        prop_assert!(seen.refused * 80 <= seen.sent, "{:?}", seen);
        prop_assert!(seen.used_by_all >= 0.85, "{:?}", seen);
    }
}
