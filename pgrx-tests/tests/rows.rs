//! Rows that can't be written: each is listed with its reason and paid for once, and the rows beside it are written.

mod common;

use common::{Bed, Failure, Progress, backfill, failures, one, progress, run, tickets, wait_status};
use llm_fake_provider::Config;
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

const ROWS: i64 = 120;

/// Every row that was asked about was asked about once.
#[track_caller]
fn asked_once(bed: &Bed, rows: i64) {
    let stats = bed.provider.stats();
    let twice: Vec<_> = stats.rows.iter().filter(|(_, r)| r.asked != 1).collect();
    assert!(twice.is_empty(), "asked more than once: {twice:?}");
    assert_eq!(stats.rows.len() as i64, rows);
}

/// `failure` lists these ids, each with one class and a detail that says this.
#[track_caller]
fn listed(client: &mut Client, job: i64, ids: &[i64], class: &str, says: &str) {
    let found: Vec<Failure> = failures(client, job).into_iter().filter(|f| f.2 == class).collect();
    let mut keys: Vec<i64> = found.iter().map(|f| f.0["id"].as_i64().unwrap()).collect();
    keys.sort_unstable();
    assert_eq!(keys, ids, "{class}: {found:?}");
    for (key, state, _, attempts, detail) in found {
        assert_eq!((state.as_str(), attempts), ("failed", 1), "{key}: {detail}");
        assert!(detail.contains(says), "{key}: {detail}");
    }
}

