//! Standbys and copies of a running server: nothing runs on a standby, jobs go on after promotion, and copies start.

mod common;

use std::time::{Duration, Instant};

use common::{
    Bed, PATIENCE, backfill_with, error, left, one, pause_held, progress, run, settled, slow, text, tickets, warm,
    wrong,
};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

const ROWS: i64 = 400;
const SMALL: &str = "options => '{\"max_rows_per_request\": 10}'";
/// Every process of ours.
const OURS: &str = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'llm_batch%'";

/// The number of rows that were asked.
fn asked(bed: &Bed) -> i64 {
    bed.provider.stats().rows.values().map(|r| i64::from(r.asked)).sum()
}

/// A standby has all that was committed so far.
#[track_caller]
fn caught_up(primary: &mut Client, standby: &mut Client) {
    let lsn = text(primary, "SELECT pg_current_wal_flush_lsn()");
    wait_until(
        "the standby has caught up",
        PATIENCE,
        || text(standby, &format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")),
        |t| t == "t",
    );
}

/// A job whose requests the provider holds, all of whose answers so far are written.
#[track_caller]
fn held(bed: &Bed, client: &mut Client, more: &str) -> (i64, i64) {
    tickets(client, "tickets", 1..=ROWS);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 4)");
    bed.provider.hold_after(10);
    let job = backfill_with(client, "tickets", &format!("{SMALL}{more}"));
    (job, settled(bed, ROWS, 4 * 10))
}

