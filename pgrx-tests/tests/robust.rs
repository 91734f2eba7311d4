//! In the middle of a job: nobody has to wait for it, what others write stays, and everything can be stopped.

mod common;

use std::time::{Duration, Instant};

use common::{
    Bed, LABELS, PATIENCE, SMALL, backfill, backfill_with, error, failures, held_job, in_flight, left, one, progress,
    run, set, text, tickets, wait_status, warm, wrong,
};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::{Client, NoTls};

/// The processes of ours that have a transaction or a snapshot; empty if none has.
const OPEN: &str = "SELECT coalesce(string_agg(format('%s %s %s', backend_type, xact_start, backend_xmin), ', '), '')
                  FROM pg_stat_activity
                 WHERE backend_type LIKE 'llm_batch%' AND (xact_start IS NOT NULL OR backend_xmin IS NOT NULL)";

/// Counts rows by how often they were asked: once, twice, more often.
fn asked(bed: &Bed) -> (usize, usize, usize) {
    let stats = bed.provider.stats();
    let count = |ok: fn(u32) -> bool| stats.rows.values().filter(|r| ok(r.asked)).count();
    (count(|n| n == 1), count(|n| n == 2), count(|n| n > 2))
}

/// The marker of a row that is to get this label.
fn marker(id: i64, label: &str) -> String {
    format!("now it is #r{id:06}:{label}# altogether")
}

