//! Which rows are asked, and in how many requests.

use std::collections::BTreeSet;

use pg_llm_batch_e2e::wait_until;
use postgres::Client;

use super::{ASK, asked, count_anew, explain, questions};
use crate::common::{Bed, PATIENCE, error, one, run, slow, tickets, wrong};

#[test]
fn an_update_of_ten_thousand_rows() {
    let bed = Bed::new("batch_update");
    let c = &mut bed.connect();
    tickets(c, "tickets", 1..=10_000);
    bed.provider.reset_stats();
    let update = "UPDATE tickets SET topic = llm_classify(body, 'topic')";
    let plan = explain(c, "COSTS off", update);
    for line in
        ["Custom Scan (LLM Batch)", "Call: llm_classify(body, 'topic'::text)", "Model: m", "Rows per Request: 50"]
    {
        assert!(plan.contains(line), "{line} is not in\n{plan}");
    }
    assert_eq!(
        (bed.provider.stats().requests, one(c, "SELECT count(*) FROM tickets WHERE topic IS NULL")),
        (0, 10_000)
    );
    // All that EXPLAIN (ANALYZE) says is what the provider counted.
    let plan = explain(c, "ANALYZE, COSTS off", update);
    let stats = bed.provider.stats();
    for line in [
        "Rows Sent: 10000\n".to_owned(),
        "Rows Reused: 0\n".to_owned(),
        format!("Requests: {}\n", stats.requests),
        format!("Input Tokens: {}\n", stats.prompt_tokens),
        format!("Output Tokens: {}\n", stats.completion_tokens),
        "Average Time Queued: ".to_owned(),
        "Average Time at Provider: ".to_owned(),
        "Cost: $0.".to_owned(),
    ] {
        assert!(plan.contains(&line), "{line} is not in\n{plan}");
    }
    assert_eq!(wrong(c, "tickets"), 0);
    assert!(stats.rows.len() == 10_000 && stats.rows.values().all(|r| r.asked == 1));
    assert!(stats.requests <= 210, "{} requests", stats.requests);
    // As data, too. The texts are known by the second time.
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{}')");
    for format in ["JSON", "XML", "YAML"] {
        let plan = explain(
            c,
            &format!("ANALYZE, VERBOSE, FORMAT {format}"),
            "SELECT llm_classify(body, 'topic') FROM tickets",
        );
        assert!(plan.contains("LLM Batch") && plan.contains("10000"), "{plan}");
    }
    let plan = explain(c, "ANALYZE, FORMAT JSON", "SELECT llm_classify(body, 'topic') FROM tickets");
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let call = &plan[0]["Plan"]["Calls"][0];
    assert_eq!((&call["Rows Reused"], &call["Rows Sent"]), (&10_000.into(), &0.into()), "{plan}");
}

#[test]
fn no_more_rows_than_a_limit_needs() {
    let bed = Bed::with("batch_limit", slow(20));
    let c = &mut bed.connect();
    questions(c, 100_000);
    // Nothing is asked but the rows that are returned.
    for (sql, n) in [
        ("SELECT llm_classify(body, 'topic') FROM t LIMIT 7", 7),
        ("SELECT llm_classify(body, 'topic') FROM t WHERE id > 100 LIMIT 7 OFFSET 4", 11),
        ("SELECT llm_classify(body, 'topic') FROM t WHERE id > 200 ORDER BY id LIMIT 3 + 2", 5),
        ("SELECT * FROM (SELECT llm_classify(body, 'topic') FROM t WHERE id > 300 OFFSET 0) s LIMIT 6", 6),
        (
            "PREPARE p(int) AS SELECT llm_classify(body, 'topic') FROM t WHERE id > 400 LIMIT $1; \
          SET plan_cache_mode = force_generic_plan; EXECUTE p(9)",
            9,
        ),
        ("SELECT llm_classify(body, 'topic') FROM t WHERE id > 500 LIMIT 0", 0),
    ] {
        assert_eq!(asked(&bed, c, sql).len(), n, "{sql}");
    }
    // With a filter, every third row passes: one after the other would ask 30, or 3 with LIMIT 1. Twice that and the
    // limit are the bound.
    for (first, limit, needed) in [(1_000, 10, 30), (2_001, 1, 3), (3_000, 100, 300), (5_001, 400, 1_200)] {
        let sql =
            format!("SELECT id FROM t WHERE id > {first} AND llm_filter(ask, 'Is it?') ORDER BY id LIMIT {limit}");
        let n = asked(&bed, c, &sql).len();
        assert!((needed..=2 * needed + limit).contains(&n), "{n} rows for LIMIT {limit}");
        assert_eq!(one(c, &format!("SELECT count(*) FROM ({sql}) s WHERE id % 3 = 0")), limit as i64);
    }
    // None passes: whatever is read, packs grow. One row in a thousand passes the cheap filter before.
    count_anew(&bed);
    let none = "SELECT id FROM t WHERE id % 3 = 1 AND id > 50000 AND id <= 53000 AND llm_filter(ask, 'Is it?') LIMIT 1";
    assert_eq!(c.query(none, &[]).unwrap().len(), 0);
    let stats = bed.provider.stats();
    assert_eq!(stats.rows.len(), 1_000);
    assert!(stats.requests <= 40, "{} requests", stats.requests);
    // A cursor and EXISTS read on as they need.
    let cursor = "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body, 'topic') FROM t WHERE id > 60000; FETCH 15 FROM x; COMMIT";
    assert!(asked(&bed, c, cursor).len() <= 30);
    let exists = "SELECT EXISTS (SELECT FROM t WHERE id > 70000 AND llm_filter(ask, 'Is it?'))";
    assert!(asked(&bed, c, exists).len() <= 10);
}

