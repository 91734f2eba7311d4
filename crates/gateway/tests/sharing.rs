//! Effects of clients on each other: requests, answers to the same text, turns, limits, what was learnt of the
//! provider.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use llm_batch_core::dialect::Counts;
use llm_batch_core::options::AnswerShape;
use llm_batch_core::task::{Classify, LabelExample as Example, Spec};
use llm_batch_gateway::Settings;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, Latency, OtherClient, RateHeaders, Reserve, Stats};
use serde_json::json;
use support::*;

/// Enough for all answers of a test.
const LARGE: usize = 1 << 20;

/// A change of a stream, and what it is called.
type Change = (&'static str, fn(&mut Stream));

/// Changes after which a text has another answer.
const OTHER_ANSWERS: [Change; 10] = [
    ("database", |s| s.database = 2),
    ("role", |s| s.role = 11),
    ("key", |s| s.endpoint.api_key = Some(Secret("other".into()))),
    ("model", |s| s.model.model = "n".into()),
    ("parameters", |s| drop(s.model.parameters.insert("temperature".into(), json!(1)))),
    ("instruction", |s| s.task.spec = tickets("Other tickets.")),
    ("order of labels", |s| classifier(s, |c| c.labels.reverse())),
    ("description", |s| classifier(s, |c| c.labels[0].description = "money".into())),
    ("examples", |s| classifier(s, |c| c.examples.push(Example { input: "a".into(), label: "bug".into() }))),
    ("shape", |s| s.task.options.answer_shape = AnswerShape::Properties),
];

fn classifier(s: &mut Stream, change: fn(&mut Classify)) {
    let Spec::Classify(classify) = &mut s.task.spec else { panic!("{:?}", s.task) };
    change(classify);
}

fn all_right(got: &BTreeMap<u64, Outcome>) -> bool {
    got.iter().all(|(n, o)| is_right(*n, &o.verdict))
}

fn reused(got: &BTreeMap<u64, Outcome>) -> usize {
    got.values().filter(|o| o.reused).count()
}

fn somebody_waits(s: &mut Stream) {
    s.interactive = true;
}

fn one_at_a_time(s: &mut Stream) {
    s.model.max_concurrent_requests = Some(1);
}

// Requests.

#[test]
fn rows_of_many_clients_share_the_request_after_the_one_under_way() {
    for round in 0..5 {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        provider.hold();
        let mut first = setup.client(&provider, somebody_waits);
        let mut others: Vec<Client> = (0..49).map(|_| setup.client(&provider, somebody_waits)).collect();
        for client in &mut others {
            client.activity();
        }
        first.rows(0..1);
        wait_in_flight(&provider, 1);
        for (n, client) in (1..).zip(&mut others) {
            client.rows(n..n + 1);
        }
        provider.release();
        assert!(all_right(&first.answers(1).0));
        for client in &mut others {
            assert!(all_right(&client.answers(1).0));
        }
        let packs = packs(&provider);
        assert!(packs.len() <= 3, "round {round}: {packs:?}");
    }
}

#[test]
fn what_differs_in_any_respect_never_shares_a_request() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    // A change that leaves the answer alone changes whose turn it is, or who pays.
    let further: [Change; 4] = [
        ("somebody waits", somebody_waits),
        ("priority", |s| s.task.options.priority = 51),
        ("attempts", |s| s.task.options.max_attempts = 5),
        ("nothing", |_| {}),
    ];
    let kinds: Vec<Change> = OTHER_ANSWERS.into_iter().chain(further).collect();
    provider.hold();
    // One account for all keys, so that nothing but the streams keeps them apart.
    let open = |change: fn(&mut Stream)| {
        setup.client(&provider, |s| {
            s.endpoint.account = Some("one".into());
            s.model.max_concurrent_requests = Some(1);
            change(s);
        })
    };
    let mut blockers = [open(|s| s.role = 99), open(|s| (s.role, s.model.model) = (99, "n".into()))];
    for (n, client) in (90_000..).zip(&mut blockers) {
        client.rows(n..n + 1);
    }
    wait_in_flight(&provider, 2);
    // Two clients of each kind: they do share.
    let mut clients = Vec::new();
    for (kind, (name, change)) in kinds.iter().enumerate() {
        for who in 0..2 {
            let mut client = open(*change);
            let first = kind as u64 * 100 + who * 10;
            client.rows(first..first + 10);
            client.activity();
            clients.push((first, *name, *change, client));
        }
    }
    provider.release();
    for (_, name, _, mut client) in clients {
        for (n, o) in client.answers(10).0 {
            assert!(is_right(n, &o.verdict), "{name} {n}: {o:?}");
        }
    }
    for pack in packs(&provider) {
        let of: BTreeSet<u64> = pack.iter().map(|n| n / 100).collect();
        assert_eq!(of.len(), 1, "{pack:?}");
        assert!(pack.len() == 20 || pack[0] >= 90_000, "the same kind shares: {pack:?}");
    }
}

