//! Streams with a budget: nothing is sent that was not allowed, by the provider's own bill.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;

use llm_batch_gateway::Settings;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault};
use serde_json::json;
use support::*;

/// $0.15 and $0.60 a million tokens.
const PRICES: Prices = Prices { input: 150_000, output: 600_000 };

const NOTHING: Allowance = Allowance { cost: 0, tokens: 0 };
const NO_LIMIT: Allowance = Allowance { cost: u64::MAX, tokens: u64::MAX };

fn worth(input: u64, output: u64) -> Allowance {
    Allowance { cost: input * PRICES.input + output * PRICES.output, tokens: input + output }
}

fn is_within(a: Allowance, b: Allowance) -> bool {
    a.cost <= b.cost && a.tokens <= b.tokens
}

/// `a` and so many halves of `b`.
fn plus(a: Allowance, b: Allowance, halves: u64) -> Allowance {
    let sum = |a: u64, b: u64| a.saturating_add(b.saturating_mul(halves) / 2);
    Allowance { cost: sum(a.cost, b.cost), tokens: sum(a.tokens, b.tokens) }
}

/// A client whose stream has a budget, and what it knows of it.
struct Job<'a> {
    client: Client,
    provider: &'a FakeProvider,
    allowed: Allowance,
    spent: Spent,
    got: BTreeMap<u64, Outcome>,
}

impl<'a> Job<'a> {
    fn new(setup: &Setup, provider: &'a FakeProvider, change: impl FnOnce(&mut Stream)) -> Self {
        let client = setup.client(provider, |s| {
            s.budget = Some(PRICES);
            change(s);
        });
        Self { client, provider, allowed: NOTHING, spent: Spent::default(), got: BTreeMap::new() }
    }

    fn allow(&mut self, more: Allowance) {
        self.allowed = plus(self.allowed, more, 2);
        self.client.say(&ToGateway::Allow(more));
    }

    /// The provider's charges so far.
    fn bill(&self) -> Allowance {
        let stats = self.provider.stats();
        worth(stats.prompt_tokens, stats.completion_tokens)
    }

    #[track_caller]
    fn is_kept(&self) {
        let bill = self.bill();
        assert!(is_within(bill, self.allowed), "{bill:?} was charged, {:?} allowed", self.allowed);
    }

    /// Hears one message: `Exhausted` if it was that.
    #[track_caller]
    fn hear(&mut self) -> Option<(Allowance, Allowance)> {
        let message = self.client.hear(&format!("outcomes beside {}, or that it is exhausted", self.got.len()));
        self.is_kept();
        match message {
            Some(FromGateway::Outcomes { outcomes, spent, .. }) => {
                add(&mut self.spent, &spent);
                for o in outcomes {
                    let n = o.n;
                    assert!(self.got.insert(n, o).is_none(), "row {n} has two outcomes");
                }
                None
            }
            Some(FromGateway::Exhausted { least, full }) => {
                assert_eq!(self.client.only_activity().in_flight_requests, 0, "something is under way");
                assert!(is_within(least, full) && least.tokens > 0, "{least:?} {full:?}");
                Some((least, full))
            }
            other => panic!("{other:?}"),
        }
    }

    /// Takes outcomes until it is exhausted.
    #[track_caller]
    fn exhausted(&mut self) -> (Allowance, Allowance) {
        loop {
            if let Some(amounts) = self.hear() {
                return amounts;
            }
        }
    }

    /// Takes outcomes until there are so many. It must not be exhausted before.
    #[track_caller]
    fn until(&mut self, rows: usize) {
        while self.got.len() < rows {
            assert_eq!(self.hear(), None, "exhausted after {} rows", self.got.len());
        }
    }

    /// Checks that the client was told all charges, except for requests of which nobody knows.
    #[track_caller]
    fn accounts_agree(&self) {
        let s = &self.spent;
        let (bill, sure) = (self.bill(), worth(s.input_tokens, s.output_tokens));
        let most = plus(sure, worth(s.unconfirmed_input_tokens, s.unconfirmed_output_tokens), 2);
        assert!(is_within(sure, bill) && is_within(bill, most), "{bill:?} {s:?}");
        assert!(is_within(most, self.allowed), "{s:?} {:?}", self.allowed);
    }
}

