//! Recovery: jobs go on by themselves after a death, and nothing is paid for again but rows in flight.

mod common;

use std::time::Duration;

use common::{
    Bed, PATIENCE, backfill, backfill_with, install, left, one, pids, progress, run, settled, slow, text, tickets,
    wrong,
};
use llm_fake_provider::Stats;
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

const ROWS: i64 = 2000;

/// The process of a type, once there is exactly one.
#[track_caller]
fn pid(client: &mut Client, kind: &str) -> i32 {
    wait_until(kind, PATIENCE, || pids(client, kind), |p| p.len() == 1)[0]
}

#[track_caller]
fn terminate(client: &mut Client, pid: i32) {
    assert_eq!(text(client, &format!("SELECT pg_terminate_backend({pid}, 10000)")), "t");
}

/// The number of times that rows were asked again.
fn extra(stats: &Stats) -> i64 {
    stats.rows.values().map(|r| i64::from(r.asked) - 1).sum()
}

/// The job is done, all rows are right, and at most so many were asked again.
#[track_caller]
fn finished(bed: &Bed, client: &mut Client, table: &str, job: i64, rows: i64, lost: i64) {
    let p = common::wait_status(client, job, "done");
    assert_eq!(p.counts(), (rows, rows, 0, 0, 0, 0));
    assert_eq!((wrong(client, table), left(client, table)), (0, 0));
    let stats = bed.provider.stats();
    assert_eq!(stats.rows.len() as i64, rows);
    let again = extra(&stats);
    assert!(again <= lost, "{again} rows were asked again, {lost} were in flight");
}

#[test]
fn the_whole_server_killed_twice() {
    let mut bed = Bed::with("kills_server", slow(100));
    let mut client = bed.connect();
    tickets(&mut client, "tickets", 1..=ROWS);
    run(&mut client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 4)");
    // Held, so that what is in flight is known: all slots are taken, and all that was answered has been written.
    bed.provider.hold_after(25);
    let job = backfill_with(&mut client, "tickets", "options => '{\"max_rows_per_request\": 20}'");
    let lost = 4 * 20;
    for _ in 0..2 {
        let before = settled(&bed, ROWS, lost);
        assert!((300..ROWS).contains(&before), "{before} are written");
        bed.cluster.kill9();
        bed.provider.hold_after(25);
        bed.cluster.start();
        client = bed.connect();
        // Committed rows are still there, and are counted.
        let p = progress(&mut client, job);
        let written = ROWS - left(&mut client, "tickets");
        assert!(written >= before && p.done >= before, "{written} {p:?} {before}");
    }
    bed.provider.release();
    finished(&bed, &mut client, "tickets", job, ROWS, 2 * lost);
    let log = bed.cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked"), "{log}");
}

/// At any time, not only when the provider holds: what was sent and not committed may be asked again, no more.
#[test]
fn the_whole_server_killed_at_any_time() {
    let mut bed = Bed::with("kills_anytime", slow(20));
    let mut client = bed.connect();
    tickets(&mut client, "tickets", 1..=ROWS);
    run(&mut client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    let job = backfill_with(&mut client, "tickets", "options => '{\"max_rows_per_request\": 10}'");
    let mut lost = 0;
    for part in [3, 47, 331, 700, 1100] {
        let stats = wait_until("rows were asked", PATIENCE, || bed.provider.stats(), |s| s.rows.len() >= part);
        assert!(stats.rows.len() < ROWS as usize, "too fast to be killed");
        bed.cluster.kill9();
        // From now on nothing is answered before the rows are counted.
        bed.provider.hold();
        let asked: i64 = bed.provider.stats().rows.values().map(|r| i64::from(r.asked)).sum();
        bed.cluster.start();
        client = bed.connect();
        let written = ROWS - left(&mut client, "tickets");
        let p = progress(&mut client, job);
        bed.provider.release();
        // Counters and rows are of the same transactions. Of all that was ever asked, this much has got lost so far.
        assert_eq!(p.done, written);
        let more = asked - written - lost;
        assert!((0..=200).contains(&more), "{more} rows of {asked} were lost");
        lost += more;
    }
    finished(&bed, &mut client, "tickets", job, ROWS, lost);
    assert_eq!(extra(&bed.provider.stats()), lost);
}

#[test]
fn the_gateway_terminated_in_the_middle() {
    let bed = Bed::with("kills_gateway", slow(100));
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    tickets(client, "asked", 900_001..=900_300);
    run(
        client,
        "CREATE TEMP TABLE witness AS SELECT 1 AS a; SELECT llm_batch.alter_model('m', max_concurrent_requests => 4)",
    );
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 20}'");
    let session = &mut bed.connect();
    let before = std::thread::scope(|scope| {
        let batch = scope.spawn(|| {
            one(
                session,
                "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM asked', 'topic',
                     '{\"max_rows_per_request\": 5}') r JOIN asked a ON a.id = r.id::bigint AND a.want = r.label",
            )
        });
        wait_until("both are at it", PATIENCE, || bed.provider.stats().rows.len(), |n| *n > 100);
        let before = pid(client, "llm_batch gateway");
        let worker = pid(client, "llm_batch job");
        terminate(client, before);
        let now = wait_until(
            "another gateway",
            PATIENCE,
            || pids(client, "llm_batch gateway"),
            |p| p.len() == 1 && p[0] != before,
        );
        // The worker went on, with a new connection.
        assert_eq!(pids(client, "llm_batch job"), [worker]);
        wait_until("the job goes on", PATIENCE, || progress(client, job).done, |n| *n > 500);
        terminate(client, now[0]);
        assert_eq!(batch.join().unwrap(), 300, "the session's statement got every label");
        before
    });
    assert_eq!(one(client, "SELECT a::bigint FROM witness"), 1);
    let p = bed.done(job);
    assert_eq!(p.counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));
    // Two ends, at most four requests under way at each: of the job 20 rows, of the session 5.
    let again = extra(&bed.provider.stats());
    assert!(again <= 2 * 4 * 20 + 60, "{again} rows were asked again");
    let log = bed.cluster.log();
    assert!(!log.contains("terminated by signal") && !log.contains("reinitializing"), "{log}");
    assert!(log.contains(&format!("[{before}]")));
}

