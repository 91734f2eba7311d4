//! A server that does not answer is left alone, and found again when it does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use llm_batch_core::breaker::State;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, Stats};
use support::*;

/// The fate of rows: either all are done with, or the stream was stopped and the rest came back.
struct Round {
    outcomes: Vec<Outcome>,
    stop: Option<Stop>,
}

#[track_caller]
fn round(client: &mut Client, rows: usize) -> Round {
    let mut round = Round { outcomes: Vec::new(), stop: None };
    while round.outcomes.len() < rows || (round.stop.is_none() && has_withdrawn(&round.outcomes)) {
        match client.hear(&format!("{rows} outcomes, have {}", round.outcomes.len())) {
            Some(FromGateway::Outcomes { outcomes, .. }) => round.outcomes.extend(outcomes),
            Some(FromGateway::Stopped(stop)) => round.stop = Some(stop),
            other => panic!("{other:?}"),
        }
    }
    round
}

fn has_withdrawn(outcomes: &[Outcome]) -> bool {
    outcomes.iter().any(|o| o.verdict == Verdict::Withdrawn)
}

/// A stream of a model, asked row by row.
fn single(setup: &Setup, provider: &FakeProvider, model: &str, rows_per_request: u32) -> Client {
    setup.client(provider, |s| {
        s.model.model = model.into();
        s.task.options.max_rows_per_request = rows_per_request;
    })
}

/// Asks for rows as a job does: what is given back comes again when it is time.
#[track_caller]
fn until_done(client: &mut Client, change: impl Fn(&mut Stream), provider: &FakeProvider, rows: &[u64]) {
    let mut left: Vec<u64> = rows.to_vec();
    let start = Instant::now();
    while !left.is_empty() {
        assert!(start.elapsed() < Duration::from_secs(120), "{} rows are left", left.len());
        client.open(provider, &change);
        client.texts(left.iter().map(|n| (*n, *n)));
        let round = round(client, left.len());
        for o in &round.outcomes {
            assert!(is_right(o.n, &o.verdict) || o.verdict == Verdict::Withdrawn, "{o:?}");
        }
        left = round.outcomes.iter().filter(|o| o.verdict == Verdict::Withdrawn).map(|o| o.n).collect();
        if let Some(stop) = round.stop {
            assert_eq!(stop.reason, StopReason::ProviderDown);
            std::thread::sleep(Duration::from_millis(stop.retry_after_ms.unwrap()));
        }
    }
}

fn requests(stats: &Stats) -> u64 {
    stats.requests
}

