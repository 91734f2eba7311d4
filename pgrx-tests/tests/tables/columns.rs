//! Targets, inputs and filters.

use super::{all_done, fill, label, marked};
use crate::common::*;

#[test]
fn targets_of_all_kinds() {
    let bed = Bed::new("targets");
    let mut c = bed.connect();
    run(
        &mut c,
        "CREATE SCHEMA types;
         CREATE TYPE types.\"Kind\" AS ENUM ('yes', 'no', 'may be');
         CREATE DOMAIN types.answer AS text CHECK (VALUE IN ('yes', 'no', 'may be'));
         CREATE DOMAIN types.short AS varchar(6);
         CREATE DOMAIN types.tag AS jsonb CHECK (jsonb_typeof(VALUE) = 'string')",
    );
    let words = r#"["yes", "no", "may be"]"#;
    let numbers = r#"["1", "2", "3", "4", "5"]"#;
    let targets = [
        ("text", words),
        ("varchar", words),
        ("varchar(20)", words),
        ("char(10)", words),
        (r#"types."Kind""#, words),
        ("types.answer", words),
        ("types.short", words),
        ("name", words),
        ("boolean", r#"["true", "false"]"#),
        ("boolean", r#"["t", "f"]"#),
        ("boolean", r#"["yes", "no"]"#),
        ("integer", numbers),
        ("bigint", numbers),
        ("smallint", numbers),
        ("numeric(4, 1)", numbers),
        ("real", numbers),
        ("jsonb", numbers),
        ("date", r#"["2026-01-01", "2026-02-01"]"#),
        ("\"char\"", r#"["a", "b"]"#),
        ("jsonb", words),
        ("json", words),
        ("types.tag", words),
    ];
    for (n, (kind, labels)) in targets.into_iter().enumerate() {
        let name = format!("c{n}");
        classifier(&mut c, &name, labels, "m", "{}");
        let list: Vec<String> = serde_json::from_str(labels).unwrap();
        let label = format!("('{{{}}}'::text[])[1 + i % {}]", list.join(","), list.len());
        // In JSON a label is a string.
        let want =
            if ["json", "jsonb", "types.tag"].contains(&kind) { format!("to_jsonb({label})") } else { label.clone() };
        let script = format!(
            "DROP TABLE IF EXISTS t;
             CREATE TABLE t (id int PRIMARY KEY, body text, want {kind}, topic {kind});
             INSERT INTO t SELECT i, {}, ({want})::{kind} FROM generate_series(1, 90) i",
            marked("i", &label)
        );
        let (_, p) = fill(&bed, &mut c, &script, &format!("'t', 'body', 'topic', '{name}'"));
        all_done(&p, 90);
        assert_eq!(one(&mut c, "SELECT count(*) FROM t WHERE topic::text = want::text"), 90, "{kind} {labels}");
    }

    // Labels that are no value of the type are refused before a row is paid for.
    for (kind, task) in [
        ("varchar(3)", "c0"),
        ("types.\"Kind\"", "c8"),
        ("types.answer", "c11"),
        ("types.short", "c17"),
        ("boolean", "c11"),
        ("integer", "c0"),
        ("date", "c0"),
    ] {
        run(&mut c, &format!("ALTER TABLE t DROP topic, ADD topic {kind}"));
        bed.provider.reset_stats();
        let (state, message, _, _) =
            error(&mut c, &format!("SELECT llm_batch.backfill('t', 'body', 'topic', '{task}')"));
        assert!(message.contains("does not fit column \"topic\""), "{kind}: {state} {message}");
        assert!(state.starts_with("22") || state == "23514", "{kind}: {state}");
        assert_eq!(bed.provider.stats().requests, 0, "{kind}");
    }
}

#[test]
fn inputs_and_filters() {
    let bed = Bed::new("inputs");
    let mut c = bed.connect();
    let script = format!(
        "CREATE TABLE t (id int PRIMARY KEY, title text, body text, n int, want text, topic text);
         CREATE TABLE note (ticket int, at int, body text);
         INSERT INTO t SELECT i, nullif('Title ' || i, 'Title 5'), {0}, i, {1} FROM generate_series(1, 700) i;
         INSERT INTO note SELECT i, 1, 'first' FROM generate_series(1, 700) i;
         INSERT INTO note SELECT i, 2, {0} FROM generate_series(1, 700) i",
        marked("i", &label("i")),
        label("i")
    );
    run(&mut c, &script);
    run(
        &mut c,
        "CREATE SCHEMA app;
         CREATE FUNCTION app.summary(text, VARIADIC text[] DEFAULT '{}') RETURNS text LANGUAGE sql IMMUTABLE
           AS $$ SELECT 'Summary: ' || $1 $$;
         CREATE OPERATOR app.@@@ (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_catalog.textcat)",
    );
    let inputs = [
        ("coalesce(title,'')||' '||body", "n <= 100", 100),
        (
            "(SELECT string_agg(o.body, '; ' ORDER BY o.at) FROM note o WHERE o.ticket = t.id)",
            "n > 100 AND n <= 200",
            100,
        ),
        ("-- a comment\nbody -- and one at the end", "n BETWEEN 201 AND 300 -- here too", 100),
        ("summary(body)", "n > 300 AND n <= 400 OR n = 401", 101),
        ("body @@@ ' '", "n BETWEEN 402 AND 500 OR false", 99),
        (
            "CASE WHEN n % 2 = 0 THEN body ELSE format('%s %s', title, t.body) END",
            "EXISTS (SELECT FROM note WHERE ticket = id AND ticket BETWEEN 501 AND 600)",
            100,
        ),
        ("jsonb_build_object('n', n, 'text', body)", "lower(title) LIKE 'title 6%' AND topic IS NULL", 100),
    ];
    run(&mut c, "SET search_path = app, public");
    for (input, filter, rows) in inputs {
        let arguments = format!(
            "'t', input => {}, target => 'topic', task => 'topic', filter => {}",
            quoted(input),
            quoted(filter)
        );
        let (_, p) = fill(&bed, &mut c, "", &arguments);
        // The row 600 is in two of them.
        assert!((rows - 1..=rows).contains(&p.total), "{input}: {p:?}");
        all_done(&p, p.total);
        assert_eq!(wrong(&mut c, "t"), 0, "{input}");
        assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1), "{input}");
    }
    let (_, p) = fill(&bed, &mut c, "", "'t', 'n', 'topic', 'topic'");
    all_done(&p, 700 - 699);
    assert_eq!(left(&mut c, "t"), 0);
}

fn quoted(sql: &str) -> String {
    format!("'{}'", sql.replace('\'', "''"))
}
