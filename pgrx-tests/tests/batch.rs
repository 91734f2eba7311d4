//! Plain SQL is batched: what the node "LLM Batch" asks, of which rows, in how many requests.

mod common;

use std::collections::BTreeSet;

use common::{Bed, PATIENCE, error, one, run, slow, text, tickets, wrong};
use llm_fake_provider::{Config, Fault};
use pg_llm_batch_e2e::wait_until;
use postgres::{Client, SimpleQueryMessage};

/// A plan, a line each.
fn explain(c: &mut Client, options: &str, sql: &str) -> String {
    let messages = c.simple_query(&format!("EXPLAIN ({options}) {sql}")).unwrap();
    let line = |m: &SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => row.get(0).map(|line| format!("{line}\n")),
        _ => None,
    };
    messages.iter().filter_map(line).collect()
}

/// Waits until nothing is under way any more: a statement that ends early leaves requests behind.
fn settle(bed: &Bed) {
    let c = &mut bed.connect();
    let under_way = "SELECT coalesce(sum(queued + in_flight_requests), 0)::bigint FROM llm_batch.activity";
    wait_until("nothing is under way", PATIENCE, || one(c, under_way), |n| *n == 0);
    wait_until("nothing is being answered", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    // A request that was given up on its way comes before this one, or never.
    text(c, "SELECT llm_classify('#r777777:bug# ' || clock_timestamp(), 'topic')");
}

fn count_anew(bed: &Bed) {
    settle(bed);
    bed.provider.reset_stats();
}

/// The ids of the rows that are asked about by a statement, which are asked about once.
fn asked(bed: &Bed, c: &mut Client, sql: &str) -> BTreeSet<i64> {
    count_anew(bed);
    run(c, sql);
    let rows = bed.provider.stats().rows;
    assert!(rows.values().all(|r| r.asked == 1), "{sql}: {rows:?}");
    rows.keys().map(|id| id.parse().unwrap()).collect()
}

/// A table `t` of texts whose topic is `bug` for every fourth row, with a question that every third answers with yes.
/// Texts carry the id, questions the id and a 9 before it.
fn questions(c: &mut Client, rows: i64) {
    run(
        c,
        &format!(
            "SET llm_batch.default_model = 'm';
             CREATE TABLE t (id int PRIMARY KEY, body text, ask text, topic text);
             INSERT INTO t SELECT i, format('#r%s:%s#', i, CASE WHEN i % 4 = 0 THEN 'bug' ELSE 'spam' END),
                    format('#r9%s:%s#', lpad(i::text, 6, '0'), CASE WHEN i % 3 = 0 THEN 'yes' ELSE 'no' END)
               FROM generate_series(1, {rows}) i;
             ANALYZE t"
        ),
    );
}

const ASK: i64 = 9_000_000;

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
fn what_goes_wrong_is_told_in_its_place() {
    let bed = Bed::with("batch_errors", slow(5));
    let c = &mut bed.connect();
    questions(c, 200);
    let select = "SELECT count(llm_classify(body, 'topic')) FROM t WHERE id > 0";
    // A row without an answer is NULL, with a warning; or an error, if the task says so.
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{\"max_attempts\": 1, \"reuse\": false}')");
    bed.provider.script([Some(Fault::DropId)]);
    assert_eq!(one(c, select), 199);
    run(
        c,
        "SELECT llm_batch.alter_classifier('topic', options => '{\"max_attempts\": 1, \"reuse\": false, \"on_error\": \"error\"}')",
    );
    for setting in ["on", "off"] {
        run(c, &format!("SET llm_batch.enable_batch_scan = {setting}"));
        settle(&bed);
        bed.provider.script([Some(Fault::DropId)]);
        let e = error(c, select);
        assert_eq!((e.0.as_str(), e.1.as_str()), ("22000", "the model gave no answer for a text"), "{e:?}");
        assert!(e.2.contains("no_answer") && e.3.contains("on_error"), "{e:?}");
    }
    run(
        c,
        "RESET llm_batch.enable_batch_scan; SELECT llm_batch.alter_classifier('topic', options => '{\"reuse\": false}')",
    );
    assert_eq!(error(c, "SELECT llm_classify(body, 'nothing') FROM t").0, "42704");
    assert_eq!(error(c, "SELECT llm_classify(body, ARRAY['a', 'b'], '{\"x\": 1}') FROM t").0, "22023");
    // An error behind the rows that a limit takes is nobody's.
    let limited = "SELECT llm_classify(body || 1 / (5 - id), 'topic') FROM t ORDER BY id LIMIT 4";
    assert_eq!(c.query(limited, &[]).unwrap().len(), 4);
    assert_eq!(error(c, "SELECT llm_classify(body || 1 / (5 - id), 'topic') FROM t").0, "22012");
    // A budget.
    run(c, "SET llm_batch.statement_max_cost = 0.0004");
    bed.provider.reset_stats();
    let e = error(c, select);
    assert!(e.0 == "53400" && e.2.contains("of $0.0004"), "{e:?}");
    let stats = bed.provider.stats();
    assert!(stats.requests > 0 && stats.rows.len() < 200, "{stats:?}");
    // Each fetch is a statement, with a budget of its own.
    run(c, "BEGIN; DECLARE x CURSOR FOR SELECT id, llm_classify(body, 'topic') topic FROM t");
    for _ in 0..4 {
        assert_eq!(c.query("FETCH 20 FROM x", &[]).unwrap().len(), 20);
    }
    run(c, "COMMIT; RESET llm_batch.statement_max_cost");
    // A wrong key, in the middle.
    bed.provider.configure(|config| config.api_key = Some("another".to_owned()));
    let e = error(c, select);
    assert_eq!(e.0, "28000", "{e:?}");
    bed.provider.configure(|config| config.api_key = None);
    assert_eq!(one(c, select), 200);
}

#[test]
fn what_was_not_sent_is_withdrawn() {
    let bed = Bed::new("batch_withdrawn");
    let c = &mut bed.connect();
    questions(c, 1_000);
    let witness = &mut bed.connect();
    // One request at a time, so that rows wait.
    run(c, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 1)");
    let queued = |witness: &mut Client| one(witness, "SELECT coalesce(sum(queued), 0)::bigint FROM llm_batch.activity");
    let quiet = |witness: &mut Client, what: &str| {
        wait_until("what waits is withdrawn", PATIENCE, || queued(witness), |n| *n == 0);
        bed.provider.release();
        settle(&bed);
        // A later question is answered after the rows that would have been sent before it.
        let before = bed.provider.stats().requests;
        let one_more = "SELECT llm_classify('#r777777:bug# ' || clock_timestamp(), 'topic')";
        assert_eq!(text(witness, one_more), "bug", "{what}");
        assert_eq!(bed.provider.stats().requests, before + 1, "{what}");
    };
    for what in ["cancel", "terminate"] {
        let c = &mut bed.connect();
        bed.provider.hold();
        let pid = one(c, "SELECT pg_backend_pid()::bigint");
        std::thread::scope(|scope| {
            let waiting = scope
                .spawn(|| c.batch_execute(&format!("UPDATE t SET topic = llm_classify(body || '{what}', 'topic')")));
            wait_until("rows wait", PATIENCE, || queued(witness), |n| *n > 500);
            run(witness, &format!("SELECT pg_{what}_backend({pid})"));
            let e = waiting.join().unwrap().unwrap_err();
            // A terminated session may find the connection closed, and not why.
            assert!(e.is_closed() || e.code().is_some_and(|c| ["57014", "57P01"].contains(&c.code())), "{what}: {e:?}");
        });
        quiet(witness, what);
        // One request was held, and one may have been on its way.
        assert!(bed.provider.stats().rows.len() <= 100 + 1);
        bed.provider.reset_stats();
    }
    // A cursor that is closed early has read no more than it may be asked for next.
    run(
        c,
        "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body || 'cursor', 'topic') FROM t; FETCH 1 FROM x; CLOSE x; COMMIT",
    );
    quiet(witness, "cursor");
    assert_eq!(bed.provider.stats().rows.len(), 10 + 1);
    // An error in the middle, in the first request's rows: of the thousand in hand no more is asked than the next has.
    bed.provider.reset_stats();
    bed.provider.hold_after(1);
    assert_eq!(error(c, "SELECT 1 / (40 - id), llm_classify(body || 'error', 'topic') FROM t").0, "22012");
    quiet(witness, "error");
    assert!(bed.provider.stats().rows.len() <= 100 + 1);
}

#[test]
fn rows_that_others_change() {
    let bed = Bed::new("batch_concurrent");
    let c = &mut bed.connect();
    tickets(c, "tickets", 1..=300);
    let other = &mut bed.connect();
    run(other, "BEGIN; UPDATE tickets SET body = '#r900007:spam#', want = 'spam' WHERE id = 7; DELETE FROM tickets WHERE id = 8;
                UPDATE tickets SET want = 'mine' WHERE id = 9");
    let witness = &mut bed.connect();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            c.execute("UPDATE tickets SET topic = llm_classify(body, 'topic') WHERE want <> 'mine'", &[]).unwrap()
        });
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        wait_until("the update waits for the row", PATIENCE, || one(witness, blocked), |n| *n == 1);
        run(other, "COMMIT");
        // Neither the row that is gone nor the one that no longer fits.
        assert_eq!(waiting.join().unwrap(), 298);
    });
    let c = &mut bed.connect();
    assert_eq!(one(c, "SELECT count(*) FROM tickets WHERE topic = want"), 298);
    assert_eq!(text(c, "SELECT topic FROM tickets WHERE id = 7"), "spam");
    assert_eq!(one(c, "SELECT count(*) FROM tickets WHERE topic IS NULL AND id = 9"), 1);
    let stats = bed.provider.stats();
    assert_eq!(stats.rows["900007"].asked, 1);
    assert!(stats.requests < 20, "{}", stats.requests);
}

