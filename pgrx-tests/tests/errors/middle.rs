//! Jobs that break in the middle, or are controlled in a wrong way.

use llm_fake_provider::{Config, Fault};
use pg_llm_batch_e2e::wait_until;

use super::{KEY, refused};
use crate::common::{
    self, Bed, PATIENCE, all_right_once, backfill, error, held_job, one, progress, run, text, tickets, warm,
};

#[test]
fn waiting_and_controlling() {
    let bed = Bed::new("errors_wait");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    for verb in ["pause", "resume", "cancel", "retry_failed"] {
        refused(client, &format!("SELECT llm_batch.{verb}(99)"), "42704", &["job 99", "llm_batch.progress"]);
    }
    refused(client, "CALL llm_batch.wait(99)", "42704", &["job 99", "llm_batch.progress"]);
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("the rows are counted", PATIENCE, || progress(client, job).total, |n| *n == 20);
    refused(client, &format!("CALL llm_batch.wait({job}, '100 ms')"), "57014", &["not done", "20 rows are left"]);
    let (code, ..) = error(client, &format!("BEGIN; CALL llm_batch.wait({job})"));
    assert_eq!(code, "25001");
    run(client, "ROLLBACK");
    let (code, ..) = error(client, &format!("DO $$ BEGIN PERFORM 1; EXECUTE 'CALL llm_batch.wait({job})'; END $$"));
    assert_eq!(code, "2D000");
    refused(client, "SELECT llm_batch.drop_task('topic')", "55006", &["topic", &format!("job {job}"), "cancel"]);
    run(client, &format!("SELECT llm_batch.pause({job})"));
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["paused (user)", "resume"]);
    assert_eq!(text(client, &format!("SELECT llm_batch.pause({job})")), "f");
    refused(client, "SELECT llm_batch.drop_task('topic')", "55006", &[&format!("job {job}")]);
    // A call that waits for another session's cancel does not take its place.
    run(client, &format!("SELECT llm_batch.resume({job})"));
    run(client, &format!("BEGIN; SELECT llm_batch.cancel({job})"));
    let mut other = bed.connect();
    let pid = one(&mut other, "SELECT pg_backend_pid()::bigint");
    let pause = std::thread::spawn(move || error(&mut other, &format!("SELECT llm_batch.pause({job})")));
    let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
    wait_until("pause() waits", PATIENCE, || one(client, &waits), |n| *n == 1);
    run(client, "COMMIT");
    let (code, message, ..) = pause.join().unwrap();
    assert!(code == "55000" && message.contains("is cancelled"), "{code} {message}");
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["cancelled", "backfill"]);
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "f");
    for verb in ["pause", "resume", "retry_failed"] {
        refused(client, &format!("SELECT llm_batch.{verb}({job})"), "55000", &["is cancelled", "backfill"]);
    }
    bed.provider.release();
    // A failed one.
    let table = "broken";
    tickets(client, table, 1001..=1010);
    bed.provider.hold();
    let job = backfill(client, table);
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n == 10);
    run(client, &format!("ALTER TABLE {table} DROP COLUMN topic"));
    bed.provider.release();
    common::wait_status(client, job, "failed");
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["is failed", "topic", "backfill"]);
    for verb in ["pause", "resume", "retry_failed"] {
        refused(client, &format!("SELECT llm_batch.{verb}({job})"), "55000", &["is failed"]);
    }
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "f");
    assert_eq!(progress(client, job).status, "failed");
    // A done one.
    tickets(client, "fine", 2001..=2010);
    let job = backfill(client, "fine");
    run(client, &format!("CALL llm_batch.wait({job})"));
    run(client, &format!("CALL llm_batch.wait({job}, '1 ms')"));
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "f");
    assert_eq!(text(client, &format!("SELECT llm_batch.retry_failed({job})")), "f");
    for verb in ["pause", "resume"] {
        refused(client, &format!("SELECT llm_batch.{verb}({job})"), "55000", &["is done"]);
    }
    run(client, "SELECT llm_batch.drop_task('topic')");
    run(client, "SELECT llm_batch.drop_model('m')");
}

