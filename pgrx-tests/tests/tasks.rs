//! Tasks of every kind: how they are made, changed and dropped, what their versions are, and jobs whose answers are texts,
//! numbers and objects.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use common::{Bed, PATIENCE, error, failures, one, refused, run, text};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;
use serde_json::{Value, json};

/// The names of an extractor's fields in their order.
fn fields(client: &mut Client, name: &str) -> String {
    text(
        client,
        &format!(
            "SELECT string_agg(f->>'name', ' ' ORDER BY n) FROM llm_batch.task,
                    jsonb_array_elements(spec->'fields') WITH ORDINALITY x (f, n) WHERE name = '{name}'"
        ),
    )
}

/// Calls resolve with and without types, by position and by name; NULL is what is not given.
#[test]
fn every_function_in_every_form() {
    let bed = Bed::new("tasks_forms");
    let c = &mut bed.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    extractors(c);
    scorers(c);
    versions(c);
    changed_by_two(&bed, c);
    kinds_are_kept_apart(c);
}

fn extractors(c: &mut Client) {
    let object = r#"'{"zebra": "date", "b": "numeric", "aa": {"labels": ["x", "y"]}}'"#;
    for (fields_given, order) in [
        (object.to_owned(), "zebra b aa"),
        (format!("{object}::text"), "zebra b aa"),
        (format!("{object}::json"), "zebra b aa"),
        (format!("{object}::jsonb"), "b aa zebra"),
        (format!("json {object}"), "zebra b aa"),
        (r#"'[{"name": "b", "type": "date"}, {"name": "a"}]'::jsonb"#.to_owned(), "b a"),
    ] {
        for call in [
            format!("create_extractor('e', {fields_given})"),
            format!("create_extractor('e', {fields_given}, 'm', 'Bills.', '[]', '{{}}')"),
            format!("create_extractor(name => 'e', fields => {fields_given}, model => NULL, instruction => NULL)"),
            format!("create_extractor('e', {fields_given}, examples => NULL, options => NULL)"),
        ] {
            run(c, &format!("SELECT llm_batch.{call}"));
            assert_eq!(fields(c, "e"), order, "{call}");
            run(c, "SELECT llm_batch.drop_task('e')");
        }
        run(c, "SELECT llm_batch.create_extractor('e', '{\"q\": \"text\"}')");
        for call in [
            format!("alter_extractor('e', {fields_given})"),
            format!("alter_extractor('e', fields => {fields_given}, options => '{{\"reuse\": false}}')"),
            "alter_extractor('e', instruction => 'x')".to_owned(),
            "alter_extractor('e', NULL, NULL, NULL, NULL, NULL)".to_owned(),
            "alter_extractor('e')".to_owned(),
        ] {
            run(c, &format!("SELECT llm_batch.{call}"));
            assert_eq!(fields(c, "e"), order, "{call}");
        }
        let rest = "SELECT concat_ws(' ', spec->>'instruction', options) FROM llm_batch.task WHERE name = 'e'";
        assert_eq!(text(c, rest), "x {\"reuse\": false}");
        run(c, "SELECT llm_batch.drop_task('e')");
    }
    let create = |fields: &str, more: &str| format!("SELECT llm_batch.create_extractor('e', '{fields}'{more})");
    for (call, code, says) in [
        (create("{\"a\": \"money\"}", ""), "22023", ["money", "numeric"]),
        (create("{}", ""), "22023", ["1 to 26 fields", ""]),
        (create("[1]", ""), "22023", ["fields must be", "Write"]),
        (create("a, b", ""), "22P02", ["fields given as text must be JSON", "Write"]),
        (create("{\"a\": \"text\", \"A\": \"date\"}", ""), "22023", ["given twice", ""]),
        (create("{\"a\": {\"type\": \"text\", \"words\": 3}}", ""), "22023", ["\"words\"", "max_words"]),
        (
            create("{\"a\": \"date\"}", ", examples => '[{\"input\": \"x\", \"answer\": {\"b\": 1}}]'"),
            "22023",
            ["field \"b\" that does not exist", ""],
        ),
        (
            create("{\"a\": \"date\"}", ", examples => '[{\"input\": \"x\", \"answer\": {\"a\": \"today\"}}]'"),
            "22023",
            ["\"today\" for the field \"a\"", "a date"],
        ),
        (create("{\"a\": \"date\"}", ", options => '{\"max_words\": 3}'"), "22023", ["\"max_words\"", ""]),
        (create("{\"a\": \"date\"}", ", options => '{\"max_cost\": 3}'"), "22023", ["\"max_cost\"", "budget"]),
        (create("{\"a\": \"date\"}", ", options => '7'"), "22023", ["object", ""]),
        ("SELECT llm_batch.create_extractor(NULL, '{\"a\": \"date\"}')".into(), "22004", ["\"name\"", ""]),
        ("SELECT llm_batch.create_extractor('e', NULL)".into(), "22004", ["\"fields\"", ""]),
        ("SELECT llm_batch.create_extractor('', '{\"a\": \"date\"}')".into(), "22023", ["1 to 200", ""]),
        ("SELECT llm_batch.create_extractor('e', '{\"a\": \"date\"}', 'n')".into(), "42704", ["model \"n\"", ""]),
        ("SELECT llm_batch.alter_extractor(NULL)".into(), "22004", ["\"name\"", ""]),
        ("SELECT llm_batch.alter_extractor('gone')".into(), "42704", ["task \"gone\"", "create_extractor"]),
        ("SELECT llm_batch.drop_task(NULL)".into(), "22004", ["\"name\"", ""]),
        ("SELECT llm_batch.drop_task('gone')".into(), "42704", ["task \"gone\"", "create_classifier"]),
    ] {
        refused(c, &call, code, &says);
    }
    assert_eq!(one(c, "SELECT count(*) FROM llm_batch.task"), 1);
}

fn scorers(c: &mut Client) {
    let spec = |c: &mut Client, name: &str| -> Value {
        serde_json::from_str(&text(c, &format!("SELECT spec FROM llm_batch.task WHERE name = '{name}'"))).unwrap()
    };
    run(
        c,
        "SELECT llm_batch.create_scorer('s', 'How angry?');
         SELECT llm_batch.create_scorer('s2', 'How angry?', 1, 5);
         SELECT llm_batch.create_scorer('s3', instruction => 'How angry?', low => '-1.50', high => 1.5::float8::numeric, model => 'm',
                    examples => '[{\"input\": \"x\", \"answer\": 1}]', options => '{}')",
    );
    let range =
        |c: &mut Client, name| (spec(c, name)["low"].as_f64().unwrap(), spec(c, name)["high"].as_f64().unwrap());
    assert_eq!((range(c, "s"), range(c, "s2"), range(c, "s3")), ((0.0, 1.0), (1.0, 5.0), (-1.5, 1.5)));
    run(c, "SELECT llm_batch.alter_scorer('s', high => 10), llm_batch.alter_scorer('s2', NULL, 0)");
    assert_eq!((range(c, "s"), range(c, "s2")), ((0.0, 10.0), (0.0, 5.0)));

    for (call, code, says) in [
        ("create_scorer('x', 'y', 5, 1)", "22023", ["not below", ""]),
        ("create_scorer('x', 'y', 'NaN', 1)", "22023", ["\"low\"", "NaN"]),
        ("create_scorer('x', 'y', 0, 'infinity')", "22023", ["\"high\"", ""]),
        ("create_scorer('x', 'y', 0, 1e400)", "22023", ["\"high\"", ""]),
        ("create_scorer('x', 'y', NULL, 1)", "22004", ["\"low\"", ""]),
        ("create_scorer('x', '')", "22023", ["instruction must not be empty", ""]),
        (
            "create_scorer('x', 'y', examples => '[{\"input\": \"x\", \"answer\": 7}]')",
            "22023",
            ["within the range", ""],
        ),
        ("create_scorer('x', 'y', options => '{\"max_words\": 7}')", "22023", ["\"max_words\"", ""]),
        ("create_scorer('x', NULL)", "22004", ["\"instruction\"", ""]),
        ("create_scorer('x', 'y', examples => '[{\"input\": \"x\"}]')", "22023", ["\"answer\"", "Write"]),
        ("alter_scorer('s', '')", "22023", ["instruction must not be empty", ""]),
        ("alter_scorer('s3', high => 0.5)", "22023", ["within the range", ""]),
    ] {
        refused(c, &format!("SELECT llm_batch.{call}"), code, &says);
    }
    assert_eq!(one(c, "SELECT count(*) FROM llm_batch.task WHERE name = 'x'"), 0);
}

/// A name and a version never mean two things.
fn versions(c: &mut Client) {
    let version = |c: &mut Client| one(c, "SELECT version::bigint FROM llm_batch.task WHERE name = 'v'");
    let history = |c: &mut Client| {
        text(
            c,
            "SELECT string_agg(concat_ws(' ', version, kind, spec->>'instruction', spec->>'dimensions'), ', ' ORDER BY version)
               FROM llm_batch.task_history WHERE name = 'v' AND owner_name = 'postgres' AND replaced_at <= now()",
        )
    };
    run(c, "SELECT llm_batch.create_embedder('v', 'm', 1)");
    assert_eq!(version(c), 1);
    run(c, "SELECT llm_batch.alter_embedder('v', dimensions => 2)");
    assert_eq!((version(c), history(c).as_str()), (2, "1 embed 1"));
    // A change that is refused or rolled back makes no version.
    refused(c, "SELECT llm_batch.alter_embedder('v', dimensions => 0)", "22023", &[]);
    run(c, "BEGIN; SELECT llm_batch.alter_embedder('v', dimensions => 9); ROLLBACK");
    assert_eq!((version(c), history(c).as_str()), (2, "1 embed 1"));
    run(c, "SELECT llm_batch.drop_task('v'); SELECT llm_batch.create_scorer('v', 'three')");
    assert_eq!((version(c), history(c).as_str()), (3, "1 embed 1, 2 embed 2"));
    run(c, "SELECT llm_batch.alter_scorer('v', low => -1), llm_batch.alter_scorer('v', 'five')");
    assert_eq!(history(c), "1 embed 1, 2 embed 2, 3 score three, 4 score three");
    run(c, "BEGIN; SELECT llm_batch.drop_task('v'); SELECT llm_batch.create_embedder('v', 'm', 6); COMMIT");
    assert_eq!((version(c), history(c).split(", ").last()), (6, Some("5 score five")));
}

/// Two sessions that change a task at the same time: the second waits, and keeps what the first has changed.
fn changed_by_two(bed: &Bed, c: &mut Client) {
    run(c, "SELECT llm_batch.create_scorer('two', 'one', 0, 1)");
    run(c, "BEGIN; SELECT llm_batch.alter_scorer('two', 'two')");
    std::thread::scope(|s| {
        let second = s.spawn(|| run(&mut bed.connect(), "SELECT llm_batch.alter_scorer('two', high => 5)"));
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%high => 5%'";
        wait_until("the second waits", PATIENCE, || one(&mut bed.connect(), waiting), |n| *n > 0);
        run(c, "COMMIT");
        second.join().unwrap();
    });
    let all = "SELECT string_agg(concat_ws(' ', version, spec->>'instruction', spec->>'high'), ', ' ORDER BY version)
                 FROM (SELECT version, spec FROM llm_batch.task_history WHERE name = 'two'
                       UNION ALL SELECT version, spec FROM llm_batch.task WHERE name = 'two') x";
    assert_eq!(text(c, all), "1 one 1, 2 two 1, 3 two 5");
}

fn kinds_are_kept_apart(c: &mut Client) {
    run(c, "SELECT llm_batch.create_extractor('e', '{\"a\": \"date\"}')");
    for (call, says) in [
        ("llm_batch.alter_classifier('e', instruction => 'x')", ["\"e\" is not a classifier", "alter_extractor()"]),
        (
            "llm_batch.alter_extractor('topic', instruction => 'x')",
            ["\"topic\" is not an extractor", "alter_classifier()"],
        ),
        ("llm_batch.alter_scorer('e', 'x')", ["\"e\" is not a scorer", "alter_extractor()"]),
        ("llm_classify('text', 'e')", ["\"e\" is not a classifier", "llm_run()"]),
        ("llm_classify_batch('SELECT 1, 2', 's')", ["\"s\" is not a classifier", "llm_run()"]),
        ("llm_classify_array(ARRAY[1], ARRAY['x'], 'e')", ["\"e\" is not a classifier", "llm_run()"]),
    ] {
        refused(c, &format!("SELECT {call}"), "42809", &says);
    }
    refused(
        c,
        "SELECT llm_batch.create_scorer('e', 'x')",
        "42710",
        &["task \"e\" already exists", "alter_extractor()"],
    );
    refused(c, "SELECT llm_batch.drop_model('m')", "2BP01", &["because task \"e\" uses it"]);
    run(c, "CREATE ROLE heir; SELECT llm_batch.set_owner('task', 'e', 'heir')");
    assert_eq!(text(c, "SELECT owner_name FROM llm_batch.task WHERE name = 'e'"), "heir");
    refused(c, "SELECT llm_batch.set_owner('classifier', 'topic', 'heir')", "22023", &["route and task"]);
}

/// A provider whose answer for a row is the JSON that its text is.
struct Echo(String);

impl Echo {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || serve(stream));
            }
        });
        Self(url)
    }
}