#[test]
fn rows_that_a_role_may_not_see_stay_here() {
    let bed = Bed::new("batch_security");
    let c = &mut bed.connect();
    questions(c, 50);
    run(
        c,
        "CREATE ROLE analyst LOGIN; GRANT SELECT ON t TO analyst; GRANT USAGE ON FOREIGN SERVER fake TO analyst;
         ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t TO analyst USING (id % 5 = 0);
         CREATE FUNCTION leak(text) RETURNS bool LANGUAGE plpgsql COST 0.0001 AS 'BEGIN RAISE NOTICE ''%'', $1; RETURN true; END'",
    );
    let analyst = &mut bed.cluster.connect_as("postgres", "analyst");
    let seen: BTreeSet<i64> = (1..=10).map(|i| i * 5).collect();
    for sql in [
        "SELECT llm_classify(body, 'topic') FROM t",
        "SELECT id FROM t WHERE llm_classify(body || 1, 'topic') = 'bug' AND leak(body)",
    ] {
        assert_eq!(asked(&bed, analyst, sql), seen, "{sql}");
    }
    // Another role's answers are another's: its rows are asked again, also within a cursor that changes hands.
    bed.provider.reset_stats();
    run(c, "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body || 2, 'topic') FROM t; FETCH 1 FROM x");
    run(c, "CREATE ROLE nobody; SET LOCAL ROLE nobody");
    let e = error(c, "FETCH ALL FROM x");
    assert_eq!(e.0, "42501", "{e:?}");
    run(c, "ROLLBACK");
}

