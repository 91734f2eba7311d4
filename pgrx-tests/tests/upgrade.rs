//! An update from a version before ends where a new installation begins, and nothing of ours runs until the extension and
//! the library are of the same version.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Bed, PATIENCE, error, left, one, progress, run, text, tickets, wait_status, wrong};
use llm_fake_provider::{Config, Latency};
use pg_llm_batch_e2e::{Cluster, extension_dir, wait_until};
use postgres::Client;

const ROWS: i64 = 60;

/// All that makes an extension: its members with what they are, may and say. The order of a table's columns is left out.
const SNAPSHOT: &str = "
    WITH e AS (SELECT * FROM pg_extension WHERE extname = 'pg_llm_batch'),
    m AS (SELECT d.classid, d.objid, pg_describe_object(d.classid, d.objid, 0) AS name FROM pg_depend d, e
           WHERE d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'),
    c AS (SELECT m.name, c.* FROM m JOIN pg_class c ON m.classid = 'pg_class'::regclass AND c.oid = m.objid),
    acl (objid, classid, acl) AS (
        SELECT oid, 'pg_class'::regclass, relacl FROM pg_class UNION ALL SELECT oid, 'pg_proc'::regclass, proacl FROM pg_proc
        UNION ALL SELECT oid, 'pg_namespace'::regclass, nspacl FROM pg_namespace
        UNION ALL SELECT oid, 'pg_foreign_data_wrapper'::regclass, fdwacl FROM pg_foreign_data_wrapper)
    SELECT string_agg(line, E'\\n' ORDER BY line COLLATE \"C\") FROM (
        SELECT concat('member ', name, ': ', obj_description(objid, classid::regclass::name)) FROM m
        UNION ALL SELECT concat_ws(' ', 'relation', name, relkind, relpersistence, reloptions, relrowsecurity, relowner::regrole) FROM c
        UNION ALL SELECT concat_ws(' ', 'column', c.name, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                                   a.attcollation::regcollation, pg_get_expr(d.adbin, d.adrelid), a.attacl, col_description(c.oid, a.attnum))
          FROM c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        UNION ALL SELECT concat_ws(' ', 'constraint', c.name, k.conname, pg_get_constraintdef(k.oid)) FROM c JOIN pg_constraint k ON k.conrelid = c.oid
        UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid)) FROM c JOIN pg_index i ON i.indrelid = c.oid
        UNION ALL SELECT concat_ws(' ', 'view', c.name, pg_get_viewdef(c.oid)) FROM c WHERE c.relkind = 'v'
        UNION ALL SELECT concat_ws(' ', 'function', pg_get_functiondef(m.objid)) FROM m WHERE m.classid = 'pg_proc'::regclass
        UNION ALL SELECT concat_ws(' ', 'right', m.name, acl.acl IS NULL, (SELECT string_agg(i::text, ',' ORDER BY i::text) FROM unnest(acl.acl) i))
          FROM m JOIN acl USING (classid, objid)
        UNION ALL SELECT concat_ws(' ', 'first right', m.name, (SELECT string_agg(i::text, ',' ORDER BY i::text) FROM unnest(p.initprivs) i))
          FROM m JOIN pg_init_privs p ON p.classoid = m.classid AND p.objoid = m.objid
        UNION ALL SELECT concat_ws(' ', 'dumped', r.relation::regclass, r.condition) FROM e, unnest(e.extconfig, e.extcondition) r (relation, condition)
        UNION ALL SELECT concat_ws(' ', 'extension', extversion, extrelocatable, extnamespace::regnamespace, extowner::regrole) FROM e
    ) s (line)";

/// The head of an update script, as `sql/README.md` has it.
fn head() -> &'static str {
    include_str!("../../sql/README.md").split("```sql\n").nth(1).and_then(|s| s.split("```").next()).unwrap()
}

fn install(name: &str, script: &str) -> PathBuf {
    let file = extension_dir().join(format!("pg_llm_batch--{name}.sql"));
    if std::fs::read_to_string(&file).ok().as_deref() != Some(script) {
        std::fs::write(&file, script).unwrap_or_else(|e| panic!("cannot write {file:?}: {e}"));
    }
    file
}

/// A version before this one is made of it: views, grants and a procedure are what came since.
fn install_old() {
    let now = env!("CARGO_PKG_VERSION");
    let script = std::fs::read_to_string(extension_dir().join(format!("pg_llm_batch--{now}.sql"))).unwrap();
    let since = script.find("CREATE VIEW llm_batch.progress").unwrap();
    install("0.0.9", &script[..since]);
    install(&format!("0.0.9--{now}"), &format!("{}{}", head(), &script[since..]));
}