#[test]
fn a_server_that_is_down_is_left_alone_and_found_again() {
    let setup = Setup::new(64 << 20);
    for fault in [Fault::ResetBefore, Fault::Http503] {
        let provider = provider(Config { faults: vec![(fault.clone(), 1.0)], ..Config::default() });
        let rows = |model: u64| (model * 1000..model * 1000 + 50).collect::<Vec<_>>();
        let mut clients = [single(&setup, &provider, "a", 5), single(&setup, &provider, "b", 5)];
        for (i, client) in clients.iter_mut().enumerate() {
            client.texts(rows(i as u64).into_iter().map(|n| (n, n)));
        }
        for client in &mut clients {
            let round = round(client, 50);
            assert!(round.outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0));
            let stop = round.stop.unwrap();
            assert_eq!(stop.reason, StopReason::ProviderDown);
            assert!(!stop.message.is_empty() && stop.retry_after_ms.is_some_and(|ms| ms <= 30_000), "{stop:?}");
        }
        // Twenty requests would be 20 at once; four of each model are under way before the first has failed, five are
        // enough to know, and one is a probe.
        let sent = requests(&provider.stats());
        assert!((5..=12).contains(&sent), "{fault}: {sent} requests");

        // Nothing but probes is sent from now on, whoever asks: 2, 4, 8, … s apart.
        let start = Instant::now();
        for n in 0..20 {
            let mut other = single(&setup, &provider, ["a", "b", "c"][n % 3], 5);
            other.rows(0..10);
            let round = round(&mut other, 10);
            assert!(round.outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn));
            assert_eq!(round.stop.unwrap().reason, StopReason::ProviderDown);
            let activity = other.activity().into_iter().find(|a| a.account == provider.base_url()).unwrap();
            assert!(activity.breaker != State::Closed || n % 3 == 2, "{activity:?}");
        }
        let probes = requests(&provider.stats()) - sent;
        assert!(probes <= 1 + start.elapsed().as_secs() / 2, "{fault}: {probes} probes in {:?}", start.elapsed());

        // It comes back: all are answered, once each.
        provider.configure(|c| c.faults.clear());
        std::thread::scope(|scope| {
            for (i, client) in clients.iter_mut().enumerate() {
                let (provider, rows) = (&provider, rows(i as u64));
                scope.spawn(move || {
                    let model = ["a", "b"][i];
                    until_done(client, |s| s.model.model = model.into(), provider, &rows);
                });
            }
        });
        assert!(provider.stats().rows.values().all(|row| (row.asked, row.answered) == (1, 1)));
        assert_eq!(provider.stats().rows.len(), 100);
        let activity = clients[0].activity();
        let mine: Vec<_> = activity.iter().filter(|a| a.account == provider.base_url()).collect();
        assert!(mine.iter().all(|a| a.breaker == State::Closed), "{mine:?}");
    }
    let lines: Vec<String> = setup.log.try_iter().collect();
    let again = lines.iter().filter(|l| l.contains("answers again")).count();
    assert!((2..=4).contains(&again), "{lines:#?}");
    assert!(lines.len() <= 2 * 2 * 3, "{lines:#?}");
}

#[test]
fn what_is_open_says_until_when_and_a_new_statement_does_not_wait() {
    let (setup, provider) = (Setup::new(64 << 20), provider(Config::default()));
    provider.configure(|c| c.faults = vec![(Fault::Http500, 1.0)]);
    let mut client = single(&setup, &provider, "m", 50);
    client.rows(0..10);
    round(&mut client, 10);
    let seen = client.only_activity();
    assert!(seen.breaker == State::Open && seen.waiting_ms.is_some_and(|ms| ms <= 30_000), "{seen:?}");
    assert!(seen.last_error.is_some_and(|e| e.message.contains("500")) && seen.errors >= 5);
    // A statement of another kind, of a model that has never been asked.
    let sent = requests(&provider.stats());
    let mut other = setup.client(&provider, |s| (s.interactive, s.model.model) = (true, "n".into()));
    other.rows(0..1);
    let round = round(&mut other, 1);
    let stop = round.stop.unwrap();
    assert!(stop.reason == StopReason::ProviderDown && stop.message.contains("500"), "{stop:?}");
    assert!(requests(&provider.stats()) <= sent + 1);
    // A client that asks whether the model answers is told at once, and that closes the circuit.
    provider.configure(|c| c.faults.clear());
    client.open(&provider, |_| {});
    client.say(&ToGateway::Probe);
    assert!(matches!(client.hear("the probe's answer"), Some(FromGateway::Probed(None))));
    assert_eq!(client.activity()[0].breaker, State::Closed);
    client.rows(0..10);
    assert!(client.outcomes(10).0.iter().all(|(n, v)| is_right(*n, v)));
}

#[test]
fn a_hang_opens_the_circuit_and_the_probe_hangs_no_longer_than_a_request() {
    let (setup, provider) = (Setup::new(64 << 20), provider(Config::default()));
    provider.configure(|c| c.faults = vec![(Fault::Hang, 1.0)]);
    let mut client = setup.client(&provider, |s| s.model.request_timeout_ms = 700);
    client.rows(0..200);
    let round = round(&mut client, 200);
    assert!(round.stop.is_some_and(|s| s.message.contains("timed out")));
    // Four at once, each worth two points, and the probe; a few more if one is given up long before the others.
    let stats = provider.stats();
    assert!((5..=7).contains(&stats.requests) && stats.probes == 1, "{stats:?}");
    wait("all hung requests are given up", || provider.stats().abandoned, |n| *n == stats.requests);
}

