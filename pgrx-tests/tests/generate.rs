//! Generators, and the checks and repairs of their texts: a refused row is asked again, with a reason. For every caller,
//! expressions have the rights of the task's owner and can change nothing.

mod common;

use common::{
    Bed, PATIENCE, asked_again, asked_of, error, failures, model, numbered, one, refused, run, text, wait_status,
};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;
use serde_json::{Value, json};

/// A generator with these options, in the JSON of an object's members.
#[track_caller]
fn generator(client: &mut Client, name: &str, options: &str) {
    run(client, &generator_sql(name, options));
}

fn generator_sql(name: &str, options: &str) -> String {
    format!("SELECT llm_batch.create_generator('{name}', 'Explain it.', 'm', options => $${{{options}}}$$)")
}

#[track_caller]
fn backfill(client: &mut Client, table: &str, task: &str) -> i64 {
    one(client, &format!("SELECT llm_batch.backfill('{table}', 'body', 'answer', '{task}')"))
}

#[test]
fn every_form() {
    let bed = Bed::new("generate_forms");
    let c = &mut bed.connect();
    run(c, "SET llm_batch.default_model = 'm'");
    let spec = |c: &mut Client, name: &str| -> Value {
        serde_json::from_str(&text(c, &format!("SELECT spec FROM llm_batch.task WHERE name = '{name}'"))).unwrap()
    };
    run(
        c,
        "SELECT llm_batch.create_generator('g', 'Explain it.', options => '{\"max_words\": 30, \"language\": \"German\", \"reuse\": false}');
         SELECT llm_batch.create_generator(name => 'g2', instruction => 'Explain it.', model => NULL, examples => NULL, options => NULL);
         SELECT llm_batch.create_generator('g3', 'Explain it.', 'm', '[{\"input\": \"x\", \"answer\": \"y\"}]', '{\"max_output_tokens\": 90}')",
    );
    let g = spec(c, "g");
    assert_eq!((&g["max_words"], &g["language"], &g["kind"]), (&json!(30), &json!("German"), &Value::Null));
    assert_eq!(text(c, "SELECT options FROM llm_batch.task WHERE name = 'g'"), "{\"reuse\": false}");
    assert_eq!(spec(c, "g3")["max_output_tokens"], 90);
    // Options that are given take the place of all that there were; else these stay.
    run(c, "SELECT llm_batch.alter_generator('g', 'Sum it up.')");
    assert_eq!((&spec(c, "g")["instruction"], &spec(c, "g")["max_words"]), (&json!("Sum it up."), &json!(30)));
    run(c, "SELECT llm_batch.alter_generator('g', NULL, NULL, NULL, '{\"language\": \"French\"}')");
    let g = spec(c, "g");
    assert_eq!(
        (&g["max_words"], &g["language"], &g["instruction"]),
        (&Value::Null, &json!("French"), &json!("Sum it up."))
    );
    assert_eq!(text(c, "SELECT options FROM llm_batch.task WHERE name = 'g'"), "{}");

    run(c, "SELECT llm_batch.create_scorer('s', 'How angry?')");
    for (call, code, says) in [
        ("create_generator('x', '')", "22023", &["instruction must not be empty", "Say what"][..]),
        ("create_generator('x', NULL)", "22004", &["\"instruction\""]),
        ("create_generator('x', 'y', options => '{\"max_words\": 0}')", "22023", &["\"max_words\"", "from 1 to"]),
        ("create_generator('x', 'y', options => '{\"language\": 7}')", "22023", &["\"language\""]),
        ("create_generator('x', 'y', options => '{\"words\": 7}')", "22023", &["\"words\""]),
        ("create_generator('x', 'y', examples => '[{\"input\": \"x\", \"answer\": 7}]')", "22023", &["not a text"]),
        ("create_generator('x', 'y', examples => '[{\"input\": \"x\"}]')", "22023", &["\"answer\"", "Write"]),
        ("create_generator(NULL, 'y')", "22004", &["\"name\""]),
        ("alter_generator('g', '')", "22023", &["instruction must not be empty"]),
        ("alter_generator('gone', 'x')", "42704", &["task \"gone\"", "create_generator"]),
        ("alter_generator('s', 'x')", "42809", &["\"s\" is not a generator", "alter_scorer()"]),
        ("alter_scorer('g', 'x')", "42809", &["\"g\" is not a scorer", "alter_generator()"]),
        (
            "create_generator('x', 'y', options => '{\"ask_by\": \"decisions\"}')",
            "22023",
            &["\"generate\" cannot be asked"],
        ),
    ] {
        refused(c, &format!("SELECT llm_batch.{call}"), code, says);
    }
    for (call, code, says) in [
        ("llm_generate('x', ' ')", "22023", "instruction"),
        ("llm_generate('x', 'y', '{\"max_words\": 0}')", "22023", "max_words"),
        ("llm_generate('x', 'y', '{\"labels\": []}')", "22023", "labels"),
        ("llm_generate('x', 'y', '{\"descriptions\": {\"a\": \"b\"}}')", "22023", "descriptions"),
        ("llm_generate('x', repeat('words ', 100000))", "54000", "262144"),
        ("llm_generate('x', 'y', '{\"task\": \"topic\"}')", "42809", "not a generator"),
        ("llm_summarize('x', '{\"model\": \"nowhere\"}')", "42704", "nowhere"),
        ("llm_translate('x', '')", "22023", "language"),
    ] {
        refused(c, &format!("SELECT {call}"), code, &[says]);
    }
    assert_eq!(bed.provider.stats().requests, 0);
    assert_eq!(one(c, "SELECT count(*) FROM (SELECT llm_generate('x', NULL)) q (v) WHERE v IS NULL"), 1);

    // They take the model, the instruction and the repairs of a task that the options name.
    model(c, "other", "");
    run(
        c,
        "SELECT llm_batch.create_generator('gist', 'As a clerk.', 'other', options => '{\"repair\": \"upper(answer)\"}')",
    );
    for (call, words) in [
        ("llm_generate('#r000001:x#', 'Explain it.'", "Explain it."),
        // It has no words of its own: a task says how.
        ("llm_summarize('#r000001:x#'", "As a clerk."),
        ("llm_translate('#r000001:x#', 'Welsh'", "Welsh"),
    ] {
        let answer = text(c, &format!("SELECT {call}, '{{\"task\": \"gist\", \"reuse\": false}}')"));
        assert!(answer == answer.to_uppercase() && answer.contains("TEXT"), "{call}: {answer}");
        let body = bed.provider.bodies().pop().unwrap();
        let told = body["messages"][0]["content"].as_str().unwrap();
        assert_eq!(body["model"], "fake-other", "{call}");
        assert!(told.contains("As a clerk.") && told.contains(words), "{call}: {told}");
    }
}

