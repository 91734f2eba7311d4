//! Jobs keep their budgets.

use llm_fake_provider::{Config, Fault};
use pg_llm_batch_e2e::wait_until;

use super::{account, bed, bill, holds, paused_by_budget, tokens, within};
use crate::common::{PATIENCE, backfill_with, error, left, one, progress, run, slow, text, wait_status, wrong};

#[test]
fn max_cost_is_never_passed_and_can_be_raised() {
    let (bed, mut c) = bed("money_cost", slow(10), 2_000);
    // Less than a request, a few requests, a good part of all.
    for (max_cost, share) in [("0.000001", "0"), ("0.002", "0.5"), ("0.006", "0.8")] {
        bed.provider.reset_stats();
        run(&mut c, "UPDATE tickets SET topic = NULL WHERE topic IS NOT NULL");
        let more = format!("max_cost => {max_cost}, options => '{{\"max_rows_per_request\": 20, \"reuse\": false}}'");
        let job = backfill_with(&mut c, "tickets", &more);
        let p = paused_by_budget(&mut c, job);
        let paid = bill(&bed, &mut c);
        assert_eq!(p.cost, paid, "{}", account(&mut c, job));
        holds(&mut c, &format!("{paid} <= {max_cost} AND {paid} >= {max_cost} * {share}"));
        let unsettled = "SELECT count(*) FROM llm_batch.job_state WHERE cost_reserved > 0 OR cost_unconfirmed > 0";
        assert_eq!(one(&mut c, unsettled), 0, "{}", account(&mut c, job));
        assert!(p.left > 0 && p.done == 2_000 - left(&mut c, "tickets"), "{p:?}");
        // resume() alone does not help: what was left is not enough for a row.
        run(&mut c, &format!("SELECT llm_batch.resume({job})"));
        paused_by_budget(&mut c, job);
        let (code, message, detail, hint) = error(&mut c, &format!("CALL llm_batch.wait({job})"));
        assert_eq!(code, "55000");
        assert!(message.contains("paused (budget)") && detail.contains("budget"), "{message} {detail}");
        assert!(hint.contains("alter_job") && hint.contains("resume"), "{hint}");
        let paid = bill(&bed, &mut c);
        holds(&mut c, &format!("{paid} <= {max_cost}"));
        run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_cost => 100), llm_batch.resume({job})"));
        let p = wait_status(&mut c, job, "done");
        assert_eq!(p.counts(), (2_000, 2_000, 0, 0, 0, 0));
        assert_eq!(p.cost, bill(&bed, &mut c));
        assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1));
        assert_eq!((wrong(&mut c, "tickets"), one(&mut c, unsettled)), (0, 0));
    }
}

#[test]
fn max_tokens_is_never_passed() {
    let faults = vec![(Fault::DropId, 0.2)];
    let (bed, mut c) = bed("money_tokens", Config { faults, ..slow(10) }, 2_000);
    // No prices are needed for it.
    run(&mut c, "SELECT llm_batch.alter_model('m', reset => '{input_price,output_price}')");
    let more = "max_tokens => 30000, options => '{\"max_rows_per_request\": 20}'";
    let job = backfill_with(&mut c, "tickets", more);
    let p = paused_by_budget(&mut c, job);
    assert_eq!(p.input_tokens + p.output_tokens, tokens(&bed));
    assert!((25_000..=30_000).contains(&tokens(&bed)), "{}", tokens(&bed));
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 50000), llm_batch.resume({job})"));
    paused_by_budget(&mut c, job);
    assert!((40_000..=50_000).contains(&tokens(&bed)), "{}", tokens(&bed));
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1000000000), llm_batch.resume({job})"));
    assert_eq!(wait_status(&mut c, job, "done").left, 0);
}

