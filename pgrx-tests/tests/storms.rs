//! Many deaths in a short time: the limit holds all the same, and the work gets done.

mod common;

use std::time::{Duration, Instant};

use common::{Bed, PATIENCE, backfill_with, left, one, progress, run, slow, tickets, wrong};
use llm_fake_provider::{Config, RateHeaders};
use pg_llm_batch_e2e::wait_until;

/// The provider allows so many requests in any five seconds; the gateway keeps the same in six.
const PER_WINDOW: u64 = 30;
const ROWS: i64 = 2_500;
const DEATHS: usize = 20;

/// Ends a process of ours whenever another one of its kind has come and sent `burst` requests, or got something done.
#[track_caller]
fn storm(name: &str, kind: &str, burst: u64) {
    let window = Duration::from_secs(5);
    // Nothing but its own memory keeps the gateway from what is too much.
    let rate_headers = RateHeaders::None;
    let limits = Config { window, requests_per_window: Some(PER_WINDOW), rate_headers, ..slow(150) };
    let bed = Bed::with(name, limits);
    let client = &mut bed.connect();
    run(
        client,
        "CREATE TEMP TABLE witness AS SELECT 1 AS a; SELECT llm_batch.alter_model('m', requests_per_minute => 300)",
    );
    tickets(client, "tickets", 1..=ROWS);
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 10}'");
    let end = format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type = '{kind}'");
    let start = Instant::now();
    for death in 1..=DEATHS {
        // In the middle of requests, of more than a burst that would count; or after something was done.
        let (sent, done) = (bed.provider.stats().admitted, progress(client, job).done);
        wait_until(
            "enough is sent or done",
            PATIENCE,
            || {
                if death % 2 == 0 || kind.ends_with("gateway") {
                    bed.provider.stats().admitted >= sent + burst
                } else {
                    progress(client, job).done > done
                }
            },
            |is_so| *is_so,
        );
        wait_until("a process ends", PATIENCE, || one(client, &end), |n| *n == 1);
        println!("death {death} after {:?}: {:?}", start.elapsed(), progress(client, job).counts());
    }
    let took = start.elapsed();
    let p = bed.done(job);
    assert_eq!(p.counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));
    let stats = bed.provider.stats();
    println!("{took:?} {} of {PER_WINDOW}, {:?}", stats.peak_window_requests, stats.by_status);
    assert!(stats.peak_window_requests <= PER_WINDOW, "{} in a window", stats.peak_window_requests);
    assert!(!stats.by_status.contains_key(&429), "{:?}", stats.by_status);
    // The session that looked on all the while.
    assert_eq!(one(client, "SELECT a::bigint FROM witness"), 1);
}

#[test]
fn twenty_deaths_of_the_gateway() {
    storm("storm_gateway", "llm_batch gateway", 8);
}

#[test]
fn twenty_deaths_of_a_worker() {
    storm("storm_worker", "llm_batch job", 1);
}