// The same text.

#[test]
fn a_text_that_comes_often_is_asked_once_and_paid_by_the_first() {
    for cache in [0, LARGE] {
        let (setup, provider) = (Setup::with_cache(cache), provider(Config::default()));
        provider.hold();
        let (mut a, mut b) = (setup.client(&provider, |_| {}), setup.client(&provider, |_| {}));
        // Within a pack.
        a.texts((0..50).map(|n| (n, n % 10)));
        wait_in_flight(&provider, 1);
        // While it is under way, of others and of the same.
        b.texts((0..10).map(|n| (n, n)));
        a.texts((50..60).map(|n| (n, n % 10)));
        b.activity();
        provider.release();
        let (of_a, spent_a) = a.answers(60);
        let (of_b, spent_b) = b.answers(10);
        assert!(of_a.iter().chain(&of_b).all(|(n, o)| is_right(n % 10, &o.verdict)));
        assert!(of_a.iter().all(|(n, o)| o.reused == (*n >= 10)), "{of_a:?}");
        assert_eq!(reused(&of_b), 10);
        let stats = provider.stats();
        assert!(stats.rows.len() == 10 && stats.rows.values().all(|row| row.asked == 1), "{:?}", stats.rows);
        assert_eq!((spent_a.requests, spent_a.input_tokens), (1, stats.prompt_tokens));
        assert_eq!((spent_a.output_tokens, spent_b), (stats.completion_tokens, Spent::default()));
        assert_eq!(a.only_activity().rows_reused, 60);
        // Two clients ask at once, while neither is under way: the one whose row came first pays.
        provider.hold();
        a.rows(200..201);
        wait_in_flight(&provider, 1);
        provider.reset_stats();
        for (client, texts) in [(&mut a, 100..104), (&mut b, 102..106)] {
            client.rows(texts);
            client.activity();
        }
        provider.release();
        let (of_a, spent_a) = a.answers(5);
        let (of_b, spent_b) = b.answers(4);
        assert!(all_right(&of_a) && all_right(&of_b));
        assert_eq!((reused(&of_a), reused(&of_b)), (0, 2));
        assert_eq!(asked(&provider), (100..106).map(|n| (n, 1)).collect());
        let both = spent_a.output_tokens + spent_b.output_tokens;
        assert!(spent_b.output_tokens > 0 && spent_b.output_tokens * 3 <= both, "{spent_a:?} {spent_b:?}");
    }
}

#[test]
fn later_rows_of_a_text_are_answered_at_once_unless_told_otherwise() {
    let (setup, provider) = (Setup::with_cache(LARGE), provider(Config::default()));
    let mut a = setup.client(&provider, |_| {});
    a.rows(0..100);
    a.answers(100);
    // Sessions and jobs alike, and with a budget of nothing.
    let kinds: [fn(&mut Stream); 4] =
        [|_| {}, somebody_waits, |s| s.task.options.priority = 1, |s| s.budget = Some(Prices { input: 1, output: 1 })];
    for change in kinds {
        let mut b = setup.client(&provider, change);
        b.rows(0..100);
        let (got, spent) = b.answers(100);
        assert!(all_right(&got) && got.values().all(|o| o.reused && o.attempts == 0));
        assert_eq!((provider.stats().requests, spent), (2, Spent::default()));
    }
    // Told to ask: each row, whatever is known or under way; and what comes of it is nobody else's.
    let mut c = setup.client(&provider, |s| s.task.options.reuse = false);
    c.texts((0..100).map(|n| (n, n % 50)));
    c.texts((100..150).map(|n| (n, n)));
    let (got, _) = c.answers(150);
    assert!(got.iter().all(|(n, o)| is_right(if *n < 100 { n % 50 } else { *n }, &o.verdict) && !o.reused));
    let asked = asked(&provider);
    let times = |range: std::ops::Range<u64>, times: u32| range.map(move |n| (n, times));
    assert_eq!(asked, times(0..50, 3).chain(times(50..150, 1)).collect());
    provider.reset_stats();
    a.rows(100..150);
    let (got, _) = a.answers(50);
    assert!(all_right(&got) && reused(&got) == 0, "what was not to be shared was shared");
    // Without a cache there is nothing later.
    let (setup, provider) = (Setup::with_cache(0), self::provider(Config::default()));
    let mut a = setup.client(&provider, |_| {});
    for round in 1..=3 {
        a.rows(0..50);
        assert_eq!(reused(&a.answers(50).0), 0);
        assert_eq!(provider.stats().requests, round);
    }
}

