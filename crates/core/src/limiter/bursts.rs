//! Statements that come to an idle limit, against providers of both kinds, under a virtual clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use proptest::prelude::*;

use super::simulation::{Kind, LATENCY, PACK, Provider, TPM, limits_of};
use super::*;

const START: u64 = 3_600_000;

/// A statement: so many ms after the end of the one before, so many requests.
type Statement = (u64, u64);

#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    sent: u64,
    refused: u64,
    /// Time from the statement's begin to the sending of its last request, ms.
    took: u64,
}

/// Runs statements one after the other; a request that is refused is sent again.
fn run(limiter: &mut Limiter, provider: &mut Provider, says_left: bool, seed: u64, all: &[Statement]) -> Vec<Seen> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut now = provider.at.max(START);
    let mut result = Vec::new();
    for (gap, requests) in all {
        now += gap;
        let (begin, mut seen, mut waiting) = (now, Seen::default(), *requests);
        let mut arriving = BinaryHeap::new();
        let mut answers = BinaryHeap::new();
        let mut grants = Vec::new();
        let mut sizes = Vec::new();
        while waiting > 0 || !answers.is_empty() || !arriving.is_empty() {
            let size = PACK * (980 + random.u64(..40)) / 1000;
            // A little more than it takes.
            let estimate = Tokens { input: size * 92 / 100, output: size * 9 / 100 };
            let tried = (waiting > 0).then(|| limiter.reserve(now, estimate, Class::Interactive, 1.0));
            let next = match tried {
                Some(Ok(grant)) => {
                    waiting -= 1;
                    seen.sent += 1;
                    seen.took = now - begin;
                    // They come in another order than they were sent.
                    arriving.push(Reverse((now + 5 + random.u64(..15), grants.len())));
                    grants.push(Some(grant));
                    sizes.push(size);
                    continue;
                }
                Some(Err(Refusal::Until { at, .. })) => at,
                Some(Err(Refusal::TooLarge)) => unreachable!(),
                None => u64::MAX,
            };
            let first = |events: &BinaryHeap<Reverse<(u64, usize)>>| events.peek().map_or(u64::MAX, |e| e.0.0);
            let first_answer = answers.peek().map_or(u64::MAX, |e: &Reverse<(u64, usize, bool, u64)>| e.0.0);
            now = next.min(first(&arriving)).min(first_answer).max(now);
            while let Some(Reverse((at, i))) = arriving.peek().copied()
                && at <= now
            {
                arriving.pop();
                let (goes, left) = provider.admit(at.max(provider.at), sizes[i]);
                let back = if goes { LATENCY * (70 + random.u64(..80)) / 100 } else { 10 };
                answers.push(Reverse((at + back, i, goes, left)));
            }
            while let Some(Reverse((at, i, goes, left))) = answers.peek().copied()
                && at <= now
            {
                answers.pop();
                let left = Left { tokens: says_left.then_some(left), ..Left::default() };
                let grant = grants[i].take().unwrap();
                if goes {
                    let output = sizes[i] - sizes[i] * 92 / 100;
                    limiter.settle(grant, Tokens { input: sizes[i] * 92 / 100, output }, left);
                } else {
                    seen.refused += 1;
                    waiting += 1;
                    limiter.refused(now, grant, left);
                    limiter.penalize(now + 200);
                }
            }
        }
        result.push(seen);
    }
    result
}

fn new(kind: Kind, window: u64) -> (Limiter, Provider) {
    let mut provider = Provider::new(kind, window, 0.0, 0);
    provider.at = START;
    (Limiter::new(limits_of(TPM), START - MINUTE, START - 250), provider)
}

const KINDS: [Kind; 2] = [Kind::Rolling, Kind::Bucket];