/// Fills `tickets`; `bad` rows are not written and fail, all others are right.
#[track_caller]
fn fill(bed: &Bed, bad: i64) -> (i64, Progress) {
    let client = &mut bed.connect();
    let job = backfill(client, "tickets");
    let p = wait_status(client, job, "done");
    assert_eq!(p.counts(), (ROWS, ROWS - bad, 0, bad, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert_eq!(common::left(client, "tickets"), bad);
    asked_once(bed, ROWS);
    (job, p)
}

#[test]
fn triggers_that_leave_rows_out_raise_or_empty() {
    let bed = Bed::new("rows_triggers");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE FUNCTION moody() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             CASE NEW.id
                 WHEN 7, 77 THEN RETURN NULL;
                 WHEN 8 THEN RAISE EXCEPTION 'no, not this one' USING ERRCODE = 'ZX001';
                 WHEN 9 THEN RAISE division_by_zero;
                 WHEN 10 THEN NEW.topic := NULL;
                 WHEN 11 THEN PERFORM 1 FROM no_such_table;
                 WHEN 12 THEN PERFORM * FROM secrets;
                 ELSE NULL;
             END CASE;
             RETURN NEW;
         END $$;
         CREATE TRIGGER moody BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION moody();
         CREATE TABLE secrets (a int);
         CREATE ROLE owner LOGIN;
         GRANT CREATE ON SCHEMA public TO owner;
         ALTER TABLE tickets OWNER TO owner;
         GRANT USAGE ON FOREIGN SERVER fake TO owner;",
    );
    let (job, _) = fill(&bed, 7);
    listed(client, job, &[7, 10, 77], "not_written", "trigger");
    let mut errors: Vec<(i64, String)> = failures(client, job)
        .into_iter()
        .filter(|f| f.2 == "write_error")
        .map(|f| (f.0["id"].as_i64().unwrap(), f.4))
        .collect();
    errors.sort_unstable();
    // An SQLSTATE of the user's own making is shown as XX000.
    let expected = [
        (8, "XX000: no, not this one"),
        (9, "22012: "),
        (11, "42P01: "),
        (12, "42501: permission denied for table secrets"),
    ];
    assert_eq!(errors.len(), expected.len(), "{errors:?}");
    for ((id, detail), (wanted, says)) in errors.iter().zip(expected) {
        assert_eq!(*id, wanted);
        assert!(detail.starts_with(says), "{id}: {detail}");
    }
    // A failed row is not asked again by a new search of the worker, but is by retry_failed(), once mended.
    run(client, "DROP TRIGGER moody ON tickets");
    run(client, &format!("SELECT llm_batch.retry_failed({job})"));
    let p = wait_until(
        "the failed rows are filled",
        common::PATIENCE,
        || progress(client, job),
        |p| p.status == "done" && p.done == ROWS,
    );
    assert_eq!(p.counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!(failures(client, job), []);
    assert_eq!(bed.provider.stats().rows.values().filter(|r| r.asked == 2).count(), 7);
    assert_eq!(bed.provider.stats().rows.values().filter(|r| r.asked > 2).count(), 0);
}

/// A trigger that lets nothing through: the job stops after a few rows of a label, and not after all of the table.
#[test]
fn every_row_raises() {
    let bed = Bed::new("rows_all");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'never'; END $$;
         CREATE TRIGGER no BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION no();",
    );
    let job = backfill(client, "tickets");
    let p = wait_status(client, job, "paused");
    assert_eq!((p.reason.as_deref(), p.counts()), (Some("label"), (ROWS, 0, 0, 0, 0, ROWS)));
    assert!(p.last_error.clone().unwrap_or_default().contains("cannot be written: P0001: never;"), "{p:?}");
    assert_eq!(failures(client, job), []);
    run(client, &format!("DROP TRIGGER no ON tickets; SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert!(bed.provider.stats().rows.values().all(|r| r.asked <= 2));
}

#[test]
fn rows_that_row_security_hides_from_update() {
    let bed = Bed::new("rows_security");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE ROLE app LOGIN;
         GRANT SELECT, UPDATE ON tickets TO app;
         GRANT USAGE ON FOREIGN SERVER fake TO app;
         ALTER TABLE tickets ENABLE ROW LEVEL SECURITY;
         CREATE POLICY see ON tickets FOR SELECT USING (id <> 50);
         CREATE POLICY change ON tickets FOR UPDATE USING (id NOT IN (5, 55)) WITH CHECK (id <> 66);",
    );
    let job = backfill(&mut bed.cluster.connect_as("postgres", "app"), "tickets");
    let p = wait_status(client, job, "done");
    // An invisible row is not counted.
    assert_eq!(p.counts(), (ROWS - 1, ROWS - 4, 0, 3, 0, 0));
    listed(client, job, &[5, 55], "not_written", "row security");
    listed(client, job, &[66], "write_error", "42501: ");
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert_eq!(common::left(client, "tickets"), 4);
    asked_once(&bed, ROWS - 1);
}

#[test]
fn deferred_constraint_triggers_that_raise() {
    let bed = Bed::new("rows_deferred");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF NEW.id IN (3, 33) THEN RAISE EXCEPTION 'too late' USING ERRCODE = 'ZX002'; END IF;
             RETURN NULL;
         END $$;
         CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON tickets DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION late();",
    );
    let (job, _) = fill(&bed, 2);
    listed(client, job, &[3, 33], "write_error", "XX000: too late");
}

#[test]
fn foreign_keys_checks_and_uniqueness_of_the_target() {
    let bed = Bed::new("rows_constraints");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE TABLE topics (name text PRIMARY KEY);
         INSERT INTO topics SELECT DISTINCT want FROM tickets WHERE want NOT IN ('bug', 'spam');
         INSERT INTO topics VALUES ('bug');
         ALTER TABLE tickets ADD CONSTRAINT known FOREIGN KEY (topic) REFERENCES topics,
             ADD CONSTRAINT no_praise CHECK (topic <> 'praise'),
             ADD CONSTRAINT late FOREIGN KEY (topic) REFERENCES topics DEFERRABLE INITIALLY DEFERRED;
         CREATE UNIQUE INDEX one_other ON tickets (topic) WHERE topic = 'other';",
    );
    // The job stops at each label that can't be written. Of `other` one row can be, so that the rest may be rows' faults.
    let job = backfill(client, "tickets");
    let mut named = Vec::new();
    let p = loop {
        let p = wait_until("it stops", common::PATIENCE, || progress(client, job), |p| p.status != "running");
        if p.status == "done" {
            break p;
        }
        let says = p.last_error.clone().unwrap_or_default();
        assert_eq!(p.reason.as_deref(), Some("label"), "{p:?}");
        let (label, code, mend) = [
            ("spam", "23503: ", "INSERT INTO topics VALUES ('spam')"),
            ("praise", "23514: ", "ALTER TABLE tickets DROP CONSTRAINT no_praise"),
            ("other", "23505: ", "DROP INDEX one_other"),
        ]
        .into_iter()
        .find(|(label, ..)| says.contains(&format!("\"{label}\"")))
        .unwrap_or_else(|| panic!("{says}"));
        assert!(says.contains(code), "{says}");
        named.push(label);
        run(client, mend);
        run(client, &format!("SELECT llm_batch.resume({job})"));
    };
    named.sort_unstable();
    assert!(named.ends_with(&["praise", "spam"]) && named.len() <= 3, "{named:?}");
    assert_eq!((p.skipped, p.superseded, p.done + p.failed, p.left), (0, 0, ROWS, 0), "{p:?}");
    for (_, _, class, _, detail) in failures(client, job) {
        assert!(class == "write_error" && detail.starts_with("23505: "), "{class} {detail}");
    }
    assert_eq!((common::wrong(client, "tickets"), common::left(client, "tickets")), (0, p.failed));
}

