//! The functions that ask about one text: each in every place of SQL, with every odd argument.

mod common;

use common::{Bed, error, model, one, run, text, tickets};
use llm_fake_provider::kinds;
use postgres::{Client, SimpleQueryMessage};

/// Each function, its arguments behind the text, and the type that it returns.
fn verbs() -> Vec<(String, String, String)> {
    let run = ("llm_run".to_owned(), "'topic'".to_owned(), "text".to_owned());
    kinds("verbs").unwrap().into_iter().map(|(_, verb)| verb).chain([run]).collect()
}

const ROWS: i64 = 120;

/// As literal, column, NULL and empty text, in WHERE, UPDATE, a view and prepared statements.
#[test]
fn every_verb_in_every_place() {
    let bed = Bed::new("verbs");
    let c = &mut bed.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    for (_, sql) in kinds::<String>("setup").unwrap() {
        run(c, &sql);
    }
    tickets(c, "t", 1..=ROWS);
    run(c, "INSERT INTO t VALUES (1001, NULL, ''), (1002, '', ''), (1003, E' \\n\\t', '')");
    for (verb, rest, of) in verbs() {
        let call = |input: &str| format!("{verb}({input}, {rest})");
        let what = call("body");
        // One row a request, one after the other, as the plain function does it.
        run(
            c,
            "SET llm_batch.enable_batch_scan = off; DROP TABLE IF EXISTS want, u; DROP VIEW IF EXISTS v; DEALLOCATE ALL",
        );
        run(c, &format!("CREATE TABLE want AS SELECT id, {what} AS v FROM t WHERE id <= 12 OR id > 1000"));
        assert_eq!(text(c, "SELECT pg_typeof(v)::text FROM want LIMIT 1"), of, "{what}");
        assert_eq!(one(c, "SELECT count(v) FROM want"), 12, "{what}: rows without text have no answer");
        run(c, "RESET llm_batch.enable_batch_scan");
        // Rows that a query gives otherwise, or not at all.
        let differ = |c: &mut Client, of: &str, got: &str| {
            let found = "w.v IS NOT DISTINCT FROM g.v";
            one(
                c,
                &format!(
                    "SELECT count(*) FROM want w WHERE {of} AND NOT EXISTS (SELECT FROM ({got}) g (id, v) WHERE g.id = w.id AND {found})"
                ),
            )
        };
        // Read ahead: a few requests for all rows, the same values.
        bed.provider.reset_stats();
        run(c, &format!("CREATE TABLE u AS SELECT id, body, {what} AS v FROM t"));
        let requests = bed.provider.stats().admitted;
        assert!(requests <= 8, "{what}: {requests} requests");
        assert_eq!(differ(c, "true", "SELECT id, v FROM u"), 0, "{what}");
        assert_eq!(one(c, "SELECT count(v) FROM u"), ROWS, "{what}");
        let filtered = format!("SELECT id, {what} FROM t WHERE {what} IS NOT NULL");
        assert_eq!(differ(c, "v IS NOT NULL", &filtered), 0, "{what} in WHERE");
        assert_eq!(one(c, &format!("SELECT count(*) FROM ({filtered}) q")), ROWS, "{what} in WHERE");
        run(c, &format!("UPDATE u SET v = NULL; UPDATE u SET v = {what}"));
        assert_eq!(differ(c, "true", "SELECT id, v FROM u"), 0, "{what} in an UPDATE");
        run(c, &format!("CREATE VIEW v AS SELECT id, {what} AS v FROM t"));
        assert_eq!(differ(c, "true", "SELECT id, v FROM v"), 0, "{what} in a view");
        // Prepared: planned for each value at first, then for all. A text is the statement's own, a parameter, or a row's.
        run(
            c,
            &format!(
                "PREPARE of_row(bigint) AS SELECT v FROM v WHERE id = $1;
                 PREPARE of_text(text) AS SELECT {} AS v; PREPARE of_none AS SELECT {} AS v",
                call("$1"),
                call("'#r000007:bug#'")
            ),
        );
        let body = text(c, "SELECT body FROM t WHERE id = 7").replace('\'', "''");
        let seventh = value(c, "SELECT v FROM want WHERE id = 7");
        for _ in 0..7 {
            for execute in ["EXECUTE of_row(7)".to_owned(), format!("EXECUTE of_text('{body}')")] {
                assert_eq!(value(c, &execute), seventh, "{what}: {execute}");
            }
            for none in ["EXECUTE of_row(1001)", "EXECUTE of_text(NULL)", "EXECUTE of_text('')"] {
                assert_eq!(value(c, none), None, "{what}: {none}");
            }
            assert!(value(c, "EXECUTE of_none").is_some(), "{what}");
        }
        // Literals.
        let literal = call(&format!("'{body}'"));
        assert_eq!(value(c, &format!("SELECT {literal}")), seventh, "{literal}");
        for none in ["NULL", "''", "E' \\n'"] {
            assert_eq!(value(c, &format!("SELECT {}", call(none))), None, "{what}: {none}");
        }
        let lines = c.query(&format!("EXPLAIN SELECT {what} FROM t"), &[]).unwrap();
        assert!(lines.iter().any(|l| l.get::<_, String>(0).contains("LLM Batch")), "{what}: {lines:?}");
    }
}

