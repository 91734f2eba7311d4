//! Inputs and conditions that cannot be evaluated, and functions that ask while a job reads.

use super::{call, nothing_happened, refused};
use crate::common::{Bed, backfill, backfill_with, error, one, run, text, tickets, wait_status};

#[test]
fn expressions_that_cannot_be_evaluated() {
    let bed = Bed::new("errors_expressions");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    run(
        client,
        "CREATE TABLE victim (a int);
         CREATE FUNCTION noisy(text) RETURNS text LANGUAGE sql VOLATILE AS 'SELECT $1';",
    );
    let input = |e: &str| call(&format!("input => $${e}$$"));
    let filter = |e: &str| call(&format!("filter => $${e}$$"));
    for e in ["body || random()", "noisy(body)", "body || clock_timestamp()", "(SELECT noisy(body))"] {
        refused(client, &input(e), "0A000", &["input", "volatile"]);
    }
    refused(client, &filter("random() < 0.5"), "0A000", &["filter", "volatile"]);
    // Volatile functions inside a view are seen as well.
    run(
        client,
        "CREATE VIEW asks AS SELECT id, llm_classify(body, 'topic') AS said FROM tickets;
         CREATE VIEW chance AS SELECT random() AS n;
         CREATE VIEW nested AS SELECT (SELECT max(n) FROM chance) AS n;
         CREATE VIEW plain AS SELECT t.id, t.body FROM tickets t;",
    );
    for (e, view) in [
        ("(SELECT a.said FROM asks a WHERE a.id = tickets.id)", "\"asks\""),
        ("body || (SELECT n FROM nested)", "\"chance\""),
        ("(WITH c AS (SELECT n FROM nested) SELECT max(c.n)::text FROM c)", "\"chance\""),
    ] {
        refused(client, &input(e), "0A000", &["input", "volatile", view]);
        refused(client, &input(e).replace("backfill(", "estimate("), "0A000", &["input", "volatile", view]);
    }
    refused(client, &filter("EXISTS (SELECT FROM nested WHERE n < 0.5)"), "0A000", &["filter", "\"chance\""]);
    refused(client, &call("options => '{\"isolation\": \"(SELECT n FROM nested)\"}'"), "0A000", &["\"chance\""]);
    for e in ["ctid", "tableoid", "xmin", "tickets.xmax", "(SELECT tickets.cmin::text)", "body || cmax"] {
        refused(client, &input(e), "0A000", &["input", "system column"]);
    }
    refused(client, &filter("ctid > '(0,1)'"), "0A000", &["filter", "system column"]);
    refused(client, &input("max(body)"), "0A000", &["aggregate"]);
    refused(client, &input("body || count(*) OVER ()"), "0A000", &["window"]);
    refused(client, &input("unnest(ARRAY[body, body])"), "0A000", &["set-returning"]);
    refused(client, &input("regexp_split_to_table(body, ' ')"), "0A000", &["set-returning"]);
    // Postgres itself refuses these.
    for e in ["max(id) > 1", "row_number() OVER () > 1", "generate_series(1, 2) > 1"] {
        let (code, ..) = error(client, &filter(e));
        assert!(["42803", "42P20", "0A000"].contains(&code.as_str()), "{e}: {code}");
    }
    for e in ["id", "1", "body", "'yes'::text", "ROW(1, 2)"] {
        let (code, message, ..) = error(client, &filter(e));
        assert_eq!(code, "42804", "{e}: {message}");
    }
    for e in ["nothing", "tickets.nothing", "other.body"] {
        let (code, message, ..) = error(client, &input(e));
        assert!(["42703", "42P01"].contains(&code.as_str()), "{e}: {code} {message}");
    }
    // None of these may be read as anything but one expression.
    for e in [
        "body, id",
        "body) , (1",
        "body) FROM tickets; DROP TABLE victim; SELECT (1",
        "body) FROM tickets; DROP TABLE victim; --",
        "body); DROP TABLE victim; SELECT (body",
        "body; DROP TABLE victim",
        "body) UNION SELECT (session_user",
        "body) FROM pg_authid ORDER BY (1",
        "body) WHERE (true",
        "body) LIMIT (1",
        "body) INTO x --",
        "",
        " ",
        "--",
        "/*",
        "*",
        "body AS x",
        "SELECT body FROM tickets; SELECT 1",
        "body) /* ",
        "(body",
        "body)",
        "'",
        "$1",
        "DEFAULT",
        "DISTINCT body",
        "body WHERE true",
        "body FROM tickets",
        "VALUES (1), (2)",
    ] {
        for sql in [input(e), filter(e)] {
            let (code, message, ..) = error(client, &sql);
            assert!(
                ["42601", "42P02", "42804", "0A000", "42703", "21000"].contains(&code.as_str()),
                "{sql}: {code} {message}"
            );
        }
    }
    refused(client, &input("body, id"), "42601", &["input must be one expression"]);
    refused(client, &filter("true, id > 1"), "42601", &["filter must be one expression"]);
    assert_eq!(one(client, "SELECT count(*) FROM pg_class WHERE relname = 'victim'"), 1);
    nothing_happened(&bed);
    // Odd but allowed names.
    run(client, "ALTER TABLE tickets ADD \"odd \"\"name\" text");
    for e in [
        "(SELECT p.body FROM plain p WHERE p.id = tickets.id)",
        "body -- comment",
        "(SELECT t.body)",
        "\"odd \"\"name\" || body",
        "CASE WHEN id > 1 THEN body END",
    ] {
        let e = e.replace("t.body", "tickets.body");
        run(client, &format!("BEGIN; {}; ROLLBACK", input(&e)));
    }
    nothing_happened(&bed);
}

