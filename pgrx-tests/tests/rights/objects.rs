//! What roles may do with servers, models, tasks, jobs of others, our tables and settings.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use llm_fake_provider::Config;
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

use super::{BACKFILL, denied, held_job, roles};
use crate::common::{self, Bed, PATIENCE, error, one, run, set, text, tickets, wait_status};

#[test]
fn usage_on_the_server() {
    let bed = Bed::new("rights_usage");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    run(client, "CREATE ROLE carol LOGIN; ALTER TABLE tickets OWNER TO carol");
    let carol = &mut bed.cluster.connect_as("postgres", "carol");
    for sql in [
        BACKFILL,
        "SELECT llm_classify('x', 'topic')",
        "SELECT llm_classify_batch('SELECT 1, body FROM tickets', 'topic')",
        "SELECT llm_batch.create_model('mine', server => 'fake', model => 'x')",
        "SELECT llm_batch.create_classifier('mine', labels => '[\"a\", \"b\"]', model => 'm')",
        "SET llm_batch.default_model = 'm'; SELECT llm_classify('x', ARRAY['a', 'b'])",
    ] {
        denied(carol, sql, "permission denied for foreign server fake");
    }
    // A superuser's job on carol's table runs as carol.
    denied(client, BACKFILL, "permission denied for foreign server fake");
    assert_eq!(bed.provider.stats().requests, 0);
    run(client, "GRANT USAGE ON FOREIGN SERVER fake TO carol");
    let job = one(carol, BACKFILL);
    bed.done(job);
    // Taken away in the middle of a job.
    run(client, "REVOKE USAGE ON FOREIGN SERVER fake FROM carol");
    denied(carol, "SELECT llm_classify('x', 'topic')", "permission denied");
}

#[test]
fn objects_and_jobs_of_others() {
    let bed = Bed::new("rights_others");
    let client = &mut roles(&bed, 100);
    let job = held_job(&bed, client);
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    run(
        client,
        "CREATE ROLE watcher LOGIN; GRANT pg_monitor TO watcher; CREATE ROLE friend LOGIN; GRANT alice TO friend",
    );
    let watcher = &mut bed.cluster.connect_as("postgres", "watcher");
    let friend = &mut bed.cluster.connect_as("postgres", "friend");
    for verb in ["pause", "resume", "cancel", "retry_failed"] {
        for role in [&mut *bob, &mut *watcher] {
            denied(role, &format!("SELECT llm_batch.{verb}({job})"), &format!("must be owner of job {job}"));
        }
    }
    let sees = |client: &mut Client| {
        ["progress", "failure", "activity"].map(|view| one(client, &format!("SELECT count(*) FROM llm_batch.{view}")))
    };
    assert_eq!(sees(alice), [1, 0, 1]);
    assert_eq!(sees(bob), [0, 0, 0]);
    assert_eq!(sees(watcher), [1, 0, 1]);
    assert_eq!(sees(friend), [1, 0, 1]);
    assert_eq!(error(bob, &format!("CALL llm_batch.wait({job})")).0, "42704");
    // Not by a function in a condition either: the views are barriers.
    run(
        bob,
        "CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS
         $$ BEGIN RAISE EXCEPTION 'seen %', $1; END $$",
    );
    for (view, column) in [("progress", "relation"), ("failure", "class"), ("activity", "model")] {
        assert_eq!(one(bob, &format!("SELECT count(*) FROM llm_batch.{view} WHERE pg_temp.leak({column}::text)")), 0);
    }
    // Models and classifiers of the superuser.
    for role in [&mut *alice, &mut *watcher] {
        denied(role, "SELECT llm_batch.alter_model('m', requests_per_minute => 1)", "must be owner of model \"m\"");
        denied(role, "SELECT llm_batch.drop_model('m')", "must be owner of model");
        denied(role, "SELECT llm_batch.alter_classifier('topic', instruction => 'x')", "must be owner of task");
        denied(role, "SELECT llm_batch.drop_task('topic')", "must be owner of task");
    }
    run(alice, "SELECT llm_batch.create_model('mine', server => 'fake', model => 'fake-mine')");
    denied(bob, "SELECT llm_batch.alter_model('mine', requests_per_minute => 1)", "must be owner");
    run(friend, "SELECT llm_batch.alter_model('mine', requests_per_minute => 1000)");
    run(alice, "SELECT llm_batch.drop_model('mine')");
    // Bob has no right on the table.
    denied(bob, &BACKFILL.replace("'tickets'", "'tickets'::regclass"), "permission denied");
    run(client, "GRANT SELECT ON tickets TO bob");
    denied(bob, BACKFILL, "topic");
    assert_eq!(text(friend, &format!("SELECT llm_batch.pause({job})")), "t");
    assert_eq!(text(client, &format!("SELECT llm_batch.resume({job})")), "t");
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!(p.counts(), (100, 100, 0, 0, 0, 0));
}

