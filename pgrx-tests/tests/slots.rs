//! Background workers: which jobs get one, and the words for a job that has none.

mod common;

use std::time::{Duration, Instant};

use common::{
    Bed, PATIENCE, Progress, SMALL, backfill, backfill_with, error, held_job, install, labels_json, left, one,
    progress, run, text, tickets, wait_status, warm, wrong,
};
use llm_fake_provider::Config;
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// For a reason to be shown.
const SOON: Duration = Duration::from_secs(30);

#[track_caller]
fn set(bed: &Bed, name: &str, value: &str) {
    let client = &mut bed.connect();
    run(client, &format!("ALTER SYSTEM SET {name} = {value}"));
    run(client, "SELECT pg_reload_conf()");
}

#[track_caller]
fn waits(client: &mut Client, job: i64, reason: &str) -> Progress {
    wait_until(
        &format!("job {job} is paused as {reason}"),
        SOON,
        || progress(client, job),
        |p| (p.status.as_str(), p.reason.as_deref()) == ("paused", Some(reason)),
    )
}

/// The extension, a model, a classifier and a table in another database than `postgres`.
#[track_caller]
fn furnish(bed: &Bed, database: &str, rows: i64) -> Client {
    let mut client = bed.cluster.connect(database);
    install(&mut client, &bed.provider.base_url());
    common::model(&mut client, "m", "");
    common::classifier(&mut client, "topic", &labels_json(&common::LABELS), "m", "{\"reuse\": false}");
    tickets(&mut client, "tickets", 900_001..=900_000 + rows);
    client
}

#[test]
fn why_a_job_does_not_run() {
    let mut bed = Bed::new("slots_reasons");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 40, 2);

    // Switched off. It can be paused and resumed meanwhile.
    set(&bed, "llm_batch.enabled", "off");
    waits(client, job, "disabled");
    assert_eq!(text(client, &format!("SELECT llm_batch.pause({job})")), "t");
    waits(client, job, "user");
    assert_eq!(text(client, &format!("SELECT llm_batch.resume({job})")), "t");
    waits(client, job, "disabled");
    // A session that waits for the job goes on to wait, and is told.
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| bed.cluster.psql("postgres", &format!("CALL llm_batch.wait({job})")));
        let calls =
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CALL llm_batch.wait%' AND wait_event = 'PgSleep'";
        wait_until("somebody waits", SOON, || one(client, calls), |n| *n == 1);
        bed.provider.release();
        set(&bed, "llm_batch.enabled", "on");
        let output = waiter.join().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(
            said.matches(&format!("job {job} is paused (disabled) and will go on by itself")).count(),
            1,
            "{said}"
        );
    });
    assert_eq!(bed.done(job).counts(), (40, 40, 0, 0, 0, 0));

    // A database that nobody may connect to, as seen by a session that was there before.
    let admin = &mut bed.cluster.connect("template1");
    run(admin, "ALTER DATABASE postgres ALLOW_CONNECTIONS false");
    tickets(client, "closed", 100_001..=100_040);
    let job = backfill(client, "closed");
    waits(client, job, "no_connections");
    run(admin, "ALTER DATABASE postgres ALLOW_CONNECTIONS true IS_TEMPLATE true");
    assert_eq!(progress(client, job).reason.as_deref(), Some("no_connections"));
    run(admin, "ALTER DATABASE postgres IS_TEMPLATE false");
    assert_eq!(wait_status(client, job, "done").counts(), (40, 40, 0, 0, 0, 0));

    // No room for a worker, for the launcher, for the gateway: Postgres' own launcher for replication takes the first.
    run(client, "DROP TABLE tickets");
    let job = held_job(&bed, client, 40, 2);
    tickets(client, "second", 300_001..=300_010);
    let start = "SELECT llm_batch.backfill('second', input => 'body', target => 'topic', task => 'topic')";
    let ask = "SELECT llm_classify('#r900001:bug#', 'topic')";
    for (workers, says) in [("3", ""), ("2", "launcher"), ("1", "gateway")] {
        set(&bed, "max_worker_processes", workers);
        bed.cluster.restart();
        bed.provider.release();
        let client = &mut bed.connect();
        waits(client, job, "no_worker_slot");
        let sql = if says == "gateway" { ask } else { start };
        if !says.is_empty() {
            let (code, message, _, hint) = error(client, sql);
            assert_eq!(code, "53400", "{message}");
            assert!(message.contains(says) && hint.contains("max_worker_processes"), "{message} {hint}");
        }
        if says != "gateway" {
            assert_eq!(text(client, ask), "bug");
        }
        assert_eq!(one(client, "SELECT count(*) FROM llm_batch.progress WHERE relation LIKE '%second'"), 0);
    }
    set(&bed, "max_worker_processes", "16");
    bed.cluster.restart();
    let client = &mut bed.connect();
    assert_eq!(wait_status(client, job, "done").counts(), (40, 40, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));

    // At a start jobs are looked for in the databases of a list only.
    run(client, "DROP TABLE tickets");
    let job = held_job(&bed, client, 40, 2);
    set(&bed, "llm_batch.databases", "'elsewhere'");
    bed.cluster.restart();
    bed.provider.release();
    let client = &mut bed.connect();
    waits(client, job, "disabled");
    set(&bed, "llm_batch.databases", "'elsewhere, postgres'");
    assert_eq!(wait_status(client, job, "done").counts(), (40, 40, 0, 0, 0, 0));
}

