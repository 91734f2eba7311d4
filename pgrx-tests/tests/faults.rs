//! A provider that fails in every way it can: no wrong value, no row lost, a log that can be read.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::*;
use llm_fake_provider::{Config, FakeProvider, Fault, Latency};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

/// Starts a job on `table` with faults for its first requests; the probe is over before they are set.
#[track_caller]
fn scripted(bed: &Bed, c: &mut Client, table: &str, more: &str, faults: &[Fault]) -> i64 {
    run(c, "BEGIN");
    let job = backfill_with(c, table, more);
    bed.provider.reset_stats();
    bed.provider.script(faults.iter().cloned().map(Some));
    run(c, "COMMIT");
    job
}

/// Starts a job on `table` all of whose requests meet a fault.
#[track_caller]
fn always(bed: &Bed, c: &mut Client, table: &str, more: &str, fault: Fault) -> i64 {
    run(c, "BEGIN");
    let job = backfill_with(c, table, more);
    bed.provider.reset_stats();
    bed.provider.configure(|config| config.faults = vec![(fault, 1.0)]);
    run(c, "COMMIT");
    job
}

fn no_faults(bed: &Bed) {
    bed.provider.configure(|config| config.faults.clear());
}

/// Counts rows by how often they were asked: times → rows.
fn asked(bed: &Bed) -> BTreeMap<u32, usize> {
    let mut out = BTreeMap::new();
    for row in bed.provider.stats().rows.values() {
        *out.entry(row.asked).or_default() += 1;
    }
    out
}

/// The model has answered the task a moment ago: what it does not answer from now on is the rows' own fault.
#[track_caller]
fn proven(bed: &Bed, c: &mut Client) {
    tickets(c, "proven", 900_001..=900_050);
    let job = backfill(c, "proven");
    bed.done(job);
}

#[track_caller]
fn all_right(c: &mut Client, table: &str) {
    assert_eq!((wrong(c, table), left(c, table)), (0, 0), "wrong and left in {table}");
}

