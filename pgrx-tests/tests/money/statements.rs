//! Statements keep their budgets.

use std::time::Duration;

use pg_llm_batch_e2e::wait_until;
use postgres::Client;

use super::{bed, bill, holds, tokens, used_up};
use crate::common::{LABELS, PATIENCE, classifier, labels_json, one, run, slow};

#[test]
fn statements_keep_their_budgets() {
    let (bed, mut c) = bed("money_statement", slow(5), 1_000);
    classifier(&mut c, "single", &labels_json(&LABELS), "m", "{\"reuse\": false, \"max_rows_per_request\": 20}");
    let batch = |options: &str| {
        format!("SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'single', '{options}')")
    };
    let scalar = "SELECT count(llm_classify(body, 'single')) FROM tickets";
    let paid = |c: &mut Client, sql: &str, max: &str, least: &str| {
        bed.provider.reset_stats();
        used_up(c, sql);
        // A request that was under way when the error was raised is abandoned, and may be paid.
        std::thread::sleep(Duration::from_millis(100));
        let paid = bill(&bed, c);
        holds(c, &format!("{paid} <= {max} AND {paid} >= {least}"));
    };
    paid(&mut c, &batch("{\"max_cost\": 0.002}"), "0.002", "0.001");
    paid(&mut c, &batch("{\"max_cost\": 0.000001}"), "0.000001", "0");
    run(&mut c, "SET llm_batch.statement_max_cost = 0.002");
    paid(&mut c, &batch("{}"), "0.002", "0.001");
    // The smaller one holds, and calls of a statement share it, row by row.
    paid(&mut c, &batch("{\"max_cost\": 5}"), "0.002", "0.001");
    paid(&mut c, scalar, "0.002", "0.001");
    paid(&mut c, &format!("DO $$ BEGIN PERFORM ({}); PERFORM ({scalar}); END $$", batch("{}")), "0.002", "0.001");
    // Each statement has it anew.
    for _ in 0..3 {
        assert_eq!(one(&mut c, "SELECT count(llm_classify(body, 'single')) FROM tickets WHERE id <= 5"), 5);
    }
    // An error that is caught in the middle does not make it larger.
    let caught = format!(
        "DO $$ BEGIN FOR i IN 1..20 LOOP
             BEGIN PERFORM ({}); EXCEPTION WHEN configuration_limit_exceeded THEN END;
             BEGIN PERFORM ({}); EXCEPTION WHEN configuration_limit_exceeded THEN END;
         END LOOP; PERFORM ({scalar}); END $$",
        batch("{\"max_cost\": 0.0005}"),
        batch("{\"max_tokens\": 3000}"),
    );
    paid(&mut c, &caught, "0.002", "0.0005");
    run(&mut c, "SET llm_batch.statement_max_cost = 0");
    paid(&mut c, scalar, "0", "0");
    assert_eq!(bed.provider.stats().requests, 0);
    run(&mut c, "RESET llm_batch.statement_max_cost");

    bed.provider.reset_stats();
    let detail = used_up(&mut c, &batch("{\"max_tokens\": 10000}"));
    assert!(detail.contains("of 10000 tokens"), "{detail}");
    std::thread::sleep(Duration::from_millis(100));
    assert!((5_000..=10_000).contains(&tokens(&bed)), "{}", tokens(&bed));
    assert_eq!(one(&mut c, &batch("{\"max_tokens\": 10000000, \"max_cost\": 10}")), 1_000);
    // Labels alone, with options.
    run(&mut c, "SET llm_batch.default_model = 'm'");
    let labels = "ARRAY['billing', 'bug'], '{\"max_tokens\": 1}'";
    used_up(&mut c, &format!("SELECT llm_classify('is it broken?', {labels})"));
    used_up(&mut c, &format!("SELECT * FROM llm_classify_batch('SELECT 1, 2', {labels})"));
}

#[test]
fn a_statement_keeps_its_budget_when_the_gateway_ends() {
    let (bed, mut c) = bed("money_statement_lost", slow(50), 1_000);
    let other = &mut bed.connect();
    // A request that may have been under way counts: the first has enough nevertheless, the second has not.
    for (max_tokens, is_enough) in [(200_000, true), (25_000, false)] {
        bed.provider.reset_stats();
        let sql = format!(
            "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic',
                 '{{\"max_rows_per_request\": 20, \"max_tokens\": {max_tokens}}}')"
        );
        std::thread::scope(|scope| {
            let statement = scope.spawn(|| {
                if is_enough {
                    assert_eq!(one(&mut c, &sql), 1_000);
                } else {
                    used_up(&mut c, &sql);
                }
            });
            wait_until("it has begun", PATIENCE, || bed.provider.stats().admitted, |n| *n >= 10);
            run(
                other,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'llm_batch gateway'",
            );
            statement.join().unwrap();
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(tokens(&bed) <= max_tokens, "{}", tokens(&bed));
    }
}