/// A job whose requests hang for as long as `request_timeout`, 5 minutes, has the only slot. It is cancelled, at once or after
/// a pause, with a budget or without.
#[test]
fn a_job_that_is_cancelled_leaves_its_slot_and_its_requests() {
    let bed = Bed::build(Cluster::builder("slots_cancel").conf("llm_batch.max_job_workers", "1"), Config::default());
    let client = &mut bed.connect();
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2, input_price => 1, output_price => 4)");
    tickets(client, "hangs", 1..=40);
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    for (n, budget, is_paused) in
        [(0, "", false), (1, ", max_cost => 5", false), (2, "", true), (3, ", max_cost => 5", true)]
    {
        bed.provider.reset_stats();
        warm(client, "hangs");
        bed.provider.hold();
        let job = backfill_with(client, "hangs", &format!("{SMALL}{budget}"));
        common::in_flight(&bed, 2);
        let table = format!("healthy{n}");
        tickets(client, &table, 1_000 * (n + 1)..=1_000 * (n + 1) + 9);
        let healthy = backfill(client, &table);
        waits(client, healthy, "no_worker_slot");
        if is_paused {
            run(client, &format!("SELECT llm_batch.pause({job})"));
            let queued = "SELECT sum(queued)::bigint FROM llm_batch.activity";
            wait_until("nothing is queued", PATIENCE, || one(client, queued), |n| *n == 0);
            assert_eq!((one(client, workers), bed.provider.stats().in_flight), (1, 2), "a pause waits for answers");
        }
        let start = Instant::now();
        run(client, &format!("SELECT llm_batch.cancel({job})"));
        wait_until("its requests are dropped", PATIENCE, || bed.provider.stats().abandoned, |n| *n == 2);
        let dropped = start.elapsed();
        wait_until("another one has its slot", PATIENCE, || progress(client, healthy).status, |s| s == "running");
        println!("{n}: requests were dropped after {dropped:?}, the slot was free after {:?}", start.elapsed());
        bed.provider.release();
        assert_eq!(bed.done(healthy).counts(), (10, 10, 0, 0, 0, 0));
        let account = format!(
            "SELECT (cost_unconfirmed > 0 AND tokens_unconfirmed > 100 AND cost_reserved = 0 AND tokens_reserved = 0)::int::bigint
               FROM llm_batch.job_state WHERE job_id = {job}"
        );
        assert_eq!(one(client, &account), 1);
        assert_eq!((progress(client, job).status.as_str(), left(client, "hangs")), ("cancelled", 40));
        // No answer is waited for as long as a request may take.
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }
}

