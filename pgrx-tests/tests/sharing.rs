//! Effects of sessions and jobs on each other: requests, answers to the same text, turns.

mod common;

use common::{
    Bed, LABELS, PATIENCE, backfill, backfill_with, classifier, labels_json, left, model, one, progress, run, slow,
    text, tickets, wait_status, wrong,
};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;
use std::sync::{Barrier, Mutex};

/// The tests' own classifier reuses no answers; here it does, as one does that is made without options.
fn reusing(bed: Bed) -> Bed {
    run(&mut bed.connect(), "SELECT llm_batch.alter_classifier('topic', options => '{}')");
    bed
}

/// A text and its label.
fn ticket(n: usize) -> (String, &'static str) {
    let label = LABELS[n % 8];
    (format!("My order #r{n:06}:{label}# is not what I wanted"), label)
}

/// The error in the answer to a text, if there is one.
fn trouble(client: &mut Client, n: usize) -> Option<String> {
    let (body, want) = ticket(n);
    match client.query_one("SELECT llm_classify($1, 'topic')", &[&body]) {
        Ok(row) => row.get::<_, Option<String>>(0).filter(|label| label != want).or_else(|| {
            let is_null = row.get::<_, Option<String>>(0).is_none();
            is_null.then(|| "no label".to_owned())
        }),
        Err(error) => Some(format!("{error:?}")),
    }
}

/// Sessions of one role that have asked before and then ask at the same instant, in rounds: how many requests each
/// round took. `texts`: which text a session asks about in a round.
fn at_once(bed: &Bed, sessions: usize, rounds: usize, texts: fn(usize, usize) -> usize) -> Vec<u64> {
    // The last one at it is the test itself.
    let barrier = Barrier::new(sessions + 1);
    let troubles: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut requests = Vec::new();
    std::thread::scope(|scope| {
        for session in 0..sessions {
            let (barrier, troubles) = (&barrier, &troubles);
            let mut client = bed.connect();
            run(&mut client, "SET statement_timeout = '60 s'");
            // A panic would leave the others waiting.
            scope.spawn(move || {
                let mut ask = |n: usize| {
                    let trouble = trouble(&mut client, n);
                    troubles.lock().unwrap().extend(trouble.map(|t| format!("session {session}, text {n}: {t}")));
                };
                ask(900_000 + session);
                barrier.wait();
                for round in 0..rounds {
                    barrier.wait();
                    ask(texts(session, round));
                    barrier.wait();
                }
            });
        }
        barrier.wait();
        bed.provider.reset_stats();
        for _ in 0..rounds {
            barrier.wait();
            barrier.wait();
            let stats = bed.provider.stats();
            requests.push(stats.requests - requests.iter().sum::<u64>());
        }
    });
    let troubles = troubles.into_inner().unwrap();
    assert!(troubles.is_empty(), "{troubles:#?}");
    requests
}

#[test]
fn sessions_that_ask_at_once_share_requests() {
    let bed = reusing(Bed::with("sharing_sessions", slow(300)));
    let requests = at_once(&bed, 50, 5, |session, round| round * 1_000 + session);
    println!("{requests:?}");
    // Two on a machine that is idle; where all processors are busy, some come so late that they find others gone. Alone
    // they would be fifty.
    assert!(requests.iter().all(|n| *n <= 10), "{requests:?}");
    let stats = bed.provider.stats();
    assert_eq!((stats.rows.len(), stats.rows.values().all(|row| row.asked == 1)), (250, true));
    // All about one text.
    let requests = at_once(&bed, 50, 5, |_, round| 100_000 + round);
    assert_eq!(requests, [1; 5]);
    let reused = one(&mut bed.connect(), "SELECT sum(rows_reused)::bigint FROM llm_batch.activity");
    assert!(reused >= 5 * 49, "{reused}");
}

#[test]
fn without_a_cache_what_is_under_way_is_shared_all_the_same() {
    let builder = Cluster::builder("sharing_no_cache").conf("llm_batch.gateway_cache", "0");
    let bed = reusing(Bed::build(builder, slow(300)));
    // The same text in each round.
    assert_eq!(at_once(&bed, 20, 3, |_, _| 1), [1; 3]);
}