#[test]
fn no_transaction_while_a_request_is_under_way() {
    let bed = Bed::new("robust_idle");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 3000, 4);
    let kinds = "SELECT coalesce(string_agg(DISTINCT backend_type, ', ' ORDER BY backend_type), '')
                   FROM pg_stat_activity WHERE backend_type LIKE 'llm_batch%'";
    wait_until(
        "the three processes",
        PATIENCE,
        || text(client, kinds),
        |t| t == "llm_batch gateway, llm_batch job, llm_batch launcher",
    );
    // Now and then a worker looks at its row, for some milliseconds; nothing lasts longer than that.
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                  WHERE a.backend_type LIKE 'llm_batch%' AND l.locktype IN ('relation', 'tuple', 'transactionid')";
    let (mut seen, mut samples) = (0, 0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(12) {
        let found = text(client, OPEN);
        let locked = one(client, locks);
        samples += 1;
        if !found.is_empty() || locked > 0 {
            seen += 1;
            wait_until(
                "it ends",
                Duration::from_secs(5),
                || (text(client, OPEN), one(client, locks)),
                |(t, n)| (t.is_empty() || *t != found) && *n == 0,
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(samples > 100 && seen * 20 < samples, "{seen} of {samples}");
    assert_eq!(progress(client, job).done, 0);
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (3000, 3000, 0, 0, 0, 0));
    assert_eq!(asked(&bed), (3000, 0, 0));
}

#[test]
fn what_others_write_meanwhile_stays() {
    let bed = Bed::new("robust_others");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 20, 4);
    // All 20 rows are under way. Nobody has to wait for them.
    run(client, "SET statement_timeout = '1 s'; SET lock_timeout = '200 ms'");
    run(client, "UPDATE tickets SET topic = 'mine' WHERE id = 1");
    run(client, "UPDATE tickets SET topic = 'bug' WHERE id IN (2, 3)");
    run(client, "DELETE FROM tickets WHERE id = 4");
    run(client, "UPDATE tickets SET id = 100005 WHERE id = 5");
    run(client, &format!("UPDATE tickets SET body = '{}', want = 'praise' WHERE id = 6", marker(6, "praise")));
    run(client, "UPDATE tickets SET body = NULL WHERE id = 7");
    run(client, "UPDATE tickets SET body = body || ' ', want = want WHERE id = 8");
    // Something else of the row, and the same again: that changes nothing.
    run(client, "ALTER TABLE tickets ADD note text; UPDATE tickets SET note = 'x' WHERE id = 9");
    run(client, "UPDATE tickets SET body = body WHERE id = 10");
    // Away and back again.
    run(client, "UPDATE tickets SET body = 'x' WHERE id = 11");
    run(client, "UPDATE tickets SET body = concat('My order #r000011:', want, '# is not what I wanted') WHERE id = 11");
    run(client, "UPDATE tickets SET topic = 'mine' WHERE id = 12");
    run(client, "UPDATE tickets SET topic = NULL WHERE id = 12");
    run(client, "RESET statement_timeout; RESET lock_timeout");
    bed.provider.release();
    let p = bed.done(job);
    let is = |client: &mut Client, id: i64| {
        text(client, &format!("SELECT coalesce(topic, 'NULL') FROM tickets WHERE id = {id}"))
    };
    assert_eq!(is(client, 1), "mine");
    assert_eq!([is(client, 2), is(client, 3)], ["bug", "bug"]);
    assert_eq!(is(client, 6), "praise");
    // No text: nothing to ask.
    assert_eq!(is(client, 7), "NULL");
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE topic <> want AND id NOT IN (1, 2, 3)"), 0);
    assert_eq!(left(client, "tickets"), 1);
    assert_eq!(is(client, 100_005), text(client, "SELECT want FROM tickets WHERE id = 100005"));
    let rows = bed.provider.stats().rows;
    // The changed texts were asked again, as they are now; and the row that has another key.
    let twice: Vec<&str> = rows.iter().filter(|(_, r)| r.asked == 2).map(|(id, _)| id.as_str()).collect();
    assert_eq!(twice, ["000005", "000006", "000008"], "{p:?}");
    assert!(rows.values().all(|r| r.asked <= 2));
    let texts: Vec<String> = bed.provider.bodies().iter().map(|b| b["messages"][1]["content"].to_string()).collect();
    assert!(texts.iter().any(|t| t.contains(&marker(6, "praise"))));
    assert_eq!((p.failed, p.left), (0, 0), "{p:?}");
    // 1 to 5 were filled, deleted or given another key by others; 7 lost its text.
    assert!(p.superseded >= 5, "{p:?}");
    assert_eq!(p.done, one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL") - 3, "{p:?}");
}

/// A row whose text changes each time it is asked about is given up after max_attempts.
#[test]
fn a_row_that_never_stays_the_same() {
    let bed = Bed::new("robust_restless");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=10);
    // Time enough to change the text while it is asked about.
    bed.provider.configure(|c| c.latency.base = Duration::from_millis(700));
    let job = backfill_with(client, "tickets", SMALL);
    let times = |bed: &Bed| bed.provider.stats().rows.get("000003").map_or(0, |r| r.asked);
    for round in 1..=3 {
        wait_until("it is asked", PATIENCE, || times(&bed), |n| *n == round);
        let body = marker(3, LABELS[round as usize]);
        run(client, &format!("UPDATE tickets SET body = '{body}' WHERE id = 3"));
    }
    let p = bed.done(job);
    assert_eq!(times(&bed), 3);
    assert_eq!(p.counts(), (10, 9, 0, 1, 0, 0));
    let listed = failures(client, job);
    assert_eq!((listed[0].2.as_str(), listed[0].0["id"].as_i64()), ("input_changed", Some(3)), "{listed:?}");
    assert_eq!(left(client, "tickets"), 1);
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE id <> 3 AND topic = want"), 9);
}

#[test]
fn a_row_that_someone_holds_locked() {
    let bed = Bed::new("robust_locked");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 50, 2);
    let other = &mut bed.connect();
    run(
        other,
        "BEGIN; SELECT FROM tickets WHERE id IN (2, 17) FOR UPDATE; UPDATE tickets SET want = want WHERE id = 33",
    );
    let third = &mut bed.connect();
    run(third, "BEGIN; UPDATE tickets SET topic = 'mine' WHERE id = 40");
    bed.provider.release();
    let p = wait_until("the others are written", PATIENCE, || progress(client, job), |p| p.done == 46);
    assert_eq!((p.status.as_str(), p.left, left(client, "tickets")), ("running", 4, 4), "{p:?}");
    // While it waits it does not ask again, and holds no transaction.
    let requests = bed.provider.stats().requests;
    run(other, "COMMIT");
    wait_until("they are written after the commit", PATIENCE, || progress(client, job), |p| p.done == 49);
    run(third, "COMMIT");
    let p = bed.done(job);
    assert_eq!(p.counts(), (50, 49, 0, 0, 1, 0));
    assert_eq!(bed.provider.stats().requests, requests);
    assert_eq!(asked(&bed), (50, 0, 0));
    assert_eq!(text(client, "SELECT topic FROM tickets WHERE id = 40"), "mine");
    assert_eq!(wrong(client, "tickets"), 1);
    // Rows that are only shared by a foreign key are not in the way.
    run(client, "UPDATE tickets SET topic = NULL; CREATE TABLE notes (ticket bigint REFERENCES tickets)");
    run(other, "BEGIN; INSERT INTO notes SELECT id FROM tickets");
    let job = backfill(client, "tickets");
    bed.done(job);
    run(other, "COMMIT");
}

