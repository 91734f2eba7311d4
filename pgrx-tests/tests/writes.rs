//! Answers that can't be written: no more is asked than can be kept, the owner is told why, nothing is paid for twice,
//! and the job goes on when it can.

mod common;

use common::{
    Bed, PATIENCE, Progress, SMALL, all_right_once, backfill, backfill_with, failures, held_job, in_flight, left, one,
    pause_held, progress, run, text, tickets, wait_status, wrong,
};
use llm_fake_provider::Config;
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// Rows that may have been asked and not been written.
const AHEAD: usize = 2_000;
const WORKERS: &str = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";

#[track_caller]
fn wait_reason(client: &mut Client, job: i64, status: &str, reason: &str) -> Progress {
    wait_until(
        &format!("job {job} is {status} ({reason})"),
        PATIENCE,
        || progress(client, job),
        |p| p.status == status && p.reason.as_deref() == Some(reason),
    )
}

/// As many rows as are asked now are asked after the worker has tried again a few times.
#[track_caller]
fn asks_no_more(bed: &Bed, client: &mut Client, job: i64) -> usize {
    let tried = format!("SELECT updated_at::text FROM llm_batch.progress WHERE job_id = {job}");
    wait_until("what was handed over is answered", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    let asked = bed.provider.stats().rows.len();
    for _ in 0..2 {
        let before = text(client, &tried);
        wait_until("it is tried again", PATIENCE, || text(client, &tried), |t| *t != before);
    }
    assert_eq!(bed.provider.stats().rows.len(), asked, "more was asked");
    assert!(asked <= AHEAD, "{asked} rows were asked and not written");
    asked
}

/// The accounts hold every request but a probe.
#[track_caller]
fn all_counted(bed: &Bed, p: &Progress) {
    let requests = bed.provider.stats().requests as i64;
    assert!(p.requests == requests || p.requests + 1 == requests, "{requests}: {p:?}");
}

/// CREATE INDEX and the like: the table can be read, and not be written.
#[test]
fn a_lock_that_lets_reads_through() {
    let cluster = Cluster::builder("writes_lock").conf("max_prepared_transactions", "2");
    let mut bed = Bed::build(cluster, Config::default());
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=5_000);
    let other = &mut bed.connect();
    let holder = text(other, "SELECT pg_backend_pid()");
    run(other, "BEGIN; LOCK TABLE tickets IN SHARE MODE");
    let job = backfill(client, "tickets");
    let p = wait_reason(client, job, "running", "locked");
    let says = p.last_error.clone().unwrap_or_default();
    assert!(says.contains("ShareLock") && says.contains(&holder) && says.contains("since"), "{says}");
    asks_no_more(&bed, client, job);
    assert_eq!(left(client, "tickets"), 5_000);
    // Paid rows are in the accounts already.
    all_counted(&bed, &progress(client, job));
    // A fast shutdown ends the lock's holder too: what is at hand is written.
    let asked = bed.provider.stats().rows.len() as i64;
    assert!(bed.cluster.stop().success());
    bed.provider.hold();
    bed.cluster.start();
    let client = &mut bed.connect();
    assert_eq!(left(client, "tickets"), 5_000 - asked);
    bed.provider.release();
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 5_000);
    assert_eq!((p.reason, p.last_error), (None, None));

    // A lock that outlives the server: what can't be written is in the accounts, and said.
    run(client, "UPDATE tickets SET topic = NULL; DELETE FROM tickets WHERE id > 300");
    bed.provider.reset_stats();
    run(client, "BEGIN; LOCK TABLE tickets IN SHARE ROW EXCLUSIVE MODE; PREPARE TRANSACTION 'a migration'");
    let job = backfill(client, "tickets");
    let p = wait_reason(client, job, "running", "locked");
    let says = p.last_error.clone().unwrap_or_default();
    assert!(says.contains("ShareRowExclusiveLock") && says.contains("prepared transaction"), "{says}");
    let asked = asks_no_more(&bed, client, job);
    assert!(bed.cluster.stop().success());
    let requests = bed.provider.stats().requests as i64;
    bed.cluster.start();
    let client = &mut bed.connect();
    let said = format!("SELECT last_error FROM llm_batch.progress WHERE job_id = {job}");
    let lost = format!("{asked} answers could not be written");
    assert!(bed.cluster.log().contains(&lost), "{asked}: {}", text(client, &said));
    wait_reason(client, job, "running", "locked");
    run(client, "ROLLBACK PREPARED 'a migration'");
    let p = bed.done(job);
    assert_eq!(p.counts(), (300, 300, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), p.last_error.as_deref()), (0, None));
    // Asked again, and both are counted.
    assert_eq!(bed.provider.stats().rows.values().map(|r| r.asked as usize).sum::<usize>(), 300 + asked);
    assert!(p.requests > requests, "{p:?}");
    all_counted(&bed, &p);

    // A table that can't even be read.
    run(client, "UPDATE tickets SET topic = NULL");
    let other = &mut bed.connect();
    let job = locked_job(&bed, other);
    let p = wait_reason(client, job, "running", "locked");
    assert!(p.last_error.clone().unwrap_or_default().contains("AccessExclusiveLock"), "{p:?}");
    run(other, "COMMIT");
    let p = bed.done(job);
    assert_eq!((p.counts(), p.reason, p.last_error), ((300, 300, 0, 0, 0, 0), None, None));
}