#[test]
fn answers_are_kept_for_the_role_as_long_as_there_is_a_cache() {
    let bed = reusing(Bed::new("sharing_cache"));
    let mut c = bed.connect();
    let requests = |c: &mut Client, n| {
        let before = bed.provider.stats().requests;
        assert_eq!(trouble(c, n), None);
        bed.provider.stats().requests - before
    };
    assert_eq!([1, 2, 1, 2].map(|n| requests(&mut c, n)), [1, 1, 0, 0]);
    // The answers of another session, and of another role.
    assert_eq!(requests(&mut bed.connect(), 1), 0);
    run(&mut c, "CREATE ROLE other; GRANT USAGE ON FOREIGN SERVER fake TO other; SET ROLE other");
    assert_eq!([1, 1].map(|n| requests(&mut c, n)), [1, 0]);
    run(&mut c, "RESET ROLE");
    // Another instruction is another question; the same as before has the answer of before.
    run(&mut c, "SELECT llm_batch.alter_classifier('topic', instruction => 'Mails of a web shop.')");
    assert_eq!([1, 1].map(|n| requests(&mut c, n)), [1, 0]);
    run(&mut c, "SELECT llm_batch.alter_classifier('topic', instruction => 'Tickets of a web shop.')");
    assert_eq!(requests(&mut c, 1), 0);
    // Rows of a query and of a job.
    tickets(&mut c, "t", 1..=4);
    run(&mut c, "UPDATE t SET (body, want) = (SELECT body, want FROM t WHERE id = 3) WHERE id = 4");
    let before = bed.provider.stats().requests;
    let query = "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM t', 'topic')";
    assert_eq!(one(&mut c, query), 4);
    let job = backfill(&mut c, "t");
    bed.done(job);
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
    assert_eq!(bed.provider.stats().requests, before + 1);
    assert_eq!(one(&mut c, &format!("SELECT rows_reused FROM llm_batch.progress WHERE job_id = {job}")), 4);
    // Taken away while the server runs.
    run(&mut c, "ALTER SYSTEM SET llm_batch.gateway_cache = 0");
    run(&mut c, "SELECT pg_reload_conf()");
    wait_until("it is asked again", PATIENCE, || requests(&mut c, 1), |n| *n == 1);
    assert_eq!([1, 1].map(|n| requests(&mut c, n)), [1, 1]);
}

/// 3,000 rows of 60 texts.
fn duplicates(name: &str) -> (Bed, Client) {
    let bed = reusing(Bed::with(name, slow(20)));
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=3_000);
    run(
        &mut c,
        "UPDATE t SET (body, want) = (SELECT o.body, o.want FROM t o WHERE o.id = 1 + t.id * t.id % 60) WHERE id > 60",
    );
    (bed, c)
}

