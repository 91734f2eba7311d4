//! The main job: an empty column is filled, every row once, and the accounts add up.

mod common;

use std::time::{Duration, Instant};

use common::*;
use llm_fake_provider::{Config, Latency};
use pg_llm_batch_e2e::wait_until;
use postgres::fallible_iterator::FallibleIterator;

/// Dollars of so many tokens at the prices of the model `m`, as SQL writes them without trailing zeros.
fn dollars(input: u64, output: u64) -> String {
    let hundred_millionths = 15 * input + 60 * output;
    let text = format!("{}.{:08}", hundred_millionths / 100_000_000, hundred_millionths % 100_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[test]
fn ten_thousand_rows_are_filled_and_none_is_asked_twice() {
    let bed = Bed::new("main_job");
    let mut c = bed.connect();
    let mut listener = bed.connect();
    run(&mut listener, "LISTEN llm_batch");
    tickets(&mut c, "tickets", 1..=10_000);
    let log_before = bed.cluster.log().len();

    // The probe is asked within the statement, the rows after the commit.
    run(&mut c, "BEGIN");
    let job = backfill(&mut c, "tickets");
    let stats = bed.provider.stats();
    assert_eq!((stats.requests, stats.probes, stats.rows.len()), (1, 1, 0));
    // Nothing is counted yet, and nothing looks as if it were.
    let p = progress(&mut c, job);
    assert_eq!((p.status.as_str(), p.counts()), ("running", (-1, 0, 0, 0, 0, -1)));
    assert_eq!(text(&mut c, &format!("SELECT percent FROM llm_batch.progress WHERE job_id = {job}")), "");
    bed.provider.reset_stats();
    run(&mut c, "COMMIT");
    let committed = Instant::now();
    wait_until("the first request", Duration::from_secs(10), || bed.provider.stats().requests, |n| *n > 0);
    println!("the first request came {:?} after the commit", committed.elapsed());

    run(&mut c, &format!("CALL llm_batch.wait({job})"));
    println!("10,000 rows were filled {:?} after the commit", committed.elapsed());
    let p = progress(&mut c, job);
    assert_eq!(p.status, "done", "wait() returned");
    assert_eq!(p.counts(), (10_000, 10_000, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "tickets"), left(&mut c, "tickets")), (0, 0));
    assert_eq!(one(&mut c, "SELECT count(*) FROM llm_batch.failure"), 0);

    let stats = bed.provider.stats();
    assert_eq!(stats.rows.len(), 10_000);
    let twice: Vec<_> = stats.rows.iter().filter(|(_, row)| (row.asked, row.answered) != (1, 1)).collect();
    assert!(twice.is_empty(), "not asked and answered exactly once: {twice:?}");
    assert_eq!((stats.requests, stats.admitted, stats.probes, stats.unmarked_rows), (200, 200, 0, 0));
    assert_eq!(stats.by_status.into_iter().collect::<Vec<_>>(), [(200, 200)]);
    assert_eq!(p.requests, 200);
    assert_eq!((p.input_tokens, p.output_tokens), (stats.prompt_tokens as i64, stats.completion_tokens as i64));
    assert_eq!(p.cost, dollars(stats.prompt_tokens, stats.completion_tokens));

    let told = listener.notifications().timeout_iter(PATIENCE).next().unwrap().expect("a notification");
    assert_eq!(told.channel(), "llm_batch");
    assert_eq!(told.payload(), format!(r#"{{"job": {job}, "status": "done"}}"#));

    // Nothing is left to do: a second job asks no row.
    bed.provider.reset_stats();
    let again = backfill(&mut c, "tickets");
    assert_ne!(again, job);
    let p = bed.done(again);
    assert_eq!(p.counts(), (0, 0, 0, 0, 0, 0));
    assert_eq!((p.requests, p.cost.as_str()), (0, "0"));
    assert_eq!(text(&mut c, &format!("SELECT percent FROM llm_batch.progress WHERE job_id = {again}")), "100.0");
    assert!(bed.provider.stats().rows.is_empty());
    let told = listener.notifications().timeout_iter(PATIENCE).next().unwrap().expect("a notification");
    assert_eq!(told.payload(), format!(r#"{{"job": {again}, "status": "done"}}"#));

    let log = bed.cluster.log().split_off(log_before);
    let loud: Vec<&str> =
        log.lines().filter(|l| ["ERROR:", "WARNING:", "FATAL:", "PANIC:"].iter().any(|w| l.contains(w))).collect();
    assert!(loud.is_empty(), "{loud:#?}");
}

#[test]
fn jobs_of_two_databases_run_at_the_same_time() {
    let latency = Latency { base: Duration::from_millis(30), ..Latency::default() };
    let bed = Bed::with("two_databases", Config { latency, ..Config::default() });
    let mut c = bed.connect();
    run(&mut c, "CREATE DATABASE other");
    let mut d = bed.cluster.connect("other");
    install(&mut d, &bed.provider.base_url());
    model(&mut d, "m", "");
    classifier(&mut d, "topic", &labels_json(&LABELS), "m", "{}");
    tickets(&mut c, "a", 1..=2_000);
    tickets(&mut c, "b", 2_001..=4_000);
    tickets(&mut d, "a", 4_001..=6_000);
    tickets(&mut d, "b", 6_001..=8_000);

    // All of them under way before the first answer comes.
    bed.provider.hold();
    let jobs = [backfill_held(&bed, &mut c, "a"), backfill_held(&bed, &mut c, "b")];
    let others = [backfill_held(&bed, &mut d, "a"), backfill_held(&bed, &mut d, "b")];
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("four job workers", PATIENCE, || one(&mut c, workers), |n| *n == 4);
    bed.provider.release();

    for (client, jobs) in [(&mut c, jobs), (&mut d, others)] {
        for (job, table) in jobs.into_iter().zip(["a", "b"]) {
            let p = wait_status(client, job, "done");
            assert_eq!(p.counts(), (2_000, 2_000, 0, 0, 0, 0));
            assert_eq!((wrong(client, table), left(client, table)), (0, 0));
        }
    }
    let stats = bed.provider.stats();
    assert_eq!(stats.rows.len(), 8_000);
    assert!(stats.rows.values().all(|row| (row.asked, row.answered) == (1, 1)));
    // They exit when they are idle.
    wait_until("no job worker", PATIENCE, || one(&mut c, workers), |n| *n == 0);
}

/// Starts a job while the provider holds its answers back, but for the probe's.
fn backfill_held(bed: &Bed, client: &mut postgres::Client, table: &str) -> i64 {
    bed.provider.release();
    run(client, "BEGIN");
    let job = backfill(client, table);
    bed.provider.hold();
    run(client, "COMMIT");
    job
}
