//! The wire against a real model server (llama.cpp's), if `LLM_BATCH_TEST_MODEL_URL` names one, such as
//! `http://127.0.0.1:8080/v1`. The model is small and its answers are nonsense; that it is asked, answers in the form
//! it is asked for, and that its tokens are counted is what is tested.

mod common;

use common::*;
use llm_fake_provider::{Config, FakeProvider, Fault};
use pg_llm_batch_e2e::Cluster;
use postgres::Client;

#[test]
fn a_real_model_is_asked() {
    let Ok(url) = std::env::var("LLM_BATCH_TEST_MODEL_URL") else {
        eprintln!("SKIPPED a_real_model_is_asked: LLM_BATCH_TEST_MODEL_URL is not set");
        return;
    };
    let cluster = Cluster::builder("wire").start();
    let mut c = cluster.connect("postgres");
    install(&mut c, &url);
    model(&mut c, "m", "request_timeout => '60 s', max_request_tokens => 2000, parameters => '{\"temperature\": 0}'");
    // This form names each row and the labels in its schema: even a model that knows nothing must answer in it.
    let options = r#"{"answer_shape": "properties", "structured_output": "json_schema", "max_rows_per_request": 3}"#;
    classifier(&mut c, "mood", r#"["positive", "neutral", "negative"]"#, "m", options);

    let answers = c
        .query(
            r#"SELECT id, label, status, detail FROM llm_classify_batch(
                 $$ VALUES (1, 'I love it.'), (2, 'It is a table.'), (3, 'The worst day of my "life" \ 日本語') $$, 'mood')"#,
            &[],
        )
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(answers.len(), 3);
    let mut labelled = 0;
    for row in &answers {
        let (id, label): (String, Option<String>) = (row.get(0), row.get(1));
        let (status, detail): (String, Option<String>) = (row.get(2), row.get(3));
        println!("{id} {label:?} {status} {detail:?}");
        match status.as_str() {
            "ok" => assert!(label.is_some_and(|l| ["positive", "neutral", "negative"].contains(&l.as_str()))),
            "skipped" | "failed" => assert!(label.is_none() && detail.is_some()),
            _ => panic!("{status}"),
        }
        labelled += i32::from(status == "ok");
    }
    assert!(labelled > 0, "the schema forces an answer for each row");
    let requests = "SELECT requests_total FROM llm_batch.activity WHERE model = 'fake-m'";
    assert!(one(&mut c, requests) > 0);

    run(&mut c, "CREATE TABLE t (id int PRIMARY KEY, body text, topic text)");
    run(&mut c, "INSERT INTO t VALUES (1, 'Great!'), (2, 'Awful.'), (3, 'A chair.'), (4, 'So happy today')");
    let job = one(&mut c, "SELECT llm_batch.backfill('t', input => 'body', target => 'topic', task => 'mood')");
    let p = wait_status(&mut c, job, "done");
    println!("{p:?}");
    assert_eq!((p.total, p.left, p.superseded), (4, 0, 0));
    assert_eq!(p.done, one(&mut c, "SELECT count(*) FROM t WHERE topic IN ('positive', 'neutral', 'negative')"));
    assert!(p.done > 0 && p.requests >= 2, "4 rows do not fit one request of 3");
    assert!(p.input_tokens > 100 && p.output_tokens > 10, "the model's own counts");

    // The other forms: whatever it answers, each row has its state, or the statement says that no answer is valid.
    for shape in ["map", "properties"] {
        let sql = format!(
            r#"SELECT count(*) FROM llm_classify_batch($$ VALUES (1, 'I love it.'), (2, 'Bad') $$, 'mood',
                 '{{"answer_shape": "{shape}", "structured_output": "auto", "max_attempts": 1}}')
                WHERE status IN ('ok', 'skipped', 'failed')"#
        );
        match c.query_one(&sql, &[]) {
            Ok(row) => assert_eq!(row.get::<_, i64>(0), 2, "{shape}"),
            Err(e) => {
                let e = e.as_db_error().unwrap_or_else(|| panic!("{shape}: {e:?}"));
                println!("{shape}: {e}: {:?}", e.detail());
                assert_eq!(e.message(), r#"model "m" gives no valid answer to this task"#, "{shape}");
            }
        }
    }
}

