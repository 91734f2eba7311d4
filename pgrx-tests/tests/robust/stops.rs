//! Everything can be stopped: jobs, statements, the server.

use std::time::{Duration, Instant};

use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::NoTls;

use super::asked;
use crate::common::{
    self, Bed, LABELS, PATIENCE, SMALL, backfill, backfill_with, error, held_job, in_flight, left, one, progress, run,
    set, text, tickets, wait_status, warm, wrong,
};

#[test]
fn pause_resume_and_cancel_in_the_middle() {
    let bed = Bed::new("robust_pause");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    // While requests are held it would wait for ever, if it waited for them.
    run(client, &format!("SELECT llm_batch.pause({job})"));
    assert_eq!(progress(client, job).reason.as_deref(), Some("user"));
    // Rows that wait in the gateway are withdrawn: within a second on a machine that is not busy.
    wait_until(
        "nothing is queued",
        PATIENCE,
        || one(client, "SELECT sum(queued)::bigint FROM llm_batch.activity"),
        |n| *n == 0,
    );
    bed.provider.release();
    let p = wait_until("what was sent is written", PATIENCE, || progress(client, job), |p| p.done == 10);
    assert_eq!((p.status.as_str(), p.left), ("paused", 90));
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("the worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    assert_eq!(bed.provider.stats().rows.len(), 10, "queued rows were sent after the pause");
    assert_eq!(text(client, &format!("SELECT llm_batch.pause({job})")), "f");
    // Resumed and paused again at once, a few times.
    bed.provider.hold();
    for _ in 0..5 {
        run(client, &format!("SELECT llm_batch.resume({job}), llm_batch.pause({job})"));
        run(client, &format!("SELECT llm_batch.resume({job})"));
        run(client, &format!("SELECT llm_batch.pause({job})"));
    }
    run(client, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(text(client, &format!("SELECT llm_batch.resume({job})")), "f");
    // One, if a pause came between the first and the second: what is under way is awaited before anything else is sent.
    wait_until("requests are held", PATIENCE, || bed.provider.stats().in_flight, |n| (1..=2).contains(n));
    // Paused and resumed while requests are still under way.
    run(client, &format!("SELECT llm_batch.pause({job})"));
    wait_until(
        "nothing is queued",
        PATIENCE,
        || one(client, "SELECT sum(queued)::bigint FROM llm_batch.activity"),
        |n| *n == 0,
    );
    run(client, &format!("SELECT llm_batch.resume({job})"));
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(asked(&bed), (100, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);

    // Cancelled.
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.reset_stats();
    bed.provider.hold();
    let job = backfill_with(client, "tickets", SMALL);
    in_flight(&bed, 2);
    run(client, "LISTEN llm_batch");
    run(client, &format!("SELECT llm_batch.cancel({job})"));
    assert_eq!(progress(client, job).status, "cancelled");
    // A request that hangs is given up, and may have been paid.
    wait_until("the worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    wait_until("the requests are dropped", PATIENCE, || bed.provider.stats().abandoned, |n| *n == 2);
    assert_eq!((progress(client, job).done, left(client, "tickets")), (0, 100));
    let unconfirmed = format!("SELECT tokens_unconfirmed FROM llm_batch.job_state WHERE job_id = {job}");
    assert!(one(client, &unconfirmed) > 200);
    bed.provider.release();
    // A new job asks all.
    let job = backfill_with(client, "tickets", SMALL);
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
}

#[test]
fn an_open_transaction_with_a_pause_blocks_nothing() {
    let bed = Bed::new("robust_open");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    let other = &mut bed.connect();
    run(other, &format!("BEGIN; SELECT llm_batch.pause({job})"));
    bed.provider.release();
    // Others do not see it yet: the job runs on to its end, and its accounts are written.
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    run(other, "COMMIT");
    // A pause that came too late changes nothing.
    assert_eq!(progress(client, job).status, "done");
    run(client, &format!("CALL llm_batch.wait({job}, '10 s')"));
    // A pause that is rolled back.
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.hold();
    let job = backfill_with(client, "tickets", SMALL);
    in_flight(&bed, 2);
    run(other, &format!("BEGIN; SELECT llm_batch.pause({job}); ROLLBACK"));
    run(other, &format!("BEGIN; SELECT llm_batch.cancel({job}); ROLLBACK"));
    bed.provider.release();
    bed.done(job);
    // A backfill() that is rolled back never was; one in an open transaction starts at its commit.
    run(client, "UPDATE tickets SET topic = NULL");
    run(client, "BEGIN");
    backfill(client, "tickets");
    run(client, "ROLLBACK; BEGIN");
    let job = backfill(client, "tickets");
    assert_eq!(one(other, "SELECT count(*) FROM llm_batch.progress WHERE status = 'running'"), 0);
    let start = Instant::now();
    run(client, "COMMIT");
    bed.done(job);
    assert!(start.elapsed() < Duration::from_secs(40), "it started late: {:?}", start.elapsed());
}

/// Everything that can end a session's statement does, while a request of it hangs.
#[test]
fn statements_can_be_cancelled() {
    let bed = Bed::new("robust_cancel");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=200);
    let batch = "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic')";
    let single = "SELECT llm_classify(body, 'topic') FROM tickets WHERE id = 7";
    for sql in [batch, single] {
        let reset = |bed: &Bed| {
            wait_until("the gateway has dropped the request", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
        };
        bed.provider.hold();
        // Ctrl-C.
        let session = &mut bed.connect();
        let token = session.cancel_token();
        std::thread::scope(|scope| {
            let statement = scope.spawn(|| error(session, sql));
            wait_until("a request hangs", PATIENCE, || bed.provider.stats().in_flight, |n| *n > 0);
            let start = Instant::now();
            token.cancel_query(NoTls).unwrap();
            assert_eq!(statement.join().unwrap().0, "57014");
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        });
        reset(&bed);
        // The session goes on, with the same statement.
        run(session, "SET statement_timeout = '300 ms'");
        let start = Instant::now();
        let (code, message, ..) = error(session, sql);
        assert_eq!(code, "57014", "{message}");
        assert!(message.contains("statement timeout") && start.elapsed() < Duration::from_secs(20));
        reset(&bed);
        run(session, "RESET statement_timeout");
        // In a subtransaction, whose block goes on.
        run(session, "SET statement_timeout = '300 ms'; BEGIN; SAVEPOINT a");
        assert_eq!(error(session, sql).0, "57014");
        run(session, "ROLLBACK TO a; SELECT 1; COMMIT; RESET statement_timeout");
        reset(&bed);
        // By another session.
        for how in ["pg_cancel_backend", "pg_terminate_backend"] {
            let mut session = bed.connect();
            let pid = text(&mut session, "SELECT pg_backend_pid()");
            std::thread::scope(|scope| {
                let statement = scope.spawn(move || session.batch_execute(sql).unwrap_err());
                wait_until("a request hangs", PATIENCE, || bed.provider.stats().in_flight, |n| *n > 0);
                run(client, &format!("SELECT {how}({pid})"));
                let error = statement.join().unwrap();
                let code = error.code().map(|c| c.code().to_owned());
                assert!(matches!(code.as_deref(), Some("57014" | "57P01") | None), "{how}: {error:?}");
            });
            reset(&bed);
        }
        bed.provider.release();
        // A late answer of what was cancelled does not get into the next statement.
        assert_eq!(
            one(
                session,
                "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic') r JOIN tickets t ON t.id = r.id::bigint AND t.want = r.label"
            ),
            200
        );
        assert_eq!(text(session, single), text(session, "SELECT want FROM tickets WHERE id = 7"));
    }
    // The probe of backfill(), too.
    bed.provider.hold();
    common::model(client, "n", "");
    run(client, "SELECT llm_batch.alter_classifier('topic', model => 'n')");
    run(client, "SET statement_timeout = '500 ms'");
    assert_eq!(
        error(client, "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic')").0,
        "57014"
    );
    wait_until(
        "the gateway has dropped the probe",
        Duration::from_secs(10),
        || bed.provider.stats().in_flight,
        |n| *n == 0,
    );
    let log = bed.cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked") && !log.contains("reinitializing"));
}

/// A cursor over the rows, closed before its end; an error in the midst of the statement.
#[test]
fn statements_that_end_early() {
    let bed = Bed::new("robust_early");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    run(
        client,
        "BEGIN; DECLARE c CURSOR FOR SELECT llm_classify(body, 'topic') FROM tickets; FETCH 3 FROM c; CLOSE c; COMMIT;
         SELECT llm_classify(body, 'topic') FROM tickets LIMIT 2;
         SELECT * FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic') LIMIT 1",
    );
    assert_eq!(error(client, "SELECT 1 / (llm_classify(body, 'topic') = 'x')::int FROM tickets LIMIT 5").0, "22012");
    // The query of the statement fails half way: what was asked before is let go.
    let sql = "SELECT * FROM llm_classify_batch('SELECT 1 / (150 - id), body FROM (SELECT id, body FROM tickets UNION ALL SELECT id + 100, body FROM tickets ORDER BY 1) t', 'topic')";
    assert_eq!(error(client, sql).0, "22012");
    assert_eq!(
        one(
            client,
            "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic') r JOIN tickets t ON t.id = r.id::bigint AND t.want = r.label"
        ),
        100
    );
    // Nested: the query of a statement asks itself.
    let n = one(
        client,
        "SELECT count(*) FROM llm_classify_batch($$SELECT id, concat(body, llm_classify(body, 'topic')) FROM tickets WHERE id <= 5$$, 'topic') r
           JOIN tickets t ON t.id = r.id::bigint AND t.want = r.label",
    );
    assert_eq!(n, 5);
    wait_until("nothing is left in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
}

#[test]
fn the_database_or_the_extension_dropped_in_the_middle() {
    let bed = Bed::new("robust_drop");
    let client = &mut bed.connect();
    run(client, "CREATE DATABASE other");
    let mut other = bed.cluster.connect("other");
    common::install(&mut other, &bed.provider.base_url());
    common::model(&mut other, "m", "max_concurrent_requests => 2");
    common::classifier(&mut other, "topic", &common::labels_json(&LABELS), "m", "{}");
    tickets(&mut other, "tickets", 1..=100);
    warm(&mut other, "tickets");
    bed.provider.hold();
    backfill_with(&mut other, "tickets", SMALL);
    in_flight(&bed, 2);
    let start = Instant::now();
    run(client, "DROP DATABASE other WITH (FORCE)");
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    wait_until("its requests are dropped", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    bed.provider.release();
    // Nothing looks for it any more.
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'llm_batch%' AND backend_type NOT IN ('llm_batch gateway', 'llm_batch launcher')";
    wait_until("no worker is left", PATIENCE, || one(client, workers), |n| *n == 0);

    // The extension.
    let job = held_job(&bed, client, 200, 2);
    let start = Instant::now();
    run(client, "SET client_min_messages = warning; SET lock_timeout = '10 s'; DROP EXTENSION pg_llm_batch CASCADE");
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    bed.provider.release();
    wait_until("no worker is left", PATIENCE, || one(client, workers), |n| *n == 0);
    assert_eq!(one(client, "SELECT count(*) FROM pg_namespace WHERE nspname = 'llm_batch'"), 0);
    wait_until("nothing is in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    run(client, "RESET lock_timeout");
    common::install(client, &bed.provider.base_url());
    common::model(client, "m", "max_concurrent_requests => 2");
    common::classifier(client, "topic", &common::labels_json(&LABELS), "m", "{}");
    let again = backfill_with(client, "tickets", SMALL);
    let p = bed.done(again);
    assert_eq!(p.left, 0);
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));
    assert!(again <= job, "a new life begins with new numbers");
    let failed: Vec<String> = bed
        .cluster
        .log()
        .lines()
        .filter(|l| l.contains("llm_batch") && l.contains("FATAL:  database"))
        .map(str::to_owned)
        .collect();
    assert!(failed.len() <= 3, "a dropped database is looked for again and again: {failed:#?}");
}

#[test]
fn a_fast_shutdown_in_the_middle() {
    let mut bed = Bed::new("robust_shutdown");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    // A session that waits for an answer, one that waits for a job, one that holds a transaction open.
    let mut sessions = [bed.connect(), bed.connect(), bed.connect()];
    run(&mut sessions[2], "BEGIN");
    let [mut asking, mut waiting, _idle] = sessions;
    let statement =
        std::thread::spawn(move || asking.batch_execute("SELECT llm_classify('#r900000:bug#', 'topic')").is_err());
    let call = std::thread::spawn(move || waiting.batch_execute(&format!("CALL llm_batch.wait({job})")).is_err());
    wait_until(
        "both are at it",
        PATIENCE,
        || {
            one(
                client,
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND (query LIKE '%llm_classify%' OR query LIKE 'CALL%') AND pid <> pg_backend_pid()",
            )
        },
        |n| *n == 2,
    );
    let start = Instant::now();
    assert!(bed.cluster.stop().success());
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    assert!(statement.join().unwrap() && call.join().unwrap());
    wait_until("the requests are dropped", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    bed.provider.release();
    bed.cluster.start();
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(wrong(&mut bed.connect(), "tickets"), 0);
    let (_, twice, more) = asked(&bed);
    assert!(twice <= 10 && more == 0, "{twice} rows were asked twice, 10 were in flight");
    let log = bed.cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked"), "{log}");
}

#[test]
fn switched_off_and_on() {
    let bed = Bed::new("robust_enabled");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    let mut session = bed.connect();
    let statement = std::thread::spawn(move || error(&mut session, "SELECT llm_classify('#r900000:bug#', 'topic')"));
    wait_until("it waits", PATIENCE, || one(client, "SELECT sum(queued)::bigint FROM llm_batch.activity"), |n| *n > 30);
    set(&bed, "llm_batch.enabled", "off");
    // At once: what is under way is dropped.
    wait_until("requests are dropped", Duration::from_secs(5), || bed.provider.stats().in_flight, |n| *n == 0);
    let (code, message, _, hint) = statement.join().unwrap();
    assert_eq!(code, "55000", "{message}");
    assert!(message.contains("disabled") && hint.contains("llm_batch.enabled"), "{message} {hint}");
    let requests = bed.provider.stats().requests;
    let (code, message, ..) = error(client, "SELECT llm_classify('#r900001:bug#', 'topic')");
    assert_eq!(code, "55000", "{message}");
    tickets(client, "second", 500_001..=500_010);
    let (code, message, ..) =
        error(client, "SELECT llm_batch.backfill('second', input => 'body', target => 'topic', task => 'topic')");
    assert_eq!(code, "55000", "{message}");
    bed.provider.release();
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("the worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    assert_eq!(bed.provider.stats().requests, requests);
    assert_eq!(left(client, "tickets"), 100);
    // It can be controlled meanwhile.
    run(client, &format!("SELECT llm_batch.pause({job})"));
    run(client, &format!("SELECT llm_batch.resume({job})"));
    set(&bed, "llm_batch.enabled", "on");
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);
    let (_, twice, more) = asked(&bed);
    assert!(twice <= 10 && more == 0, "{twice} rows were asked twice, 10 were in flight");
    assert_eq!(text(client, "SELECT llm_classify('#r900002:bug#', 'topic')"), "bug");
}

/// No slot for a worker: the job says so, and starts when there is one.
#[test]
fn no_worker_is_free() {
    let cluster = Cluster::builder("robust_slots").conf("llm_batch.max_job_workers", "1");
    let bed = Bed::build(cluster, llm_fake_provider::Config::default());
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 20, 2);
    tickets(client, "second", 500_001..=500_020);
    let second = backfill(client, "second");
    let p = wait_until("the second waits", PATIENCE, || progress(client, second), |p| p.status == "paused");
    assert_eq!(p.reason.as_deref(), Some("no_worker_slot"));
    bed.provider.release();
    bed.done(job);
    run(client, &format!("CALL llm_batch.wait({second}, '60 s')"));
    bed.done(second);
    assert_eq!(wait_status(client, second, "done").counts(), (20, 20, 0, 0, 0, 0));
}