#[test]
fn only_the_rows_that_come_to_a_call() {
    let bed = Bed::new("batch_guards");
    let c = &mut bed.connect();
    questions(c, 60);
    run(
        c,
        "ALTER TABLE t ADD note text; UPDATE t SET note = 'noted' WHERE id <= 20; ANALYZE t; CREATE FUNCTION odd(int) RETURNS bool VOLATILE LANGUAGE plpgsql AS 'BEGIN RETURN $1 % 2 = 1; END'",
    );
    let ids = |want: &dyn Fn(i64) -> bool| (1..=60).filter(|i| want(*i)).collect::<BTreeSet<i64>>();
    let both = |first: BTreeSet<i64>, then: BTreeSet<i64>| {
        first.into_iter().chain(then.into_iter().map(|i| i + ASK)).collect::<BTreeSet<i64>>()
    };
    let none = BTreeSet::new;
    let classify = "llm_classify(body, 'topic')";
    let filter = "llm_filter(ask, 'Is it?')";
    for (sql, rows) in [
        (format!("SELECT CASE WHEN id % 5 = 0 THEN {classify} END FROM t"), ids(&|i| i % 5 == 0)),
        (format!("SELECT CASE id % 5 WHEN 0 THEN {classify} WHEN 1 THEN 'x' END FROM t"), ids(&|i| i % 5 == 0)),
        (
            format!("SELECT CASE WHEN id % 5 = 0 THEN 'x' WHEN id % 2 = 0 THEN {classify} END FROM t"),
            ids(&|i| i % 5 != 0 && i % 2 == 0),
        ),
        (format!("SELECT CASE WHEN id % 5 < 4 THEN 'x' ELSE {classify} END FROM t"), ids(&|i| i % 5 == 4)),
        (format!("SELECT coalesce(note, {classify}) FROM t"), ids(&|i| i > 20)),
        (format!("SELECT id < 30 AND {classify} = 'bug' FROM t"), ids(&|i| i < 30)),
        (format!("SELECT id < 30 OR {classify} = 'bug' FROM t"), ids(&|i| i >= 30)),
        (format!("SELECT note = 'noted' AND {classify} = 'bug' FROM t"), ids(&|_| true)),
        (format!("SELECT id FROM t WHERE id % 7 = 0 AND {classify} = 'bug'"), ids(&|i| i % 7 == 0)),
        (format!("SELECT id FROM t WHERE {classify} = 'bug' AND odd(id)"), ids(&|i| i % 2 == 1)),
        // The text of the second is asked about where the first says yes.
        (format!("SELECT {classify} FROM t WHERE {filter}"), both(ids(&|i| i % 3 == 0), ids(&|_| true))),
        (format!("SELECT id FROM t WHERE {filter} AND {classify} = 'bug'"), both(ids(&|i| i % 3 == 0), ids(&|_| true))),
        (
            format!("SELECT CASE {classify} WHEN 'bug' THEN {filter} END FROM t"),
            both(ids(&|_| true), ids(&|i| i % 4 == 0)),
        ),
        (format!("SELECT count(*) FILTER (WHERE {classify} = 'bug') FROM t WHERE id < 9"), ids(&|i| i < 9)),
        (
            format!("SELECT string_agg({classify}, '') FILTER (WHERE id % 2 = 0) FROM t WHERE id < 9"),
            ids(&|i| i < 9 && i % 2 == 0),
        ),
        (
            format!("SELECT {classify} FROM t WHERE id IN (SELECT id FROM t WHERE id > 50 AND note IS NULL)"),
            ids(&|i| i > 50),
        ),
        (format!("UPDATE t SET topic = {classify} WHERE note IS NULL"), ids(&|i| i > 20)),
        ("SELECT llm_classify(nullif(body, body), 'topic'), llm_classify(body, NULL) FROM t".to_string(), none()),
        ("SELECT llm_classify('', 'topic') FROM t".to_string(), none()),
    ] {
        // Otherwise what was answered before would not be asked again.
        run(c, "SELECT llm_batch.alter_classifier('topic', options => '{\"reuse\": false}')");
        let no_reuse = sql.replace("'Is it?')", "'Is it?', '{\"reuse\": false}')");
        assert!(explain(c, "COSTS off", &no_reuse).contains("LLM Batch"), "{no_reuse}");
        let mut rows = rows;
        if no_reuse.contains("note = 'noted' AND") {
            // NULL is not false: AND goes on.
            rows = ids(&|_| true);
        }
        assert_eq!(asked(&bed, c, &no_reuse), rows, "{no_reuse}");
        let plain = format!("SET llm_batch.enable_batch_scan = off; {no_reuse}; RESET llm_batch.enable_batch_scan");
        assert_eq!(asked(&bed, c, &plain), rows, "without the node: {no_reuse}");
    }
}

