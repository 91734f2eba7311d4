//! Bounds on all that takes a file: a model that does not answer, or a role that asks too much, leaves places for
//! others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llm_batch_core::task::Spec;
use llm_batch_gateway::Places;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Latency};
use support::*;

const FEW: Places = Places { sessions: 8, of_a_role: 6, others: 4, requests: 64, connections: 80 };

/// Files are counted of the whole process: tests run one by one.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Open files of this process.
fn files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One row a request, as many requests at once as it can get.
fn many(s: &mut Stream) {
    s.task.options.max_rows_per_request = 1;
    s.model.requests_per_minute = Some(1_000_000);
    s.model.max_concurrent_requests = None;
    s.model.request_timeout_ms = 300_000;
}

/// The median and the 95th percentile of how long a session waits for a row, in ms.
fn pace(client: &mut Client, first: u64) -> (u128, u128) {
    let mut times = Vec::new();
    for n in first..first + 20 {
        let start = Instant::now();
        client.rows(n..n + 1);
        assert!(client.outcomes(1).0.iter().all(|(n, verdict)| is_right(*n, verdict)));
        times.push(start.elapsed().as_millis());
    }
    times.sort_unstable();
    (times[10], times[18])
}

fn in_flight(client: &mut Client) -> Vec<u64> {
    client.activity().iter().filter(|a| a.model != "healthy").map(|a| a.in_flight_requests).collect()
}

/// Six models of a server that stops answering, each with more rows than it may have requests.
fn silent_models(setup: &Setup, bad: &FakeProvider, account: fn(usize) -> Option<String>) -> Vec<Client> {
    let mut models: Vec<Client> = (0..6)
        .map(|i| {
            setup.client(bad, |s| {
                many(s);
                (s.model.model, s.endpoint.account) = (format!("silent{i}"), account(i));
            })
        })
        .collect();
    // A model that has answered nothing yet gets few requests.
    for client in &mut models {
        client.rows(1000..1004);
        client.outcomes(4);
    }
    bad.hold();
    for client in &mut models {
        client.rows(0..300);
        // One after the other: the first have taken what they can get before the last come.
        client.activity();
    }
    models
}

#[test]
fn models_that_do_not_answer_leave_places_for_others() {
    let _alone = alone();
    let latency = Latency { base: Duration::from_millis(100), ..Latency::default() };
    let (good, bad) = (provider(Config { latency, ..Config::default() }), provider(Config::default()));
    // First one account, which has half of the places; then one for each.
    let accounts: [fn(usize) -> Option<String>; 2] = [|_| None, |i| Some(format!("account {i}"))];
    for (account, most) in accounts.into_iter().zip([32, 63]) {
        let setup = Setup::within(Places { others: 10, ..FEW });
        let healthy = |s: &mut Stream| (s.interactive, s.model.model) = (true, "healthy".into());
        let mut session = setup.client(&good, healthy);
        let alone = pace(&mut session, 0);
        let before = files();
        let mut silent = silent_models(&setup, &bad, account);
        wait("each has something", || in_flight(&mut session), |n| n.len() == 6 && n.iter().all(|n| *n > 0));
        // Once is enough: other programs may be busy too.
        let is_undisturbed = (1..4).any(|round| {
            let among = pace(&mut session, 1000 * round);
            println!("alone {alone:?} ms, among silent models {among:?} ms, {:?} under way", in_flight(&mut session));
            2 * among.0 <= 3 * alone.0 && 2 * among.1 <= 3 * alone.1
        });
        assert!(is_undisturbed, "{alone:?} alone");
        let under_way = in_flight(&mut session);
        assert!(
            under_way.iter().sum::<u64>() <= most && under_way.iter().all(|n| (1..=8).contains(n)),
            "{under_way:?}"
        );
        // Both ends of a connection are in this process.
        let more = files() - before;
        assert!(more <= 2 * (silent.len() + FEW.connections), "{more} files");
        // A further model, and one that has more to ask: a job of many rows.
        let mut job = setup.client(&good, |s| {
            many(s);
            s.model.model = "another".into();
        });
        job.rows(0..100);
        assert_eq!(job.outcomes(100).0.len(), 100);
        bad.release();
        for client in &mut silent {
            client.outcomes(300);
        }
    }
}

#[test]
fn the_next_place_is_the_lanes_that_has_the_fewest() {
    let _alone = alone();
    let (first, others) = (provider(Config::default()), provider(Config::default()));
    // One for each of four.
    let setup = Setup::within(Places { requests: 4, ..FEW });
    let open = |provider: &FakeProvider, model: &str| {
        let mut client = setup.client(provider, |s| {
            many(s);
            (s.model.model, s.endpoint.account) = (model.into(), Some(model.into()));
        });
        client.rows(0..40);
        client.activity();
        client
    };
    first.hold();
    others.hold();
    let mut all = [open(&first, "a"), open(&others, "b"), open(&others, "c"), open(&others, "d")];
    wait("each has its place", || in_flight(&mut all[0]), |n| *n == [1, 1, 1, 1]);
    let mut last = open(&first, "e");
    assert_eq!(in_flight(&mut last), [1, 1, 1, 1, 0]);
    // From now on one place is free at a time: two models take turns.
    first.release();
    let (mut done, mut got) = ([0, 0], 0);
    while got < 80 {
        for (client, done) in [&mut all[0], &mut last].into_iter().zip(&mut done) {
            client.say(&ToGateway::Activity);
            while let Some(FromGateway::Outcomes { outcomes, .. }) = client.hear("outcomes or the activity") {
                *done += outcomes.len();
            }
        }
        got = done[0] + done[1];
        assert!(done[0].abs_diff(done[1]) <= 5, "{done:?}");
    }
    others.release();
    for client in &mut all[1..] {
        assert_eq!(client.outcomes(40).0.len(), 40);
    }
}