#[test]
fn what_is_sent_is_what_openai_documents() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let cluster = Cluster::builder("sent").start();
    let mut c = cluster.connect("postgres");
    install(&mut c, &provider.base_url());
    model(&mut c, "m", "parameters => '{\"temperature\": 0, \"seed\": 7}'");
    classifier(&mut c, "topic", &labels_json(&LABELS), "m", r#"{"structured_output": "json_schema"}"#);
    run(&mut c, "SELECT llm_classify('#r000001:bug#', 'topic'), llm_classify('#r000002:spam#', 'topic')");
    let bodies = provider.bodies();
    assert_eq!(bodies.len(), 2);
    for body in &bodies {
        assert_eq!(body["model"], "fake-m");
        assert_eq!((&body["temperature"], &body["seed"]), (&0.into(), &7.into()));
        assert_eq!(body["messages"].as_array().unwrap().len(), 2);
        assert_eq!((&body["messages"][0]["role"], &body["messages"][1]["role"]), (&"system".into(), &"user".into()));
        assert!(body["max_tokens"].as_u64().is_some_and(|n| n > 0));
        assert_eq!(body["response_format"]["type"], "json_schema");
        assert_eq!(body["response_format"]["json_schema"]["strict"], false);
        assert!(body.get("stream").is_none_or(|s| s == false));
    }
    // Nothing but the rows changes from request to request, so that prompt caches hit.
    assert_eq!(bodies[0]["messages"][0], bodies[1]["messages"][0]);
    assert_eq!(bodies[0]["response_format"], bodies[1]["response_format"]);
    assert_ne!(bodies[0]["messages"][1], bodies[1]["messages"][1]);
}

/// The part of a text between two others.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    Some(text.split_once(before)?.1.split_once(after)?.0)
}