#[test]
fn row_by_row_where_there_is_no_node() {
    let bed = Bed::new("batch_single");
    let c = &mut bed.connect();
    questions(c, 40);
    let said = |sql: &str| {
        bed.provider.reset_stats();
        let output = bed.cluster.psql("postgres", &format!("SET llm_batch.default_model = 'm'; {sql}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (
            bed.provider.stats().requests,
            said.matches("NOTICE:  rows of this statement are sent to the model one by one").count(),
            said,
        )
    };
    let off = "SET llm_batch.enable_batch_scan = off;";
    for (sql, requests, notices) in [
        (format!("{off} SELECT llm_classify(body, 'topic') FROM t WHERE id <= 10"), 10, 0),
        (format!("{off} SELECT llm_classify(body || 1, 'topic') FROM t"), 40, 1),
        ("SELECT llm_classify(body || 2, 'topic') FROM t".to_owned(), 1, 0),
        ("SELECT llm_classify(body || 3, 'topic')".replace("body", "'a'"), 1, 0),
        (
            "DO $$ DECLARE r record; BEGIN FOR r IN SELECT body FROM t LOOP PERFORM llm_classify(r.body || 4, 'topic'); END LOOP; END $$"
                .to_owned(),
            40,
            1,
        ),
        (
            "DO $$ DECLARE r record; BEGIN FOR r IN SELECT llm_classify(body || 5, 'topic') FROM t LOOP END LOOP; END $$".to_owned(),
            1,
            0,
        ),
        // The task is another for each row: nothing to share.
        ("SELECT llm_classify(body || 6, CASE WHEN id > 0 THEN 'topic' END) FROM t".to_owned(), 40, 1),
        ("SELECT llm_classify(body || random(), 'topic') FROM t".to_owned(), 40, 1),
        ("UPDATE t SET topic = NULL RETURNING llm_classify(body || 7, 'topic')".to_owned(), 40, 1),
    ] {
        let (n, told, said) = said(&sql);
        assert_eq!((n, told), (requests, notices), "{sql}: {said}");
        assert!(notices == 0 || said.contains("where EXPLAIN shows a node \"LLM Batch\""), "{said}");
    }
    // Nothing is placed where nothing is called.
    let plan = explain(c, "COSTS off", "SELECT upper(body), id FROM t WHERE id > 3 ORDER BY 1");
    assert!(!plan.contains("LLM Batch"), "{plan}");
}

#[test]
fn what_reading_does_is_not_done_for_rows_that_nobody_takes() {
    let bed = Bed::new("batch_effects");
    let c = &mut bed.connect();
    questions(c, 100);
    run(c, "CREATE SEQUENCE s");
    let numbered = "(SELECT nextval('s') AS n, body FROM t OFFSET 0) q";
    let drawn = |c: &mut Client| one(c, "SELECT last_value FROM s");
    run(
        c,
        &format!(
            "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body, 'topic') FROM {numbered}; FETCH 3 FROM x; COMMIT"
        ),
    );
    assert_eq!(drawn(c), 3);
    run(c, &format!("SELECT FROM {numbered} WHERE llm_classify(body, 'topic') = 'spam' LIMIT 2"));
    assert_eq!(drawn(c), 5);
    // Requests are shared if a LIMIT takes all that is read, or everything is read.
    for (what, rows) in [("LIMIT 20", 20), ("", 100)] {
        count_anew(&bed);
        let before = drawn(c);
        run(c, &format!("SELECT llm_classify(body || '{what}', 'topic') FROM {numbered} {what}"));
        assert_eq!(drawn(c) - before, rows);
        assert!(bed.provider.stats().requests < 12, "{what}");
    }
    let other = &mut bed.connect();
    run(
        c,
        "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body, 'topic') FROM (SELECT body FROM t FOR UPDATE SKIP LOCKED) q;
         FETCH 3 FROM x",
    );
    assert_eq!(one(other, "SELECT count(*) FROM (SELECT FROM t FOR UPDATE SKIP LOCKED) q"), 97);
    run(c, "COMMIT");
}

#[test]
fn workers_do_not_ask() {
    let bed = Bed::new("batch_parallel");
    let c = &mut bed.connect();
    questions(c, 20_000);
    run(
        c,
        "SET min_parallel_table_scan_size = 0; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
         SET max_parallel_workers_per_gather = 2; ALTER TABLE t SET (parallel_workers = 2)",
    );
    let sql = "SELECT id, llm_classify(body, 'topic') FROM t WHERE id % 200 = 0";
    let plan = explain(c, "COSTS off", sql);
    let places = ["Custom Scan (LLM Batch)", "Gather", "Parallel Seq Scan"].map(|node| plan.find(node));
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{plan}");
    let rows = c.query(sql, &[]).unwrap();
    assert_eq!(rows.len(), 100);
    assert!(rows.iter().all(|row| row.get::<_, &str>(1) == "bug"));
    let stats = bed.provider.stats();
    assert_eq!(stats.rows.len(), 100);
    assert!(stats.requests <= 10, "{}", stats.requests);
}

#[test]
fn a_budget_that_several_streams_share() {
    let bed = Bed::with("batch_budget", slow(5));
    let c = &mut bed.connect();
    questions(c, 400);
    run(
        c,
        "CREATE TABLE p (LIKE t) PARTITION BY HASH (id);
         DO $$ BEGIN FOR i IN 0 .. 19 LOOP
             EXECUTE format('CREATE TABLE p%s PARTITION OF p FOR VALUES WITH (MODULUS 20, REMAINDER %s)', i, i);
         END LOOP; END $$;
         INSERT INTO p SELECT * FROM t;
         SELECT llm_batch.alter_classifier('topic', options => '{\"reuse\": false}')",
    );
    let both = "SELECT count(llm_classify(body, 'topic')), count(llm_filter(ask, 'Is it?', '{\"reuse\": false}')) FROM";
    for (table, most) in [("t", 0.0075), ("p", 0.02)] {
        // The cost of both calls, and half as much again, is enough; half of it is not.
        run(c, &format!("SET llm_batch.statement_max_cost = {most}"));
        let row = c.query_one(&format!("{both} {table}"), &[]).unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (400, 400), "{table}");
        bed.provider.reset_stats();
        run(c, "SET llm_batch.statement_max_cost = 0.002");
        let e = error(c, &format!("{both} {table}"));
        assert_eq!(e.0, "53400", "{e:?}");
        let stats = bed.provider.stats();
        let paid = (stats.prompt_tokens as f64 * 0.15 + stats.completion_tokens as f64 * 0.6) / 1e6;
        assert!(paid <= 0.002 && paid > 0.0005, "{table}: {paid}");
    }
}

