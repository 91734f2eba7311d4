//! Changes by others to the table, the settings and the server while a job runs: it goes on, or waits, and no row is
//! lost or paid for twice.

mod common;

use std::time::{Duration, Instant};

use common::{
    Bed, PATIENCE, SMALL, all_right_once, backfill, backfill_with, failures, held_job, left, one, progress, run, slow,
    text, tickets, wait_status, wrong,
};
use llm_fake_provider::{Config, FakeProvider};
use pg_llm_batch_e2e::{Cluster, wait_until};

#[test]
fn a_table_that_is_truncated() {
    let bed = Bed::new("changes_truncate");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    run(client, "TRUNCATE tickets");
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!((p.done, p.skipped, p.failed, p.left, p.superseded), (0, 0, 0, 0, 100), "{p:?}");
    assert!(failures(client, job).is_empty());
    // Filled again under the same keys, with other texts.
    common::rows(client, "tickets", 1..=20);
    bed.provider.hold();
    let job = backfill_with(client, "tickets", SMALL);
    wait_until("requests are held", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    run(
        client,
        "TRUNCATE tickets; INSERT INTO tickets SELECT i, format('New #r%s:spam#', lpad(i::text, 6, '0')), 'spam' FROM generate_series(1, 20) i",
    );
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!((wrong(client, "tickets"), left(client, "tickets"), p.left), (0, 0, 0), "{p:?}");
}

#[test]
fn a_table_that_is_rewritten_again_and_again() {
    let bed = Bed::with("changes_vacuum", slow(30));
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=1_000);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 4)");
    let job = backfill_with(client, "tickets", SMALL);
    let mut times = 0;
    while progress(client, job).status == "running" {
        for how in ["VACUUM FULL tickets", "REINDEX TABLE tickets", "CLUSTER tickets USING tickets_pkey"] {
            run(client, how);
            times += 1;
        }
    }
    assert!(times > 5, "too few to show anything: {times}");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 1_000);
}

/// The worker comes while the columns are being changed, and waits for the end of that.
#[test]
fn columns_replaced_while_the_worker_waits() {
    let bed = Bed::new("changes_replaced");
    let client = &mut bed.connect();
    for (change, says) in [
        ("DROP COLUMN topic, ADD topic text", "topic"),
        ("ALTER topic TYPE varchar(3)", "topic"),
        ("DROP COLUMN id, ADD id bigserial PRIMARY KEY", "id"),
    ] {
        let job = held_job(&bed, client, 20, 2);
        let other = &mut bed.connect();
        run(other, &format!("BEGIN; ALTER TABLE tickets {change}"));
        bed.provider.release();
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'tickets'::regclass";
        // It may have looked at the table before, and then waited: more than once.
        for _ in 0..2 {
            wait_until("the worker waits", PATIENCE, || one(client, waiting), |n| *n == 1);
            wait_until("the worker has let go", PATIENCE, || one(client, waiting), |n| *n == 0);
        }
        wait_until("the worker waits", PATIENCE, || one(client, waiting), |n| *n == 1);
        run(other, "COMMIT");
        let p = wait_until("the job ends", PATIENCE, || progress(client, job), |p| p.status != "running");
        assert_eq!(p.status, "failed", "{change}: {p:?}");
        assert!(p.last_error.clone().unwrap_or_default().contains(says), "{change}: {p:?}");
        assert_eq!(left(client, "tickets"), 20, "{change}");
        run(client, "DROP TABLE tickets");
    }
}

/// The worker has rows locked and waits for a lock of a session that waits for one of these rows.
#[test]
fn a_deadlock_with_a_session() {
    let bed = Bed::new("changes_deadlock");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE TABLE shop (open boolean); INSERT INTO shop VALUES (true);
         CREATE SEQUENCE tries;
         CREATE FUNCTION ask_shop() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF nextval('tries') = 1 THEN
                 PERFORM pg_advisory_xact_lock(4711);
                 FOR i IN 1 .. 3000 LOOP
                     EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted);
                     PERFORM pg_sleep(0.02);
                 END LOOP;
             END IF;
             PERFORM FROM shop FOR UPDATE;
             RETURN NEW;
         END $$",
    );
    tickets(client, "tickets", 1..=50);
    run(
        client,
        "CREATE TRIGGER ask_shop BEFORE UPDATE ON tickets FOR EACH ROW WHEN (NEW.id = 25) EXECUTE FUNCTION ask_shop()",
    );
    let other = &mut bed.connect();
    run(other, "SET deadlock_timeout = '1 min'; BEGIN; SELECT FROM shop FOR UPDATE");
    let job = backfill(client, "tickets");
    let locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND granted";
    wait_until("the worker has its rows", PATIENCE, || one(client, locked), |n| *n == 1);
    // The worker is the one to find the deadlock, and the one that gives in.
    run(other, "UPDATE tickets SET want = want WHERE id = 1; COMMIT");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 50);
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'";
    wait_until("the deadlock is counted", PATIENCE, || one(client, deadlocks), |n| *n >= 1);
}

