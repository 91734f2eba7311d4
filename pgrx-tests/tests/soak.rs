//! A job under kills, faults and other people's work for a while, and its accounts at the end.
//!
//! A short form by default; `make soak` runs a million rows. The events are drawn from `SOAK_SEED`, and printed.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Bed, PATIENCE, Progress, backfill, one, progress, run, text, tickets};
use fastrand::Rng;
use llm_fake_provider::{Config, Fault, Latency};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// Requests at the same time, and rows of each.
const REQUESTS: i64 = 8;
const PACK: i64 = 50;
/// Rows of which one transaction of somebody else takes some.
const TOUCHED: i64 = 40;

/// A number from the environment, or else the given one.
fn setting(name: &str, default: i64) -> i64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} is not a number: {v}")))
}

/// A disturbance of a running job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    EndGateway,
    EndWorker,
    EndLauncher,
    KillWorker,
    KillServer,
    Restart,
    PauseAndResume,
    SwitchOffAndOn,
    LockTable,
    LockRows,
    Vacuum,
}

impl Event {
    const ALL: [Self; 11] = [
        Self::EndGateway,
        Self::EndWorker,
        Self::EndLauncher,
        Self::KillWorker,
        Self::KillServer,
        Self::Restart,
        Self::PauseAndResume,
        Self::SwitchOffAndOn,
        Self::LockTable,
        Self::LockRows,
        Self::Vacuum,
    ];

    /// Returns true if rows in flight are lost by it.
    fn loses(self) -> bool {
        use Event::*;
        matches!(self, EndGateway | EndWorker | KillWorker | KillServer | Restart | SwitchOffAndOn)
    }
}

/// Process ids by type.
fn pids(client: &mut Client, kind: &str) -> Vec<i32> {
    let found = client.query("SELECT pid FROM pg_stat_activity WHERE backend_type = $1", &[&kind]);
    found.map_or(Vec::new(), |rows| rows.iter().map(|r| r.get(0)).collect())
}

/// Memory of a process that is its own, kB.
fn memory(pid: i32) -> Option<i64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A session, once the server takes some: after a process was killed it recovers first.
fn connect(bed: &Bed) -> Client {
    let tried = wait_until(
        "the server takes connections",
        Duration::from_secs(60),
        || bed.cluster.try_connect_as("postgres", "postgres").ok().filter(|c| !c.is_closed()).map(Held),
        Option::is_some,
    );
    tried.unwrap().0
}

/// A client that can be printed.
struct Held(Client);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a session")
    }
}

/// Does something to the job; afterwards the server takes connections again.
fn happen(bed: &mut Bed, job: i64, event: Event, random: &mut Rng) {
    let mut c = connect(bed);
    let end = |c: &mut Client, kind: &str| {
        if let Some(pid) = pids(c, kind).first() {
            run(c, &format!("SELECT pg_terminate_backend({pid})"));
        }
    };
    let pause = Duration::from_millis(random.u64(..800));
    match event {
        Event::EndGateway => end(&mut c, "llm_batch gateway"),
        Event::EndWorker => end(&mut c, "llm_batch job"),
        Event::EndLauncher => end(&mut c, "llm_batch launcher"),
        Event::KillWorker => {
            if let Some(pid) = pids(&mut c, "llm_batch job").first() {
                // SAFETY: takes two integers. The process is a worker of this test's own cluster.
                unsafe { libc::kill(*pid, libc::SIGKILL) };
                // All sessions end; this one notices when the server has begun to.
                wait_until("sessions are ended", Duration::from_secs(60), || c.simple_query("").is_err(), |e| *e);
            }
        }
        Event::KillServer => {
            bed.cluster.kill9();
            bed.cluster.start();
        }
        Event::Restart => bed.cluster.restart(),
        Event::PauseAndResume => {
            // Done by then, or not yet started again: both are told so.
            let _ = c.batch_execute(&format!("SELECT llm_batch.pause({job})"));
            std::thread::sleep(pause);
            let _ = c.batch_execute(&format!("SELECT llm_batch.resume({job})"));
        }
        Event::SwitchOffAndOn => {
            for value in ["off", "on"] {
                run(&mut c, &format!("ALTER SYSTEM SET llm_batch.enabled = {value}"));
                run(&mut c, "SELECT pg_reload_conf()");
                std::thread::sleep(pause);
            }
        }
        Event::LockTable => {
            run(&mut c, "BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE");
            std::thread::sleep(pause);
            run(&mut c, "COMMIT");
        }
        Event::LockRows => {
            run(&mut c, "BEGIN; SELECT FROM t WHERE topic IS NULL LIMIT 1000 FOR UPDATE");
            std::thread::sleep(pause * 3);
            run(&mut c, "COMMIT");
        }
        Event::Vacuum => {
            run(&mut c, "VACUUM (ANALYZE) t");
            run(&mut c, "CHECKPOINT");
        }
    }
}