/// Between two FETCHes much may change: nothing that was read ahead or opened before holds on after it.
#[test]
fn what_changes_between_two_fetches() {
    let bed = Bed::new("batch_fetches");
    let c = &mut bed.connect();
    questions(c, 200);
    run(
        c,
        "SELECT llm_batch.create_model('n', server => 'fake', model => 'other');
         CREATE ROLE analyst LOGIN; GRANT SELECT, UPDATE ON t TO analyst; GRANT USAGE ON FOREIGN SERVER fake TO analyst",
    );
    let analyst = &mut bed.cluster.connect_as("postgres", "analyst");
    // Another default model: each text goes to one.
    count_anew(&bed);
    run(c, "BEGIN; DECLARE x CURSOR FOR SELECT id, llm_classify(body, ARRAY['bug', 'spam']) FROM t");
    for model in ["m", "n", "n", "m", "n"] {
        run(c, &format!("SET LOCAL llm_batch.default_model = '{model}'"));
        for row in c.query("FETCH 40 FROM x", &[]).unwrap() {
            let want = if row.get::<_, i32>(0) % 4 == 0 { "bug" } else { "spam" };
            assert_eq!(row.get::<_, &str>(1), want);
        }
    }
    run(c, "COMMIT");
    let rows = bed.provider.stats().rows;
    assert!(rows.len() == 200 && rows.values().all(|r| r.asked == 1), "{rows:?}");
    let models: BTreeSet<String> = bed.provider.bodies().iter().map(|body| body["model"].to_string()).collect();
    assert_eq!(models.len(), 2, "{models:?}");
    // A task that is altered.
    run(analyst, "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body || 1, 'topic') FROM t; FETCH 5 FROM x");
    run(c, "SELECT llm_batch.alter_classifier('topic', instruction => 'As of now.')");
    count_anew(&bed);
    run(analyst, "FETCH 100 FROM x");
    let is_new = |body: &serde_json::Value| body.to_string().contains("As of now.");
    let bodies = bed.provider.bodies();
    assert!(bodies.last().is_some_and(is_new), "{bodies:?}");
    // A model that is.
    run(c, "SELECT llm_batch.alter_model('m', model => 'renamed')");
    count_anew(&bed);
    run(analyst, "FETCH 40 FROM x");
    let bodies = bed.provider.bodies();
    assert!(bodies.last().is_some_and(|body| body["model"] == "renamed"), "{bodies:?}");
    // A key that is, with rows that nobody has asked about: the provider takes no other.
    let many = "SELECT llm_classify(concat(body, g), 'topic') FROM t, generate_series(2, 11) g";
    run(analyst, &format!("DECLARE y CURSOR FOR {many}; FETCH 5 FROM y"));
    settle(&bed);
    run(c, "ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key 'sk-anew')");
    bed.provider.configure(|config| config.api_key = Some("sk-anew".to_owned()));
    count_anew(&bed);
    run(analyst, "FETCH 1000 FROM y");
    let stats = bed.provider.stats();
    assert!(stats.requests > 0 && !stats.by_status.contains_key(&401), "{stats:?}");
    // A right that is revoked.
    run(c, "REVOKE USAGE ON FOREIGN SERVER fake FROM analyst");
    count_anew(&bed);
    let e = error(analyst, "FETCH ALL FROM x");
    assert_eq!(e.0, "42501", "{e:?}");
    run(analyst, "ROLLBACK");
    settle(&bed);
    let asked = bed.provider.stats().rows.len();
    assert!(asked <= 1, "{asked} texts were sent after the right was revoked");
}