#[test]
fn nothing_runs_on_a_standby() {
    let bed = Bed::with("standby_still", slow(50));
    let client = &mut bed.connect();
    let standby = bed.cluster.standby("standby_still_2");
    let there = &mut standby.connect("postgres");
    let (job, written) = held(&bed, client, "");
    caught_up(client, there);
    assert_eq!(one(there, OURS), 0);
    // The standby reads what the primary has written.
    let p = progress(there, job);
    assert_eq!((p.status.as_str(), p.done), ("running", written));
    assert_eq!(one(there, "SELECT count(*) FROM llm_batch.activity"), 0);
    let requests = bed.provider.stats().requests;
    let start = Instant::now();
    for call in [
        "llm_classify('#r900001:bug#', 'topic')",
        "llm_classify('#r900001:bug#', '{a,b}'::text[])",
        "llm_classify_batch('SELECT 1, ''#r900001:bug#''', 'topic')",
        "llm_classify_array(ARRAY[1], ARRAY['#r900001:bug#'], 'topic')",
        "llm_filter('#r900001:yes#', 'Is it?', '{\"model\": \"m\"}')",
        "llm_batch.estimate('tickets', 'body', 'topic', 'topic')",
        "llm_batch.backfill('tickets', 'body', 'topic', 'topic')",
        &format!("llm_batch.pause({job})"),
        &format!("llm_batch.resume({job})"),
        &format!("llm_batch.cancel({job})"),
        &format!("llm_batch.retry_failed({job})"),
        &format!("llm_batch.alter_job({job}, max_tokens => 5)"),
        "llm_batch.create_model('n', 'fake', 'n')",
        "llm_batch.alter_model('m', requests_per_minute => 5)",
        "llm_batch.drop_model('m')",
        "llm_batch.create_classifier('c', '[\"a\",\"b\"]', 'm')",
        "llm_batch.alter_classifier('topic', instruction => '')",
        "llm_batch.drop_task('topic')",
    ] {
        let e = error(there, &format!("SELECT * FROM {call}"));
        assert_eq!(e.0, "25006", "{call}: {e:?}");
        assert!(e.3.contains("primary"), "{call}: {e:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "a function waited for a gateway: {:?}", start.elapsed());
    assert_eq!(bed.provider.stats().requests, requests, "the standby asked the provider");
    // Waiting for a job works there too.
    let mut waiting = standby.connect("postgres");
    let wait = std::thread::spawn(move || waiting.batch_execute(&format!("CALL llm_batch.wait({job})")));
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (ROWS, ROWS, 0, 0, 0, 0));
    wait.join().unwrap().unwrap();
    assert_eq!(asked(&bed), ROWS);
    // The log names the kind of each process that writes to it.
    let log = standby.log();
    assert!(!log.contains("] llm_batch"), "{log}");
}

/// The primary is killed in the middle of requests, and its standby promoted.
#[track_caller]
fn promoted(name: &str, promote: impl Fn(&Cluster)) {
    let mut bed = Bed::with(name, slow(50));
    let client = &mut bed.connect();
    let mut standby = bed.cluster.standby(&format!("{name}_2"));
    let (job, written) = held(&bed, client, ", max_cost => 0.02");
    let in_flight = bed.provider.stats().rows_in_flight as i64;
    let before = progress(client, job);
    {
        let there = &mut standby.connect("postgres");
        caught_up(client, there);
        bed.cluster.kill9();
        assert_eq!(one(there, OURS), 0);
        assert_eq!((ROWS - left(there, "tickets"), progress(there, job)), (written, before));
    }
    bed.provider.release();
    promote(&standby);
    let there = &mut standby.connect("postgres");
    let p = common::wait_status(there, job, "done");
    assert_eq!(p.counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!((wrong(there, "tickets"), left(there, "tickets")), (0, 0));
    assert_eq!(asked(&bed), ROWS + in_flight, "asked again is what was in flight, and no more");
    // The old primary's reservation counts as spent; the budget holds.
    let money = text(
        there,
        &format!(
            "SELECT cost_unconfirmed > 0 AND cost + cost_unconfirmed <= max_cost FROM llm_batch.progress WHERE job_id = {job}"
        ),
    );
    assert_eq!(money, "t");
    // The next job's number is a new one, though a standby's sequences may be ahead.
    tickets(there, "more", 5001..=5050);
    let next = common::backfill(there, "more");
    assert!(next > job);
    assert_eq!(common::wait_status(there, next, "done").counts(), (50, 50, 0, 0, 0, 0));
    assert_eq!(text(there, "SELECT llm_classify('#r900001:bug#', 'topic')"), "bug");
    let log = standby.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked"), "{log}");
    // It survives a kill of its own as any primary does.
    standby.kill9();
    standby.start();
    assert_eq!(progress(&mut standby.connect("postgres"), job).status, "done");
}

#[test]
fn promoted_by_sql() {
    promoted("standby_sql", |standby| {
        assert_eq!(text(&mut standby.connect("postgres"), "SELECT pg_promote()"), "t");
    });
}

#[test]
fn promoted_by_pg_ctl() {
    promoted("standby_ctl", Cluster::promote);
}

/// A switchover in order: the old primary stops, nothing is asked twice but what was under way.
#[test]
fn a_switchover_with_a_paused_job() {
    let mut bed = Bed::with("standby_switch", slow(20));
    let client = &mut bed.connect();
    let standby = bed.cluster.standby("standby_switch_2");
    tickets(client, "tickets", 1..=ROWS);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 4)");
    bed.provider.hold_after(10);
    let job = backfill_with(client, "tickets", SMALL);
    settled(&bed, ROWS, 4 * 10);
    pause_held(&bed, client, job);
    assert!(bed.cluster.stop().success());
    standby.promote();
    let there = &mut standby.connect("postgres");
    let p = progress(there, job);
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("user")));
    run(there, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(common::wait_status(there, job, "done").counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!(wrong(there, "tickets"), 0);
    assert_eq!(asked(&bed), ROWS);
}

/// A copy, used as docs/operations.md says: it starts switched off, and its jobs are ended before it is switched on.
#[test]
fn a_base_backup_of_a_running_server() {
    let bed = Bed::with("standby_backup", slow(50));
    let client = &mut bed.connect();
    let (job, written) = held(&bed, client, "");
    let socket = "pg_stat_tmp/llm_batch.sock";
    assert!(bed.cluster.data_dir().join(socket).exists());
    let mut copy = bed.cluster.base_backup("standby_backup_2");
    assert!(!copy.data_dir().join(socket).exists(), "the socket's file was copied");
    copy.set("llm_batch.enabled", "off");
    copy.start();
    let there = &mut copy.connect("postgres");
    wait_until("the gateway is up", PATIENCE, || one(there, OURS), |n| *n >= 2);
    assert_eq!(ROWS - left(there, "tickets"), written);
    assert_eq!(error(there, "SELECT llm_classify('#r900001:bug#', 'topic')").1, "pg_llm_batch is disabled");
    run(there, "SELECT llm_batch.cancel(job_id) FROM llm_batch.progress WHERE status IN ('running', 'paused')");
    run(there, "ALTER SYSTEM RESET llm_batch.enabled");
    copy.set("llm_batch.enabled", "on");
    run(there, "SELECT pg_reload_conf()");
    // Served, so it is on, and its launcher has had its turn.
    bed.provider.release();
    wait_until(
        "it is on",
        PATIENCE,
        || there.batch_execute("SELECT llm_classify('#r900001:bug#', 'topic')").is_ok(),
        |ok| *ok,
    );
    assert_eq!(bed.done(job).counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!(asked(&bed), ROWS + 1, "the copy asked about rows of the original's job");
    assert_eq!((progress(there, job).status.as_str(), left(there, "tickets")), ("cancelled", ROWS - written));
    // A new job fills the rest there.
    warm(there, "tickets");
    let again = backfill_with(there, "tickets", SMALL);
    assert!(again > job);
    assert_eq!(common::wait_status(there, again, "done").left, 0);
    assert_eq!((wrong(there, "tickets"), left(there, "tickets")), (0, 0));
}

/// A backup that is started in place of the server it was made of goes on by itself; what lies in the place of the
/// socket does no harm.
#[test]
fn a_copy_in_place_of_a_killed_server() {
    let mut bed = Bed::with("standby_copy", slow(50));
    let client = &mut bed.connect();
    let (job, written) = held(&bed, client, "");
    bed.cluster.kill9();
    let mut copy = bed.cluster.copy("standby_copy_2");
    let socket = copy.data_dir().join("pg_stat_tmp/llm_batch.sock");
    assert!(socket.exists(), "a killed server leaves its socket's file, and a copy has it");
    bed.provider.release();
    copy.start();
    let there = &mut copy.connect("postgres");
    let p = common::wait_status(there, job, "done");
    assert_eq!(p.counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!((wrong(there, "tickets"), left(there, "tickets")), (0, 0));
    assert_eq!(asked(&bed), ROWS + 40, "{written} were written");
}