#[test]
fn a_budget_is_changed_in_the_middle() {
    let (bed, mut c) = bed("money_change", slow(200), 2_000);
    let job = backfill_with(&mut c, "tickets", "options => '{\"max_rows_per_request\": 20}'");
    wait_until("it runs", PATIENCE, || bed.provider.stats().admitted, |n| *n >= 5);
    // Given a budget, it keeps it: only what is under way goes beyond what was spent.
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1)"));
    let p = wait_status(&mut c, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("budget"), "{p:?}");
    let stats = bed.provider.stats();
    assert!(stats.admitted < 20, "{stats:?}");
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 100000000), llm_batch.resume({job})"));
    wait_until("it runs", PATIENCE, || bed.provider.stats().admitted, |n| *n >= stats.admitted + 5);
    // A pause in an orderly way leaves nothing in doubt.
    run(&mut c, &format!("SELECT llm_batch.pause({job})"));
    let doubt = format!("SELECT tokens_unconfirmed + tokens_reserved FROM llm_batch.job_state WHERE job_id = {job}");
    wait_until("all is settled", PATIENCE, || one(&mut c, &doubt), |n| *n == 0);
    run(&mut c, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(wait_status(&mut c, job, "done").counts(), (2_000, 2_000, 0, 0, 0, 0));
    assert_eq!(one(&mut c, &doubt), 0);
    assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1));
}

#[test]
fn a_budget_holds_when_the_server_is_killed() {
    let (mut bed, mut c) = bed("money_killed", slow(50), 2_000);
    let more = "max_cost => 0.008, options => '{\"max_rows_per_request\": 20, \"reuse\": false}'";
    // Held, so that the budget is not used up before the server is killed.
    bed.provider.hold_after(12);
    let job = backfill_with(&mut c, "tickets", more);
    let mut lost = "0".to_owned();
    for part in [200, 500] {
        wait_until("a part is done", PATIENCE, || progress(&mut c, job).done, |n| *n >= part);
        within(&mut c, job);
        bed.cluster.kill9();
        bed.provider.hold_after(20);
        bed.cluster.start();
        c = bed.connect();
        let unconfirmed = wait_until(
            "what may have been spent is counted",
            PATIENCE,
            || {
                within(&mut c, job);
                text(&mut c, "SELECT cost_unconfirmed FROM llm_batch.progress")
            },
            |now| *now != lost,
        );
        holds(&mut c, &format!("{unconfirmed} > {lost}"));
        lost = unconfirmed;
    }
    bed.provider.release();
    let p = paused_by_budget(&mut c, job);
    let paid = bill(&bed, &mut c);
    // The provider's bill is within what is known and what may have been spent.
    holds(&mut c, &format!("{} <= {paid} AND {paid} <= {} + {lost} AND {paid} <= 0.008", p.cost, p.cost));
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_cost => 1), llm_batch.resume({job})"));
    assert_eq!(wait_status(&mut c, job, "done").left, 0);
    assert_eq!(wrong(&mut c, "tickets"), 0);
}

#[test]
fn a_budget_holds_when_the_gateway_or_the_worker_ends() {
    let (bed, mut c) = bed("money_ended", slow(50), 2_000);
    let more = "max_tokens => 40000, options => '{\"max_rows_per_request\": 20, \"reuse\": false}'";
    bed.provider.hold_after(8);
    let job = backfill_with(&mut c, "tickets", more);
    for (kind, part) in [("llm_batch gateway", 100), ("llm_batch job", 200)] {
        wait_until("a part is done", PATIENCE, || progress(&mut c, job).done, |n| *n >= part);
        let unconfirmed = "SELECT tokens_unconfirmed FROM llm_batch.job_state";
        let before = one(&mut c, unconfirmed);
        run(
            &mut c,
            &format!("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE backend_type = '{kind}'"),
        );
        wait_until("what may have been spent is counted", PATIENCE, || one(&mut c, unconfirmed), |n| *n > before);
        within(&mut c, job);
        bed.provider.hold_after(10);
    }
    bed.provider.release();
    paused_by_budget(&mut c, job);
    assert!(tokens(&bed) <= 40_000, "{}", tokens(&bed));
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1000000), llm_batch.resume({job})"));
    assert_eq!(wait_status(&mut c, job, "done").left, 0);
}