/// A job in each dialect, with the server and the model as the documents write them but for the address and the key.
#[test]
fn the_examples_of_providers_fill_a_table_each() {
    const KEY: &str = "key-0123456789abcdef";
    let provider = FakeProvider::start(Config { api_key: Some(KEY.to_owned()), ..Config::default() }).unwrap();
    let cluster = Cluster::builder("dialects").start();
    let mut c = cluster.connect("postgres");
    run(&mut c, "CREATE EXTENSION pg_llm_batch");
    let mut rows = 0;
    let with_server = |example: &&str| example.contains("CREATE SERVER ");
    for example in include_str!("../../docs/providers.md").split("```sql\n").skip(1).filter(with_server) {
        let example = example.split_once("```").unwrap().0;
        let (api, model) = (between(example, "api '", "'").unwrap(), between(example, "create_model('", "'").unwrap());
        let (server, here) = (between(example, "CREATE SERVER ", " ").unwrap(), provider.base_of(api));
        let mut sql = match between(example, "base_url '", "'") {
            Some(there) => example.replace(there, &here),
            None => example.replace(&format!("api '{api}'"), &format!("api '{api}', base_url '{here}'")),
        };
        match between(example, "api_key '", "'") {
            Some(key) => sql = sql.replace(&format!("api_key '{key}'"), &format!("api_key '{KEY}'")),
            None => sql += &format!("; CREATE USER MAPPING FOR PUBLIC SERVER {server} OPTIONS (api_key '{KEY}')"),
        }
        run(&mut c, &sql);
        let options = if api == "systemone" { r#"{"ask_by": "decisions"}"# } else { "{}" };
        classifier(&mut c, &format!("topic_{model}"), &labels_json(&LABELS), model, options);
        run(&mut c, &format!("CREATE TABLE {server} (id int PRIMARY KEY, body text, want text, topic text)"));
        let body = "format('No. %s: #r%s:%s#', n, lpad(n::text, 6, '0'), want)";
        let (first, last) = (rows + 1, rows + 60);
        run(
            &mut c,
            &format!(
                "INSERT INTO {server} SELECT n, {body}, want
                   FROM generate_series({first}, {last}) n, LATERAL (SELECT ('{{{}}}'::text[])[1 + n % 8]) l (want)",
                LABELS.join(",")
            ),
        );
        let job = one(
            &mut c,
            &format!(
                "SELECT llm_batch.backfill('{server}', input => 'body', target => 'topic', task => 'topic_{model}')"
            ),
        );
        let p = wait_status(&mut c, job, "done");
        assert_eq!((p.total, p.done, p.left), (60, 60, 0), "{api}: {p:?}");
        assert_eq!(one(&mut c, &format!("SELECT count(*) FROM {server} WHERE topic = want")), 60, "{api}");
        rows = last;
    }
    assert!(rows >= 5 * 60, "{rows} rows of all examples");
    let stats = provider.stats();
    assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{:?}", stats.by_status);
    vectors(&mut c);
    decisions(&mut c, &provider);
    scores(&mut c, &provider);
    in_either_way(&mut c, &provider);
    what_cannot_be_decided(&mut c, &provider);
    assert!(!cluster.log().contains(KEY));
}

/// The example of embeddings, as it is written.
fn vectors(c: &mut Client) {
    let (_, section) = include_str!("../../docs/providers.md").split_once("## Embeddings").unwrap();
    run(c, "CREATE TABLE tickets (id int PRIMARY KEY, body text); INSERT INTO tickets SELECT id, body FROM openai");
    run(c, between(section, "```sql\n", "```").unwrap());
    let job = one(c, "SELECT max(job_id) FROM llm_batch.progress");
    let p = wait_status(c, job, "done");
    assert_eq!((p.total, p.done, p.left), (60, 60, 0), "{p:?}");
    assert_eq!(one(c, "SELECT count(*) FROM tickets WHERE array_length(v, 1) = 512"), 60);
}

/// The tables of two servers are filled once more, by decisions, while answers are dropped, doubled and invented. Queries ask too.
fn decisions(c: &mut Client, provider: &FakeProvider) {
    let (_, section) = include_str!("../../docs/providers.md").split_once("## Decisions").unwrap();
    run(c, between(section, "```sql\n", "```").unwrap());
    run(c, "SELECT llm_batch.create_model('decide2', server => 'gemini', model => 'gemini-decision-1')");
    let faults = Fault::OF_DECISIONS.into_iter().filter(|f| !matches!(f, Fault::Refusal | Fault::MalformedJson));
    let faults: Vec<_> = faults.map(|fault| (fault, 0.03)).collect();
    for (model, table) in [("decide", "openai"), ("decide2", "gemini")] {
        let options = r#"{"ask_by": "decisions", "max_rows_per_request": 10, "max_attempts": 10}"#;
        classifier(c, &format!("by_{table}"), &labels_json(&LABELS), model, options);
        run(c, &format!("ALTER TABLE {table} ADD decided text, ADD sure numeric"));
        provider.configure(|config| config.faults.clone_from(&faults));
        let column = r#"options => '{"confidence_column": "sure"}'"#;
        let job = one(c, &format!("SELECT llm_batch.backfill('{table}', 'body', 'decided', 'by_{table}', {column})"));
        let p = wait_status(c, job, "done");
        provider.configure(|config| config.faults = Vec::new());
        assert_eq!((p.total, p.done, p.left, p.output_tokens), (60, 60, 0, 0), "{table}: {p:?}");
        // The fake gives each of its labels nine tenths and a share of the rest.
        let sure = format!("SELECT count(*) FROM {table} WHERE decided = want AND sure = 0.9 + 0.1 / {}", LABELS.len());
        assert_eq!(one(c, &sure), 60, "{table}");
        assert!(provider.bodies().last().unwrap().get("questions").is_some());
    }
    let options = r#"'{"model": "decide", "ask_by": "decisions"}'"#;
    let labels = LABELS.join(",");
    for (query, rows) in [
        (format!("SELECT count(*) FROM openai WHERE llm_classify(body, '{{{labels}}}'::text[], {options}) = want"), 60),
        (format!("SELECT count(*) FROM openai WHERE llm_filter(body, 'Is it a ticket?', {options})"), 60),
        (
            "SELECT count(*) FROM llm_run_batch('SELECT id, body FROM openai', 'by_openai') WHERE status = 'ok'".into(),
            60,
        ),
    ] {
        assert_eq!(one(c, &query), rows, "{query}");
        assert!(provider.bodies().last().unwrap().get("questions").is_some(), "{query}");
    }
    let sure = "SELECT count(*) FROM llm_run_batch('SELECT id, body FROM openai', 'by_openai') WHERE confidence = (0.9 + 0.1 / 8)::real";
    assert_eq!(one(c, sure), 60);
    let array = "llm_run_array(ARRAY[1], (SELECT array_agg(body) FROM openai WHERE id = 1), 'by_openai')";
    assert_eq!(one(c, &format!("SELECT count(*) FROM {array} WHERE confidence > 0.9")), 1);
    let in_chat = "llm_run_batch('SELECT id, body FROM anthropic', 'topic_haiku')";
    assert_eq!(one(c, &format!("SELECT count(confidence) FROM {in_chat}")), 0);
    run(
        c,
        r#"SELECT llm_batch.create_model('luna_p', server => 'openai', model => 'gpt-6-luna', parameters => '{"logprobs": true}')"#,
    );
    classifier(c, "with_logprobs", &labels_json(&LABELS), "luna_p", "{}");
    let with_logprobs = "llm_run_batch('SELECT id, body FROM openai', 'with_logprobs')";
    assert_eq!(one(c, &format!("SELECT count(*) FROM {with_logprobs} WHERE confidence BETWEEN 0.5 AND 0.9")), 60);
    // One question is refused: its row has no label, at once.
    provider.script([Some(Fault::Refusal)]);
    let refused = "SELECT string_agg(detail, ';') FROM llm_run_batch(\
                   'SELECT id, body || ''!'' FROM openai WHERE id <= 10', 'by_openai') WHERE status <> 'ok'";
    assert!(text(c, refused).starts_with("refused"), "{}", text(c, refused));
}

/// Scores by decisions, in queries and in a job of the example's scorer, are those that a chat gives.
fn scores(c: &mut Client, provider: &FakeProvider) {
    run(
        c,
        r#"ALTER TABLE openai ADD score numeric;
           SELECT llm_batch.create_scorer('in_chat', 'How urgent?', 0, 1, 'luna');
           SELECT llm_batch.create_scorer('decided', 'How urgent?', 0, 1, 'decide', options => '{"ask_by": "decisions"}')"#,
    );
    for (task, asks) in [("decided", "questions"), ("urgency", "questions"), ("in_chat", "messages")] {
        run(c, "UPDATE openai SET score = NULL");
        let job = one(
            c,
            &format!(
                "SELECT llm_batch.backfill('openai', 'body', 'score', '{task}', options => '{{\"reuse\": false}}')"
            ),
        );
        let p = wait_status(c, job, "done");
        assert_eq!((p.total, p.done, p.left), (60, 60, 0), "{task}: {p:?}");
        assert_eq!(one(c, "SELECT count(*) FROM openai WHERE abs(score - (id % 101) / 100.0) < 0.0001"), 60, "{task}");
        assert!(provider.bodies().last().unwrap().get(asks).is_some(), "{task}");
    }
    let options = r#"'{"model": "decide", "ask_by": "decisions"}'"#;
    let first =
        format!("SELECT id::bigint FROM openai ORDER BY llm_score(body, 'How urgent?', {options}) DESC LIMIT 1");
    assert_eq!(one(c, &first), 60);
}

/// A task that may be asked in either way goes on where decisions are no longer served.
fn in_either_way(c: &mut Client, provider: &FakeProvider) {
    let options = r#"{"ask_by": "auto", "reuse": false}"#;
    classifier(c, "either", &labels_json(&LABELS), "decide", options);
    for (column, is_served) in [("e1", true), ("e2", false)] {
        provider.configure(|config| config.decisions = is_served);
        run(c, &format!("ALTER TABLE openai ADD {column} text"));
        let job = one(c, &format!("SELECT llm_batch.backfill('openai', 'body', '{column}', 'either')"));
        let p = wait_status(c, job, "done");
        assert_eq!((p.total, p.done, p.left), (60, 60, 0), "{column}: {p:?}");
        assert_eq!(one(c, &format!("SELECT count(*) FROM openai WHERE {column} = want")), 60, "{column}");
    }
    // The labels are eight: a chat is cheaper.
    let asked_by =
        "SELECT string_agg(asked_by, ',') FROM llm_batch.activity WHERE model = 'gpt-6-luna' AND asked_by = 'chats'";
    assert_eq!(text(c, asked_by), "chats");
    provider.configure(|config| config.decisions = true);
}

fn what_cannot_be_decided(c: &mut Client, provider: &FakeProvider) {
    run(c, "SELECT llm_batch.create_model('gone', server => 'openai', model => 'gpt-7')");
    let labels = r#"'["a", "b"]', "#;
    let by = r#"options => '{"ask_by": "decisions"}'"#;
    provider.configure(|config| config.decisions = false);
    for (sql, code, says) in [
        (
            format!("SELECT llm_batch.create_extractor('g', '{{\"n\": \"int\"}}', model => 'decide', {by})"),
            "22023",
            "\"extract\" cannot be asked",
        ),
        ("SELECT llm_batch.create_scorer('g', 'x', 0, 1, 'laya')".into(), "0A000", "with the option \"ask_by\": \"decisions\""),
        (
            "CREATE SERVER s1 FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'systemone')".into(),
            "",
            "the API has no address of its own",
        ),
        (format!("SELECT llm_batch.create_classifier('g', {labels}'haiku', {by})"), "0A000", "serves no decisions"),
        (format!("SELECT llm_batch.alter_classifier('topic_haiku', {by})"), "0A000", "serves no decisions"),
        ("SELECT llm_batch.alter_classifier('by_openai', model => 'haiku')".into(), "0A000", "serves no decisions"),
        (
            r#"SELECT llm_generate('x', 'y', '{"model": "decide", "ask_by": "decisions"}')"#.into(),
            "22023",
            "\"generate\" cannot be asked",
        ),
        (
            r#"SELECT llm_batch.backfill('anthropic', 'body', 'topic', 'topic_haiku', options => '{"ask_by": "decisions"}')"#
                .into(),
            "0A000",
            "serves no decisions",
        ),
        (r#"SELECT llm_filter('x', 'y', '{"model": "gone", "ask_by": "decisions"}')"#.into(), "", "asks in a chat"),
        (r#"SELECT llm_filter('x', 'y', '{"model": "decide", "ask_by": "any"}')"#.into(), "22023", "auto, chat, decisions"),
    ] {
        let (found, message, detail, hint) = error(c, &sql);
        let all = format!("{message}\n{detail}\n{hint}");
        assert!((found == code || code.is_empty()) && all.contains(says), "{sql}\n{found} {all}");
    }
}

/// The first job and what watches it, as the README writes them but for the address and the key. The superuser's part is the
/// first example, the rest is `analyst`'s.
#[test]
fn the_readme_runs_as_written() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let cluster = Cluster::builder("readme").start();
    let mut superuser = cluster.connect("postgres");
    run(&mut superuser, "CREATE ROLE analyst LOGIN; GRANT CREATE ON SCHEMA public TO analyst");
    let mut analyst = cluster.connect_as("postgres", "analyst");
    run(&mut analyst, "CREATE TABLE tickets (id int PRIMARY KEY, body text)");
    let bodies = "SELECT n, format('No. %s: #r%s:billing#', n, lpad(n::text, 6, '0')) FROM generate_series(1, 60) n";
    run(&mut analyst, &format!("INSERT INTO tickets {bodies}"));

    let readme = include_str!("../../README.md")
        .replace("https://api.openai.com/v1", &provider.base_url())
        .replace("sk-…", "sk-1234");
    let examples = between(&readme, "## A first job", "## What it promises").unwrap();
    let examples: Vec<&str> = examples.split("```sql\n").skip(1).map(|e| e.split("```").next().unwrap()).collect();
    let [setup, tasks, queries, one_column, columns, watch] = examples[..] else { panic!("{examples:#?}") };
    run(&mut superuser, setup);
    run(&mut analyst, tasks);
    run(&mut analyst, "SET llm_batch.default_model = 'mini'");
    for sql in [queries, one_column] {
        run(&mut analyst, sql);
    }
    wait_status(&mut analyst, 1, "done");
    run(&mut analyst, columns);
    let p = wait_status(&mut analyst, 2, "done");
    assert_eq!((p.total, p.left, p.failed), (60, 0, 0), "{p:?}");
    assert_eq!(one(&mut analyst, "SELECT count(*) FROM tickets WHERE topic = 'billing' AND gist IS NOT NULL"), 60);
    for line in watch.lines() {
        let statement = line.split("--").next().unwrap().replace("\\watch 2", "");
        match analyst.batch_execute(&statement) {
            Ok(()) => assert!(!statement.contains("pause("), "{statement}"),
            // The job has ended.
            Err(e) => assert!(statement.contains("pause(") && e.code().is_some(), "{statement}: {e:?}"),
        }
    }
}
