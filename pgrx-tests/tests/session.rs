//! Functions of sessions beside `llm_classify()` and `llm_classify_batch()`: arrays with typed ids, questions, and
//! labels in each of their forms.

mod common;

use common::{Bed, error, one, run, text, tickets, wrong};
use llm_fake_provider::{Config, Fault};

/// Nothing was asked, and the message says what is wrong.
#[track_caller]
fn refused(bed: &Bed, sql: &str, code: &str, words: &[&str]) {
    bed.provider.reset_stats();
    let e = error(&mut bed.connect(), sql);
    assert_eq!(e.0, code, "{sql}: {e:?}");
    let all = format!("{} {} {}", e.1, e.2, e.3);
    for word in words {
        assert!(all.contains(word), "{sql}: \"{word}\" is not in {all}");
    }
    assert_eq!(bed.provider.stats().requests, 0, "{sql}");
}

#[test]
fn arrays_with_ids_of_any_type() {
    let bed = Bed::new("session_arrays");
    let c = &mut bed.connect();
    tickets(c, "tickets", 1..=1_000);
    // The type of the ids is that of the column, so no cast, and rows come in the order of the arrays.
    bed.provider.reset_stats();
    let update = "
        WITH a AS (SELECT array_agg(id ORDER BY id DESC) ids, array_agg(body ORDER BY id DESC) bodies FROM tickets),
             r AS MATERIALIZED (SELECT r.* FROM a, llm_classify_array(a.ids, a.bodies, 'topic') r)
        UPDATE tickets t SET topic = r.label FROM r WHERE t.id = r.id AND r.status = 'ok'";
    assert_eq!(c.execute(update, &[]).unwrap(), 1_000);
    assert_eq!(wrong(c, "tickets"), 0);
    let stats = bed.provider.stats();
    assert!(stats.rows.len() == 1_000 && stats.rows.values().all(|r| r.asked == 1));
    assert!(stats.requests <= 21, "{} requests", stats.requests);
    // Values of types without and with a length, short and long, compressed or not, and in every place of a query.
    for (kind, made) in [
        ("uuid", "md5(id::text)::uuid"),
        ("numeric", "id * 1.25"),
        ("text", "repeat(id::text, 1 + (id % 900)::int)"),
        ("char(5)", "id::text"),
        ("tickets", "tickets"),
    ] {
        run(
            c,
            &format!(
                "DROP TABLE IF EXISTS stored;
                 CREATE TABLE stored AS SELECT array_agg(({made})::{kind} ORDER BY id) ids, array_agg(body ORDER BY id) texts,
                                               array_agg(want ORDER BY id) wants
                                          FROM tickets WHERE id <= 300"
            ),
        );
        for from in [
            "FROM stored, llm_classify_array(ids, texts, 'topic') r",
            "FROM (SELECT ids, texts, wants, llm_classify_array(ids, texts, 'topic') r FROM stored) s",
            "FROM (SELECT array_agg(i) ids, array_agg(t) texts, array_agg(w) wants
                     FROM stored, unnest(ids, texts, wants) u(i, t, w)) s, llm_classify_array(ids, texts, 'topic') r",
        ] {
            let all = format!(
                "SELECT array_agg((r).id)::text = ids::text AND array_agg((r).label) = wants
                        AND pg_typeof(array_agg((r).id)) = pg_typeof(ids) {from} GROUP BY ids, wants"
            );
            assert_eq!(text(c, &all), "t", "{kind}: {all}");
        }
    }
    // Rows with nothing to ask about, and ids that are NULL or the same.
    let rows = "SELECT string_agg(concat_ws(' ', coalesce(id::text, '-'), coalesce(label, '-'), status, detail), '; ')
                  FROM llm_classify_array(ARRAY[7, NULL, 7, 8, 9], ARRAY['#r1:bug#', '#r2:spam#', NULL, '', E' \\n\\u3000'],
                                          'topic')";
    let empty = "skipped empty: the input is NULL, empty or white space";
    assert_eq!(text(c, rows), format!("7 bug ok; - spam ok; 7 - {empty}; 8 - {empty}; 9 - {empty}"));
    let last = "SELECT string_agg(coalesce(id, '-') || ' ' || status, '; ')
                  FROM llm_classify_array(ARRAY['a', NULL, NULL], ARRAY['#r3:bug#', '#r4:bug#', ''], 'topic')";
    assert_eq!(text(c, last), "a ok; - ok; - skipped");
    bed.provider.reset_stats();
    for nothing in ["'{}'::int[], '{}'", "NULL::int[], '{}'", "ARRAY[1], NULL"] {
        assert_eq!(one(c, &format!("SELECT count(*) FROM llm_classify_array({nothing}, 'topic')")), 0);
    }
    assert_eq!(bed.provider.stats().requests, 0);
    // Mistakes are reported before anything is asked.
    let call = |args: &str| format!("SELECT * FROM llm_classify_array({args})");
    refused(
        &bed,
        &call("ARRAY[1, 2, 3], ARRAY['a', 'b'], 'topic'"),
        "2202E",
        &["\"ids\" has 3, \"inputs\" has 2", "array_agg"],
    );
    refused(&bed, &call("ARRAY[]::int[], ARRAY['a'], 'topic'"), "2202E", &["\"ids\" has 0"]);
    refused(&bed, &call("ARRAY[1], ARRAY['a'], 'nothing'"), "42704", &["task \"nothing\""]);
    refused(&bed, &call("ARRAY[1], ARRAY['a'], 'topic', '{\"rows\": 5}'"), "22023", &["rows", "max_rows_per_request"]);
    refused(&bed, &call("ARRAY[1], ARRAY['a'], 'topic', '{\"isolation\": \"x\"}'"), "22023", &["third column"]);
    // A budget holds here too.
    bed.provider.reset_stats();
    let e = error(
        c,
        "SELECT count(*) FROM (SELECT array_agg(id) ids, array_agg(body) texts FROM tickets) a,
                llm_classify_array(ids, texts, 'topic', '{\"max_tokens\": 2000, \"max_rows_per_request\": 10}')",
    );
    assert_eq!(e.0, "53400", "{e:?}");
    assert!(bed.provider.stats().prompt_tokens + bed.provider.stats().completion_tokens <= 2_000);
}

