//! What a job will take is known before.

use std::collections::BTreeSet;

use llm_fake_provider::{Config, kinds};
use postgres::Client;

use super::{INPUT_PRICE, OUTPUT_PRICE, bed, bill, holds};
use crate::common::{backfill, backfill_with, error, one, run, text, wait_status, wrong};

/// The columns of an estimate of numbers: rows, requests, input and output tokens, rows of the sample; and the cost.
#[track_caller]
fn estimate(client: &mut Client, more: &str) -> ([i64; 5], String) {
    let sql = format!(
        "SELECT rows, requests, input_tokens, output_tokens, sample_rows, coalesce(cost::text, '')
           FROM llm_batch.estimate('tickets', input => 'body', target => 'topic', task => 'topic'{more})"
    );
    let row = client.query_one(&sql, &[]).unwrap_or_else(|e| panic!("{sql}\n{e:?}"));
    (std::array::from_fn(|i| row.get(i)), row.get(5))
}

#[track_caller]
fn close(estimated: i64, found: i64, percent: i64, what: &str) {
    assert!((estimated - found).abs() * 100 <= found * percent, "{what}: {estimated} was said, it was {found}");
}

#[test]
fn an_estimate_is_what_the_job_then_takes() {
    let (bed, mut c) = bed("money_estimate", Config::default(), 5_000);
    // Texts of all sizes; some rows have none, some are filled, some are filtered out.
    run(
        &mut c,
        "UPDATE tickets SET body = body || repeat(' and so on', (id % 7 * (id % 11))::int);
         UPDATE tickets SET body = NULL WHERE id % 100 = 1; UPDATE tickets SET body = repeat(' ', (id % 3)::int) WHERE id % 100 = 2;
         UPDATE tickets SET topic = want WHERE id % 100 = 3; ANALYZE tickets",
    );
    let (guess, _) = estimate(&mut c, ", filter => 'id > 500'");
    let stats = bed.provider.stats();
    assert_eq!(stats.requests, 0, "an estimate sent something: {stats:?}");
    // The lengths of answers are known when some have come.
    let some = "SELECT llm_classify_batch('SELECT id, body FROM tickets WHERE id <= 500', 'topic')";
    run(&mut c, some);
    let ([rows, requests, input, output, sample], cost) = estimate(&mut c, ", filter => 'id > 500'");
    assert_eq!((rows, sample), (4_500 - 45 * 3, 1_000));
    let job = backfill_with(&mut c, "tickets", "filter => 'id > 500'");
    let p = wait_status(&mut c, job, "done");
    assert_eq!(p.done, rows);
    close(requests, p.requests, 2, "requests");
    close(input, p.input_tokens, 2, "input");
    close(output, p.output_tokens, 2, "output");
    close(guess[1], p.requests, 2, "requests, as a guess");
    close(guess[2], p.input_tokens, 2, "input, as a guess");
    close(guess[3], p.output_tokens, 30, "output, as a guess");
    holds(&mut c, &format!("abs({cost} - {}) <= 0.02 * {}", p.cost, p.cost));
    holds(&mut c, &format!("{cost} = ({input} * {INPUT_PRICE} + {output} * {OUTPUT_PRICE}) * 0.000001"));
}

/// The same for the other kinds of tasks: what is said before and what is taken then, and the request that is shown.
#[test]
fn estimates_of_every_kind() {
    let (bed, mut c) = bed("money_kinds", Config::default(), 2_000);
    for (_, (task, setup, targets)) in kinds::<(String, String, String)>("estimates").unwrap() {
        run(&mut c, &setup);
        let call =
            |filter: &str| format!("'tickets', input => 'body', {targets}, task => '{task}', filter => '{filter}'");
        // The lengths of answers are known when some have come.
        let job = one(&mut c, &format!("SELECT llm_batch.backfill({})", call("id <= 500")));
        assert_eq!(wait_status(&mut c, job, "done").done, 500, "{task}");
        bed.provider.reset_stats();
        let sql = "SELECT rows, requests, input_tokens, output_tokens, example_request::text FROM";
        let said = c.query_one(&format!("{sql} llm_batch.estimate({})", call("id > 500")), &[]).unwrap();
        assert_eq!(bed.provider.stats().requests, 0, "{task}");
        let job = one(&mut c, &format!("SELECT llm_batch.backfill({})", call("id > 500")));
        let p = wait_status(&mut c, job, "done");
        assert_eq!((said.get::<_, i64>(0), p.done), (1_500, 1_500), "{task}");
        // Pages of the job need not end where requests do.
        let requests: i64 = said.get(1);
        assert!((requests - p.requests).abs() * 20 <= p.requests.max(20), "{task}: {requests} were said: {p:?}");
        close(said.get(2), p.input_tokens, 3, &format!("input of {task}"));
        close(said.get(3), p.output_tokens, 10, &format!("output of {task}"));
        let shown: serde_json::Value = serde_json::from_str(said.get(4)).unwrap();
        let sent = bed.provider.bodies().pop().unwrap();
        // All but the texts, and what depends on them.
        let keys = |of: &serde_json::Value| of.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(keys(&shown), keys(&sent), "{task}");
        for key in ["model", "temperature", "dimensions", "encoding_format", "response_format"] {
            assert_eq!(shown[key], sent[key], "{task}: {key}");
        }
        assert_eq!(shown["messages"][0], sent["messages"][0], "{task}");
    }
}

