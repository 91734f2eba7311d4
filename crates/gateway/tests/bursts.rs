//! A waiting session that comes to an idle limit is not paced; a gateway knows what the one before it has sent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use llm_batch_gateway::Stock;
use llm_fake_provider::{Config, FakeProvider, RateHeaders};
use support::*;

/// Tokens that 6 s let through, and a ninth.
const AT_ONCE: u64 = 55_555;

fn limited(window: u64, rate_headers: RateHeaders) -> FakeProvider {
    let window = Duration::from_secs(window);
    let tokens_per_window = Some(500_000 * window.as_secs() / 60);
    provider(Config { window, tokens_per_window, rate_headers, ..Config::default() })
}

/// A gateway after one that sent nothing in its last minute.
fn rested() -> Setup {
    Setup::after(Stock { known_for: 70_000, lanes: vec![] })
}

fn session(setup: &Setup, provider: &FakeProvider) -> Client {
    setup.client(provider, |s| {
        s.interactive = true;
        s.model.tokens_per_minute = Some(500_000);
        s.model.max_concurrent_requests = None;
    })
}

/// A session whose task was answered a moment ago: otherwise eight requests go ahead.
fn proven(setup: &Setup, provider: &FakeProvider, row: u64) -> Client {
    let mut client = session(setup, provider);
    client.rows(row..row + 1);
    client.outcomes(1);
    client
}

#[track_caller]
fn under_way(provider: &FakeProvider, wanted: u64) {
    wait_until("requests are under way", || provider.stats().in_flight >= wanted);
}

#[test]
fn all_of_a_statement_goes_at_once_where_nothing_was_sent_within_a_minute() {
    let (setup, provider) = (rested(), limited(60, RateHeaders::None));
    let mut client = proven(&setup, &provider, 0);
    provider.hold();
    client.rows(1..951);
    under_way(&provider, 19);
    provider.release();
    client.outcomes(950);
    assert_eq!(provider.stats().by_status.keys().collect::<Vec<_>>(), [&200]);
}

#[test]
fn a_gateway_knows_what_the_one_before_has_sent() {
    let provider = limited(60, RateHeaders::None);
    let setup = rested();
    let mut client = proven(&setup, &provider, 0);
    provider.hold();
    client.rows(1..951);
    under_way(&provider, 19);
    let stock = setup.stock();
    assert_eq!((stock.lanes.len(), stock.known_for >= 70_000), (1, true));
    drop((client, setup));

    // Requests under way count: no more than a burst goes, both together.
    let setup = Setup::after(stock.clone());
    let mut client = session(&setup, &provider);
    client.rows(2000..4000);
    wait_until("the rest of the burst is sent", || provider.stats().requests > 20);
    std::thread::sleep(Duration::from_millis(300));
    let sent = provider.stats().peak_window_tokens;
    assert!((20_000..=AT_ONCE).contains(&sent), "{sent}");
    drop((client, setup));

    // A minute later nothing of it does.
    let before = provider.stats().requests;
    let setup = Setup::after(stock.later(70_000));
    let mut client = session(&setup, &provider);
    client.rows(4000..5000);
    wait_until("what goes ahead is sent", || provider.stats().requests >= before + 8);
    provider.release();
}

#[test]
fn a_shorter_window_is_found_once_and_handed_on() {
    let provider = limited(6, RateHeaders::None);
    let mut setup = rested();
    for (round, most) in [(0, 5), (1, 0)] {
        let mut client = session(&setup, &provider);
        provider.reset_stats();
        client.rows(round * 5000..round * 5000 + 2500);
        client.outcomes(2500);
        let stats = provider.stats();
        let refused = stats.by_status.get(&429).copied().unwrap_or_default();
        // At most a tenth of a burst of AT_ONCE tokens is refused, and a request.
        assert!(refused <= most && (round > 0 || refused > 0), "{round}: {:?}", stats.by_status);
        drop(client);
        let stock = setup.stock().later(70_000);
        // The provider's window is empty then too.
        std::thread::sleep(Duration::from_secs(6));
        setup = Setup::after(stock);
    }
}
