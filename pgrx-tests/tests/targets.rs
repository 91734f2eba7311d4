//! Several columns from one pass: a row is written whole or not at all, each value in its own column, and NULL is an answer.

mod common;

use std::process::Command;

use common::{
    Bed, PATIENCE, error, failures, labels_json, one, pids, progress, reconnect, run, slow, text, wait_status,
};
use llm_fake_provider::{Config, Fault};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

/// The columns of a table and the fields that fill them.
const TARGETS: &str = r#"{"topic": "category", "amount": "amount", "due_on": "due", "tags": "tags"}"#;

/// The value that the provider makes of the row's id and the field's name.
fn n(field: &str) -> String {
    format!("(id + {})", field.bytes().map(i64::from).sum::<i64>() % 7)
}

fn date(field: &str) -> String {
    let n = n(field);
    format!("make_date(2026, ({n} / 28 % 12 + 1)::int, ({n} % 28 + 1)::int)")
}

/// The text that the provider writes of a number.
const WORDS: &str = "CREATE FUNCTION words(n bigint) RETURNS text LANGUAGE sql AS
    $$SELECT concat(n, ' ', string_agg(('{the,text,is,about,row}'::text[])[1 + i % 5], ' ' ORDER BY i)) FROM generate_series(1, 4 + n % 16) i$$";

/// Counts rows that have a value which is not theirs. `all`: NULL is such a value, unless the text says so.
fn wrong(client: &mut Client, table: &str, all: bool) -> i64 {
    let columns = [
        ("topic", "category", "want".to_owned()),
        ("amount", "amount", format!("{} + 0.25", n("amount"))),
        ("due_on", "due", date("due")),
        ("tags", "tags", format!("ARRAY[words({0}), words({0} + 1)]", n("tags"))),
    ];
    let is_wrong = columns.map(|(column, field, want)| {
        let want = format!("CASE WHEN body NOT LIKE '%no {field}%' THEN {want} END");
        if all {
            format!("{column} IS DISTINCT FROM {want}")
        } else {
            format!("({column} IS NOT NULL AND {column} IS DISTINCT FROM {want})")
        }
    });
    one(client, &format!("SELECT count(*) FROM {table} WHERE {}", is_wrong.join(" OR ")))
}

#[track_caller]
fn tickets(client: &mut Client, table: &str, first: i64, last: i64, more: &str) {
    run(
        client,
        &format!(
            "CREATE TABLE {table} (id bigint PRIMARY KEY, body text, want text, topic text, amount numeric(12, 2), due_on date, tags text[]);
             INSERT INTO {table} (id, body, want)
             SELECT id, concat('My order #r', lpad(id::text, 6, '0'), ':', l, '# is not what I wanted', {more}), l
               FROM generate_series({first}, {last}) id, LATERAL (SELECT ('{{{}}}'::text[])[1 + id % 8]) x (l)",
            common::LABELS.join(",")
        ),
    );
}

#[track_caller]
fn extractor(client: &mut Client, name: &str, fields: &str) {
    run(
        client,
        &format!("SELECT llm_batch.create_extractor('{name}', '{fields}', 'm', options => '{{\"reuse\": false}}')"),
    );
}

