//! Code that another role has planted where a job or a session comes by: triggers, domains, casts, operators, functions,
//! indexes, policies, defaults. It runs with the rights of the job's owner at most, whatever it tries.

mod common;

use common::{Bed, error, one, run, text, tickets};
use postgres::Client;

/// `attack(what)` notes who it runs as, then tries all that only others may do. `seen` has what it came to.
const ATTACK: &str = r#"
GRANT USAGE ON SCHEMA evil TO PUBLIC;
CREATE FUNCTION evil.attack(what text) RETURNS boolean LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog AS $$
DECLARE
    mine text := (SELECT backend_type FROM pg_stat_activity WHERE pid = pg_backend_pid());
    sql text;
BEGIN
    -- Once a statement and what is enough.
    IF current_setting('evil.busy', true) = 'on' THEN RETURN true; END IF;
    PERFORM set_config('evil.busy', 'on', true);
    INSERT INTO public.seen VALUES (what, current_user, session_user, mine);
    -- A statement that fails takes the row back with it.
    RAISE LOG 'planted: % by %.', what, current_user;
    IF (SELECT count(*) < 4 FROM public.seen s WHERE s.what = $1 AND s.kind = mine) THEN
    FOREACH sql IN ARRAY ARRAY[
        'SET ROLE postgres', 'SET LOCAL ROLE postgres', 'SET SESSION AUTHORIZATION postgres',
        'UPDATE llm_batch.job SET wanted = wanted', 'UPDATE llm_batch.job_state SET rows_done = 7',
        'DELETE FROM llm_batch.row_failure', 'DELETE FROM llm_batch.model', 'LOCK TABLE llm_batch.job',
        'CREATE TABLE llm_batch.x ()', 'ALTER ROLE alice SUPERUSER', 'GRANT pg_read_server_files TO alice',
        'SELECT pg_read_file(''PG_VERSION'')', 'COPY public.seen TO PROGRAM ''true''', 'SELECT * FROM public.secrets',
        'SELECT * FROM pg_catalog.pg_authid'
    ] LOOP
        BEGIN
            EXECUTE sql;
            INSERT INTO public.seen VALUES (what || ': ' || sql, current_user, session_user, mine, true);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    -- These may work, and must lead nowhere.
    FOREACH sql IN ARRAY ARRAY['RESET ROLE', 'SET ROLE NONE', 'RESET SESSION AUTHORIZATION', 'SET SESSION AUTHORIZATION DEFAULT'] LOOP
        BEGIN
            EXECUTE sql;
            INSERT INTO public.seen VALUES (what || ': ' || sql, current_user, session_user, mine);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    END IF;
    PERFORM set_config('evil.busy', 'off', true);
    RETURN true;
