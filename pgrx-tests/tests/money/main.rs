//! Costs: the accounts are exact, budgets hold by the provider's own count, also when something dies, and the cost of a
//! job is known before.

#[path = "../common/mod.rs"]
mod common;

mod budgets;
mod costs;
mod estimates;
mod statements;
mod wrong;

use common::{Bed, PATIENCE, error, progress, run, text, tickets, warm};
use llm_fake_provider::Config;
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

const INPUT_PRICE: &str = "0.1234567";
const OUTPUT_PRICE: &str = "0.7654321";

/// A cluster whose model has odd prices and has answered a probe, which counts for nobody.
#[track_caller]
fn bed(name: &str, config: Config, rows: i64) -> (Bed, Client) {
    let bed = Bed::with(name, config);
    let mut client = bed.connect();
    let prices = format!("input_price => {INPUT_PRICE}, output_price => {OUTPUT_PRICE}");
    run(&mut client, &format!("SELECT llm_batch.alter_model('m', max_concurrent_requests => 2, {prices})"));
    tickets(&mut client, "tickets", 1..=rows);
    warm(&mut client, "tickets");
    bed.provider.reset_stats();
    (bed, client)
}

/// The provider's charges, as SQL writes them.
fn bill(bed: &Bed, client: &mut Client) -> String {
    let stats = bed.provider.stats();
    text(
        client,
        &format!(
            "SELECT trim_scale(({} * {INPUT_PRICE} + {} * {OUTPUT_PRICE}) * 0.000001)",
            stats.prompt_tokens, stats.completion_tokens
        ),
    )
}

fn tokens(bed: &Bed) -> i64 {
    let stats = bed.provider.stats();
    (stats.prompt_tokens + stats.completion_tokens) as i64
}

/// Asserts a condition in SQL.
#[track_caller]
fn holds(client: &mut Client, condition: &str) {
    assert_eq!(text(client, &format!("SELECT {condition}")), "t", "{condition}");
}

/// The budget in a job's row: cost, unconfirmed, reserved; tokens, unconfirmed, reserved.
fn account(client: &mut Client, job: i64) -> String {
    text(
        client,
        &format!(
            "SELECT format('cost %s + %s + %s of %s, tokens %s + %s + %s of %s', cost, cost_unconfirmed, cost_reserved,
                    max_cost, input_tokens + output_tokens, tokens_unconfirmed, tokens_reserved, max_tokens)
               FROM llm_batch.job_state s JOIN llm_batch.job j ON j.id = s.job_id WHERE j.id = {job}"
        ),
    )
}

/// At this moment a job's budget is kept, by its own account.
#[track_caller]
fn within(client: &mut Client, job: i64) {
    let kept = text(
        client,
        &format!(
            "SELECT coalesce(cost + cost_unconfirmed + cost_reserved <= max_cost, true)
                    AND coalesce(input_tokens + output_tokens + tokens_unconfirmed + tokens_reserved <= max_tokens, true)
               FROM llm_batch.job_state s JOIN llm_batch.job j ON j.id = s.job_id WHERE j.id = {job}"
        ),
    );
    assert_eq!(kept, "t", "{}", account(client, job));
}

/// Waits until a job is paused for its budget, which is kept at every look; what it has settled then.
#[track_caller]
fn paused_by_budget(client: &mut Client, job: i64) -> common::Progress {
    let p = wait_until(
        "the budget is exhausted",
        PATIENCE,
        || {
            within(client, job);
            progress(client, job)
        },
        |p| p.status != "running",
    );
    assert_eq!((p.status.as_str(), p.reason.as_deref()), ("paused", Some("budget")), "{p:?}");
    assert!(p.last_error.as_deref().unwrap_or_default().contains("budget"), "{p:?}");
    p
}

/// 53400, in words that help.
#[track_caller]
fn used_up(client: &mut Client, sql: &str) -> String {
    let (code, message, detail, hint) = error(client, sql);
    assert_eq!(code, "53400", "{sql}: {message} {detail}");
    assert!(message.contains("budget of the statement"), "{message}");
    assert!(detail.contains("answered rows") && hint.contains("llm_batch.backfill()"), "{detail} {hint}");
    detail
}