/// The table is locked as a whole for a while (a migration, a VACUUM FULL).
#[test]
fn a_table_that_someone_holds_locked() {
    let bed = Bed::new("robust_table_lock");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 50, 2);
    let other = &mut bed.connect();
    run(other, "BEGIN; LOCK TABLE tickets IN ACCESS EXCLUSIVE MODE");
    bed.provider.release();
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'tickets'::regclass";
    wait_until("the worker waits", PATIENCE, || one(client, waiting), |n| *n == 1);
    assert!(text(client, OPEN).starts_with("llm_batch job "), "a transaction that is open is seen");
    // Its lock_timeout passes, it lets go of all it holds, and tries again.
    wait_until("the worker has let go", PATIENCE, || one(client, waiting), |n| *n == 0);
    wait_until("the worker waits again", PATIENCE, || one(client, waiting), |n| *n == 1);
    assert_eq!(progress(client, job).status, "running");
    run(other, "COMMIT");
    assert_eq!(bed.done(job).counts(), (50, 50, 0, 0, 0, 0));
    assert_eq!(asked(&bed), (50, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);
}

/// A trigger that waits for what someone else holds: the rows beside its own are written.
#[test]
fn a_trigger_that_waits_for_a_lock() {
    let bed = Bed::new("robust_trigger_lock");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE TABLE shop (open boolean); INSERT INTO shop VALUES (true);
         CREATE FUNCTION ask_shop() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN PERFORM FROM shop FOR UPDATE; RETURN NEW; END $$",
    );
    tickets(client, "tickets", 1..=50);
    run(
        client,
        "CREATE TRIGGER ask_shop BEFORE UPDATE ON tickets FOR EACH ROW WHEN (NEW.id IN (5, 44)) EXECUTE FUNCTION ask_shop()",
    );
    let other = &mut bed.connect();
    run(other, "BEGIN; SELECT FROM shop FOR UPDATE");
    let job = backfill(client, "tickets");
    let p = wait_until("the others are written", PATIENCE, || progress(client, job), |p| p.done == 48);
    assert_eq!((p.status.as_str(), p.failed), ("running", 0), "{p:?}");
    // While it waits it does not keep a row that it has locked for long.
    run(client, "SET lock_timeout = '20 s'; SELECT FROM tickets FOR UPDATE; RESET lock_timeout");
    run(other, "COMMIT");
    assert_eq!(bed.done(job).counts(), (50, 50, 0, 0, 0, 0));
    assert_eq!(asked(&bed), (50, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);

    // All rows of a page wait, and are written together with those of another page: these are written.
    run(client, "DROP TABLE tickets");
    tickets(client, "tickets", 1..=400);
    run(
        client,
        "CREATE TRIGGER ask_shop BEFORE UPDATE ON tickets FOR EACH ROW WHEN (NEW.id > 200) EXECUTE FUNCTION ask_shop()",
    );
    bed.provider.reset_stats();
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 100}'");
    let queued = "SELECT sum(queued)::bigint FROM llm_batch.activity";
    wait_until(
        "all are claimed",
        PATIENCE,
        || one(client, queued) + bed.provider.stats().rows_in_flight as i64,
        |n| *n == 400,
    );
    run(other, "BEGIN; SELECT FROM shop FOR UPDATE");
    run(client, "BEGIN; LOCK TABLE tickets IN SHARE MODE");
    bed.provider.release();
    wait_until("all are answered", PATIENCE, || bed.provider.stats(), |s| s.rows.len() == 400 && s.in_flight == 0);
    run(client, "COMMIT");
    wait_until("those are written", Duration::from_secs(60), || progress(client, job).done, |n| *n == 200);
    run(other, "COMMIT");
    assert_eq!(bed.done(job).counts(), (400, 400, 0, 0, 0, 0));
    assert_eq!(asked(&bed), (400, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);
}

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