#[test]
fn a_row_that_is_alone_is_not_blamed_for_a_server_that_is_down() {
    let (setup, provider) = (Setup::new(64 << 20), provider(Config::default()));
    provider.configure(|c| c.faults = vec![(Fault::Http503, 1.0)]);
    let mut client = single(&setup, &provider, "m", 1);
    client.rows(0..1);
    let round = round(&mut client, 1);
    assert_eq!(round.stop.map(|s| s.reason), Some(StopReason::ProviderDown));
    assert_eq!((&round.outcomes[0].verdict, round.outcomes[0].attempts), (&Verdict::Withdrawn, 0));
}

#[test]
fn a_row_that_breaks_the_server_fails_alone() {
    for rows in [1..2, 0..50] {
        let provider = provider(Config { poison: Some("#r1:bug#".into()), ..Config::default() });
        let setup = Setup::new(64 << 20);
        let mut client = setup.client(&provider, |_| {});
        client.rows(rows.clone());
        let n = (rows.end - rows.start) as usize;
        let round = round(&mut client, n);
        assert!(round.stop.is_none(), "the provider is not down: {:?}", round.stop);
        for o in &round.outcomes {
            match &o.verdict {
                Verdict::Fail { class, .. } if o.n == 1 => assert_eq!(class, "provider_error"),
                verdict => assert!(o.n != 1 && is_right(o.n, verdict), "{o:?}"),
            }
        }
        assert!(provider.stats().rows.values().all(|row| (row.asked, row.answered) == (1, 1)));
        assert_eq!(provider.stats().rows.len(), n - 1);
    }
}

#[test]
fn a_model_that_is_broken_leaves_the_others_alone() {
    let (setup, provider) =
        (Setup::new(64 << 20), provider(Config { poison: Some(r#""model":"broken""#.into()), ..Config::default() }));
    // It opens the endpoint's circuit too: nothing else has been asked.
    let mut broken = single(&setup, &provider, "broken", 10);
    broken.rows(0..50);
    let first = round(&mut broken, 50);
    assert!(first.stop.is_some_and(|s| s.reason == StopReason::ProviderDown));
    let mut sound = single(&setup, &provider, "sound", 10);
    let rows: Vec<u64> = (100..150).collect();
    until_done(&mut sound, |s| s.model.model = "sound".into(), &provider, &rows);
    let states: BTreeMap<String, State> = sound.activity().into_iter().map(|a| (a.model, a.breaker)).collect();
    assert_eq!(states["sound"], State::Closed);
    assert_ne!(states["broken"], State::Closed);
    // The broken one's rows are not given up, and its probes do not stop the other.
    let before = provider.stats().by_status[&500];
    broken.open(&provider, |s| s.model.model = "broken".into());
    broken.rows(0..50);
    let second = round(&mut broken, 50);
    assert!(second.outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn));
    assert!(provider.stats().by_status[&500] <= before + 2);
    sound.rows(200..250);
    assert!(sound.outcomes(50).0.iter().all(|(n, v)| is_right(*n, v)));
}

#[test]
fn a_probe_that_is_given_up_decides_nothing() {
    let (setup, provider) = (Setup::new(64 << 20), provider(Config::default()));
    provider.configure(|c| c.faults = vec![(Fault::Hang, 1.0)]);
    let mut client = setup.client(&provider, |s| s.model.request_timeout_ms = 700);
    client.rows(0..200);
    wait("the probe is sent", || provider.stats().probes, |n| *n == 1);
    setup.configure(llm_batch_gateway::Settings { enabled: false, memory: 64 << 20, cache: 0 });
    let round = round(&mut client, 200);
    assert_eq!(round.stop.unwrap().reason, StopReason::Disabled);
    wait("the probe is given up too", || provider.stats(), |s| s.abandoned == s.requests);
    setup.configure(llm_batch_gateway::Settings { enabled: true, memory: 64 << 20, cache: 0 });
    provider.configure(|c| c.faults.clear());
    until_done(&mut client, |_| {}, &provider, &(0..200).collect::<Vec<_>>());
}