#[test]
fn a_job_asks_each_text_once() {
    let (bed, mut c) = duplicates("sharing_texts");
    let job = backfill(&mut c, "t");
    let p = bed.done(job);
    assert_eq!(p.counts(), (3_000, 3_000, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
    let stats = bed.provider.stats();
    assert_eq!((stats.rows.len(), stats.rows.values().all(|row| row.asked == 1)), (60, true));
    let reused = format!("SELECT rows_reused FROM llm_batch.progress WHERE job_id = {job}");
    assert_eq!(one(&mut c, &reused), 3_000 - 60);
    assert_eq!(p.requests as u64, stats.requests - stats.probes);
    // Again, with a row in between that nobody has asked about.
    run(&mut c, "UPDATE t SET topic = NULL; UPDATE t SET body = body || ' at all' WHERE id = 1500");
    let job = backfill(&mut c, "t");
    let p = bed.done(job);
    let reused = format!("SELECT rows_reused FROM llm_batch.progress WHERE job_id = {job}");
    assert_eq!((p.counts(), p.requests, one(&mut c, &reused)), ((3_000, 3_000, 0, 0, 0, 0), 1, 2_999));
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
}

#[test]
fn a_job_that_is_told_to_asks_each_row() {
    let (bed, mut c) = duplicates("sharing_reuse");
    // Also what is known already.
    assert_eq!(one(&mut c, "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM t', 'topic')"), 3_000);
    bed.provider.reset_stats();
    let job = backfill_with(&mut c, "t", "options => '{\"reuse\": false}'");
    let p = bed.done(job);
    assert_eq!(p.counts(), (3_000, 3_000, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
    let stats = bed.provider.stats();
    assert_eq!((stats.rows.len(), stats.rows.values().map(|row| row.asked).sum::<u32>()), (60, 3_000));
    assert_eq!(one(&mut c, &format!("SELECT rows_reused FROM llm_batch.progress WHERE job_id = {job}")), 0);
    bed.provider.reset_stats();
    let query = "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM t WHERE id <= 600', 'topic', \
                 '{\"reuse\": false}')";
    assert_eq!(one(&mut c, query), 600);
    assert_eq!(bed.provider.stats().rows.values().map(|row| row.asked).sum::<u32>(), 600);
}

#[test]
fn who_shares_a_text_with_a_session_that_is_cancelled_gets_the_answer() {
    let bed = reusing(Bed::with("sharing_cancelled", slow(40)));
    let mut sessions: Vec<Client> = (0..16).map(|_| bed.connect()).collect();
    for (i, client) in sessions.iter_mut().enumerate() {
        assert_eq!(trouble(client, 900_000 + i), None);
        // Half of them are cancelled before, in, or after the moment of the answer; who waits in vain fails.
        let timeout = if i % 2 == 0 { 25 + 2 * i } else { 60_000 };
        run(client, &format!("SET statement_timeout = {timeout}"));
    }
    let mut cancelled = 0;
    for round in 0..30 {
        let troubles: Vec<Option<String>> = std::thread::scope(|scope| {
            let ask = |client| scope.spawn(move || trouble(client, round));
            let asking: Vec<_> = sessions.iter_mut().map(ask).collect();
            asking.into_iter().map(|a| a.join().unwrap()).collect()
        });
        for (i, trouble) in troubles.into_iter().enumerate() {
            match trouble {
                Some(t) if i % 2 == 0 && t.contains("statement timeout") => cancelled += 1,
                trouble => assert_eq!(trouble, None, "session {i}, round {round}"),
            }
        }
    }
    assert!((30..240).contains(&cancelled), "{cancelled} of 240 were cancelled");
}

#[test]
fn a_session_does_not_wait_behind_a_jobs_queue() {
    let bed = reusing(Bed::with("sharing_turns", slow(100)));
    let mut c = bed.connect();
    model(&mut c, "limited", "tokens_per_minute => 500000");
    classifier(&mut c, "slow", &labels_json(&LABELS), "limited", "{}");
    tickets(&mut c, "t", 1..=4_000);
    let job = one(&mut c, "SELECT llm_batch.backfill('t', input => 'body', target => 'topic', task => 'slow')");
    let requests = || bed.provider.stats().requests as usize;
    wait_until("the job is under way", PATIENCE, requests, |n| *n >= 8);
    let mut session = bed.connect();
    for n in 500_000..500_008 {
        let (body, want) = ticket(n);
        let before = requests();
        assert_eq!(text(&mut session, &format!("SELECT llm_classify('{body}', 'slow')")), want);
        let marker = format!("#r{n:06}:");
        let asks = |body: &serde_json::Value| body.to_string().contains(&marker);
        let at = bed.provider.bodies().iter().position(asks).expect("it was asked within the last 100");
        assert!(at <= before + 1, "it was number {at} where {before} were before");
    }
    let waiting = "SELECT queued FROM llm_batch.activity WHERE model = 'fake-limited'";
    assert!(one(&mut c, waiting) > 500 && progress(&mut c, job).status == "running", "nothing was queued");
    run(&mut c, &format!("SELECT llm_batch.cancel({job})"));
    wait_status(&mut c, job, "cancelled");
}