fn twenty_rows(s: &mut Stream) {
    s.task.options.max_rows_per_request = 20;
}

#[test]
fn nothing_is_sent_that_was_not_allowed() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let mut job = Job::new(&setup, &provider, |_| {});
    job.client.rows(0..60);
    let (least, full) = job.exhausted();
    assert!(least.cost * 5 < full.cost && full.tokens < 10_000, "{least:?} {full:?}");
    // It is said once, whatever is asked meanwhile.
    job.client.rows(60..100);
    job.client.activity();
    // A grant too small for a row is kept, and more is asked for.
    let little = Allowance { cost: least.cost - 1, tokens: u64::MAX };
    for more in [NOTHING, little] {
        job.allow(more);
        assert_eq!(job.exhausted().0, least);
        job.client.activity();
    }
    assert_eq!(provider.stats().requests, 0);
    job.allow(Allowance { cost: 1, tokens: 0 });
    job.exhausted();
    assert_eq!((packs(&provider), job.got.len()), (vec![vec![0]], 1));
    job.allow(Allowance { cost: u64::MAX, tokens: 0 });
    job.until(100);
    assert!(job.got.iter().all(|(n, o)| is_right(*n, &o.verdict)));
    job.accounts_agree();
}

#[test]
fn it_is_exhausted_once_and_only_when_nothing_is_under_way() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let mut job = Job::new(&setup, &provider, twenty_rows);
    job.client.rows(0..400);
    let (_, full) = job.exhausted();
    // For three requests, of which each might take all that it may.
    provider.hold();
    job.allow(plus(full, full, 4));
    wait_in_flight(&provider, 3);
    job.client.activity();
    assert_eq!(provider.stats().requests, 3);
    provider.release();
    // The part that they did not take lets others go, until nothing comes back any more.
    let mut times = 0;
    while job.got.len() < 400 {
        let (_, full) = loop {
            match job.hear() {
                Some(amounts) => break amounts,
                None if job.got.len() == 400 => break (NOTHING, NOTHING),
                None => {}
            }
        };
        if full != NOTHING {
            times += 1;
            let asked = provider.stats().rows.len();
            assert_eq!(job.got.len(), asked, "what was answered comes first");
            job.client.activity();
            job.allow(plus(full, full, 1));
        }
    }
    assert!(times >= 2 && provider.stats().rows.values().all(|row| row.asked == 1), "{times}");
    job.accounts_agree();
    assert_eq!(job.spent.requests, provider.stats().requests);
}

#[test]
fn all_that_is_allowed_is_used_and_the_last_request_is_cut_to_it() {
    for [cost, tokens] in [[true, true], [true, false], [false, true]] {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        let mut job = Job::new(&setup, &provider, |s| s.model.max_concurrent_requests = Some(1));
        job.allow(NO_LIMIT);
        job.client.rows(0..200);
        job.until(200);
        // Anew: what was allowed before was for the stream before.
        provider.reset_stats();
        (job.allowed, job.spent, job.got) = (NOTHING, Spent::default(), BTreeMap::new());
        job.client.open(&provider, |s| s.budget = Some(PRICES));
        job.client.rows(1_000..1_500);
        let (least, full) = job.exhausted();
        assert!(full.tokens > 3 * least.tokens, "{least:?} {full:?}");
        let of = |halves: u64| {
            let a = plus(least, full, halves);
            Allowance { cost: if cost { a.cost } else { u64::MAX }, tokens: if tokens { a.tokens } else { u64::MAX } }
        };
        let before = packs(&provider).len();
        job.allow(of(1));
        let (_, full_now) = job.exhausted();
        let sizes: Vec<usize> = packs(&provider)[before..].iter().map(Vec::len).collect();
        assert!((10..50).contains(&sizes[0]) && sizes.iter().all(|n| (1..50).contains(n)), "{sizes:?} for half of 50");
        // Full requests as long as they are paid; and the rest when that is said to be all.
        job.allow(of(10));
        job.exhausted();
        job.allow(NOTHING);
        job.exhausted();
        assert!(job.got.len() > 200 && is_within(full_now, plus(full, full, 1)), "{}", job.got.len());
        let (bill, allowed) = (job.bill(), job.allowed);
        let used = |bill: u64, allowed: u64| allowed == u64::MAX || bill >= allowed / 10 * 9;
        assert!(used(bill.cost, allowed.cost) || used(bill.tokens, allowed.tokens), "{bill:?} of {allowed:?}");
        job.allow(NO_LIMIT);
        job.until(500);
        assert!(job.got.iter().all(|(n, o)| is_right(*n, &o.verdict)));
        job.accounts_agree();
    }
}