#[test]
fn two_calls_are_in_flight_together() {
    let bed = Bed::new("batch_streams");
    let c = &mut bed.connect();
    questions(c, 100);
    bed.provider.hold();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let sql = "SELECT llm_classify(body, 'topic') = 'bug' AND id % 4 = 0, llm_filter(ask, 'Is it?') = (id % 3 = 0) FROM t";
            c.query(sql, &[]).unwrap().iter().filter(|row| row.get::<_, bool>(1)).count()
        });
        wait_until("rows of both are under way", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n == 200);
        bed.provider.release();
        assert_eq!(waiting.join().unwrap(), 100);
    });
    // A session has 64 connections at a time, and has them again however a query ends.
    let questions = |n: usize| {
        let calls: Vec<String> = (0..n).map(|i| format!("llm_filter(ask, 'Is it {i}?')")).collect();
        format!("SELECT num_nonnulls({})::bigint FROM (SELECT ask FROM t LIMIT 1) s", calls.join(", "))
    };
    for _ in 0..2 {
        let (code, message, detail, _) = error(c, &questions(65));
        assert_eq!(code, "53000", "{message}");
        assert!(
            message.contains("too many different questions") && detail.contains("64 are open"),
            "{message} {detail}"
        );
        assert_eq!(one(c, &questions(64)), 64);
    }
}