/// A server whose database `postgres` has the extension of 0.0.9, with a job that runs on t1 and one that is paused on t2.
fn old_bed(name: &str) -> (Bed, Client) {
    install_old();
    let provider = llm_fake_provider::FakeProvider::start(Config::default()).unwrap();
    let bed = Bed { cluster: Cluster::builder(name).start(), provider };
    let mut client = bed.connect();
    run(
        &mut client,
        &format!(
            "CREATE EXTENSION pg_llm_batch VERSION '0.0.9';
             CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url '{}');
             CREATE USER MAPPING FOR PUBLIC SERVER fake OPTIONS (api_key 'sk-test-0123456789abcdef');
             INSERT INTO llm_batch.model (name, owner, owner_name, home, server, server_name, model, request_timeout, max_request_tokens, parameters)
             SELECT 'm', 10, 'postgres', llm_batch.home(), oid, srvname, 'fake-m', '1 minute', 16000, '{{}}' FROM pg_foreign_server;
             INSERT INTO llm_batch.task (name, owner, owner_name, home, search_path, kind, model, spec, options)
             SELECT 'topic', 10, 'postgres', llm_batch.home(), 'pg_catalog', 'classify', 'm',
                    jsonb_build_object('instruction', 'Tickets.', 'labels', jsonb_agg(l)), '{{\"reuse\": false}}'
               FROM unnest('{{{}}}'::text[]) l",
            bed.provider.base_url(),
            common::LABELS.join(",")
        ),
    );
    for (n, wanted) in [(1, "running"), (2, "paused")] {
        tickets(&mut client, &format!("t{n}"), 1000 * n + 1..=1000 * n + ROWS);
        run(
            &mut client,
            &format!(
                "INSERT INTO llm_batch.job (owner, owner_name, relation, relation_name, targets, target_attnums, target_types,
                     target_type_names, target_typmods, fields, key_names, key_attnums, input, task, options, search_path, home, wanted)
                 VALUES (10, 'postgres', 't{n}'::regclass, 'public.t{n}', '{{topic}}', '{{4}}', ARRAY['text'::regtype], '{{text}}', '{{-1}}', '{{label}}', '{{id}}', '{{1}}',
                         'body', 'topic', '{{}}', 'public', llm_batch.home(), '{wanted}');
                 INSERT INTO llm_batch.job_state (job_id) VALUES ({n})"
            ),
        );
    }
    (bed, client)
}

/// The number of times that the log was told that the versions differ.
fn told(bed: &Bed) -> usize {
    bed.cluster.log().matches("jobs in database \"postgres\" wait").count()
}

#[track_caller]
fn refused(client: &mut Client, call: &str, hint: &str) {
    let e = error(client, &format!("SELECT * FROM {call}"));
    assert!(e.0 == "55000" && e.1.contains("has version") && e.3.contains(hint), "{call}: {e:?}");
}

