//! A server that may have few files open: a provider that stops answering, and sessions that ask hundreds of different
//! questions, use up nobody else's.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Bed, LABELS, backfill, classifier, labels_json, one, pids, run, slow, text, tickets, wait_status};
use llm_fake_provider::{Config, FakeProvider};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

const HARD: u64 = 256;

/// The median and the 95th percentile of how long a session waits for a label, in ms.
fn pace(client: &mut Client, first: usize) -> (u128, u128) {
    let mut times = Vec::new();
    for i in first..first + 40 {
        let start = Instant::now();
        let label = format!("SELECT llm_classify('x #r{i:06}:bug# y', 'topic')");
        let got: Option<String> = client.query_one(&label, &[]).unwrap_or_else(|e| panic!("{e:?}")).get(0);
        times.push(start.elapsed().as_millis());
        assert_eq!(got.as_deref(), Some("bug"));
    }
    times.sort_unstable();
    (times[20], times[37])
}

fn open_files(pid: i32) -> u64 {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64
}

/// A query of 450 different calls, asked until it is told to stop; what it ends with each time.
fn ask_too_much(mut client: Client, stop: &AtomicBool) -> Vec<(String, String)> {
    let calls: Vec<String> = (0..450)
        .map(|i| format!(r#"llm_filter(body, 'Is it {i}?', '{{"model": "silent0", "max_rows_per_request": 1}}')"#))
        .collect();
    let query = format!("SELECT {} FROM t0 LIMIT 5", calls.join(", "));
    let mut ends = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let e = client.simple_query(&query).expect_err("it asks too much");
        let e = e.as_db_error().unwrap_or_else(|| panic!("{e:?}"));
        ends.push((e.code().code().to_owned(), format!("{e:?}")));
    }
    ends
}

#[test]
fn silent_providers_and_greedy_sessions_leave_files_for_others() {
    let bad = FakeProvider::start(Config::default()).unwrap();
    let builder = Cluster::builder("files").files(128, HARD).conf("llm_batch.max_job_workers", "10");
    let bed = Bed::build(builder, slow(40));
    let c = &mut bed.connect();
    let gateway = pids(c, "llm_batch gateway")[0];
    run(c, &format!("CREATE SERVER bad FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{}')", bad.base_url()));
    for i in 0..6 {
        run(
            c,
            &format!(
                "SELECT llm_batch.create_model('silent{i}', server => 'bad', model => 's{i}', requests_per_minute => 1000000)"
            ),
        );
        classifier(
            c,
            &format!("task{i}"),
            &labels_json(&LABELS),
            &format!("silent{i}"),
            r#"{"max_rows_per_request": 1}"#,
        );
        tickets(c, &format!("t{i}"), 1..=300);
    }
    tickets(c, "healthy", 1..=500);
    let alone = pace(c, 100_000);

    // Each has as many requests under way as it can get.
    let fill = |c: &mut Client, i: i64| {
        one(c, &format!("SELECT llm_batch.backfill('t{i}', input => 'body', target => 'topic', task => 'task{i}')"))
    };
    // A model that has answered nothing yet gets few requests.
    for i in 0..6 {
        assert_eq!(text(c, &format!("SELECT llm_classify('x #r200000:bug# y', 'task{i}')")), "bug");
    }
    bad.hold();
    let jobs: Vec<i64> = (0..6).map(|i| fill(c, i)).collect();
    let at_work = "SELECT count(*) FROM llm_batch.activity WHERE model LIKE 's_' AND in_flight_requests > 0";
    wait_until("all six are at work", Duration::from_secs(30), || one(c, at_work), |n| *n == 6);
    let among = pace(c, 101_000);
    let job = backfill(c, "healthy");
    wait_status(c, job, "done");
    let silent = open_files(gateway);

    // Sessions that ask hundreds of different questions, again and again.
    run(c, "CREATE ROLE greedy LOGIN; GRANT SELECT ON t0 TO greedy; GRANT USAGE ON FOREIGN SERVER bad TO greedy");
    let stop = AtomicBool::new(false);
    let (greedy, with_greedy) = thread::scope(|scope| {
        let sessions: Vec<_> = (0..3)
            .map(|_| bed.cluster.connect_as("postgres", "greedy"))
            .map(|session| scope.spawn(|| ask_too_much(session, &stop)))
            .collect();
        let mut most = 0;
        let pace = catch_unwind(AssertUnwindSafe(|| {
            let pace = pace(c, 102_000);
            // Others that come meanwhile are served, too.
            for i in 0..20 {
                let new = &mut bed.connect();
                assert_eq!(text(new, &format!("SELECT llm_classify('x #r1030{i:02}:bug# y', 'topic')")), "bug");
                assert_eq!(one(new, at_work), 6);
                most = most.max(open_files(gateway));
            }
            pace
        }));
        stop.store(true, Ordering::Relaxed);
        let ends: Vec<_> = sessions.into_iter().map(|s| s.join().unwrap()).collect();
        let pace = pace.unwrap_or_else(|e| std::panic::resume_unwind(e));
        println!(
            "alone {alone:?} ms, among silent models {among:?}, with greedy sessions {pace:?}; {silent} and {most} files"
        );
        assert!(most * 10 <= HARD * 8 && silent * 10 <= HARD * 8, "{silent} and {most} files");
        (ends, pace)
    });
    for (now, what) in [(among, "silent models"), (with_greedy, "greedy sessions")] {
        // Two cores do all of this at once: the figures are printed, and this is what a queue of others would take.
        assert!(now.0 <= 10 * alone.0 && now.1 <= 10 * alone.1, "{what}: {alone:?} {now:?}");
    }
    for end in greedy.iter().flatten() {
        assert!(end.0 == "53000" && end.1.contains("at the same time"), "{end:?}");
    }
    assert!(greedy.iter().all(|ends| !ends.is_empty()));

    bad.release();
    for job in jobs {
        wait_status(c, job, "done");
    }
    assert_eq!(pids(c, "llm_batch gateway"), [gateway]);
    assert!(!bed.cluster.log().contains("lost the connection"));
    let told = format!("the llm_batch gateway may have {HARD} files open: at most ");
    assert!(bed.cluster.log().contains(&told));
}