#[test]
fn launcher_and_worker_terminated_in_the_middle() {
    let bed = Bed::with("kills_workers", slow(100));
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE TEMP TABLE witness AS SELECT 1 AS a; SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)",
    );
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 20}'");
    wait_until("the job is at it", PATIENCE, || progress(client, job).done, |n| *n > 100);
    let launcher = pid(client, "llm_batch launcher");
    let worker = pid(client, "llm_batch job");
    terminate(client, launcher);
    wait_until(
        "another launcher",
        PATIENCE,
        || pids(client, "llm_batch launcher"),
        |p| p.len() == 1 && p[0] != launcher,
    );
    let done = progress(client, job).done;
    wait_until("the job goes on", PATIENCE, || progress(client, job).done, |n| *n > done + 100);
    assert_eq!(pids(client, "llm_batch job"), [worker], "a job has one worker");
    // A new job starts through the new launcher at once.
    tickets(client, "second", 500_001..=500_010);
    let start = std::time::Instant::now();
    let second = backfill(client, "second");
    bed.done(second);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    // The worker.
    bed.provider.hold();
    wait_until("requests are held", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    let worker = pid(client, "llm_batch job");
    terminate(client, worker);
    // Nobody waits for what it had asked.
    wait_until("its requests are dropped", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    assert_eq!(progress(client, job).status, "running");
    bed.provider.release();
    let now = wait_until(
        "another worker",
        Duration::from_secs(20),
        || pids(client, "llm_batch job"),
        |p| p.len() == 1 && p[0] != worker,
    );
    assert_ne!(now[0], worker);
    let p = bed.done(job);
    assert_eq!(p.counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));
    let again = extra(&bed.provider.stats());
    assert!(again <= 2 * 20 + 40, "{again} rows were asked again");
    assert_eq!(one(client, "SELECT a::bigint FROM witness"), 1);
    // With both gone at the same time.
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("requests are held", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    let both = [pid(client, "llm_batch job"), pid(client, "llm_batch launcher")];
    for p in both {
        terminate(client, p);
    }
    bed.provider.release();
    bed.done(job);
}

#[test]
fn a_worker_killed_by_a_signal() {
    let bed = Bed::with("kills_signal", slow(100));
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    let lost = 2 * 20;
    let mut job = 0;
    for (round, kind) in ["llm_batch job", "llm_batch gateway", "llm_batch launcher"].into_iter().enumerate() {
        let mut client = bed.connect();
        bed.provider.hold_after(15);
        if round == 0 {
            job = backfill_with(&mut client, "tickets", "options => '{\"max_rows_per_request\": 20}'");
        }
        settled(&bed, ROWS, lost);
        let victim = pid(&mut client, kind);
        // SAFETY: kill takes two integers; the process is one of this test's cluster.
        assert_eq!(unsafe { libc::kill(victim, libc::SIGKILL) }, 0);
        wait_until("all sessions are ended", PATIENCE, || client.simple_query("SELECT 1").is_err(), |gone| *gone);
        common::reconnect(&bed);
    }
    bed.provider.release();
    finished(&bed, &mut bed.connect(), "tickets", job, ROWS, 3 * lost);
}

#[test]
fn jobs_in_two_databases_go_on_after_a_restart() {
    let mut bed = Bed::with("kills_databases", slow(50));
    let mut client = bed.connect();
    run(&mut client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    run(&mut client, "CREATE DATABASE \"Other db\"");
    run(&mut client, "CREATE DATABASE bare");
    let mut other = bed.cluster.connect("Other db");
    install(&mut other, &bed.provider.base_url());
    common::model(&mut other, "m", "");
    common::classifier(&mut other, "topic", &common::labels_json(&common::LABELS), "m", "{}");
    tickets(&mut client, "tickets", 1..=600);
    tickets(&mut client, "more", 600_001..=600_600);
    tickets(&mut other, "tickets", 700_001..=700_600);
    let options = "options => '{\"max_rows_per_request\": 10}'";
    let jobs = [backfill_with(&mut client, "tickets", options), backfill_with(&mut client, "more", options)];
    let far = backfill_with(&mut other, "tickets", options);
    // A paused one stays paused.
    tickets(&mut other, "waiting", 800_001..=800_010);
    let paused =
        one(&mut other, "SELECT llm_batch.backfill('waiting', input => 'body', target => 'topic', task => 'topic')");
    run(&mut other, &format!("SELECT llm_batch.pause({paused})"));
    for way in ["fast", "immediate"] {
        wait_until(
            "all are at it",
            PATIENCE,
            || {
                [
                    progress(&mut client, jobs[0]).done,
                    progress(&mut client, jobs[1]).done,
                    progress(&mut other, far).done,
                ]
            },
            |done| done.iter().all(|n| *n >= 50),
        );
        match way {
            "fast" => {
                bed.cluster.restart();
            }
            _ => {
                bed.cluster.stop_immediate();
                bed.cluster.start();
            }
        }
        client = bed.connect();
        other = bed.cluster.connect("Other db");
    }
    for job in jobs {
        assert_eq!(common::wait_status(&mut client, job, "done").counts(), (600, 600, 0, 0, 0, 0));
    }
    assert_eq!(common::wait_status(&mut other, far, "done").counts(), (600, 600, 0, 0, 0, 0));
    for (db, table) in [("postgres", "tickets"), ("postgres", "more"), ("Other db", "tickets")] {
        let client = &mut bed.cluster.connect(db);
        assert_eq!((wrong(client, table), left(client, table)), (0, 0), "{db} {table}");
    }
    let p = progress(&mut other, paused);
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("user")));
    // Two restarts, two requests of 10 rows at a time, and what was answered and not yet written.
    let again = extra(&bed.provider.stats());
    assert!(again <= 2 * (2 * 10 + 40), "{again} rows were asked again");
    run(&mut other, &format!("SELECT llm_batch.resume({paused})"));
    common::wait_status(&mut other, paused, "done");
}