#[test]
fn an_update_ends_where_a_new_installation_begins() {
    let (mut bed, mut client) = old_bed("upgrade");
    // As after a start with the new library: nothing runs, and everything says why.
    bed.cluster.restart();
    client = {
        drop(client);
        bed.connect()
    };
    let client = &mut client;
    wait_until("the log is told", PATIENCE, || told(&bed), |n| *n == 1);
    let update = "ALTER EXTENSION pg_llm_batch UPDATE";
    for call in [
        "llm_classify('#r900001:bug#', 'topic')",
        "llm_classify('#r900001:bug#', '{a,b}'::text[])",
        "llm_classify_batch('SELECT 1, ''#r900001:bug#''', 'topic')",
        "llm_batch.backfill('t1', 'body', 'topic', 'topic')",
        "llm_batch.pause(1)",
        "llm_batch.resume(2)",
        "llm_batch.cancel(1)",
        "llm_batch.retry_failed(2)",
        "llm_batch.set_owner('model', 'm', 'postgres')",
        "llm_batch.set_owner(1, 'postgres')",
        "llm_batch.forget(2)",
        "llm_batch.create_model('n', 'fake', 'n', parameters => '{\"a\": 1}')",
        "llm_batch.alter_model('m', max_concurrent_requests => 4, parameters => '{\"a\": 1}')",
        "llm_batch.drop_model('m')",
        "llm_batch.create_classifier('c', '[\"a\",\"b\"]', 'm')",
        "llm_batch.alter_classifier('topic', instruction => '')",
        "llm_batch.drop_task('topic')",
    ] {
        refused(client, call, update);
    }
    // Finders have looked more than once by now, and told it once.
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    assert_eq!((one(client, workers), bed.provider.stats().requests), (0, 0));

    run(client, update);
    run(client, "CREATE DATABASE fresh");
    let fresh = &mut bed.cluster.connect("fresh");
    run(fresh, "CREATE EXTENSION pg_llm_batch");
    let (got, want) = (text(client, SNAPSHOT), text(fresh, SNAPSHOT));
    let only =
        |a: &str, b: &str| a.lines().filter(|l| !b.lines().any(|m| m == *l)).map(str::to_owned).collect::<Vec<_>>();
    assert!(
        got == want,
        "only after the update: {:#?}\nonly in a new installation: {:#?}",
        only(&got, &want),
        only(&want, &got)
    );

    // The job that ran goes on by itself, the other is what it was.
    assert_eq!(wait_status(client, 1, "done").counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!(progress(client, 2).reason.as_deref(), Some("user"));
    run(client, "SELECT llm_batch.resume(2)");
    assert_eq!(wait_status(client, 2, "done").counts(), (ROWS, ROWS, 0, 0, 0, 0));
    for table in ["t1", "t2"] {
        assert_eq!((wrong(client, table), left(client, table)), (0, 0), "{table}");
    }
    assert_eq!(told(&bed), 1);
    let log = bed.cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked") && !log.contains("terminated by signal"), "{log}");
}

/// The package was upgraded and the server not restarted: its library is the one from before.
#[test]
fn an_update_before_the_restart_is_refused() {
    let (_bed, mut client) = old_bed("upgrade_early");
    // A script that asks for a library newer than this one, as the next version's would.
    let file = install("0.0.9--99.0", &head().replace("'{0,1,0}'", "'{99,0}'"));
    let e = error(&mut client, "ALTER EXTENSION pg_llm_batch UPDATE TO '99.0'");
    std::fs::remove_file(&file).unwrap();
    assert!(e.0 == "55000" && e.1.contains("still runs the library") && e.3.contains("Restart the server"), "{e:?}");
    assert_eq!(text(&mut client, "SELECT extversion FROM pg_extension WHERE extname = 'pg_llm_batch'"), "0.0.9");
}

/// The extension is newer than the library, while a job runs; and then it is not any more.
#[test]
fn a_library_that_is_too_old() {
    let mut bed = Bed::new("upgrade_library");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=400);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    common::warm(client, "tickets");
    bed.provider.hold();
    let job = common::backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 10}'");
    wait_until("requests are under way", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    let version = text(client, "SELECT extversion FROM pg_extension WHERE extname = 'pg_llm_batch'");
    assert_eq!(text(client, "SHOW llm_batch.library_version"), version);
    run(client, "UPDATE pg_extension SET extversion = '99.0' WHERE extname = 'pg_llm_batch'");
    refused(client, "llm_classify('#r900001:bug#', 'topic')", "Restart it");
    refused(client, &format!("llm_batch.pause({job})"), "Restart it");
    refused(client, "llm_batch.alter_model('m', requests_per_minute => 5)", "Restart it");
    let before = progress(client, job);
    // The worker ends by itself, and notes nothing.
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    bed.provider.release();
    wait_until("the worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    assert_eq!(progress(client, job).status, before.status);
    // The worker's end may have brought a search that told it, once. So does a start.
    bed.cluster.stop();
    let before = told(&bed);
    assert!(before <= 1, "told {before} times");
    bed.cluster.start();
    let client = &mut bed.connect();
    wait_until("the log is told", PATIENCE, || told(&bed), |n| *n > before);
    assert_eq!(one(client, workers), 0);
    run(client, &format!("UPDATE pg_extension SET extversion = '{version}' WHERE extname = 'pg_llm_batch'"));
    assert_eq!(bed.done(job).counts(), (400, 400, 0, 0, 0, 0));
    assert_eq!((wrong(client, "tickets"), left(client, "tickets"), told(&bed)), (0, 0, before + 1));
}

/// `pg_upgrade` from the installation of LLM_BATCH_TEST_OLD_PG_CONFIG to this one, with a job in the middle. While it has a
/// server started, nothing of ours runs in there.
#[test]
fn pg_upgrade_from_an_older_postgres() {
    let Some(old) = std::env::var_os("LLM_BATCH_TEST_OLD_PG_CONFIG") else {
        println!("skipped: LLM_BATCH_TEST_OLD_PG_CONFIG is not set");
        return;
    };
    let old = Path::new(&old).parent().unwrap().to_owned();
    let slow = Latency { base: Duration::from_millis(100), ..Latency::default() };
    let provider = llm_fake_provider::FakeProvider::start(Config { latency: slow, ..Config::default() }).unwrap();
    let mut bed = Bed { cluster: Cluster::builder("pg_upgrade").create(), provider };
    let dir = bed.cluster.socket_dir().to_owned();
    let run_old = |program: &str, args: &[&str]| {
        let output = bed.cluster.tool(old.join(program).to_str().unwrap(), "postgres").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {said}");
        said
    };
    let sql = |command: &str| {
        run_old("psql", &["-X", "-A", "-t", "-p", "5433", "-v", "ON_ERROR_STOP=1", "-c", command, "postgres"])
    };
    // Since 18 clusters have checksums, if nobody says otherwise.
    run_old("initdb", &["-D", "old", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N", "-k"]);
    let conf = format!(
        "shared_preload_libraries = pg_llm_batch\nlisten_addresses = ''\nport = 5433\nunix_socket_directories = '{}'\n",
        dir.display()
    );
    std::fs::OpenOptions::new()
        .append(true)
        .open(dir.join("old/postgresql.conf"))
        .and_then(|mut file| std::io::Write::write_all(&mut file, conf.as_bytes()))
        .unwrap();
    run_old("pg_ctl", &["-D", "old", "-l", "old.log", "-w", "start"]);
    sql("CREATE EXTENSION pg_llm_batch");
    sql(&format!(
        "CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url '{}')",
        bed.provider.base_url()
    ));
    sql("CREATE USER MAPPING FOR PUBLIC SERVER fake OPTIONS (api_key 'sk-test-0123456789abcdef')");
    sql(
        "SELECT llm_batch.create_model('m', 'fake', 'm', max_concurrent_requests => 1, input_price => 0.15, output_price => 0.6)",
    );
    sql("SELECT llm_batch.create_classifier('topic', '[\"bug\", \"other\"]', 'm', options => '{\"reuse\": false}')");
    sql("CREATE TABLE t (gap int, id bigint PRIMARY KEY, body text, topic text); ALTER TABLE t DROP COLUMN gap;
         INSERT INTO t SELECT i, concat('#r', i, ':bug#') FROM generate_series(100001, 100500) i");
    // The probe's, and those of three requests.
    bed.provider.hold_after(4);
    sql("SELECT llm_batch.backfill('t', 'body', 'topic', 'topic', options => '{\"max_rows_per_request\": 10}')");
    wait_until(
        "a part is done, and a request is held",
        PATIENCE,
        || (sql("SELECT count(topic) FROM t").trim().parse::<i64>().unwrap(), bed.provider.stats().in_flight),
        |found| *found == (30, 1),
    );
    // Debian's 15.20 notes something with each column of each table that no pg_upgrade of another build can restore.
    sql("UPDATE pg_attribute SET attoptions = NULL WHERE attoptions::text LIKE '{pg_attver=%}'");
    run_old("pg_ctl", &["-D", "old", "-m", "fast", "-w", "stop"]);
    wait_until("the request is dropped", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    bed.provider.release();
    let requests = bed.provider.stats().requests;
    let data = bed.cluster.data_dir();
    let (old, data) = (old.to_str().unwrap(), data.to_str().unwrap());
    // As pg_upgrade starts it, for a moment.
    run_old("pg_ctl", &["-D", "old", "-l", "old.log", "-o", "-b", "-w", "start"]);
    let ours =
        sql("SELECT string_agg(backend_type, ' ') FILTER (WHERE backend_type LIKE 'llm_batch%') FROM pg_stat_activity");
    run_old("pg_ctl", &["-D", "old", "-m", "fast", "-w", "stop"]);
    assert_eq!(ours.trim(), "");
    let output = bed
        .cluster
        .tool("pg_upgrade", "postgres")
        .args(["-b", old, "-d", "old", "-D", data, "-U", "postgres"])
        .output()
        .unwrap();
    if !output.status.success() {
        let logs =
            Command::new("sh").arg("-c").arg("tail -n 20 data/pg_upgrade_output.d/*/log/*").current_dir(&dir).output();
        panic!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&logs.unwrap().stdout));
    }
    assert_eq!(bed.provider.stats().requests, requests, "a job went on while pg_upgrade had its server started");
    bed.cluster.start();
    let client = &mut bed.connect();
    // It is another cluster to Postgres: jobs wait to be resumed.
    let p = progress(client, 1);
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("restored")));
    assert_eq!(one(client, "SELECT count(topic) FROM t"), p.done);
    run(client, "SELECT llm_batch.resume(1)");
    assert_eq!(wait_status(client, 1, "done").counts(), (500, 500, 0, 0, 0, 0));
    assert_eq!(one(client, "SELECT count(*) FROM t WHERE topic = 'bug'"), 500);
    // Numbers go on, and nothing is left of what pg_upgrade does by hand.
    run(client, "UPDATE t SET topic = NULL WHERE id <= 100020");
    assert_eq!(one(client, "SELECT llm_batch.backfill('t', 'body', 'topic', 'topic')"), 2);
    assert_eq!(wait_status(client, 2, "done").counts(), (20, 20, 0, 0, 0, 0));
    run(client, "DROP EXTENSION pg_llm_batch CASCADE");
    assert_eq!(text(client, "SELECT to_regnamespace('llm_batch') IS NULL"), "t");
}