/// Whatever makes a transaction fail in passing: it is tried again as a whole.
#[test]
fn transactions_that_fail_a_few_times() {
    let bed = Bed::new("changes_serialization");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE SEQUENCE tries;
         CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             -- Often enough for a search of the row that raises to end with this one.
             CASE nextval('tries')
                 WHEN 1, 2, 3, 4, 5, 6, 7, 8 THEN RAISE serialization_failure;
                 WHEN 9 THEN RAISE deadlock_detected;
                 WHEN 10 THEN RAISE out_of_memory;
                 WHEN 11 THEN RAISE disk_full;
                 ELSE NULL;
             END CASE;
             RETURN NEW;
         END $$",
    );
    tickets(client, "tickets", 1..=50);
    run(
        client,
        "CREATE TRIGGER conflict BEFORE UPDATE ON tickets FOR EACH ROW WHEN (NEW.id = 25) EXECUTE FUNCTION conflict()",
    );
    let job = backfill(client, "tickets");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 50);
    assert!(one(client, "SELECT last_value FROM tries") > 11);
}

/// A change holds from the next answer on, also while rows without number wait in the gateway.
#[test]
fn server_key_model_and_classifier_altered_in_the_middle() {
    let bed = Bed::with("changes_server", slow(200));
    let key = "sk-second-0123456789";
    let second = FakeProvider::start(Config { api_key: Some(key.to_owned()), ..slow(20) }).unwrap();
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=1_100);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    let job = backfill_with(client, "tickets", SMALL);
    wait_until("the first is asked", PATIENCE, || progress(client, job).done, |n| *n > 50);
    let server = format!(
        "BEGIN; ALTER SERVER fake OPTIONS (SET base_url '{}');
         ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key '{key}'); COMMIT",
        second.base_url()
    );
    for (change, provider, seen) in [
        ("SELECT llm_batch.alter_model('m', model => 'another')", &bed.provider, "another"),
        (
            "SELECT llm_batch.alter_classifier('topic', instruction => 'Of a shop for bicycles.')",
            &bed.provider,
            "bicycles",
        ),
        (server.as_str(), &second, "bicycles"),
    ] {
        let before = bed.provider.stats().rows.len();
        run(client, change);
        let is_new = || provider.bodies().iter().any(|body| body.to_string().contains(seen));
        wait_until("it is asked as altered", PATIENCE, is_new, |new| *new);
        let more = bed.provider.stats().rows.len() - before;
        // Ten under way, ten that followed them, and what a busy machine makes of it. All that waits is 950 rows.
        assert!(more <= 150, "{more} rows were asked since: {change}");
    }
    let first = bed.provider.stats();
    let p = bed.done(job);
    assert_eq!(p.counts(), (1_100, 1_100, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));
    let (last, other) = (bed.provider.stats(), second.stats());
    assert_eq!(last.requests, first.requests, "the first was asked again");
    assert!(last.rows.values().all(|r| r.asked == 1) && other.rows.values().all(|r| r.asked == 1));
    assert_eq!(last.rows.len() + other.rows.len(), 1_100, "a row was asked at both");
    assert_eq!(other.by_status.keys().copied().collect::<Vec<_>>(), [200]);
    assert!(second.bodies().iter().all(|b| b["model"] == "another"));
}

