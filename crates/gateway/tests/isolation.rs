//! Rows that are kept apart: never in a request, nor with an answer, of rows with another value.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;

use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, Fault};
use support::*;

/// Enough for all answers of a test.
const LARGE: usize = 1 << 20;

/// The isolation of row n: one of five values, of which one is none and one is empty.
fn isolation(n: u64) -> Option<String> {
    [None, Some(String::new()), Some("a".into()), Some("a\"\n'".into()), Some("x".repeat(1 << 12))][n as usize % 5]
        .clone()
}

#[test]
fn no_request_has_rows_of_two_values() {
    let faults = vec![(Fault::DropId, 0.2), (Fault::InventId, 0.05), (Fault::DoubleId, 0.05), (Fault::Prose, 0.05)];
    let provider = provider(Config { faults, ..Config::default() });
    let setup = Setup::with_cache(LARGE);
    // Some of a job, some that somebody waits for, of two sessions each.
    let mut clients: Vec<Client> = [false, false, true, true]
        .map(|interactive| {
            setup.client(&provider, |s| (s.interactive, s.task.options.max_attempts) = (interactive, 10))
        })
        .into();
    provider.hold();
    for (client, first) in clients.iter_mut().zip([0, 1_000, 2_000, 3_000]) {
        client.isolated((first..first + 200).map(|n| (n, n, isolation(n))));
        client.activity();
    }
    provider.release();
    for mut client in clients {
        let mut got = client.answers(200).0;
        got.retain(|n, o| !is_right(*n, &o.verdict));
        assert!(got.is_empty(), "{got:?}");
    }
    let packs = packs(&provider);
    assert!(packs.iter().any(|pack| pack.len() > 10), "rows of one value do share: {packs:?}");
    for pack in packs {
        assert!(pack.iter().all(|n| n % 5 == pack[0] % 5), "{pack:?}");
    }
}

#[test]
fn the_same_text_is_asked_once_for_each_value() {
    for cache in [0, LARGE] {
        let (setup, provider) = (Setup::with_cache(cache), provider(Config::default()));
        let (mut a, mut b) = (setup.client(&provider, |_| {}), setup.client(&provider, |_| {}));
        provider.hold();
        a.isolated((0..10).map(|n| (n, 7, isolation(n))));
        b.isolated((0..5).map(|n| (n, 7, isolation(n))));
        b.activity();
        a.activity();
        provider.release();
        let (of_a, of_b) = (a.answers(10).0, b.answers(5).0);
        assert!(of_a.values().chain(of_b.values()).all(|o| is_right(7, &o.verdict)));
        assert_eq!(of_a.values().chain(of_b.values()).filter(|o| !o.reused).count(), 5);
        assert_eq!(asked(&provider), BTreeMap::from([(7, 5)]), "once for each of five values");
        // Later.
        b.isolated([(9, 7, Some("a".into())), (10, 7, Some("another".into()))]);
        let later = b.answers(2).0;
        assert_eq!((later[&9].reused, later[&10].reused), (cache > 0, false));
    }
}

#[test]
fn who_has_one_value_waits_no_longer_for_who_has_thousands() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let one_at_a_time = |s: &mut Stream| s.model.max_concurrent_requests = Some(1);
    provider.hold();
    let mut much = setup.client(&provider, one_at_a_time);
    much.isolated((0..3_000).map(|n| (n, n, Some(n.to_string()))));
    wait_in_flight(&provider, 1);
    let mut little: Vec<Client> = (0..3).map(|_| setup.client(&provider, one_at_a_time)).collect();
    for (n, client) in (5_000..).zip(&mut little) {
        client.isolated([(n, n, Some("mine".into())), (n + 10, n + 10, Some("mine".into()))]);
        client.activity();
    }
    provider.release();
    for client in &mut little {
        assert!(client.answers(2).0.iter().all(|(n, o)| is_right(*n, &o.verdict)));
    }
    let packs = packs(&provider);
    let at = packs.iter().position(|pack| pack[0] >= 5_000).unwrap();
    assert!(at <= 2 && packs[at].len() == 6, "{:?}", &packs[..4]);
    assert!(much.answers(3_000).0.iter().all(|(n, o)| is_right(*n, &o.verdict)));
}

#[test]
fn an_estimate_counts_requests_by_value() {
    let (setup, provider) = (Setup::with_cache(0), provider(Config::default()));
    let mut client = setup.client(&provider, |_| {});
    for (values, requests) in [(1, 4), (10, 10), (100, 100), (200, 200)] {
        let item = |n: u64| Item { n, text: text(n), isolation: Some((n % values).to_string()), again: None };
        client.say(&ToGateway::Estimate((0..200).map(item).collect()));
        match client.hear("the estimate") {
            Some(FromGateway::Estimated(estimate)) => assert_eq!((estimate.rows, estimate.requests), (200, requests)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(provider.stats().requests, 0);
}

/// A provider's words may quote a row: other roles that use the model are told only their class and status.
#[test]
fn what_a_provider_says_of_a_row_is_told_its_role_alone() {
    for (status, faults) in [(402, 1), (429, 1), (500, 50)] {
        let (setup, provider) = (Setup::new(64 << 20), provider(Config::default()));
        let said = "{\"error\": {\"code\": \"insufficient_quota\", \"message\": \"bad input: row #r1:bug# secret\"}}";
        provider.script(vec![Some(Fault::Status(status, said.to_owned())); faults]);
        let role = |role: u32| move |s: &mut Stream| s.role = role;
        let mut mine = setup.client(&provider, role(10));
        let mut other = setup.client(&provider, role(11));
        let heard = |client: &mut Client| loop {
            match client.hear("the stop") {
                Some(FromGateway::Stopped(stop)) => break stop.message,
                Some(FromGateway::Outcomes { .. }) => {}
                other => panic!("{other:?}"),
            }
        };
        mine.rows(0..1);
        assert!(heard(&mut mine).contains("secret"), "{status}");
        // A stop of the whole model reaches those who wait, one of the endpoint those who come.
        if status == 500 {
            other.rows(5..6);
        }
        assert_eq!(heard(&mut other), format!("HTTP status {status}"));
        let seen = setup.connect().only_activity().last_error.unwrap();
        assert_eq!((seen.role, seen.shown(false)), (10, format!("HTTP status {status}").as_str()));
        assert!(seen.shown(true).contains("secret"), "{seen:?}");
    }
}