/// A job whose table is locked as a whole in the middle.
fn locked_job(bed: &Bed, holder: &mut Client) -> i64 {
    let client = &mut bed.connect();
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    common::warm(client, "tickets");
    bed.provider.hold();
    let job = backfill_with(client, "tickets", SMALL);
    in_flight(bed, 2);
    run(holder, "BEGIN; LOCK TABLE tickets IN ACCESS EXCLUSIVE MODE");
    bed.provider.release();
    job
}

#[test]
fn a_write_that_fails_for_everybody() {
    let bed = Bed::new("writes_disk");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN RAISE EXCEPTION 'could not extend file \"base/5/1\": No space left on device' USING ERRCODE = '53100'; END $$",
    );
    let full = |table: &str| {
        format!("CREATE TRIGGER full_disk BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION full_disk()")
    };
    tickets(client, "tickets", 1..=5_000);
    run(client, &full("tickets"));
    let job = backfill(client, "tickets");
    let p = wait_reason(client, job, "paused", "write_error");
    assert!(p.last_error.clone().unwrap_or_default().contains("No space left on device"), "{p:?}");
    asks_no_more(&bed, client, job);
    let asked = bed.provider.stats().rows.len();
    let mut waiting = bed.connect();
    let call = std::thread::spawn(move || waiting.batch_execute(&format!("CALL llm_batch.wait({job}, '5 min')")));
    // Tried by itself once there is room: what was paid for is not asked again.
    run(client, "DROP TRIGGER full_disk ON tickets");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 5_000);
    assert_eq!((p.reason, p.last_error, p.failed), (None, None, 0));
    assert!(asked < 5_000);
    call.join().unwrap().unwrap();

    // resume() has it tried at once; pause() gives up what is at hand, and says so.
    run(client, "DROP TABLE tickets");
    tickets(client, "tickets", 10_001..=10_100);
    run(client, &full("tickets"));
    bed.provider.reset_stats();
    let job = backfill(client, "tickets");
    wait_reason(client, job, "paused", "write_error");
    run(client, &format!("SELECT llm_batch.resume({job})"));
    wait_reason(client, job, "paused", "write_error");
    assert_eq!(text(client, &format!("SELECT llm_batch.pause({job})")), "t");
    wait_until("its worker has gone", PATIENCE, || one(client, WORKERS), |n| *n == 0);
    let p = wait_reason(client, job, "paused", "user");
    let says = p.last_error.clone().unwrap_or_default();
    assert!(says.contains("100 answers could not be written") && says.contains("No space left"), "{says}");
    all_counted(&bed, &p);
    run(client, &format!("DROP TRIGGER full_disk ON tickets; SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    assert_eq!(p.counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);
    assert!(bed.provider.stats().rows.values().all(|r| r.asked == 2));
}

/// Passing errors that some rows alone raise each time: these rows are tried again, listed in the end, and hold up
/// nothing. A disk that is full for all, or for many, lists none.
#[test]
fn a_write_that_fails_for_a_few() {
    let bed = Bed::new("writes_few");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = TG_ARGV[0]; END $$",
    );
    let refuse = |client: &mut Client, name: &str, when: &str, code: &str| {
        run(
            client,
            &format!(
                "CREATE TRIGGER {name} BEFORE UPDATE ON tickets FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION refuse('{code}')"
            ),
        );
    };
    tickets(client, "tickets", 1..=600);
    for (id, code) in [(7, "40001"), (8, "57014"), (333, "53100")] {
        refuse(client, &format!("refuse_{code}"), &format!("OLD.id = {id}"), code);
    }
    let job = backfill(client, "tickets");
    let p = wait_until("the others are written", PATIENCE, || progress(client, job), |p| p.done == 597);
    assert_eq!(p.failed, 0, "{p:?}");
    // Ten minutes have passed.
    bed.cluster.fail_at("patience", "over", 3);
    assert_eq!(bed.done(job).counts(), (600, 597, 0, 3, 0, 0));
    let mut listed: Vec<_> =
        failures(client, job).into_iter().map(|f| format!("{} {} {}", f.0["id"], f.2, f.4)).collect();
    listed.sort();
    assert_eq!(
        listed,
        ["333 write_error 53100: not now", "7 write_error 40001: not now", "8 write_error 57014: not now"]
    );
    assert!(bed.provider.stats().rows.values().all(|r| r.asked == 1));

    // The disk is full in the middle, or when a few are left: nothing is listed, however long it takes.
    for (ids, when) in [(2_001..=2_600, "OLD.id > 2100"), (3_001..=3_003, "true")] {
        run(client, "DROP TABLE tickets");
        let rows = ids.end() - ids.start() + 1;
        tickets(client, "tickets", ids);
        refuse(client, "full_disk", when, "53100");
        bed.provider.reset_stats();
        let job = backfill(client, "tickets");
        bed.cluster.fail_at("patience", "over", 1_000);
        wait_reason(client, job, "paused", "write_error");
        asks_no_more(&bed, client, job);
        run(client, "DROP TRIGGER full_disk ON tickets");
        let p = bed.done(job);
        all_right_once(&bed, client, &p, rows);
    }

    // Something in the input takes too much for a while: what was answered is kept.
    run(
        client,
        "DROP TABLE tickets; CREATE TABLE broken (a int);
         CREATE FUNCTION said(t text) RETURNS text LANGUAGE plpgsql STABLE AS $$
         BEGIN
             IF EXISTS (SELECT FROM broken) THEN RAISE EXCEPTION 'too much' USING ERRCODE = '54000'; END IF;
             RETURN t;
         END $$",
    );
    tickets(client, "tickets", 1..=40);
    bed.provider.reset_stats();
    common::warm(client, "tickets");
    bed.provider.hold();
    let job =
        one(client, "SELECT llm_batch.backfill('tickets', input => 'said(body)', target => 'topic', task => 'topic')");
    wait_until("all is asked", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n == 40);
    run(client, "INSERT INTO broken VALUES (1)");
    bed.provider.release();
    let p = wait_until("it waits", PATIENCE, || progress(client, job), |p| p.status != "running");
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("write_error")), "{p:?}");
    run(client, "DELETE FROM broken");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 40);
}

