//! Cursors: what changes between two FETCHes, and going back.

use std::collections::BTreeSet;

use super::{count_anew, questions, settle};
use crate::common::{Bed, error, run};

/// Between two FETCHes much may change: nothing that was read ahead or opened before holds on after it.
#[test]
fn what_changes_between_two_fetches() {
    let bed = Bed::new("batch_fetches");
    let c = &mut bed.connect();
    questions(c, 200);
    run(
        c,
        "SELECT llm_batch.create_model('n', server => 'fake', model => 'other');
         CREATE ROLE analyst LOGIN; GRANT SELECT, UPDATE ON t TO analyst; GRANT USAGE ON FOREIGN SERVER fake TO analyst",
    );
    let analyst = &mut bed.cluster.connect_as("postgres", "analyst");
    // Another default model: each text goes to one.
    count_anew(&bed);
    run(c, "BEGIN; DECLARE x CURSOR FOR SELECT id, llm_classify(body, ARRAY['bug', 'spam']) FROM t");
    for model in ["m", "n", "n", "m", "n"] {
        run(c, &format!("SET LOCAL llm_batch.default_model = '{model}'"));
        for row in c.query("FETCH 40 FROM x", &[]).unwrap() {
            let want = if row.get::<_, i32>(0) % 4 == 0 { "bug" } else { "spam" };
            assert_eq!(row.get::<_, &str>(1), want);
        }
    }
    run(c, "COMMIT");
    let rows = bed.provider.stats().rows;
    assert!(rows.len() == 200 && rows.values().all(|r| r.asked == 1), "{rows:?}");
    let models: BTreeSet<String> = bed.provider.bodies().iter().map(|body| body["model"].to_string()).collect();
    assert_eq!(models.len(), 2, "{models:?}");
    // A task that is altered.
    run(analyst, "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body || 1, 'topic') FROM t; FETCH 5 FROM x");
    run(c, "SELECT llm_batch.alter_classifier('topic', instruction => 'As of now.')");
    count_anew(&bed);
    run(analyst, "FETCH 100 FROM x");
    let is_new = |body: &serde_json::Value| body.to_string().contains("As of now.");
    let bodies = bed.provider.bodies();
    assert!(bodies.last().is_some_and(is_new), "{bodies:?}");
    // A model that is.
    run(c, "SELECT llm_batch.alter_model('m', model => 'renamed')");
    count_anew(&bed);
    run(analyst, "FETCH 40 FROM x");
    let bodies = bed.provider.bodies();
    assert!(bodies.last().is_some_and(|body| body["model"] == "renamed"), "{bodies:?}");
    // A key that is, with rows that nobody has asked about: the provider takes no other.
    let many = "SELECT llm_classify(concat(body, g), 'topic') FROM t, generate_series(2, 11) g";
    run(analyst, &format!("DECLARE y CURSOR FOR {many}; FETCH 5 FROM y"));
    settle(&bed);
    run(c, "ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key 'sk-anew')");
    bed.provider.configure(|config| config.api_key = Some("sk-anew".to_owned()));
    count_anew(&bed);
    run(analyst, "FETCH 1000 FROM y");
    let stats = bed.provider.stats();
    assert!(stats.requests > 0 && !stats.by_status.contains_key(&401), "{stats:?}");
    // A right that is revoked.
    run(c, "REVOKE USAGE ON FOREIGN SERVER fake FROM analyst");
    count_anew(&bed);
    let e = error(analyst, "FETCH ALL FROM x");
    assert_eq!(e.0, "42501", "{e:?}");
    run(analyst, "ROLLBACK");
    settle(&bed);
    let asked = bed.provider.stats().rows.len();
    assert!(asked <= 1, "{asked} texts were sent after the right was revoked");
}