/// The only value that a statement returns, as text.
fn value(client: &mut Client, sql: &str) -> Option<String> {
    let rows = client.simple_query(sql).unwrap();
    let mut values =
        rows.iter().filter_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row.get(0)) } else { None });
    let value = values.next().expect(sql).map(str::to_owned);
    assert!(values.next().is_none(), "{sql}");
    value
}

#[test]
fn odd_arguments_are_refused_at_once() {
    let bed = Bed::new("verbs_odd");
    let c = &mut bed.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    for (call, code, words) in [
        ("llm_classify('x', '{a,b}')", "42704", "ARRAY["),
        ("llm_extract('x', '[\"a\"]')", "42704", "ARRAY["),
        ("llm_extract('x', 'topic')", "42809", "is not an extractor"),
        ("llm_extract('x', ARRAY['due dates'])", "22023", "dates"),
        ("llm_extract('x', ARRAY['a', 'a'])", "22023", "twice"),
        ("llm_extract('x', ARRAY['118 date'])", "22023", "118"),
        ("llm_extract('x', ARRAY[]::text[])", "22023", "fields"),
        ("llm_extract('x', ARRAY['a'], '{\"descriptions\": {\"b\": \"c\"}}')", "22023", "\"b\""),
        ("llm_classify('x', ARRAY['a', 'b'], '{\"descriptions\": {\"c\": \"d\"}}')", "22023", "\"c\""),
        ("llm_score('x', 'y', '{\"labels\": []}')", "22023", "labels"),
        ("llm_score('x', 'y', '{\"descriptions\": {\"a\": \"b\"}}')", "22023", "descriptions"),
        ("llm_score('x', 'y', '{\"model\": \"nowhere\"}')", "42704", "nowhere"),
        ("llm_score('x', '')", "22023", "question"),
        ("llm_filter('x', '')", "22023", "question"),
        ("llm_run('x', 'nothing')", "42704", "nothing"),
    ] {
        let e = error(c, &format!("SELECT {call}"));
        assert_eq!(e.0, code, "{call}: {e:?}");
        assert!(format!("{} {} {}", e.1, e.2, e.3).contains(words), "{call}: {e:?}");
        assert_eq!(bed.provider.stats().requests, 0, "{call}");
    }
    // NULL in a strict argument is NULL, as with any function.
    for call in
        ["llm_run('x', NULL)", "llm_extract('x', NULL::text[])", "llm_score('x', NULL)", "llm_score('x', 'y', NULL)"]
    {
        assert_eq!(one(c, &format!("SELECT count(*) FROM (SELECT {call}) q (v) WHERE v IS NULL")), 1, "{call}");
    }
    let rows = c
        .query("SELECT id, value, status FROM llm_run_batch('VALUES (1, ''#r000001:bug#''), (2, NULL)', 'topic')", &[])
        .unwrap();
    let got: Vec<(String, Option<String>, String)> = rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect();
    assert_eq!(got[0], ("1".to_owned(), Some("bug".to_owned()), "ok".to_owned()));
    assert_eq!((got[1].1.clone(), got[1].2.as_str()), (None, "skipped"));
    assert_eq!(
        one(
            c,
            "SELECT count(*) FROM llm_run_array(ARRAY[1, 2], ARRAY['#r000001:bug#', 'y'], 'topic') WHERE value IS NOT NULL"
        ),
        2
    );
    // Numbers keep their digits.
    assert_eq!(
        text(c, "SELECT jsonb_typeof(llm_extract('#r000001:bug#', ARRAY['amount numeric'])->'amount')"),
        "number"
    );
    tasks_in_options(&bed, c);
    sorted_before_a_limit(c);
}