#[test]
fn two_percent_of_everything() {
    let latency = Latency { base: Duration::from_millis(5), spread: 0.5, ..Latency::default() };
    let bed = Bed::with("faults", Config { latency, seed: 7, ..Config::default() });
    let mut c = bed.connect();
    const ROWS: i64 = 6_000;
    tickets(&mut c, "t", 1..=ROWS);
    run(&mut c, "BEGIN");
    let job = backfill_with(&mut c, "t", r#"options => '{"max_rows_per_request": 10}'"#);
    bed.provider.reset_stats();
    bed.provider.configure(|config| config.faults = Fault::PASSING.map(|fault| (fault, 0.02)).into());
    let log_before = bed.cluster.log().len();
    let start = Instant::now();
    run(&mut c, "COMMIT");
    let p = bed.done(job);
    let took = start.elapsed();
    let stats = bed.provider.stats();
    println!("{p:?} after {took:?}\n{:?}", stats.faults);

    for kind in Fault::PASSING {
        assert!(stats.faults.get(kind.name()).is_some_and(|n| *n > 0), "{kind} never happened: more rows are needed");
    }
    // Right, or listed; and what is listed was given up for a reason.
    assert_eq!(wrong(&mut c, "t"), 0);
    let listed = failures(&mut c, job);
    assert_eq!(left(&mut c, "t"), listed.len() as i64);
    let unlisted = format!(
        "SELECT count(*) FROM t WHERE topic IS NULL
            AND NOT EXISTS (SELECT FROM llm_batch.failure f WHERE f.job_id = {job} AND f.key = jsonb_build_object('id', t.id))"
    );
    assert_eq!(one(&mut c, &unlisted), 0, "rows that are lost");
    for (key, state, class, attempts, _) in &listed {
        let right = matches!(
            (state.as_str(), class.as_str(), attempts),
            ("skipped", "no_answer", 3)
                | ("failed", "unknown_code" | "contradicted", 3)
                | ("failed", "provider_error", _)
        );
        assert!(right, "{key} {state} {class} {attempts}");
    }
    assert!(listed.len() < ROWS as usize / 100, "far too many were given up: {}", listed.len());
    let count = |wanted: &str| listed.iter().filter(|(_, state, ..)| state == wanted).count() as i64;
    assert_eq!(p.counts(), (ROWS, ROWS - listed.len() as i64, count("skipped"), count("failed"), 0, 0));
    assert_eq!(stats.rows.len(), ROWS as usize);

    // The log: at most one line a minute for each class of trouble.
    let log = bed.cluster.log().split_off(log_before);
    let lines: Vec<&str> = log.lines().filter(|l| l.contains("llm_batch")).collect();
    println!("{lines:#?}");
    let most = took.as_secs() as usize / 60 + 1;
    let classes = ["asked again", "is sent again", "waiting for"];
    for class in classes {
        let n = lines.iter().filter(|l| l.contains(class)).count();
        assert!((1..=most).contains(&n), "{n} lines of \"{class}\"");
    }
    let others: Vec<_> = lines.iter().filter(|l| !classes.iter().any(|class| l.contains(class))).collect();
    // And the account at the end.
    assert!(others.len() == 1 && others[0].contains(&format!("llm_batch job {job} is done")), "{others:#?}");
    assert!(log.lines().count() < 20 + classes.len() * most, "{log}");
    assert!(!log.contains("My order") && !log.contains("sk-test"), "texts and keys are nobody's business");
}

#[test]
fn an_answer_that_is_wrong_for_one_row_costs_that_row_alone() {
    let bed = Bed::new("one_row");
    let mut c = bed.connect();
    for (i, fault) in [Fault::DropId, Fault::InventId, Fault::DoubleId, Fault::UnknownCode].into_iter().enumerate() {
        let (table, first) = (format!("t{i}"), i as i64 * 100 + 1);
        tickets(&mut c, &table, first..=first + 49);
        let job = scripted(&bed, &mut c, &table, "", std::slice::from_ref(&fault));
        let p = bed.done(job);
        let stats = bed.provider.stats();
        assert_eq!(stats.faults.get(fault.name()), Some(&1), "{fault}");
        assert_eq!(p.counts(), (50, 50, 0, 0, 0, 0), "{fault}");
        all_right(&mut c, &table);
        assert_eq!(asked(&bed), BTreeMap::from([(1, 49), (2, 1)]), "{fault}");
        assert_eq!((stats.requests, p.requests), (2, 2), "{fault}");
        assert_eq!(p.input_tokens, stats.prompt_tokens as i64, "{fault}");
    }
}

#[test]
fn an_answer_that_is_wrong_for_many_rows_is_asked_again_in_part() {
    let bed = Bed::new("many_rows");
    let mut c = bed.connect();
    // The fault, and the most rows that may be asked a second time. Rows that were not answered stay together: the
    // instructions are paid once a pack.
    let faults = [
        (Fault::Prose, 0),
        (Fault::CutByLength, 49),
        (Fault::MalformedJson, 49),
        (Fault::EmptyAnswer, 50),
        (Fault::ResetAfter, 50),
        (Fault::Refusal, 50),
        (Fault::ContentFilter, 50),
        // Refused before they were billed.
        (Fault::ResetBefore, 0),
        (Fault::Http500, 0),
        (Fault::Http503, 0),
        (Fault::RateLimit429, 0),
        (Fault::Status(529, "overloaded".to_owned()), 0),
        (Fault::Status(200, "<html>busy</html>".to_owned()), 0),
        (Fault::Status(200, "{}".to_owned()), 0),
        (Fault::TooLarge429, 0),
    ];
    for (i, (fault, most)) in faults.into_iter().enumerate() {
        let (table, first) = (format!("t{i}"), i as i64 * 100 + 1);
        tickets(&mut c, &table, first..=first + 49);
        let job = scripted(&bed, &mut c, &table, "", std::slice::from_ref(&fault));
        let p = bed.done(job);
        assert_eq!(p.counts(), (50, 50, 0, 0, 0, 0), "{fault}");
        all_right(&mut c, &table);
        let (stats, asked) = (bed.provider.stats(), asked(&bed));
        assert_eq!(stats.faults.values().sum::<u64>(), 1, "{fault}");
        let twice = asked.get(&2).copied().unwrap_or_default();
        assert_eq!(asked.get(&1).copied().unwrap_or_default() + twice, 50, "{fault}: {asked:?}");
        assert!(twice <= most && (most == 0 || twice > 0), "{fault}: {asked:?}");
        // A pack that was refused as too large or had no answer at all is halved.
        let requests = match &fault {
            Fault::Prose => 1..=1,
            Fault::TooLarge429 => 3..=3,
            Fault::EmptyAnswer | Fault::Refusal | Fault::ContentFilter => 2..=5,
            Fault::Status(200, body) if body == "{}" => 2..=5,
            Fault::CutByLength | Fault::MalformedJson => 2..=4,
            _ => 2..=2,
        };
        assert!(requests.contains(&stats.requests), "{fault}: {} requests", stats.requests);
    }
}

#[test]
fn rows_that_are_never_answered_are_listed_and_can_be_asked_again() {
    let bed = Bed::new("never");
    let mut c = bed.connect();
    proven(&bed, &mut c);
    let single = r#"options => '{"max_rows_per_request": 1}'"#;
    let faults = [
        (Fault::DropId, "skipped", "no_answer", 3),
        (Fault::EmptyAnswer, "skipped", "no_answer", 3),
        (Fault::CutByLength, "skipped", "no_answer", 3),
        (Fault::UnknownCode, "failed", "unknown_code", 3),
        (Fault::DoubleId, "failed", "contradicted", 3),
        (Fault::InventId, "skipped", "no_answer", 3),
        (Fault::Refusal, "skipped", "refused", 1),
        (Fault::ContentFilter, "skipped", "refused", 1),
    ];
    for (i, (fault, state, class, attempts)) in faults.into_iter().enumerate() {
        let (table, first) = (format!("t{i}"), i as i64 * 100 + 1);
        tickets(&mut c, &table, first..=first + 4);
        let job = always(&bed, &mut c, &table, single, fault.clone());
        let p = bed.done(job);
        let (skipped, failed) = if state == "skipped" { (5, 0) } else { (0, 5) };
        assert_eq!(p.counts(), (5, 0, skipped, failed, 0, 0), "{fault}");
        assert_eq!(left(&mut c, &table), 5, "{fault}");
        assert_eq!(asked(&bed), BTreeMap::from([(attempts as u32, 5)]), "{fault}");
        let listed = failures(&mut c, job);
        assert_eq!(listed.len(), 5, "{fault}");
        for (n, (key, s, cl, a, detail)) in listed.into_iter().enumerate() {
            assert_eq!(key, serde_json::json!({"id": first + n as i64}), "{fault}");
            assert_eq!((s.as_str(), cl.as_str(), a), (state, class, attempts), "{fault}");
            assert!(!detail.is_empty(), "{fault}");
        }

        // It stays as it is until it is asked for; what is listed is not asked by a job that is done.
        no_faults(&bed);
        bed.provider.reset_stats();
        run(&mut c, &format!("SELECT llm_batch.retry_failed({job})"));
        let p = bed.done(job);
        assert_eq!(p.counts(), (5, 5, 0, 0, 0, 0), "{fault}");
        all_right(&mut c, &table);
        assert_eq!(asked(&bed), BTreeMap::from([(1, 5)]), "{fault}");
        assert!(failures(&mut c, job).is_empty(), "{fault}");
        let again: bool = c.query_one("SELECT llm_batch.retry_failed($1)", &[&job]).unwrap().get(0);
        assert!(!again, "{fault}: there is nothing to retry");
    }
}

#[test]
fn a_pack_that_is_never_answered_is_split_down_to_single_rows() {
    let bed = Bed::new("split");
    let mut c = bed.connect();
    proven(&bed, &mut c);
    tickets(&mut c, "t", 1..=50);
    let job = always(&bed, &mut c, "t", "", Fault::EmptyAnswer);
    let p = bed.done(job);
    assert_eq!(p.counts(), (50, 0, 50, 0, 0, 0));
    assert_eq!(asked(&bed), BTreeMap::from([(3, 50)]));
    assert!(failures(&mut c, job).iter().all(|f| (f.1.as_str(), f.2.as_str(), f.3) == ("skipped", "no_answer", 3)));
    // 50 rows at once, then in smaller requests, then alone.
    let sizes: Vec<usize> =
        bed.provider.bodies().iter().map(|b| b["messages"][1]["content"].as_str().unwrap().lines().count()).collect();
    // The first bodies are the probe's, of one line too, and that of the rows before.
    let (first, last) = (sizes[2], &sizes[sizes.len() - 50..]);
    assert_eq!(first, 50, "{sizes:?}");
    assert!(last.iter().all(|n| *n == 1), "{sizes:?}");
    assert_eq!(p.requests as usize, sizes.len() - 2);

    // Half of them come back, with other attempts than the job's default.
    no_faults(&bed);
    tickets(&mut c, "u", 101..=105);
    let job = always(&bed, &mut c, "u", r#"options => '{"max_attempts": 1}'"#, Fault::EmptyAnswer);
    bed.done(job);
    assert!(failures(&mut c, job).iter().all(|f| f.3 == 1));
    assert_eq!(asked(&bed), BTreeMap::from([(1, 5)]));
}

#[test]
fn a_limit_that_the_provider_says_no_row_fits_into_pauses_the_job() {
    let bed = Bed::new("too_large");
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=3);
    let job = always(&bed, &mut c, "t", "", Fault::TooLarge429);
    let p = wait_status(&mut c, job, "paused");
    assert_eq!((p.reason.as_deref(), p.counts()), (Some("quota"), (3, 0, 0, 0, 0, 3)), "{p:?}");
    assert!(p.last_error.as_ref().is_some_and(|e| e.contains("Limit 30000, Requested 34472")), "{p:?}");
    no_faults(&bed);
    run(&mut c, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (3, 3, 0, 0, 0, 0));
}

#[test]
fn a_model_that_gives_no_valid_answer_pauses_the_job_and_fails_the_statement() {
    let bed = Bed::new("no_answers");
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=2_000);
    let job = always(&bed, &mut c, "t", "", Fault::OnlyProse);
    let p = wait_status(&mut c, job, "paused");
    assert_eq!((p.reason.as_deref(), p.counts()), (Some("no_answers"), (2_000, 0, 0, 0, 0, 2_000)), "{p:?}");
    let said = "These tickets are about many things";
    assert!(p.last_error.as_ref().is_some_and(|e| e.contains(said)), "{p:?}");
    let paid = bed.provider.stats().admitted;
    println!("a job of 2,000 rows: {paid} requests");
    assert!(paid <= 20 && p.requests as u64 == paid, "{paid} {p:?}");
    assert!(failures(&mut c, job).is_empty());
    let (state, message, detail, _) = error(&mut c, &format!("CALL llm_batch.wait({job})"));
    assert_eq!((state.as_str(), message.as_str()), ("55000", format!("job {job} is paused (no_answers)").as_str()));
    assert!(detail.contains(said), "{detail}");
    // A statement of the same task.
    bed.provider.reset_stats();
    let batch = "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM t WHERE id <= 40', 'topic')";
    let (state, message, detail, hint) = error(&mut c, batch);
    assert_eq!((state.as_str(), message.as_str()), ("22000", "model \"m\" gives no valid answer to this task"));
    assert!(detail.contains(said) && hint.contains("Ask another model"), "{detail} {hint}");
    let paid = bed.provider.stats().admitted;
    println!("a statement of 40 rows: {paid} requests");
    assert!(paid <= 20, "{paid}");
    // It is mended, and the job is told.
    no_faults(&bed);
    run(&mut c, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (2_000, 2_000, 0, 0, 0, 0));
    all_right(&mut c, "t");
    assert!(failures(&mut c, job).is_empty());
}