fn bed(name: &str, config: Config) -> (Bed, Client) {
    let bed = Bed::with(name, config);
    let mut client = bed.connect();
    run(&mut client, WORDS);
    let labels = labels_json(&common::LABELS);
    extractor(
        &mut client,
        "ticket",
        &format!(r#"{{"category": {{"labels": {labels}}}, "amount": "numeric", "due": "date", "tags": "text[]"}}"#),
    );
    (bed, client)
}

#[track_caller]
fn backfill(client: &mut Client, table: &str) -> i64 {
    one(client, &format!("SELECT llm_batch.backfill('{table}', 'body', targets => '{TARGETS}', task => 'ticket')"))
}

#[test]
fn several_columns_from_one_pass() {
    let (bed, mut c) = bed("targets_one_pass", Config::default());
    let c = &mut c;
    tickets(c, "t", 1, 400, "''");
    assert_eq!(
        one(c, &format!("SELECT rows FROM llm_batch.estimate('t', 'body', targets => '{TARGETS}', task => 'ticket')")),
        400
    );
    let job = backfill(c, "t");
    let p = bed.done(job);
    assert_eq!((p.counts(), wrong(c, "t", true)), ((400, 400, 0, 0, 0, 0), 0));
    assert_eq!(text(c, "SELECT target FROM llm_batch.progress"), "tags, topic, amount, due_on");
    // Once each.
    assert_eq!(bed.provider.stats().rows.values().map(|r| r.asked).max(), Some(1));

    // Positions and names, types and none: a text names a column, jsonb several.
    tickets(c, "forms", 1001, 1010, "''");
    let jsonb = format!("'{TARGETS}'::jsonb");
    for call in [
        "'forms', 'body', 'topic', 'topic'".to_owned(),
        "'forms', 'body', target => 'topic', task => 'topic'".to_owned(),
        "'forms', 'body', 'topic'::text, 'topic'".to_owned(),
        "'forms', 'body', 'topic'::name, 'topic', 'true'".to_owned(),
        "'forms', 'body', targets => '{\"topic\": \"label\"}', task => 'topic'".to_owned(),
        format!("'forms', 'body', {jsonb}, 'ticket'"),
        format!("'forms', 'body', targets => '{TARGETS}', task => 'ticket', filter => 'true'"),
        format!("relation => 'forms', input => 'body', targets => {jsonb}, task => 'ticket', options => '{{}}'"),
    ] {
        run(c, "UPDATE forms SET topic = NULL, amount = NULL, due_on = NULL, tags = NULL");
        assert_eq!(one(c, &format!("SELECT rows FROM llm_batch.estimate({call})")), 10, "{call}");
        let job = one(c, &format!("SELECT llm_batch.backfill({call})"));
        assert_eq!(bed.done(job).counts(), (10, 10, 0, 0, 0, 0), "{call}");
        assert_eq!(one(c, "SELECT count(*) FROM forms WHERE topic IS DISTINCT FROM want"), 0, "{call}");
    }

    // A whole answer goes into a column of JSON; one of the type of a domain, or to which there is a cast, takes a value.
    run(
        c,
        "CREATE DOMAIN price AS numeric(10, 1) CHECK (VALUE > 0);
         CREATE TABLE other (id bigint PRIMARY KEY, body text, whole jsonb, price price, n bigint, day timestamp, tags varchar(99)[],
                             list jsonb, words text);
         INSERT INTO other SELECT id, body FROM t WHERE id <= 20",
    );
    let whole = one(c, "SELECT llm_batch.backfill('other', 'body', 'whole', 'ticket')");
    assert_eq!(bed.done(whole).counts(), (20, 20, 0, 0, 0, 0));
    assert_eq!(
        one(
            c,
            "SELECT count(*) FROM other JOIN t USING (id) WHERE whole = jsonb_build_object('category', topic, 'amount', amount, 'due', due_on, 'tags', t.tags)"
        ),
        20
    );
    for (targets, is_right) in [
        (
            r#"{"price": "amount", "day": "due", "tags": "tags"}"#,
            "price = round(amount, 1) AND day = due_on AND other.tags::text[] = t.tags",
        ),
        (
            r#"{"n": "amount", "list": "tags", "words": "due"}"#,
            "n = round(amount) AND list = to_jsonb(t.tags) AND words = due_on::text",
        ),
    ] {
        let job =
            one(c, &format!("SELECT llm_batch.backfill('other', 'body', targets => '{targets}', task => 'ticket')"));
        assert_eq!(bed.done(job).counts(), (20, 20, 0, 0, 0, 0), "{:?}", failures(c, job));
        assert_eq!(one(c, &format!("SELECT count(*) FROM other JOIN t USING (id) WHERE {is_right}")), 20, "{targets}");
    }
}

#[test]
fn what_cannot_be_filled_is_refused() {
    let (bed, mut c) = bed("targets_refused", Config::default());
    let c = &mut c;
    tickets(c, "t", 1, 10, "''");
    run(
        c,
        "ALTER TABLE t ADD n int, ADD never text GENERATED ALWAYS AS (want) STORED, ADD flag boolean, ADD short varchar(3);
         CREATE ROLE app LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO app;
         GRANT SELECT ON t TO app; GRANT UPDATE (topic) ON t TO app",
    );
    let call =
        |targets: &str| format!("SELECT llm_batch.backfill('t', 'body', targets => '{targets}', task => 'ticket')");
    let mut refused = |sql: &str, state: &str, words: &[&str]| {
        let e = error(c, sql);
        let all = format!("{} | {} | {}", e.1, e.2, e.3);
        assert!(e.0 == state && words.iter().all(|word| all.contains(word)), "{sql}: {e:?}");
    };
    for (targets, state, words) in [
        ("[]", "22023", &["targets", "object"][..]),
        ("{}", "22023", &["targets"]),
        ("{\"topic\": 1}", "22023", &["targets"]),
        ("{\"topic\": \"nothing\"}", "42704", &["\"nothing\"", "category, amount, due, tags"]),
        ("{\"nothing\": \"amount\"}", "42703", &["\"nothing\"", "ADD COLUMN"]),
        ("{\"amount\": \"amount\", \"n\": \"amount\"}", "22023", &["\"amount\"", "\"n\""]),
        ("{\"id\": \"amount\"}", "42809", &["\"id\""]),
        ("{\"never\": \"category\"}", "42809", &["generated"]),
        ("{\"n\": \"category\"}", "22P02", &["billing", "\"n\""]),
        ("{\"short\": \"category\"}", "22001", &["billing", "\"short\""]),
        ("{\"due_on\": \"amount\"}", "42804", &["\"amount\" is of type numeric", "\"due_on\" is of type date"]),
        ("{\"amount\": \"due\"}", "42804", &["\"due\" is of type date", "\"amount\" is of type numeric"]),
        ("{\"flag\": \"amount\"}", "42804", &["numeric", "boolean"]),
        ("{\"tags\": \"due\"}", "42804", &["date", "text[]"]),
        ("{\"n\": \"tags\"}", "42804", &["text[]", "integer"]),
    ] {
        refused(&call(targets), state, words);
        refused(&call(targets).replace("SELECT llm_batch.backfill", "SELECT * FROM llm_batch.estimate"), state, words);
    }
    refused(&call("{}").replace("'{}'", "NULL"), "22004", &["targets"]);
    // A text names a column, whatever is in it.
    refused(
        "SELECT llm_batch.backfill('t', 'body', '{\"topic\":\"category\"}', 'ticket')",
        "42703",
        &["does not exist", "targets =>"],
    );
    // One column does not hold several fields, unless it is JSON.
    refused(
        "SELECT llm_batch.backfill('t', 'body', 'topic', 'ticket')",
        "42804",
        &["\"topic\" is of type text", "targets =>"],
    );
    assert_eq!(bed.provider.stats().requests, 0);

    // The owner needs UPDATE on all of them.
    let app = &mut bed.cluster.connect_as("postgres", "app");
    let e = error(app, &call("{\"topic\": \"category\", \"amount\": \"amount\"}"));
    assert!(e.0 == "42501" && e.1.contains("\"amount\""), "{e:?}");

    // One job a column.
    bed.provider.hold_after(1);
    let job = one(c, &call("{\"topic\": \"category\", \"amount\": \"amount\"}"));
    let e = error(c, &call("{\"due_on\": \"due\", \"amount\": \"amount\"}"));
    assert!(e.0 == "55006" && e.1.contains(&format!("job {job}")) && e.1.contains("\"amount\""), "{e:?}");
    let e = error(c, "SELECT llm_batch.backfill('t', 'body', 'topic', 'topic')");
    assert!(e.0 == "55006" && e.1.contains("\"topic\""), "{e:?}");
    bed.provider.release();
    bed.done(job);
}

/// A value that somebody writes meanwhile stays, and the rest of the row is written; NULL is asked once; all of it
/// survives a dump.
#[test]
fn null_is_an_answer() {
    let (bed, mut c) = bed("targets_nulls", Config::default());
    let c = &mut c;
    let more = "CASE WHEN id % 3 = 0 THEN ' no amount' END, CASE WHEN id % 5 = 0 THEN ' no category no amount no due no tags' END";
    tickets(c, "t", 1, 300, more);
    run(c, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 1)");
    bed.provider.hold_after(3);
    let job = one(
        c,
        &format!(
            "SELECT llm_batch.backfill('t', 'body', targets => '{TARGETS}', task => 'ticket', options => '{{\"max_rows_per_request\": 20}}')"
        ),
    );
    wait_until(
        "some rows are written",
        PATIENCE,
        || (bed.provider.holds(), progress(c, job).done),
        |p| p.0 && p.1 >= 40,
    );
    // Rows that are with the provider, or will be.
    run(
        c,
        "UPDATE t SET due_on = '1999-01-01' WHERE id > 200 AND id <= 250; UPDATE t SET topic = 'mine', amount = 1, due_on = '1999-01-01', tags = '{}' WHERE id > 250",
    );
    run(c, &format!("SELECT llm_batch.pause({job})"));
    bed.provider.release();
    wait_status(c, job, "paused");
    let (before, noted) = (asked(&bed), one(c, "SELECT count(*) FROM llm_batch.row_null"));
    assert!(noted > 0 && before < 300, "{noted} {before}");

    // A copy knows what was answered with NULL.
    run(c, "CREATE DATABASE copy");
    let dump = bed.cluster.run_program("pg_dump", &["-d", "postgres"]);
    let dump = String::from_utf8(dump.stdout).unwrap();
    let out = bed.cluster.psql("copy", &dump);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let there = &mut bed.cluster.connect("copy");
    let all = "SELECT concat(to_jsonb(j) - 'home', (SELECT array_agg(key_hash ORDER BY 1) FROM llm_batch.row_null)) FROM llm_batch.job j";
    assert_eq!(text(there, all).replace("copy", ""), text(c, all).replace("copy", ""));

    for (client, is_first) in [(&mut *c, true), (there, false)] {
        let before = asked(&bed);
        run(client, &format!("SELECT llm_batch.resume({job})"));
        let p = wait_status(client, job, "done");
        p.adds_up();
        assert_eq!((p.failed, p.skipped, p.left), (0, 0, 0), "{p:?}");
        // Rows that others have filled.
        assert_eq!(
            one(client, "SELECT count(*) FROM t WHERE id > 250 AND topic = 'mine' AND amount = 1 AND tags = '{}'"),
            50
        );
        assert_eq!(one(client, "SELECT count(*) FROM t WHERE id BETWEEN 201 AND 250 AND due_on = '1999-01-01'"), 50);
        run(client, "DELETE FROM t WHERE id > 250; UPDATE t SET due_on = NULL WHERE id > 200 AND body LIKE '%no due%'");
        run(client, &format!("UPDATE t SET due_on = {} WHERE id > 200 AND body NOT LIKE '%no due%'", date("due")));
        assert_eq!(wrong(client, "t", true), 0);
        if is_first {
            // Each row once, but those that came back from the pause.
            assert!(asked(&bed) <= 250, "{}", asked(&bed));
        } else {
            assert!(asked(&bed) - before < 250, "{} {before}", asked(&bed));
        }
    }
    // The job is done, and stays so: it asks nothing again that had NULL as an answer.
    run(c, "INSERT INTO t (id, body, want) SELECT -id, replace(body, '#r00', '#r90'), want FROM t WHERE id < 20");
    let again =
        one(c, "SELECT llm_batch.backfill('t', 'body', targets => '{\"amount\": \"amount\"}', task => 'ticket')");
    let p = bed.done(again);
    assert!(p.done > 19 && p.failed == 0, "{p:?}");
    // The notes go with the job.
    let noted = format!("SELECT count(*) FROM llm_batch.row_null WHERE job_id = {job}");
    assert!(one(c, &noted) > 0);
    run(c, &format!("SELECT llm_batch.forget({job})"));
    assert_eq!(one(c, &noted), 0);
}

/// The rows that the provider was asked so far.
fn asked(bed: &Bed) -> i64 {
    bed.provider.stats().rows.values().map(|r| i64::from(r.asked)).sum()
}

/// A row says which task answered it; that a NULL is the answer, later jobs know from that.
#[test]
fn rows_say_which_task_answered_them() {
    let (bed, mut c) = bed("targets_provenance", Config::default());
    let c = &mut c;
    let more = "CASE WHEN id % 3 = 0 THEN ' no amount' END, CASE WHEN id % 5 = 0 THEN ' no category no amount no due no tags' END";
    tickets(c, "t", 1, 120, more);
    run(
        c,
        "ALTER TABLE t ADD by jsonb, ADD other text; SELECT llm_batch.alter_model('m', max_concurrent_requests => 1);
         CREATE TABLE s AS SELECT * FROM t WHERE id % 5 > 0 LIMIT 20; ALTER TABLE s ADD PRIMARY KEY (id)",
    );
    provenance_is_refused(&bed, c);

    // One column.
    common::classifier(c, "kept", &labels_json(&common::LABELS), "m", "{}");
    let one_column =
        "SELECT llm_batch.backfill('s', 'body', 'topic', 'kept', options => '{\"provenance_column\": \"by\"}')";
    for how in ["asked", "reused"] {
        run(c, "UPDATE s SET topic = NULL");
        let job = one(c, one_column);
        assert_eq!(bed.done(job).counts(), (20, 20, 0, 0, 0, 0));
        let says = format!(
            "by - 'at' = '{{\"job\": {job}, \"task\": \"kept\", \"version\": 1, \"model\": \"m\", \"how\": \"{how}\"}}'
             AND (by->>'at')::timestamptz BETWEEN now() - '1 min'::interval AND now() AND topic = want"
        );
        assert_eq!(one(c, &format!("SELECT count(*) FROM s WHERE {says}")), 20, "{}", text(c, "SELECT by FROM s"));
    }

    versions_of_one_job(&bed, c);
    nulls_are_known(&bed, c);
}

/// Several columns. The task is altered while rows are asked, and somebody fills others.
fn versions_of_one_job(bed: &Bed, c: &mut Client) {
    bed.provider.hold_after(2);
    let job = of_tickets(c);
    wait_until(
        "some rows are written",
        PATIENCE,
        || (bed.provider.holds(), bed.provider.stats().in_flight, progress(c, job).done),
        |p| *p == (true, 1, 20),
    );
    // One job a column, whatever it is there for.
    for (target, task, options) in [("other", "topic", "{\"provenance_column\": \"by\"}"), ("by", "ticket", "{}")] {
        let call = format!("SELECT llm_batch.backfill('t', 'body', '{target}', '{task}', options => '{options}')");
        let e = error(c, &call);
        assert!(e.0 == "55006" && e.1.contains("\"by\"") && e.1.contains(&format!("job {job}")), "{e:?}");
    }
    run(
        c,
        "UPDATE t SET topic = 'mine', amount = 1, due_on = '1999-01-01', tags = '{}' WHERE id > 100 OR id IN (25, 28);
         UPDATE t SET by = '\"mine\"' WHERE id > 110;
         SELECT llm_batch.alter_extractor('ticket', instruction => 'Read with care.')",
    );
    let queued = "SELECT sum(queued)::bigint FROM llm_batch.activity";
    wait_until("nothing is queued", PATIENCE, || one(c, queued), |n| *n == 0);
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!((p.failed, p.skipped, p.left), (0, 0, 0), "{p:?}");
    // A value of somebody else's has no provenance of ours, be the row under way or not.
    assert!(bed.provider.stats().rows.contains_key("000025") && p.superseded >= 2, "{p:?}");
    let theirs = "SELECT count(*) FROM t WHERE topic = 'mine' AND by IS NOT DISTINCT FROM CASE WHEN id > 110 THEN '\"mine\"'::jsonb END";
    assert_eq!(one(c, theirs), 22);
    let bodies: Vec<String> = bed.provider.bodies().iter().map(ToString::to_string).collect();
    let rows = c
        .query("SELECT lpad(id::text, 6, '0'), by->>'version', by - '{at,nulls,input,version}'::text[] = jsonb_build_object('job', $1::bigint, 'task', 'ticket', 'model', 'm', 'how', 'asked') FROM t WHERE topic IS DISTINCT FROM 'mine'", &[&job])
        .unwrap();
    let mut of_version = [0; 2];
    for row in &rows {
        let (id, version): (String, String) = (row.get(0), row.get(1));
        let mark = format!("#r{id}:");
        let of_row = |body: &&String| body.contains("due") && body.contains(&mark);
        let last = bodies.iter().rfind(of_row).unwrap();
        let is_new = last.contains("Read with care.");
        assert_eq!(version, if is_new { "2" } else { "1" }, "{id}");
        assert!(row.get::<_, bool>(2), "{id}");
        of_version[usize::from(is_new)] += 1;
    }
    assert!(of_version[0] >= 28 && of_version[1] >= 10, "{of_version:?}");
    run(c, "UPDATE t SET topic = NULL, amount = NULL, due_on = NULL, tags = NULL, by = NULL WHERE topic = 'mine'");
    bed.done(of_tickets(c));
}

/// A job of `t`, 10 rows a request.
fn of_tickets(c: &mut Client) -> i64 {
    one(
        c,
        &format!(
            "SELECT llm_batch.backfill('t', 'body', targets => '{TARGETS}', task => 'ticket', options => '{{\"provenance_column\": \"by\", \"max_rows_per_request\": 10}}')"
        ),
    )
}

/// All rows of `t` were answered by version 2 of the task. A row whose answer is NULL is not asked again.
fn nulls_are_known(bed: &Bed, c: &mut Client) {
    let mut again = |sql: &str| {
        run(c, sql);
        let before = asked(bed);
        let estimate = format!(
            "SELECT rows FROM llm_batch.estimate('t', 'body', targets => '{TARGETS}', task => 'ticket', options => '{{\"provenance_column\": \"by\"}}')"
        );
        let rows = one(c, &estimate);
        let job = of_tickets(c);
        let p = bed.done(job);
        assert_eq!((p.total, p.done, p.failed, asked(bed) - before), (rows, rows, 0, rows), "{sql}: {p:?}");
        assert_eq!(wrong(c, "t", true), 0, "{sql}");
        rows
    };
    assert_eq!(again("SELECT"), 0);
    // The text has changed, back and forth; the NULL is somebody else's; what is there is nothing of ours.
    assert_eq!(again("UPDATE t SET body = concat(body, ' please') WHERE id % 5 = 0"), 24);
    assert_eq!(again("UPDATE t SET tags = NULL WHERE id IN (1, 3, 5)"), 2);
    assert_eq!(again("UPDATE t SET by = '[{\"nulls\": 1}]' WHERE id = 15; UPDATE t SET by = NULL WHERE id = 30"), 2);
    assert_eq!(
        again("UPDATE t SET by = jsonb_set(by, '{task}', '\"other\"') WHERE id = 45"),
        1,
        "another task's NULL is not this one's"
    );
    assert_eq!(again("SELECT"), 0);
    // Rows without an empty target are not asked again.
    assert_eq!(again("SELECT llm_batch.alter_extractor('ticket', instruction => 'Read once more.')"), 56);
    assert_eq!(again("SELECT"), 0);

    // It is in a dump as all of the table is, and so is the job's option.
    run(c, "CREATE DATABASE copy");
    let dump = String::from_utf8(bed.cluster.run_program("pg_dump", &["-d", "postgres"]).stdout).unwrap();
    let out = bed.cluster.psql("copy", &dump);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let there = &mut bed.cluster.connect("copy");
    let before = asked(bed);
    let job = of_tickets(there);
    let p = wait_status(there, job, "done");
    assert_eq!((p.total, asked(bed) - before), (0, 0));
    let options = format!("SELECT options->>'provenance_column' FROM llm_batch.job WHERE id = {}", job - 1);
    assert_eq!((text(there, &options), text(c, &options)), ("by".to_owned(), "by".to_owned()));
}

fn provenance_is_refused(bed: &Bed, c: &mut Client) {
    run(
        c,
        "CREATE TABLE k (id jsonb PRIMARY KEY, body text, topic text, by jsonb, made jsonb GENERATED ALWAYS AS (by) STORED);
         CREATE ROLE app LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO app;
         GRANT SELECT (id, body, topic), UPDATE (topic, by) ON k TO app;
         CREATE ROLE reader LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO reader;
         GRANT SELECT ON k TO reader; GRANT UPDATE (topic) ON k TO reader",
    );
    let call = |column: &str| {
        format!(
            "SELECT llm_batch.backfill('k', 'body', 'topic', 'topic', options => '{{\"provenance_column\": {column}}}')"
        )
    };
    for (column, state, hint) in [
        ("5", "22023", "of type jsonb"),
        ("\"topic\"", "22023", "of its own"),
        ("\"nothing\"", "42703", "ADD COLUMN nothing jsonb"),
        ("\"body\"", "42804", "of type jsonb"),
        ("\"id\"", "42809", "of its own"),
        ("\"made\"", "42809", "of its own"),
    ] {
        for call in
            [call(column), call(column).replace("SELECT llm_batch.backfill", "SELECT * FROM llm_batch.estimate")]
        {
            let e = error(c, &call);
            assert!(e.0 == state && e.3.contains(hint), "{call}: {e:?}");
        }
    }
    confidence_is_refused(bed, c);
    for role in ["app", "reader"] {
        let e = error(&mut bed.cluster.connect_as("postgres", role), &call("\"by\""));
        assert!(e.0 == "42501" && e.1.contains("\"by\"") && e.3.contains("provenance column"), "{role}: {e:?}");
    }
    // Only a job has rows to write it to.
    let e = error(
        c,
        "SELECT llm_batch.create_classifier('p', '[\"a\", \"b\"]', 'm', options => '{\"provenance_column\": \"by\"}')",
    );
    assert!(e.0 == "22023" && e.3.contains("of a job isolation, provenance_column, confidence_column"), "{e:?}");
}

/// Columns that cannot be the one for probabilities.
fn confidence_is_refused(bed: &Bed, c: &mut Client) {
    run(c, "ALTER TABLE k ADD sure real, ADD twice real GENERATED ALWAYS AS (1.0) STORED");
    let call = |column: &str| {
        let options = format!("options => '{{\"confidence_column\": {column}}}'");
        format!("SELECT llm_batch.backfill('k', 'body', 'topic', 'topic', {options})")
    };
    for (column, state, hint) in [
        ("5", "22023", "of type real or double precision or numeric"),
        ("\"topic\"", "22023", "of its own"),
        ("\"nothing\"", "42703", "ADD COLUMN nothing real"),
        ("\"by\"", "42804", "of type real or"),
        ("\"id\"", "42804", "of type real or"),
        ("\"twice\"", "42809", "of its own"),
    ] {
        let e = error(c, &call(column));
        assert!(e.0 == state && e.3.contains(hint), "{column}: {e:?}");
    }
    let e = error(&mut bed.cluster.connect_as("postgres", "app"), &call("\"sure\""));
    assert!(e.0 == "42501" && e.1.contains("\"sure\"") && e.3.contains("confidence column"), "{e:?}");
}

#[test]
fn faults_of_values_and_deaths_harm_no_row() {
    let (bed, mut c) = bed("targets_faults", Config { seed: 11, ..slow(20) });
    tickets(&mut c, "t", 1, 3000, "CASE WHEN id % 4 = 0 THEN ' no amount' END");
    run(&mut c, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 4)");
    let job = one(
        &mut c,
        &format!(
            "SELECT llm_batch.backfill('t', 'body', targets => '{TARGETS}', task => 'ticket', options => '{{\"max_rows_per_request\": 10, \"max_attempts\": 10}}')"
        ),
    );
    let faults = Fault::OF_VALUES.into_iter().chain(Fault::PASSING);
    bed.provider.configure(|config| config.faults = faults.map(|fault| (fault, 0.01)).collect());
    for part in [200, 900, 1700] {
        wait_until("rows are done", PATIENCE, || progress(&mut c, job).done, |done| *done >= part);
        let pid = wait_until("a worker", PATIENCE, || pids(&mut c, "llm_batch job"), |p| p.len() == 1)[0];
        // The server ends all sessions, and recovers.
        assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
        wait_until("the session ends", PATIENCE, || c.simple_query("SELECT 1").is_err(), |is_over| *is_over);
        c = reconnect(&bed);
        let half = "num_nulls(topic, due_on, tags) IN (1, 2) OR (num_nulls(topic, due_on, tags) = 0) <> (amount IS NOT NULL OR id % 4 = 0) AND id % 4 > 0";
        assert_eq!(one(&mut c, &format!("SELECT count(*) FROM t WHERE {half}")), 0);
        assert_eq!(wrong(&mut c, "t", false), 0);
    }
    let c = &mut c;
    let p = bed.done(job);
    assert_eq!(p.counts(), (3000, 3000, 0, 0, 0, 0), "{:?}", failures(c, job));
    assert_eq!(wrong(c, "t", true), 0);
}
