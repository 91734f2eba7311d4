//! Dumps: what users made survives them, and jobs wake up paused where they are restored.

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{
    Bed, PATIENCE, backfill_with, error, in_flight, left, one, pause_held, progress, run, slow, text, tickets,
    wait_status, wrong,
};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

const ROWS: i64 = 200;
const SMALL: &str = "options => '{\"max_rows_per_request\": 10}'";

/// The rows that must be the same before and after.
const ALL: &str = "
    SELECT concat_ws(E'\n',
      (SELECT string_agg(to_jsonb(m)::text, E'\n' ORDER BY name) FROM llm_batch.model m),
      (SELECT string_agg(to_jsonb(r)::text, E'\n' ORDER BY name) FROM llm_batch.route r),
      (SELECT string_agg(to_jsonb(c)::text, E'\n' ORDER BY name) FROM llm_batch.task c),
      (SELECT string_agg(to_jsonb(h)::text, E'\n' ORDER BY name, version) FROM llm_batch.task_history h),
      (SELECT string_agg(to_jsonb(j)::text, E'\n' ORDER BY id) FROM llm_batch.job j),
      (SELECT string_agg(to_jsonb(s)::text, E'\n' ORDER BY job_id) FROM llm_batch.job_state s),
      (SELECT string_agg(to_jsonb(k)::text, E'\n' ORDER BY job_id, model) FROM llm_batch.job_model k),
      (SELECT string_agg(to_jsonb(f)::text, E'\n' ORDER BY job_id, key) FROM llm_batch.row_failure f),
      (SELECT last_value::text FROM llm_batch.job_id_seq),
      (SELECT string_agg(concat(srvname, srvoptions, srvacl), E'\n') FROM pg_foreign_server))";

/// The rows that are the same in another database of the cluster.
fn everywhere(all: &str) -> String {
    let own = |line: &str| {
        let Ok(serde_json::Value::Object(mut row)) = serde_json::from_str(line) else { return line.to_owned() };
        if ["server", "spec", "policy"].iter().any(|name| row.contains_key(*name)) {
            row.retain(|name, _| name != "home" && name != "server");
        }
        serde_json::Value::Object(row).to_string()
    };
    all.lines().map(own).collect::<Vec<_>>().join("\n")
}

/// Jobs in every state, of two owners, on tables that were changed before. Ids: running, paused by its owner, done with
/// failures, cancelled, in this order.
struct Jobs {
    bed: Bed,
    running: i64,
    paused: i64,
    done: i64,
    cancelled: i64,
}

impl Jobs {
    #[track_caller]
    fn new(name: &str) -> Self {
        let bed = Bed::with(name, slow(20));
        let client = &mut bed.connect();
        run(
            client,
            "CREATE ROLE app LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO app; CREATE SCHEMA app AUTHORIZATION app;
             SELECT llm_batch.alter_model('m', max_concurrent_requests => 2, max_request_tokens => 2000);
             SELECT llm_batch.alter_classifier('topic', instruction => 'Tickets.'),
                    llm_batch.create_extractor('bill', '{\"due\": \"date\", \"a\": \"numeric\"}', 'm'), llm_batch.create_scorer('s', 'x', model => 'm');
             SELECT llm_batch.drop_task('s'), llm_batch.create_route('one of', ARRAY['m'], 'spread')",
        );
        // Columns dropped before leave gaps in the numbers, which a restored table does not have.
        tickets(client, "a", 1..=ROWS);
        run(
            client,
            "ALTER TABLE a DROP COLUMN topic, ADD COLUMN gap int; ALTER TABLE a DROP COLUMN gap, ADD COLUMN topic text;
             ALTER TABLE a OWNER TO app",
        );
        tickets(client, "b", 1001..=1000 + ROWS);
        run(
            client,
            "ALTER TABLE b SET SCHEMA app; ALTER TABLE app.b RENAME TO \"B b\"; ALTER TABLE app.\"B b\" OWNER TO app",
        );
        tickets(client, "c", 2001..=2020);
        run(client, "UPDATE c SET body = body || repeat(' word', 9000) WHERE id > 2018");
        tickets(client, "d", 3001..=3020);
        let done = backfill_with(client, "c", SMALL);
        assert_eq!(wait_status(client, done, "done").counts(), (20, 18, 2, 0, 0, 0));
        assert_eq!(one(client, &format!("SELECT rows_answered FROM llm_batch.job_model WHERE job_id = {done}")), 18);
        // The probe's answer, and those of three requests.
        bed.provider.hold_after(4);
        let paused = backfill_with(&mut bed.cluster.connect_as("postgres", "app"), "app.\"B b\"", SMALL);
        in_flight(&bed, 2);
        pause_held(&bed, client, paused);
        bed.provider.hold_after(4);
        let running = backfill_with(client, "a", SMALL);
        // Cancelled before it has begun.
        run(client, "BEGIN");
        let cancelled = backfill_with(client, "d", SMALL);
        run(client, &format!("SELECT llm_batch.cancel({cancelled}); COMMIT"));
        // Nothing changes any more until the provider goes on.
        wait_until(
            "all that was answered is written",
            PATIENCE,
            || {
                let holds = bed.provider.holds();
                let written = one(client, "SELECT sum(rows_done)::bigint FROM llm_batch.progress");
                let stats = bed.provider.stats();
                (holds, written, stats.rows.len() as i64 - stats.rows_in_flight as i64, stats.in_flight)
            },
            |(holds, written, answered, in_flight)| *holds && written == answered && *in_flight == 2,
        );
        Self { bed, running, paused, done, cancelled }
    }