/// Somebody fills, changes and deletes rows that wait, and keeps a list of it.
fn work_beside(c: &mut Client, rows: i64, random: &mut Rng) {
    let mut some = || (0..TOUCHED).map(|_| random.i64(0..rows).to_string()).collect::<Vec<_>>().join(",");
    let (mine, changed, gone) = (some(), some(), some());
    // It is not done if it meets a deadlock, or a lock for too long.
    let _ = c.batch_execute(&format!(
        "SET lock_timeout = '1s'; BEGIN;
         WITH u AS (UPDATE t SET topic = 'mine' WHERE id IN ({mine}) AND topic IS NULL RETURNING id)
         INSERT INTO touched SELECT id, 'mine' FROM u;
         WITH u AS (UPDATE t SET body = replace(body, want || '#', 'other#'), want = 'other'
                     WHERE id IN ({changed}) AND topic IS NULL RETURNING id)
         INSERT INTO touched SELECT id, 'changed' FROM u;
         WITH u AS (DELETE FROM t WHERE id IN ({gone}) AND topic IS NULL RETURNING id)
         INSERT INTO touched SELECT id, 'gone' FROM u;
         COMMIT"
    ));
    let _ = c.batch_execute("ROLLBACK");
}

#[test]
fn the_accounts_hold_after_all_of_it() {
    let rows = setting("SOAK_ROWS", 20_000);
    let seconds = setting("SOAK_SECONDS", 25);
    let seed = setting("SOAK_SEED", 1);
    let mut random = Rng::with_seed(seed as u64);
    // So slow that rows are left for as long as things happen.
    let base = Duration::from_millis((REQUESTS * PACK * seconds * 700 / rows) as u64);
    let config = Config {
        latency: Latency { base, spread: 0.3, ..Latency::default() },
        faults: Fault::PASSING.map(|f| (f, 0.002)).into(),
        seed: seed as u64,
        ..Config::default()
    };
    let mut bed = Bed::build(Cluster::builder("soak").conf("autovacuum_naptime", "5s"), config);
    let mut c = bed.connect();
    tickets(&mut c, "t", 0..=rows - 1);
    run(&mut c, "CREATE TABLE touched (id bigint, what text); CREATE EXTENSION amcheck");
    run(&mut c, &format!("SELECT llm_batch.alter_model('m', max_concurrent_requests => {REQUESTS})"));
    let job = backfill(&mut c, "t");
    wait_until("the rows are counted", PATIENCE, || progress(&mut c, job).total, |n| *n == rows);

    let start = Instant::now();
    let mut events: BTreeMap<Event, i64> = BTreeMap::new();
    // Memory of gateway and worker, kB, with the time.
    let mut peaks: [Vec<(f64, i64)>; 2] = [Vec::new(), Vec::new()];
    let mut restarts = 0;
    while start.elapsed() < Duration::from_secs(seconds as u64) {
        let p = progress(&mut c, job);
        if p.status == "done" {
            break;
        }
        for (kind, peak) in ["llm_batch gateway", "llm_batch job"].into_iter().zip(&mut peaks) {
            if let Some(kb) = pids(&mut c, kind).first().and_then(|pid| memory(*pid)) {
                peak.push((start.elapsed().as_secs_f64(), kb));
            }
        }
        work_beside(&mut c, rows, &mut random);
        let event = Event::ALL[random.usize(..Event::ALL.len())];
        println!("{:7.1} s  {event:?}  {} of {} done", start.elapsed().as_secs_f64(), p.done, p.total);
        happen(&mut bed, job, event, &mut random);
        *events.entry(event).or_default() += 1;
        if matches!(event, Event::KillServer | Event::KillWorker | Event::Restart) {
            restarts += 1;
            c = connect(&bed);
        }
        std::thread::sleep(Duration::from_millis(random.u64(..2_000)));
    }
    let loud = start.elapsed();
    let p = wait_until(
        "the job is done",
        Duration::from_secs(seconds as u64 + 300),
        || progress(&mut c, job),
        |p| !matches!(p.status.as_str(), "running" | "paused"),
    );
    assert_eq!(p.status, "done", "{p:?}");
    println!("{events:?} in {loud:?}; done after {:?}\n{p:?}", start.elapsed());
    assert!(events.values().sum::<i64>() >= 5, "too little happened: {events:?}");

    accounts(&mut c, job, rows, &p);
    paid(&bed, &mut c, job, &p, &events);
    memory_is_flat(&peaks, restarts);
    // Every request writes to a row of its job: dead versions of it are used again.
    let state = one(&mut c, "SELECT pg_total_relation_size('llm_batch.job_state')");
    println!("job_state has {} kB", state / 1024);
    assert!(state < 4 << 20, "job_state has grown to {state} bytes");
    let output = bed.cluster.run_program("pg_amcheck", &["--all", "--heapallindexed", "--parent-check"]);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let log = bed.cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("panicked"), "see the log");
}