/// A label that the column takes no more: three rows, and not the rest of the table.
#[test]
fn a_label_that_cannot_be_written() {
    let bed = Bed::new("writes_label");
    let client = &mut bed.connect();
    for (n, (forbid, allow, says)) in [
        (
            "ALTER TABLE tickets ADD CONSTRAINT no_spam CHECK (topic::text <> 'spam')",
            "ALTER TABLE tickets DROP CONSTRAINT no_spam",
            "no_spam",
        ),
        ("ALTER TYPE kind RENAME VALUE 'spam' TO 'junk'", "ALTER TYPE kind RENAME VALUE 'junk' TO 'spam'", "kind"),
    ]
    .into_iter()
    .enumerate()
    {
        let labels = common::LABELS.join("', '");
        run(client, "DROP TABLE IF EXISTS tickets; DROP TYPE IF EXISTS kind");
        run(client, &format!("CREATE TYPE kind AS ENUM ('{labels}')"));
        let first = 10_000 * (n as i64 + 1);
        tickets(client, "tickets", first..=first + 1_999);
        run(client, "ALTER TABLE tickets ALTER topic DROP DEFAULT, ALTER topic TYPE kind USING topic::kind");
        run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
        bed.provider.reset_stats();
        common::warm(client, "tickets");
        bed.provider.hold();
        let job = backfill_with(client, "tickets", SMALL);
        in_flight(&bed, 2);
        run(client, forbid);
        bed.provider.release();
        let p = wait_reason(client, job, "paused", "label");
        let last = p.last_error.clone().unwrap_or_default();
        assert!(last.contains("\"spam\"") && last.contains(says), "{last}");
        assert_eq!((p.failed, p.skipped, failures(client, job).len()), (0, 0, 0), "{p:?}");
        // Those that had failed, and what was under way.
        let asked = bed.provider.stats().rows.len() as i64;
        assert!(asked - p.done <= 60 && asked < 1_000, "{asked} rows were asked, {} written", p.done);
        run(client, allow);
        run(client, &format!("SELECT llm_batch.resume({job})"));
        let p = bed.done(job);
        assert_eq!(p.counts(), (2_000, 2_000, 0, 0, 0, 0));
        assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE topic::text = want"), 2_000);
        let again = bed.provider.stats().rows.values().filter(|r| r.asked > 1).count();
        assert!(again <= 60, "{again} rows were asked twice");
    }
}

