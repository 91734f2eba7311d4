//! Rights: Postgres' own hold, also in jobs; a job's worker has its owner's rights and no more.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::{Bed, PATIENCE, backfill_with, error, one, progress, run, set, text, tickets, wait_status, warm};
use llm_fake_provider::Config;
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// The statement fails with 42501 and says this.
#[track_caller]
fn denied(client: &mut Client, sql: &str, says: &str) {
    let (code, message, detail, hint) = error(client, sql);
    assert_eq!(code, "42501", "{sql}\n{message}");
    let all = format!("{message}\n{detail}\n{hint}");
    assert!(all.contains(says), "{sql}\n{all}");
}

const BACKFILL: &str = "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic')";

/// Roles `alice` and `bob` with USAGE on the server, and `tickets` of `alice`.
#[track_caller]
fn roles(bed: &Bed, rows: i64) -> Client {
    let mut client = bed.connect();
    tickets(&mut client, "tickets", 1..=rows);
    run(
        &mut client,
        "CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN;
         GRANT USAGE ON FOREIGN SERVER fake TO alice, bob;
         ALTER TABLE tickets OWNER TO alice;",
    );
    client
}

/// A job of `alice`, 5 rows a request, 2 at a time, whose first requests are held back.
#[track_caller]
fn held_job(bed: &Bed, client: &mut Client) -> i64 {
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    warm(client, "tickets");
    bed.provider.hold();
    let mut alice = bed.cluster.connect_as("postgres", "alice");
    let job = backfill_with(&mut alice, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    job
}

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
fn a_superusers_job_on_anothers_table() {
    let bed = Bed::with("rights_superuser", Config { api_key: Some("sk-of-alice".to_owned()), ..Config::default() });
    let client = &mut roles(&bed, 100);
    run(
        client,
        "CREATE USER MAPPING FOR alice SERVER fake OPTIONS (api_key 'sk-of-alice');
         CREATE TABLE seen (what text, who text);
         GRANT ALL ON seen TO PUBLIC;
         ALTER TABLE tickets ADD by text;
         GRANT CREATE ON SCHEMA public TO alice;",
    );
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    // All that alice can have called: a trigger, an expression, the checks of a domain, a default, an index.
    run(
        alice,
        "CREATE FUNCTION note(what text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
         BEGIN
             EXECUTE format('INSERT INTO public.seen VALUES (%L, %L)', what, current_user::text);
             RETURN true;
         EXCEPTION WHEN read_only_sql_transaction OR feature_not_supported THEN
             RAISE WARNING 'seen % as %', what, current_user;
             RETURN true;
         END $$;
         CREATE FUNCTION note_it() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN INSERT INTO public.seen VALUES (TG_ARGV[0], current_user); NEW.by := current_user; RETURN NEW; END $$;
         CREATE TRIGGER note_it BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION note_it('trigger');
         CREATE CONSTRAINT TRIGGER note_late AFTER UPDATE ON tickets DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION note_it('deferred');
         CREATE DOMAIN subject AS text CHECK (note('domain'));
         CREATE FUNCTION noted(t text) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN PERFORM note('input'); RETURN t; END $$;
         CREATE FUNCTION constant() RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM note('constant'); RETURN ''; END $$;
         CREATE VIEW harmless AS SELECT 1;
         ALTER TABLE tickets ALTER topic TYPE subject;
         CREATE INDEX ON tickets (topic) WHERE note(topic);
         TRUNCATE seen;",
    );
    bed.provider.hold();
    std::thread::scope(|scope| {
        // The probe is held back too, so this is on the side.
        let mut session = bed.connect();
        let starts = scope.spawn(move || {
            one(
                &mut session,
                "SELECT llm_batch.backfill('tickets', input => 'noted(body) || constant()', target => 'topic',
                     task => 'topic', filter => 'note(''filter'') AND constant() = ''''',
                     options => '{\"max_rows_per_request\": 10}')",
            )
        });
        wait_until("the probe is in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 1);
        bed.provider.release();
        let job = starts.join().unwrap();
        assert_eq!(text(client, &format!("SELECT owner_name FROM llm_batch.job WHERE id = {job}")), "alice");
        let user = wait_until(
            "the worker is seen",
            PATIENCE,
            || {
                text(
                    client,
                    "SELECT coalesce(string_agg(DISTINCT usename::text, ' '), '') FROM pg_stat_activity WHERE backend_type = 'llm_batch job'",
                )
            },
            |u| !u.is_empty() || progress(&mut bed.connect(), job).status == "done",
        );
        assert!(user == "alice" || user.is_empty(), "the worker runs as {user}");
        bed.done(job);
    });
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE by = 'alice' AND topic = want"), 100);
    let whats = text(client, "SELECT string_agg(DISTINCT what, ' ' ORDER BY what) FROM seen");
    assert_eq!(whats, "deferred trigger");
    let others = text(
        client,
        "SELECT coalesce(string_agg(DISTINCT what || ' as ' || who, ', '), '') FROM seen WHERE who <> 'alice'",
    );
    assert_eq!(others, "", "code of alice's ran with another's rights");
    // A role that may not write causes a warning.
    let log = bed.cluster.log();
    for what in ["billing", "filter", "constant", "input"] {
        assert!(log.contains(&format!("seen {what} as alice")), "{what} was not evaluated");
    }
    let as_superuser: Vec<&str> =
        log.lines().filter(|l| l.contains("WARNING:  seen ") && !l.ends_with("as alice")).collect();
    assert!(as_superuser.is_empty(), "code of alice's ran with another's rights: {as_superuser:#?}");
}

#[test]
fn a_job_has_its_owners_rights_and_no_more() {
    let bed = Bed::new("rights_worker");
    let client = &mut roles(&bed, 50);
    run(
        client,
        "CREATE TABLE secrets (a text); INSERT INTO secrets VALUES ('x');
         CREATE TABLE small (id bigint PRIMARY KEY, body text, topic text, hidden text DEFAULT 'x');
         INSERT INTO small SELECT id, body FROM tickets;
         GRANT SELECT (id, body, topic), UPDATE (topic) ON small TO bob;
         ALTER ROLE bob SET row_security = off;
         ALTER ROLE bob SET search_path = nowhere;",
    );
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let call = |change: &str| {
        let (name, _) = change.split_once(" => ").unwrap();
        let args = [("input", "'body'"), ("target", "'topic'")]
            .map(|(n, v)| if n == name { change.to_owned() } else { format!("{n} => {v}") });
        let more = if args.iter().any(|a| a == change) { String::new() } else { format!(", {change}") };
        format!("SELECT llm_batch.backfill('public.small', {}, task => 'topic'{more})", args.join(", "))
    };
    denied(bob, &call("input => 'hidden'"), "permission denied");
    denied(bob, &call("input => '(SELECT a FROM public.secrets)'"), "permission denied");
    denied(bob, &call("filter => 'EXISTS (SELECT FROM public.secrets)'"), "permission denied");
    denied(bob, &call("input => 'small::text'"), "permission denied");
    denied(bob, &call("target => 'hidden'"), "hidden");
    denied(bob, &call("target => 'body'"), "body");
    denied(bob, BACKFILL.replace("'tickets'", "'public.tickets'").as_str(), "permission denied");
    assert!(bed.provider.stats().rows.is_empty());
    // With the rights on the columns alone it works.
    let job = one(bob, &call("filter => 'true'"));
    let p = bed.done(job);
    assert_eq!(p.counts(), (50, 50, 0, 0, 0, 0));
    // A session that waits for a job runs nothing of another role's, whatever stands first in the search_path.
    run(
        client,
        "CREATE SCHEMA bobs AUTHORIZATION bob; SET ROLE bob;
         CREATE FUNCTION bobs.run(text) RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RAISE 'run as %', current_user; END $$;
         CREATE DOMAIN bobs.status AS text CHECK (bobs.run(value));
         CREATE TYPE bobs.record AS (status bobs.status, reason bobs.status, last_error text, rows_left bigint);
         RESET ROLE; SET search_path = bobs, pg_catalog",
    );
    run(client, &format!("CALL llm_batch.wait({job})"));
    run(client, "RESET search_path");
    // A session of the owner's begins as another role: a job of the owner's does not.
    run(
        client,
        "UPDATE small SET topic = NULL; CREATE ROLE clerk; GRANT clerk TO bob; ALTER ROLE bob SET role = 'clerk'",
    );
    let job = one(bob, &call("filter => 'true'"));
    assert_eq!(bed.done(job).counts(), (50, 50, 0, 0, 0, 0));
    // SELECT on the key is needed too.
    run(client, "UPDATE small SET topic = NULL; REVOKE SELECT (id) ON small FROM bob");
    denied(bob, &call("filter => 'true'"), "id");
}

#[test]
fn an_owner_that_loses_a_right_in_the_middle() {
    let bed = Bed::new("rights_lost");
    let client = &mut roles(&bed, 100);
    run(client, "ALTER TABLE tickets OWNER TO postgres; GRANT SELECT, UPDATE ON tickets TO alice");
    let job = held_job(&bed, client);
    // Slow, so that the provider is not done with all rows before the worker meets the error.
    bed.provider.configure(|c| c.latency.base = Duration::from_secs(2));
    run(client, "REVOKE UPDATE ON tickets FROM alice");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    assert!(p.last_error.unwrap().contains("permission denied"));
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL"), 0);
    let asked = bed.provider.stats().rows.len();
    assert!(asked <= 20, "{asked} rows were paid for though nothing can be written");
    // Resumed without mending, it pauses again, and pays for nothing.
    run(client, &format!("SELECT llm_batch.resume({job})"));
    wait_until(
        "it has paused again",
        PATIENCE,
        || {
            text(
                client,
                &format!(
                    "SELECT j.epoch = s.epoch AND s.status = 'paused' FROM llm_batch.job j JOIN llm_batch.job_state s ON s.job_id = j.id WHERE j.id = {job}"
                ),
            )
        },
        |t| t == "t",
    );
    assert_eq!(progress(client, job).reason.as_deref(), Some("owner"));
    let now = bed.provider.stats().rows.len();
    assert!(now <= asked + 20, "{now} rows were paid for in vain");
    run(client, &format!("GRANT UPDATE ON tickets TO alice; SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    // Rows that were answered before are not paid for again.
    common::all_right_once(&bed, client, &p, 100);
}

/// A row that its owner may see no longer is not sent, unless it was under way when that changed.
#[test]
fn row_security_that_changes_in_the_middle() {
    const ROWS: i64 = 700;
    const SEEN: i64 = 30;
    let bed = Bed::new("rights_policy");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE ROLE staff; CREATE ROLE team; CREATE ROLE bystander; CREATE ROLE alice LOGIN;
         GRANT USAGE ON FOREIGN SERVER fake TO alice;
         SELECT llm_batch.alter_model('m', max_concurrent_requests => 2);
         CREATE FUNCTION visible(id bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS 'BEGIN RETURN true; END'",
    );
    let queued = "SELECT sum(queued)::bigint FROM llm_batch.activity";
    let few = format!("id % 1000 <= {SEEN}");
    let secured = "ALTER TABLE tickets ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON tickets";
    let note = "(SELECT n.body FROM note n WHERE n.id = tickets.id)";
    // One request is answered, and two are under way; one, if the answers that were held back have taught so.
    let waits = |queued: &i64| (ROWS - 15..=ROWS - 10).contains(queued);
    for (n, (input, before, change)) in [
        ("body", "SELECT 1".to_owned(), format!("{secured} USING ({few})")),
        (
            "body",
            format!(
                "GRANT staff TO team; GRANT team TO alice; CREATE POLICY a ON tickets TO staff USING (true);
                 {secured} TO alice USING ({few})"
            ),
            "REVOKE staff FROM team".to_owned(),
        ),
        (
            "body",
            format!("ALTER ROLE alice BYPASSRLS; {secured} USING ({few})"),
            "ALTER ROLE alice NOBYPASSRLS".to_owned(),
        ),
        (
            "body",
            format!("{secured} USING (visible(id))"),
            format!(
                "CREATE OR REPLACE FUNCTION visible(id bigint) RETURNS boolean LANGUAGE plpgsql STABLE
                 AS 'BEGIN RETURN {few}; END'"
            ),
        ),
        // Another table says something of the rows.
        (
            note,
            "GRANT SELECT ON note TO alice".to_owned(),
            format!("ALTER TABLE note ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON note USING ({few})"),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let first = 1000 * (n as i64 + 1);
        tickets(client, "tickets", first + 1..=first + ROWS);
        run(client, "CREATE TABLE note AS TABLE tickets; GRANT SELECT, UPDATE ON tickets TO alice");
        run(client, &before);
        warm(client, "tickets");
        // Until a row is written few are handed over.
        bed.provider.hold_after(1);
        let small = "options => '{\"max_rows_per_request\": 5}'";
        let job = one(
            &mut bed.cluster.connect_as("postgres", "alice"),
            &format!("SELECT llm_batch.backfill('tickets', '{input}', 'topic', 'topic', {small})"),
        );
        wait_until("all rows are in the gateway", PATIENCE, || one(client, queued), waits);
        if n == 0 {
            // A change that leaves rights alone takes nothing back, also if it looks like one.
            run(client, "ANALYZE tickets");
            run(client, "GRANT staff TO bystander; CREATE POLICY new ON tickets FOR INSERT WITH CHECK (true)");
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(2_500) {
                let now = one(client, queued);
                assert!(waits(&now), "{now} rows wait");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        run(client, &change);
        wait_until(&format!("all is taken back: {change}"), PATIENCE / 10, || one(client, queued), |n| *n == 0);
        bed.provider.release();
        let p = bed.done(job);
        assert_eq!((p.total, p.done, p.failed, p.superseded), (ROWS, SEEN, 0, ROWS - SEEN), "{change}: {p:?}");
        let stats = bed.provider.stats();
        let thousand = format!("00{}", n + 1);
        let asked: Vec<_> = stats.rows.iter().filter(|(n, _)| n.starts_with(&thousand)).collect();
        assert_eq!(asked.len() as i64, SEEN, "{change}");
        assert!(asked.iter().all(|(_, r)| r.asked == 1), "{change}");
        assert_eq!(common::wrong(client, "tickets"), 0);
        run(client, "DROP TABLE tickets, note; ALTER ROLE alice NOBYPASSRLS");
    }
    // A right on a column goes the same way.
    tickets(client, "tickets", 9_001..=9_000 + ROWS);
    run(client, "GRANT SELECT (id, body, topic), UPDATE (topic) ON tickets TO alice");
    warm(client, "tickets");
    bed.provider.hold_after(1);
    let job = backfill_with(&mut bed.cluster.connect_as("postgres", "alice"), "tickets", common::SMALL);
    wait_until("all rows are in the gateway", PATIENCE, || one(client, queued), waits);
    run(client, "REVOKE SELECT (body) ON tickets FROM alice");
    wait_until("all is taken back", PATIENCE / 10, || one(client, queued), |n| *n == 0);
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    let asked = bed.provider.stats().rows.keys().filter(|n| n.starts_with("009")).count();
    assert!((10..=15).contains(&asked), "{asked} rows were asked about");
}

#[test]
fn an_owner_that_loses_usage_or_login_in_the_middle() {
    let bed = Bed::new("rights_login");
    let client = &mut roles(&bed, 2000);
    let job = held_job(&bed, client);
    // Noticed with the next page.
    run(client, "REVOKE USAGE ON FOREIGN SERVER fake FROM alice");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    assert!(p.last_error.unwrap().contains("foreign server fake"));
    assert!(p.left > 0, "{}", p.left);
    run(
        client,
        &format!(
            "GRANT USAGE ON FOREIGN SERVER fake TO alice; ALTER ROLE alice NOLOGIN; SELECT llm_batch.resume({job})"
        ),
    );
    let p = wait_until(
        "the job says that its owner can't log in",
        PATIENCE,
        || progress(client, job),
        |p| p.status == "paused" && p.last_error.as_ref().is_some_and(|e| e.contains("log in")),
    );
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    let (code, message, detail, hint) = error(client, BACKFILL.replace("'topic', task", "'want', task").as_str());
    assert!(code == "42809" || code == "28000", "{code} {message} {detail} {hint}");
    run(client, &format!("ALTER ROLE alice LOGIN; SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (2000, 2000, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    // Gone altogether: a role that owns a job but nothing else may be dropped.
    assert!(bed.provider.stats().rows.values().all(|r| r.asked <= 2));
}

/// A session that is open goes on when its role may not log in any more; a job does not.
#[test]
fn an_owner_that_may_not_log_in_any_more() {
    let bed = Bed::new("rights_valid");
    let client = &mut roles(&bed, 4_000);
    let job = held_job(&bed, client);
    for (change, says, back) in [
        ("ALTER ROLE alice NOLOGIN", "log in", "ALTER ROLE alice LOGIN"),
        ("ALTER ROLE alice VALID UNTIL '2001-01-01'", "VALID UNTIL", "ALTER ROLE alice VALID UNTIL 'infinity'"),
        ("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC", "connect", "GRANT CONNECT ON DATABASE postgres TO PUBLIC"),
    ] {
        let before = one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL");
        run(client, change);
        bed.provider.release();
        let p = wait_status(client, job, "paused");
        assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
        assert!(p.last_error.clone().unwrap_or_default().contains(says), "{p:?}");
        let more = one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL") - before;
        assert!(more < 1_200, "{change}: {more} rows after it");
        bed.provider.hold();
        run(client, &format!("{back}; SELECT llm_batch.resume({job})"));
        wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    }
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (4_000, 4_000, 0, 0, 0, 0));
}

/// Code that another role has put on a table never runs as a superuser, even if the superuser comes to own the table in
/// the middle of a job, or a partition is its own.
#[test]
fn a_superuser_fills_no_table_of_another_role() {
    let bed = Bed::with("rights_superuser", common::slow(20));
    let client = &mut roles(&bed, 4_000);
    run(
        client,
        "ALTER TABLE tickets OWNER TO postgres; GRANT CREATE ON SCHEMA public TO bob;
         CREATE TABLE ran (who text); GRANT INSERT ON ran TO PUBLIC;
         SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)",
    );
    warm(client, "tickets");
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    // The worker has looked at the table more than once by then.
    wait_until("rows are written", PATIENCE, || progress(client, job).counts().1, |done| *done > 200);
    bed.provider.hold();
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    run(client, "ALTER TABLE tickets OWNER TO bob");
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    run(
        bob,
        "CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO public.ran VALUES (current_user); RETURN NEW; END';
         CREATE TRIGGER spy BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION spy()",
    );
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    assert!(p.last_error.clone().unwrap_or_default().contains("superuser"), "{p:?}");
    assert_eq!(text(client, "SELECT coalesce(string_agg(DISTINCT who, ' '), '') FROM ran"), "");

    run(
        client,
        "CREATE TABLE parts (id bigint PRIMARY KEY, body text, topic text) PARTITION BY RANGE (id);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (1) TO (1000);
         INSERT INTO parts SELECT n, 'x' FROM generate_series(1, 9) n;
         ALTER TABLE parts_1 OWNER TO bob",
    );
    denied(client, &BACKFILL.replace("'tickets'", "'parts'"), "\"parts_1\" of role \"bob\"");
    run(client, "ALTER TABLE parts OWNER TO bob");
    let job = one(client, &BACKFILL.replace("'tickets'", "'parts'"));
    assert_eq!(text(client, &format!("SELECT owner_name FROM llm_batch.job WHERE id = {job}")), "bob");
}

/// Its job is paused and cancelled, and has a budget: nobody is started for that who can't come up, again and again.
#[test]
fn a_job_whose_owner_cannot_log_in_is_left_alone() {
    let bed = Bed::new("rights_left_alone");
    let client = &mut roles(&bed, 100);
    tickets(client, "his", 1_001..=1_005);
    run(client, "ALTER TABLE his OWNER TO bob");
    let starts = || bed.cluster.log().matches("role \"alice\" is not permitted to log in").count();
    // Later than anything that is to start now.
    let job_of_bob = || {
        run(&mut bed.connect(), "UPDATE his SET topic = NULL");
        let job = one(&mut bed.cluster.connect_as("postgres", "bob"), &BACKFILL.replace("'tickets'", "'his'"));
        bed.done(job);
        job
    };
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    let job = held_job(&bed, client);
    common::pause_held(&bed, client, job);
    wait_until("its worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    run(client, "ALTER ROLE alice NOLOGIN");
    run(client, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1000000)"));
    let old = job_of_bob();
    assert_eq!(starts(), 0);
    // Resumed, and paused before anyone looks: one start is in vain. The search that follows it finds an old job to forget.
    run(
        client,
        &format!(
            "BEGIN; UPDATE llm_batch.job_state SET updated_at = now() - interval '91 days' WHERE job_id = {old};
             SELECT llm_batch.resume({job}); SELECT llm_batch.pause({job}); COMMIT"
        ),
    );
    wait_until("one was started", PATIENCE, starts, |n| *n == 1);
    let is_there = format!("SELECT count(*) FROM llm_batch.progress WHERE job_id = {old}");
    wait_until("a search has looked into it", PATIENCE, || one(client, &is_there), |n| *n == 0);
    bed.provider.configure(|c| c.latency.base = Duration::from_secs(3));
    job_of_bob();
    assert_eq!(starts(), 1);
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "t");
    job_of_bob();
    assert_eq!((starts(), progress(client, job).status.as_str()), (1, "cancelled"));
}

#[test]
fn an_owner_without_login() {
    let bed = Bed::new("rights_nologin");
    let client = &mut roles(&bed, 10);
    run(client, "ALTER ROLE alice NOLOGIN");
    let (code, message, _, hint) = error(client, BACKFILL);
    assert_eq!(code, "28000");
    assert!(message.contains("\"alice\"") && hint.contains("ALTER ROLE alice LOGIN"), "{message} {hint}");
    // A group's table, by a member: the job is the member's own.
    run(client, "GRANT alice TO bob");
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let job = one(bob, BACKFILL);
    assert_eq!(text(client, &format!("SELECT owner_name FROM llm_batch.job WHERE id = {job}")), "bob");
    bed.done(job);
    run(client, "UPDATE tickets SET topic = NULL");
    let (code, ..) = error(bob, &format!("SET ROLE alice; {BACKFILL}"));
    assert_eq!(code, "28000");
    assert_eq!(bed.provider.stats().rows.values().map(|r| r.asked).max(), Some(1));
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

/// The model that the last request named; nothing else was asked since.
#[track_caller]
fn asked_of(bed: &Bed, client: &mut Client, sql: &str) -> String {
    bed.provider.reset_stats();
    run(client, sql);
    let bodies = bed.provider.bodies();
    bodies.last().and_then(|b| b["model"].as_str()).unwrap_or_else(|| panic!("{sql}: nothing was asked")).to_owned()
}

/// `llm_batch.default_model` says where texts go, so it holds for the texts of the role that has set it: not in a function of
/// another role, nor in the policies and views of others.
#[test]
fn whose_default_model_it_is() {
    let bed = Bed::new("rights_default_model");
    let client = &mut bed.connect();
    common::model(client, "his", "");
    run(
        client,
        "CREATE ROLE carol LOGIN; CREATE ROLE mallory LOGIN; CREATE ROLE team; GRANT team TO mallory;
         GRANT USAGE ON FOREIGN SERVER fake TO carol, mallory, team; GRANT CREATE ON SCHEMA public TO carol, mallory",
    );
    let carol = &mut bed.cluster.connect_as("postgres", "carol");
    run(
        carol,
        "CREATE TABLE texts (id int, body text, done bool); INSERT INTO texts VALUES (1, '#r900001:yes#'), (2, '#r900002:no#');
         CREATE FUNCTION one() RETURNS bool LANGUAGE plpgsql SECURITY DEFINER
             AS $$ BEGIN RETURN llm_filter((SELECT body FROM texts WHERE id = 1), 'Is it?', '{\"reuse\": false}'); END $$;
         CREATE FUNCTION all_of() RETURNS bigint LANGUAGE sql SECURITY DEFINER
             AS $$ SELECT count(*) FROM texts WHERE llm_classify(body, ARRAY['yes', 'no'], '{\"reuse\": false}') = 'yes' $$;
         CREATE FUNCTION rows_of() RETURNS bigint LANGUAGE sql SECURITY DEFINER
             AS $$ SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM texts', ARRAY['yes', 'no'], '{\"reuse\": false}') $$;
         CREATE FUNCTION kept() RETURNS void LANGUAGE sql SECURITY DEFINER
             AS $$ SELECT llm_batch.create_classifier('hers', '[\"yes\", \"no\"]') $$;
         CREATE FUNCTION opened() RETURNS refcursor LANGUAGE plpgsql SECURITY DEFINER AS $$ DECLARE c refcursor := 'c'; BEGIN
             OPEN c FOR SELECT llm_filter(body, 'Is it?', '{\"reuse\": false}') FROM texts; RETURN c; END $$;
         CREATE FUNCTION pinned() RETURNS bool LANGUAGE plpgsql SECURITY DEFINER SET llm_batch.default_model = 'm'
             AS $$ BEGIN RETURN llm_filter((SELECT body FROM texts WHERE id = 1), 'Is it?', '{\"reuse\": false}'); END $$;
         CREATE FUNCTION own() RETURNS bool LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
             PERFORM set_config('llm_batch.default_model', 'm', false);
             RETURN llm_filter((SELECT body FROM texts WHERE id = 1), 'Is it?', '{\"reuse\": false}'); END $$;
         CREATE FUNCTION named() RETURNS bool LANGUAGE plpgsql SECURITY DEFINER
             AS $$ BEGIN RETURN llm_filter((SELECT body FROM texts WHERE id = 1), 'Is it?', '{\"model\": \"m\", \"reuse\": false}'); END $$;
         CREATE VIEW viewed AS SELECT id, llm_filter(body, 'Is it so?', '{\"reuse\": false}') FROM texts;
         CREATE VIEW filtered AS SELECT id, done FROM texts WHERE llm_filter(body, 'Is it so?', '{\"reuse\": false}');
         CREATE VIEW within AS SELECT * FROM (SELECT id, (SELECT llm_filter(b.body, 'Is it so?', '{\"reuse\": false}') FROM texts b
             WHERE b.id = a.id) FROM texts a OFFSET 0) s;
         CREATE VIEW called AS SELECT a.id, b.label FROM texts a,
             llm_classify_batch(format('SELECT 1, %L', a.body), ARRAY['yes', 'no'], '{\"reuse\": false}') b;
         CREATE VIEW view_named AS SELECT id, llm_filter(body, 'Is it so?', '{\"model\": \"m\", \"reuse\": false}') FROM texts;
         CREATE TABLE policed AS SELECT * FROM texts; ALTER TABLE policed ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON policed USING (llm_filter(body, 'Is it so?', '{\"reuse\": false}'));
         CREATE TABLE checked (LIKE texts); ALTER TABLE checked ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON checked WITH CHECK (llm_filter(body, 'Is it so?', '{\"reuse\": false}'));
         CREATE TABLE policy_named AS SELECT * FROM texts; ALTER TABLE policy_named ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON policy_named USING (llm_filter(body, 'Is it so?', '{\"model\": \"m\", \"reuse\": false}'));
         GRANT SELECT, UPDATE ON viewed, filtered, within, called, view_named, policed, policy_named TO mallory, team;
         GRANT INSERT ON checked TO mallory",
    );
    let of_definer = ["SELECT one()", "SELECT all_of()", "SELECT rows_of()", "SELECT kept()"];
    let of_author = [
        "SELECT * FROM viewed",
        "SELECT id FROM filtered",
        "UPDATE filtered SET done = true",
        "SELECT * FROM within",
        "SELECT * FROM called",
        "WITH w AS MATERIALIZED (SELECT * FROM viewed) SELECT * FROM w",
        "SELECT (SELECT count(*) FROM filtered f WHERE f.id >= g.id) FROM generate_series(1, 2) g (id)",
        "SELECT id FROM policed",
        "SELECT count(*) FROM policed p JOIN policed q USING (id)",
        "UPDATE policed SET done = true",
        "INSERT INTO checked VALUES (1, '#r900001:yes#')",
    ];
    let all = || of_definer.iter().chain(&of_author);
    let refused = |session: &mut Client, sql: &str, what: &str| {
        bed.provider.reset_stats();
        let (code, message, detail, hint) = error(session, sql);
        assert_eq!(code, "42501", "{what}: {sql}: {message}");
        assert!(message.contains("default_model") && hint.contains("\"model\""), "{sql}: {message} {detail} {hint}");
        assert_eq!(bed.provider.stats().requests, 0, "{what}: {sql}");
    };
    // Set by a session, by its role, by what it is connected with, by a function of its own, by another role that it is.
    let mallory = &mut bed.cluster.connect_as("postgres", "mallory");
    run(mallory, "SET llm_batch.default_model = 'his'");
    for sql in all() {
        refused(mallory, sql, "SET");
        assert_eq!(error(mallory, &format!("BEGIN; SET LOCAL ROLE team; {}", sql)).0, "42501");
        run(mallory, "ROLLBACK");
    }
    run(mallory, "BEGIN; SELECT opened()");
    refused(mallory, "FETCH ALL FROM c", "a cursor");
    run(mallory, "ROLLBACK");
    run(mallory, "RESET llm_batch.default_model; ALTER ROLE mallory SET llm_batch.default_model = 'his'");
    let by_role = &mut bed.cluster.connect_as("postgres", "mallory");
    for sql in all() {
        refused(by_role, sql, "ALTER ROLE");
    }
    run(by_role, "ALTER ROLE mallory RESET llm_batch.default_model");
    run(
        mallory,
        "CREATE FUNCTION his(sql text) RETURNS void LANGUAGE plpgsql SET llm_batch.default_model = 'his'
             AS $$ BEGIN EXECUTE sql; END $$",
    );
    for sql in all() {
        refused(mallory, &format!("SELECT his($_${sql}$_$)"), "SET clause of the caller's");
    }
    // Nothing else is refused: what names its model or pins it, one's own texts, a role that one has become.
    run(mallory, "SET llm_batch.default_model = 'his'");
    for sql in ["SELECT pinned()", "SELECT named()", "SELECT * FROM view_named", "SELECT id FROM policy_named"] {
        assert_eq!(asked_of(&bed, mallory, sql), "fake-m", "{sql}");
    }
    let plain = "SELECT llm_filter('#r900003:yes#', 'Is it?', '{\"reuse\": false}')";
    run(
        mallory,
        &format!(
            "CREATE VIEW mine AS {plain}; CREATE FUNCTION mine() RETURNS bool LANGUAGE sql SECURITY DEFINER AS $$ {plain} $$"
        ),
    );
    for sql in [
        plain,
        "SELECT * FROM mine",
        "SELECT mine()",
        &format!("SET ROLE team; {plain}"),
        &format!("SET llm_batch.default_model = 'his'; RESET ROLE; {plain}"),
    ] {
        assert_eq!(asked_of(&bed, mallory, sql), "fake-his", "{sql}");
    }
    // Views of one over views of another that are changed through: each condition is its view's owner's.
    let asks = |model: &str| format!("llm_filter(body, 'Is it so?', '{{\"reuse\": false{model}}}')");
    let (unnamed, its_own) = (asks(""), asks(", \"model\": \"m\""));
    run(
        carol,
        "CREATE VIEW hers AS SELECT * FROM texts WHERE id > 0 AND id < 9;
         GRANT SELECT, UPDATE ON hers TO mallory",
    );
    run(
        mallory,
        &format!(
            "CREATE TABLE his_texts (id int, body text, done bool); INSERT INTO his_texts VALUES (1, '#r900001:yes#');
             CREATE VIEW over_hers AS SELECT * FROM hers WHERE {unnamed};
             CREATE VIEW over_hers_barrier WITH (security_barrier) AS SELECT * FROM hers WHERE {unnamed};
             CREATE VIEW his AS SELECT * FROM his_texts WHERE {unnamed} AND id > 0; GRANT SELECT, UPDATE ON his TO carol"
        ),
    );
    run(
        carol,
        &format!(
            "CREATE VIEW over_his AS SELECT * FROM his WHERE id > 0 AND {unnamed};
             CREATE VIEW over_his_barrier WITH (security_barrier) AS SELECT * FROM his WHERE {unnamed};
             CREATE VIEW over_his_named AS SELECT * FROM his WHERE {its_own};
             GRANT SELECT, UPDATE ON over_his, over_his_barrier, over_his_named TO mallory"
        ),
    );
    run(mallory, "SET llm_batch.default_model = 'his'");
    for sql in ["UPDATE over_hers SET done = true", "UPDATE over_hers_barrier SET done = true WHERE id < 5 AND id > 0"]
    {
        assert_eq!(asked_of(&bed, mallory, sql), "fake-his", "{sql}");
    }
    for sql in ["UPDATE over_his SET done = true WHERE id < 5", "UPDATE over_his_barrier SET done = true"] {
        refused(mallory, sql, "the outer view's");
    }
    run(mallory, "UPDATE over_his_named SET done = true WHERE id < 5");
    // A superuser, and the role itself, may decide where the texts of a definer or an author go.
    for session in [&mut *client, &mut *carol] {
        run(session, "SET llm_batch.default_model = 'his'");
        for sql in [
            "SELECT one()",
            "SELECT all_of()",
            "SELECT * FROM viewed",
            "BEGIN; SELECT opened(); FETCH ALL FROM c; COMMIT",
        ] {
            assert_eq!(asked_of(&bed, session, sql), "fake-his", "{sql}");
        }
        run(session, "RESET llm_batch.default_model");
    }
    run(client, "SET llm_batch.default_model = 'his'; SET ROLE carol");
    assert_eq!(asked_of(&bed, client, plain), "fake-his");
    run(client, "RESET ROLE; RESET llm_batch.default_model");
    // Settings that a function of another's leaves behind do not hold for one's own texts.
    let victim = &mut bed.connect();
    run(victim, "SELECT own()");
    refused(victim, plain, "left behind");
    assert_eq!(asked_of(&bed, victim, &format!("SET llm_batch.default_model = 'his'; {plain}")), "fake-his");
    // The database's holds for all; a plan that was made under it asks nobody else later.
    run(client, "ALTER DATABASE postgres SET llm_batch.default_model = 'm'");
    let mallory = &mut bed.cluster.connect_as("postgres", "mallory");
    run(mallory, "SET plan_cache_mode = force_generic_plan");
    for (n, sql) in all().enumerate().filter(|(_, sql)| **sql != "SELECT kept()") {
        run(mallory, &format!("PREPARE p{n} AS {sql}"));
        assert_eq!(asked_of(&bed, mallory, &format!("EXECUTE p{n}")), "fake-m", "{sql}");
        run(mallory, "SET llm_batch.default_model = 'his'");
        refused(mallory, &format!("EXECUTE p{n}"), "a plan of before");
        run(mallory, "RESET llm_batch.default_model");
        assert_eq!(asked_of(&bed, mallory, &format!("EXECUTE p{n}")), "fake-m", "{sql}");
    }
}

/// A job's owner is dropped; the table is another's now. Models and servers change hands and names meanwhile.
#[test]
fn owners_and_servers_that_go() {
    let bed = Bed::new("rights_owners");
    let client = &mut roles(&bed, 200);
    // A job of bob's on alice's table, which goes on under a role that owns nothing else.
    run(
        client,
        "GRANT SELECT, UPDATE ON tickets TO bob; CREATE ROLE carol LOGIN; ALTER TABLE tickets ADD by text;
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.by := current_user; RETURN NEW; END $$;
         CREATE TRIGGER note BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION note();
         SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)",
    );
    warm(client, "tickets");
    bed.provider.hold();
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    run(bob, "SELECT llm_batch.create_model('his', 'fake', 'x')");
    let job = backfill_with(bob, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);

    // The table's owner may pause it, and no more.
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    assert_eq!(text(alice, &format!("SELECT llm_batch.pause({job})")), "t");
    assert_eq!(progress(alice, job).reason.as_deref(), Some("user"));
    denied(alice, &format!("SELECT llm_batch.resume({job})"), "must be owner of job");
    denied(alice, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1000000)"), "must be owner of job");
    assert_eq!(text(bob, &format!("SELECT llm_batch.resume({job})")), "t");

    // Given to another role while it runs: the table's owner, and nobody who is not asked.
    denied(alice, &format!("SELECT llm_batch.set_owner({job}, 'alice')"), "must be owner of job");
    denied(bob, &format!("SELECT llm_batch.set_owner({job}, 'alice')"), "SET ROLE \"alice\"");
    denied(client, &format!("SELECT llm_batch.set_owner({job}, 'postgres')"), "superuser");
    // Not to a superuser even if the table is his: bob wrote the expressions.
    run(client, "ALTER TABLE tickets OWNER TO postgres");
    denied(client, &format!("SELECT llm_batch.set_owner({job}, 'postgres')"), "no superuser owned");
    run(client, "ALTER TABLE tickets OWNER TO alice");
    run(client, &format!("SELECT llm_batch.set_owner({job}, 'alice')"));
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!(p.counts(), (200, 200, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert_eq!(text(client, "SELECT owner FROM llm_batch.progress"), "alice");
    // Rows that were under way were written as bob.
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE by = 'alice'"), 190);
    assert_eq!(bed.provider.stats().rows.values().map(|r| r.asked).max(), Some(1), "what was sent was asked again");

    // Bob again: the table's owner may cancel it.
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.hold();
    let job = backfill_with(bob, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    assert_eq!(text(alice, &format!("SELECT llm_batch.cancel({job})")), "t");
    assert_eq!(progress(alice, job).status, "cancelled");
    bed.provider.release();
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("its worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    assert!(common::left(client, "tickets") > 0);

    // The owner is dropped in the middle.
    bed.provider.hold();
    let job = backfill_with(bob, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    run(client, "DROP OWNED BY bob; DROP ROLE bob");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!((p.reason.as_deref(), p.last_error.as_deref()), (Some("owner"), Some("the job's owner was dropped")));
    assert_eq!(text(client, &format!("SELECT owner FROM llm_batch.progress WHERE job_id = {job}")), "bob");
    let e = error(client, &format!("SELECT llm_batch.resume({job})"));
    assert!(e.0 == "28000" && e.1.contains("dropped") && e.3.contains("set_owner"), "{e:?}");
    // The table's owner sees it, may take it over or end it; others may not.
    let carol = &mut bed.cluster.connect_as("postgres", "carol");
    for call in ["resume({})", "cancel({})", "pause({})", "forget({})", "set_owner({}, 'carol')"] {
        denied(carol, &format!("SELECT llm_batch.{}", call.replace("{}", &job.to_string())), "must be owner");
    }
    denied(alice, &format!("SELECT llm_batch.resume({job})"), "Its owner was dropped");
    let e = error(alice, BACKFILL);
    assert!(e.0 == "55006" && e.1.contains(&format!("job {job}")), "{e:?}");
    run(alice, &format!("SELECT llm_batch.set_owner({job}, 'alice'); SELECT llm_batch.resume({job})"));
    bed.done(job);
    assert_eq!((common::wrong(client, "tickets"), common::left(client, "tickets")), (0, 0));

    // His model: nobody's but a superuser's, who gives it to carol.
    denied(carol, "SELECT llm_batch.alter_model('his', requests_per_minute => 5)", "Its owner was dropped");
    run(client, "SELECT llm_batch.set_owner('model', 'his', 'carol')");
    run(carol, "SELECT llm_batch.alter_model('his', requests_per_minute => 5)");
    denied(carol, "SELECT llm_batch.set_owner('model', 'his', 'alice')", "SET ROLE");
    let e = error(client, "SELECT llm_batch.set_owner('server', 'fake', 'alice')");
    assert_eq!(e.0, "22023", "{e:?}");

    // A server is followed by its number: renamed, it is the same; of the same name, another one.
    run(client, "ALTER SERVER fake RENAME TO real");
    assert_eq!(text(client, "SELECT llm_classify('#r000001:bug#', 'topic')"), "bug");
    let url = bed.provider.base_url();
    run(
        client,
        &format!(
            "DROP SERVER real CASCADE; CREATE SERVER real FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{url}');
             CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{url}')"
        ),
    );
    let asked = bed.provider.stats().requests;
    let e = error(client, "SELECT llm_classify('#r000002:bug#', 'topic')");
    assert!(e.0 == "42704" && e.1.contains("of model \"m\" does not exist") && e.3.contains("alter_model"), "{e:?}");
    assert_eq!(bed.provider.stats().requests, asked);
    run(client, "SELECT llm_batch.alter_model('m', server => 'real')");
    assert_eq!(text(client, "SELECT llm_classify('#r000002:bug#', 'topic')"), "bug");
}

/// Jobs that have ended are forgotten when someone says so, or after a while; the log keeps their accounts.
#[test]
fn jobs_that_are_forgotten() {
    let mut bed = Bed::new("rights_forget");
    let client = &mut roles(&bed, 20);
    run(
        client,
        "GRANT SELECT, UPDATE ON tickets TO bob; UPDATE tickets SET body = repeat('word ', 100000) WHERE id = 1",
    );
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let mut again = || {
        run(&mut bed.connect(), "UPDATE tickets SET topic = NULL");
        let job = one(bob, BACKFILL);
        assert_eq!(bed.done(job).counts(), (20, 19, 1, 0, 0, 0));
        job
    };
    let (first, second, old) = (again(), again(), again());
    run(client, &format!("SELECT llm_batch.forget({first})"));
    // The table's owner may, too.
    run(&mut bed.cluster.connect_as("postgres", "alice"), &format!("SELECT llm_batch.forget({second})"));
    let left = |client: &mut Client| {
        text(
            client,
            "SELECT concat_ws('; ', (SELECT string_agg(job_id::text, ' ') FROM llm_batch.progress), (SELECT string_agg(job_id::text, ' ') FROM llm_batch.failure))",
        )
    };
    assert_eq!(left(client), format!("{old}; {old}"));
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.hold_after(1);
    let open = one(bob, BACKFILL);
    run(client, &format!("SELECT llm_batch.pause({open})"));
    let e = error(client, &format!("SELECT llm_batch.forget({open})"));
    assert!(e.0 == "55000" && e.3.contains("cancel"), "{e:?}");
    bed.provider.release();
    wait_status(client, open, "paused");
    // Ended jobs older than the setting go with the next search, and only these.
    run(client, "UPDATE llm_batch.job_state SET updated_at = now() - interval '89 days'");
    bed.cluster.restart();
    let client = &mut bed.connect();
    let searches = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch finder'";
    wait_until("the search at the start is over", PATIENCE, || one(client, searches), |n| *n == 0);
    assert_eq!(
        text(client, "SELECT string_agg(job_id::text, ' ' ORDER BY 1) FROM llm_batch.progress"),
        format!("{old} {open}")
    );
    run(client, "UPDATE llm_batch.job_state SET updated_at = now() - interval '91 days'");
    bed.cluster.restart();
    let client = &mut bed.connect();
    wait_until(
        "the old job is forgotten",
        PATIENCE,
        || text(client, "SELECT string_agg(job_id::text, ' ') FROM llm_batch.progress"),
        |jobs| *jobs == open.to_string(),
    );
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.row_failure"), 0);
    let log = bed.cluster.log();
    for said in [
        format!("llm_batch job {first} is done: column topic of public.tickets"),
        format!("llm_batch job {second} is forgotten: column topic of public.tickets"),
        format!(
            "llm_batch job {old} is forgotten, as llm_batch.keep_finished_jobs says: column topic of public.tickets, task topic, by bob: 19 rows done, 1 skipped"
        ),
    ] {
        assert!(log.contains(&said), "{said}\n{log}");
    }
}
