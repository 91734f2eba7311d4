//! Triggers, and tables that change while they are filled.

use std::time::Duration;

use llm_fake_provider::{Config, Latency};
use pg_llm_batch_e2e::wait_until;

use super::{all_done, fill};
use crate::common::*;

#[test]
fn triggers_that_change_the_session() {
    let bed = Bed::new("triggers");
    let mut c = bed.connect();
    run(
        &mut c,
        "CREATE SCHEMA app;
         CREATE FUNCTION app.clean(text) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'clean ' || $1 $$;
         CREATE TABLE app.log (id bigint, topic text);
         CREATE FUNCTION app.spoil() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           INSERT INTO app.log VALUES (NEW.id, NEW.topic);
           PERFORM set_config('search_path', 'nowhere', false);
           PERFORM set_config('enable_indexscan', 'off', false);
           RETURN NEW;
         END $$",
    );
    tickets(&mut c, "app.t", 1..=3_000);
    run(&mut c, "CREATE TRIGGER spoil BEFORE UPDATE ON app.t FOR EACH ROW EXECUTE FUNCTION app.spoil()");
    run(&mut c, "SET search_path = app");
    let (job, p) = fill(&bed, &mut c, "", "'t', 'clean(body)', 'topic', 'topic'");
    all_done(&p, 3_000);
    assert!(failures(&mut c, job).is_empty());
    run(&mut c, "SET search_path = public");
    assert_eq!((wrong(&mut c, "app.t"), left(&mut c, "app.t")), (0, 0));
    assert_eq!(one(&mut c, "SELECT count(*) FROM app.log l JOIN app.t USING (id, topic)"), 3_000);
    assert_eq!(one(&mut c, "SELECT count(*) FROM app.log"), 3_000, "each row was written once");
}

#[test]
fn triggers_that_change_how_transactions_begin() {
    let bed = Bed::new("trigger_settings");
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=3_000);
    run(
        &mut c,
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           PERFORM set_config('default_transaction_read_only', 'on', false),
                   set_config('default_transaction_isolation', 'serializable', false),
                   set_config('statement_timeout', '1ms', false),
                   set_config('lock_timeout', '1ms', false);
           RETURN NEW;
         END $$;
         CREATE TRIGGER spoil BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION spoil()",
    );
    let (_, p) = fill(&bed, &mut c, "", "'t', 'body', 'topic', 'topic'");
    all_done(&p, 3_000);
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
}

#[test]
fn tables_that_change_while_they_are_filled() {
    let latency = Latency { base: Duration::from_millis(40), ..Latency::default() };
    let bed = Bed::with("changing", Config { latency, ..Config::default() });
    let mut c = bed.connect();
    tickets(&mut c, "t", 10_001..=13_000);
    bed.provider.hold();
    run(&mut c, "BEGIN");
    bed.provider.release();
    let job = backfill(&mut c, "t");
    bed.provider.hold();
    run(&mut c, "COMMIT");
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n > 0);
    // While the answers are held back: rows come before and after those claimed, some are filled by others, some go,
    // some change their text.
    rows(&mut c, "t", 1..=100);
    rows(&mut c, "t", 90_001..=90_100);
    run(
        &mut c,
        "UPDATE t SET topic = 'mine' WHERE id BETWEEN 10001 AND 10010;
         UPDATE t SET topic = 'mine' WHERE id BETWEEN 12991 AND 13000;
         DELETE FROM t WHERE id BETWEEN 10011 AND 10020;
         DELETE FROM t WHERE id BETWEEN 12981 AND 12990;
         UPDATE t SET want = 'spam', body = 'New #r' || lpad(id::text, 6, '0') || ':spam#' WHERE id BETWEEN 10021 AND 10030;
         UPDATE t SET id = id + 100000 WHERE id BETWEEN 10031 AND 10040",
    );
    bed.provider.release();
    let p = bed.done(job);
    println!("{p:?}");
    assert_eq!(left(&mut c, "t"), 0, "what came meanwhile is found by the last pass");
    assert_eq!(one(&mut c, "SELECT count(*) FROM t WHERE topic = 'mine'"), 20, "what others wrote stays");
    assert_eq!(one(&mut c, "SELECT count(*) FROM t WHERE topic <> want AND topic <> 'mine'"), 0);
    assert!(failures(&mut c, job).is_empty());
    // 3,000 and 200 rows, of which 40 were others' doing; 10 rows with a new key are filled under that one.
    assert_eq!((p.done, p.skipped, p.failed, p.left), (3_160, 0, 0, 0));
    assert!(p.superseded >= 20, "{p:?}");
}