/// Row security and conditions may ask other things of the session at the next FETCH: the rows are those that come
/// without the node.
#[test]
fn rows_of_the_session_as_it_is() {
    let bed = Bed::new("batch_tenants");
    let c = &mut bed.connect();
    questions(c, 400);
    run(
        c,
        "CREATE ROLE one LOGIN; CREATE ROLE two; GRANT two TO one; GRANT SELECT ON t TO one, two;
         GRANT USAGE ON FOREIGN SERVER fake TO one, two;
         CREATE FUNCTION tenant() RETURNS int STABLE LANGUAGE plpgsql
             AS $$ BEGIN RETURN current_setting('app.tenant')::int; END $$;
         CREATE VIEW by_setting AS SELECT * FROM t WHERE id % 2 = current_setting('app.tenant')::int;
         CREATE VIEW by_function AS SELECT * FROM t WHERE id % 2 = tenant();
         CREATE VIEW by_role AS SELECT * FROM t WHERE id % 2 = CASE current_user WHEN 'one' THEN 0 ELSE 1 END;
         CREATE TABLE of_one ();
         CREATE VIEW by_right AS SELECT * FROM t WHERE id % 2 = CASE WHEN has_table_privilege('of_one', 'SELECT') THEN 0 ELSE 1 END;
         CREATE TABLE policed AS SELECT * FROM t; ALTER TABLE policed ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON policed USING (id % 2 = current_setting('app.tenant')::int);
         CREATE TABLE owned AS SELECT * FROM t; ALTER TABLE owned ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON owned USING (id % 2 = CASE current_user WHEN 'one' THEN 0 ELSE 1 END);
         GRANT SELECT ON ALL TABLES IN SCHEMA public TO one, two; REVOKE SELECT ON of_one FROM two",
    );
    let one = &mut bed.cluster.connect_as("postgres", "one");
    let ids = |rows: &[postgres::Row]| rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>();
    let mut both = |query: &str, changes: [&str; 3], in_parts: bool| {
        let mut fetched = |is_on: &str| {
            let mut ids_of = Vec::new();
            let mut transaction = one.transaction().unwrap();
            run_in(&mut transaction, &format!("SET LOCAL llm_batch.enable_batch_scan = {is_on}; {}", changes[0]));
            if in_parts {
                // As a driver does it.
                let portal = transaction.bind(query, &[]).unwrap();
                for change in changes {
                    run_in(&mut transaction, change);
                    ids_of.extend(ids(&transaction.query_portal(&portal, 4).unwrap()));
                }
            } else {
                run_in(&mut transaction, &format!("DECLARE x CURSOR FOR {query}"));
                for change in changes {
                    run_in(&mut transaction, change);
                    ids_of.extend(ids(&transaction.query("FETCH 4 FROM x", &[]).unwrap()));
                }
            }
            ids_of
        };
        let without = fetched("off");
        assert_eq!(fetched("on"), without, "{query}");
        let halves = without.chunks(4).map(|ids| ids.iter().all(|id| id % 2 == ids[0] % 2) && ids.len() == 4);
        assert!(halves.eq([true; 3]) && without[0] % 2 != without[4] % 2, "{query}: {without:?}");
    };
    let settings = ["SET LOCAL app.tenant = 0", "SET LOCAL app.tenant = 1", "SET LOCAL app.tenant = 0"];
    let roles = ["RESET ROLE", "SET LOCAL ROLE two", "RESET ROLE"];
    for (table, changes) in [
        ("policed", settings),
        ("by_setting", settings),
        ("by_function", settings),
        ("owned", roles),
        ("by_role", roles),
        ("by_right", roles),
        ("(SELECT * FROM policed OFFSET 0) s", settings),
        ("t WHERE id % 2 = (SELECT id % 2 FROM policed WHERE policed.id >= t.id LIMIT 1)", settings),
    ] {
        both(&format!("SELECT id, llm_classify(body, 'topic') FROM {table}"), changes, false);
        let more = if table.contains("WHERE") { "AND" } else { "WHERE" };
        both(&format!("SELECT id FROM {table} {more} llm_classify(body, 'topic') IN ('bug', 'spam')"), changes, false);
    }
    both("SELECT id, llm_classify(body, 'topic') FROM policed", settings, true);
    // All at once, and in a function's loop, requests are shared as ever.
    run(one, "SET app.tenant = 0");
    for sql in [
        "SELECT llm_classify(body, 'topic') FROM policed",
        "DO $$ DECLARE r record; BEGIN FOR r IN SELECT llm_classify(body, 'topic') FROM policed LOOP END LOOP; END $$",
    ] {
        count_anew(&bed);
        run(one, sql);
        let stats = bed.provider.stats();
        assert!(stats.rows.len() == 200 && stats.requests < 20, "{sql}: {} requests", stats.requests);
    }
}