    /// The states in a database that a dump was restored to; then all goes on, and comes out right.
    #[track_caller]
    fn go_on(&self, there: &mut Client) {
        let state = |client: &mut Client, job| {
            let p = progress(client, job);
            (p.status, p.reason.unwrap_or_default())
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(state(there, self.running), pair("paused", "restored"));
        assert_eq!(state(there, self.paused), pair("paused", "user"));
        assert_eq!(state(there, self.done), pair("done", ""));
        assert_eq!(state(there, self.cancelled), pair("cancelled", ""));
        let e = error(there, &format!("CALL llm_batch.wait({})", self.running));
        assert!(e.1.contains("paused (restored)") && e.3.contains("resume"), "{e:?}");
        let before = one(there, "SELECT count(*) FROM a WHERE topic IS NOT NULL");
        assert_eq!(before, progress(there, self.running).done);
        self.bed.provider.release();
        for job in [self.running, self.paused] {
            run(there, &format!("SELECT llm_batch.resume({job})"));
            assert_eq!(wait_status(there, job, "done").counts(), (ROWS, ROWS, 0, 0, 0, 0));
        }
        for table in ["a", "app.\"B b\""] {
            assert_eq!((wrong(there, table), left(there, table)), (0, 0), "{table}");
        }
        // The route leads to its model, by whose accounts jobs go on.
        run(
            there,
            "SELECT llm_batch.alter_route('one of', policy => 'failover');
             SELECT llm_batch.alter_classifier('topic', model => 'one of')",
        );
        let accounts = "SELECT count(*) FROM llm_batch.progress_by_model m JOIN llm_batch.progress p USING (job_id)
                         WHERE m.model = 'm' AND m.requests = p.requests AND m.cost = p.cost";
        assert_eq!(one(there, accounts), 3);
        // Tasks go on counting their versions.
        run(
            there,
            "SELECT llm_batch.alter_extractor('bill', instruction => 'x'), llm_batch.create_scorer('s', 'x', model => 'm')",
        );
        let versions = "SELECT string_agg(concat(name, version), ' ' ORDER BY name) FROM llm_batch.task";
        assert_eq!(text(there, versions), "bill2 s2 topic3");
        // Failed rows are asked again, and new jobs have new numbers.
        run(there, "UPDATE c SET body = left(body, 40) WHERE id > 2018");
        run(there, &format!("SELECT llm_batch.retry_failed({})", self.done));
        assert_eq!(wait_status(there, self.done, "done").counts(), (20, 20, 0, 0, 0, 0));
        let next = backfill_with(there, "d", SMALL);
        assert!(next > self.cancelled, "{next}");
        wait_status(there, next, "done");
        assert_eq!((wrong(there, "d"), left(there, "d")), (0, 0));
    }
}

/// Gives what a command dumps to another one; what that one complains of.
#[track_caller]
fn pipe(mut dump: Command, mut into: Command) -> String {
    into.env("PGOPTIONS", "-c client_min_messages=warning");
    let mut source = dump.stdout(Stdio::piped()).spawn().unwrap();
    let output = into.stdin(source.stdout.take().unwrap()).output().unwrap();
    assert!(source.wait().unwrap().success(), "{dump:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn tool(cluster: &Cluster, name: &str, args: &[&str]) -> Command {
    let mut command = cluster.tool(name, "postgres");
    command.args(args);
    command
}

fn psql(cluster: &Cluster, db: &str) -> Command {
    tool(cluster, "psql", &["-X", "-q", "-d", db])
}

#[test]
fn a_dump_of_every_kind_holds_all_and_jobs_wake_up_paused() {
    let jobs = Jobs::new("dump_kinds");
    let from = &jobs.bed.cluster;
    let all = text(&mut jobs.bed.connect(), ALL);
    for kind in ["--column-inserts", "--clean", "in parts", "everything", "archive"] {
        let mut to = Cluster::builder(&format!("dump_{kind}").replace(' ', "_")).start();
        if kind != "everything" {
            run(&mut to.connect("postgres"), "CREATE ROLE app LOGIN");
        }
        let complaints = match kind {
            "archive" => pipe(
                tool(from, "pg_dump", &["-Fc", "postgres"]),
                tool(&to, "pg_restore", &["-e", "--single-transaction", "-d", "postgres"]),
            ),
            "in parts" => ["pre-data", "data", "post-data"]
                .map(|part| {
                    let section = format!("--section={part}");
                    pipe(tool(from, "pg_dump", &[&section, "postgres"]), psql(&to, "postgres"))
                })
                .concat(),
            // The role that initdb made is there already.
            "everything" => pipe(tool(from, "pg_dumpall", &[]), psql(&to, "postgres"))
                .replace("ERROR:  role \"postgres\" already exists\n", ""),
            "--clean" => pipe(tool(from, "pg_dump", &[kind, "--if-exists", "postgres"]), psql(&to, "postgres")),
            _ => pipe(tool(from, "pg_dump", &[kind, "postgres"]), psql(&to, "postgres")),
        };
        assert_eq!(complaints.trim_start_matches("psql:"), "", "{kind}");
        assert_eq!(text(&mut to.connect("postgres"), ALL), all, "{kind}");
        if kind == "archive" {
            // The search for jobs at the start of the server finds the one that was resumed, and leaves the other alone.
            run(&mut to.connect("postgres"), &format!("SELECT llm_batch.resume({})", jobs.paused));
            to.restart();
            let there = &mut to.connect("postgres");
            wait_until("it goes on", PATIENCE, || jobs.bed.provider.stats().in_flight, |n| *n == 4);
            assert_eq!(one(there, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'"), 1);
            run(there, &format!("SELECT llm_batch.pause({})", jobs.paused));
            jobs.go_on(there);
            let log = to.log();
            assert!(!log.contains("PANIC") && !log.contains("panicked"), "{log}");
        }
    }
    // The original was not disturbed.
    assert_eq!(jobs.bed.done(jobs.running).counts(), (ROWS, ROWS, 0, 0, 0, 0));
}

/// In the cluster it came from, a dump or a template is a second database with the same jobs.
#[test]
fn another_database_of_the_same_cluster() {
    let jobs = Jobs::new("dump_same");
    let cluster = &jobs.bed.cluster;
    let all = text(&mut jobs.bed.connect(), ALL);
    run(&mut jobs.bed.connect(), "CREATE DATABASE second");
    assert_eq!(pipe(tool(cluster, "pg_dump", &["postgres"]), psql(cluster, "second")), "");
    // Nobody may be connected to a template.
    let other = &mut cluster.connect("second");
    run(other, "ALTER SYSTEM SET llm_batch.enabled = off");
    run(other, "SELECT pg_reload_conf()");
    let copied = wait_until(
        "nobody is connected",
        PATIENCE,
        || other.batch_execute("CREATE DATABASE third TEMPLATE postgres").map_err(|e| e.to_string()),
        Result::is_ok,
    );
    copied.unwrap();
    run(other, "ALTER SYSTEM RESET llm_batch.enabled");
    run(other, "SELECT pg_reload_conf()");
    let third = &mut cluster.connect("third");
    assert_eq!(
        text(third, "SELECT string_agg(DISTINCT home, '') FROM llm_batch.job"),
        text(other, "SELECT string_agg(DISTINCT home, '') FROM llm_batch.job")
    );
    let p = progress(third, jobs.running);
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("restored")));
    // Only the original goes on by itself.
    jobs.bed.provider.release();
    assert_eq!(jobs.bed.done(jobs.running).counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!(progress(third, jobs.running), p);
    jobs.bed.provider.hold();
    // But for where they are at home and the server's number, which a search brings up to date.
    assert_eq!(everywhere(&text(other, ALL)), everywhere(&all));
    jobs.go_on(other);
    run(third, &format!("SELECT llm_batch.resume({})", jobs.running));
    wait_status(third, jobs.running, "done");
    assert_eq!((wrong(third, "a"), left(third, "a")), (0, 0));
}

/// A copy of the files has no numbers that mean something, only names: those that a search noted last.
#[test]
fn names_in_a_copy_of_the_files() {
    let mut bed = Bed::new("dump_files");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    run(client, "UPDATE tickets SET body = body || repeat(' word', 100000) WHERE id > 18");
    let job = backfill_with(client, "tickets", SMALL);
    assert_eq!(bed.done(job).counts(), (20, 18, 2, 0, 0, 0));
    // Another table has its name now, and another server that of a model's.
    let server = "CREATE SERVER gone FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1')";
    run(
        client,
        &format!(
            "ALTER TABLE tickets RENAME TO letters;
             {server}; SELECT llm_batch.create_model('without', 'gone', 'x'); DROP SERVER gone; {server}"
        ),
    );
    tickets(client, "tickets", 1..=20);
    bed.cluster.restart();
    let noted = "SELECT concat_ws(' ', relation_name, (SELECT server = 0 FROM llm_batch.model WHERE name = 'without'))
                   FROM llm_batch.job";
    let client = &mut bed.connect();
    wait_until(
        "a search has noted names",
        Duration::from_secs(30),
        || text(client, noted),
        |n| n == "public.letters t",
    );
    let searches = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch finder'";
    wait_until("the search is over", PATIENCE, || one(client, searches), |n| *n == 0);
    let admin = &mut bed.cluster.connect("template1");
    run(
        admin,
        "ALTER DATABASE postgres IS_TEMPLATE true;
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres'",
    );
    let copied = wait_until(
        "nobody is connected",
        PATIENCE,
        || admin.batch_execute("CREATE DATABASE copy TEMPLATE postgres").map_err(|e| e.to_string()),
        Result::is_ok,
    );
    copied.unwrap();
    let there = &mut bed.cluster.connect("copy");
    assert_eq!(text(there, &format!("SELECT relation FROM llm_batch.progress WHERE job_id = {job}")), "letters");
    run(there, "UPDATE letters SET body = left(body, 40) WHERE id > 18");
    run(there, &format!("SELECT llm_batch.retry_failed({job})"));
    assert_eq!(wait_status(there, job, "done").counts(), (20, 20, 0, 0, 0, 0));
    assert_eq!((left(there, "letters"), left(there, "tickets")), (0, 20));
    let e = error(there, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', 'without')");
    assert!(e.0 == "42704" && e.1 == "server \"gone\" of model \"without\" does not exist", "{e:?}");
}

/// Back to an earlier state, in the very same database, while a job runs.
#[test]
fn the_same_database_restored_over_itself() {
    let jobs = Jobs::new("dump_clean");
    let cluster = &jobs.bed.cluster;
    let all = text(&mut jobs.bed.connect(), ALL);
    let archive = cluster.socket_dir().join("archive");
    cluster.run_tool("pg_dump", &["-Fc", "-f", archive.to_str().unwrap(), "postgres"]);
    cluster.run_tool("pg_restore", &["-e", "--clean", "--if-exists", "-d", "postgres", archive.to_str().unwrap()]);
    let client = &mut jobs.bed.connect();
    assert_eq!(text(client, ALL), all);
    jobs.go_on(client);
    let log = cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked"), "{log}");
}

/// A dump fills one table after the other: meanwhile the worker of a job that runs finds its models' accounts and not yet
/// its own.
#[test]
fn half_of_a_dump_is_restored_over_a_job() {
    let jobs = Jobs::new("dump_half");
    let (bed, running) = (&jobs.bed, jobs.running);
    let client = &mut bed.connect();
    run(client, "CREATE TABLE kept AS SELECT * FROM llm_batch.job_state; DELETE FROM llm_batch.job_state");
    let written = "SELECT count(*) FROM a WHERE topic IS NOT NULL";
    let before = one(client, written);
    bed.provider.release();
    bed.provider.hold();
    // A worker that looks for its job just then finds none, and ends.
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'llm_batch job%'";
    wait_until(
        "answers are written",
        PATIENCE,
        || (one(client, written), one(client, workers)),
        |(now, workers)| *now > before || *workers == 0,
    );
    run(client, "INSERT INTO llm_batch.job_state SELECT * FROM kept");
    let accounts = |client: &mut Client| {
        let sum = |of: &str| format!("(SELECT sum(requests) FROM llm_batch.{of} WHERE job_id = {running})");
        text(client, &format!("SELECT {} || ' ' || {}", sum("progress_by_model"), sum("progress")))
    };
    let alike = |of: &str| of.split_once(' ').is_some_and(|(models, job)| models == job);
    let half = accounts(client);
    assert!(alike(&half), "{half}");
    run(client, &format!("SELECT llm_batch.pause({running})"));
    run(client, &format!("SELECT llm_batch.resume({running})"));
    bed.provider.release();
    wait_status(client, running, "done");
    assert_eq!((wrong(client, "a"), left(client, "a")), (0, 0));
    let all = accounts(client);
    assert!(alike(&all) && all != half, "{all}");
}

/// A role without rights on our tables can dump what is its own, and one that may read everything all of it.
#[test]
fn dumps_of_plain_roles() {
    let jobs = Jobs::new("dump_roles");
    let cluster = &jobs.bed.cluster;
    let client = &mut jobs.bed.connect();
    run(client, "CREATE ROLE reader LOGIN IN ROLE pg_read_all_data");
    let dump = |role, args: &[&str]| {
        let output = cluster.tool("pg_dump", role).args(args).arg("postgres").output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    for args in [["-n", "app"], ["-t", "a"], ["-e", "plpgsql"]] {
        // By -e, the extensions that are dumped are named; public's tables are not all app's.
        let (done, out, complaints) = dump("app", if args[0] == "-e" { &["-e", "plpgsql", "-t", "a"] } else { &args });
        assert!(done && out.contains("COPY ") && !out.contains("llm_batch"), "{args:?}: {complaints}");
    }
    let (done, _, complaints) = dump("app", &[]);
    assert!(!done && complaints.contains("permission denied for table"), "{complaints}");
    let (done, out, complaints) = dump("reader", &[]);
    assert!(done && out.contains("COPY llm_batch.job "), "{complaints}");
    // The superuser's dump has the key; a plain role does not see it.
    assert!(dump("postgres", &[]).1.contains("sk-test-") && !out.contains("sk-test-"));
}

/// Everything is called otherwise at the time of the dump, a role and a table are gone, a table is left out: each job is
/// loaded, and what belongs to whom is told by the names of that time.
#[test]
fn numbers_mean_nothing_elsewhere() {
    let jobs = Jobs::new("dump_names");
    let cluster = &jobs.bed.cluster;
    let client = &mut jobs.bed.connect();
    run(client, "CREATE ROLE leaver LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO leaver");
    for (role, model) in [("app", "of_app"), ("leaver", "of_leaver")] {
        run(
            &mut cluster.connect_as("postgres", role),
            &format!(
                "SELECT llm_batch.create_model('{model}', 'fake', 'x');
                 SELECT llm_batch.create_classifier('{model}', '[\"a\", \"b\"]', '{model}')"
            ),
        );
    }
    run(
        client,
        "CREATE SERVER gone FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1');
         SELECT llm_batch.create_model('without', 'gone', 'x');
         DROP SERVER gone;
         CREATE SERVER gone FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1');
         CREATE TYPE mood AS ENUM ('bug');
         REVOKE ALL ON FOREIGN SERVER fake FROM leaver",
    );
    let number = one(client, "SELECT oid::bigint FROM pg_roles WHERE rolname = 'leaver'");
    run(
        client,
        "DROP ROLE leaver; DROP TABLE c; ALTER ROLE app RENAME TO app2; ALTER SERVER fake RENAME TO fake2;
         ALTER TABLE a RENAME TO a2; ALTER TABLE a2 SET SCHEMA app",
    );
    let p = |client: &mut Client, job: i64| {
        let sql = format!(
            "SELECT concat_ws(' ', status, reason, relation, owner) FROM llm_batch.progress WHERE job_id = {job}"
        );
        text(client, &sql)
    };
    // Here all is followed, but what is gone.
    assert_eq!(p(client, jobs.running), "running app.a2 app2");
    assert_eq!(p(client, jobs.done), "done public.c postgres");
    let e = error(client, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', 'without')");
    assert!(e.0 == "42704" && e.1 == "server \"gone\" of model \"without\" does not exist", "{e:?}");

    let mut to = Cluster::builder("dump_names_2").start();
    let there = &mut to.connect("postgres");
    // The role of that number, and then the one of the owner's name.
    run(
        there,
        &format!(
            "DO $$ BEGIN
                 FOR i IN 1..5000 LOOP
                     EXECUTE format('CREATE ROLE r%s LOGIN', i);
                     EXIT WHEN to_regrole('r' || i)::oid >= {number};
                 END LOOP;
             END $$"
        ),
    );
    let squatter = text(there, &format!("SELECT {number}::oid::regrole"));
    assert!(squatter.starts_with('r'), "{squatter}");
    run(there, "CREATE ROLE app2 LOGIN");
    let but = ["-T", "app.\"B b\"", "-T", "app.a2", "postgres"];
    assert_eq!(pipe(tool(cluster, "pg_dump", &but), psql(&to, "postgres")), "");
    for (job, state) in [
        (jobs.running, "paused table app.a2 app2"),
        (jobs.paused, "paused user app.\"B b\" app2"),
        (jobs.done, "done public.c postgres"),
        (jobs.cancelled, "cancelled d postgres"),
    ] {
        assert_eq!(p(there, job), state);
    }
    for (job, table) in [(jobs.running, "app.a2"), (jobs.paused, "app.\"B b\"")] {
        let e = error(there, &format!("SELECT llm_batch.resume({job})"));
        assert!(e.0 == "42P01" && e.1.contains(table) && e.3.contains("Restore it"), "{e:?}");
    }
    // The tables come after all.
    let these = ["-t", "app.\"B b\"", "-t", "app.a2", "postgres"];
    assert_eq!(pipe(tool(cluster, "pg_dump", &these), psql(&to, "postgres")), "");
    assert_eq!(p(there, jobs.running), "paused restored app.a2 app2");
    jobs.bed.provider.release();
    for (job, table) in [(jobs.running, "app.a2"), (jobs.paused, "app.\"B b\"")] {
        run(there, &format!("SELECT llm_batch.resume({job})"));
        assert_eq!(wait_status(there, job, "done").counts(), (ROWS, ROWS, 0, 0, 0, 0));
        assert_eq!((wrong(there, table), left(there, table)), (0, 0));
    }
    // Nobody owns what the dropped role owned; who has its number does not.
    let mine = |role: &str, model: &str| {
        let sql = format!("SELECT llm_batch.alter_model('{model}', requests_per_minute => 5)");
        let sql = sql + &format!("; SELECT llm_batch.alter_classifier('{model}', instruction => 'x')");
        to.connect_as("postgres", role).batch_execute(&sql).map_err(|e| e.code().unwrap().code().to_owned())
    };
    assert_eq!(mine(&squatter, "of_leaver"), Err("42501".to_owned()));
    assert_eq!(mine("app2", "of_leaver"), Err("42501".to_owned()));
    assert_eq!(mine("app2", "of_app"), Ok(()));
    // A server of the name of the one that was dropped is another one here, too.
    let e = error(there, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', 'without')");
    assert!(e.0 == "42704" && e.1.contains("server \"gone\" of model"), "{e:?}");
    // A restored object is at home once a search has found all of it. It follows its owner and its server then.
    to.restart();
    let there = &mut to.connect("postgres");
    let away = "SELECT string_agg(name, ' ' ORDER BY name) FROM llm_batch.model WHERE home <> llm_batch.home()";
    wait_until("a search", PATIENCE, || text(there, away), |names| names == "of_leaver without");
    run(
        there,
        "ALTER ROLE app2 RENAME TO app3; ALTER SERVER fake2 RENAME TO fake3; CREATE ROLE app2 LOGIN;
         CREATE SERVER fake2 FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1')",
    );
    let mine = |role: &str| {
        let sql = "SELECT llm_batch.alter_model('of_app', requests_per_minute => 5)";
        to.connect_as("postgres", role).batch_execute(sql).map_err(|e| e.code().unwrap().code().to_owned())
    };
    assert_eq!((mine("app3"), mine("app2")), (Ok(()), Err("42501".to_owned())));
    assert_eq!(text(there, "SELECT llm_classify('#r000001:bug#', 'topic')"), "bug");
}

/// A dump without the roles of its owners is loaded all the same.
#[test]
fn a_dump_whose_owners_are_not_there() {
    let jobs = Jobs::new("dump_gone");
    let to = Cluster::builder("dump_gone_2").start();
    let there = &mut to.connect("postgres");
    let complaints =
        pipe(tool(&jobs.bed.cluster, "pg_dump", &["--no-owner", "--no-acl", "postgres"]), psql(&to, "postgres"));
    assert_eq!(complaints, "");
    assert_eq!(one(there, "SELECT count(*) FROM llm_batch.progress"), 4);
    assert_eq!(one(there, "SELECT count(*) FROM llm_batch.row_failure"), 2);
    let e = error(there, &format!("SELECT llm_batch.resume({})", jobs.paused));
    assert!(e.0 == "28000" && e.1 == "the job's owner was dropped" && e.3.contains("set_owner"), "{e:?}");
    // The role is made after all; or another one takes its place.
    run(there, "CREATE ROLE app LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO app; ALTER TABLE a OWNER TO app");
    let give = |role: &str| format!("SELECT llm_batch.set_owner({}, '{role}')", jobs.paused);
    let e = error(there, &give("postgres"));
    assert!(e.0 == "42501" && e.1.contains("superuser"), "{e:?}");
    run(
        there,
        "CREATE ROLE heir LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO heir; GRANT USAGE ON SCHEMA app TO heir; ALTER TABLE app.\"B b\" OWNER TO heir",
    );
    run(there, &give("heir"));
    jobs.go_on(there);
}

/// Restored, and then the table is not what it was: the job says so when it is resumed, and writes nothing.
#[test]
fn a_restored_job_whose_table_is_another() {
    let jobs = Jobs::new("dump_other");
    let cluster = &jobs.bed.cluster;
    let to = Cluster::builder("dump_other_2").start();
    let there = &mut to.connect("postgres");
    run(there, "CREATE ROLE app LOGIN");
    assert_eq!(pipe(tool(cluster, "pg_dump", &["postgres"]), psql(&to, "postgres")), "");
    jobs.bed.provider.release();
    for (change, error) in [
        (
            "ALTER TABLE a RENAME COLUMN topic TO subject",
            "column \"topic\" of public.a was dropped, renamed or replaced",
        ),
        (
            "ALTER TABLE app.\"B b\" RENAME COLUMN id TO number",
            "column \"id\" of app.\"B b\" was dropped, renamed or replaced",
        ),
    ] {
        run(there, change);
        let job = if change.contains("subject") { jobs.running } else { jobs.paused };
        let before = progress(there, job).done;
        run(there, &format!("SELECT llm_batch.resume({job})"));
        let p = wait_status(there, job, "failed");
        assert!(p.done == before && p.last_error.as_deref().unwrap_or_default().contains(error), "{p:?}");
    }
    let before = one(there, "SELECT count(*) FROM a WHERE subject IS NOT NULL");
    assert_eq!(before, progress(there, jobs.running).done);
}
