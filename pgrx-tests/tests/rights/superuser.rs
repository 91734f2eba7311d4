//! Jobs of superusers run no code of other roles.

use llm_fake_provider::Config;
use pg_llm_batch_e2e::wait_until;

use super::{BACKFILL, denied, roles};
use crate::common::{self, Bed, PATIENCE, backfill_with, one, progress, run, text, wait_status, warm};

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
