//! Whose `llm_batch.default_model` it is.

use postgres::Client;

use crate::common::{self, Bed, error, run};

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
    // Who may maintain a view of another's builds it with the owner's rights.
    if common::version(client) >= 170_000 {
        run(
            carol,
            "CREATE MATERIALIZED VIEW built AS SELECT id, llm_filter(body, 'Is it so?', '{\"reuse\": false}') FROM texts WITH NO DATA;
             GRANT MAINTAIN ON built TO mallory",
        );
        refused(mallory, "REFRESH MATERIALIZED VIEW built", "MAINTAIN");
    } else {
        eprintln!("SKIPPED in part whose_default_model_it_is: MAINTAIN needs Postgres 17");
    }
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
