//! Roles against actions. A function of the extension that has no row here fails the test.

mod common;

use std::collections::BTreeSet;

use common::{Bed, PATIENCE, one, progress, run, text, tickets, wait_status};
use llm_fake_provider::kinds;
use pg_llm_batch_e2e::wait_until;
use postgres::{Client, SimpleQueryMessage};

/// `nobody` has no right at all, `user` has USAGE on the server, `other` too, and jobs of its own; `monitor` is a member of
/// pg_monitor; `alice` owns what is acted upon, `member` is a member of her role; `postgres` is the superuser.
const ROLES: [&str; 7] = ["nobody", "user", "other", "monitor", "alice", "member", "postgres"];

/// The result of an action by each of `ROLES`: `ok`; `=` and the first value returned; an SQLSTATE; `-` is not tried.
type Row = (&'static str, &'static str, [&'static str; 7]);

const NO: &str = "42501";
/// Roles with USAGE on the server; `member` by alice.
const USAGE: [&str; 7] = [NO, "ok", "ok", NO, "ok", "ok", "ok"];
/// Roles with the rights of alice.
const HERS: [&str; 7] = [NO, NO, NO, NO, "ok", "ok", "ok"];
const SUPERUSERS: [&str; 7] = [NO, NO, NO, NO, NO, NO, "ok"];
const ALL: [&str; 7] = ["ok"; 7];
const SEEN: [&str; 7] = ["=0", "=0", "=0", "=1", "=1", "=1", "=1"];

/// The function, the statement, what it comes to. Job 1 is done, with a failure; job 2 is paused. Both are alice's.
/// The functions of each kind of task are in `tests/kinds`.
#[rustfmt::skip]
const ROWS: &[Row] = &[
    // Models
    ("llm_batch.create_model(text,name,text,integer,integer,integer,integer,integer,numeric,numeric,numeric,integer,interval,integer,jsonb)",
     "SELECT llm_batch.create_model('new', server => 'fake', model => 'x')", USAGE),
    ("", "SELECT llm_batch.create_model('new', server => 'closed', model => 'x')", SUPERUSERS),
    ("llm_batch.alter_model(text,name,text,integer,integer,integer,integer,integer,numeric,numeric,numeric,integer,interval,integer,jsonb,text[])",
     "SELECT llm_batch.alter_model('hers', requests_per_minute => 5)", HERS),
    ("", "SELECT llm_batch.alter_model('m', requests_per_minute => 5)", SUPERUSERS),
    // It would be used with the rights of others: the server must be open to who points there.
    ("", "SELECT llm_batch.alter_model('hers', server => 'closed')", [NO, NO, NO, NO, NO, NO, "ok"]),
    ("llm_batch.drop_model(text)", "SELECT llm_batch.drop_model('spare')", HERS),
    ("", "SELECT llm_batch.drop_model('m')", [NO, NO, NO, NO, NO, NO, "2BP01"]),
    // Routes
    ("llm_batch.create_route(text,text[],text)", "SELECT llm_batch.create_route('new', ARRAY['m'])", USAGE),
    ("llm_batch.alter_route(text,text[],text)", "SELECT llm_batch.alter_route('path', policy => 'spread')", HERS),
    ("llm_batch.drop_route(text)", "SELECT llm_batch.drop_route('path')", HERS),
    ("llm_batch.drop_task(text)", "SELECT llm_batch.drop_task('hers')", HERS),
    ("", "SELECT llm_batch.drop_task('spare')", SUPERUSERS),
    // Owners, by the rules of ALTER … OWNER TO
    ("llm_batch.set_owner(text,text,regrole)", "SELECT llm_batch.set_owner('model', 'hers', 'alice')", HERS),
    ("", "SELECT llm_batch.set_owner('task', 'hers', 'other')", SUPERUSERS),
    ("", "SELECT llm_batch.set_owner('model', 'm', 'alice')", SUPERUSERS),
    ("llm_batch.set_owner(bigint,regrole)", "SELECT llm_batch.set_owner(2, 'alice')", HERS),
    ("", "SELECT llm_batch.set_owner(2, 'member')", [NO, NO, NO, NO, NO, "ok", "ok"]),
    ("", "SELECT llm_batch.set_owner(2, 'postgres')", [NO; 7]),
    // Asking
    ("", "SELECT llm_classify('x', 'locked')", [NO, NO, NO, NO, NO, NO, "08006"]),
    ("llm_classify_batch(text,text,jsonb)",
     "SELECT * FROM llm_classify_batch('SELECT 1, ''#r900001:bug#''', 'topic')", USAGE),
    ("llm_classify_batch(text,text[],jsonb)",
     "SET LOCAL llm_batch.default_model = 'm';
      SELECT * FROM llm_classify_batch('SELECT 1, ''#r900001:a#''', ARRAY['a', 'b'])", USAGE),
    ("", "SELECT * FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic')", HERS),
    ("llm_classify_array(anyarray,text[],text,jsonb)",
     "SELECT * FROM llm_classify_array(ARRAY[1], ARRAY['#r900001:bug#'], 'topic')", USAGE),
    ("llm_run(text,text)", "SELECT llm_run('#r900001:bug#', 'topic')", USAGE),
    ("llm_run_batch(text,text,jsonb)", "SELECT * FROM llm_run_batch('SELECT 1, ''#r900001:bug#''', 'topic')", USAGE),
    ("", "SELECT * FROM llm_run_batch('SELECT id, body FROM tickets', 'topic')", HERS),
    ("llm_run_array(anyarray,text[],text,jsonb)",
     "SELECT * FROM llm_run_array(ARRAY[1], ARRAY['#r900001:bug#'], 'topic')", USAGE),
    ("llm_split(text,integer,integer)", "SELECT * FROM llm_split('a b c', 2, 1)", ALL),
    ("llm_batch.vector_numbers(text)", "SELECT llm_batch.vector_numbers('AACAPw==')", ALL),
    // Jobs
    ("llm_batch.backfill(regclass,text,name,text,text,numeric,bigint,jsonb)",
     "SELECT llm_batch.backfill('tickets', 'body', 'third', 'topic')", HERS),
    ("", "SELECT llm_batch.backfill('tickets', 'body', 'second', 'topic')", [NO, NO, NO, NO, "55006", "55006", "55006"]),
    ("", "SELECT llm_batch.backfill('tickets', 'body', 'third', 'locked')", [NO; 7]),
    ("llm_batch.estimate(regclass,text,name,text,text,jsonb,integer)",
     "SELECT rows FROM llm_batch.estimate('tickets', 'body', 'third', 'topic')", HERS),
    ("llm_batch.backfill(regclass,text,jsonb,text,text,numeric,bigint,jsonb)",
     "SELECT llm_batch.backfill('tickets', 'body', targets => '{\"third\": \"label\"}', task => 'topic')", HERS),
    ("llm_batch.estimate(regclass,text,jsonb,text,text,jsonb,integer)",
     "SELECT rows FROM llm_batch.estimate('tickets', 'body', targets => '{\"third\": \"label\"}', task => 'topic')", HERS),
    ("llm_batch.alter_job(bigint,numeric,bigint,text)", "SELECT llm_batch.alter_job(2, max_tokens => 1000)", HERS),
    ("llm_batch.pause(bigint)", "SELECT llm_batch.pause(2)", HERS),
    ("llm_batch.resume(bigint)", "SELECT llm_batch.resume(2)", HERS),
    ("llm_batch.cancel(bigint)", "SELECT llm_batch.cancel(2)", HERS),
    ("llm_batch.retry_failed(bigint)", "SELECT llm_batch.retry_failed(1)", HERS),
    ("llm_batch.forget(bigint)", "SELECT llm_batch.forget(1)", HERS),
    ("", "SELECT llm_batch.forget(2)", [NO, NO, NO, NO, "55000", "55000", "55000"]),
    ("", "SELECT llm_batch.pause(99)", ["42704"; 7]),
    ("llm_batch.wait(bigint,interval)", "CALL llm_batch.wait(1)", ["42704", "42704", "42704", "ok", "ok", "ok", "ok"]),
    // The rows that are seen.
    ("", "SELECT count(*) FROM llm_batch.progress WHERE job_id = 1", SEEN),
    ("", "SELECT count(*) FROM llm_batch.progress_by_model WHERE job_id = 1", SEEN),
    ("", "SELECT count(*) FROM llm_batch.failure WHERE job_id = 1", SEEN),
    ("", "SELECT count(*) FROM llm_batch.activity WHERE model = 'fake-hers'", SEEN),
    ("llm_batch.gateway_activity()",
     "SELECT count(*) FROM jsonb_array_elements(llm_batch.gateway_activity()) a WHERE a->>'model' = 'fake-hers'", SEEN),
    ("", "SELECT count(*) FROM llm_batch.model WHERE name = 'hers'", ["=1"; 7]),
    ("", "SELECT count(*) FROM llm_batch.task WHERE name = 'hers'", ["=1"; 7]),
    // Keys: what Postgres shows of them, alone.
    ("", "SELECT count(*) FROM pg_user_mappings WHERE usename = 'alice' AND umoptions IS NOT NULL",
     ["=0", "=0", "=0", "=0", "=1", "=0", "=1"]),
    ("", "SELECT count(*) FROM pg_user_mappings WHERE usename = 'public' AND umoptions IS NOT NULL",
     ["=0", "=0", "=0", "=0", "=0", "=0", "=1"]),
    ("", "SELECT count(*) FROM pg_user_mapping WHERE umoptions IS NOT NULL", [NO, NO, NO, NO, NO, NO, "=2"]),
    ("", "ALTER USER MAPPING FOR alice SERVER fake OPTIONS (SET api_key 'sk-x')", [NO, NO, NO, NO, "ok", NO, "ok"]),
    ("", "CREATE USER MAPPING FOR CURRENT_USER SERVER fake OPTIONS (api_key 'sk-x')", [NO, "ok", "ok", NO, "42710", "ok", "ok"]),
    ("", "ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key 'sk-x')", SUPERUSERS),
    // Servers
    ("", "CREATE SERVER mine FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'https://x/v1')", SUPERUSERS),
    ("", "ALTER SERVER fake OPTIONS (SET base_url 'https://x/v1')", SUPERUSERS),
    ("", "ALTER FOREIGN DATA WRAPPER llm_provider NO VALIDATOR", SUPERUSERS),
    // Settings
    ("", "SET LOCAL llm_batch.default_model = 'm'", ALL),
    ("", "SET LOCAL llm_batch.statement_max_cost = 1", ALL),
    ("", "SET LOCAL llm_batch.allowed_hosts = 'x'", ["55P02"; 7]),
    ("", "SET LOCAL llm_batch.enabled = off", ["55P02"; 7]),
    ("", "ALTER ROLE CURRENT_USER SET llm_batch.allowed_hosts = 'x'", ["55P02"; 7]),
    // Processes
    ("", "SELECT pg_terminate_backend({gateway})",
     [NO, NO, NO, NO, NO, NO, "-"]),
    ("", "SELECT pg_terminate_backend({launcher})",
     [NO, NO, NO, NO, NO, NO, "-"]),
    // Internals, harmless to call.
    ("llm_batch.provider_validator(text[],oid)", "SELECT llm_batch.provider_validator('{}', 'pg_user_mapping'::regclass)", ALL),
    ("llm_batch.goes_on(text)", "SELECT llm_batch.goes_on('quota')", ["=t"; 7]),
    ("llm_batch.waits_for(bigint)", "SELECT llm_batch.waits_for(2)", ["="; 7]),
    ("llm_batch.home()", "SELECT llm_batch.home()", ALL),
    ("llm_batch.owner_now(oid,name,text)", "SELECT llm_batch.owner_now(10, 'alice', 'elsewhere') = 'alice'::regrole", ["=t"; 7]),
    ("llm_batch.server_now(oid,name,text)", "SELECT llm_batch.server_now(10, 'fake', 'elsewhere') IS NULL", ["=f"; 7]),
    ("llm_batch.relation_now(oid,text,text)", "SELECT llm_batch.relation_now(10, 'public.tickets', 'elsewhere')::regclass", ["=tickets"; 7]),
    ("llm_batch.refuse_transaction_block(text)", "SELECT llm_batch.refuse_transaction_block('this')", ["25001"; 7]),
];

/// The meaning of a name in `tests/kinds`.
fn named(who: &str) -> [&'static str; 7] {
    match who {
        "USAGE" => USAGE,
        "HERS" => HERS,
        "SUPERUSERS" => SUPERUSERS,
        _ => panic!("{who}"),
    }
}

/// The result of a statement in a transaction that is rolled back; a CALL has its own.
fn comes_to(client: &mut Client, sql: &str) -> String {
    let has_own = sql.starts_with("CALL");
    if !has_own {
        run(client, "BEGIN");
    }
    let result = client.simple_query(sql);
    if !has_own {
        run(client, "ROLLBACK");
    }
    let first = |m: &SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
        _ => None,
    };
    match result {
        Ok(messages) => format!("={}", messages.iter().find_map(first).unwrap_or_default()),
        Err(e) => e.code().map_or_else(|| e.to_string(), |code| code.code().to_owned()),
    }
}

fn is_as_expected(came_to: &str, expected: &str) -> bool {
    expected == "-" || came_to == expected || (expected == "ok" && came_to.starts_with('='))
}

/// Everything that the matrix acts upon.
fn prepare(bed: &Bed) -> Client {
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    for role in &ROLES[..6] {
        run(client, &format!("CREATE ROLE \"{role}\" LOGIN"));
    }
    run(
        client,
        "GRANT pg_monitor TO monitor; GRANT alice TO member;
         GRANT USAGE ON FOREIGN SERVER fake TO \"user\", other, alice;
         ALTER TABLE tickets OWNER TO alice;
         ALTER TABLE tickets ADD second text, ADD third text;
         INSERT INTO tickets SELECT 99, repeat('word ', 100000), 'bug';
         CREATE USER MAPPING FOR alice SERVER fake OPTIONS (api_key 'sk-of-alice');
         CREATE SERVER closed FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1');
         SELECT llm_batch.create_model('locked', server => 'closed', model => 'x');
         SELECT llm_batch.create_classifier('locked', labels => '[\"a\", \"b\"]', model => 'locked');
         SELECT llm_batch.create_classifier('spare', labels => '[\"a\", \"b\"]', model => 'm');",
    );
    let mut alice = bed.cluster.connect_as("postgres", "alice");
    run(
        &mut alice,
        "SELECT llm_batch.create_model('hers', server => 'fake', model => 'fake-hers');
         SELECT llm_batch.create_model('spare', server => 'fake', model => 'x');
         SELECT llm_batch.create_route('path', ARRAY['hers']);
         SELECT llm_batch.create_classifier('hers', labels => '[\"bug\", \"b\"]', model => 'hers')",
    );
    for (_, sql) in kinds::<String>("hers").unwrap() {
        run(&mut alice, &sql);
    }
    assert_eq!(one(&mut alice, "SELECT llm_batch.backfill('tickets', 'body', 'topic', 'topic')"), 1);
    let p = bed.done(1);
    assert_eq!((p.done, p.skipped), (20, 1), "{p:?}");
    bed.provider.hold();
    assert_eq!(
        one(&mut alice, "SELECT llm_batch.backfill('tickets', 'body', 'second', 'topic', filter => 'id < 3')"),
        2
    );
    run(&mut alice, "SELECT llm_batch.pause(2)");
    bed.provider.release();
    wait_status(client, 2, "paused");
    wait_until(
        "its worker is gone",
        PATIENCE,
        || one(client, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'"),
        |n| *n == 0,
    );
    // A stream of hers that stays open, for the gateway's activity.
    assert_eq!(text(&mut alice, "SELECT llm_classify('#r000001:bug#', 'hers')"), "bug");
    alice
}

#[test]
fn roles_and_actions() {
    let bed = Bed::new("matrix");
    let alice = prepare(&bed);
    let client = &mut bed.connect();
    let [gateway, launcher] = ["gateway", "launcher"]
        .map(|what| text(client, &format!("SELECT pid FROM pg_stat_activity WHERE backend_type = 'llm_batch {what}'")));
    let mut wrong = Vec::new();
    let of_kinds = kinds::<(String, String, String)>("rights").unwrap();
    let of_kinds = of_kinds.iter().map(|(_, (function, sql, who))| (function.as_str(), sql.as_str(), named(who)));
    let all: Vec<(&str, &str, [&str; 7])> = ROWS.iter().copied().chain(of_kinds).collect();
    for (_, sql, expected) in &all {
        let sql = &sql.replace("{gateway}", &gateway).replace("{launcher}", &launcher);
        for (role, expected) in ROLES.iter().zip(expected) {
            if *expected == "-" {
                continue;
            }
            // A session for each: what one leaves open is nothing of the next one's.
            let came_to = comes_to(&mut bed.cluster.connect_as("postgres", role), sql);
            if !is_as_expected(&came_to, expected) {
                wrong.push(format!("{role}: {sql}: {came_to}, not {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let functions: BTreeSet<String> = client
        .query(
            "SELECT d.objid::regprocedure::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
              WHERE d.deptype = 'e' AND d.classid = 'pg_proc'::regclass AND e.extname = 'pg_llm_batch'",
            &[],
        )
        .unwrap()
        .iter()
        .map(|r| r.get(0))
        .collect();
    let tried: BTreeSet<String> = all.iter().map(|r| r.0.to_owned()).filter(|f| !f.is_empty()).collect();
    assert_eq!(functions, tried, "each function of the extension has a row, and each row a function");
    // Nothing of all this has left a trace.
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.model"), 4);
    assert_eq!(progress(client, 2).status, "paused");
    drop(alice);
}

/// Nobody but a superuser writes, locks, changes or drops what is the extension's; three tables are not read either.
#[test]
fn what_is_the_extensions() {
    let bed = Bed::new("matrix_tables");
    let _alice = prepare(&bed);
    let client = &mut bed.connect();
    run(client, "GRANT pg_read_all_stats, pg_signal_backend TO other; GRANT CREATE ON DATABASE postgres TO other");
    let relations = client
        .query(
            "SELECT c.relname::text, c.relkind::text,
                    (SELECT min(a.attname)::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0)
               FROM pg_class c WHERE c.relnamespace = 'llm_batch'::regnamespace AND c.relkind NOT IN ('i', 't', 'c') ORDER BY 1",
            &[],
        )
        .unwrap();
    assert!(relations.len() >= 9, "{}", relations.len());
    let mut wrong = Vec::new();
    for role in &ROLES[..6] {
        let session = &mut bed.cluster.connect_as("postgres", role);
        let mut expect = |sql: &str, expected: &[&str]| {
            let came_to = comes_to(session, sql);
            if !expected.iter().any(|e| is_as_expected(&came_to, e)) {
                wrong.push(format!("{role}: {sql}: {came_to}, not {expected:?}"));
            }
        };
        for relation in &relations {
            let (name, kind, column): (String, String, Option<String>) =
                (relation.get(0), relation.get(1), relation.get(2));
            let table = format!("llm_batch.{name}");
            if kind == "S" {
                expect(&format!("SELECT nextval('{table}')"), &[NO]);
                expect(&format!("SELECT setval('{table}', 1)"), &[NO]);
                expect(&format!("SELECT last_value FROM {table}"), &[NO]);
                expect(&format!("ALTER SEQUENCE {table} RESTART"), &[NO]);
                continue;
            }
            let column = column.unwrap();
            let is_read = [
                "model",
                "route",
                "task",
                "task_history",
                "list_price",
                "progress",
                "progress_by_model",
                "failure",
                "activity",
            ]
            .contains(&name.as_str());
            let read: &[&str] = if is_read { &["ok"] } else { &[NO] };
            expect(&format!("SELECT * FROM {table}"), read);
            // A view is refused as what it is, or for the right that lacks.
            let not = if kind == "v" { &[NO, "55000", "42809", "0A000"][..] } else { &[NO] };
            for sql in [
                format!("INSERT INTO {table} DEFAULT VALUES"),
                format!("UPDATE {table} SET {column} = {column}"),
                format!("DELETE FROM {table}"),
                format!("TRUNCATE {table} CASCADE"),
                format!("SELECT * FROM {table} FOR UPDATE"),
                format!("LOCK TABLE {table} IN ROW EXCLUSIVE MODE"),
                format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"),
                format!("ALTER TABLE {table} RENAME COLUMN {column} TO x"),
                format!("ALTER TABLE {table} OWNER TO CURRENT_USER"),
                format!("COMMENT ON {} {table} IS 'x'", if kind == "v" { "VIEW" } else { "TABLE" }),
                format!("DROP {} {table} CASCADE", if kind == "v" { "VIEW" } else { "TABLE" }),
                format!(
                    "CREATE TRIGGER x BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                ),
                format!("CREATE RULE x AS ON UPDATE TO {table} DO INSTEAD NOTHING"),
                format!("CREATE POLICY x ON {table}"),
                format!("CREATE INDEX ON {table} ({column})"),
            ] {
                expect(&sql, not);
            }
        }
        for sql in [
            "CREATE TABLE llm_batch.x (a int)",
            "CREATE FUNCTION llm_batch.x() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE OPERATOR llm_batch.= (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq)",
            "DROP SCHEMA llm_batch CASCADE",
            "DROP EXTENSION pg_llm_batch CASCADE",
            "ALTER EXTENSION pg_llm_batch DROP TABLE llm_batch.job",
            "ALTER FUNCTION llm_batch.pause(bigint) SECURITY DEFINER",
            "CREATE OR REPLACE FUNCTION llm_batch.pause(bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        ] {
            expect(sql, &[NO]);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