/// All that may go wrong and leaves a stream going.
fn all_faults() -> Vec<Fault> {
    use Fault::*;
    vec![
        Http500,
        Http503,
        RateLimit429,
        ResetBefore,
        ResetAfter,
        Hang,
        Status(200, "<html>".into()),
        Status(200, json!({"error": {"message": "no"}}).to_string()),
        MalformedJson,
        DropId,
        InventId,
        DoubleId,
        UnknownCode,
        EmptyAnswer,
        CutByLength,
        Prose,
        Refusal,
        ContentFilter,
    ]
}

/// A job under faults, whose client allows now more and now less than is needed; the times it was asked for more.
fn under_faults(seed: u64, kind: [bool; 2], probability: f64) -> usize {
    let faults = all_faults().into_iter().map(|fault| (fault, probability)).collect();
    let provider = provider(Config { faults, seed, ..Config::default() });
    let setup = Setup::with_cache(0);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut job = Job::new(&setup, &provider, |s| {
        twenty_rows(s);
        s.model.request_timeout_ms = 1_000;
        // So many that no row is paid for that often in vain: that would stop the stream.
        s.task.options.max_attempts = 10;
    });
    job.client.rows(0..400);
    let mut times = 0;
    while job.got.len() < 400 {
        let Some((least, full)) = job.hear() else { continue };
        times += 1;
        let more = match random.u32(0..6) {
            0 => NOTHING,
            1 => plus(NOTHING, least, random.u64(0..2)),
            2 => least,
            3 => plus(least, full, 1),
            _ => plus(full, full, random.u64(0..4)),
        };
        let [cost, tokens] = kind;
        let no_limit = |is_limited: bool, n: u64| if is_limited { n } else { u64::MAX };
        job.allow(Allowance { cost: no_limit(cost, more.cost), tokens: no_limit(tokens, more.tokens) });
    }
    let wrong = |(n, o): &(&u64, &Outcome)| !is_right(**n, &o.verdict);
    assert!(job.got.iter().filter(wrong).all(|(_, o)| !matches!(o.verdict, Verdict::Answer(_) | Verdict::Withdrawn)));
    assert!(job.got.iter().filter(wrong).count() < 100, "{:?}", job.got);
    assert!(probability == 0.0 || provider.stats().faults.len() > 10, "{:?}", provider.stats().faults);
    job.is_kept();
    job.accounts_agree();
    times
}

#[test]
fn the_bill_is_never_more_than_was_allowed_whatever_goes_wrong() {
    for (seed, kind) in [(1, [true, true]), (2, [true, false]), (3, [false, true])] {
        assert!(under_faults(seed, kind, 0.0) >= 3);
        assert!(under_faults(seed, kind, 0.025) >= 3);
    }
}

#[test]
fn what_was_refused_is_not_spent() {
    for fault in [Fault::Http500, Fault::Http503, Fault::RateLimit429] {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        let mut job = Job::new(&setup, &provider, twenty_rows);
        job.client.rows(0..20);
        let (_, full) = job.exhausted();
        provider.script([Some(fault.clone()), Some(fault.clone())]);
        job.allow(full);
        job.until(20);
        assert_eq!(provider.stats().requests, 3, "{fault:?}");
        let s = job.spent;
        assert_eq!((s.requests, s.unconfirmed_input_tokens, s.unconfirmed_output_tokens), (1, 0, 0), "{fault:?}");
        job.accounts_agree();
    }
}

