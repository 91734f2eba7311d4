//! The functions that ask about one text: each in every place of SQL, with every odd argument.

mod common;

use common::{Bed, error, model, one, run, text, tickets};

/// Each function with its arguments behind the text, and the type that it returns.
const VERBS: [(&str, &str, &str); 12] = [
    ("llm_run", "'topic'", "text"),
    ("llm_classify", "'topic'", "text"),
    (
        "llm_classify",
        "ARRAY['bug', 'spam', 'billing'], '{\"instruction\": \"Tickets.\", \"descriptions\": {\"bug\": \"it breaks\"}}'",
        "text",
    ),
    ("llm_filter", "'Is it a bug?'", "boolean"),
    ("llm_extract", "ARRAY['amount numeric', 'due date', 'tags text[]', '\"at sea\" boolean']", "jsonb"),
    ("llm_extract", "ARRAY['start date', 'finish date'], '{\"descriptions\": {\"start\": \"first day\"}}'", "jsonb"),
    ("llm_generate", "'Explain it.', '{\"max_words\": 30, \"language\": \"German\"}'", "text"),
    ("llm_summarize", "'{\"model\": \"m\"}'", "text"),
    ("llm_translate", "'German'", "text"),
    ("llm_embed", "'vector'", "real[]"),
    ("llm_score", "'How urgent is it?'", "real"),
    (
        "llm_score",
        "question => 'How glad is it?', options => '{\"examples\": [{\"input\": \"x\", \"answer\": 0.5}]}'",
        "real",
    ),
];

const ROWS: i64 = 120;

#[test]
fn every_verb_in_every_place() {
    let bed = Bed::new("verbs");
    let c = &mut bed.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    run(c, "SELECT llm_batch.create_embedder('vector', 'm', 16)");
    tickets(c, "t", 1..=ROWS);
    run(c, "INSERT INTO t VALUES (1001, NULL, ''), (1002, '', ''), (1003, E' \\n\\t', '')");
    for (i, (verb, rest, of)) in VERBS.into_iter().enumerate() {
        let call = |input: &str| format!("{verb}({input}, {rest})");
        let what = call("body");
        // One row a request, one after the other, as the plain function does it.
        run(c, "SET llm_batch.enable_batch_scan = off; DROP TABLE IF EXISTS want");
        run(c, &format!("CREATE TABLE want AS SELECT id, {what} AS v FROM t WHERE id <= 12 OR id > 1000"));
        assert_eq!(text(c, "SELECT pg_typeof(v)::text FROM want LIMIT 1"), of, "{what}");
        assert_eq!(one(c, "SELECT count(v) FROM want"), 12, "{what}: rows without text have no answer");
        run(c, "RESET llm_batch.enable_batch_scan");
        let differ = |c: &mut postgres::Client, got: &str| {
            one(
                c,
                &format!(
                    "SELECT count(*) FROM want w JOIN ({got}) g (id, v) USING (id) WHERE w.v IS DISTINCT FROM g.v"
                ),
            )
        };
        // Read ahead: a few requests for all rows, the same values.
        bed.provider.reset_stats();
        run(c, &format!("CREATE TABLE got AS SELECT id, {what} AS v FROM t"));
        let requests = bed.provider.stats().admitted;
        assert!(requests <= 8, "{what}: {requests} requests");
        assert_eq!(differ(c, "SELECT id, v FROM got"), 0, "{what}");
        assert_eq!(one(c, "SELECT count(v) FROM got"), ROWS, "{what}");
        let odd = "SELECT id, body FROM t";
        assert_eq!(
            differ(c, &format!("SELECT id, {} FROM ({odd}) q (id, body) WHERE {what} IS NOT NULL", call("body"))),
            0
        );
        run(
            c,
            &format!(
                "CREATE VIEW v{i} AS SELECT id, {what} AS v FROM t; PREPARE p{i}(bigint) AS SELECT v FROM v{i} WHERE id = $1"
            ),
        );
        assert_eq!(differ(c, &format!("SELECT id, v FROM v{i}")), 0, "{what} in a view");
        for _ in 0..7 {
            run(c, &format!("EXECUTE p{i}(7)"));
        }
        run(
            c,
            &format!(
                "DROP TABLE IF EXISTS u; CREATE TABLE u AS SELECT id, body, NULL::{of} AS v FROM t; UPDATE u SET v = {what}"
            ),
        );
        assert_eq!(differ(c, "SELECT id, v FROM u"), 0, "{what} in an UPDATE");
        assert_eq!(
            one(c, &format!("SELECT count(*) FROM (SELECT {}) q (v) WHERE v IS NULL", call("''"))),
            1,
            "an empty literal"
        );
        assert_eq!(
            one(c, &format!("SELECT count(*) FROM (SELECT {}) q (v) WHERE v IS NULL", call("NULL"))),
            1,
            "a NULL"
        );
        assert_eq!(
            one(c, &format!("SELECT count(*) FROM (SELECT {}) q (v) WHERE v IS NOT NULL", call("'#r000001:bug#'"))),
            1,
            "a literal"
        );
        let lines = c.query(&format!("EXPLAIN SELECT {what} FROM t"), &[]).unwrap();
        assert!(lines.iter().any(|l| l.get::<_, String>(0).contains("LLM Batch")), "{what}: {lines:?}");
        run(c, "DROP TABLE got");
    }
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
        ("llm_generate('x', ' ')", "22023", "instruction"),
        ("llm_generate('x', 'y', '{\"max_words\": 0}')", "22023", "max_words"),
        ("llm_generate('x', 'y', '{\"labels\": []}')", "22023", "labels"),
        ("llm_generate('x', 'y', '{\"descriptions\": {\"a\": \"b\"}}')", "22023", "descriptions"),
        ("llm_summarize('x', '{\"model\": \"nowhere\"}')", "42704", "nowhere"),
        ("llm_translate('x', '')", "22023", "language"),
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
        ["llm_run('x', NULL)", "llm_extract('x', NULL::text[])", "llm_generate('x', NULL)", "llm_score('x', 'y', NULL)"]
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
fn tasks_in_options(bed: &Bed, c: &mut postgres::Client) {
    model(c, "other", "");
    run(
        c,
        "SELECT llm_batch.create_generator('gist', 'As a clerk.', 'other', options => '{\"repair\": \"upper(answer)\"}');
         SELECT llm_batch.create_scorer('rank', 'As a clerk.', 0, 10, 'other');
         SELECT llm_batch.create_classifier('verdict', ARRAY['yes', 'no'], instruction => 'As a clerk.', model => 'other')",
    );
    let options = |task: &str| format!("'{{\"task\": \"{task}\", \"reuse\": false}}'");
    for (call, task, words, of_value) in [
        ("llm_generate('#r000001:x#', 'Explain it.'", "gist", "Explain it.", "v = upper(v) AND v <> lower(v)"),
        // It has no words of its own: a task says how.
        ("llm_summarize('#r000001:x#'", "gist", "As a clerk.", "v = upper(v) AND v <> lower(v)"),
        ("llm_translate('#r000001:x#', 'Welsh'", "gist", "Welsh", "v = upper(v) AND v <> lower(v)"),
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
        ("llm_generate('x', 'y'", "nothing", "42704", ""),
        ("llm_generate('x', 'y'", "topic", "42809", ""),
        ("llm_score('x', 'y'", "gist", "42809", ""),
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
fn sorted_before_a_limit(c: &mut postgres::Client) {
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