END $$;
CREATE FUNCTION evil.still(what text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN RETURN evil.attack(what); END $$;
-- Operators and functions that are named like those of Postgres, and do what these do, after an attack.
DO $$
DECLARE f record;
BEGIN
    FOR f IN SELECT o.oprname AS op, format_type(o.oprleft, NULL) AS l, format_type(o.oprright, NULL) AS r, format_type(o.oprresult, NULL) AS t, o.oid
               FROM pg_operator o
              WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprname IN ('=', '<>', '<', '>', '<=', '>=', '||', '+', '-', '*', '/', '&')
                AND o.oprleft::regtype IN ('bigint', 'int', 'smallint', 'text', 'name', 'oid', 'boolean', '"char"', 'numeric', 'float8',
                                           'jsonb', 'timestamptz', 'interval', 'regclass', 'int2vector', 'oidvector')
                AND o.oprright::regtype IN ('bigint', 'int', 'smallint', 'text', 'name', 'oid', 'boolean', '"char"', 'numeric', 'float8',
                                            'jsonb', 'timestamptz', 'interval', 'regclass', 'int2vector', 'oidvector')
    LOOP
        EXECUTE format('CREATE FUNCTION evil.f%s(a %s, b %s) RETURNS %s LANGUAGE plpgsql IMMUTABLE AS
            $b$BEGIN PERFORM evil.still(%L); RETURN a OPERATOR(pg_catalog.%s) b; END$b$', f.oid, f.l, f.r, f.t, 'operator ' || f.op, f.op);
        EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.f%s)', f.op, f.l, f.r, f.oid);
    END LOOP;
    FOR f IN SELECT p.proname AS name, pg_get_function_identity_arguments(p.oid) AS args, p.pronargs AS n,
                    CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || format_type(p.prorettype, NULL) AS t, p.proretset AS many
               FROM pg_proc p
              WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND p.provariadic = 0 AND p.proargmodes IS NULL
                AND p.prolang <> (SELECT oid FROM pg_language WHERE lanname = 'sql')
                AND p.proname IN ('set_config', 'current_setting', 'now', 'clock_timestamp', 'pg_sleep', 'quote_ident', 'left', 'lower',
                    'length', 'to_regclass', 'pg_has_role', 'has_server_privilege', 'has_column_privilege', 'hashtext',
                    'hashtextextended', 'pg_advisory_xact_lock', 'pg_notify', 'round', 'trim_scale', 'ceil', 'make_interval',
                    'current_schemas', 'starts_with', 'random', 'format_type', 'pg_partition_root', 'pg_cancel_backend', 'text')
                AND NOT EXISTS (SELECT FROM unnest(p.proargtypes) a WHERE a IN ('internal'::regtype, 'cstring'::regtype))
                AND p.prorettype <> 'cstring'::regtype
    LOOP
        EXECUTE format('CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql AS $b$BEGIN PERFORM evil.attack(%L); %s; END$b$',
            f.name, regexp_replace(f.args, '"?\m\w+"? DEFAULT [^,]*', '', 'g'), f.t, 'function ' || f.name,
            CASE WHEN f.t = 'void' THEN 'RETURN' WHEN f.many THEN 'RETURN' ELSE 'RETURN NULL' END);
    END LOOP;
END $$;
CREATE TABLE evil.job (id bigint); CREATE TABLE evil.job_state (id bigint); CREATE TABLE evil.pg_class (oid oid);
CREATE TABLE evil.pg_extension (extname name, extowner oid); CREATE DOMAIN evil.text AS pg_catalog.text CHECK (evil.still('type text'));
CREATE DOMAIN evil.int4 AS pg_catalog.int4 CHECK (evil.still('type int4'));
CREATE DOMAIN evil.int8 AS pg_catalog.int8 CHECK (evil.still('type int8'));
CREATE DOMAIN evil.regclass AS pg_catalog.regclass CHECK (evil.still('type regclass'));
CREATE DOMAIN evil.name AS pg_catalog.name CHECK (evil.still('type name'));
CREATE TYPE evil.mood AS ENUM ('billing', 'bug', 'shipping', 'refund', 'account', 'praise', 'spam', 'other');
CREATE FUNCTION evil.to_mood(pg_catalog.text) RETURNS evil.mood LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM evil.still('cast'); RETURN enum_first(NULL::evil.mood); END $$;
CREATE CAST (pg_catalog.text AS evil.mood) WITH FUNCTION evil.to_mood(pg_catalog.text) AS ASSIGNMENT;
CREATE DOMAIN evil.subject AS pg_catalog.text CHECK (evil.still('domain'));
CREATE FUNCTION evil.fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.attack(TG_ARGV[0]); RETURN NEW; END $$;
"#;

/// Makes `tickets` of alice's a minefield.
const MINES: &str = r#"
ALTER TABLE tickets ALTER topic TYPE evil.subject;
ALTER TABLE tickets ADD second evil.mood;
ALTER TABLE tickets ADD g boolean GENERATED ALWAYS AS (evil.still('generated ' || coalesce(topic, ''))) STORED;
ALTER TABLE tickets ADD CHECK (evil.still('check ' || coalesce(topic, '')));
CREATE TRIGGER a BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION evil.fire('before');
CREATE TRIGGER b AFTER UPDATE ON tickets FOR EACH STATEMENT EXECUTE FUNCTION evil.fire('after');
CREATE CONSTRAINT TRIGGER c AFTER UPDATE ON tickets DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.fire('deferred');
CREATE INDEX ON tickets ((evil.still('index ' || coalesce(topic, ''))));
ALTER TABLE tickets ENABLE ROW LEVEL SECURITY; ALTER TABLE tickets FORCE ROW LEVEL SECURITY;
CREATE POLICY p ON tickets USING (evil.attack('policy'));
"#;

fn prepare(bed: &Bed) -> Client {
    let mut client = bed.connect();
    tickets(&mut client, "tickets", 1..=60);
    run(
        &mut client,
        "CREATE ROLE alice LOGIN; CREATE ROLE mallory LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO alice;
         CREATE TABLE secrets (a text);
         CREATE TABLE seen (what text, who text, session text, kind text, done boolean DEFAULT false,
             n bigint GENERATED ALWAYS AS IDENTITY);
         GRANT ALL ON seen TO PUBLIC;
         CREATE SCHEMA evil AUTHORIZATION mallory;
         GRANT CREATE ON SCHEMA public TO alice;
         ALTER TABLE tickets OWNER TO alice;",
    );
    // By sessions of their own: in one that a superuser has lent them they could take back his rights, as anyone can.
    run(&mut bed.cluster.connect_as("postgres", "mallory"), ATTACK);
    run(&mut bed.cluster.connect_as("postgres", "alice"), MINES);
    run(&mut client, "TRUNCATE seen");
    client
}

/// Checks that no forbidden code ran. Returns the code that ran, and its roles.
#[track_caller]
fn judge(client: &mut Client, allowed: &[&str]) -> String {
    run(client, "SET search_path = pg_catalog, public");
    // The first tells how; after it there may be no holding.
    let first = |condition: &str| {
        format!(
            "SELECT coalesce((SELECT format('%s by %s (session of %s) in %s', what, who, session, kind) FROM seen
              WHERE {condition} ORDER BY n LIMIT 1), '')"
        )
    };
    let others = first(&format!("who <> ALL ('{{{}}}')", allowed.join(",")));
    assert_eq!(text(client, &others), "", "what was planted ran as another");
    assert_eq!(text(client, &first("done")), "", "what nobody else may do was done");
    text(client, "SELECT coalesce(string_agg(DISTINCT split_part(what, ' ', 1), ' '), '') FROM seen WHERE what !~ ':'")
}