#[test]
fn what_may_have_been_charged_is_said_and_counts_as_spent() {
    let faults = [Fault::ResetBefore, Fault::ResetAfter, Fault::Hang, Fault::Status(200, "<html>".into())];
    for fault in faults {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        let mut job = Job::new(&setup, &provider, |s| {
            twenty_rows(s);
            s.model.request_timeout_ms = 500;
        });
        job.client.rows(0..20);
        let (_, full) = job.exhausted();
        provider.script([Some(fault.clone())]);
        job.allow(full);
        // The rest of it is not enough for a second time.
        job.exhausted();
        assert_eq!(provider.stats().requests, 1, "{fault:?}");
        let s = job.spent;
        let unsure = worth(s.unconfirmed_input_tokens, s.unconfirmed_output_tokens);
        assert_eq!(unsure, full, "{fault:?}");
        job.allow(NO_LIMIT);
        job.until(20);
        job.accounts_agree();
    }
}

#[test]
fn a_request_that_is_abandoned_may_have_been_charged() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let mut job = Job::new(&setup, &provider, twenty_rows);
    job.allow(NO_LIMIT);
    provider.hold();
    job.client.rows(0..20);
    wait_in_flight(&provider, 1);
    setup.configure(Settings { enabled: false, memory: 64 << 20, cache: 0 });
    match job.client.hear("the stop") {
        Some(FromGateway::Stopped(stop)) => assert_eq!(stop.reason, StopReason::Disabled),
        other => panic!("{other:?}"),
    }
    job.until(20);
    assert!(job.got.values().all(|o| o.verdict == Verdict::Withdrawn));
    assert!(job.bill().tokens > 0 && job.spent.requests == 0);
    job.accounts_agree();
}

#[test]
fn a_budget_is_for_nobody_elses_rows() {
    let (setup, provider) = (Setup::with_cache(1 << 20), provider(Config::default()));
    provider.hold();
    let mut blocker = setup.client(&provider, |s| (s.role, s.model.max_concurrent_requests) = (99, Some(1)));
    blocker.rows(9_000..9_001);
    wait_in_flight(&provider, 1);
    let mut jobs = [0, 100, 200].map(|first| {
        let mut job = Job::new(&setup, &provider, |s| s.budget = Some(PRICES).filter(|_| first < 200));
        job.allow(NO_LIMIT);
        // The last five are the same for all.
        job.client.rows(first..first + 10);
        job.client.texts((500..505).map(|n| (n, n)));
        job.client.activity();
        job
    });
    provider.release();
    for job in &mut jobs {
        job.until(15);
        assert!(job.got.iter().all(|(n, o)| is_right(*n, &o.verdict) && !o.reused), "{:?}", job.got);
    }
    let mut sizes = Vec::new();
    for pack in packs(&provider).iter().filter(|pack| pack[0] != 9_000) {
        let of: Vec<u64> = pack.iter().filter(|n| **n < 500).map(|n| n / 100).collect();
        assert!(of.iter().all(|n| *n == of[0]), "{pack:?}");
        sizes.push(pack.len());
    }
    assert_eq!(sizes, [15, 15, 15]);
    // Each pays for its own.
    let input = provider.stats().prompt_tokens - blocker.answers(1).1.input_tokens;
    assert!(jobs.iter().all(|job| job.spent.input_tokens * 3 <= input + 60 && job.spent.requests == 1));
    assert_eq!(jobs.iter().map(|job| job.spent.input_tokens).sum::<u64>(), input);
    // An answer that was paid for is free for all.
    provider.reset_stats();
    let mut poor = Job::new(&setup, &provider, |_| {});
    poor.client.rows(0..10);
    poor.client.texts((500..505).map(|n| (n, n)));
    poor.until(15);
    assert!(poor.got.values().all(|o| o.reused) && poor.spent == Spent::default());
}
