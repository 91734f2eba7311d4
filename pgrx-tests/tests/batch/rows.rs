//! Rows that others change, that are hidden, that are wide, or that call functions.

use std::collections::BTreeSet;

use llm_fake_provider::{Config, Fault};
use pg_llm_batch_e2e::wait_until;

use super::{asked, questions};
use crate::common::{Bed, PATIENCE, error, one, run, text, tickets};

#[test]
fn rows_that_others_change() {
    let bed = Bed::new("batch_concurrent");
    let c = &mut bed.connect();
    tickets(c, "tickets", 1..=300);
    let other = &mut bed.connect();
    run(other, "BEGIN; UPDATE tickets SET body = '#r900007:spam#', want = 'spam' WHERE id = 7; DELETE FROM tickets WHERE id = 8;
                UPDATE tickets SET want = 'mine' WHERE id = 9");
    let witness = &mut bed.connect();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            c.execute("UPDATE tickets SET topic = llm_classify(body, 'topic') WHERE want <> 'mine'", &[]).unwrap()
        });
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        wait_until("the update waits for the row", PATIENCE, || one(witness, blocked), |n| *n == 1);
        run(other, "COMMIT");
        // Neither the row that is gone nor the one that no longer fits.
        assert_eq!(waiting.join().unwrap(), 298);
    });
    let c = &mut bed.connect();
    assert_eq!(one(c, "SELECT count(*) FROM tickets WHERE topic = want"), 298);
    assert_eq!(text(c, "SELECT topic FROM tickets WHERE id = 7"), "spam");
    assert_eq!(one(c, "SELECT count(*) FROM tickets WHERE topic IS NULL AND id = 9"), 1);
    let stats = bed.provider.stats();
    assert_eq!(stats.rows["900007"].asked, 1);
    assert!(stats.requests < 20, "{}", stats.requests);
}

#[test]
fn rows_that_a_role_may_not_see_stay_here() {
    let bed = Bed::new("batch_security");
    let c = &mut bed.connect();
    questions(c, 50);
    run(
        c,
        "CREATE ROLE analyst LOGIN; GRANT SELECT ON t TO analyst; GRANT USAGE ON FOREIGN SERVER fake TO analyst;
         ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t TO analyst USING (id % 5 = 0);
         CREATE FUNCTION leak(text) RETURNS bool LANGUAGE plpgsql COST 0.0001 AS 'BEGIN RAISE NOTICE ''%'', $1; RETURN true; END'",
    );
    let analyst = &mut bed.cluster.connect_as("postgres", "analyst");
    let seen: BTreeSet<i64> = (1..=10).map(|i| i * 5).collect();
    for sql in [
        "SELECT llm_classify(body, 'topic') FROM t",
        "SELECT id FROM t WHERE llm_classify(body || 1, 'topic') = 'bug' AND leak(body)",
    ] {
        assert_eq!(asked(&bed, analyst, sql), seen, "{sql}");
    }
    // Another role's answers are another's: its rows are asked again, also within a cursor that changes hands.
    bed.provider.reset_stats();
    run(c, "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body || 2, 'topic') FROM t; FETCH 1 FROM x");
    run(c, "CREATE ROLE nobody; SET LOCAL ROLE nobody");
    let e = error(c, "FETCH ALL FROM x");
    assert_eq!(e.0, "42501", "{e:?}");
    run(c, "ROLLBACK");
}

#[test]
fn what_a_row_calls_is_its_own_matter() {
    let bed = Bed::new("batch_nested");
    let c = &mut bed.connect();
    questions(c, 20);
    // Functions with another model, or with another role's rights, do not get the answers of the row that calls them.
    run(
        c,
        "SELECT llm_batch.create_model('m2', server => 'fake', model => 'other');
         CREATE FUNCTION inner_one(text) RETURNS text STABLE LANGUAGE plpgsql SET llm_batch.default_model = 'm2'
             AS 'BEGIN RETURN llm_classify($1, ARRAY[''bug'', ''spam'']); END';
         CREATE ROLE poor; GRANT SELECT ON t TO poor;
         CREATE FUNCTION poor_one(text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER
             AS 'BEGIN RETURN llm_classify($1, ''topic''); END';
         ALTER FUNCTION poor_one OWNER TO poor",
    );
    bed.provider.reset_stats();
    run(c, "SELECT llm_classify(body, ARRAY['bug', 'spam']), inner_one(body) FROM t");
    let models = bed.provider.bodies().iter().filter(|b| b["model"] == "other").count();
    assert_eq!(models, 20);
    let e = error(c, "SELECT llm_classify(body, 'topic'), poor_one(body) FROM t");
    assert_eq!(e.0, "42501", "{e:?}");
    // The filter of an aggregate is one choice for each row.
    let volatile = "SELECT count(llm_classify(body, 'topic')) AS n,
                           count(llm_classify(body, 'topic')) FILTER (WHERE chosen(id)) AS some FROM t";
    run(
        c,
        "CREATE SEQUENCE s; CREATE FUNCTION chosen(int) RETURNS bool VOLATILE LANGUAGE sql AS 'SELECT nextval(''s'') > 0'",
    );
    let row = c.query_one(volatile, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), one(c, "SELECT last_value FROM s")), (20, 20, 20));
    // A row without an answer is told of once, in its turn.
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{\"max_attempts\": 1, \"reuse\": false}')");
    bed.provider.script([Some(Fault::DropId)]);
    let twice = "SELECT CASE llm_classify(body, 'topic') WHEN 'bug' THEN llm_filter(ask, 'Is it so?') END FROM t";
    let said = bed.cluster.psql("postgres", &format!("SET llm_batch.default_model = 'm'; {twice}"));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.matches("WARNING:  the model gave no answer").count(), 1, "{said}");
}

#[test]
fn rows_wider_than_memory() {
    let bed = Bed::with("batch_spill", Config::default());
    let c = &mut bed.connect();
    questions(c, 3_000);
    run(c, "ALTER TABLE t ADD wide text; UPDATE t SET wide = repeat(md5(id::text), 40); SET work_mem = '64kB'");
    let sql = "SELECT count(*) FILTER (WHERE topic = CASE WHEN id % 4 = 0 THEN 'bug' ELSE 'spam' END
                                         AND CASE WHEN topic = 'bug' THEN is_so = (id % 3 = 0) ELSE is_so IS NULL END
                                         AND wide = repeat(md5(id::text), 40))
                 FROM (SELECT id, wide, llm_classify(body, 'topic') topic,
                              CASE llm_classify(body, 'topic') WHEN 'bug' THEN llm_filter(ask, 'Is it?') END is_so
                         FROM t OFFSET 0) s";
    assert_eq!(one(c, sql), 3_000);
    let files = "SELECT count(*) FROM pg_stat_database WHERE datname = current_database() AND temp_files > 0";
    wait_until("it went to disk", PATIENCE, || one(c, files), |n| *n == 1);
}