#[test]
fn estimates_count_the_same_text_once() {
    let (bed, mut c) = bed("money_same", Config::default(), 4_000);
    // 400 texts, one of them a thousand times, others up to ten times.
    run(
        &mut c,
        "UPDATE tickets t SET (body, want) = (SELECT o.body, o.want FROM tickets o
             WHERE o.id = CASE WHEN t.id <= 400 THEN t.id WHEN t.id % 4 = 0 THEN 1 ELSE 1 + (t.id * t.id) % 400 END)",
    );
    let texts = one(&mut c, "SELECT count(DISTINCT body) FROM tickets");
    // As it is unless someone says otherwise.
    run(&mut c, "SELECT llm_batch.alter_classifier('topic', options => '{}')");
    for sample in [300, 1_000] {
        let ([rows, requests, input, _, _], _) = estimate(&mut c, &format!(", sample_rows => {sample}"));
        assert_eq!((rows, requests), (4_000, (texts + 49) / 50));
        let (all, _) = estimate(&mut c, ", options => '{\"reuse\": false}'");
        assert_eq!(all[1], 80);
        assert!(input * 8 < all[2], "{input} {all:?}");
    }
    let job = backfill(&mut c, "tickets");
    let p = wait_status(&mut c, job, "done");
    assert_eq!(p.counts(), (4_000, 4_000, 0, 0, 0, 0));
    let reused = one(&mut c, "SELECT rows_reused FROM llm_batch.progress");
    assert_eq!(reused, 4_000 - texts);
    assert_eq!((wrong(&mut c, "tickets"), bed.provider.stats().rows.len() as i64), (0, texts));
    assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1));
    assert_eq!(p.cost, bill(&bed, &mut c));
}

#[test]
fn estimates_need_nobody_and_change_nothing() {
    let (bed, mut c) = bed("money_dead", Config::default(), 2_000);
    run(
        &mut c,
        "CREATE SERVER dead FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1');
         SELECT llm_batch.create_model('dead', server => 'dead', model => 'x', tokens_per_minute => 100000,
             requests_per_minute => 50);
         SELECT llm_batch.create_classifier('dead', labels => '[\"a\", \"b\"]', model => 'dead')",
    );
    let call = |task: &str, more: &str| {
        format!(
            "SELECT * FROM llm_batch.estimate('tickets', input => 'body', target => 'topic', task => '{task}'{more})"
        )
    };
    run(&mut c, "BEGIN TRANSACTION READ ONLY");
    let row = c
        .query_one(
            &format!(
                "SELECT rows, requests, input_tokens, cost::text, duration = make_interval(secs => greatest(
                        ceil((input_tokens + output_tokens) * 60.0 / 100000), ceil(requests * 60.0 / 50))::float8),
                        example_request #>> '{{model}}', example_request -> 'messages' IS NOT NULL
                   FROM ({}) e",
                call("dead", "")
            ),
            &[],
        )
        .unwrap();
    run(&mut c, "COMMIT");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (2_000, 40));
    assert!(row.get::<_, i64>(2) > 20_000);
    assert_eq!(row.get::<_, Option<String>>(3), None, "no prices");
    assert!(row.get::<_, bool>(4), "the tightest limit");
    assert_eq!((row.get::<_, &str>(5), row.get::<_, bool>(6)), ("x", true));
    // Without limits nobody knows how long; without rows nothing is taken.
    assert_eq!(text(&mut c, &format!("SELECT duration IS NULL FROM ({}) e", call("topic", ""))), "t");
    let (none, cost) = estimate(&mut c, ", filter => 'id < 0'");
    assert_eq!((none, cost.as_str()), ([0; 5], "0"));
    let (one_row, _) = estimate(&mut c, ", filter => 'id = 7'");
    assert_eq!((one_row[0], one_row[1], one_row[4]), (1, 1, 1));
    // Rights: SELECT is enough, and needed.
    run(&mut c, "CREATE ROLE reader LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO reader; SET ROLE reader");
    assert_eq!(error(&mut c, &call("topic", "")).0, "42501");
    run(&mut c, "RESET ROLE; GRANT SELECT ON tickets TO reader; SET ROLE reader");
    assert_eq!(estimate(&mut c, "").0[0], 2_000);
    assert_eq!(
        error(&mut c, "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic')").0,
        "42501"
    );
    run(&mut c, "RESET ROLE");
    for (sql, code) in [
        (call("topic", ", sample_rows => 0"), "22023"),
        (call("topic", ", sample_rows => 4001"), "22023"),
        (call("topic", ", options => '{\"max_tokens\": 5}'"), "22023"),
        (call("topic", ", filter => 'no_such_column'"), "42703"),
        (call("nothing", ""), "42704"),
        (call("topic", "").replace("'body'", "'random()::text'"), "0A000"),
    ] {
        let (found, message, ..) = error(&mut c, &sql);
        assert_eq!(found, code, "{sql}: {message}");
    }
    // On a large partitioned table, and with long texts, of which fewer make the sample.
    run(
        &mut c,
        "CREATE TABLE parts (id bigint PRIMARY KEY, body text, topic text) PARTITION BY HASH (id);
         CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO parts SELECT i, i || repeat(' long', 2000) FROM generate_series(1, 2000) i",
    );
    let row = c.query_one(&call("topic", "").replace("'tickets'", "'parts'"), &[]).unwrap();
    let (rows, requests, sample): (i64, i64, i64) = (row.get(0), row.get(1), row.get("sample_rows"));
    assert_eq!(rows, 2_000);
    assert!((200..=220).contains(&sample) && (250..=2_000).contains(&requests), "{sample} {requests}");
    let stats = bed.provider.stats();
    assert_eq!(stats.requests, 0, "{stats:?}");
    assert_eq!(one(&mut c, "SELECT count(*) FROM llm_batch.job"), 0);
}