/// All of max_worker_processes are taken: one warning, and the job starts when there is room.
#[test]
fn no_background_worker_is_free() {
    // Postgres' own launcher for replication, the gateway, the launcher, and one more.
    let cluster = Cluster::builder("changes_slots").conf("max_worker_processes", "4");
    let bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 20, 2);
    tickets(client, "second", 500_001..=500_020);
    let second = backfill(client, "second");
    let p = wait_until("the second waits", PATIENCE, || progress(client, second), |p| p.status == "paused");
    assert_eq!((p.reason.as_deref(), p.left), (Some("no_worker_slot"), -1), "{p:?}");
    let warnings = || bed.cluster.log().matches("no background worker is free for llm_batch").count();
    wait_until("it is logged", PATIENCE, warnings, |n| *n == 1);
    // It is tried again every ten seconds, and said once.
    let entry = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(12) {
        assert_eq!(one(client, entry), 1);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(warnings(), 1);
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (20, 20, 0, 0, 0, 0));
    assert_eq!(wait_status(client, second, "done").counts(), (20, 20, 0, 0, 0, 0));
    assert_eq!((wrong(client, "second"), left(client, "second")), (0, 0));
    assert!(bed.cluster.log().contains("Raise max_worker_processes"));
}

#[test]
fn two_phase_commit() {
    let cluster = Cluster::builder("changes_prepared").conf("max_prepared_transactions", "5");
    let bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=50);
    tickets(client, "second", 500_001..=500_020);
    run(client, "BEGIN");
    let job = backfill(client, "tickets");
    run(client, "PREPARE TRANSACTION 'a'; BEGIN");
    let never = backfill(client, "second");
    run(client, "PREPARE TRANSACTION 'b'");
    // Nobody sees it yet, nothing is asked, and the column is taken.
    assert_eq!(text(client, "SELECT count(*) FROM llm_batch.progress"), "0");
    let probes = bed.provider.stats().requests;
    run(client, "SET lock_timeout = '200 ms'");
    let (code, ..) = common::error(
        client,
        "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic')",
    );
    assert_eq!(code, "55P03");
    assert_eq!(bed.provider.stats().requests, probes);
    run(client, "ROLLBACK PREPARED 'b'");
    run(&mut bed.connect(), "COMMIT PREPARED 'a'");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 50);
    // A pause, too.
    run(client, "UPDATE tickets SET topic = NULL; SELECT llm_batch.alter_model('m', max_concurrent_requests => 1)");
    bed.provider.configure(|c| c.latency.base = Duration::from_millis(500));
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 1}'");
    wait_until("it has begun", PATIENCE, || progress(client, job).done, |n| *n > 0);
    run(client, &format!("BEGIN; SELECT llm_batch.pause({job}); PREPARE TRANSACTION 'c'"));
    run(&mut bed.connect(), "COMMIT PREPARED 'c'");
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("its worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    let p = progress(client, job);
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("user")));
    assert!(p.left > 0, "the pause was felt at the end only: {p:?}");
    assert_eq!(one(client, &format!("SELECT count(*) FROM llm_batch.job WHERE id = {never}")), 0);
}

/// The library is there, the extension is not, but somebody has made what looks like it.
#[test]
fn a_schema_of_our_name_without_the_extension() {
    let mut cluster = Cluster::builder("changes_foreign").conf("log_min_messages", "debug1").start();
    let client = &mut cluster.connect("postgres");
    run(
        client,
        "CREATE SCHEMA llm_batch;
         CREATE FUNCTION llm_batch.trap() RETURNS bigint LANGUAGE plpgsql AS $$
         BEGIN RAISE WARNING 'trapped as %', current_user; RETURN 1; END $$;
         CREATE VIEW llm_batch.job AS SELECT llm_batch.trap() AS id, 10::regrole AS owner, 'running' AS wanted, 1 AS epoch;
         CREATE VIEW llm_batch.job_state AS
            SELECT llm_batch.trap() AS job_id, 'running' AS status, 1 AS epoch, 0 AS starts, now() AS updated_at,
                   NULL::timestamptz AS resume_at",
    );
    let processes = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'llm_batch%'";
    let searches =
        |cluster: &Cluster| cluster.log().matches("starting background worker process \"llm_batch finder\"").count();
    let before = searches(&cluster);
    cluster.restart();
    let client = &mut cluster.connect("postgres");
    wait_until("a search", PATIENCE, || searches(&cluster), |n| *n > before);
    wait_until("its end", PATIENCE, || one(client, processes), |n| *n == 2);
    run(client, "DROP SCHEMA llm_batch CASCADE; CREATE EXTENSION pg_llm_batch");
    // A session that the restart ends may not be told so.
    let log = cluster.log().replace("could not send data to client", "");
    for word in ["trapped", "ERROR:", "could not"] {
        assert!(!log.contains(word), "{log}");
    }
}