/// A trigger that empties the column must not have the same rows paid for without end.
#[test]
fn a_trigger_that_empties_the_column_afterwards() {
    let bed = Bed::new("rows_emptied");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE tickets SET topic = NULL WHERE id = NEW.id; RETURN NULL; END $$;
         CREATE TRIGGER undo AFTER UPDATE ON tickets FOR EACH ROW
             WHEN (NEW.id IN (4, 44) AND NEW.topic IS NOT NULL) EXECUTE FUNCTION undo();",
    );
    let job = backfill(client, "tickets");
    let p = wait_until(
        "the job ends",
        common::PATIENCE,
        || {
            let most = bed.provider.stats().rows.values().map(|r| r.asked).max().unwrap_or(0);
            assert!(most <= 10, "a row was asked {most} times: {:?}", progress(client, job));
            progress(client, job)
        },
        |p| p.status == "done",
    );
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert_eq!(common::left(client, "tickets"), 2);
    let most = bed.provider.stats().rows.values().map(|r| r.asked).max().unwrap();
    assert!(most <= 3, "a row was asked {most} times: {p:?}");
}

/// A trigger may change what is written, or other columns; that is the user's business.
#[test]
fn triggers_that_change_the_value() {
    let bed = Bed::with("rows_changed", Config::default());
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(
        client,
        "ALTER TABLE tickets ADD changed timestamptz, ADD by name;
         CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             NEW.topic := upper(NEW.topic); NEW.changed := now(); NEW.by := current_user; RETURN NEW;
         END $$;
         CREATE TRIGGER shout BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION shout();",
    );
    let job = backfill(client, "tickets");
    assert_eq!(bed.done(job).counts(), (ROWS, ROWS, 0, 0, 0, 0));
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE topic = upper(want) AND changed IS NOT NULL"), ROWS);
    asked_once(&bed, ROWS);
}

/// A trigger that changes its neighbours' inputs and targets.
#[test]
fn a_trigger_that_fills_other_rows() {
    let bed = Bed::new("rows_neighbours");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    // Writing an odd row fills the even one after it.
    run(
        client,
        "CREATE FUNCTION spread() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE tickets SET topic = want WHERE id = NEW.id + 1 AND topic IS NULL; RETURN NULL; END $$;
         CREATE TRIGGER spread AFTER UPDATE ON tickets FOR EACH ROW WHEN (NEW.id % 2 = 1) EXECUTE FUNCTION spread();",
    );
    let job = backfill(client, "tickets");
    let p = bed.done(job);
    assert_eq!((p.failed, p.skipped, p.left), (0, 0, 0), "{p:?}");
    assert_eq!(p.done + p.superseded, ROWS);
    assert_eq!(common::wrong(client, "tickets") + common::left(client, "tickets"), 0);
    assert!(bed.provider.stats().rows.values().all(|r| r.asked <= 1));
}

/// Rows go to another partition as they are filled, and rows are deleted and inserted under their keys.
#[test]
fn rows_that_move_between_partitions() {
    let bed = Bed::new("rows_move");
    let client = &mut bed.connect();
    run(
        client,
        "CREATE TABLE moving (id bigint, body text, want text, topic text, slot int NOT NULL DEFAULT 0,
             UNIQUE (id, slot)) PARTITION BY LIST (slot);
         ALTER TABLE moving ALTER id SET NOT NULL;
         CREATE TABLE moving_0 PARTITION OF moving FOR VALUES IN (0);
         CREATE TABLE moving_1 PARTITION OF moving FOR VALUES IN (1);
         CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.slot := 1; RETURN NEW; END $$;
         CREATE TRIGGER move BEFORE UPDATE ON moving FOR EACH ROW EXECUTE FUNCTION move();",
    );
    common::rows(client, "moving", 1..=ROWS);
    let job = backfill(client, "moving");
    let p = wait_status(client, job, "done");
    assert_eq!(p.left, 0);
    let stats = bed.provider.stats();
    assert!(stats.rows.values().all(|r| r.asked == 1), "{p:?}");
    assert_eq!(common::wrong(client, "moving"), 0);
}