/// Answers what comes on a connection until it is closed.
fn serve(mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(bytes) = line.to_lowercase().strip_prefix("content-length:") {
                length = bytes.trim().parse().ok()?;
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let request: Value = serde_json::from_slice(&body).ok()?;
        let rows = request["messages"].as_array()?.last()?["content"].as_str()?.lines();
        let answers: Vec<String> = rows
            .filter_map(|line| {
                let (number, text) = line.split_once(": ")?;
                let text: String = serde_json::Deserializer::from_str(text).into_iter().next()?.ok()?;
                Some(format!("\"{number}\":{text}"))
            })
            .collect();
        let reply = json!({
            "id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": format!("{{{}}}", answers.join(","))}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        })
        .to_string();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length:";
        stream.write_all(format!("{head} {}\r\n\r\n{reply}", reply.len()).as_bytes()).ok()?;
    }
}

/// Jobs with one column: what is refused, and what is written.
#[test]
fn jobs_of_every_kind() {
    let bed = Bed::new("tasks_jobs");
    let c = &mut bed.connect();
    let echo = Echo::start();
    run(
        c,
        &format!(
            "CREATE SERVER echo FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url '{}');
             CREATE USER MAPPING FOR PUBLIC SERVER echo OPTIONS (api_key 'sk-test');
             SELECT llm_batch.create_model('e', server => 'echo', model => 'e');
             SELECT llm_batch.create_extractor('say', '{{\"words\": \"text\"}}', 'e');
             SELECT llm_batch.create_scorer('rate', 'How angry?', 0, 10, 'e');
             SELECT llm_batch.create_extractor('due', '{{\"due\": \"date\"}}', 'e');
             SELECT llm_batch.create_extractor('tags', '{{\"tags\": {{\"type\": \"text[]\"}}}}', 'e');
             SELECT llm_batch.create_extractor('bill', '{{\"amount\": \"numeric\", \"due\": \"date\", \"paid\": \"boolean\", \"tags\": \"text[]\"}}', 'e');
             SELECT llm_batch.create_extractor('marks', '{{\"marks\": {{\"type\": \"labels[]\", \"labels\": [\"x\", \"y\"]}}}}', 'e', options => '{{\"codes\": \"words\"}}');
             CREATE DOMAIN short AS varchar(5);
             CREATE TABLE t (id bigint PRIMARY KEY, body text, s text, v varchar(5), d short, i int, n numeric(6,2), r real, b boolean,
                             dt date, ts timestamp, ta text[], j jsonb, js json, u uuid)",
            echo.0
        ),
    );
    let call = |column: &str, task: &str, function: &str| {
        format!("SELECT * FROM llm_batch.{function}('t', 'body', '{column}', '{task}')")
    };
    for (column, task, says) in [
        ("i", "due", ["field \"due\" is of type date but column \"i\" is of type integer", "date, text or jsonb"]),
        ("b", "rate", ["the answer is of type numeric but column \"b\" is of type boolean", "numeric, text or jsonb"]),
        ("u", "say", ["field \"words\" is of type text but column \"u\" is of type uuid", "text or jsonb"]),
        ("dt", "say", ["field \"words\" is of type text but column \"dt\" is of type date", ""]),
        ("ta", "due", ["field \"due\" is of type date but column \"ta\" is of type text[]", ""]),
        ("i", "tags", ["field \"tags\" is of type text[] but column \"i\" is of type integer", ""]),
        ("s", "bill", ["an answer has 4 fields but column \"s\" is of type text", "targets =>"]),
    ] {
        refused(c, &call(column, task, "backfill"), "42804", &says);
        refused(c, &call(column, task, "estimate"), "42804", &says);
    }
    assert_eq!(one(c, "SELECT count(*) FROM llm_batch.job"), 0);

    let bill = r#"{"due": "2026-02-28", "paid": true, "tags": ["a \"b\"", "c"], "amount": 12345678901234567890.10}"#;
    let bill_row = r#"[12345678901234567890.10,"2026-02-28",true,["a \"b\"","c"]]"#;
    for (column, task, answer, written) in [
        ("s", "say", r#"["Two\nlines, \"quoted\" and {braces}."]"#, "Two\nlines, \"quoted\" and {braces}."),
        (
            "s",
            "say",
            r#"["\",\"902\":\"x\"}\r\n</think> a ```b``` c \u0000\u0001\u0008\u000b\u001b\u001f\u007f\u009f\td"]"#,
            "\",\"902\":\"x\"}\n</think> a ```b``` c \td",
        ),
        ("j", "say", r#"["x \"y\""]"#, r#"{"words": "x \"y\""}"#),
        ("i", "rate", "7.6", "8"),
        ("n", "rate", "7.625", "7.63"),
        ("r", "rate", "7.5", "7.5"),
        ("s", "rate", "7.50", "7.50"),
        ("j", "rate", "7.5", "7.5"),
        ("dt", "due", r#"["2026-02-28"]"#, "2026-02-28"),
        ("ts", "due", r#"["2026-02-28"]"#, "2026-02-28 00:00:00"),
        ("s", "due", r#"["2026-02-28"]"#, "2026-02-28"),
        ("j", "due", r#"["2026-02-28"]"#, r#"{"due": "2026-02-28"}"#),
        ("ta", "marks", r#"[["x","y"]]"#, "{x,y}"),
        ("s", "marks", r#"[["x","y"]]"#, r#"["x","y"]"#),
        ("s", "tags", r#"[["a"]]"#, r#"["a"]"#),
        ("ta", "tags", r#"[["a","b \"c\\d","{}"]]"#, r#"{a,"b \"c\\d","{}"}"#),
        ("js", "tags", r#"[["a"]]"#, r#"{"tags":["a"]}"#),
        ("j", "bill", bill_row, bill),
    ] {
        run(c, "TRUNCATE t");
        run(
            c,
            &format!(
                "INSERT INTO t (id, body) SELECT g, '{}' FROM generate_series(1, 30) g",
                answer.replace('\'', "''")
            ),
        );
        assert_eq!(one(c, &call(column, task, "estimate").replace('*', "rows")), 30);
        let job = one(c, &call(column, task, "backfill"));
        let p = bed.done(job);
        assert_eq!(p.done, 30, "{column} by {task}: {p:?} {:?}", failures(c, job));
        let values = text(c, &format!("SELECT string_agg(DISTINCT {column}::text, '|') FROM t"));
        assert_eq!(values, written, "{column} by {task}");
    }
    raised_by_rows(&bed, c);
    used_by_jobs(&bed, c);
}

/// A value that the column cannot take is one row's trouble, and nothing is cut.
fn raised_by_rows(bed: &Bed, c: &mut Client) {
    for column in ["v", "d"] {
        run(
            c,
            "TRUNCATE t; INSERT INTO t (id, body) VALUES (1, '[\"short\"]'), (2, '[\"longer\"]'), (3, '[\"tiny\"]')",
        );
        let job = one(c, &format!("SELECT llm_batch.backfill('t', 'body', '{column}', 'say')"));
        let p = bed.done(job);
        assert_eq!((p.done, p.failed), (2, 1), "{p:?}");
        assert_eq!(text(c, &format!("SELECT string_agg({column}::text, ' ' ORDER BY id) FROM t")), "short tiny");
    }
}

/// A task that an unfinished job uses is not dropped, and keeps its fields.
fn used_by_jobs(bed: &Bed, c: &mut Client) {
    run(c, "TRUNCATE t; INSERT INTO t (id, body) VALUES (1, '[\"2026-02-28\"]'), (2, '[\"never\"]')");
    run(c, "BEGIN");
    let job = one(c, "SELECT llm_batch.backfill('t', 'body', 'dt', 'due')");
    run(c, &format!("SELECT llm_batch.pause({job}); COMMIT"));
    refused(c, "SELECT llm_batch.drop_task('due')", "55006", &[&format!("job {job}"), "cancel"]);
    refused(c, "SELECT llm_batch.alter_extractor('due', '{\"due\": \"text\"}')", "55006", &["fields", "cancel"]);
    run(
        c,
        "SELECT llm_batch.alter_extractor('due', '{\"due\": {\"type\": \"date\", \"description\": \"x\"}}', instruction => 'x')",
    );
    run(c, &format!("SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    assert_eq!((p.done, p.failed), (1, 1), "{p:?}");
    // The job is over, and the task another one: it does not write what its column is not for.
    run(c, "SELECT llm_batch.drop_task('due'); SELECT llm_batch.create_scorer('due', 'Is it?', model => 'e')");
    run(c, &format!("UPDATE t SET body = '0.5' WHERE id = 2; SELECT llm_batch.retry_failed({job})"));
    let e = error(c, &format!("CALL llm_batch.wait({job})"));
    assert!(e.1.contains(&format!("job {job} is")) && e.2.contains("field \"due\" does not exist"), "{e:?}");
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE dt IS NULL"), 1);
}
