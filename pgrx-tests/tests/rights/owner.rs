//! A job's rights are its owner's, also when these change in the middle.

use std::time::{Duration, Instant};

use pg_llm_batch_e2e::{go_on, wait_until};

use super::{BACKFILL, denied, held_job, roles};
use crate::common::{self, Bed, PATIENCE, backfill_with, one, progress, run, text, tickets, wait_status, warm};

#[test]
fn a_job_has_its_owners_rights_and_no_more() {
    let bed = Bed::new("rights_worker");
    let client = &mut roles(&bed, 50);
    run(
        client,
        "CREATE TABLE secrets (a text); INSERT INTO secrets VALUES ('x');
         CREATE TABLE small (id bigint PRIMARY KEY, body text, topic text, hidden text DEFAULT 'x');
         INSERT INTO small SELECT id, body FROM tickets;
         GRANT SELECT (id, body, topic), UPDATE (topic) ON small TO bob;
         ALTER ROLE bob SET row_security = off;
         ALTER ROLE bob SET search_path = nowhere;",
    );
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let call = |change: &str| {
        let (name, _) = change.split_once(" => ").unwrap();
        let args = [("input", "'body'"), ("target", "'topic'")]
            .map(|(n, v)| if n == name { change.to_owned() } else { format!("{n} => {v}") });
        let more = if args.iter().any(|a| a == change) { String::new() } else { format!(", {change}") };
        format!("SELECT llm_batch.backfill('public.small', {}, task => 'topic'{more})", args.join(", "))
    };
    denied(bob, &call("input => 'hidden'"), "permission denied");
    denied(bob, &call("input => '(SELECT a FROM public.secrets)'"), "permission denied");
    denied(bob, &call("filter => 'EXISTS (SELECT FROM public.secrets)'"), "permission denied");
    denied(bob, &call("input => 'small::text'"), "permission denied");
    denied(bob, &call("target => 'hidden'"), "hidden");
    denied(bob, &call("target => 'body'"), "body");
    denied(bob, BACKFILL.replace("'tickets'", "'public.tickets'").as_str(), "permission denied");
    assert!(bed.provider.stats().rows.is_empty());
    // With the rights on the columns alone it works.
    let job = one(bob, &call("filter => 'true'"));
    let p = bed.done(job);
    assert_eq!(p.counts(), (50, 50, 0, 0, 0, 0));
    // A session that waits for a job runs nothing of another role's, whatever stands first in the search_path.
    run(
        client,
        "CREATE SCHEMA bobs AUTHORIZATION bob; SET ROLE bob;
         CREATE FUNCTION bobs.run(text) RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RAISE 'run as %', current_user; END $$;
         CREATE DOMAIN bobs.status AS text CHECK (bobs.run(value));
         CREATE TYPE bobs.record AS (status bobs.status, reason bobs.status, last_error text, rows_left bigint);
         RESET ROLE; SET search_path = bobs, pg_catalog",
    );
    run(client, &format!("CALL llm_batch.wait({job})"));
    run(client, "RESET search_path");
    // A session of the owner's begins as another role: a job of the owner's does not.
    run(
        client,
        "UPDATE small SET topic = NULL; CREATE ROLE clerk; GRANT clerk TO bob; ALTER ROLE bob SET role = 'clerk'",
    );
    let job = one(bob, &call("filter => 'true'"));
    assert_eq!(bed.done(job).counts(), (50, 50, 0, 0, 0, 0));
    // SELECT on the key is needed too.
    run(client, "UPDATE small SET topic = NULL; REVOKE SELECT (id) ON small FROM bob");
    denied(bob, &call("filter => 'true'"), "id");
}

#[test]
fn an_owner_that_loses_a_right_in_the_middle() {
    let bed = Bed::new("rights_lost");
    let client = &mut roles(&bed, 100);
    run(client, "ALTER TABLE tickets OWNER TO postgres; GRANT SELECT, UPDATE ON tickets TO alice");
    let job = held_job(&bed, client);
    // Slow, so that the provider is not done with all rows before the worker meets the error.
    bed.provider.configure(|c| c.latency.base = Duration::from_secs(2));
    run(client, "REVOKE UPDATE ON tickets FROM alice");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    assert!(p.last_error.unwrap().contains("permission denied"));
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL"), 0);
    let asked = bed.provider.stats().rows.len();
    assert!(asked <= 20, "{asked} rows were paid for though nothing can be written");
    // Resumed without mending, it pauses again, and pays for nothing.
    run(client, &format!("SELECT llm_batch.resume({job})"));
    wait_until(
        "it has paused again",
        PATIENCE,
        || {
            text(
                client,
                &format!(
                    "SELECT j.epoch = s.epoch AND s.status = 'paused' FROM llm_batch.job j JOIN llm_batch.job_state s ON s.job_id = j.id WHERE j.id = {job}"
                ),
            )
        },
        |t| t == "t",
    );
    assert_eq!(progress(client, job).reason.as_deref(), Some("owner"));
    let now = bed.provider.stats().rows.len();
    assert!(now <= asked + 20, "{now} rows were paid for in vain");
    // The worker is woken when the commit can be seen, before it is told that there is another right.
    let mut other = bed.connect();
    let pid = one(&mut other, "SELECT pg_backend_pid()::bigint");
    bed.cluster.fail_at("woken", "stop", 1);
    let mend = format!("GRANT UPDATE ON tickets TO alice; SELECT llm_batch.resume({job})");
    let mending = std::thread::spawn(move || run(&mut other, &mend));
    let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted";
    wait_until("the worker waits for the end of the commit", PATIENCE, || one(client, waits), |n| *n == 1);
    go_on(pid);
    mending.join().unwrap();
    let p = bed.done(job);
    // Rows that were answered before are not paid for again.
    common::all_right_once(&bed, client, &p, 100);
}