/// A function's body can't be seen before it runs.
#[test]
fn functions_that_ask_while_a_job_reads() {
    let bed = Bed::new("errors_asking");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    run(client, "CREATE TABLE other AS SELECT 'x' AS body");
    let sneaky = |e: &str, kind: &str| {
        format!(
            "CREATE OR REPLACE FUNCTION sneaky(text) RETURNS text LANGUAGE plpgsql {kind} AS $$ BEGIN RETURN {e}; END $$"
        )
    };
    let says = "while a job reads or writes rows";
    for e in [
        "llm_classify($1, 'topic')",
        "llm_classify('', 'topic')",
        "llm_classify($1, ARRAY['a', 'b'])",
        "llm_filter($1, 'Is it?')",
        "(SELECT label FROM llm_classify_batch('SELECT 1, ''x''', 'topic'))",
        "(SELECT label FROM llm_classify_batch('SELECT 1, ''x''', ARRAY['a', 'b']))",
        "(SELECT label FROM llm_classify_array(ARRAY[1], ARRAY[$1], 'topic'))",
        "(SELECT string_agg(llm_classify(o.body, 'topic'), '') FROM other o)",
        "(SELECT rows FROM llm_batch.estimate('tickets', 'body', 'topic', 'topic'))",
        "llm_batch.backfill('tickets', 'body', 'topic', 'topic')",
    ] {
        run(client, &sneaky(e, "STABLE"));
        let estimate = call("input => 'sneaky(body)'").replace("backfill(", "estimate(");
        refused(client, &estimate, "0A000", &[says]);
        // Postgres computes at once what is the same for all rows.
        run(client, &sneaky(e, "IMMUTABLE"));
        refused(client, &call("input => 'body || sneaky(''x'')'"), "0A000", &[says]);
    }
    nothing_happened(&bed);
    run(client, &sneaky("llm_classify($1, 'topic')", "STABLE PARALLEL SAFE"));
    for more in ["filter => 'sneaky(body) IS NULL'", "options => '{\"isolation\": \"sneaky(body)\"}'"] {
        let job = backfill_with(client, "tickets", more);
        let p = wait_status(client, job, "failed");
        assert!(p.last_error.clone().unwrap_or_default().contains(says), "{p:?}");
    }
    // A trigger's neither: each row would be locked for as long as a model takes.
    run(
        client,
        "CREATE FUNCTION asks() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN NEW.body := sneaky(NEW.body); RETURN NEW; END $$;
         CREATE TRIGGER asks BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION asks()",
    );
    let job = backfill(client, "tickets");
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("label"), "{p:?}");
    assert!(p.last_error.unwrap_or_default().contains("0A000"));
    // The job alone has asked, and sessions may still.
    assert!(bed.provider.stats().rows.values().all(|r| r.asked == 1));
    assert_eq!(text(client, "SELECT sneaky('#r000500:spam#')"), "spam");
}

#[test]
fn queries_of_llm_classify_batch() {
    let bed = Bed::new("errors_batch");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=10);
    run(client, "CREATE TABLE victim (a int)");
    let batch = |query: &str| format!("SELECT * FROM llm_classify_batch($q${query}$q$, 'topic')");
    for query in ["SELECT id FROM tickets", "SELECT id, body, want, 1 FROM tickets", "SELECT FROM tickets"] {
        refused(client, &batch(query), "42804", &["two columns", "SELECT id, body"]);
    }
    // Also where there are no rows.
    refused(client, &batch("SELECT id FROM tickets WHERE false"), "42804", &["two columns"]);
    for query in [
        "SELECT id, body FROM tickets; SELECT 1, 2",
        "SELECT id, body FROM tickets; DROP TABLE victim",
        "INSERT INTO victim VALUES (1)",
        "DELETE FROM victim",
        "DROP TABLE victim",
        "BEGIN",
        "COMMIT",
        "",
        ";",
        "-- nothing",
    ] {
        let (code, message, ..) = error(client, &batch(query));
        assert!(["42P11", "42601", "0A000", "42804"].contains(&code.as_str()), "{query}: {code} {message}");
    }
    for (query, code) in
        [("SELECT id, nothing FROM tickets", "42703"), ("SELEC", "42601"), ("SELECT 1/0, body FROM tickets", "22012")]
    {
        assert_eq!(error(client, &batch(query)).0, code, "{query}");
    }
    assert_eq!(one(client, "SELECT count(*) FROM victim"), 0);
    nothing_happened(&bed);
    // The session is well after all that.
    let n = one(
        client,
        "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic') WHERE status = 'ok'",
    );
    assert_eq!(n, 10);
}
