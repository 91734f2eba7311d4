//! What others write stays, and what they hold is waited for.

use std::time::{Duration, Instant};

use pg_llm_batch_e2e::wait_until;
use postgres::Client;

use super::asked;
use crate::common::{
    Bed, LABELS, PATIENCE, SMALL, backfill, backfill_with, error, failures, held_job, left, one, progress, run, text,
    tickets, version, warm, wrong,
};

/// The processes of ours that have a transaction or a snapshot; empty if none has.
const OPEN: &str = "SELECT coalesce(string_agg(format('%s %s %s', backend_type, xact_start, backend_xmin), ', '), '')
                  FROM pg_stat_activity
                 WHERE backend_type LIKE 'llm_batch%' AND (xact_start IS NOT NULL OR backend_xmin IS NOT NULL)";

/// The marker of a row that is to get this label.
fn marker(id: i64, label: &str) -> String {
    format!("now it is #r{id:06}:{label}# altogether")
}

/// Nobody reads the notifications: a commit with one more of them would fail.
#[test]
fn a_full_queue_of_notifications() {
    let mut bed = Bed::new("robust_notify");
    // Before Postgres 17 the queue has 8 GB.
    if version(&mut bed.connect()) < 170_000 {
        eprintln!("SKIPPED a_full_queue_of_notifications: needs Postgres 17");
        return;
    }
    run(&mut bed.connect(), "ALTER SYSTEM SET max_notify_queue_pages = 64");
    bed.cluster.restart();
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    let deaf = &mut bed.connect();
    run(deaf, "LISTEN z");
    run(deaf, "BEGIN");
    run(deaf, "SELECT 1");
    let fill =
        "DO $$BEGIN FOR i IN 1..200 LOOP PERFORM pg_notify('z', rpad(i::text, 7900, 'x')); COMMIT; END LOOP; END$$";
    let (_, message, ..) = error(client, fill);
    assert!(message.contains("too many notifications"), "{message}");
    let job = backfill(client, "tickets");
    assert_eq!(bed.done(job).counts(), (20, 20, 0, 0, 0, 0));
    run(deaf, "COMMIT");
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