/// The table or its columns go away in the middle: the job fails and says why, and nothing is written elsewhere.
#[test]
fn tables_and_columns_that_change_in_the_middle() {
    let bed = Bed::new("robust_ddl");
    let client = &mut bed.connect();
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    for (i, (change, says)) in [
        ("DROP TABLE t", "table of the job was dropped"),
        ("ALTER TABLE t RENAME COLUMN topic TO subject", "topic"),
        ("ALTER TABLE t DROP COLUMN topic", "topic"),
        ("ALTER TABLE t DROP COLUMN topic; ALTER TABLE t ADD topic text", "topic"),
        ("ALTER TABLE t RENAME COLUMN topic TO subject; ALTER TABLE t RENAME COLUMN spare TO topic", "topic"),
        ("ALTER TABLE t ALTER topic TYPE varchar(3)", "topic"),
        ("ALTER TABLE t RENAME COLUMN id TO key", "id"),
        ("ALTER TABLE t DROP COLUMN id; ALTER TABLE t ADD id bigserial PRIMARY KEY", "id"),
        ("ALTER TABLE t RENAME COLUMN body TO text", "body"),
        ("ALTER TABLE t DROP COLUMN body", "body"),
        (
            "DROP TABLE t; CREATE TABLE t (id bigint PRIMARY KEY, body text, want text, topic text, spare text)",
            "dropped",
        ),
        ("DROP SCHEMA s CASCADE; CREATE SCHEMA s", "dropped"),
    ]
    .into_iter()
    .enumerate()
    {
        run(client, "CREATE SCHEMA IF NOT EXISTS s; SET search_path = s, public; DROP TABLE IF EXISTS t");
        let first = 1000 * (i as i64 + 1);
        tickets(client, "t", first..=first + 19);
        run(client, "ALTER TABLE t ADD spare text; CREATE TABLE IF NOT EXISTS twin (LIKE t)");
        warm(client, "t");
        bed.provider.hold();
        let job = backfill_with(client, "t", SMALL);
        in_flight(&bed, 2);
        run(client, &format!("SET client_min_messages = warning; BEGIN; {change}; COMMIT"));
        bed.provider.release();
        let p = wait_until(
            "the job ends",
            PATIENCE,
            || progress(client, job),
            |p| ["done", "failed"].contains(&p.status.as_str()),
        );
        assert_eq!(p.status, "failed", "{change}: {p:?}");
        let last = p.last_error.clone().unwrap_or_default();
        assert!(last.contains(says), "{change}: {last}");
        let columns: Vec<String> = client
            .query("SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass('s.t') AND attnum > 0 AND NOT attisdropped AND attname IN ('topic', 'subject', 'spare')", &[])
            .unwrap()
            .iter()
            .map(|r| r.get(0))
            .collect();
        for column in columns {
            assert_eq!(
                one(client, &format!("SELECT count(*) FROM s.t WHERE {column} IS NOT NULL")),
                0,
                "{change}: {column}"
            );
        }
    }
    // A change that does not matter to the job does not end it.
    for (i, change) in [
        "ALTER TABLE t RENAME TO \"New name\"; ALTER TABLE \"New name\" SET SCHEMA s2; ALTER TABLE s2.\"New name\" RENAME TO t; ALTER TABLE s2.t SET SCHEMA s",
        "ALTER TABLE t RENAME TO u; ALTER TABLE u RENAME TO t",
        "ALTER TABLE t ADD another int DEFAULT 1; ALTER TABLE t DROP COLUMN spare",
        "CREATE INDEX ON t (topic); ANALYZE t",
        "ALTER TABLE t ALTER want TYPE varchar",
        "CLUSTER t USING t_pkey",
    ]
    .into_iter()
    .enumerate()
    {
        run(client, "CREATE SCHEMA IF NOT EXISTS s; CREATE SCHEMA IF NOT EXISTS s2; SET search_path = s, public; DROP TABLE IF EXISTS t");
        let first = 100_000 + 1000 * (i as i64 + 1);
        tickets(client, "t", first..=first + 19);
        run(client, "ALTER TABLE t ADD spare text");
        warm(client, "t");
        bed.provider.hold();
        let job = backfill_with(client, "t", SMALL);
        in_flight(&bed, 2);
        run(client, change);
        bed.provider.release();
        let p = bed.done(job);
        assert_eq!(p.counts(), (20, 20, 0, 0, 0, 0), "{change}");
        assert_eq!((wrong(client, "t"), left(client, "t")), (0, 0));
    }
    // Renamed for good in the middle: it is the table that counts.
    run(client, "DROP TABLE t");
    tickets(client, "t", 200_001..=200_020);
    bed.provider.hold();
    let job = backfill_with(client, "t", SMALL);
    in_flight(&bed, 2);
    run(
        client,
        "ALTER TABLE t RENAME TO \"Odd \"\"name\"; ALTER TABLE \"Odd \"\"name\" SET SCHEMA s2; CREATE TABLE s.t (id bigint PRIMARY KEY, body text, topic text)",
    );
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (20, 20, 0, 0, 0, 0));
    assert_eq!((wrong(client, "s2.\"Odd \"\"name\""), left(client, "s2.\"Odd \"\"name\"")), (0, 0));
}