#[test]
fn a_row_that_the_server_refuses_is_listed_in_a_job_and_in_a_statement() {
    let bed = Bed::with("rejected", Config { max_row_bytes: Some(2_000), ..Config::default() });
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=100);
    run(&mut c, "UPDATE t SET body = body || repeat('x', 2000) WHERE id = 17");
    let query = "SELECT id, body FROM t WHERE id <= 40";
    let got = statuses(&mut c, query, "{}");
    let bad: Vec<_> = got.iter().filter(|r| r.2 != "ok").collect();
    assert_eq!(bad, [&("17".to_owned(), None, "failed".to_owned(), "rejected".to_owned())]);
    let job = backfill(&mut c, "t");
    assert_eq!(bed.done(job).counts(), (100, 99, 0, 1, 0, 0));
    let listed = failures(&mut c, job);
    assert_eq!((listed[0].0["id"].as_i64(), listed[0].2.as_str()), (Some(17), "rejected"), "{listed:?}");
    assert!(listed[0].4.contains("text exceeds 2000 bytes"), "{listed:?}");
    assert_eq!(wrong(&mut c, "t"), 0);
}

#[test]
fn a_model_that_thinks_before_it_answers() {
    let bed = Bed::with("thinking", Config { thinking_tokens: 3_500, ..Config::default() });
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=2_000);
    let got = statuses(&mut c, "SELECT id, body FROM t WHERE id <= 40", "{}");
    assert!(got.iter().all(|r| r.2 == "ok"), "{got:?}");
    let paid = bed.provider.stats().admitted;
    println!("a statement of 40 rows: {paid} requests");
    assert!(paid <= 5, "{paid}");
    let job = backfill(&mut c, "t");
    bed.provider.reset_stats();
    let p = bed.done(job);
    assert_eq!(p.counts(), (2_000, 2_000, 0, 0, 0, 0));
    all_right(&mut c, "t");
    let paid = bed.provider.stats().admitted;
    println!("a job of 2,000 rows: {paid} requests");
    assert!(paid <= 42, "{paid}");
    let seen = "SELECT thinking_tokens FROM llm_batch.activity";
    assert!((3_300..=3_700).contains(&one(&mut c, seen)));
}