#[test]
fn answers_are_repaired_and_checked() {
    let bed = Bed::new("checks");
    let c = &mut bed.connect();
    numbered(c, "t", 1..=60);
    generator(
        c,
        "tidy",
        r#""repair": "upper(answer) -- the rest", "check": "answer = upper(answer) AND input NOT LIKE '%#r000007:%'", "check_hint": "write about seven""#,
    );
    let job = backfill(c, "t", "tidy");
    let p = bed.done(job);
    assert_eq!((p.done, p.failed), (59, 1), "{p:?}");
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE answer = upper(answer) AND answer LIKE id || ' TEXT%'"), 59);
    let listed = failures(c, job);
    let (_, state, class, attempts, detail) = &listed[0];
    assert_eq!((state.as_str(), class.as_str(), *attempts), ("failed", "check_failed", 3), "{listed:?}");
    assert!(detail.contains("\"7 TEXT"), "{detail}");
    // Told why, and nothing of what was written.
    let lines = asked_again(&bed, 7);
    assert_eq!((asked_of(&bed, 7), asked_of(&bed, 8), lines.len()), (3, 1, 2));
    assert!(lines.iter().all(|l| l.ends_with("\"#r000007:x#\" (asked again: write about seven)")), "{lines:?}");

    // In sessions, where the answers are kept: those that were refused are not taken again, and more are asked for.
    assert!(text(c, "SELECT llm_run(body, 'tidy') FROM t WHERE id = 9").starts_with("9 TEXT"));
    assert_eq!(one(c, "SELECT count(llm_run(body, 'tidy')) FROM t WHERE id <= 10"), 9);
    let rows = "SELECT * FROM llm_run_batch('SELECT id, body FROM t WHERE id BETWEEN 6 AND 8', 'tidy')";
    assert_eq!(one(c, &format!("SELECT count(*) FROM ({rows}) b WHERE status = 'ok' AND value = upper(value)")), 2);
    let detail = text(c, &format!("SELECT detail FROM ({rows}) b WHERE status = 'failed' AND id = '7'"));
    assert!(detail.starts_with("check_failed: \"7 TEXT"), "{detail}");
    run(
        c,
        "SELECT llm_batch.alter_generator('tidy', options => '{\"check\": \"input !~ ''000007''\", \"on_error\": \"error\"}')",
    );
    let (code, ..) = error(c, "SELECT llm_run(body, 'tidy') FROM t WHERE id = 7");
    assert_eq!(code, "22000");

    // One that raises: for its row, which is not asked again.
    numbered(c, "raises", 101..=120);
    generator(c, "raises", r#""check": "length(answer) / (CASE WHEN input ~ '000107' THEN 0 ELSE 1 END) > 0""#);
    let job = backfill(c, "raises", "raises");
    assert_eq!(bed.done(job).done, 19);
    let (_, _, class, attempts, detail) = failures(c, job).remove(0);
    assert_eq!((class.as_str(), attempts, detail.as_str()), ("check_error", 1, "22012: division by zero"));
    assert_eq!(asked_of(&bed, 107), 1);
    let detail = text(
        c,
        "SELECT detail FROM llm_run_batch('SELECT id, body FROM raises WHERE id IN (106, 107)', 'raises') WHERE status <> 'ok'",
    );
    assert_eq!(detail, "check_error: 22012: division by zero");
    // So it is where the error is one that should pass.
    for code in ["53100", "57014"] {
        run(
            c,
            &format!(
                "CREATE OR REPLACE FUNCTION is_full(text) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_temp AS
                   $$BEGIN IF $1 ~ '000107' THEN RAISE 'no room' USING ERRCODE = '{code}'; END IF; RETURN true; END$$;
                 UPDATE raises SET answer = NULL"
            ),
        );
        let name = format!("full_{code}");
        generator(c, &name, r#""check": "public.is_full(input)""#);
        let job = backfill(c, "raises", &name);
        assert_eq!(bed.done(job).done, 19);
        let (_, _, class, attempts, detail) = failures(c, job).remove(0);
        assert_eq!((class, attempts, detail), ("check_error".to_owned(), 1, format!("{code}: no room")));
    }

    // None is ever taken: before twenty requests, and nothing is lost by it.
    for (name, check) in [("never", "answer = ''"), ("nulls", "NULL::boolean"), ("bad", "answer::int > 0")] {
        numbered(c, name, 1001..=2000);
        generator(c, name, &format!(r#""check": "{check}", "max_rows_per_request": 5, "reuse": false"#));
        let before = bed.provider.stats().admitted;
        let job = backfill(c, name, name);
        let p = wait_status(c, job, "paused");
        let paid = bed.provider.stats().admitted - before;
        assert!(p.reason.as_deref() == Some("no_answers") && paid < 20, "{name}: {paid} requests, {p:?}");
        assert_eq!((p.failed, p.done), (0, 0), "{p:?}");
        let last = text(c, &format!("SELECT last_error FROM llm_batch.progress WHERE job_id = {job}"));
        assert!(last.starts_with(&format!("no answer passes the checks of task \"{name}\": check_")), "{last}");
        run(c, &format!("SELECT llm_batch.alter_generator('{name}', options => '{{}}'), llm_batch.resume({job})"));
        assert_eq!(bed.done(job).done, 1000);
    }
    // So few that it may be their own fault.
    numbered(c, "few", 1..=2);
    run(c, "SELECT llm_batch.alter_generator('never', options => '{\"check\": \"false\"}')");
    let job = backfill(c, "few", "never");
    let p = bed.done(job);
    assert_eq!((p.failed, failures(c, job)[0].2.as_str()), (2, "check_failed"));
    let (code, message, ..) = error(c, "SELECT * FROM llm_run_batch('SELECT id, body FROM never', 'never')");
    assert_eq!((code.as_str(), message.as_str()), ("22000", "no answer of model \"m\" to this task is taken"));
    generator(c, "huge", r#""repair": "repeat('ab', 2500000)""#);
    assert_eq!(
        text(c, "SELECT string_agg(DISTINCT detail, '') FROM llm_run_batch('SELECT id, body FROM few', 'huge') b"),
        "check_error: the repair gives 5000000 bytes, and no value may have more than 4194304"
    );
    expressions_that_do_not_return(&bed, c);
    what_is_judged_at_the_end_is_written(&bed, c);
}

/// A worker that is told to end while its checks take long writes those answers to which they come in time: all are paid for.
#[track_caller]
fn what_is_judged_at_the_end_is_written(bed: &Bed, c: &mut Client) {
    run(c, "CREATE TABLE takes (s float8); INSERT INTO takes VALUES (0.4)");
    numbered(c, "slow", 6001..=6100);
    generator(c, "slow", r#""check": "(SELECT pg_sleep(s) FROM public.takes) IS NOT NULL""#);
    let job = backfill(c, "slow", "slow");
    let checking = "FROM pg_stat_activity WHERE backend_type = 'llm_batch job' AND query = 'checking answers'";
    let count = format!("SELECT count(*) {checking}");
    wait_until("answers are checked", PATIENCE, || one(c, &count), |n| *n == 1);
    assert_eq!(one(c, "SELECT count(answer) FROM slow"), 0);
    run(c, &format!("SELECT pg_terminate_backend(pid) {checking}"));
    let lost = format!("llm_batch job {job}: ");
    let lost = |line: &str| line.contains(&lost) && line.contains("answers could not be written");
    wait_until("the worker ends", PATIENCE, || bed.cluster.log().lines().any(lost), |is| *is);
    let written = one(c, "SELECT count(answer) FROM slow");
    assert!((1..100).contains(&written), "{written}");
    run(c, "UPDATE takes SET s = 0");
    assert_eq!(bed.done(job).done, 100);
}

/// Neither a session nor a worker is held: the row has failed, and a job or statement in which it is so for one row after the
/// other ends.
#[track_caller]
fn expressions_that_do_not_return(bed: &Bed, c: &mut Client) {
    assert_eq!(text(c, "SHOW llm_batch.check_timeout"), "5s");
    run(
        c,
        "CREATE FUNCTION turns() RETURNS boolean LANGUAGE plpgsql SET search_path = pg_temp AS 'BEGIN LOOP END LOOP; END';
         ALTER DATABASE postgres SET llm_batch.check_timeout = '100ms'; SET llm_batch.check_timeout = '100ms'",
    );
    let says =
        "57014: the repairs and checks took more than 100 ms; make them faster, or raise llm_batch.check_timeout";
    for (name, expression) in [
        ("sleeps", r#""check": "pg_sleep(3600) IS NOT NULL""#),
        // Answers that come one by one count together.
        ("turns", r#""max_rows_per_request": 1, "repair": "CASE WHEN public.turns() THEN answer END""#),
    ] {
        numbered(c, name, 5001..=5200);
        generator(c, name, expression);
        let batch = |rows: &str| format!("SELECT * FROM llm_run_batch('SELECT id, body FROM {name} {rows}', '{name}')");
        let one_row = batch("LIMIT 1");
        assert_eq!(text(c, &format!("SELECT detail FROM ({one_row}) b")), format!("check_error: {says}"));
        let (code, message, _, hint) = error(c, &batch("LIMIT 20"));
        assert_eq!((code.as_str(), message.as_str()), ("57014", "the repairs and checks of the task take too long"));
        assert!(hint.contains("llm_batch.check_timeout"), "{hint}");
        // Later work is not cancelled.
        run(c, "SELECT pg_sleep(0.3)");
        let job = backfill(c, name, name);
        let p = wait_status(c, job, "paused");
        assert_eq!((p.reason.as_deref(), p.done, p.failed), (Some("no_answers"), 0, 0), "{p:?}");
        let last = p.last_error.unwrap_or_default();
        assert!(last.contains(&format!("task \"{name}\": check_error: {says}")), "{last}");
    }
    run(c, "ALTER DATABASE postgres RESET llm_batch.check_timeout; RESET llm_batch.check_timeout");
    let job = one(c, "SELECT job_id FROM llm_batch.progress WHERE relation = 'turns'");
    run(c, &format!("SELECT llm_batch.alter_generator('turns', options => '{{}}'), llm_batch.resume({job})"));
    assert_eq!(bed.done(job).done, 200);
}

/// Says what it could do; nothing but what its owner may, and nothing that lasts.
const TRAP: &str = r#"CREATE FUNCTION trap(answer text) RETURNS boolean LANGUAGE plpgsql SET search_path = mallory, pg_temp AS $f$
DECLARE
    got text := current_user;
    tried text;
BEGIN
    FOREACH tried IN ARRAY '{SET ROLE postgres,RESET ROLE,SET SESSION AUTHORIZATION postgres,RESET SESSION AUTHORIZATION,
        INSERT INTO mallory.loot VALUES (1),CREATE TABLE mallory.x (),CREATE TEMP TABLE x (),SELECT nextval(''mallory.s''),
        SET transaction_read_only = off,SELECT * FROM secret,SELECT pg_read_file(''postgresql.conf''),
        COPY secret TO PROGRAM ''true'',ALTER ROLE mallory SUPERUSER,LISTEN x,DECLARE x CURSOR WITH HOLD FOR SELECT 1,
        GRANT postgres TO mallory,LOCK TABLE secret,"SELECT llm_run(''x'', ''plain'')"}'::text[]
    LOOP
        BEGIN
            EXECUTE tried;
            got := got || ', ' || tried;
        EXCEPTION WHEN OTHERS THEN
            NULL;
        END;
    END LOOP;
    PERFORM set_config('search_path', 'mallory', false), set_config('work_mem', '77MB', false);
    IF got <> 'mallory' THEN
        RAISE EXCEPTION 'gained: %', got;
    END IF;
    RETURN true;
END $f$"#;

#[test]
fn whose_rights_expressions_have() {
    let bed = Bed::new("checks_rights");
    let c = &mut bed.connect();
    numbered(c, "t", 1..=40);
    run(
        c,
        "CREATE TABLE secret (a int); CREATE ROLE mallory LOGIN; CREATE ROLE bob LOGIN;
         CREATE SCHEMA mallory AUTHORIZATION mallory; CREATE SCHEMA bob AUTHORIZATION bob;
         GRANT USAGE ON FOREIGN SERVER fake TO mallory, bob; GRANT SELECT, UPDATE ON t TO bob",
    );
    generator(c, "plain", "");
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let mallory = &mut bed.cluster.connect_as("postgres", "mallory");
    run(mallory, "SET search_path = mallory; CREATE TABLE loot (a int); CREATE SEQUENCE s");
    run(mallory, TRAP);
    for (name, options) in
        [("trap", r#""check": "trap(answer)""#), ("repair", r#""repair": "CASE WHEN trap(answer) THEN answer END""#)]
    {
        let sql = generator_sql(name, options);
        run(mallory, &sql);
    }
    // A superuser runs nothing of hers.
    for sql in ["SELECT llm_run('#r000001:x#', 'trap')", "SELECT llm_batch.backfill('t', 'body', 'answer', 'repair')"] {
        refused(c, sql, "42501", &["superuser", "Connect as another role"]);
    }
    run(c, "SET ROLE bob");
    refused(c, "SELECT llm_run('#r000001:x#', 'trap')", "42501", &["superuser"]);
    run(c, "RESET ROLE");
    // Another role asks her task, in each way.
    for task in ["trap", "repair"] {
        for sql in [
            format!("SELECT count(*) FROM llm_run_batch('SELECT id, body FROM t', '{task}') WHERE status = 'ok'"),
            format!("SELECT count(llm_run(body, '{task}')) FROM t"),
            format!("SELECT 39 + count(*) FROM (SELECT llm_run('#r000001:x#', '{task}') AS v) x WHERE v IS NOT NULL"),
            format!(
                "SELECT count(*) FROM llm_run_array(ARRAY(SELECT id FROM t ORDER BY id), ARRAY(SELECT body FROM t ORDER BY id), '{task}') WHERE status = 'ok'"
            ),
        ] {
            let got = text(bob, &format!("SELECT ({sql})::text"));
            let why = format!(
                "SELECT string_agg(DISTINCT detail, '; ') FROM llm_run_batch('SELECT id, body FROM t', '{task}')"
            );
            assert_eq!(
                got,
                "40",
                "{sql}: {}",
                if got == "40" { String::new() } else { text(bob, &format!("SELECT coalesce(({why}), '')")) }
            );
        }
        let job = backfill(bob, "t", task);
        let p = bed.done(job);
        assert_eq!((p.done, p.failed), (40, 0), "{:?}", failures(c, job));
        run(c, "UPDATE t SET answer = NULL");
    }
    assert_eq!(
        text(bob, "SELECT concat(current_setting('search_path'), current_setting('work_mem'), current_user)"),
        "\"$user\", public4MBbob"
    );
    run(c, "INSERT INTO secret VALUES (1); CREATE TEMP TABLE x (a int); DROP TABLE x");
    assert_eq!(
        one(
            c,
            "SELECT (SELECT count(*) FROM mallory.loot) + (SELECT count(*) FROM pg_class WHERE relname = 'x') + (SELECT count(*) FROM pg_roles WHERE rolname = 'mallory' AND rolsuper)"
        ),
        0
    );
    // A role with functions in its own path asks a superuser's task: the owner's functions are called.
    run(
        c,
        "CREATE FUNCTION is_ok(text) RETURNS boolean LANGUAGE plpgsql AS
             'DECLARE who text := current_user; BEGIN RETURN who = ''postgres''; END'",
    );
    let ours = generator_sql("ours", r#""check": "is_ok(answer) AND EXISTS (SELECT FROM secret)""#);
    // In a session that calls it first with a type of its own the function means another one.
    refused(c, &ours, "42P13", &["is_ok(text)", "search_path", "pg_temp"]);
    for path in ["\"$user\", public, pg_temp", "'public, pg_temp'", "pg_temp, public, pg_temp", "public"] {
        run(c, &format!("ALTER FUNCTION is_ok(text) SET search_path = {path}"));
        refused(c, &ours, "42P13", &["is_ok(text)"]);
    }
    run(c, "ALTER FUNCTION is_ok(text) SET search_path = public, pg_catalog, pg_temp");
    run(c, &ours);
    run(
        bob,
        "CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (value <> 'postgres'); SELECT public.is_ok('x'::pg_catalog.text)",
    );
    run(
        bob,
        "CREATE FUNCTION bob.is_ok(text) RETURNS boolean LANGUAGE sql AS 'SELECT false'; CREATE TEMP TABLE secret (a int);
         SET search_path = bob, pg_temp, public",
    );
    assert!(text(bob, "SELECT llm_run('#r000001:x#', 'ours')").starts_with("1 text"));
    // A name that is gone is not looked for in the temporary schema of the role that asks.
    run(c, "CREATE TABLE gone (a int)");
    generator(c, "lost", r#""check": "EXISTS (SELECT FROM gone)""#);
    run(c, "DROP TABLE gone");
    run(
        bob,
        "CREATE FUNCTION bob.me() RETURNS int LANGUAGE plpgsql AS $$BEGIN RAISE 'I am %', current_user; END$$;
         CREATE TEMP VIEW gone AS SELECT bob.me() AS a; GRANT SELECT ON gone TO PUBLIC;
         GRANT USAGE ON SCHEMA bob TO PUBLIC",
    );
    let detail = text(bob, "SELECT detail FROM llm_run_batch('SELECT 1, ''#r000001:x#''', 'lost')");
    assert_eq!(detail, "check_error: 42P01: relation \"gone\" does not exist");
    assert_eq!(one(bob, "SELECT count(*) FROM secret"), 0, "the temporary table is there again");
    // Found by its number meanwhile.
    let looks = generator_sql(
        "looks",
        r#""check": "(SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relpersistence = 't') >= 0""#,
    );
    run(mallory, &looks);
    run(bob, "ALTER TABLE secret ADD b int");
    assert!(text(bob, "SELECT llm_run('#r000001:x#', 'looks')").starts_with("1 text"));
    run(bob, "INSERT INTO secret VALUES (1, 2); TRUNCATE secret");
    // No lock is held, while the statement waits for the network.
    run(c, "BEGIN; SELECT llm_run('#r000002:x#', 'ours')");
    assert_eq!(one(c, "SELECT count(*) FROM pg_locks WHERE relation = 'secret'::regclass"), 0);
    run(c, "COMMIT");
    // A check reads only tables that its owner may read.
    let hers = generator_sql("hers", r#""check": "EXISTS (SELECT FROM public.secret)""#);
    run(mallory, &hers);
    let detail = text(bob, "SELECT detail FROM llm_run_batch('SELECT 1, ''#r000001:x#''', 'hers')");
    assert_eq!(detail, "check_error: 42501: permission denied for table secret");

    // Altered in the middle of another's job: from the next rows on, and still with her rights.
    run(
        mallory,
        "SELECT llm_batch.create_generator('late', 'Say it.', 'm', options => '{\"check\": \"true\", \"max_rows_per_request\": 4, \"reuse\": false}')",
    );
    run(c, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 1)");
    bed.provider.hold();
    let job = backfill(bob, "t", "late");
    let queued = |c: &mut Client| one(c, "SELECT coalesce(sum(queued), 0)::bigint FROM llm_batch.activity");
    let mut state = || (bed.provider.stats().rows_in_flight, queued(c));
    wait_until("a request is under way and rows wait", PATIENCE, &mut state, |n| *n == (4, 28));
    run(
        mallory,
        "SELECT llm_batch.alter_generator('late', options => '{\"check\": \"trap(answer)\", \"repair\": \"upper(answer)\", \"max_rows_per_request\": 4, \"reuse\": false}')",
    );
    wait_until("the worker has taken back what was not sent", PATIENCE, &mut state, |n| *n == (4, 0));
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!((p.done, p.failed), (40, 0), "{:?}", failures(c, job));
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE answer = upper(answer)"), 36);
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE answer NOT IN (lower(answer), upper(answer))"), 0);
    // Her role goes: nobody runs what it has left.
    run(c, "SELECT llm_batch.set_owner('task', 'late', 'bob')");
    // Her expression never runs as a superuser.
    let (code, ..) = error(c, "SELECT llm_batch.set_owner('task', 'trap', 'postgres')");
    assert_eq!(code, "42501");
    run(
        c,
        "SELECT llm_batch.set_owner('task', name, 'bob') FROM llm_batch.task WHERE owner_name = 'mallory' AND name <> 'trap'",
    );
    run(c, "DROP OWNED BY mallory; DROP ROLE mallory");
    let (code, message, ..) = error(c, "SELECT llm_run('#r000001:x#', 'trap')");
    assert_eq!((code.as_str(), message.as_str()), ("28000", "the owner of task \"trap\" does not exist"));
}

/// The SQL of docs/checks.md runs as it is written, and does what it says.
#[test]
fn the_documented_example() {
    let bed = Bed::new("checks_docs");
    let c = &mut bed.connect();
    let page = include_str!("../../docs/checks.md");
    let sql = page.split("```sql\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    // Some of the provider's texts of at most 20 words have three foreign words, and all longer ones.
    let sql = sql.replace("\"max_words\": 60", "\"max_words\": 20");
    run(c, &format!("SET llm_batch.default_model = 'm'; {sql}"));
    let apply = |c: &mut Client, answer: &str| {
        text(
            c,
            &format!(
                "SELECT concat(mended(a), '|', is_readable(mended(a))) FROM (SELECT '{}'::text) x (a)",
                answer.replace('\'', "''")
            ),
        )
    };
    for (answer, wanted) in [
        ("Der  Antrag\n will mehr Geld. ", "Der Antrag will mehr Geld.|t"),
        (
            "Das Gesezt des Bundesrates sagt, daß er zahlt. (17 Wörter)",
            "Das Gesetz des Bundesrats sagt, dass er zahlt.|t",
        ),
        ("Er zahlt (ab 2027). (Note: translated)", "Er zahlt (ab 2027).|t"),
        ("Der Antrag will больше Geld.", "Der Antrag will больше Geld.|f"),
        ("Der Antrag 要求 Geld.", "Der Antrag 要求 Geld.|f"),
        ("The motion asks the government for money.", "The motion asks the government for money.|f"),
        ("Der Film \"The Motion\" wird gefördert.", "Der Film \"The Motion\" wird gefördert.|t"),
    ] {
        assert_eq!(apply(c, answer), wanted, "{answer}");
    }
    numbered(c, "motion", 1..=40);
    run(c, "ALTER TABLE motion RENAME answer TO explanation");
    let job = one(c, "SELECT llm_batch.backfill('motion', 'body', 'explanation', 'explain_motion')");
    let p = bed.done(job);
    // The provider writes English: a text of more than two foreign words does not pass.
    assert_eq!(one(c, "SELECT count(*) FROM motion WHERE is_readable(explanation)"), p.done);
    assert!(p.done >= 10 && p.failed >= 10 && p.done + p.failed == 40, "{p:?}");
    let failed = "SELECT count(*) FROM llm_batch.failure WHERE class = 'check_failed' AND detail ~ '^\"\\d+ text '";
    assert_eq!(one(c, failed), p.failed);
}
