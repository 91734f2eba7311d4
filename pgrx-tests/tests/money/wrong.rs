//! Budgets that make no sense.

use llm_fake_provider::Config;

use super::bed;
use crate::common::{LABELS, backfill, backfill_with, classifier, error, labels_json, model, run, text, wait_status};

#[test]
fn budgets_that_make_no_sense_cost_nothing() {
    let (bed, mut c) = bed("money_refused", Config::default(), 100);
    model(&mut c, "free", "input_price => 0.15");
    classifier(&mut c, "free", &labels_json(&LABELS), "free", "{}");
    let call = |task: &str, more: &str| {
        format!("SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => '{task}', {more})")
    };
    let batch = |task: &str, options: &str| {
        format!("SELECT llm_classify_batch('SELECT id, body FROM tickets', '{task}', '{options}')")
    };
    let job = backfill_with(&mut c, "tickets", "filter => 'id < 0'");
    wait_status(&mut c, job, "done");
    run(&mut c, "BEGIN");
    let paused = backfill(&mut c, "tickets");
    run(&mut c, &format!("SELECT llm_batch.pause({paused}); COMMIT"));
    let alter = |job: i64, more: &str| format!("SELECT llm_batch.alter_job({job}, {more})");
    bed.provider.reset_stats();
    for (sql, code, says) in [
        (call("topic", "max_cost => 0"), "22023", "max_cost"),
        (call("topic", "max_cost => -1"), "22023", "max_cost"),
        (call("topic", "max_cost => 'NaN'"), "22023", "max_cost"),
        (call("topic", "max_tokens => 0"), "22023", "max_tokens"),
        (call("free", "max_cost => 1"), "55000", "alter_model"),
        (call("topic", "options => '{\"max_cost\": 1}'"), "22023", "argument"),
        (alter(paused, "max_cost => 0"), "22023", "max_cost"),
        (alter(paused, "max_tokens => -5"), "22023", "max_tokens"),
        (alter(job, "max_cost => 5"), "55000", "backfill"),
        (alter(4711, "max_cost => 5"), "42704", "progress"),
        ("SELECT llm_batch.alter_job(NULL)".to_owned(), "22004", ""),
        (batch("topic", "{\"max_cost\": 0}"), "22023", "max_cost"),
        (batch("topic", "{\"max_cost\": \"1\"}"), "22023", "max_cost"),
        (batch("topic", "{\"max_tokens\": 1.5}"), "22023", "max_tokens"),
        (batch("topic", "{\"max_price\": 1}"), "22023", "max_price"),
        (batch("free", "{\"max_cost\": 1}"), "55000", "alter_model"),
        (
            "SELECT llm_batch.alter_classifier('topic', options => '{\"max_tokens\": 1}')".to_owned(),
            "22023",
            "argument",
        ),
        ("SET llm_batch.statement_max_cost = -2".to_owned(), "22023", "statement_max_cost"),
        (
            "SET llm_batch.statement_max_cost = 5; SELECT llm_classify(body, 'free') FROM tickets".to_owned(),
            "55000",
            "no prices",
        ),
    ] {
        let (found, message, detail, hint) = error(&mut c, &sql);
        assert_eq!(found, code, "{sql}: {message}");
        assert!(format!("{message} {detail} {hint}").contains(says), "{sql}: {message} {detail} {hint}");
    }
    run(&mut c, "RESET llm_batch.statement_max_cost");
    let stats = bed.provider.stats();
    assert_eq!((stats.requests, stats.rows.len()), (0, 0));
    // A role that may not control a job may not give it money either.
    run(&mut c, "CREATE ROLE other; SET ROLE other");
    assert_eq!(error(&mut c, &alter(paused, "max_cost => 5")).0, "42501");
    run(&mut c, "RESET ROLE");
    run(&mut c, &alter(paused, "max_cost => 5.50"));
    assert_eq!(text(&mut c, &format!("SELECT max_cost FROM llm_batch.progress WHERE job_id = {paused}")), "5.50");
}