#[test]
fn an_answer_is_that_of_its_task_model_role_and_parameters() {
    let (setup, provider) = (Setup::with_cache(LARGE), provider(Config::default()));
    let mut first = setup.client(&provider, |_| {});
    first.rows(0..20);
    assert!(all_right(&first.answers(20).0));
    for known in [false, true] {
        for (name, change) in OTHER_ANSWERS {
            provider.reset_stats();
            let mut client = setup.client(&provider, change);
            client.rows(0..20);
            let (got, _) = client.answers(20);
            assert!(all_right(&got), "{name}: {got:?}");
            assert_eq!(reused(&got), if known { 20 } else { 0 }, "{name}");
            assert_eq!(provider.stats().requests, u64::from(!known), "{name}");
        }
    }
}

#[test]
fn a_small_cache_keeps_the_latest_and_is_right() {
    let settings = |cache| Settings { enabled: true, memory: 64 << 20, cache };
    let (setup, provider) = (Setup::with_cache(6_000), provider(Config::default()));
    let mut a = setup.client(&provider, |_| {});
    for round in 0..3 {
        a.rows(0..1_000);
        assert!(all_right(&a.answers(1_000).0), "{round}");
    }
    // From the last on: those that are kept are among the first looked up.
    a.rows(900..1_000);
    let (got, _) = a.answers(100);
    assert!(all_right(&got));
    assert!((20..=100).contains(&reused(&got)), "{}", reused(&got));
    a.rows(0..800);
    let (got, _) = a.answers(800);
    assert_eq!((all_right(&got), reused(&got)), (true, 0));
    // A larger one, made small, and made none.
    setup.configure(settings(LARGE));
    a.rows(0..1_000);
    a.answers(1_000);
    a.rows(0..1_000);
    assert_eq!(reused(&a.answers(1_000).0), 1_000);
    for (cache, most) in [(6_000, 100), (0, 0)] {
        setup.configure(settings(cache));
        a.rows(0..1_000);
        let (got, _) = a.answers(1_000);
        assert!(all_right(&got) && reused(&got) <= most, "{} of {cache} bytes", reused(&got));
    }
}

#[test]
fn what_was_given_up_is_asked_again_and_no_answer_of_others() {
    let (setup, provider) = (Setup::with_cache(LARGE), provider(Config::default()));
    let single = |s: &mut Stream| {
        (s.task.options.max_rows_per_request, s.task.options.max_attempts) = (1, 2);
        one_at_a_time(s);
    };
    let (mut a, mut b) = (setup.client(&provider, single), setup.client(&provider, single));
    let skip = |class: &str| class == "refused" || class == "no_answer";
    for (n, faults) in [
        (0, vec![Fault::Refusal]),
        (1, vec![Fault::ContentFilter]),
        (2, vec![Fault::DropId, Fault::DropId]),
        (3, vec![Fault::UnknownCode, Fault::UnknownCode]),
        (4, vec![Fault::DoubleId, Fault::DoubleId]),
        (5, vec![Fault::Status(400, json!({"error": {"message": "no"}}).to_string())]),
    ] {
        // Something has succeeded before: a request that is refused is that row's trouble.
        a.rows(100 + n..101 + n);
        a.answers(1);
        let reused_before = a.only_activity().rows_reused;
        provider.script(faults.iter().cloned().map(Some));
        provider.hold();
        a.rows(n..n + 1);
        b.rows(n..n + 1);
        b.activity();
        provider.release();
        for client in [&mut a, &mut b] {
            let (got, _) = client.answers(1);
            let o = &got[&n];
            match &o.verdict {
                Verdict::Skip { class, .. } => assert!(skip(class), "{faults:?} {o:?}"),
                Verdict::Fail { .. } => {}
                _ => panic!("{faults:?} {o:?}"),
            }
            assert!(!o.reused, "{faults:?}");
        }
        assert_eq!(a.only_activity().rows_reused, reused_before, "{faults:?}: nobody got an answer");
        b.rows(n..n + 1);
        let (got, _) = b.answers(1);
        assert!(all_right(&got) && reused(&got) == 0, "{faults:?} {got:?}");
    }
    // A text that is too long is nobody's trouble but its own.
    let long = |s: &mut Stream| s.model.max_request_tokens = 300;
    let mut c = setup.client(&provider, long);
    for _ in 0..2 {
        let text = "long ".repeat(1_000);
        c.say(&ToGateway::Items(vec![
            Item { n: 0, text: text.clone(), isolation: None, again: None },
            Item { n: 1, text, isolation: None, again: None },
        ]));
        let (got, _) = c.answers(2);
        assert!(got.values().all(|o| matches!(&o.verdict, Verdict::Skip { class, .. } if class == "too_long")));
    }
}

// Clients that leave.

/// The ways in which a client leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Leave {
    Withdraw,
    Abandon,
    Disconnect,
}