const BACKFILL: &str =
    "SELECT llm_batch.backfill('public.tickets', input => 'body || ''''', target => 'topic', task => 'topic',
    filter => 'id > 0 AND evil.still(''filter'')', options => '{\"max_rows_per_request\": 20}')";

/// A superuser, with mallory's schema before all others in his path, fills alice's table: nothing runs as him, not even
/// what backfill() itself does, nor what he calls to look after the job.
#[test]
fn a_superuser_fills_a_minefield() {
    let bed = Bed::new("planted_superuser");
    let client = &mut prepare(&bed);
    let before = bed.cluster.log().len();
    let evil = "SET search_path = evil, pg_catalog, public";
    run(client, evil);
    run(
        client,
        "SELECT rows FROM llm_batch.estimate('public.tickets', input => 'body', target => 'topic', task => 'topic')",
    );
    let job = one(client, BACKFILL);
    run(client, &format!("CALL llm_batch.wait({job}, '2 min')"));
    let ran = judge(client, &["alice"]);
    for what in ["before", "after", "deferred", "domain", "filter", "policy", "check", "generated", "index", "operator"]
    {
        assert!(ran.split(' ').any(|r| r == what), "{what} did not run: {ran}");
    }
    bed.done(job);
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE topic::text = want"), 60);

    // Each of these statements of his maintenance runs statements of ours, in his session.
    run(client, evil);
    run(client, "BEGIN");
    let job = one(client, &BACKFILL.replace("'topic', task", "'second', task"));
    run(client, &format!("SELECT llm_batch.pause({job}); COMMIT"));
    assert_eq!(error(client, &format!("CALL llm_batch.wait({job}, '2 min')")).0, "55000");
    for sql in [
        "SELECT * FROM llm_batch.progress; SELECT * FROM llm_batch.failure; SELECT * FROM llm_batch.activity",
        &format!("SELECT llm_batch.alter_job({job}, max_tokens => 100000), llm_batch.resume({job})"),
        &format!("CALL llm_batch.wait({job}, '2 min')"),
        &format!("SELECT llm_batch.retry_failed({job}), llm_batch.cancel({job})"),
        "SELECT llm_batch.create_model('x', server => 'fake', model => 'x', request_timeout => '5 s')",
        "SELECT llm_batch.create_route('y', ARRAY['x', 'm']); SELECT llm_batch.alter_route('y', ARRAY['m']), llm_batch.drop_route('y')",
        "SELECT llm_batch.alter_model('x', requests_per_minute => 5, reset => '{input_price}'), llm_batch.drop_model('x')",
        "SELECT llm_batch.create_classifier('x', labels => '[\"a\", \"b\"]', model => 'm')",
        "SELECT llm_batch.alter_classifier('x', instruction => 'y'), llm_batch.drop_task('x')",
        "SELECT public.llm_classify('#r900001:bug#', 'topic')",
        "SELECT * FROM public.llm_classify_batch('SELECT 1, ''#r900002:bug#''', 'topic')",
        "SET llm_batch.statement_max_cost = 1; SELECT public.llm_classify('#r900003:bug#', 'topic')",
    ] {
        run(client, sql);
    }
    let ran = judge(client, &["alice"]);
    assert!(ran.split(' ').any(|r| r == "cast"), "the cast did not run: {ran}");
    let log = bed.cluster.log().split_off(before);
    let others: Vec<&str> = log.lines().filter(|l| l.contains("planted: ") && !l.ends_with("by alice.")).collect();
    assert!(log.contains("planted: ") && others.is_empty(), "{others:#?}");
}