/// Verbs that ask in their own words take the model, the instruction and the checks of a task that the options name.
fn tasks_in_options(bed: &Bed, c: &mut Client) {
    model(c, "other", "");
    run(
        c,
        "SELECT llm_batch.create_scorer('rank', 'As a clerk.', 0, 10, 'other');
         SELECT llm_batch.create_classifier('verdict', ARRAY['yes', 'no'], instruction => 'As a clerk.', model => 'other')",
    );
    let options = |task: &str| format!("'{{\"task\": \"{task}\", \"reuse\": false}}'");
    for (call, task, words, of_value) in [
        ("llm_score('#r000001:x#', 'Is it urgent?'", "rank", "Is it urgent?", "v BETWEEN 0 AND 10"),
        ("llm_filter('#r000001:x#', 'Is it sad?'", "verdict", "Is it sad?", "v IS NOT NULL"),
    ] {
        bed.provider.reset_stats();
        let call = format!("{call}, {})", options(task));
        assert_eq!(one(c, &format!("SELECT count(*) FROM (SELECT {call}) q (v) WHERE {of_value}")), 1, "{call}");
        let bodies = bed.provider.bodies();
        let body = bodies.last().unwrap();
        let told = body["messages"][0]["content"].as_str().unwrap();
        assert_eq!(body["model"], "fake-other", "{call}");
        assert!(told.contains("As a clerk.") && told.contains(words), "{call}: {told}");
    }
    for (call, task, code, hint) in [
        ("llm_score('x', 'y'", "nothing", "42704", ""),
        ("llm_score('x', 'y'", "verdict", "42809", ""),
        ("llm_filter('x', 'y'", "topic", "42809", "\"yes\" and \"no\""),
        ("llm_classify('x', ARRAY['a', 'b']", "topic", "22023", "names a task"),
        ("llm_extract('x', ARRAY['a']", "topic", "22023", "names a task"),
    ] {
        let e = error(c, &format!("SELECT {call}, {})", options(task)));
        assert_eq!(e.0, code, "{call} {task}: {e:?}");
        assert!(e.3.contains(hint), "{call} {task}: {e:?}");
    }
    for zone in ["Mars/Olympus", "+25:00"] {
        let fields = format!("{{\"due\": {{\"type\": \"timestamptz\", \"time_zone\": \"{zone}\"}}}}");
        let (code, message, ..) =
            error(c, &format!("SELECT llm_batch.create_extractor('dates', '{fields}', model => 'other')"));
        assert_eq!(code, "22023", "{zone}: {message}");
        assert!(message.contains("time") && message.contains("zone"), "{zone}: {message}");
    }
    run(
        c,
        "SELECT llm_batch.create_extractor('dates',
           '{\"due\": {\"type\": \"timestamptz\", \"time_zone\": \"Europe/Berlin\"}}', model => 'other')",
    );
}

/// A sort reads all rows before a limit takes some: EXPLAIN says so, where it is so.
fn sorted_before_a_limit(c: &mut Client) {
    tickets(c, "t", 1..=30);
    let score = "llm_score(body, 'How urgent is it?')";
    for (sql, says) in [
        (format!("SELECT id FROM t WHERE id <= 20 ORDER BY {score} DESC LIMIT 3"), true),
        (format!("SELECT id, {score} FROM t WHERE id <= 20 ORDER BY 2 FETCH FIRST 3 ROWS ONLY"), true),
        (format!("SELECT id, {score} FROM t ORDER BY id LIMIT 3"), false),
        (format!("SELECT id, {score} FROM t LIMIT 3"), false),
        (format!("SELECT id FROM t ORDER BY {score}"), false),
    ] {
        let lines = c.query(&format!("EXPLAIN {sql}"), &[]).unwrap();
        let has_line = lines.iter().any(|l| l.get::<_, String>(0).contains("Rows to Ask: all that WHERE lets through"));
        assert_eq!(has_line, says, "{sql}: {lines:?}");
    }
}