#[test]
fn our_tables_are_written_by_nobody() {
    let bed = Bed::new("rights_tables");
    let client = &mut roles(&bed, 10);
    let tables: Vec<String> = client
        .query(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relnamespace = 'llm_batch'::regnamespace
                AND c.relkind IN ('r', 'v', 'S', 'm', 'p') ORDER BY 1",
            &[],
        )
        .unwrap()
        .iter()
        .map(|r| r.get(0))
        .collect();
    assert!(tables.len() >= 8, "{tables:?}");
    run(
        client,
        "CREATE ROLE watcher LOGIN; GRANT pg_monitor, pg_read_all_stats TO watcher; GRANT CREATE ON DATABASE postgres TO alice",
    );
    for role in ["alice", "watcher"] {
        let session = &mut bed.cluster.connect_as("postgres", role);
        for table in &tables {
            if table.ends_with("_seq") {
                denied(session, &format!("SELECT nextval('{table}')"), "permission denied");
                denied(session, &format!("SELECT setval('{table}', 1)"), "permission denied");
                continue;
            }
            for sql in [format!("INSERT INTO {table} DEFAULT VALUES"), format!("DELETE FROM {table}")] {
                let (code, message, ..) = error(session, &sql);
                assert!(code == "42501" || (is_view(table) && code == "55000"), "{sql}: {code} {message}");
            }
            denied(
                session,
                &format!("DROP {} {table}", if is_view(table) { "VIEW" } else { "TABLE" }),
                "must be owner",
            );
            if !is_view(table) {
                denied(session, &format!("TRUNCATE {table}"), "permission denied");
                denied(
                    session,
                    &format!(
                        "CREATE TRIGGER x BEFORE UPDATE ON {table} EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                    ),
                    "permission denied",
                );
            }
        }
        for (table, column) in [
            ("job", "wanted"),
            ("job_state", "status"),
            ("model", "server"),
            ("task", "spec"),
            ("task_history", "spec"),
            ("row_failure", "class"),
        ] {
            denied(session, &format!("UPDATE llm_batch.{table} SET {column} = {column}"), "permission denied");
        }
        for table in ["job", "job_state", "row_failure"] {
            denied(session, &format!("SELECT * FROM llm_batch.{table}"), "permission denied");
        }
        denied(session, "CREATE TABLE llm_batch.x (a int)", "permission denied");
        denied(session, "CREATE FUNCTION llm_batch.x() RETURNS int LANGUAGE sql AS 'SELECT 1'", "permission denied");
    }
    // Names of theirs that are like ours get into nobody's way.
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    run(
        alice,
        "CREATE SCHEMA evil;
         CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE FUNCTION evil.count(anyelement) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE FUNCTION evil.concat(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE FUNCTION evil.same(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.same);
         CREATE FUNCTION evil.differs(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE OPERATOR evil.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.differs);
         CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.same);
         CREATE FUNCTION evil.greater(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
         CREATE OPERATOR evil.> (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.greater);
         CREATE TABLE evil.tickets (id bigint PRIMARY KEY);
         CREATE DOMAIN evil.text AS pg_catalog.text;
         SET search_path = evil, pg_catalog, public",
    );
    let job =
        one(alice, "SELECT llm_batch.backfill('public.tickets', input => 'body', target => 'topic', task => 'topic')");
    let sql = format!("CALL llm_batch.wait({job})");
    run(alice, &sql);
    for verb in ["cancel", "retry_failed"] {
        assert_eq!(text(alice, &format!("SELECT llm_batch.{verb}({job})")), "f");
    }
    run(alice, "SELECT * FROM llm_batch.progress; SELECT * FROM llm_batch.failure; SELECT * FROM llm_batch.activity");
    assert_eq!(text(alice, "SELECT llm_classify('#r000001:bug#', 'topic')"), "bug");
    bed.done(job);
    assert_eq!(common::wrong(client, "tickets") + common::left(client, "tickets"), 0);
    assert!(!bed.cluster.log().contains("ERROR:  evil"), "{}", bed.cluster.log());
}

fn is_view(table: &str) -> bool {
    ["progress", "progress_by_model", "failure", "activity"].iter().any(|v| table == format!("llm_batch.{v}"))
}

#[test]
fn allowed_hosts_and_key_files() {
    let bed = Bed::with("rights_allowed", Config { api_key: Some("sk-from-a-file".to_owned()), ..Config::default() });
    let client = &mut roles(&bed, 600);
    run(client, "GRANT USAGE ON FOREIGN DATA WRAPPER llm_provider TO alice; DROP USER MAPPING FOR PUBLIC SERVER fake");
    let url = bed.provider.base_url();
    let secret = bed.cluster.socket_dir().join("key");
    fs::write(&secret, "sk-from-a-file\n").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    let secret = secret.display();

    // A superuser's server: the file is read, for whoever has USAGE.
    let (code, _, _, hint) = error(client, BACKFILL);
    assert_eq!(code, "28000", "{hint}");
    run(client, &format!("ALTER SERVER fake OPTIONS (ADD api_key_file '{secret}')"));
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    assert_eq!(text(alice, "SELECT llm_classify('#r000001:bug#', 'topic')"), "bug");
    for (path, code) in [
        ("/nowhere", "58P01"),
        ("/etc/shadow", "58P01"),
        ("/etc/passwd", "58P01"),
        ("/tmp", "58P01"),
        ("/dev/zero", "58P01"),
    ] {
        run(client, &format!("ALTER SERVER fake OPTIONS (SET api_key_file '{path}')"));
        let (found, message, detail, hint) = error(alice, "SELECT llm_classify('x', 'topic')");
        assert_eq!(found, code, "{path}: {message}");
        assert!(!format!("{message}{detail}{hint}").contains("root:"), "{detail}");
    }
    run(client, &format!("ALTER SERVER fake OPTIONS (SET api_key_file '{secret}')"));
    assert!(alice.batch_execute("ALTER SERVER fake OPTIONS (SET base_url 'https://evil.example')").is_err());

    // A server of hers.
    run(
        alice,
        &format!(
            "CREATE SERVER hers FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{url}', api_key_file '{secret}')"
        ),
    );
    let create = "SELECT llm_batch.create_model('hers', server => 'hers', model => 'x')";
    denied(alice, create, "llm_batch.allowed_hosts");
    // The superuser himself is no way around it.
    denied(client, create, "llm_batch.allowed_hosts");
    set(&bed, "llm_batch.allowed_hosts", "api.openai.com, 127.0.0.1");
    denied(alice, create, "is not allowed to read a key from a file");
    denied(client, create, "is not allowed to read a key from a file");
    run(
        alice,
        "ALTER SERVER hers OPTIONS (DROP api_key_file); CREATE USER MAPPING FOR alice SERVER hers OPTIONS (api_key 'sk-from-a-file')",
    );
    run(alice, create);
    run(alice, "SELECT llm_batch.create_classifier('hers', labels => '[\"bug\", \"spam\"]', model => 'hers')");
    assert_eq!(text(alice, "SELECT llm_classify('#r000001:spam#', 'hers')"), "spam");
    // It does not help to point it elsewhere afterwards.
    run(alice, "ALTER SERVER hers OPTIONS (SET base_url 'https://metadata.internal/v1')");
    denied(alice, "SELECT llm_classify('x', 'hers')", "\"metadata.internal\"");
    run(alice, &format!("ALTER SERVER hers OPTIONS (SET base_url '{url}')"));
    // The host is taken away again, in the middle of a job.
    run(alice, "ALTER TABLE tickets ADD hers text");
    assert_eq!(text(alice, "SELECT llm_classify('#r000001:spam#', 'hers')"), "spam");
    bed.provider.hold();
    let job = one(alice, "SELECT llm_batch.backfill('tickets', input => 'body', target => 'hers', task => 'hers')");
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n > 0);
    run(alice, "ALTER SERVER hers OPTIONS (SET base_url 'https://metadata.internal/v1')");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    assert!(p.last_error.unwrap().contains("metadata.internal"));
    set(&bed, "llm_batch.allowed_hosts", "");
    run(alice, &format!("ALTER SERVER hers OPTIONS (SET base_url '{url}')"));
    denied(alice, "SELECT llm_classify('x', 'hers')", "allowed_hosts");
    let log = bed.cluster.log();
    assert!(!log.contains("from-a-file"), "the key is in the log");
}

#[test]
fn settings_that_a_session_cannot_make() {
    let cluster = Cluster::builder("rights_settings").start();
    let client = &mut cluster.connect("postgres");
    run(client, "CREATE ROLE app LOGIN");
    let app = &mut cluster.connect_as("postgres", "app");
    for name in ["enabled", "databases", "allowed_hosts", "max_job_workers", "gateway_memory"] {
        for session in [&mut *app, &mut *client] {
            let (code, message, ..) = error(session, &format!("SET llm_batch.{name} = '1'"));
            assert_eq!(code, "55P02", "{name}: {message}");
        }
    }
    run(app, "SET llm_batch.default_model = 'x'");
}