/// A row that its owner may see no longer is not sent, unless it was under way when that changed.
#[test]
fn row_security_that_changes_in_the_middle() {
    const ROWS: i64 = 700;
    const SEEN: i64 = 30;
    let bed = Bed::new("rights_policy");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE ROLE staff; CREATE ROLE team; CREATE ROLE bystander; CREATE ROLE alice LOGIN;
         GRANT USAGE ON FOREIGN SERVER fake TO alice;
         SELECT llm_batch.alter_model('m', max_concurrent_requests => 2);
         CREATE FUNCTION visible(id bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS 'BEGIN RETURN true; END'",
    );
    let queued = "SELECT sum(queued)::bigint FROM llm_batch.activity";
    let few = format!("id % 1000 <= {SEEN}");
    let secured = "ALTER TABLE tickets ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON tickets";
    let note = "(SELECT n.body FROM note n WHERE n.id = tickets.id)";
    // One request is answered, and two are under way; one, if the answers that were held back have taught so.
    let waits = |queued: &i64| (ROWS - 15..=ROWS - 10).contains(queued);
    for (n, (input, before, change)) in [
        ("body", "SELECT 1".to_owned(), format!("{secured} USING ({few})")),
        (
            "body",
            format!(
                "GRANT staff TO team; GRANT team TO alice; CREATE POLICY a ON tickets TO staff USING (true);
                 {secured} TO alice USING ({few})"
            ),
            "REVOKE staff FROM team".to_owned(),
        ),
        (
            "body",
            format!("ALTER ROLE alice BYPASSRLS; {secured} USING ({few})"),
            "ALTER ROLE alice NOBYPASSRLS".to_owned(),
        ),
        (
            "body",
            format!("{secured} USING (visible(id))"),
            format!(
                "CREATE OR REPLACE FUNCTION visible(id bigint) RETURNS boolean LANGUAGE plpgsql STABLE
                 AS 'BEGIN RETURN {few}; END'"
            ),
        ),
        // Another table says something of the rows.
        (
            note,
            "GRANT SELECT ON note TO alice".to_owned(),
            format!("ALTER TABLE note ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON note USING ({few})"),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let first = 1000 * (n as i64 + 1);
        tickets(client, "tickets", first + 1..=first + ROWS);
        run(client, "CREATE TABLE note AS TABLE tickets; GRANT SELECT, UPDATE ON tickets TO alice");
        run(client, &before);
        warm(client, "tickets");
        // Until a row is written few are handed over.
        bed.provider.hold_after(1);
        let small = "options => '{\"max_rows_per_request\": 5}'";
        let job = one(
            &mut bed.cluster.connect_as("postgres", "alice"),
            &format!("SELECT llm_batch.backfill('tickets', '{input}', 'topic', 'topic', {small})"),
        );
        wait_until("all rows are in the gateway", PATIENCE, || one(client, queued), waits);
        if n == 0 {
            // A change that leaves rights alone takes nothing back, also if it looks like one.
            run(client, "ANALYZE tickets");
            run(client, "GRANT staff TO bystander; CREATE POLICY new ON tickets FOR INSERT WITH CHECK (true)");
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(2_500) {
                let now = one(client, queued);
                assert!(waits(&now), "{now} rows wait");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        run(client, &change);
        wait_until(&format!("all is taken back: {change}"), PATIENCE / 10, || one(client, queued), |n| *n == 0);
        bed.provider.release();
        let p = bed.done(job);
        assert_eq!((p.total, p.done, p.failed, p.superseded), (ROWS, SEEN, 0, ROWS - SEEN), "{change}: {p:?}");
        let stats = bed.provider.stats();
        let thousand = format!("00{}", n + 1);
        let asked: Vec<_> = stats.rows.iter().filter(|(n, _)| n.starts_with(&thousand)).collect();
        assert_eq!(asked.len() as i64, SEEN, "{change}");
        assert!(asked.iter().all(|(_, r)| r.asked == 1), "{change}");
        assert_eq!(common::wrong(client, "tickets"), 0);
        run(client, "DROP TABLE tickets, note; ALTER ROLE alice NOBYPASSRLS");
    }
    // A right on a column goes the same way.
    tickets(client, "tickets", 9_001..=9_000 + ROWS);
    run(client, "GRANT SELECT (id, body, topic), UPDATE (topic) ON tickets TO alice");
    warm(client, "tickets");
    bed.provider.hold_after(1);
    let job = backfill_with(&mut bed.cluster.connect_as("postgres", "alice"), "tickets", common::SMALL);
    wait_until("all rows are in the gateway", PATIENCE, || one(client, queued), waits);
    run(client, "REVOKE SELECT (body) ON tickets FROM alice");
    wait_until("all is taken back", PATIENCE / 10, || one(client, queued), |n| *n == 0);
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    let asked = bed.provider.stats().rows.keys().filter(|n| n.starts_with("009")).count();
    assert!((10..=15).contains(&asked), "{asked} rows were asked about");
}
