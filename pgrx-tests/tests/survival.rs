//! Each process of ours ended at each step of its work: other sessions don't notice, jobs go on by themselves, the
//! accounts hold. For builds with failure points, see `scripts/install dev`.

mod common;

use common::{
    Bed, PATIENCE, backfill_with, error, failures, left, one, progress, reconnect, run, slow, tickets, wrong,
};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

/// Rows of a job, of a request, and requests at a time.
const ROWS: i64 = 60;
const PACK: i64 = 5;
const REQUESTS: i64 = 2;
/// Rows that may be asked again when something dies: those under way and those answered and not yet written, of which a
/// busy machine has some more.
const IN_FLIGHT: i64 = 4 * REQUESTS * PACK;

const ENDS: [&str; 3] = ["error", "panic", "term"];
const STEPS_OF_A_JOB: [&str; 8] =
    ["begin", "ready", "claim", "hand-over", "handed-over", "settle", "written", "committed"];
const STEPS_OF_THE_NETWORK: [&str; 3] = ["net-take", "net-send", "net-answered"];

fn bed(name: &str) -> Bed {
    let bed = Bed::with(name, slow(100));
    run(&mut bed.connect(), &format!("SELECT llm_batch.alter_model('m', max_concurrent_requests => {REQUESTS})"));
    bed
}

/// A session that would notice if the server were reset.
struct Witness(Client, i64);

impl Witness {
    fn new(bed: &Bed) -> Self {
        let mut client = bed.connect();
        run(&mut client, "CREATE TEMP TABLE witness AS SELECT 1 AS a");
        let pid = Self::pid(&mut client);
        Self(client, pid)
    }

    fn pid(client: &mut Client) -> i64 {
        one(client, "SELECT pg_backend_pid()::bigint FROM witness")
    }

    #[track_caller]
    fn lives(&mut self) {
        assert_eq!(Self::pid(&mut self.0), self.1);
    }
}

/// A job during which `action` happens `times` at `point`. `most`: rows that may be asked again, each time.
#[track_caller]
fn survives(bed: &Bed, point: &str, action: &str, times: u32, most: i64) {
    println!("{point} {action}");
    let client = &mut reconnect(bed);
    run(client, "DROP TABLE IF EXISTS tickets");
    tickets(client, "tickets", 1..=ROWS);
    bed.provider.reset_stats();
    run(client, "BEGIN");
    let job = backfill_with(client, "tickets", &format!("options => '{{\"max_rows_per_request\": {PACK}}}'"));
    bed.cluster.fail_at(point, action, times);
    // The server may be reset before it answers.
    let _ = client.batch_execute("COMMIT");
    let status = format!("SELECT status FROM llm_batch.progress WHERE job_id = {job}");
    wait_until(
        &format!("{point} {action}: the job ends"),
        PATIENCE,
        || reconnect(bed).query_one(&status, &[]).map_or_else(|e| e.to_string(), |r| r.get(0)),
        |s: &String| bed.cluster.has_failed_at(point) && ["done", "failed"].contains(&s.as_str()),
    );
    let client = &mut reconnect(bed);
    let p = progress(client, job);
    assert_eq!((p.status.as_str(), p.counts()), ("done", (ROWS, ROWS, 0, 0, 0, 0)), "{point} {action}: {p:?}");
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0), "{point} {action}");
    assert!(failures(client, job).is_empty());
    let asked: Vec<i64> = bed.provider.stats().rows.values().map(|r| i64::from(r.asked)).collect();
    let again = asked.iter().sum::<i64>() - ROWS;
    assert!(again <= most * i64::from(times), "{point} {action}: {again} rows were asked again");
    assert!(asked.iter().all(|n| *n <= 1 + i64::from(times)), "{point} {action}: {asked:?}");
}

/// Nobody but the process itself was ended.
#[track_caller]
fn nothing_was_reset(bed: &Bed) {
    let log = bed.cluster.log();
    for word in ["terminated by signal", "reinitializing", "PANIC"] {
        assert!(!log.contains(word), "{word} in\n{log}");
    }
}

#[test]
fn a_jobs_worker_ends_at_each_step() {
    let bed = bed("survival_job");
    let mut witness = Witness::new(&bed);
    for point in STEPS_OF_A_JOB {
        for action in ENDS {
            let before_sending = ["begin", "ready", "claim", "hand-over"].contains(&point);
            // An error in a transaction does not end the worker: it has the answers still.
            let is_caught = ["settle", "written"].contains(&point) && action != "term";
            let most = if before_sending || is_caught { 0 } else { IN_FLIGHT };
            survives(&bed, point, action, 1, most);
        }
    }
    witness.lives();
    nothing_was_reset(&bed);
}