#[test]
fn who_shares_a_row_with_one_that_leaves_gets_the_answer() {
    for leave in [Leave::Withdraw, Leave::Abandon, Leave::Disconnect] {
        for under_way in [true, false] {
            let what = format!("{leave:?}, under way: {under_way}");
            let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
            provider.hold();
            let mut blocker = setup.client(&provider, |s| (s.role, s.model.max_concurrent_requests) = (11, Some(1)));
            if !under_way {
                blocker.rows(100..101);
                wait_in_flight(&provider, 1);
            }
            let (mut a, mut b) = (setup.client(&provider, one_at_a_time), setup.client(&provider, one_at_a_time));
            a.rows(0..10);
            if under_way {
                wait_in_flight(&provider, 1);
            } else {
                a.activity();
            }
            b.rows(5..10);
            b.activity();
            match leave {
                Leave::Withdraw => {
                    a.say(&ToGateway::Withdraw);
                    if under_way {
                        a.activity();
                    } else {
                        assert!(a.answers(10).0.values().all(|o| o.verdict == Verdict::Withdrawn), "{what}");
                    }
                }
                Leave::Abandon => {
                    a.say(&ToGateway::Abandon);
                    let (got, spent) = a.answers(10);
                    assert!(got.values().all(|o| o.verdict == Verdict::Withdrawn), "{what}");
                    assert_eq!(spent, Spent::default(), "{what}: the request goes on, and who stays pays");
                }
                Leave::Disconnect => {
                    drop(a.stream.shutdown(std::net::Shutdown::Both));
                    wait("it has left", || b.only_activity().roles.len(), |n| *n == 2);
                }
            }
            provider.release();
            let (got, spent) = b.answers(5);
            assert!(all_right(&got) && got.len() == 5, "{what}");
            if leave == Leave::Withdraw && under_way {
                let (of_a, spent_a) = a.answers(10);
                assert!(all_right(&of_a), "{what}");
                assert_eq!((reused(&of_a), reused(&got), spent_a.requests, spent.requests), (0, 5, 1, 0), "{what}");
            } else {
                assert_eq!((reused(&got), spent.requests), (0, 1), "{what}: who stays pays");
            }
            let stats = provider.stats();
            assert_eq!(stats.abandoned, 0, "{what}");
            let mut expected: Vec<u64> = (if under_way { 0..10 } else { 5..10 }).collect();
            expected.extend((!under_way).then_some(100));
            assert_eq!(asked(&provider), expected.into_iter().map(|n| (n, 1)).collect(), "{what}");
        }
    }
}

#[test]
fn what_nobody_waits_for_any_more_is_given_up_and_may_have_been_paid() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    provider.hold();
    let mut a = setup.client(&provider, one_at_a_time);
    let mut b = setup.client(&provider, one_at_a_time);
    a.rows(0..10);
    wait_in_flight(&provider, 1);
    a.rows(10..20);
    a.say(&ToGateway::Abandon);
    let (got, spent) = a.answers(20);
    assert!(got.values().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0));
    assert!(spent.unconfirmed_input_tokens > 100 && spent.unconfirmed_output_tokens > 10, "{spent:?}");
    assert_eq!((spent.requests, spent.input_tokens), (0, 0));
    wait("it is given up", || provider.stats().abandoned, |n| *n == 1);
    // A client that asks for the same rows later pays for them, and for nothing else.
    b.rows(0..10);
    provider.release();
    let (got, spent) = b.answers(10);
    assert!(all_right(&got));
    assert_eq!((spent.requests, spent.unconfirmed_input_tokens), (1, 0));
    // Its stream is at its end; it may open another one.
    a.say(&ToGateway::Abandon);
    a.rows(20..21);
    assert!(a.answers(1).0.values().all(|o| o.verdict == Verdict::Withdrawn));
    a.open(&provider, one_at_a_time);
    a.rows(20..21);
    let (got, spent) = a.answers(1);
    assert!(all_right(&got) && spent.unconfirmed_input_tokens == 0);
}