/// Row security and conditions may ask other things of the session at the next FETCH: the rows are those that come
/// without the node.
#[test]
fn rows_of_the_session_as_it_is() {
    let bed = Bed::new("batch_tenants");
    let c = &mut bed.connect();
    questions(c, 400);
    run(
        c,
        "CREATE ROLE one LOGIN; CREATE ROLE two; GRANT two TO one; GRANT SELECT ON t TO one, two;
         GRANT USAGE ON FOREIGN SERVER fake TO one, two;
         CREATE FUNCTION tenant() RETURNS int STABLE LANGUAGE plpgsql
             AS $$ BEGIN RETURN current_setting('app.tenant')::int; END $$;
         CREATE VIEW by_setting AS SELECT * FROM t WHERE id % 2 = current_setting('app.tenant')::int;
         CREATE VIEW by_function AS SELECT * FROM t WHERE id % 2 = tenant();
         CREATE VIEW by_role AS SELECT * FROM t WHERE id % 2 = CASE current_user WHEN 'one' THEN 0 ELSE 1 END;
         CREATE TABLE of_one ();
         CREATE VIEW by_right AS SELECT * FROM t WHERE id % 2 = CASE WHEN has_table_privilege('of_one', 'SELECT') THEN 0 ELSE 1 END;
         CREATE TABLE policed AS SELECT * FROM t; ALTER TABLE policed ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON policed USING (id % 2 = current_setting('app.tenant')::int);
         CREATE TABLE owned AS SELECT * FROM t; ALTER TABLE owned ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON owned USING (id % 2 = CASE current_user WHEN 'one' THEN 0 ELSE 1 END);
         GRANT SELECT ON ALL TABLES IN SCHEMA public TO one, two; REVOKE SELECT ON of_one FROM two",
    );
    let one = &mut bed.cluster.connect_as("postgres", "one");
    let ids = |rows: &[postgres::Row]| rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>();
    let mut both = |query: &str, changes: [&str; 3], in_parts: bool| {
        let mut fetched = |is_on: &str| {
            let mut ids_of = Vec::new();
            let mut transaction = one.transaction().unwrap();
            run_in(&mut transaction, &format!("SET LOCAL llm_batch.enable_batch_scan = {is_on}; {}", changes[0]));
            if in_parts {
                // As a driver does it.
                let portal = transaction.bind(query, &[]).unwrap();
                for change in changes {
                    run_in(&mut transaction, change);
                    ids_of.extend(ids(&transaction.query_portal(&portal, 4).unwrap()));
                }
            } else {
                run_in(&mut transaction, &format!("DECLARE x CURSOR FOR {query}"));
                for change in changes {
                    run_in(&mut transaction, change);
                    ids_of.extend(ids(&transaction.query("FETCH 4 FROM x", &[]).unwrap()));
                }
            }
            ids_of
        };
        let without = fetched("off");
        assert_eq!(fetched("on"), without, "{query}");
        let halves = without.chunks(4).map(|ids| ids.iter().all(|id| id % 2 == ids[0] % 2) && ids.len() == 4);
        assert!(halves.eq([true; 3]) && without[0] % 2 != without[4] % 2, "{query}: {without:?}");
    };
    let settings = ["SET LOCAL app.tenant = 0", "SET LOCAL app.tenant = 1", "SET LOCAL app.tenant = 0"];
    let roles = ["RESET ROLE", "SET LOCAL ROLE two", "RESET ROLE"];
    for (table, changes) in [
        ("policed", settings),
        ("by_setting", settings),
        ("by_function", settings),
        ("owned", roles),
        ("by_role", roles),
        ("by_right", roles),
        ("(SELECT * FROM policed OFFSET 0) s", settings),
        ("t WHERE id % 2 = (SELECT id % 2 FROM policed WHERE policed.id >= t.id LIMIT 1)", settings),
    ] {
        both(&format!("SELECT id, llm_classify(body, 'topic') FROM {table}"), changes, false);
        let more = if table.contains("WHERE") { "AND" } else { "WHERE" };
        both(&format!("SELECT id FROM {table} {more} llm_classify(body, 'topic') IN ('bug', 'spam')"), changes, false);
    }
    both("SELECT id, llm_classify(body, 'topic') FROM policed", settings, true);
    // All at once, and in a function's loop, requests are shared as ever.
    run(one, "SET app.tenant = 0");
    for sql in [
        "SELECT llm_classify(body, 'topic') FROM policed",
        "DO $$ DECLARE r record; BEGIN FOR r IN SELECT llm_classify(body, 'topic') FROM policed LOOP END LOOP; END $$",
    ] {
        count_anew(&bed);
        run(one, sql);
        let stats = bed.provider.stats();
        assert!(stats.rows.len() == 200 && stats.requests < 20, "{sql}: {} requests", stats.requests);
    }
}

#[track_caller]
fn run_in(transaction: &mut postgres::Transaction<'_>, sql: &str) {
    transaction.batch_execute(sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
}

#[test]
fn a_cursor_goes_back() {
    let bed = Bed::new("batch_backward");
    let c = &mut bed.connect();
    questions(c, 30);
    let moves = ["FETCH 12", "FETCH BACKWARD 5", "FETCH PRIOR", "FETCH ABSOLUTE 3", "FETCH LAST", "FETCH FIRST"];
    for (query, declared) in [
        ("SELECT id, llm_classify(body, 'topic') FROM t", "CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t WHERE llm_filter(ask, 'Is it?')", "CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t LIMIT 25", "CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t", "CURSOR WITH HOLD"),
        ("SELECT id, llm_classify(body, 'topic') FROM t", "SCROLL CURSOR"),
        // Postgres does not go back in these.
        ("SELECT id, llm_classify(body, 'topic') FROM t", "NO SCROLL CURSOR"),
        ("SELECT id, llm_classify(body, 'topic') FROM t FOR UPDATE", "CURSOR"),
        ("SELECT t.id, llm_classify(t.body, 'topic') FROM t JOIN t u USING (id)", "CURSOR"),
    ] {
        let mut fetched = |is_on: &str| {
            let mut said = Vec::new();
            run(
                c,
                &format!("BEGIN; SET LOCAL llm_batch.enable_batch_scan = {is_on}; DECLARE x {declared} FOR {query}"),
            );
            for go in moves {
                match c.query(&format!("{go} FROM x"), &[]) {
                    Ok(rows) => said.push(rows.iter().map(|r| (r.get(0), r.get(1))).collect::<Vec<(i32, String)>>()),
                    Err(e) => {
                        assert_eq!(e.code().unwrap().code(), "55000", "{query}: {go}: {e:?}");
                        break;
                    }
                }
            }
            run(c, "ROLLBACK");
            said
        };
        let without = fetched("off");
        count_anew(&bed);
        assert_eq!(fetched("on"), without, "{declared} {query}");
        let asked = bed.provider.stats().rows;
        assert!(asked.values().all(|r| r.asked == 1), "{declared} {query}: {asked:?}");
    }
}