/// Every row is right, listed, or somebody else's; the job's counts say the same as the table.
fn accounts(c: &mut Client, job: i64, rows: i64, p: &Progress) {
    let touched =
        |c: &mut Client, what: &str| one(c, &format!("SELECT count(DISTINCT id) FROM touched WHERE what = '{what}'"));
    let (mine, changed, gone) = (touched(c, "mine"), touched(c, "changed"), touched(c, "gone"));
    println!("others filled {mine} rows, changed {changed} and deleted {gone}");
    assert_eq!(one(c, "SELECT count(*) FROM t"), rows - gone);
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE topic <> want AND topic <> 'mine'"), 0, "wrong labels");
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE topic = 'mine'"), mine, "what others wrote stays");
    let unlisted = format!(
        "SELECT count(*) FROM t WHERE topic IS NULL
            AND NOT EXISTS (SELECT FROM llm_batch.failure f WHERE f.job_id = {job} AND f.key = jsonb_build_object('id', t.id))"
    );
    assert_eq!(one(c, &unlisted), 0, "rows that are lost");
    let right = one(c, "SELECT count(*) FROM t WHERE topic = want");
    let empty = one(c, "SELECT count(*) FROM t WHERE topic IS NULL");
    assert_eq!((p.total, p.left, p.done), (rows, 0, right), "{p:?}");
    // A row that was given up may have been filled or deleted by others since: it is listed, and theirs.
    let listed = p.skipped + p.failed;
    assert!((empty..=empty + mine + gone).contains(&listed), "{listed} rows are listed, {empty} are empty");
    assert!(listed < rows / 100, "far too many rows were given up: {listed}");
}

/// Nothing is paid twice but what was in flight when something died, was changed by others, or whose answer was lost.
fn paid(bed: &Bed, c: &mut Client, job: i64, p: &Progress, events: &BTreeMap<Event, i64>) {
    let stats = bed.provider.stats();
    let again: i64 = stats.rows.values().map(|r| (i64::from(r.answered) - 1).max(0)).sum();
    let deaths: i64 = events.iter().filter(|(e, _)| e.loses()).map(|(_, n)| n).sum();
    let fault = |name: &str| stats.faults.get(name).copied().unwrap_or_default() as i64;
    let lost = fault("ResetAfter") * PACK + fault("DoubleId");
    let changed = one(c, "SELECT count(*) FROM touched");
    let in_flight = deaths * REQUESTS * PACK;
    println!(
        "{again} rows were paid twice; {deaths} deaths at {} rows, {lost} lost, {changed} changed",
        REQUESTS * PACK
    );
    println!("the job's tokens are {} of {}", p.input_tokens, stats.prompt_tokens);
    assert!(again <= in_flight + lost + changed, "{again} rows were paid twice");
    assert!(stats.peak_rows_in_flight as i64 <= REQUESTS * PACK, "{}", stats.peak_rows_in_flight);
    assert!(p.input_tokens as u64 <= stats.prompt_tokens && p.output_tokens as u64 <= stats.completion_tokens);
    let each = stats.prompt_tokens / stats.admitted.max(1);
    let unknown = ((deaths * REQUESTS + fault("ResetAfter")) as u64 + stats.abandoned) * each * 2;
    assert!(p.input_tokens as u64 + unknown >= stats.prompt_tokens, "tokens are missing from the job's count");
    let cost = "SELECT cost = round((input_tokens * 0.15 + output_tokens * 0.60) / 1e6, 12) FROM llm_batch.progress";
    assert_eq!(text(c, &format!("{cost} WHERE job_id = {job}")), "t");
}

/// Gateway and worker hold no more late than early.
fn memory_is_flat(peaks: &[Vec<(f64, i64)>; 2], restarts: i64) {
    for (kind, peak) in ["gateway", "worker"].into_iter().zip(peaks) {
        let end = peak.last().map_or(0.0, |p| p.0);
        let most = |from: f64, to: f64| {
            let part = peak.iter().filter(|(at, _)| *at >= from * end && *at <= to * end);
            part.map(|p| p.1).max().unwrap_or(0)
        };
        let (early, late) = (most(0.0, 0.5), most(0.5, 1.0));
        println!("{kind}: at most {early} kB in the first half, {late} kB in the second; {restarts} restarts");
        assert!(late <= early + 16_384, "{kind}: {early} kB, then {late} kB");
    }
}