#[test]
fn a_statement_that_comes_to_an_idle_limit_goes_at_once() {
    for kind in KINDS {
        for says_left in [false, true] {
            for seed in 0..20 {
                let (mut limiter, mut provider) = new(kind, MINUTE);
                let seen = run(&mut limiter, &mut provider, says_left, seed, &[(500, 1), (70_000, 20), (70_000, 20)]);
                for statement in &seen[1..] {
                    assert_eq!((statement.refused, statement.took), (0, 0), "{kind:?} {says_left} {seed} {seen:?}");
                }
            }
        }
    }
}

#[test]
fn one_burst_finds_a_shorter_window_and_it_is_kept() {
    for kind in KINDS {
        for seed in 0..20 {
            let statements = [(500, 1), (70_000, 20), (70_000, 20), (70_000, 40), (10_000, 20)];
            let (mut limiter, mut provider) = new(kind, SHORTEST);
            let seen = run(&mut limiter, &mut provider, false, seed, &statements);
            assert!((1..=2).contains(&seen[1].refused), "{kind:?} {seed} {seen:?}");
            assert!(seen[2..].iter().all(|s| s.refused == 0), "{kind:?} {seed} {seen:?}");
            assert_eq!(limiter.share.at(u64::MAX / 2), 1.0, "nobody else was suspected");
            // By another process.
            let (kept, now) = (limiter.keep(provider.at), provider.at + 30_000);
            let mut limiter = Limiter::restore(limits_of(TPM), &kept, 30_000, now);
            provider.at = now;
            let seen = run(&mut limiter, &mut provider, false, seed, &[(40_000, 20)]);
            assert_eq!(seen[0].refused, 0, "{kind:?} {seed} {seen:?}");

            let (mut limiter, mut provider) = new(kind, SHORTEST);
            let seen = run(&mut limiter, &mut provider, true, seed, &statements);
            assert!(seen.iter().all(|s| s.refused == 0), "what is left says it: {kind:?} {seed} {seen:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the provider's window is: at most one burst is refused, of that at most a tenth (in whole requests).
    #[test]
    fn bursts_are_refused_once_at_most(
        bucket: bool,
        window in prop_oneof![Just(6_000u64), Just(10_000), Just(20_000), Just(60_000)],
        says_left: bool,
        seed: u64,
        statements in proptest::collection::vec((0u64..100_000, prop_oneof![1u64..30, 1u64..150]), 1..40),
    ) {
        let (mut limiter, mut provider) = new(if bucket { Kind::Bucket } else { Kind::Rolling }, window);
        let seen = run(&mut limiter, &mut provider, says_left, seed, &statements);
        let met = seen.iter().filter(|s| s.refused > 0).count();
        // A few requests of a later burst may still be refused where a statement's own words cap its burst.
        let later = seen.iter().filter(|s| s.refused > 0).skip(1).all(|s| s.refused <= 3);
        prop_assert!(met <= 1 || (says_left && met == 2 && later), "{:?}", seen);
        prop_assert!(seen.iter().all(|s| s.refused <= s.sent.div_ceil(10)), "{:?}", seen);
        prop_assert!(window != 60_000 || met == 0, "{:?}", seen);
    }

    /// A limiter that goes on where another one was knows of all that was sent.
    #[test]
    fn what_was_kept_is_never_less(
        statements in proptest::collection::vec((0u64..20_000, 1u64..30), 1..10), age in 0u64..70_000, seed: u64,
    ) {
        let (mut limiter, mut provider) = new(Kind::Rolling, MINUTE);
        run(&mut limiter, &mut provider, false, seed, &statements);
        let then = provider.at + 1;
        let (kept, now) = (limiter.keep(then), then + age);
        let mut restored = Limiter::restore(limits_of(TPM), &kept, age, now);
        for at in (now..now + 70_000).step_by(500) {
            limiter.forget(at);
            restored.forget(at);
            for (old, new) in limiter.windows.iter().zip(&restored.windows) {
                prop_assert!(new.sum[1] >= old.sum[1] && new.caps == old.caps, "{} ms: {:?} {:?}", at - now, new.sum, old.sum);
            }
        }
        prop_assert_eq!(restored.burst.known, limiter.burst.known);
    }
}