#[test]
fn connections_are_no_more_than_there_are_places() {
    let _alone = alone();
    // Kept ones of providers that are not asked any more give way.
    let setup = Setup::within(Places { sessions: 1000, of_a_role: 1000, requests: 30, connections: 6, ..FEW });
    let providers: Vec<FakeProvider> = (0..5).map(|_| provider(Config::default())).collect();
    let before = files();
    for round in 0..3 {
        for provider in &providers {
            let mut client = setup.client(provider, many);
            client.rows(round * 100..round * 100 + 60);
            assert_eq!(client.outcomes(60).0.len(), 60);
            let more = files() - before;
            // Both ends of each, and of the client's; the provider may not have noticed that one was closed.
            assert!(more <= 2 * (6 + 1) + 6, "{more} files");
        }
    }
}

fn role(role: u32) -> impl Fn(&mut Stream) {
    move |s| {
        (s.interactive, s.role) = (true, role);
        s.model.max_concurrent_requests = Some(1);
        s.task.options.max_rows_per_request = 1;
    }
}

/// The stop of a client that found no place: it has sent more by then, or finds the connection closed.
fn refused(client: &mut Client) -> Full {
    let row = Item { n: 1, text: text(1), isolation: None, again: None };
    let _ = client.stream.write_all(&encode(&ToGateway::Items(vec![row])).unwrap());
    match client.hear("a refusal") {
        Some(FromGateway::Full(full)) => full,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn sessions_have_places_by_role_and_jobs_have_others() {
    let _alone = alone();
    let provider = provider(Config::default());
    let setup = Setup::within(FEW);
    provider.hold();
    let open = |n: u64, by: u32| {
        let mut client = setup.client(&provider, role(by));
        client.rows(n..n + 1);
        client
    };
    let mut busy: Vec<Client> = (0..6).map(|n| open(n, 1)).collect();
    busy.iter_mut().for_each(|client| drop(client.activity()));
    // The role has its places. Unread messages keep no client from reading why.
    for _ in 0..100 {
        let mut offender = setup.client(&provider, role(1));
        assert_eq!(refused(&mut offender), Full::Role(6));
        assert_eq!(offender.hear("the end"), None);
    }
    // Another role has the places that are left.
    busy.extend((7..9).map(|n| open(n, 2)));
    busy.iter_mut().for_each(|client| drop(client.activity()));
    let mut late = setup.client(&provider, role(3));
    assert_eq!(refused(&mut late), Full::Gateway(8));
    // Jobs, and who asks what is going on, have others.
    let mut jobs: Vec<Client> = (10..13)
        .map(|n| {
            let mut job = setup.client(&provider, |s| s.role = 1);
            job.rows(n..n + 1);
            job
        })
        .collect();
    assert!(!setup.connect().activity().is_empty());
    jobs.iter_mut().for_each(|client| drop(client.activity()));
    // No place at all: it is said, and nobody else notices.
    let mut last = setup.connect();
    assert!(!last.activity().is_empty());
    let mut beyond = setup.connect();
    assert_eq!(refused(&mut beyond), Full::Gateway(12));
    assert_eq!(beyond.hear("the end"), None);
    drop(last);
    provider.release();
    for client in busy.iter_mut().chain(&mut jobs) {
        assert_eq!(client.outcomes(1).0.len(), 1);
    }
}

#[test]
fn an_idle_session_gives_way() {
    let _alone = alone();
    let provider = provider(Config::default());
    let setup = Setup::within(Places { of_a_role: 3, ..FEW });
    let mut clients: Vec<Client> = (0..3).map(|_| setup.client(&provider, role(1))).collect();
    for (n, client) in (0..).zip(&mut clients) {
        client.rows(n..n + 1);
        client.outcomes(1);
    }
    provider.hold();
    clients[0].rows(10..11);
    wait_in_flight(&provider, 1);
    // The second one has been idle for longest, when all that are idle have been for long enough.
    let mut new = wait(
        "one gives way",
        || {
            let mut client = setup.client(&provider, role(1));
            let _ = client.stream.write_all(&encode(&ToGateway::Activity).unwrap());
            matches!(client.hear("an answer"), Some(FromGateway::Activity(_))).then_some(client)
        },
        Option::is_some,
    )
    .unwrap();
    assert_eq!(clients[1].hear("the end"), None);
    provider.release();
    new.rows(20..21);
    assert_eq!(new.outcomes(1).0.len(), 1);
    assert_eq!(clients[0].outcomes(1).0.len(), 1);
    // The third one still has its place.
    clients[2].rows(30..31);
    assert_eq!(clients[2].outcomes(1).0.len(), 1);
}

/// Sessions' tasks are kept as long as their streams are open. Idle ones are let go, and there is a bound.
#[test]
fn large_tasks_leave_room_for_others() {
    let _alone = alone();
    let provider = provider(Config::default());
    let setup = Setup::new(4 << 20);
    let open = |n: u64, by: u32| {
        let mut client = setup.client(&provider, |s| {
            role(by)(s);
            s.model.max_request_tokens = MAX_REQUEST_TOKENS;
            if let Spec::Classify(task) = &mut s.task.spec {
                task.instruction = format!("{n} {}", "Tickets of a web shop. ".repeat(10_000));
            }
        });
        // A client that found no place may find the connection closed.
        let row = Item { n, text: text(n), isolation: None, again: None };
        for message in [ToGateway::Items(vec![row]), ToGateway::Activity] {
            let _ = client.stream.write_all(&encode(&message).unwrap());
        }
        client
    };
    provider.hold();
    let mut busy: Vec<Client> = Vec::new();
    let full = loop {
        let mut client = open(busy.len() as u64, 1);
        match client.hear("the activity or a refusal") {
            Some(FromGateway::Activity(_)) => busy.push(client),
            Some(FromGateway::Full(full)) => break full,
            other => panic!("{other:?}"),
        }
        assert!(busy.len() < 20, "there is no bound");
    };
    println!("{} streams, {full:?}", busy.len());
    // Of a role they have three quarters of it.
    assert!(busy.len() > 1 && full == Full::Memory(3 << 20), "{full:?}");
    let mut other = open(200, 2);
    assert!(matches!(other.hear("the activity"), Some(FromGateway::Activity(_))));
    busy.push(other);
    provider.release();
    for client in &mut busy {
        assert_eq!(client.outcomes(1).0.len(), 1);
    }
    wait(
        "one gives way",
        || {
            let mut client = open(100, 1);
            !matches!(client.hear("an answer"), Some(FromGateway::Full(_)))
        },
        |is_in| *is_in,
    );
}

/// A provider has a request under way that hangs, and connections without one.
#[test]
fn connections_without_a_request_give_way() {
    let _alone = alone();
    let (first, second) = (provider(Config::default()), provider(Config::default()));
    let setup = Setup::within(Places { requests: 64, connections: 10, ..FEW });
    let open = |provider: &FakeProvider, model: &str| {
        setup.client(provider, |s| {
            many(s);
            (s.model.model, s.endpoint.account) = (model.into(), Some(model.into()));
        })
    };
    let (mut one, mut other) = (open(&first, "one"), open(&second, "other"));
    // A model that has answered nothing yet gets few requests.
    for client in [&mut one, &mut other] {
        client.rows(0..1);
        client.outcomes(1);
    }
    first.hold();
    one.rows(10..18);
    wait_in_flight(&first, 8);
    first.release();
    one.outcomes(8);
    first.hold();
    one.rows(20..21);
    wait_in_flight(&first, 1);
    second.hold();
    other.rows(10..18);
    wait_in_flight(&second, 8);
    let seen = other.activity();
    assert!(seen.iter().all(|a| a.errors == 0), "{seen:?}");
    first.release();
    second.release();
    assert_eq!((one.outcomes(1).0.len(), other.outcomes(8).0.len()), (1, 8));
}

#[test]
fn a_request_that_waits_for_a_connection_in_vain_was_never_sent() {
    let _alone = alone();
    let (first, second) = (provider(Config::default()), provider(Config::default()));
    let setup = Setup::within(Places { requests: 64, connections: 1, ..FEW });
    first.hold();
    let mut one = setup.client(&first, |s| s.endpoint.account = Some("one".into()));
    one.rows(0..1);
    wait_in_flight(&first, 1);
    let mut other = setup.client(&second, |s| {
        many(s);
        (s.model.model, s.endpoint.account) = ("other".into(), Some("other".into()));
        s.model.request_timeout_ms = 500;
        s.budget = Some(Prices { input: 1, output: 4 });
    });
    other.say(&ToGateway::Allow(Allowance { cost: 1 << 40, tokens: 1 << 40 }));
    other.rows(10..12);
    let mut seen = || other.activity().into_iter().find(|a| a.model == "other").unwrap();
    let seen = wait("it was tried", &mut seen, |a| a.requests_total >= 8);
    assert_eq!((seen.errors, seen.breaker), (0, llm_batch_core::breaker::State::Closed), "{seen:?}");
    first.release();
    let (got, spent) = other.answers(2);
    assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{got:?}");
    assert_eq!((spent.requests, spent.unconfirmed_input_tokens, spent.unconfirmed_output_tokens), (2, 0, 0));
    assert_eq!(one.outcomes(1).0.len(), 1);
}
