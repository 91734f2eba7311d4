//! Errors: an impossible job is refused at once, with SQLSTATE, message, detail or hint, before a row is paid for. A
//! job that breaks in the middle is left in a state that says why. No key is ever shown.

mod common;

use std::net::TcpListener;

use common::{
    Bed, PATIENCE, all_right_once, backfill, backfill_with, error, failures, held_job, model, one, progress, run, text,
    tickets, wait_status, warm,
};
use llm_fake_provider::{Config, FakeProvider, Fault};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// The key that [`Bed`] gives everybody.
const KEY: &str = "sk-test-0123456789abcdef";

/// A statement fails as [`common::refused`] says. There must be more than a message, something that helps, and no key.
#[track_caller]
fn refused(client: &mut Client, sql: &str, code: &str, says: &[&str]) {
    let [message, detail, hint] = common::refused(client, sql, code, says);
    assert!(!detail.is_empty() || !hint.is_empty() || says.is_empty(), "{sql}\nonly a message: {message}");
    assert!(![&message, &detail, &hint].iter().any(|part| part.contains(KEY)), "{sql}\n{message}\n{detail}\n{hint}");
}

/// The call of `backfill()` for column `topic` of `tickets` with another argument in place of one.
fn call(change: &str) -> String {
    let (name, _) = change.split_once(" => ").unwrap();
    let mut args = vec![change.to_owned()];
    for (n, value) in [("relation", "'tickets'"), ("input", "'body'"), ("target", "'topic'"), ("task", "'topic'")] {
        if n != name {
            args.push(format!("{n} => {value}"));
        }
    }
    format!("SELECT llm_batch.backfill({})", args.join(", "))
}

/// Nothing was paid for, and no job was made.
#[track_caller]
fn nothing_happened(bed: &Bed) {
    let stats = bed.provider.stats();
    assert!(stats.rows.is_empty() && stats.unmarked_rows == 0, "rows were asked: {stats:?}");
    assert_eq!(one(&mut bed.connect(), "SELECT count(*) FROM llm_batch.job"), 0);
}