#[track_caller]
fn run_in(transaction: &mut postgres::Transaction<'_>, sql: &str) {
    transaction.batch_execute(sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
}

#[test]
fn a_cursor_goes_back() {
    let bed = Bed::new("batch_backward");
    let c = &mut bed.connect();
    questions(c, 30);
    let moves = ["FETCH 12", "FETCH BACKWARD 5", "FETCH PRIOR", "FETCH ABSOLUTE 3", "FETCH LAST", "FETCH FIRST"];
    for (query, declared) in [
        ("SELECT id, llm_classify(body, 'topic') FROM t", "CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t WHERE llm_filter(ask, 'Is it?')", "CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t LIMIT 25", "CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t", "CURSOR WITH HOLD"),
        ("SELECT id, llm_classify(body, 'topic') FROM t", "SCROLL CURSOR"),
        // Postgres does not go back in these.
        ("SELECT id, llm_classify(body, 'topic') FROM t", "NO SCROLL CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t FOR UPDATE", "CURSOR"),
        ("SELECT t.id, llm_classify(t.body, 'topic') FROM t JOIN t u USING (id)", "CURSOR"),
    ] {
        let mut fetched = |is_on: &str| {
            let mut said = Vec::new();
            run(
                c,
                &format!("BEGIN; SET LOCAL llm_batch.enable_batch_scan = {is_on}; DECLARE x {declared} FOR {query}"),
            );
            for go in moves {
                match c.query(&format!("{go} FROM x"), &[]) {
                    Ok(rows) => said.push(rows.iter().map(|r| (r.get(0), r.get(1))).collect::<Vec<(i32, String)>>()),
                    Err(e) => {
                        assert_eq!(e.code().unwrap().code(), "55000", "{query}: {go}: {e:?}");
                        break;
                    }
                }
            }
            run(c, "ROLLBACK");
            said
        };
        let without = fetched("off");
        count_anew(&bed);
        assert_eq!(fetched("on"), without, "{declared} {query}");
        let asked = bed.provider.stats().rows;
        assert!(asked.values().all(|r| r.asked == 1), "{declared} {query}: {asked:?}");
    }
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
fn what_a_row_calls_is_its_own_matter() {
    let bed = Bed::new("batch_nested");
    let c = &mut bed.connect();
    questions(c, 20);
    // Functions with another model, or with another role's rights, do not get the answers of the row that calls them.
    run(
        c,
        "SELECT llm_batch.create_model('m2', server => 'fake', model => 'other');
         CREATE FUNCTION inner_one(text) RETURNS text STABLE LANGUAGE plpgsql SET llm_batch.default_model = 'm2'
             AS 'BEGIN RETURN llm_classify($1, ARRAY[''bug'', ''spam'']); END';
         CREATE ROLE poor; GRANT SELECT ON t TO poor;
         CREATE FUNCTION poor_one(text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER
             AS 'BEGIN RETURN llm_classify($1, ''topic''); END';
         ALTER FUNCTION poor_one OWNER TO poor",
    );
    bed.provider.reset_stats();
    run(c, "SELECT llm_classify(body, ARRAY['bug', 'spam']), inner_one(body) FROM t");
    let models = bed.provider.bodies().iter().filter(|b| b["model"] == "other").count();
    assert_eq!(models, 20);
    let e = error(c, "SELECT llm_classify(body, 'topic'), poor_one(body) FROM t");
    assert_eq!(e.0, "42501", "{e:?}");
    // The filter of an aggregate is one choice for each row.
    let volatile = "SELECT count(llm_classify(body, 'topic')) AS n,
                           count(llm_classify(body, 'topic')) FILTER (WHERE chosen(id)) AS some FROM t";
    run(
        c,
        "CREATE SEQUENCE s; CREATE FUNCTION chosen(int) RETURNS bool VOLATILE LANGUAGE sql AS 'SELECT nextval(''s'') > 0'",
    );
    let row = c.query_one(volatile, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), one(c, "SELECT last_value FROM s")), (20, 20, 20));
    // A row without an answer is told of once, in its turn.
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{\"max_attempts\": 1, \"reuse\": false}')");
    bed.provider.script([Some(Fault::DropId)]);
    let twice = "SELECT CASE llm_classify(body, 'topic') WHEN 'bug' THEN llm_filter(ask, 'Is it so?') END FROM t";
    let said = bed.cluster.psql("postgres", &format!("SET llm_batch.default_model = 'm'; {twice}"));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.matches("WARNING:  the model gave no answer").count(), 1, "{said}");
}