/// Settings of an owner's role or of the database must not change what a job is.
#[test]
fn settings_of_the_owners_role() {
    let bed = Bed::new("robust_role");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE ROLE odd LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO odd; GRANT CREATE ON SCHEMA public TO odd;
         CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO odd;
         CREATE FUNCTION evil.lower(text) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'evil' $$;
         CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
         CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.same);
         CREATE TABLE evil.tickets (id bigint PRIMARY KEY, body text, topic text)",
    );
    let version = one(client, "SELECT current_setting('server_version_num')::bigint");
    for (i, (name, value)) in [
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_isolation", "\"repeatable read\""),
        ("default_transaction_deferrable", "on"),
        ("statement_timeout", "1"),
        ("lock_timeout", "1"),
        ("idle_in_transaction_session_timeout", "1"),
        ("idle_session_timeout", "1"),
        ("search_path", "evil, pg_catalog"),
        ("search_path", "''"),
        ("role", "odd"),
        ("row_security", "off"),
        ("synchronous_commit", "off"),
        ("session_replication_role", "replica"),
        ("enable_indexscan", "off"),
        ("DateStyle", "'SQL, DMY'"),
        ("bytea_output", "escape"),
        ("standard_conforming_strings", "off"),
        ("transform_null_equals", "on"),
        ("client_encoding", "LATIN1"),
        ("default_toast_compression", "pglz"),
        ("client_min_messages", "debug5"),
        ("plan_cache_mode", "force_generic_plan"),
        (if version < 160_000 { "force_parallel_mode" } else { "debug_parallel_query" }, "on"),
        ("session_preload_libraries", "pg_llm_batch"),
    ]
    .into_iter()
    .enumerate()
    {
        let first = 1000 * (i as i64 + 1);
        run(client, "DROP TABLE IF EXISTS tickets");
        tickets(client, "tickets", first..=first + 19);
        run(client, "ALTER TABLE tickets OWNER TO odd");
        run(client, &format!("ALTER ROLE odd SET {name} = {value}"));
        // By a superuser, whose own settings are plain, for the table's owner.
        let job = backfill_with(client, "tickets", "filter => 'lower(want) = want'");
        let p = wait_until("the job ends", PATIENCE, || progress(client, job), |p| p.status != "running");
        assert_eq!((p.status.as_str(), p.counts()), ("done", (20, 20, 0, 0, 0, 0)), "{name} = {value}: {p:?}");
        assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0), "{name} = {value}");
        run(client, "ALTER ROLE odd RESET ALL");
    }
    assert_eq!(one(client, "SELECT count(*) FROM evil.tickets"), 0);
    assert!(bed.provider.stats().rows.values().all(|r| r.asked == 1));
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
