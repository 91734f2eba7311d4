//! Jobs that cannot be done, by what they are given or where they begin.

use std::net::TcpListener;

use llm_fake_provider::{Config, FakeProvider, Fault};
use pg_llm_batch_e2e::{Cluster, wait_until};

use super::{call, nothing_happened, refused};
use crate::common::{Bed, PATIENCE, backfill, error, model, one, run, tickets, warm};

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

    bed.provider.configure(|c| c.faults = vec![(Fault::Status(200, "<html>Welcome</html>".to_owned()), 1.0)]);
    for sql in &verbs {
        refused(client, sql, "08006", &["does not answer with JSON", "web page", "base_url", "usually ends in /v1"]);
    }

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