#[test]
fn questions() {
    let bed = Bed::new("session_questions");
    let c = &mut bed.connect();
    run(
        c,
        "CREATE TABLE notes (id int PRIMARY KEY, body text);
         INSERT INTO notes SELECT i, format('#r%s:%s#', i, CASE WHEN i % 3 = 0 THEN 'yes' ELSE 'no' END)
                             FROM generate_series(100001, 100012) i",
    );
    let question = "Does the writer want the money back?";
    let filter = |rest: &str| format!("SELECT string_agg(id::text, ' ' ORDER BY id) FROM notes WHERE {rest}");
    let named = format!("llm_filter(body, '{question}', '{{\"model\": \"m\"}}')");
    assert_eq!(text(c, &filter(&named)), "100002 100005 100008 100011");
    let body = bed.provider.bodies().last().unwrap().to_string();
    assert!(body.contains(question), "{body}");
    refused(&bed, &filter("llm_filter(body, 'Is it?')"), "22023", &["no model is specified", "default_model"]);
    run(c, "SET llm_batch.default_model = 'm'");
    assert_eq!(text(c, &filter("NOT llm_filter(body, 'Is it?') AND id < 100005")), "100001 100003 100004");
    bed.provider.reset_stats();
    for null in ["NULL, 'Is it?'", "'', 'Is it?'", "E' \\t\\n\\u2003', 'Is it?'", "'x', NULL"] {
        assert_eq!(text(c, &format!("SELECT llm_filter({null}) IS NULL")), "t", "{null}");
    }
    run(c, "CREATE TABLE blank AS SELECT repeat(' ', n) body FROM generate_series(0, 9) n");
    assert_eq!(one(c, "SELECT count(*) FROM blank WHERE llm_filter(body, 'Is it?') IS NULL"), 10);
    assert_eq!(bed.provider.stats().requests, 0, "white space was sent");
    let call = |args: &str| format!("SELECT llm_filter('#r900001:yes#', {args})");
    refused(&bed, &call("' '"), "22023", &["question must not be empty"]);
    refused(&bed, &call("'Is it?', '{\"model\": 5}'"), "22023", &["\"model\": 5"]);
    refused(&bed, &call("'Is it?', '{\"model\": \"nothing\"}'"), "42704", &["model \"nothing\""]);
    refused(&bed, &call("'Is it?', '{\"mode\": \"m\"}'"), "22023", &["\"mode\"", "max_attempts"]);
    // No answer is neither yes nor no.
    let gone = Bed::with("session_questions_2", Config { faults: vec![(Fault::Refusal, 1.0)], ..Config::default() });
    let c = &mut gone.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    assert_eq!(text(c, "SELECT llm_filter('#r900001:yes#', 'Is it?') IS NULL"), "t");
}