#[test]
fn launcher_and_finder_end_at_each_step() {
    let bed = bed("survival_launcher");
    let mut witness = Witness::new(&bed);
    for action in ENDS {
        for point in ["launch", "launched"] {
            survives(&bed, point, action, 1, 0);
        }
        // A search follows when a worker dies.
        bed.cluster.fail_at("find", action, 1);
        survives(&bed, "claim", "term", 1, 0);
        assert!(bed.cluster.has_failed_at("find"));
    }
    witness.lives();
    nothing_was_reset(&bed);
}

#[test]
fn the_gateway_ends_at_each_step() {
    let bed = bed("survival_gateway");
    let mut witness = Witness::new(&bed);
    for action in ENDS {
        survives(&bed, "gateway", action, 1, IN_FLIGHT);
    }
    for action in ["panic", "term"] {
        for point in STEPS_OF_THE_NETWORK {
            survives(&bed, point, action, 1, IN_FLIGHT);
        }
    }
    witness.lives();
    nothing_was_reset(&bed);
}

/// As with any process of Postgres, the server then starts all sessions anew.
#[test]
fn any_process_killed_at_each_step() {
    let bed = bed("survival_kill");
    for point in STEPS_OF_A_JOB.into_iter().chain(["launch", "launched", "gateway"]).chain(STEPS_OF_THE_NETWORK) {
        survives(&bed, point, "kill", 1, IN_FLIGHT);
    }
}

/// Two rows, one after the other, that kill whatever works on them. The others are done, and nothing dies for ever.
#[track_caller]
fn poison(name: &str, point: &str, action: &str) {
    let bed = bed(name);
    let mut witness = Witness::new(&bed);
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    run(client, "UPDATE tickets SET body = body || ' rotten' WHERE id IN (30, 31)");
    bed.cluster.fail_at_text(point, action, 1000, "rotten");
    let job = backfill_with(client, "tickets", &format!("options => '{{\"max_rows_per_request\": {PACK}}}'"));
    let p = wait_until("the job ends", 4 * PATIENCE, || progress(client, job), |p| p.status != "running");
    assert_eq!((p.status.as_str(), p.counts()), ("done", (ROWS, ROWS - 2, 0, 2, 0, 0)), "{p:?}");
    let listed: Vec<_> = failures(client, job).into_iter().map(|f| (f.0["id"].as_i64(), f.2)).collect();
    assert_eq!(listed, [(Some(30), "crash".to_owned()), (Some(31), "crash".to_owned())]);
    assert_eq!(wrong(client, "tickets"), 0);
    witness.lives();
}

#[test]
fn a_row_that_kills_the_worker() {
    poison("survival_poison_worker", "poison-worker", "panic");
}

#[test]
fn a_row_that_kills_the_gateway() {
    poison("survival_poison_gateway", "poison-gateway", "panic");
}

/// In a statement such a row is not asked for without end.
#[test]
fn a_row_of_a_statement_that_kills_the_gateway() {
    let bed = bed("survival_poison_statement");
    let mut witness = Witness::new(&bed);
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    bed.cluster.fail_at_text("poison-gateway", "panic", 1000, "#r000030:");
    let batch = "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic')";
    for sql in [batch, "SELECT llm_classify(body, 'topic') FROM tickets WHERE id = 30"] {
        let (code, message, detail, hint) = error(client, sql);
        assert_eq!(code, "08006", "{message}");
        assert!(detail.contains("5 times") && hint.contains("log"), "{message} {detail} {hint}");
    }
    // Questions of others are answered as ever.
    assert_eq!(one(client, &batch.replace("FROM tickets", "FROM tickets WHERE id <> 30")), ROWS - 1);
    assert!(bed.cluster.log().matches("network thread of the llm_batch gateway ended").count() <= 10);
    witness.lives();
}

/// A cause that kills the worker at every row, or before it has any, ends the job, and the error is shown.
#[test]
fn a_worker_that_always_dies() {
    let bed = bed("survival_hopeless");
    let mut witness = Witness::new(&bed);
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=ROWS);
    bed.cluster.fail_at("claim", "error", 1000);
    let job = backfill_with(client, "tickets", "");
    let p = wait_until("the job ends", 4 * PATIENCE, || progress(client, job), |p| p.status != "running");
    let error = p.last_error.clone().unwrap_or_default();
    assert_eq!(p.status, "failed", "{p:?}");
    assert!(error.contains("7 times") && error.contains("failure point claim"), "{error}");
    assert_eq!(bed.provider.stats().rows.len(), 0);
    witness.lives();
}