/// A listed row stays listed whatever the owner's role sets.
#[test]
fn keys_in_one_form_whatever_is_set() {
    let bed = Bed::new("writes_keys");
    let client = &mut bed.connect();
    run(client, "SELECT llm_batch.alter_model('m', max_request_tokens => 600, max_concurrent_requests => 2)");
    // Five rows are too long for any request, and listed before the others are asked.
    run(
        client,
        "CREATE TABLE tickets (a timestamptz, b interval, c bytea, d float8, e money, body text, want text, topic text,
             PRIMARY KEY (a, b, c, d, e));
         INSERT INTO tickets
         SELECT timestamptz '2026-01-01 12:00+00' + i * interval '1 day', i * interval '25 hours', decode(md5(i::text), 'hex'),
                i / 3.0::float8, i::int::money,
                CASE WHEN i <= 5 THEN repeat('word ', 2000) ELSE format('Text #r%s:bug#', lpad(i::text, 6, '0')) END, 'bug'
           FROM generate_series(1, 60) i",
    );
    common::warm(client, "tickets");
    bed.provider.hold();
    let job = backfill_with(client, "tickets", SMALL);
    in_flight(&bed, 2);
    let p = wait_until("five are listed", PATIENCE, || progress(client, job), |p| p.skipped == 5);
    assert_eq!(p.total, 60);
    let listed = failures(client, job);
    for (name, value) in [
        ("TimeZone", "Asia/Kolkata"),
        ("DateStyle", "SQL, DMY"),
        ("IntervalStyle", "sql_standard"),
        ("bytea_output", "escape"),
        ("extra_float_digits", "-3"),
        ("lc_monetary", "C"),
    ] {
        run(client, &format!("ALTER ROLE postgres SET {name} = '{value}'"));
    }
    pause_held(&bed, client, job);
    wait_until("its worker has gone", PATIENCE, || one(client, WORKERS), |n| *n == 0);
    run(client, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (60, 55, 5, 0, 0, 0));
    assert_eq!(failures(client, job), listed);
    assert_eq!(listed[0].0["a"].as_str().unwrap().split('+').next_back(), Some("00:00"), "{listed:?}");
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 5));
    // And by the next pass of a worker that listed them itself under these settings.
    run(client, "UPDATE tickets SET topic = NULL");
    let job = backfill_with(client, "tickets", SMALL);
    assert_eq!(bed.done(job).counts(), (60, 55, 5, 0, 0, 0));
    assert_eq!(failures(client, job), listed);
}

