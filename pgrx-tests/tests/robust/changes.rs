//! Tables, columns and settings that change in the middle.

use pg_llm_batch_e2e::wait_until;

use crate::common::{
    Bed, PATIENCE, SMALL, backfill_with, in_flight, left, one, progress, run, tickets, version, warm, wrong,
};

/// A column beside the target changes in the middle: the job says so and pays for nothing more. Each look at what is
/// held takes the worker seconds, so not every kind of change is here.
#[test]
fn columns_beside_the_target_that_change_in_the_middle() {
    let bed = Bed::new("robust_beside");
    let client = &mut bed.connect();
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    for (i, (change, says)) in [
        ("ALTER sure TYPE text", "confidence column \"sure\" of public.t is of type text"),
        ("DROP sure, ADD sure int", "confidence column \"sure\" of public.t is of type integer"),
        ("ALTER by TYPE text", "provenance column \"by\" of public.t is of type text"),
    ]
    .into_iter()
    .enumerate()
    {
        run(client, "DROP TABLE IF EXISTS t");
        let first = 1000 * (i as i64 + 1);
        tickets(client, "t", first..=first + 99);
        run(client, "ALTER TABLE t ADD sure numeric, ADD by jsonb");
        warm(client, "t");
        bed.provider.hold();
        let options = r#"options => '{"reuse": false, "max_rows_per_request": 5, "confidence_column": "sure", "provenance_column": "by"}'"#;
        let job = backfill_with(client, "t", options);
        in_flight(&bed, 2);
        let before = bed.provider.stats().admitted;
        run(client, &format!("ALTER TABLE t {change}"));
        // While two requests are held, the worker looks, and takes back what has not been sent.
        let queued = "SELECT coalesce(sum(queued), 0)::bigint FROM llm_batch.activity";
        wait_until("nothing more is to be sent", PATIENCE, || one(client, queued), |n| *n == 0);
        bed.provider.release();
        let p = wait_until("the job ends", PATIENCE, || progress(client, job), |p| p.status != "running");
        assert_eq!(p.status, "failed", "{change}: {p:?}");
        assert!(p.last_error.clone().unwrap_or_default().contains(says), "{change}: {p:?}");
        assert_eq!((bed.provider.stats().admitted, left(client, "t")), (before, 100), "{change}");
    }
}

/// The same with a constraint that no row can meet: the job pauses early, lists no row, and goes on without it.
#[test]
fn columns_beside_the_target_that_take_no_value() {
    let bed = Bed::new("robust_beside_check");
    let client = &mut bed.connect();
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    tickets(client, "t", 1..=1_000);
    run(client, "ALTER TABLE t ADD by jsonb");
    warm(client, "t");
    bed.provider.reset_stats();
    bed.provider.hold();
    let options = r#"options => '{"reuse": false, "max_rows_per_request": 5, "provenance_column": "by"}'"#;
    let job = backfill_with(client, "t", options);
    in_flight(&bed, 2);
    run(client, "ALTER TABLE t ADD CONSTRAINT no_by CHECK (by IS NULL)");
    bed.provider.release();
    let p = wait_until("the job pauses", PATIENCE, || progress(client, job), |p| p.status == "paused");
    assert!(p.last_error.clone().unwrap_or_default().contains("no_by"), "{p:?}");
    assert_eq!((p.done, p.failed, p.skipped), (0, 0, 0), "{p:?}");
    let asked = bed.provider.stats().rows.len();
    assert!(asked < 500, "{asked} rows were asked");
    run(client, &format!("ALTER TABLE t DROP CONSTRAINT no_by; SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (1_000, 1_000, 0, 0, 0, 0));
    assert_eq!(wrong(client, "t"), 0);
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
    let version = version(client);
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