/// After a restart each database is looked at, and others find background workers all the while.
#[test]
fn many_databases_and_few_slots() {
    const SLOTS: i64 = 8;
    const DATABASES: usize = 60;
    let cluster = Cluster::builder("slots_databases").conf("max_worker_processes", &SLOTS.to_string());
    let mut bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    let start = Instant::now();
    for i in 1..=DATABASES {
        run(client, &format!("CREATE DATABASE d{i} STRATEGY file_copy"));
    }
    // The remains of a DROP DATABASE that was broken off.
    run(client, "CREATE DATABASE invalid STRATEGY file_copy");
    run(client, "UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'invalid'");
    println!("{DATABASES} databases after {:?}", start.elapsed());
    let last = &mut furnish(&bed, &format!("d{DATABASES}"), 40);
    run(last, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    warm(last, "tickets");
    bed.provider.hold();
    let job = backfill_with(last, "tickets", SMALL);
    common::in_flight(&bed, 2);
    bed.cluster.restart();
    bed.provider.release();

    // A finder that is idle has ended, and is not gone yet.
    let seen = "SELECT count(*) FILTER (WHERE backend_type = 'llm_batch finder' AND state IS DISTINCT FROM 'idle'),
                       count(*) FILTER (WHERE backend_type LIKE 'llm\\_batch%' OR backend_type LIKE 'logical%'),
                       count(*) FILTER (WHERE backend_type = 'llm_batch job')
                  FROM pg_stat_activity";
    let client = &mut bed.connect();
    let (start, mut finders, mut busy) = (Instant::now(), 0_i64, 0_i64);
    wait_until(
        "a worker is at the job",
        PATIENCE,
        || {
            let row = client.query_one(seen, &[]).unwrap();
            (finders, busy) = (finders.max(row.get(0)), busy.max(row.get(1)));
            row.get::<_, i64>(2)
        },
        |n| *n == 1,
    );
    println!("the job was found after {:?}, {finders} finders and {busy} workers seen", start.elapsed());
    let last = &mut bed.cluster.connect(&format!("d{DATABASES}"));
    assert_eq!(wait_status(last, job, "done").counts(), (40, 40, 0, 0, 0, 0));
    assert!((1..=2).contains(&finders), "{finders} finders at a time");
    assert!(busy <= SLOTS - 2, "{busy} of {SLOTS} workers were taken");
    let log = bed.cluster.log();
    assert!(!log.contains("no background worker is free"), "{log}");
    assert!(!log.contains("invalid database"), "{log}");
}

/// More jobs than the table in shared memory has entries: each has its turn, those of other databases too.
#[test]
fn more_jobs_than_are_kept_in_mind() {
    const JOBS: i64 = 60;
    let cluster = Cluster::builder("slots_jobs").conf("llm_batch.max_job_workers", "0");
    let bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    run(client, "CREATE DATABASE other");
    let other = &mut furnish(&bed, "other", 5);
    for i in 1..=JOBS {
        tickets(client, &format!("t{i}"), 10 * i..=10 * i + 4);
    }
    run(
        client,
        &format!(
            "SELECT llm_batch.backfill(format('t%s', i)::regclass, input => 'body', target => 'topic', task => 'topic')
               FROM generate_series(1, {JOBS}) i"
        ),
    );
    let job = backfill(other, "tickets");
    let said = || bed.cluster.log().matches("more jobs than it can track").count();
    wait_until("it is logged", SOON, said, |n| *n == 1);
    waits(client, JOBS, "no_worker_slot");
    waits(other, job, "no_worker_slot");
    set(&bed, "llm_batch.max_job_workers", "4");
    let done = "SELECT count(*) FROM llm_batch.progress WHERE status = 'done' AND rows_done = 5";
    let start = Instant::now();
    wait_until("all are done", PATIENCE, || one(client, done), |n| *n == JOBS);
    wait_status(other, job, "done");
    println!("{JOBS} jobs after {:?}", start.elapsed());
    assert_eq!(said(), 1);
}

/// A role whose jobs go on for hours, and are more than the table in shared memory has entries, leaves a slot and an entry
/// for the job of another role.
#[test]
fn one_role_leaves_room_for_others() {
    const JOBS: i64 = 60;
    let cluster = Cluster::builder("slots_roles").conf("llm_batch.max_job_workers", "2");
    let bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    common::model(client, "slow", "");
    common::classifier(client, "slowly", &labels_json(&common::LABELS), "slow", "{\"max_rows_per_request\": 5}");
    for i in 1..=JOBS {
        tickets(client, &format!("t{i}"), 100 * i..=100 * i + 49);
    }
    tickets(client, "tickets", 900_001..=900_010);
    run(client, "CREATE ROLE ben LOGIN; ALTER TABLE tickets OWNER TO ben; GRANT USAGE ON FOREIGN SERVER fake TO ben");
    run(
        client,
        &format!(
            "SELECT llm_batch.backfill(format('t%s', i)::regclass, input => 'body', target => 'topic', task => 'slowly')
               FROM generate_series(1, {JOBS}) i;
             SELECT llm_batch.alter_model('slow', requests_per_minute => 1)"
        ),
    );
    // Alone it has all of them.
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("all slots are taken", PATIENCE, || one(client, workers), |n| *n == 2);
    let ben = &mut bed.cluster.connect_as("postgres", "ben");
    for _ in 0..2 {
        let start = Instant::now();
        let job = backfill(ben, "tickets");
        assert_eq!(wait_status(ben, job, "done").counts(), (10, 10, 0, 0, 0, 0));
        println!("another role's job was done after {:?}", start.elapsed());
        wait_until("all slots are taken again", PATIENCE, || one(client, workers), |n| *n == 2);
        run(ben, "UPDATE tickets SET topic = NULL");
    }
    // Jobs that gave up their slot are as they were: nothing failed, nothing was asked twice.
    let odd = "SELECT count(*) FROM llm_batch.progress WHERE owner <> 'ben' AND (rows_failed > 0 OR status NOT IN ('running', 'paused'))";
    assert_eq!(one(client, odd), 0);
    assert!(bed.provider.stats().rows.values().all(|r| r.asked <= 2));
}

/// Code of a role's that does not return, in an input and in a trigger, keeps workers only until another role needs one.
#[test]
fn code_that_does_not_return_leaves_room_for_others() {
    let cluster = Cluster::builder("slots_stuck").conf("llm_batch.max_job_workers", "2");
    let bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    for (table, first) in [("tickets", 1), ("t1", 101), ("t2", 201)] {
        tickets(client, table, first..=first + 9);
    }
    run(
        client,
        "CREATE ROLE mallory LOGIN; CREATE ROLE ben LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO mallory, ben;
         ALTER TABLE tickets OWNER TO ben; ALTER TABLE t1 OWNER TO mallory; ALTER TABLE t2 OWNER TO mallory;
         GRANT CREATE ON SCHEMA public TO mallory",
    );
    let mallory = &mut bed.cluster.connect_as("postgres", "mallory");
    run(
        mallory,
        "CREATE FUNCTION stays(t text) RETURNS text STABLE LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(100000); RETURN t; END';
         CREATE FUNCTION stays() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(100000); RETURN new; END';
         CREATE TRIGGER stays BEFORE UPDATE ON t2 FOR EACH ROW EXECUTE FUNCTION stays();
         SELECT llm_batch.backfill('t1', input => 'stays(body)', target => 'topic', task => 'topic')",
    );
    backfill(mallory, "t2");
    let stuck = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job' AND wait_event = 'PgSleep'";
    wait_until("both workers are stuck", PATIENCE, || one(client, stuck), |n| *n == 2);
    let ben = &mut bed.cluster.connect_as("postgres", "ben");
    let job = backfill(ben, "tickets");
    assert_eq!(wait_status(ben, job, "done").counts(), (10, 10, 0, 0, 0, 0));
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.progress WHERE owner = 'mallory' AND status = 'failed'"), 0);
}