#[test]
fn a_server_that_is_down_is_probed_and_all_goes_on_by_itself() {
    let bed = Bed::new("down");
    let mut c = bed.connect();
    model(&mut c, "n", "max_concurrent_requests => 2");
    classifier(&mut c, "topic_n", &labels_json(&LABELS), "n", r#"{"max_rows_per_request": 5}"#);
    tickets(&mut c, "t", 1..=50);
    tickets(&mut c, "u", 101..=150);
    run(&mut c, "BEGIN");
    let job = backfill(&mut c, "t");
    let other = one(&mut c, "SELECT llm_batch.backfill('u', input => 'body', target => 'topic', task => 'topic_n')");
    bed.provider.reset_stats();
    bed.provider.configure(|config| config.faults = vec![(Fault::ResetBefore, 0.5), (Fault::Http503, 0.5)]);
    run(&mut c, "COMMIT");
    for job in [job, other] {
        let p = wait_status(&mut c, job, "paused");
        assert_eq!((p.reason.as_deref(), p.counts()), (Some("provider_down"), (50, 0, 0, 0, 0, 50)));
    }
    let sent = bed.provider.stats().requests;
    assert!(sent <= 16, "{sent} requests to a server that is down");
    let seen =
        "SELECT count(*) FROM llm_batch.activity WHERE breaker = 'open' AND waiting_until < now() + interval '31 s'
                   AND last_error IS NOT NULL";
    wait_until("the circuit is open", PATIENCE, || one(&mut c, seen), |n| *n >= 1);
    // A statement does not wait for what is known.
    let (state, message, detail, _) = error(&mut c, "SELECT llm_classify('#r1:bug#', 'topic')");
    assert_eq!((state.as_str(), message.contains("does not answer")), ("08006", true), "{message} {detail}");

    no_faults(&bed);
    for (job, table) in [(job, "t"), (other, "u")] {
        run(&mut c, &format!("CALL llm_batch.wait({job}, '120 s')"));
        assert_eq!(progress(&mut c, job).counts(), (50, 50, 0, 0, 0, 0));
        all_right(&mut c, table);
    }
    assert_eq!(asked(&bed), BTreeMap::from([(1, 100)]));
    assert_eq!(one(&mut c, "SELECT count(*) FROM llm_batch.activity WHERE breaker <> 'closed'"), 0);
}

#[test]
fn a_row_that_breaks_the_server_is_listed_and_its_job_is_done() {
    let bed = Bed::new("poison");
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=3);
    run(&mut c, "UPDATE t SET body = body || ' rotten' WHERE id = 2");
    run(&mut c, "BEGIN");
    let job = backfill(&mut c, "t");
    bed.provider.configure(|config| config.poison = Some("rotten".to_owned()));
    run(&mut c, "COMMIT");
    assert_eq!(bed.done(job).counts(), (3, 2, 0, 1, 0, 0));
    let listed = failures(&mut c, job);
    assert_eq!((listed[0].1.as_str(), listed[0].2.as_str()), ("failed", "provider_error"), "{listed:?}");
}