/// Calls with labels resolve with and without types, by position and by name; the order that is given is kept.
#[test]
fn labels_in_every_form() {
    let bed = Bed::new("session_labels");
    let c = &mut bed.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    let order = |name: &str| {
        format!(
            "SELECT string_agg(l->>'label' || coalesce(nullif('=' || (l->>'description'), '='), ''), ' ' ORDER BY n)
               FROM llm_batch.task, jsonb_array_elements(spec->'labels') WITH ORDINALITY x (l, n) WHERE name = '{name}'"
        )
    };
    let object = r#"'{"zebra": "striped", "b": "", "aa": null}'"#;
    let array = r#"'["zebra", "b", "aa"]'"#;
    let forms = [
        (object.to_owned(), "zebra=striped b aa"),
        (format!("{object}::text"), "zebra=striped b aa"),
        (format!("{object}::varchar"), "zebra=striped b aa"),
        (format!("{object}::json"), "zebra=striped b aa"),
        // Its own order: it has no other.
        (format!("{object}::jsonb"), "b aa zebra=striped"),
        (array.to_owned(), "zebra b aa"),
        (format!("{array}::json"), "zebra b aa"),
        (format!("{array}::jsonb"), "zebra b aa"),
        ("ARRAY['zebra', 'b', 'aa']".to_owned(), "zebra b aa"),
        ("'{zebra,b,aa}'::varchar[]".to_owned(), "zebra b aa"),
        ("json_build_object('zebra', 'striped', 'b', '', 'aa', '')".to_owned(), "zebra=striped b aa"),
        ("(SELECT array_agg(x) FROM unnest(ARRAY['zebra', 'b', 'aa']) x)".to_owned(), "zebra b aa"),
    ];
    for (labels, expected) in &forms {
        for rest in [
            "",
            ", 'm'",
            ", 'm', 'Choose.'",
            ", NULL, 'Choose.', NULL, '{}'",
            ", 'm', NULL, '[{\"input\":\"x\",\"label\":\"b\"}]', '{\"reuse\": false}'",
            ", model => 'm', options => '{}'",
            ", examples => '[]', instruction => 'Choose.'",
        ] {
            for call in [format!("'x', {labels}{rest}"), format!("name => 'x', labels => {labels}{}", named(rest))] {
                run(c, &format!("BEGIN; SELECT llm_batch.create_classifier({call})"));
                assert_eq!(text(c, &order("x")), *expected, "create {call}");
                let call = call.replacen("'x'", "'topic'", 1);
                run(c, &format!("SELECT llm_batch.alter_classifier({call})"));
                assert_eq!(text(c, &order("topic")), *expected, "alter {call}");
                run(c, "ROLLBACK");
            }
        }
    }
    // Parameters whose type the server chooses.
    let labels = r#"{"zebra": "striped", "b": "", "aa": ""}"#;
    c.execute("SELECT llm_batch.create_classifier($1, $2)", &[&"x", &labels]).unwrap();
    assert_eq!(text(c, &order("x")), "zebra=striped b aa");
    // The model is shown them in this order.
    assert_eq!(text(c, "SELECT llm_classify('#r900001:b#', 'x')"), "b");
    let shown = bed.provider.bodies().last().unwrap().to_string();
    assert!(shown.find("zebra").unwrap() < shown.rfind("aa").unwrap(), "{shown}");

    let before = text(c, &order("x"));
    for rest in [
        "",
        ", NULL",
        ", NULL, 'm'",
        ", NULL, NULL, 'Choose.', '[]', '{}'",
        ", model => 'm'",
        ", instruction => 'Choose.'",
        ", examples => '[]', options => '{}'",
        ", labels => NULL, model => 'm'",
    ] {
        run(c, &format!("SELECT llm_batch.alter_classifier('x'{rest})"));
        assert_eq!(text(c, &order("x")), before, "{rest}");
    }
    for (labels, code, words) in [
        ("'{a,b}'", "22P02", ["not JSON", "ARRAY['billing'"]),
        ("'[\"a\", \"b\"'", "22P02", ["not JSON", "ARRAY['billing'"]),
        ("ARRAY['a', NULL]", "22023", ["object or array", "billing"]),
        ("ARRAY[['a', 'b'], ['c', 'd']]", "22023", ["object or array", "billing"]),
        ("'{}'::text[]", "22023", ["2 to 250", "not 0"]),
        ("NULL", "22004", ["labels", "NULL"]),
        ("NULL::text[]", "22004", ["labels", "NULL"]),
    ] {
        refused(&bed, &format!("SELECT llm_batch.create_classifier('y', {labels}, 'm')"), code, &words);
    }
}

/// The arguments after the labels, by name.
fn named(rest: &str) -> String {
    if rest.contains("=>") {
        return rest.to_owned();
    }
    let names = ["model", "instruction", "examples", "options"];
    let values = rest.split(", ").skip(1);
    names.iter().zip(values).map(|(name, value)| format!(", {name} => {value}")).collect()
}