/// Nothing to find must cost nothing: no process stays in a database, no error is logged.
#[test]
fn an_idle_server_is_quiet() {
    let mut cluster = Cluster::builder("kills_idle").start();
    cluster.connect("postgres").batch_execute("CREATE DATABASE a; ").unwrap();
    cluster.connect("postgres").batch_execute("CREATE DATABASE b ALLOW_CONNECTIONS false").unwrap();
    cluster.restart();
    let client = &mut cluster.connect("postgres");
    let kinds = "SELECT coalesce(string_agg(backend_type, ', ' ORDER BY backend_type), '') FROM pg_stat_activity
                  WHERE backend_type LIKE 'llm_batch%'";
    wait_until(
        "only two processes are left",
        PATIENCE,
        || text(client, kinds),
        |t| t == "llm_batch gateway, llm_batch launcher",
    );
    run(client, "DROP DATABASE a");
    let log = cluster.log();
    for word in ["ERROR:", "FATAL:  could", "WARNING:", "PANIC:"] {
        assert!(!log.contains(word), "{word} in\n{log}");
    }
}

/// Code of a user that catches every cancellation runs in a job's worker: the worker still ends when it is told to, when
/// its job is cancelled, and with the server.
#[test]
fn a_trigger_that_does_not_let_go() {
    let mut bed = Bed::new("kills_trigger");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=10);
    run(
        client,
        "CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN LOOP BEGIN PERFORM pg_sleep(1000); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$;
         CREATE TRIGGER hang BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION hang()",
    );
    let hangs = |client: &mut Client| {
        let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'llm_batch job' AND wait_event = 'PgSleep'";
        let found = || client.query(sql, &[]).unwrap().iter().map(|r| r.get::<_, i32>(0)).collect::<Vec<_>>();
        wait_until("the trigger sleeps", PATIENCE, found, |pids| pids.len() == 1)[0]
    };
    let job = backfill(client, "tickets");
    let worker = hangs(client);
    terminate(client, worker);
    let again = hangs(client);
    assert_ne!(again, worker);
    run(client, &format!("SELECT llm_batch.cancel({job})"));
    wait_until("the slot is free", PATIENCE, || pids(client, "llm_batch job"), Vec::is_empty);
    let job = backfill(client, "tickets");
    hangs(client);
    let start = std::time::Instant::now();
    bed.cluster.restart();
    println!("stopped and started after {:?}", start.elapsed());
    let client = &mut bed.connect();
    hangs(client);
    run(client, &format!("SELECT llm_batch.cancel({job})"));
    wait_until("the slot is free", PATIENCE, || pids(client, "llm_batch job"), Vec::is_empty);
    run(client, "DROP TRIGGER hang ON tickets");
    let job = backfill(client, "tickets");
    assert_eq!(bed.done(job).counts(), (10, 10, 0, 0, 0, 0));
}