#[test]
fn plans_in_the_log() {
    let bed = Bed::new("batch_log");
    let c = &mut bed.connect();
    questions(c, 20);
    // At the end of a SELECT there is no snapshot any more.
    match c.batch_execute("LOAD 'auto_explain'") {
        Err(e) => assert!(e.to_string().contains("auto_explain"), "{e}"),
        Ok(()) => {
            run(c, "SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on");
            assert_eq!(c.query("SELECT llm_classify(body, 'topic') FROM t WHERE id > 0", &[]).unwrap().len(), 20);
            assert_eq!(c.query("SELECT llm_classify(body, 'topic') FROM t WHERE id < 0", &[]).unwrap().len(), 0);
            let logged = |log: &String| log.matches("Call: llm_classify(body, 'topic'::text)").count() == 2;
            let log = wait_until("both plans are logged", PATIENCE, || bed.cluster.log(), logged);
            assert!(log.contains("Rows per Request: 50") && log.contains("Rows Sent: 20"), "{log}");
        }
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

#[test]
fn rows_wider_than_memory() {
    let bed = Bed::with("batch_spill", Config::default());
    let c = &mut bed.connect();
    questions(c, 3_000);
    run(c, "ALTER TABLE t ADD wide text; UPDATE t SET wide = repeat(md5(id::text), 40); SET work_mem = '64kB'");
    let sql = "SELECT count(*) FILTER (WHERE topic = CASE WHEN id % 4 = 0 THEN 'bug' ELSE 'spam' END
                                         AND CASE WHEN topic = 'bug' THEN is_so = (id % 3 = 0) ELSE is_so IS NULL END
                                         AND wide = repeat(md5(id::text), 40))
                 FROM (SELECT id, wide, llm_classify(body, 'topic') topic,
                              CASE llm_classify(body, 'topic') WHEN 'bug' THEN llm_filter(ask, 'Is it?') END is_so
                         FROM t OFFSET 0) s";
    assert_eq!(one(c, sql), 3_000);
    let files = "SELECT count(*) FROM pg_stat_database WHERE datname = current_database() AND temp_files > 0";
    wait_until("it went to disk", PATIENCE, || one(c, files), |n| *n == 1);
}

/// CPU time of a statement's process, in ns, whether the statement ends well or not.
fn cpu(c: &mut Client, sql: &str) -> u64 {
    let pid = one(c, "SELECT pg_backend_pid()::bigint");
    let spent = || {
        let schedstat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        schedstat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let before = spent();
    let _ = c.simple_query(sql);
    spent() - before
}

#[test]
fn a_case_of_many_arms() {
    let bed = Bed::new("batch_arms");
    let c = &mut bed.connect();
    questions(c, 60);
    let case = |arms: usize, call: &dyn Fn(usize) -> String| {
        let arms: String = (0..arms).map(|k| format!(" WHEN id % 50 = {k} THEN {}", call(k))).collect();
        format!("SELECT id, CASE{arms} END FROM t WHERE id < 70 ORDER BY id")
    };
    let classify = |k: usize| format!("llm_classify(body || ' {k}', 'topic')");
    // Eight times the arms take eight times the CPU, and not sixty times it, whether calls are alike or not. Before each,
    // the cache of what is known of functions is there.
    let filter = |k: usize| format!("llm_filter(ask, 'Is it {k}?')::text");
    for call in [&classify as &dyn Fn(usize) -> String, &filter, &|_| "llm_classify(body, 'topic')".to_owned()] {
        let mut least = |arms: usize| {
            let sql = format!("EXPLAIN {}", case(arms, call));
            (0..3).map(|_| cpu(c, &sql)).min().unwrap()
        };
        let (few, many) = (least(100), least(800));
        println!("100 arms: {} us, 800 arms: {} us", few / 1_000, many / 1_000);
        assert!(many < 20 * few, "{few} ns for 100 arms, {many} ns for 800 arms of {}", call(1));
    }
    // It can be cancelled meanwhile.
    let sql = format!("EXPLAIN {}", case(5_000, &classify));
    let all = cpu(c, &sql);
    run(c, "SET statement_timeout = '50 ms'");
    assert_eq!(error(c, &sql).0, "57014");
    let cancelled = cpu(c, &sql);
    assert!(2 * cancelled < all, "{cancelled} of {all} ns");
    run(c, "RESET statement_timeout");
    // The answers are the same, of the same rows.
    let sql = case(45, &classify);
    let rows = |c: &mut Client| {
        let rows = c.query(&sql, &[]).unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i32, Option<String>)>>()
    };
    count_anew(&bed);
    let with = rows(c);
    let asked = bed.provider.stats().rows;
    assert!(asked.len() == 55 && asked.values().all(|r| r.asked == 1), "{asked:?}");
    run(c, "SET llm_batch.enable_batch_scan = off");
    assert_eq!(with, rows(c));
    assert_eq!(with.iter().filter(|(id, label)| label.is_none() == (id % 50 >= 45)).count(), 60);
    // A condition is evaluated once for a row ahead of its turn and once in its turn, however many calls are behind it.
    run(
        c,
        "RESET llm_batch.enable_batch_scan; CREATE FUNCTION probe(int) RETURNS bool STABLE LANGUAGE plpgsql
             AS 'BEGIN RAISE NOTICE ''probed''; RETURN $1 < 0; END'",
    );
    let arms: String = (0..10).map(|k| format!(" WHEN probe(id + {k}) THEN {}", classify(k))).collect();
    let probed = format!("SET llm_batch.default_model = 'm'; SELECT CASE{arms} END FROM t WHERE id = 7");
    let said = String::from_utf8_lossy(&bed.cluster.psql("postgres", &probed).stderr).into_owned();
    assert_eq!(said.matches("NOTICE:  probed").count(), 20, "{said}");
}

#[test]
fn plans_are_compiled_as_without_our_functions() {
    let bed = Bed::new("batch_jit");
    let c = &mut bed.connect();
    questions(c, 2_000);
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{}'); SET jit = on");
    let select = "SELECT llm_classify(body, 'topic') FROM t";
    for _ in 0..2 {
        let plan = explain(c, "ANALYZE", select);
        assert!(plan.contains("LLM Batch") && !plan.contains("JIT:"), "{plan}");
    }
    if text(c, "SELECT pg_jit_available()::text") == "false" {
        return;
    }
    let cost_functions = |c: &mut Client, cost: &str| {
        for function in
            ["llm_classify(text, text)", "llm_classify(text, text[], jsonb)", "llm_filter(text, text, jsonb)"]
        {
            run(c, &format!("ALTER FUNCTION {function} COST {cost}"));
        }
    };
    // Compilation begins at the cost of a plan by itself.
    let by_itself = |c: &mut Client, sql: &str| -> f64 {
        cost_functions(c, "0.000001");
        let plan = explain(c, "COSTS", sql);
        cost_functions(c, "100000");
        let cost = plan.split("..").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        cost.parse().unwrap()
    };
    // A high cost makes costs alike, and another plan the first among them.
    run(
        c,
        "SET jit_optimize_above_cost = -1; SET jit_inline_above_cost = -1; SET enable_hashagg = off; SET enable_material = off",
    );
    let mut wrong = String::new();
    for sql in [
        select,
        "SELECT id FROM t WHERE llm_filter(ask, 'Is it?')",
        "SELECT id FROM t WHERE id % 2 = 0 AND llm_filter(ask, 'Is it?') AND llm_classify(body, 'topic') = 'bug'",
        "SELECT CASE WHEN id = 1 THEN llm_classify(body, 'topic') WHEN id = 2 THEN llm_filter(ask, 'Is it?')::text END FROM t",
        "SELECT count(*) FILTER (WHERE llm_classify(body, 'topic') = 'bug'), max(llm_classify(body, 'topic')) FROM t",
        "SELECT llm_classify(body, 'topic'), count(*) FROM t GROUP BY 1",
        "SELECT llm_classify(body, 'topic') FROM t LIMIT 1000",
        "SELECT llm_classify(string_agg(body, ''), 'topic') FROM t GROUP BY id % 10",
        "SELECT count(*) FROM t a, t b WHERE a.id + b.id < 100 AND llm_filter(a.ask, 'Is it?')",
        "SELECT (SELECT max(llm_classify(u.body, 'topic')) FROM t u WHERE u.id <= t.id) FROM t",
        "WITH c AS MATERIALIZED (SELECT llm_classify(body, 'topic') topic FROM t) SELECT * FROM c a, c b WHERE a = b",
        "SELECT llm_classify('a', 'topic') FROM t WHERE id = 7 UNION ALL SELECT llm_classify(body, 'topic') FROM t",
    ] {
        let cost = by_itself(c, sql);
        for (factor, is_compiled) in [(0.8, true), (1.25, false)] {
            run(c, &format!("SET jit_above_cost = {}", cost * factor));
            let plan = explain(c, "COSTS", sql);
            if plan.contains("JIT:") != is_compiled {
                wrong += &format!("above {factor} of {cost}: {sql}\n{plan}");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    run(c, "SET jit_above_cost = 0");
    assert!(explain(c, "ANALYZE", select).contains("JIT:"));
}