#[test]
fn the_key_does_not_follow_a_redirect() {
    let bed = Bed::new("redirect");
    let thief = FakeProvider::start(Config::default()).unwrap();
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=10);
    let target = format!("{}/chat/completions", thief.base_url());
    let job = always(&bed, &mut c, "t", "", Fault::Redirect(target));
    let p = wait_status(&mut bed.connect(), job, "failed");
    assert!(p.last_error.as_ref().is_some_and(|e| e.contains("302")), "{p:?}");
    assert_eq!(p.counts(), (10, 0, 0, 0, 0, 10));
    assert_eq!(left(&mut c, "t"), 10);
    assert_eq!(thief.stats().requests, 0);
    let stats = bed.provider.stats();
    assert_eq!(stats.requests, 1, "{stats:?} {:#?}", bed.provider.bodies());
}

#[test]
fn money_that_is_gone_pauses_the_job_until_it_is_resumed() {
    let bed = Bed::new("spend");
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=100);
    let job = always(&bed, &mut c, "t", "", Fault::SpendLimit429);
    let p = wait_status(&mut c, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("spend"));
    assert_eq!(p.counts(), (100, 0, 0, 0, 0, 100));
    assert!(p.last_error.is_some());
    let (state, message, detail, _) = error(&mut c, &format!("CALL llm_batch.wait({job})"));
    assert_eq!((state.as_str(), message.as_str()), ("55000", format!("job {job} is paused (spend)").as_str()));
    assert!(detail.contains("quota"), "{detail}");
    no_faults(&bed);
    run(&mut c, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    all_right(&mut c, "t");
    assert_eq!(asked(&bed), BTreeMap::from([(1, 100)]));
}