/// Literals are read when an expression is looked at, long before anything runs: each of these types has an input function
/// that comes by a domain's CHECK, and so calls a function of alice's.
#[test]
fn literals_are_read_as_the_owner() {
    let bed = Bed::new("planted_literals");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    run(
        client,
        "CREATE ROLE alice LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO alice; GRANT CREATE ON SCHEMA public TO alice;
         ALTER TABLE tickets OWNER TO alice; CREATE TABLE seen (what text, who text); GRANT ALL ON seen TO alice",
    );
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    run(
        alice,
        "CREATE FUNCTION bait(what text) RETURNS bool LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO public.seen VALUES (what, current_user); RETURN true; END $$;
         CREATE DOMAIN lure AS text CHECK (bait(VALUE));
         CREATE TYPE pair AS (a lure, b int);
         CREATE TYPE span AS RANGE (subtype = lure, multirange_type_name = spans);
         ALTER TABLE tickets ADD array_of lure[], ADD pair pair, ADD span span, ADD spans spans, ADD pairs pair[],
             ADD label lure[]",
    );
    for (column, literal) in [
        ("array_of", "'{x}'"),
        ("pair", "'(x,1)'::pair"),
        ("span", "'[x,y]'"),
        ("spans", "'{[x,y]}'"),
        ("pairs", r#"'{"(x,1)"}'"#),
    ] {
        let given = format!("{column} IS DISTINCT FROM {literal}").replace('\'', "''");
        for arguments in [
            format!("input => 'body', filter => '{given}'"),
            format!("input => 'body || ({given})'"),
            format!("input => 'body', options => '{{\"isolation\": \"{}\"}}'", given.replace('"', "\\\"")),
        ] {
            run(client, "TRUNCATE seen");
            let call = format!("'tickets', {arguments}, target => 'topic', task => 'topic'");
            run(client, &format!("SELECT rows FROM llm_batch.estimate({call})"));
            // The job never begins.
            run(client, &format!("BEGIN; SELECT llm_batch.backfill({call})"));
            let who = text(client, "SELECT string_agg(DISTINCT who, ' ') FROM seen");
            assert_eq!(who, "alice", "{call}");
            run(client, "ROLLBACK");
        }
    }
    // Labels are read as values of the target's type.
    run(client, "TRUNCATE seen; SELECT llm_batch.create_classifier('arrays', '[\"{a}\", \"{b}\"]', 'm')");
    run(client, "SELECT rows FROM llm_batch.estimate('tickets', input => 'body', target => 'label', task => 'arrays')");
    assert_eq!(text(client, "SELECT string_agg(DISTINCT who, ' ') FROM seen"), "alice");
}

/// Advisory locks are anyone's to take; none of them holds up a job.
#[test]
fn advisory_locks_hold_up_nobody() {
    let bed = Bed::new("planted_locks");
    let client = &mut bed.connect();
    run(client, "CREATE ROLE mallory LOGIN");
    tickets(client, "tickets", 1..=40);
    let mallory = &mut bed.cluster.connect_as("postgres", "mallory");
    run(mallory, "SELECT pg_advisory_lock(hashtext('llm_batch'), hashtext('tickets'::regclass::oid || ' topic'))");
    run(
        mallory,
        "SELECT pg_advisory_lock(n), pg_advisory_lock(hashtext('llm_batch'), n) FROM generate_series(0, 100) n",
    );
    run(client, "SET statement_timeout = '60 s'");
    let job = common::backfill(client, "tickets");
    bed.done(job);
}