/// The usual freeze before a migration.
#[test]
fn a_database_that_is_read_only() {
    let bed = Bed::new("writes_freeze");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 200, 2);
    run(client, "ALTER DATABASE postgres SET default_transaction_read_only = on");
    let p = wait_reason(client, job, "paused", "read_only");
    assert!(p.last_error.unwrap_or_default().contains("default_transaction_read_only"));
    bed.provider.release();
    // Answers under way are kept, not written, and no more is asked.
    wait_until("it was answered", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    assert_eq!(asks_no_more(&bed, client, job), 10);
    assert_eq!(left(client, "tickets"), 200);
    run(client, "ALTER DATABASE postgres RESET default_transaction_read_only");
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 200);
    assert_eq!((p.reason, p.last_error), (None, None));

    // Set for the owner's role, or for all, before the job begins.
    run(client, "CREATE ROLE app LOGIN; ALTER TABLE tickets OWNER TO app; GRANT USAGE ON FOREIGN SERVER fake TO app");
    for (freeze, thaw) in [
        (
            "ALTER ROLE app SET default_transaction_read_only = on",
            "ALTER ROLE app IN DATABASE postgres SET default_transaction_read_only = off",
        ),
        ("ALTER SYSTEM SET default_transaction_read_only = on", "ALTER SYSTEM RESET default_transaction_read_only"),
    ] {
        run(client, "SET default_transaction_read_only = off; UPDATE tickets SET topic = NULL");
        run(client, freeze);
        run(client, "SELECT pg_reload_conf()");
        bed.provider.reset_stats();
        let job = backfill_with(client, "tickets", SMALL);
        wait_reason(client, job, "paused", "read_only");
        assert_eq!((left(client, "tickets"), bed.provider.stats().rows.len()), (200, 0));
        run(client, thaw);
        run(client, "SELECT pg_reload_conf()");
        run(client, &format!("SELECT llm_batch.resume({job})"));
        let p = bed.done(job);
        all_right_once(&bed, client, &p, 200);
        run(client, "ALTER ROLE app RESET ALL; ALTER ROLE app IN DATABASE postgres RESET ALL");
    }
}

/// A row is locked and written by one transaction: nobody else has a share in it, and no multixact is made for it.
#[test]
fn no_multixacts() {
    let bed = Bed::new("writes_multixacts");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=200);
    let next = "SELECT next_multixact_id::text::bigint FROM pg_control_checkpoint()";
    run(client, "CHECKPOINT");
    let before = one(client, next);
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 1}'");
    assert_eq!(bed.done(job).counts(), (200, 200, 0, 0, 0, 0));
    run(client, "CHECKPOINT");
    assert_eq!(one(client, next) - before, 0, "multixacts for 200 rows");
}

/// A row that somebody holds locked for longer than an answer is kept for it.
#[test]
fn a_row_that_stays_locked() {
    let bed = Bed::new("writes_patience");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=40);
    let other = &mut bed.connect();
    run(other, "BEGIN; SELECT FROM tickets WHERE id IN (7, 8) FOR UPDATE");
    let job = backfill(client, "tickets");
    let p = wait_until("the others are written", PATIENCE, || progress(client, job), |p| p.done == 38);
    assert_eq!((p.status.as_str(), p.failed), ("running", 0));
    // Ten minutes have passed.
    bed.cluster.fail_at("patience", "over", 2);
    assert_eq!(bed.done(job).counts(), (40, 38, 0, 2, 0, 0));
    for (key, _, class, attempts, detail) in failures(client, job) {
        assert!(class == "not_written" && attempts == 1 && detail.contains("locked"), "{key} {class}: {detail}");
    }
    run(other, "COMMIT");
    run(client, &format!("SELECT llm_batch.retry_failed({job})"));
    let p = wait_until("they are asked again", PATIENCE, || progress(client, job), |p| p.done == 40);
    assert_eq!((wrong(client, "tickets"), p.failed), (0, 0));
    assert!(wait_status(client, job, "done").done == 40);
}