/// id, label, status and the class in the detail of a statement's rows, by id.
fn statuses(c: &mut Client, query: &str, options: &str) -> Vec<(String, Option<String>, String, String)> {
    c.query(
        "SELECT id, label, status, coalesce(split_part(detail, ':', 1), '')
           FROM llm_classify_batch($1, 'topic', $2::text::jsonb) ORDER BY id",
        &[&query, &options],
    )
    .unwrap_or_else(|e| panic!("{query}: {e:?}"))
    .iter()
    .map(|r| (r.get::<_, Option<String>>(0).unwrap_or_default(), r.get(1), r.get(2), r.get(3)))
    .collect()
}

#[test]
fn a_bad_row_never_fails_a_statement() {
    let bed = Bed::new("statement");
    let mut c = bed.connect();
    proven(&bed, &mut c);
    tickets(&mut c, "t", 1..=200);
    let query = "SELECT id, body FROM t";
    for (fault, status, class) in [
        (Fault::DropId, "skipped", "no_answer"),
        (Fault::UnknownCode, "failed", "unknown_code"),
        (Fault::Refusal, "skipped", "refused"),
    ] {
        bed.provider.configure(|config| config.faults = vec![(fault.clone(), 1.0)]);
        let got = statuses(&mut c, "SELECT id, body FROM t WHERE id <= 3", r#"{"max_rows_per_request": 1}"#);
        assert_eq!(got.len(), 3);
        for (id, label, s, cl) in got {
            assert_eq!((label, s.as_str(), cl.as_str()), (None, status, class), "{fault} {id}");
        }
        let text = text(&mut c, "SELECT coalesce(llm_classify(body, 'topic'), 'none') FROM t WHERE id = 9");
        assert_eq!(text, "none", "{fault}");
    }
    no_faults(&bed);
    bed.provider.reset_stats();
    bed.provider.script([
        Some(Fault::MalformedJson),
        Some(Fault::Http500),
        Some(Fault::DropId),
        Some(Fault::ResetAfter),
    ]);
    let got = statuses(&mut c, query, "{}");
    assert_eq!(got.len(), 200);
    assert!(got.iter().all(|(_, label, s, _)| s == "ok" && label.is_some()));
    assert_eq!(bed.provider.stats().faults.len(), 4);

    // A row without text is not sent, and has an answer nevertheless; ids come back as they are.
    bed.provider.reset_stats();
    let got = statuses(
        &mut c,
        "VALUES ('a', NULL), ('b', ''), ('c', '#r000001:bug#'), (NULL, '#r000002:spam#'), ('c', '#r000003:bug#')",
        "{}",
    );
    assert_eq!(got.iter().filter(|r| r.0 == "c" && r.1.as_deref() == Some("bug")).count(), 2);
    assert_eq!(got.iter().filter(|r| r.2 == "skipped").map(|r| r.0.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(bed.provider.stats().rows.len(), 3);
}