#[test]
fn a_provider_that_refuses() {
    let bed = Bed::with("errors_provider", Config { api_key: Some("sk-another".to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    let verbs = [
        call("relation => 'tickets'"),
        "SELECT llm_classify('#r000001:bug#', 'topic')".to_owned(),
        // One request: a second one could be under way when the provider is configured anew.
        "SELECT llm_classify_batch('SELECT id, body FROM tickets LIMIT 10', 'topic')".to_owned(),
    ];
    for sql in &verbs {
        refused(client, sql, "28000", &["model \"m\"", "rejected the API key", "401", "ALTER USER MAPPING"]);
    }
    run(client, "DROP USER MAPPING FOR PUBLIC SERVER fake");
    for sql in &verbs {
        refused(client, sql, "28000", &["asks for an API key", "there is none", "401", "CREATE USER MAPPING"]);
    }
    bed.provider.configure(|c| {
        c.api_key = None;
        c.models = Some(vec!["gpt-4o".to_owned()]);
    });
    for sql in &verbs {
        refused(client, sql, "42704", &["does not know model \"m\"", "404", "fake-m", "base_url"]);
    }
    bed.provider.configure(|c| c.models = None);

    // The most frequent omissions.
    let base_url = bed.provider.base_url();
    let bare = base_url.trim_end_matches("/v1");
    run(client, &format!("ALTER SERVER fake OPTIONS (SET base_url '{bare}')"));
    for sql in &verbs {
        refused(client, sql, "42704", &["404", "base_url does not end in /v1", "usually ends in /v1"]);
    }
    run(client, &format!("ALTER SERVER fake OPTIONS (SET base_url '{}')", base_url.replace("http:", "https:")));
    refused(client, &verbs[0], "08006", &["does not answer", "does not speak TLS", "http for this machine"]);
    run(client, &format!("ALTER SERVER fake OPTIONS (SET base_url '{base_url}')"));

    let elsewhere = FakeProvider::start(Config::default()).unwrap();
    let location = format!("{}/chat/completions", elsewhere.base_url());
    bed.provider.configure(|c| c.faults = vec![(Fault::Redirect(location), 1.0)]);
    for sql in &verbs {
        refused(client, sql, "HV024", &["rejected the request", "302", "redirect", "base_url"]);
    }
    assert_eq!(elsewhere.stats().requests, 0, "a redirect was followed");

    bed.provider.configure(|c| c.faults = vec![(Fault::SpendLimit429, 1.0)]);
    for sql in &verbs {
        refused(client, sql, "53000", &["out of credit", "quota"]);
    }

    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    run(client, &format!("ALTER SERVER fake OPTIONS (SET base_url 'http://127.0.0.1:{port}/v1')"));
    for sql in &verbs {
        refused(client, sql, "08006", &["does not answer", "could not connect", "base_url"]);
    }
    nothing_happened(&bed);
}

#[test]
fn tables_that_cannot_be_filled() {
    // Whatever is in the server's environment, an error's detail is ours.
    let builder = Cluster::builder("errors_tables").env("RUST_BACKTRACE", "1").env("RUST_LIB_BACKTRACE", "full");
    let bed = Bed::build(builder, Config::default());
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    run(
        client,
        "CREATE TABLE no_key (id bigint, body text, topic text);
         CREATE TABLE partial_key (id bigint NOT NULL, body text, topic text);
         CREATE UNIQUE INDEX ON partial_key (id) WHERE id > 0;
         CREATE TABLE nullable_key (id bigint UNIQUE, body text, topic text);
         CREATE TABLE deferred_key (id bigint NOT NULL UNIQUE DEFERRABLE, body text, topic text);
         CREATE TABLE expression_key (id bigint NOT NULL, body text, topic text);
         CREATE UNIQUE INDEX ON expression_key ((id + 1));
         CREATE TABLE target_in_key (body text NOT NULL, topic text NOT NULL);
         ALTER TABLE target_in_key ADD UNIQUE (topic);
         ALTER TABLE target_in_key ALTER topic DROP NOT NULL;
         CREATE TABLE only_target (body text NOT NULL, topic text UNIQUE);
         CREATE TABLE not_null (id bigint PRIMARY KEY, body text, topic text NOT NULL DEFAULT '');
         CREATE DOMAIN filled AS text NOT NULL;
         CREATE TABLE not_null_domain (id bigint PRIMARY KEY, body text, topic text);
         ALTER TABLE not_null_domain ALTER topic TYPE filled;
         CREATE TABLE generated (id bigint PRIMARY KEY, body text, topic text GENERATED ALWAYS AS (lower(body)) STORED);
         CREATE VIEW a_view AS SELECT * FROM tickets;
         CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM tickets;
         CREATE TEMP TABLE a_temp (id bigint PRIMARY KEY, body text, topic text);
         CREATE SEQUENCE a_sequence;
         CREATE FOREIGN DATA WRAPPER nothing;
         CREATE SERVER nothing FOREIGN DATA WRAPPER nothing;
         CREATE FOREIGN TABLE a_foreign (id bigint, body text, topic text) SERVER nothing;
         CREATE TABLE parted (id bigint, body text, topic text) PARTITION BY RANGE (id);
         CREATE FOREIGN TABLE parted_foreign PARTITION OF parted FOR VALUES FROM (0) TO (9) SERVER nothing;
         CREATE TABLE rule_instead (id bigint PRIMARY KEY, body text, topic text);
         CREATE RULE nothing AS ON UPDATE TO rule_instead DO INSTEAD NOTHING;
         CREATE TABLE rule_also (id bigint PRIMARY KEY, body text, topic text);
         CREATE RULE also AS ON UPDATE TO rule_also DO ALSO NOTIFY changed;
         CREATE TYPE mood AS ENUM ('billing', 'bug');
         CREATE DOMAIN short AS text CHECK (length(value) < 5);
         ALTER TABLE tickets ADD n int, ADD m mood, ADD v varchar(4), ADD s short, ADD b bool;",
    );
    let relation = |name: &str| call(&format!("relation => '{name}'"));
    for name in ["no_key", "partial_key", "nullable_key", "deferred_key", "expression_key", "only_target"] {
        refused(client, &relation(name), "55000", &[name, "key", "primary key"]);
    }
    refused(client, &relation("target_in_key"), "55000", &["key"]);
    for name in ["not_null", "not_null_domain"] {
        refused(client, &relation(name), "42809", &["topic", "NOT NULL"]);
    }
    refused(client, &relation("generated"), "42809", &["topic", "generated"]);
    for (name, rule) in [("rule_instead", "nothing"), ("rule_also", "also")] {
        refused(client, &relation(name), "42809", &[name, rule, "ON UPDATE", "DROP RULE"]);
    }
    for (name, what) in [
        ("a_view", "a view"),
        ("a_matview", "a materialized view"),
        ("a_temp", "a temporary table"),
        ("a_foreign", "a foreign table"),
        ("a_sequence", "not a table"),
        ("pg_catalog.pg_class", "a system table"),
        ("llm_batch.model", "a system table"),
        ("information_schema.sql_features", "a system table"),
    ] {
        refused(client, &relation(name), "42809", &[what, "ordinary"]);
    }
    refused(client, &relation("parted"), "42809", &["parted_foreign", "foreign table"]);
    refused(client, &call("relation => 4294967295::oid::regclass"), "42P01", &[]);
    refused(client, &call("relation => 'nowhere'"), "42P01", &[]);
    for input in ["body", " BODY", "\"body\""] {
        let same = format!("SELECT llm_batch.backfill('tickets', '{input}', 'body', 'topic')");
        refused(client, &same, "22023", &["both the input and the target", "NULL", "Add a column"]);
    }
    refused(client, &call("target => 'nothing'"), "42703", &["nothing", "tickets", "ADD COLUMN"]);
    refused(client, &call("target => 'id'"), "42809", &["id"]);
    for name in ["ctid", "xmin", "tableoid"] {
        refused(client, &call(&format!("target => '{name}'")), "42703", &[name]);
    }
    refused(client, &call("target => 'n'"), "22P02", &["billing", "does not fit", "\"n\""]);
    refused(client, &call("target => 'm'"), "22P02", &["shipping", "does not fit", "mood"]);
    refused(client, &call("target => 'v'"), "22001", &["billing", "does not fit"]);
    refused(client, &call("target => 's'"), "23514", &["billing", "does not fit", "short"]);
    refused(client, &call("target => 'b'"), "22P02", &["billing", "does not fit"]);
    for name in ["relation", "input", "target", "task"] {
        refused(client, &call(&format!("{name} => NULL")), "22004", &[]);
    }
    for sql in [call("input => 'nothing'"), call("input => 'body,'"), call("target => 'n'"), call("task => 'nothing'")]
    {
        let (.., detail, _) = error(client, &sql);
        assert!(!detail.contains('\n'), "{sql}\n{detail}");
    }
    let environment = std::fs::read(format!("/proc/{}/environ", bed.cluster.pid())).unwrap();
    assert!(String::from_utf8_lossy(&environment).contains("RUST_BACKTRACE=1"));
    nothing_happened(&bed);
}

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
fn a_second_job_on_a_column() {
    let bed = Bed::new("errors_second");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    run(
        client,
        "ALTER TABLE tickets ADD other text;
         CREATE TABLE parted (id bigint PRIMARY KEY, body text, topic text) PARTITION BY RANGE (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
         CREATE TABLE parted_1_1 PARTITION OF parted_1 FOR VALUES FROM (0) TO (50);
         CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (100) TO (200);
         INSERT INTO parted SELECT id, body FROM tickets;
         INSERT INTO parted SELECT id + 100, replace(body, '#r0', '#r9') FROM tickets;",
    );
    warm(client, "tickets");
    bed.provider.hold();
    let first = backfill(client, "tickets");
    let other = one(client, &call("target => 'other'"));
    refused(
        client,
        &call("relation => 'tickets'"),
        "55006",
        &[&first.to_string(), "topic", "llm_batch.wait", "cancel"],
    );
    let part = backfill(client, "parted_1_1");
    for name in ["parted", "parted_1", "parted_1_1", "parted_2"] {
        refused(client, &call(&format!("relation => '{name}'")), "55006", &[&part.to_string(), "topic"]);
    }
    // A paused job still has its column; a cancelled one has not.
    run(client, &format!("SELECT llm_batch.pause({first})"));
    refused(client, &call("relation => 'tickets'"), "55006", &[&first.to_string()]);
    run(client, &format!("SELECT llm_batch.cancel({first})"));
    let again = backfill(client, "tickets");
    bed.provider.release();
    for job in [other, part, again] {
        bed.done(job);
    }
    let whole = backfill(client, "parted");
    bed.done(whole);
    assert_eq!(one(client, "SELECT count(*) FROM parted WHERE topic IS NULL"), 0);
    // Two at the same time: the one that commits first has it.
    run(client, "UPDATE tickets SET topic = NULL");
    let mut rival = bed.connect();
    run(client, "BEGIN");
    let winner = backfill(client, "tickets");
    std::thread::scope(|scope| {
        let loser = scope.spawn(|| error(&mut rival, &call("relation => 'tickets'")));
        let mut watch = bed.connect();
        wait_until(
            "the second one waits for the lock of the first",
            PATIENCE,
            || one(&mut watch, "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'object'"),
            |n| *n == 1,
        );
        // The job must not be done before the other has looked.
        bed.provider.hold();
        run(client, "COMMIT");
        assert_eq!(loser.join().unwrap().0, "55006");
        bed.provider.release();
    });
    bed.done(winner);
    // Done, then to be retried while another has the column.
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.progress WHERE status = 'running'"), 0);
}

#[test]
fn without_preloading() {
    let cluster = Cluster::builder("errors_preload").preload(false).start();
    let client = &mut cluster.connect("postgres");
    run(client, "CREATE EXTENSION pg_llm_batch");
    run(
        client,
        "CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1');
         CREATE TABLE tickets (id bigint PRIMARY KEY, body text, topic text)",
    );
    for sql in [
        call("relation => 'tickets'"),
        "SELECT llm_classify('x', ARRAY['a', 'b'])".to_owned(),
        "SET llm_batch.default_model = 'm'; SELECT llm_classify('x', ARRAY['a', 'b'])".to_owned(),
        "SET llm_batch.default_model = 'm'; SELECT * FROM llm_classify_batch('SELECT 1, 2', ARRAY['a', 'b'])"
            .to_owned(),
        "SELECT llm_batch.create_model('m', server => 'fake', model => 'x')".to_owned(),
        "SELECT * FROM llm_batch.activity".to_owned(),
        "SELECT llm_batch.pause(1)".to_owned(),
        "SELECT llm_batch.resume(1)".to_owned(),
        "SELECT llm_batch.cancel(1)".to_owned(),
        "SELECT llm_batch.retry_failed(1)".to_owned(),
    ] {
        refused(client, &sql, "55000", &["not loaded", "shared_preload_libraries", "pg_llm_batch", "restart"]);
    }
    // The views need no process.
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.progress"), 0);
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.failure"), 0);
}

#[test]
fn names_and_options() {
    let bed = Bed::new("errors_names");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    refused(client, &call("task => 'nothing'"), "42704", &["task \"nothing\"", "create_classifier"]);
    refused(client, "SELECT llm_classify('x', 'nothing')", "42704", &["task \"nothing\""]);
    refused(client, "SELECT llm_classify_batch('SELECT 1, 2', 'nothing')", "42704", &["task \"nothing\""]);
    refused(client, "SELECT llm_classify('x', ARRAY['a', 'b'])", "22023", &["no model", "llm_batch.default_model"]);
    refused(
        client,
        "SELECT llm_classify_batch('SELECT 1, 2', ARRAY['a', 'b'])",
        "22023",
        &["no model", "llm_batch.default_model"],
    );
    refused(
        client,
        "SET llm_batch.default_model = 'nothing'; SELECT llm_classify('x', ARRAY['a', 'b'])",
        "42704",
        &["model \"nothing\"", "create_model"],
    );
    run(client, "RESET llm_batch.default_model");

    run(client, "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nothing FOREIGN DATA WRAPPER nothing");
    let create = |change: &str| format!("SELECT llm_batch.create_model('x', {change})");
    refused(client, &create("server => 'gone', model => 'x'"), "42704", &["server \"gone\"", "CREATE SERVER"]);
    refused(client, &create("server => 'nothing', model => 'x'"), "22023", &["nothing", "llm_provider"]);
    refused(client, &create("server => 'fake', model => ' '"), "22023", &["model"]);
    refused(client, &create("server => NULL, model => 'x'"), "22004", &[]);
    let deep = format!("'{{\"x\": {}{}}}'", "[".repeat(500), "]".repeat(500));
    for (name, value) in [
        ("tokens_per_minute", "0"),
        ("requests_per_minute", "-1"),
        ("input_tokens_per_minute", "0"),
        ("inputs_per_minute", "0"),
        ("output_tokens_per_minute", "0"),
        ("max_concurrent_requests", "0"),
        ("max_request_tokens", "0"),
        ("input_price", "-0.1"),
        ("output_price", "'NaN'"),
        ("request_timeout", "'0'"),
        ("request_timeout", "'-1 s'"),
        ("request_timeout", "'2 days'"),
        ("parameters", "'[]'"),
        ("parameters", "'{\"messages\": []}'"),
        ("parameters", "'{\"model\": \"x\"}'"),
        ("parameters", "'{\"stream\": true}'"),
        ("parameters", "'{\"temperature\": 1e400}'"),
        ("parameters", &deep),
    ] {
        let sql = create(&format!("server => 'fake', model => 'x', {name} => {value}"));
        let (code, message, ..) = error(client, &sql);
        assert_eq!(code, "22023", "{sql}: {message}");
        let sql = format!("SELECT llm_batch.alter_model('m', {name} => {value})");
        let (code, message, ..) = error(client, &sql);
        assert_eq!(code, "22023", "{sql}: {message}");
    }
    refused(client, "SELECT llm_batch.create_model('m', 'fake', 'x')", "42710", &["\"m\"", "alter_model"]);
    refused(client, "SELECT llm_batch.alter_model('gone')", "42704", &["\"gone\"", "create_model"]);
    refused(client, "SELECT llm_batch.alter_model('m', reset => ARRAY['name'])", "22023", &["input_price"]);
    refused(client, "SELECT llm_batch.alter_model('m', server => 'gone')", "42704", &["gone"]);
    refused(client, "SELECT llm_batch.drop_model('gone')", "42704", &["gone", "create_model"]);
    refused(client, "SELECT llm_batch.drop_model('m')", "2BP01", &["\"m\"", "task \"topic\"", "drop_task"]);

    // A stream stays in the gateway's memory, whoever wrote its parts and wherever.
    for sql in [
        "SELECT llm_classify('x', ARRAY['a', 'b'], jsonb_build_object('model', 'm', 'instruction', repeat('x ', 200000)))",
        "SELECT llm_score('x', repeat('words ', 100000), '{\"model\": \"m\"}')",
        "SELECT llm_batch.create_classifier('x', jsonb_build_object('a', repeat('x', 300000), 'b', ''), 'm')",
        "SELECT llm_batch.alter_classifier('topic', examples => jsonb_build_array(
            jsonb_build_object('input', repeat('x', 300000), 'label', 'bug')))",
    ] {
        refused(client, sql, "54000", &["262144", "Shorten"]);
    }
    run(
        client,
        "SELECT llm_batch.create_model('large', 'fake', 'x', parameters => jsonb_build_object('x', repeat('x', 600000)))",
    );
    let ask = "SELECT llm_classify('x', ARRAY['a', 'b'], '{\"model\": \"large\"}')";
    refused(client, ask, "54000", &["524288", "parameters"]);
    run(client, "SELECT llm_batch.drop_model('large')");

    let classifier = |labels: &str, more: &str| {
        format!("SELECT llm_batch.create_classifier('x', labels => '{labels}', model => 'm'{more})")
    };
    let labels = |n: usize| serde_json::to_string(&(0..n).map(|i| format!("l{i}")).collect::<Vec<_>>()).unwrap();
    for bad in [
        r#"["a"]"#,
        "[]",
        "{}",
        &labels(251),
        r#"["a", "A"]"#,
        r#"["a", "a"]"#,
        r#"["a", ""]"#,
        r#"["a", " b"]"#,
        r#"["a", "b\nc"]"#,
        r#"["a", 1]"#,
        r#"["a", null]"#,
        r#"{"a": 1, "b": ""}"#,
        r#"[{"label": "a"}, {"lable": "b"}]"#,
        "\"a\"",
        "null",
    ] {
        let (code, message, ..) = error(client, &classifier(bad, ""));
        assert_eq!(code, "22023", "{bad}: {message}");
    }
    for bad in [
        r#"{"input": "x", "label": "a"}"#,
        r#"[{"input": "x", "label": "c"}]"#,
        r#"[{"input": "x"}]"#,
        r#"["x"]"#,
        r#"[{"input": 1, "label": "a"}]"#,
    ] {
        let (code, message, ..) = error(client, &classifier(r#"["a", "b"]"#, &format!(", examples => '{bad}'")));
        assert_eq!(code, "22023", "{bad}: {message}");
    }
    run(client, &format!("BEGIN; {}; ROLLBACK", classifier(&labels(250), "")));
    run(client, &format!("BEGIN; {}; ROLLBACK", classifier(&labels(2), "")));
    refused(
        client,
        "SELECT llm_batch.create_classifier('topic', '[\"a\", \"b\"]', 'm')",
        "42710",
        &["alter_classifier"],
    );
    refused(client, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', 'gone')", "42704", &["model \"gone\""]);
    refused(client, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]')", "22023", &["llm_batch.default_model"]);
    let (code, ..) = error(client, "SELECT llm_batch.alter_classifier('gone')");
    assert_eq!(code, "42704");
    let (code, ..) = error(client, "SELECT llm_batch.drop_task('gone')");
    assert_eq!(code, "42704");
    // An example's label must not be taken away.
    run(client, &classifier(r#"["a", "b"]"#, r#", examples => '[{"input": "x", "label": "a"}]'"#));
    let (code, ..) = error(client, "SELECT llm_batch.alter_classifier('x', labels => '[\"c\", \"d\"]')");
    assert_eq!(code, "22023");

    let deep = format!("{{\"priority\": {}{}}}", "[".repeat(500), "]".repeat(500));
    for bad in [
        "{\"max_rows\": 5}",
        "{\"max_rows_per_request\": 0}",
        "{\"max_rows_per_request\": 501}",
        "{\"max_attempts\": 11}",
        "{\"priority\": 101}",
        "{\"priority\": \"high\"}",
        "{\"structured_output\": \"yes\"}",
        "{\"codes\": \"emoji\"}",
        "{\"answer_shape\": 1}",
        "{\"too_long\": \"cry\"}",
        "{\"max_attempts\": 1e400}",
        "{\"max_attempts\": -1e400}",
        "{\"max_attempts\": 1e308}",
        "{\"priority\": 0.1}",
        "{\"priority\": \"NaN\"}",
        &deep,
        "[]",
        "1",
    ] {
        for sql in [
            call(&format!("options => '{bad}'")),
            format!("SELECT llm_classify_batch('SELECT 1, 2', 'topic', '{bad}')"),
            format!("SET llm_batch.default_model = 'm'; SELECT llm_classify('x', ARRAY['a', 'b'], '{bad}')"),
            classifier(r#"["a", "c"]"#, &format!(", options => '{bad}'")).replace("'x'", "'y'"),
        ] {
            refused(client, &sql, "22023", &["option"]);
        }
    }
    for bad in ["1e400", "-1", "0", "\"NaN\"", "-1e308", "[1]"] {
        for key in ["max_cost", "max_tokens"] {
            let sql = format!("SELECT llm_classify_batch('SELECT 1, 2', 'topic', '{{\"{key}\": {bad}}}')");
            let (code, message, _, hint) = error(client, &sql);
            assert!(code == "22023" && !hint.is_empty(), "{sql}: {code} {message} {hint}");
        }
    }
    refused(client, "SELECT llm_classify('x', array_fill('a'::text, ARRAY[100000]))", "22023", &[]);
    for bad in ["[1e400, \"a\"]", "{\"a\": 1e400, \"b\": \"\"}", "[{\"label\": \"a\", \"description\": 1e400}, \"b\"]"]
    {
        refused(client, &classifier(bad, "").replace("'x'", "'y'"), "22P02", &["number out of range"]);
    }
    refused(
        client,
        &call("options => '{\"max_rows\": 5}'"),
        "22023",
        &["\"max_rows\"", "max_rows_per_request", "codes"],
    );
    nothing_happened(&bed);
}

#[test]
fn options_of_servers_and_mappings() {
    let bed = Bed::new("errors_ddl");
    let client = &mut bed.connect();
    let server = |options: &str| format!("CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS ({options})");
    refused(client, &server("base_url 'https://a/v1', url 'x'"), "HV00D", &["\"url\"", "base_url, account"]);
    refused(client, &server("base_url 'https://a/v1', api_key 'x'"), "HV00D", &["\"api_key\"", "base_url"]);
    refused(client, "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider", "HV00J", &["base_url"]);
    refused(client, &server("base_url 'https://a/v1', api 'gopher'"), "HV024", &["gopher", "openai"]);
    for url in [
        "http://api.openai.com/v1",
        "http://169.254.169.254/latest",
        "ftp://a/v1",
        "file:///etc/passwd",
        "api.openai.com/v1",
        "https://",
        "https://a/v1?key=x",
        "https://user:pw@a/v1",
        "http://127.0.0.1@evil.example/v1",
        "https://a:99999/v1",
        "https://xn--nx/v1",
    ] {
        refused(client, &server(&format!("base_url '{url}'")), "HV024", &["base_url", "https://host/path"]);
    }
    // Each dialect has its own.
    refused(client, &server("api 'azure'"), "HV00J", &["base_url", "azure", "https://"]);
    let azure =
        server("api 'azure', base_url 'https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21'");
    refused(client, &azure, "HV024", &["it contains a query", "api_version", "deployment"]);
    refused(client, &server("api 'openai', api_version '1'"), "HV024", &["api_version", "'openai'"]);
    refused(client, &server("api 'anthropic', api_version 'a b'"), "HV024", &["\"api_version\"", "2024-10-21"]);
    refused(client, &server("api 'Anthropic'"), "HV024", &["\"Anthropic\"", "anthropic", "gemini"]);
    run(client, &server("api 'gemini'"));
    let model = |name: &str, parameters: &str| {
        format!("SELECT llm_batch.create_model('{name}', server => 'x', model => 'm', parameters => '{parameters}')")
    };
    refused(client, &model("g", r#"{"generationConfig": {}}"#), "22023", &["\"generationConfig\"", "for each request"]);
    run(client, &model("g", r#"{"max_tokens": 5, "temperature": 0}"#));
    refused(client, "SELECT llm_batch.alter_model('g', parameters => '{\"contents\": 1}')", "22023", &["\"contents\""]);
    run(client, "SELECT llm_batch.drop_model('g'); DROP SERVER x");
    for option in ["api ''", "account ''", "api_key_file ' '"] {
        let (code, message, ..) = error(client, &server(&format!("base_url 'https://a/v1', {option}")));
        assert_eq!(code, "HV024", "{option}: {message}");
    }
    let (code, ..) = error(client, &server("base_url ''"));
    assert_eq!(code, "HV024");
    let mapping = |options: &str| format!("CREATE USER MAPPING FOR postgres SERVER fake OPTIONS ({options})");
    refused(client, &mapping("password 'x'"), "HV00D", &["\"password\"", "api_key"]);
    refused(client, &mapping("base_url 'https://a/v1'"), "HV00D", &["\"base_url\"", "api_key"]);
    for key in ["", " ", "two words", "tab\there", "line\nend", "ключ-secret"] {
        let (code, message, detail, hint) = error(client, &mapping(&format!("api_key '{key}'")));
        assert_eq!(code, "HV024", "{message}");
        assert!(key.trim().is_empty() || hint.starts_with("Copy the key"), "{message}: {hint}");
        let all = format!("{message}{detail}{hint}");
        assert!(key.trim().is_empty() || !all.contains(key), "the key is shown: {all}");
    }
    refused(client, "ALTER FOREIGN DATA WRAPPER llm_provider OPTIONS (ADD x 'y')", "HV00D", &["\"x\""]);
    refused(
        client,
        "CREATE FOREIGN TABLE f (a int) SERVER fake OPTIONS (x 'y')",
        "HV00D",
        &["\"x\"", "no valid options"],
    );
    refused(client, "ALTER SERVER fake OPTIONS (SET base_url 'http://a/v1')", "HV024", &["this machine alone"]);
    refused(client, "ALTER SERVER fake OPTIONS (DROP api, DROP base_url)", "HV00J", &["base_url"]);
    // A valid text passes.
    run(
        client,
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider
         OPTIONS (api 'openai', base_url 'https://a.example:8443/v1/', account 'a', api_key_file '/nowhere')",
    );
}

/// Mistakes of a new user, in the order of the first steps: each is refused at once, with a hint of what to write instead.
#[test]
fn first_steps_in_a_wrong_way() {
    let bed = Bed::new("errors_first_steps");
    let c = &mut bed.connect();
    run(
        c,
        "CREATE TABLE t (id int PRIMARY KEY, body text, topic text, n int, due date, data jsonb, v real[]);
         CREATE SERVER claude FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'anthropic');
         SELECT llm_batch.create_model('claude', 'claude', 'x'), llm_batch.create_route('bulk', ARRAY['m']),
                llm_batch.create_extractor('bill', '{\"amount\": \"numeric\", \"due\": \"date\"}', 'm'),
                llm_batch.create_embedder('vector', 'm', 3)",
    );
    for (sql, code, says) in SERVERS.iter().chain(MODELS_AND_ROUTES).chain(TASKS).chain(JOBS) {
        refused(c, sql, code, says);
    }
    // A model is no route.
    for (name, is, kind) in [("bulk", "route", "model"), ("m", "model", "route")] {
        for verb in ["alter", "drop"] {
            let says = [format!("\"{name}\" is a {is}"), format!("llm_batch.alter_{is}()")];
            let sql = format!("SELECT llm_batch.{verb}_{kind}('{name}')");
            refused(c, &sql, "42809", &says.each_ref().map(String::as_str));
        }
    }
    nothing_happened(&bed);
}

/// A statement, its SQLSTATE, and what the error says.
type Wrong = (&'static str, &'static str, &'static [&'static str]);

const SERVERS: &[Wrong] = &[
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'https://api.openai.com/v1/chat/completions')",
        "HV024",
        &["it ends in /chat/completions", "Leave out"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'anthropic', base_url 'https://a.example/v1/messages/')",
        "HV024",
        &["it ends in /v1/messages"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', allow_http 'maybe')",
        "HV024",
        &["\"maybe\"", "true, false"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', counts 'all')",
        "HV024",
        &["\"all\"", "reserved"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', api_key_file 'key')",
        "HV024",
        &["api_key_file", "absolute", "/etc/llm/key"],
    ),
    ("CREATE USER MAPPING FOR postgres SERVER fake OPTIONS (apikey 'x')", "HV00D", &["\"apikey\"", "are: api_key."]),
    (
        "CREATE USER MAPPING FOR postgres SERVER fake OPTIONS (api_key 'Bearer sk-abc')",
        "HV024",
        &["not a valid key", "without spaces"],
    ),
];

const MODELS_AND_ROUTES: &[Wrong] = &[
    ("SELECT llm_batch.create_model('', 'fake', 'x')", "22023", &["1 to 200", "such as"]),
    ("SELECT llm_batch.create_model('x', 'fake', '')", "22023", &["\"model\" must not be empty", "provider's name"]),
    ("SELECT llm_batch.create_model('x', 'm', 'x')", "42704", &["server \"m\"", "CREATE SERVER"]),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', tokens_per_minute => 0)",
        "22023",
        &["\"tokens_per_minute\" must be greater than zero", "Leave it out"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', max_concurrent_requests => -1)",
        "22023",
        &["\"max_concurrent_requests\"", "Leave it out"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', input_price => -1)",
        "22023",
        &["\"input_price\"", "dollars per million"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', request_timeout => '2 days')",
        "22023",
        &["\"request_timeout\"", "1 day", "such as"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', parameters => '[]')",
        "22023",
        &["\"parameters\"", "temperature"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', parameters => '{\"model\": \"y\"}')",
        "22023",
        &["parameter \"model\" cannot be set", "for each request"],
    ),
    ("SELECT llm_batch.create_route('x', ARRAY['m', 'm'])", "22023", &["named twice", "once"]),
    ("SELECT llm_batch.create_route('x', ARRAY['bulk'])", "22023", &["\"bulk\" is a route", "of models"]),
    ("SELECT llm_batch.create_route('x', ARRAY['gone'])", "42704", &["model \"gone\"", "create_model"]),
    (
        "SELECT llm_batch.create_route('x', ARRAY['m'], 'fastest')",
        "22023",
        &["\"fastest\"", "failover", "spread", "cheapest"],
    ),
    ("SELECT llm_batch.create_route('x', '{}')", "22023", &["1 to 16 models", "ARRAY["]),
];

const TASKS: &[Wrong] = &[
    ("SELECT llm_batch.create_classifier('x', ARRAY['a'], model => 'm')", "22023", &["2 to 250 labels", "Write"]),
    ("SELECT llm_batch.create_classifier('x', '{a,b}', model => 'm')", "22P02", &["must be JSON", "ARRAY["]),
    (
        "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', model => 'm', examples => '[{\"input\": \"x\", \"label\": \"z\"}]')",
        "22023",
        &["\"z\"", "one of the labels"],
    ),
    ("SELECT llm_batch.create_extractor('x', '{}', 'm')", "22023", &["1 to 26 fields", "Write"]),
    ("SELECT llm_batch.create_extractor('x', '{\"a\": \"money\"}', 'm')", "22023", &["\"money\"", "numeric"]),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": \"numeric(5, 2)\"}', 'm')",
        "22023",
        &["\"numeric(5, 2)\"", "those of the column"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"date\", \"labels\": [\"x\", \"y\"]}}', 'm')",
        "22023",
        &["of type date and has labels", "labels[]"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"labels\"}}', 'm')",
        "22023",
        &["\"a\" has no labels", "Write"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"date\", \"missing\": {\"value\": \"today\"}}}', 'm')",
        "22023",
        &["\"today\"", "YYYY-MM-DD", "NULL"],
    ),
    ("SELECT llm_batch.create_extractor('x', '{\"a\": \"date\", \"A\": \"date\"}', 'm')", "22023", &["twice", "case"]),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"timestamptz\", \"time_zone\": \"x y\"}}', 'm')",
        "22023",
        &["\"x y\"", "pg_timezone_names"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": \"date\"}', 'm', examples => '[{\"input\": \"x\", \"answer\": {\"b\": 1}}]')",
        "22023",
        &["field \"b\" that does not exist", "the fields are \"a\""],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": \"date\"}', 'm', examples => '[{\"input\": \"x\", \"answer\": \"1\"}]')",
        "22023",
        &["not an object", "the fields are \"a\""],
    ),
    ("SELECT llm_batch.create_scorer('x', 'y', 5, 1, 'm')", "22023", &["not below", "low => 1"]),
    ("SELECT llm_batch.create_embedder('x', 'm', 0)", "22023", &["\"dimensions\"", "1 to 8192"]),
    ("SELECT llm_batch.create_embedder('x', 'gone', 3)", "42704", &["model \"gone\"", "create_model"]),
    ("SELECT llm_batch.create_embedder('x', 'claude', 3)", "0A000", &["\"anthropic\"", "serves no embeddings"]),
    ("SELECT llm_batch.alter_embedder('topic', dimensions => 3)", "42809", &["not an embedder", "alter_classifier"]),
    ("SELECT llm_embed('x', 'topic')", "42809", &["not an embedder", "llm_run()"]),
    ("SELECT llm_classify('x', 'vector')", "42809", &["not a classifier", "llm_run()"]),
    (
        "SELECT llm_batch.create_scorer('x', 'y', model => 'm', options => '{\"check\": \"anwser > 5\"}')",
        "42703",
        &["check: column \"anwser\" does not exist", "the column \"answer\""],
    ),
    (
        "SELECT llm_batch.create_scorer('x', 'y', model => 'm', options => '{\"chekc\": \"true\"}')",
        "22023",
        &["\"chekc\"", "check_hint"],
    ),
];

const JOBS: &[Wrong] = &[
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"n\": \"amount\", \"topic\": \"amount\"}', task => 'bill')",
        "22023",
        &["\"n\" and \"topic\" cannot both take field \"amount\"", "of its own"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"n\": \"sum\"}', task => 'bill')",
        "42704",
        &["field \"sum\"", "amount, due"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"due\": \"amount\"}', task => 'bill')",
        "42804",
        &["\"amount\" is of type numeric", "\"due\" is of type date", "Fill a column"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', '{\"due\": \"due\"}', 'bill')",
        "42703",
        &["A text names one column", "targets =>"],
    ),
    ("SELECT llm_batch.backfill('t', 'body', 'n', 'bill')", "42804", &["2 fields", "targets =>"]),
    ("SELECT llm_batch.backfill('t', 'body', 'n', 'vector')", "42804", &["real[]", "integer", "Fill a column"]),
    ("SELECT llm_batch.backfill('t', 'body', 'gone', 'vector')", "42703", &["\"gone\"", "ADD COLUMN"]),
    ("SELECT llm_batch.backfill('t', 'bdoy', 'topic', 'topic')", "42703", &["\"bdoy\"", "Perhaps you meant"]),
    (
        "SELECT llm_batch.backfill('t', 'text_of_it', 'topic', 'topic')",
        "42703",
        &["text_of_it", "argument \"input\" is an SQL"],
    ),
    ("SELECT llm_batch.backfill('t', 'body', 'n', 'topic')", "22P02", &["does not fit column \"n\"", "Every label"]),
];

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

#[test]
fn waiting_and_controlling() {
    let bed = Bed::new("errors_wait");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    for verb in ["pause", "resume", "cancel", "retry_failed"] {
        refused(client, &format!("SELECT llm_batch.{verb}(99)"), "42704", &["job 99", "llm_batch.progress"]);
    }
    refused(client, "CALL llm_batch.wait(99)", "42704", &["job 99", "llm_batch.progress"]);
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("the rows are counted", PATIENCE, || progress(client, job).total, |n| *n == 20);
    refused(client, &format!("CALL llm_batch.wait({job}, '100 ms')"), "57014", &["not done", "20 rows are left"]);
    let (code, ..) = error(client, &format!("BEGIN; CALL llm_batch.wait({job})"));
    assert_eq!(code, "25001");
    run(client, "ROLLBACK");
    let (code, ..) = error(client, &format!("DO $$ BEGIN PERFORM 1; EXECUTE 'CALL llm_batch.wait({job})'; END $$"));
    assert_eq!(code, "2D000");
    refused(client, "SELECT llm_batch.drop_task('topic')", "55006", &["topic", &format!("job {job}"), "cancel"]);
    run(client, &format!("SELECT llm_batch.pause({job})"));
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["paused (user)", "resume"]);
    assert_eq!(text(client, &format!("SELECT llm_batch.pause({job})")), "f");
    refused(client, "SELECT llm_batch.drop_task('topic')", "55006", &[&format!("job {job}")]);
    // A call that waits for another session's cancel does not take its place.
    run(client, &format!("SELECT llm_batch.resume({job})"));
    run(client, &format!("BEGIN; SELECT llm_batch.cancel({job})"));
    let mut other = bed.connect();
    let pid = one(&mut other, "SELECT pg_backend_pid()::bigint");
    let pause = std::thread::spawn(move || error(&mut other, &format!("SELECT llm_batch.pause({job})")));
    let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
    wait_until("pause() waits", PATIENCE, || one(client, &waits), |n| *n == 1);
    run(client, "COMMIT");
    let (code, message, ..) = pause.join().unwrap();
    assert!(code == "55000" && message.contains("is cancelled"), "{code} {message}");
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["cancelled", "backfill"]);
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "f");
    for verb in ["pause", "resume", "retry_failed"] {
        refused(client, &format!("SELECT llm_batch.{verb}({job})"), "55000", &["is cancelled", "backfill"]);
    }
    bed.provider.release();
    // A failed one.
    let table = "broken";
    tickets(client, table, 1001..=1010);
    bed.provider.hold();
    let job = backfill(client, table);
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n == 10);
    run(client, &format!("ALTER TABLE {table} DROP COLUMN topic"));
    bed.provider.release();
    common::wait_status(client, job, "failed");
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["is failed", "topic", "backfill"]);
    for verb in ["pause", "resume", "retry_failed"] {
        refused(client, &format!("SELECT llm_batch.{verb}({job})"), "55000", &["is failed"]);
    }
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "f");
    assert_eq!(progress(client, job).status, "failed");
    // A done one.
    tickets(client, "fine", 2001..=2010);
    let job = backfill(client, "fine");
    run(client, &format!("CALL llm_batch.wait({job})"));
    run(client, &format!("CALL llm_batch.wait({job}, '1 ms')"));
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "f");
    assert_eq!(text(client, &format!("SELECT llm_batch.retry_failed({job})")), "f");
    for verb in ["pause", "resume"] {
        refused(client, &format!("SELECT llm_batch.{verb}({job})"), "55000", &["is done"]);
    }
    run(client, "SELECT llm_batch.drop_task('topic')");
    run(client, "SELECT llm_batch.drop_model('m')");
}

#[test]
fn a_key_that_is_revoked_in_the_middle() {
    let bed = Bed::with("errors_auth", Config { api_key: Some(KEY.to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.api_key = Some("sk-new-0123456789".to_owned()));
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("auth"), "{p:?}");
    let last = p.last_error.unwrap();
    assert!(last.contains("rejected the API key") && last.contains("401"), "{last}");
    // Rows that were sent before were answered and are written.
    wait_until("what was in flight is written", PATIENCE, || progress(client, job).done, |n| *n == 10);
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["paused (auth)", "401", "resume"]);
    // Resumed without mending, it pauses again.
    let before = bed.provider.stats().requests;
    assert_eq!(text(client, &format!("SELECT llm_batch.resume({job})")), "t");
    wait_until("it asked again", PATIENCE, || bed.provider.stats().requests, |n| *n > before);
    common::wait_status(client, job, "paused");
    run(client, "ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key 'sk-new-0123456789')");
    run(client, &format!("SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 100);
    assert!(!bed.cluster.log().contains("sk-new-0123456789"));
}

#[test]
fn money_that_is_gone_in_the_middle() {
    let bed = Bed::new("errors_spend");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.faults = vec![(Fault::SpendLimit429, 1.0)]);
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("spend"), "{p:?}");
    let last = p.last_error.unwrap();
    assert!(last.contains("out of credit") && last.contains("quota"), "{last}");
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["paused (spend)", "resume"]);
    bed.provider.configure(|c| c.faults.clear());
    run(client, &format!("SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 100);
}

#[test]
fn a_provider_that_is_down_for_long() {
    let bed = Bed::new("errors_down");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.faults = vec![(Fault::Http503, 0.5), (Fault::ResetBefore, 0.5)]);
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("provider_down"), "{p:?}");
    assert!(p.last_error.unwrap().contains("does not answer"));
    // wait() waits: this is nothing to be mended by hand.
    refused(client, &format!("CALL llm_batch.wait({job}, '1 s')"), "57014", &["not done"]);
    bed.provider.configure(|c| c.faults.clear());
    run(client, &format!("CALL llm_batch.wait({job}, '90 s')"));
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 100);
}

#[test]
fn requests_that_are_refused() {
    let bed = Bed::new("errors_rejected");
    let client = &mut bed.connect();
    // The probe passes, the first request does not.
    bed.provider.script([None]);
    bed.provider.configure(|c| {
        c.faults = vec![(Fault::Status(400, r#"{"error": {"message": "temperature is odd"}}"#.to_owned()), 1.0)];
    });
    tickets(client, "first", 1..=100);
    let job = backfill(client, "first");
    let p = common::wait_status(client, job, "failed");
    let last = p.last_error.unwrap();
    assert!(last.contains("400") && last.contains("temperature is odd"), "{last}");
    assert_eq!(p.reason, None);
    assert!(bed.provider.stats().rows.is_empty());
    assert_eq!(common::left(client, "first"), 100);
    // The model goes away in the middle.
    bed.provider.configure(|c| c.faults.clear());
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.models = Some(vec!["another".to_owned()]));
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    let last = p.last_error.clone().unwrap();
    assert!(last.contains("404") && last.contains("does not exist"), "{last}");
    assert_eq!(
        (p.reason.as_deref(), p.done, p.left),
        (Some("provider_down"), 10, 90),
        "what was answered is written: {p:?}"
    );
    // It comes back, and the job goes on by itself.
    bed.provider.configure(|c| c.models = None);
    let p = bed.done(job);
    assert_eq!(p.counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert!(bed.provider.stats().rows.values().all(|r| r.asked == 1));
}

#[test]
fn keys_are_never_shown() {
    // Keys of other forms than "sk-…", long and short, and one with quotes in it.
    let long = format!("sk-proj-{}", "aB3xY9".repeat(26));
    let keys = [
        KEY,
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
        "Zx9-short",
        "q\"uo'te\\d-0123456789",
        "c2Vj/cmV0+a2V5/MDEy==",
        long.as_str(),
    ];
    let bed = Bed::new("errors_keys");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    let mut shown = String::new();
    for (i, key) in keys.iter().enumerate() {
        let quoted = key.replace('\'', "''");
        run(client, &format!("ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key '{quoted}')"));
        let json = |text: &str| serde_json::json!({ "error": { "message": text } }).to_string();
        let middle = "word ".repeat(50);
        // Long texts are cut; no part of a key must be left at the end.
        let cut = (140..=300).step_by(20).map(|n| json(&format!("{}'{key}'", "x".repeat(n))));
        let mut bodies = vec![
            json(&format!("Incorrect API key provided: {key}.")),
            json(&format!("Bearer {key}")),
            json(&format!("key=\"{key}\", {middle}")),
            json(&format!("({key})")),
            format!("<html>{key}</html>"),
            format!("{{\"message\": \"{key}\"}}"),
            (*key).to_owned(),
            json(key),
            // As some servers write JSON.
            json(&format!("the key {key} is wrong")).replace('/', "\\/"),
            json("#").replace('#', &key.chars().map(|c| format!("\\u{:04x}", u32::from(c))).collect::<String>()),
        ];
        bodies.extend(cut);
        for (j, body) in bodies.iter().enumerate() {
            for status in [401, 400, 404, 429, 500, 200] {
                if [500, 200].contains(&status) && j > 1 {
                    // These wait and try again.
                    continue;
                }
                bed.provider.configure(|c| c.faults = vec![(Fault::Status(status, body.clone()), 1.0)]);
                if status == 429 {
                    // The probe is content with that, and rows wait: a job, to be cancelled.
                    if j > 1 {
                        continue;
                    }
                    let before = bed.provider.stats().requests;
                    let job = backfill(client, "tickets");
                    wait_until("refused", PATIENCE, || bed.provider.stats().requests, |n| *n >= before + 3);
                    shown += &text(client, "SELECT string_agg(a::text, ' ') FROM llm_batch.activity a");
                    run(client, &format!("SELECT llm_batch.cancel({job})"));
                    continue;
                }
                let (_, message, detail, hint) = error(client, &call("relation => 'tickets'"));
                shown += &format!("{i}/{j}/{status}: {message}\n{detail}\n{hint}\n");
            }
        }
        // In a job that fails, and one that pauses; and rows that fail.
        bed.provider.script([None, None]);
        bed.provider.configure(|c| c.faults = vec![(Fault::Status(400, bodies[0].clone()), 1.0)]);
        run(client, "UPDATE tickets SET topic = NULL");
        let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 5}'");
        wait_until(
            "the job has ended",
            PATIENCE,
            || progress(client, job),
            |p| ["done", "failed"].contains(&p.status.as_str()),
        );
        shown += &format!("{:?}", failures(client, job));
    }
    for view in [
        "progress",
        "activity",
        "failure",
        "job",
        "job_state",
        "model",
        "list_price",
        "task",
        "task_history",
        "row_failure",
    ] {
        shown += &text(client, &format!("SELECT coalesce(string_agg(x::text, ' '), '') FROM llm_batch.{view} x"));
    }
    shown +=
        &text(client, "SELECT string_agg(a::text, ' ') FROM pg_stat_activity a WHERE backend_type LIKE 'llm_batch%'");
    let log = bed.cluster.log();
    for key in keys {
        for (place, all) in [("the views and errors", &shown), ("the log", &log)] {
            // Seven characters of it are a part that is worth something.
            let part: String = key.chars().take(7).collect();
            let at = all.find(&part).map(|at| {
                let start = all.floor_char_boundary(at.saturating_sub(200));
                all[start..all.ceil_char_boundary((at + 60).min(all.len()))].to_owned()
            });
            assert_eq!(at, None, "a part of the key {key} is in {place}");
        }
    }
}

#[test]
fn a_model_that_is_not_there_costs_nothing() {
    // The rows of a job whose model was renamed at the provider between two jobs.
    let bed = Bed::with("errors_model", Config { models: Some(vec!["fake-m".to_owned()]), ..Config::default() });
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    model(client, "other", "");
    run(client, "SELECT llm_batch.alter_classifier('topic', model => 'other')");
    refused(client, &call("relation => 'tickets'"), "42704", &["does not know model \"other\"", "fake-other"]);
    run(client, "SELECT llm_batch.alter_classifier('topic', model => 'm')");
    let job = backfill(client, "tickets");
    bed.done(job);
}