#[test]
fn who_comes_for_a_row_in_the_moment_its_only_client_leaves_gets_the_answer() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    for n in 0..300 {
        provider.hold();
        let (mut a, mut b) = (setup.client(&provider, somebody_waits), setup.client(&provider, somebody_waits));
        b.activity();
        a.rows(n..n + 1);
        wait_in_flight(&provider, 1);
        drop(a);
        b.rows(n..n + 1);
        b.say(&ToGateway::Activity);
        provider.release();
        let mut got = None;
        while got.is_none() {
            match b.hear("the outcome") {
                Some(FromGateway::Outcomes { outcomes, .. }) => got = outcomes.into_iter().next(),
                Some(FromGateway::Activity(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        let got = got.unwrap();
        assert!(is_right(n, &got.verdict), "round {n}: {got:?}");
    }
}

/// A client of the random test.
struct Party {
    client: Client,
    /// Its rows without an outcome, and their texts.
    pending: BTreeMap<u64, u64>,
    has_withdrawn: bool,
}

impl Party {
    /// Takes what has come for it, up to the answer to this.
    #[track_caller]
    fn catch_up(&mut self) {
        self.client.say(&ToGateway::Activity);
        while self.hear() {}
    }

    /// False if it was the activity.
    #[track_caller]
    fn hear(&mut self) -> bool {
        match self.client.hear(&format!("outcomes of {:?}", self.pending)) {
            Some(FromGateway::Outcomes { outcomes, .. }) => {
                for o in outcomes {
                    let Some(text) = self.pending.remove(&o.n) else { panic!("not asked, or twice: {o:?}") };
                    let given_back = self.has_withdrawn && o.verdict == Verdict::Withdrawn;
                    assert!(given_back || is_right(text, &o.verdict), "{text} {o:?}");
                }
                true
            }
            Some(FromGateway::Activity(_)) => false,
            other => panic!("{other:?}"),
        }
    }
}

/// Clients with the same stream and few texts come, ask, withdraw and leave while the provider holds and lets go. Texts
/// are kept apart from others, if so many kinds of them are.
fn at_random(seed: u64, may_leave: bool, faults: &[(Fault, f64)], kinds: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let cache = if random.bool() { LARGE } else { 0 };
    let provider = provider(Config { faults: faults.to_vec(), seed, ..Config::default() });
    let setup = Setup::with_cache(cache);
    let (concurrent, rows) = (random.u32(1..4), random.u32(1..6));
    let open = |client: &mut Client| {
        client.open(&provider, |s| {
            s.model.max_concurrent_requests = Some(concurrent);
            (s.task.options.max_rows_per_request, s.task.options.max_attempts) = (rows, 10);
        });
    };
    let mut parties: Vec<Party> = Vec::new();
    let (mut next_n, mut left) = (0, 0);
    for _ in 0..80 {
        let i = random.usize(0..parties.len().max(1));
        match random.u32(0..100) {
            0..15 if parties.len() < 5 => {
                let mut client = setup.connect();
                open(&mut client);
                parties.push(Party { client, pending: BTreeMap::new(), has_withdrawn: false });
            }
            0..55 => {
                if let Some(party) = parties.get_mut(i).filter(|p| !p.has_withdrawn) {
                    let rows: Vec<(u64, u64)> =
                        (0..random.u64(1..8)).map(|k| (next_n + k, random.u64(0..12))).collect();
                    next_n += 10;
                    party.pending.extend(rows.iter().copied());
                    let isolation = |t: u64| (!t.is_multiple_of(kinds)).then(|| (t % kinds).to_string());
                    party.client.isolated(rows.into_iter().map(|(n, t)| (n, t, isolation(t))));
                }
            }
            55..62 => {
                if let Some(party) = parties.get_mut(i) {
                    let abandons = may_leave && random.bool();
                    party.client.say(if abandons { &ToGateway::Abandon } else { &ToGateway::Withdraw });
                    left += u32::from(abandons);
                    party.has_withdrawn = true;
                }
            }
            62..70 if may_leave && i < parties.len() => {
                parties.swap_remove(i);
                left += 1;
            }
            70..78 => provider.hold(),
            78..88 => provider.release(),
            _ => {
                if let Some(party) = parties.get_mut(i) {
                    party.catch_up();
                    if party.has_withdrawn && party.pending.is_empty() {
                        open(&mut party.client);
                        party.has_withdrawn = false;
                    }
                }
            }
        }
    }
    provider.release();
    for party in &mut parties {
        while !party.pending.is_empty() {
            party.hear();
        }
    }
    let mut watcher = setup.connect();
    let idle =
        |all: &Vec<Activity>| all.iter().all(|a| (a.queued, a.in_flight_requests, a.in_flight_rows) == (0, 0, 0));
    wait("nothing is left", || watcher.activity(), idle);
    for party in &mut parties {
        party.catch_up();
    }
    for pack in packs(&provider) {
        assert!(pack.iter().all(|t| t % kinds == pack[0] % kinds), "{pack:?}");
    }
    let stats = provider.stats();
    // Only an answer that nobody waited for any more is paid again.
    if cache > 0 && faults.is_empty() {
        assert!(stats.rows.values().all(|row| row.asked <= 1 + left), "{:?}, {left} left", stats.rows);
    }
    assert!(may_leave || stats.abandoned == 0);
}

#[test]
fn whoever_comes_and_goes_each_row_of_who_stays_has_one_outcome() {
    let faults = [(Fault::DropId, 0.1), (Fault::EmptyAnswer, 0.05), (Fault::RateLimit429, 0.01)];
    for seed in 0..25 {
        println!("seed {seed}");
        for kinds in [1, 4] {
            at_random(seed, false, &[], kinds);
            at_random(seed, true, &[], kinds);
            at_random(seed, true, &faults, kinds);
        }
    }
}

// Turns.

#[test]
fn who_waits_is_next_whatever_a_job_has_queued() {
    let tight: [fn(&mut Stream); 2] =
        [|s| s.model.tokens_per_minute = Some(500_000), |s| s.model.requests_per_minute = Some(300)];
    for tight in tight {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        let mut waits = setup.client(&provider, |s| {
            somebody_waits(s);
            tight(s);
            s.task.options.priority = 1;
        });
        // It has had more than the job will have had, and is less important among its like.
        waits.rows(20_000..20_100);
        waits.answers(100);
        let mut job = setup.client(&provider, |s| {
            tight(s);
            s.task.options.priority = 100;
        });
        job.rows(0..4_000);
        let mut watcher = setup.connect();
        wait("the job is under way", || provider.stats().requests, |n| *n >= 5);
        for n in 10_000..10_010 {
            let before = watcher.only_activity().requests_total as usize;
            waits.rows(n..n + 1);
            waits.answers(1);
            let packs = packs(&provider);
            let at = packs.iter().position(|pack| pack.contains(&n)).unwrap();
            assert!(at <= before + 1, "it was number {at} where {before} were before");
            // In its place, and not beside what the job sent.
            assert_eq!(packs[at], [n]);
        }
        assert!(watcher.only_activity().queued > 1_000, "the job did not wait");
    }
}

#[test]
fn who_has_little_to_ask_does_not_wait_for_who_has_much() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    provider.hold();
    let mut much = setup.client(&provider, one_at_a_time);
    much.rows(0..2_000);
    wait_in_flight(&provider, 1);
    let mut little: Vec<Client> = (0..3).map(|_| setup.client(&provider, one_at_a_time)).collect();
    for (n, client) in (5_000..).zip(&mut little) {
        client.rows(n..n + 1);
        client.activity();
    }
    provider.release();
    for client in &mut little {
        assert!(all_right(&client.answers(1).0));
    }
    much.answers(2_000);
    let packs = packs(&provider);
    assert!((5_000..5_003).all(|n| packs[1].contains(&n)), "{:?}", packs[1]);
}

/// Two jobs with 2,000 rows each queued, of different roles: how many rows of the second went before the last of the
/// first. `before`: rows of the second that went while the first was open and had none.
fn rows_before(priorities: [u32; 2], before: u64) -> usize {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let mut jobs = priorities.map(|priority| {
        setup.client(&provider, |s| {
            one_at_a_time(s);
            s.task.options.priority = priority;
            s.role = priority;
        })
    });
    let [a, b] = &mut jobs;
    b.activity();
    if before > 0 {
        b.rows(20_000..20_000 + before);
        b.answers(before as usize);
    }
    provider.hold();
    // So that neither has one under way before the other has come.
    let mut blocker = setup.client(&provider, |s| (s.role, s.interactive) = (99, true));
    blocker.rows(30_000..30_001);
    wait_in_flight(&provider, 1);
    a.rows(0..2_000);
    a.activity();
    b.rows(10_000..12_000);
    b.activity();
    provider.release();
    a.answers(2_000);
    let packs = packs(&provider);
    let last = packs.iter().rposition(|pack| pack.iter().any(|n| *n < 2_000)).unwrap();
    packs[..last].iter().flatten().filter(|n| (10_000..12_000).contains(*n)).count()
}

#[test]
fn jobs_have_turns_by_their_priorities() {
    let rows = rows_before([90, 10], 0);
    assert!((150..=300).contains(&rows), "{rows} of 2,000 / 9");
    let rows = rows_before([10, 90], 0);
    assert_eq!(rows, 2_000, "the first has nine tenths of its rows left");
    let rows = rows_before([50, 51], 0);
    assert!((1_850..=2_000).contains(&rows), "{rows} of 2,000");
}

#[test]
fn who_had_nothing_to_ask_has_saved_up_nothing() {
    // The second was busy while the first was open and idle.
    let rows = rows_before([51, 50], 3_000);
    assert!((1_850..=2_000).contains(&rows), "{rows} of 2,000");
}

// Learning from the provider.

#[test]
fn requests_get_smaller_after_incomplete_answers_and_grow_back() {
    for (fault, times, most) in [(Fault::EmptyAnswer, 3, 13), (Fault::DropId, 8, 30), (Fault::MalformedJson, 4, 30)] {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        let mut client = setup.client(&provider, |s| {
            one_at_a_time(s);
            s.task.options.max_attempts = 10;
        });
        let mut watcher = setup.connect();
        client.rows(0..50);
        client.answers(50);
        assert_eq!(watcher.only_activity().rows_allowed, Some(50));
        provider.script(std::iter::repeat_n(Some(fault.clone()), times));
        client.rows(100..150);
        assert!(all_right(&client.answers(50).0), "{fault:?}");
        let allowed = watcher.only_activity().rows_allowed.unwrap();
        assert!((1..=45).contains(&allowed), "{fault:?}: {allowed}");
        let sizes: Vec<usize> = packs(&provider).iter().map(Vec::len).collect();
        let after = &sizes[1 + times..];
        assert!(sizes[1] == 50 && after[0] <= most && after.iter().min() > Some(&0), "{fault:?}: {sizes:?}");
        client.rows(1_000..3_000);
        assert!(all_right(&client.answers(2_000).0), "{fault:?}");
        let sizes: Vec<usize> = packs(&provider).iter().map(Vec::len).collect();
        let full = sizes.iter().rev().skip(1).take(10).all(|n| *n == 50);
        assert!(full && watcher.only_activity().rows_allowed == Some(50), "{fault:?}: {sizes:?}");
    }
}

#[test]
fn a_row_that_gets_no_answer_when_it_is_alone_does_not_make_others_requests_small() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let mut client = setup.client(&provider, |s| {
        one_at_a_time(s);
        s.task.options.max_attempts = 2;
    });
    client.rows(0..50);
    client.answers(50);
    for n in 1_000..1_005 {
        provider.script([Some(Fault::DropId), Some(Fault::Refusal)]);
        client.rows(n..n + 1);
        client.answers(1);
    }
    assert_eq!(client.only_activity().rows_allowed, Some(50));
}

#[test]
fn more_requests_go_at_a_time_with_answers_and_half_as_many_after_a_failure() {
    let latency = Latency { base: Duration::from_millis(20), ..Latency::default() };
    let (setup, provider) = (Setup::with_cache(0), provider(Config { latency, ..Config::default() }));
    let mut client = setup.client(&provider, |s| {
        s.model.max_concurrent_requests = None;
        s.task.options.max_rows_per_request = 10;
    });
    assert_eq!(client.only_activity().requests_allowed, 4);
    client.rows(0..1_000);
    client.answers(1_000);
    let grown = client.only_activity().requests_allowed;
    let peak = provider.stats().peak_in_flight;
    assert!(grown >= 8 && peak > 4, "{grown} {peak}");
    let mut least = grown;
    for fault in [Fault::Http503, Fault::ResetBefore, Fault::RateLimit429] {
        let before = client.only_activity().requests_allowed;
        provider.script([Some(fault.clone())]);
        client.rows(2_000..2_001);
        client.answers(1);
        let after = client.only_activity().requests_allowed;
        assert!(after == before / 2 || after == (before / 2).max(1) + 1, "{fault:?}: {before} → {after}");
        least = after;
    }
    client.rows(3_000..4_000);
    client.answers(1_000);
    let again = client.only_activity().requests_allowed;
    assert!(again > least, "{least} → {again}");
}

#[test]
fn the_cap_of_an_answer_is_tight_and_cuts_none() {
    for shape in [AnswerShape::Map, AnswerShape::Properties] {
        let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
        let mut client = setup.client(&provider, |s| s.task.options.answer_shape = shape);
        let mut n = 0;
        for (i, rows) in [50, 50, 50, 50, 1, 1, 1, 50, 3, 10, 25, 2, 50, 7].into_iter().enumerate() {
            client.rows(n..n + rows);
            let (got, spent) = client.answers(rows as usize);
            n += rows;
            assert!(all_right(&got) && got.values().all(|o| o.attempts == 1), "{shape:?} {rows}");
            let body = provider.bodies().pop().unwrap();
            let (cap, took) = (body["max_tokens"].as_u64().unwrap(), spent.output_tokens);
            assert!(took <= cap, "{shape:?}: {took} of {cap}");
            assert!(i < 4 || cap * 2 <= took * 3 + 64, "{shape:?}, {rows} rows: {took} of {cap}");
        }
    }
}

// Limits.

/// A provider that answers after a while, and keeps in 5 s what the gateway keeps in 6: on a busy machine a request may
/// get there some hundred milliseconds late. (To the millisecond it is tested with a virtual clock.)
fn limited(config: Config) -> FakeProvider {
    let latency = Latency { base: Duration::from_millis(100), ..Latency::default() };
    provider(Config { window: Duration::from_secs(5), latency, ..config })
}

/// The part of such a provider's limit that is used: five sixths of it are ours.
fn is_well_used(used: f64) -> bool {
    (0.65..=0.84).contains(&used)
}

/// Rows of the length of a short mail.
fn mails(client: &mut Client, rows: std::ops::Range<u64>) {
    let mail = |n| Item {
        n,
        text: format!("{} And so it goes on, for a line or two.{}", text(n), " More.".repeat(15)),
        isolation: None,
        again: None,
    };
    client.say(&ToGateway::Items(rows.map(mail).collect()));
}

/// Rows of two clients, which are to be more than two windows' worth; what the provider says then.
fn saturate(
    provider: &FakeProvider,
    send: fn(&mut Client, std::ops::Range<u64>),
    rows: u64,
    change: impl Fn(&mut Stream),
) -> Stats {
    let setup = Setup::with_cache(0);
    let mut clients = [0, 1].map(|_| setup.client(provider, &change));
    for (first, client) in [0, 10_000].into_iter().zip(&mut clients) {
        send(client, first..first + rows / 2);
    }
    for client in &mut clients {
        assert!(all_right(&client.answers(rows as usize / 2).0));
    }
    let mut stats = provider.stats();
    stats.rows.clear();
    stats
}

#[test]
fn a_limit_that_counts_the_cap_of_answers_is_kept_and_used() {
    let config = Config { tokens_per_window: Some(50_000), reserve: Reserve::PromptPlusMax, ..Config::default() };
    let stats = saturate(&limited(config), mails, 3_000, |s| {
        s.model.tokens_per_minute = Some(500_000);
        s.endpoint.counts = Counts::Reserved;
    });
    assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{stats:?}");
    assert!(stats.charged_tokens > 2 * 50_000 && is_well_used(stats.window_used), "{stats:?}");
}

#[test]
fn a_limit_that_counts_the_larger_of_prompt_and_cap_is_kept_and_used() {
    let config = Config { tokens_per_window: Some(50_000), reserve: Reserve::Max, ..Config::default() };
    let stats = saturate(&limited(config), Client::rows, 6_000, |s| {
        s.model.tokens_per_minute = Some(500_000);
        s.endpoint.counts = Counts::Larger;
    });
    assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{stats:?}");
    assert!(stats.charged_tokens > 3 * 50_000 / 2 && is_well_used(stats.window_used), "{stats:?}");
}

#[test]
fn limits_of_prompts_and_of_answers_are_kept_each() {
    type Send = fn(&mut Client, std::ops::Range<u64>);
    // Which is the tighter one depends on the texts.
    let cases: [([u64; 2], usize, Send, u64); 2] =
        [([50_000, 8_000], 0, mails, 2_400), ([100_000, 8_000], 1, Client::rows, 6_000)];
    for ([input, output], tight, send, rows) in cases {
        let config = Config {
            input_tokens_per_window: Some(input),
            output_tokens_per_window: Some(output),
            ..Config::default()
        };
        let stats = saturate(&limited(config), send, rows, |s| {
            s.model.input_tokens_per_minute = Some(input * 10);
            s.model.output_tokens_per_minute = Some(output * 10);
        });
        assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{stats:?}");
        let windows = (stats.last_answer_ms.unwrap() - stats.first_request_ms.unwrap()) as f64 / 5_000.0;
        let used = [(stats.prompt_tokens, input), (stats.completion_tokens, output)];
        let used = used.map(|(tokens, cap)| tokens as f64 / (cap as f64 * windows));
        println!("{used:?} in {windows} windows");
        assert!(windows > 2.0 && used[tight] >= 0.65 && used[1 - tight] < 0.65, "{used:?} {stats:?}");
    }
}

/// Half of a limit is taken by another client, and all that tells is headers: requests and refusals once the window has
/// been full for a while, and the part of the limit that both used together.
fn beside_another(rate_headers: RateHeaders) -> (u64, u64, f64) {
    let half = OtherClient { share: 0.5, ..OtherClient::default() };
    let provider = limited(Config {
        tokens_per_window: Some(50_000),
        rate_headers,
        other_client: Some(half),
        ..Config::default()
    });
    let setup = Setup::with_cache(0);
    let mut client = setup.client(&provider, |s| {
        s.model.tokens_per_minute = Some(500_000);
        // A request is to be a small part of a window of six seconds, as it is of a minute.
        s.task.options.max_rows_per_request = 20;
    });
    mails(&mut client, 0..1_800);
    let count = || {
        let stats = provider.stats();
        (stats.requests, stats.by_status.get(&429).copied().unwrap_or_default())
    };
    let (start, mut at_first, mut answered) = (Instant::now(), (0, 0), 0);
    while answered < 1_800 {
        match client.hear("outcomes") {
            Some(FromGateway::Outcomes { outcomes, .. }) => {
                assert!(outcomes.iter().all(|o| is_right(o.n, &o.verdict)));
                answered += outcomes.len();
            }
            other => panic!("{other:?}"),
        }
        if start.elapsed() < Duration::from_secs(12) {
            at_first = count();
        }
    }
    let heeded = client.only_activity().reported_left;
    assert!(heeded.is_some(), "what the headers say is not heeded");
    let (requests, refused) = count();
    println!("{rate_headers:?}: {at_first:?} at first, {requests} and {refused} in all");
    (requests - at_first.0, refused - at_first.1, provider.stats().window_used_all)
}

#[test]
fn headers_tell_what_another_client_leaves() {
    let (requests, refused, used) = beside_another(RateHeaders::OpenAi);
    assert!(requests >= 50 && refused * 50 <= requests, "{refused} of {requests} requests were refused");
    // Half a minute, of which the first windows are spent on finding out.
    assert!(used >= 0.7, "{used}");
}