#[test]
fn a_key_that_is_revoked_in_the_middle() {
    let bed = Bed::with("errors_auth", Config { api_key: Some(KEY.to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.api_key = Some("sk-new-0123456789".to_owned()));
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("auth"), "{p:?}");
    let last = p.last_error.unwrap();
    assert!(last.contains("rejected the API key") && last.contains("401"), "{last}");
    // Rows that were sent before were answered and are written.
    wait_until("what was in flight is written", PATIENCE, || progress(client, job).done, |n| *n == 10);
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["paused (auth)", "401", "resume"]);
    // Resumed without mending, it pauses again.
    let before = bed.provider.stats().requests;
    assert_eq!(text(client, &format!("SELECT llm_batch.resume({job})")), "t");
    wait_until("it asked again", PATIENCE, || bed.provider.stats().requests, |n| *n > before);
    common::wait_status(client, job, "paused");
    run(client, "ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key 'sk-new-0123456789')");
    run(client, &format!("SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 100);
    assert!(!bed.cluster.log().contains("sk-new-0123456789"));
}

#[test]
fn money_that_is_gone_in_the_middle() {
    let bed = Bed::new("errors_spend");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.faults = vec![(Fault::SpendLimit429, 1.0)]);
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("spend"), "{p:?}");
    let last = p.last_error.unwrap();
    assert!(last.contains("out of credit") && last.contains("quota"), "{last}");
    refused(client, &format!("CALL llm_batch.wait({job})"), "55000", &["paused (spend)", "resume"]);
    bed.provider.configure(|c| c.faults.clear());
    run(client, &format!("SELECT llm_batch.resume({job})"));
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 100);
}

#[test]
fn a_provider_that_is_down_for_long() {
    let bed = Bed::new("errors_down");
    let client = &mut bed.connect();
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.faults = vec![(Fault::Http503, 0.5), (Fault::ResetBefore, 0.5)]);
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("provider_down"), "{p:?}");
    assert!(p.last_error.unwrap().contains("does not answer"));
    // wait() waits: this is nothing to be mended by hand.
    refused(client, &format!("CALL llm_batch.wait({job}, '1 s')"), "57014", &["not done"]);
    bed.provider.configure(|c| c.faults.clear());
    run(client, &format!("CALL llm_batch.wait({job}, '90 s')"));
    let p = bed.done(job);
    all_right_once(&bed, client, &p, 100);
}

#[test]
fn requests_that_are_refused() {
    let bed = Bed::new("errors_rejected");
    let client = &mut bed.connect();
    // The probe passes, the first request does not.
    bed.provider.script([None]);
    bed.provider.configure(|c| {
        c.faults = vec![(Fault::Status(400, r#"{"error": {"message": "temperature is odd"}}"#.to_owned()), 1.0)];
    });
    tickets(client, "first", 1..=100);
    let job = backfill(client, "first");
    let p = common::wait_status(client, job, "failed");
    let last = p.last_error.unwrap();
    assert!(last.contains("400") && last.contains("temperature is odd"), "{last}");
    assert_eq!(p.reason, None);
    assert!(bed.provider.stats().rows.is_empty());
    assert_eq!(common::left(client, "first"), 100);
    // The model goes away in the middle.
    bed.provider.configure(|c| c.faults.clear());
    let job = held_job(&bed, client, 100, 2);
    bed.provider.configure(|c| c.models = Some(vec!["another".to_owned()]));
    bed.provider.release();
    let p = common::wait_status(client, job, "paused");
    let last = p.last_error.clone().unwrap();
    assert!(last.contains("404") && last.contains("does not exist"), "{last}");
    assert_eq!(
        (p.reason.as_deref(), p.done, p.left),
        (Some("provider_down"), 10, 90),
        "what was answered is written: {p:?}"
    );
    // It comes back, and the job goes on by itself.
    bed.provider.configure(|c| c.models = None);
    let p = bed.done(job);
    assert_eq!(p.counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert!(bed.provider.stats().rows.values().all(|r| r.asked == 1));
}
