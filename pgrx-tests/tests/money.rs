//! Costs: the accounts are exact, budgets hold by the provider's own count, also when something dies, and the cost of a
//! job is known before.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{
    Bed, LABELS, PATIENCE, backfill, backfill_with, classifier, error, labels_json, left, model, one, progress, run,
    slow, text, tickets, wait_status, warm, wrong,
};
use llm_fake_provider::{Config, Fault, kinds};
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

#[test]
fn the_cost_is_the_bill() {
    // Incomplete answers and refused requests: what was paid for nothing counts, what was not paid does not.
    let faults = vec![(Fault::DropId, 0.2), (Fault::Http503, 0.05)];
    let (bed, mut c) = bed("money_bill", Config { faults, ..Config::default() }, 3_000);
    let job = backfill(&mut c, "tickets");
    let p = wait_status(&mut c, job, "done");
    let stats = bed.provider.stats();
    assert_eq!((p.input_tokens, p.output_tokens), (stats.prompt_tokens as i64, stats.completion_tokens as i64));
    assert_eq!(p.cost, bill(&bed, &mut c));
    assert_eq!(text(&mut c, "SELECT cost_unconfirmed FROM llm_batch.progress"), "0");
    // Prices are those of the moment; a model without any costs nothing.
    run(&mut c, "SELECT llm_batch.alter_model('m', reset => '{input_price,output_price}')");
    run(&mut c, "UPDATE tickets SET topic = NULL WHERE id <= 100");
    let job = backfill(&mut c, "tickets");
    assert_eq!(wait_status(&mut c, job, "done").cost, "0");
}

#[test]
fn cached_tokens_have_a_price_of_their_own() {
    let (bed, mut c) = bed("money_cached", Config { cache_prefix: true, ..slow(10) }, 2_000);
    run(
        &mut c,
        "SELECT llm_batch.alter_classifier('topic', instruction => repeat('These are tickets of a web shop. ', 300),
             options => '{\"max_rows_per_request\": 20, \"reuse\": false}');
         SELECT llm_batch.alter_model('m', cached_input_price => 0.0123)",
    );
    let paid = |c: &mut Client| {
        let s = bed.provider.stats();
        let (full, cached) = (s.prompt_tokens - s.cached_tokens, s.cached_tokens);
        let sum = format!("{full} * {INPUT_PRICE} + {cached} * 0.0123 + {} * {OUTPUT_PRICE}", s.completion_tokens);
        text(c, &format!("SELECT trim_scale(({sum}) * 0.000001)"))
    };
    // The budget is for what is paid, although each request is reckoned with at the full price.
    let job = backfill_with(&mut c, "tickets", "max_cost => 0.006");
    let p = paused_by_budget(&mut c, job);
    assert_eq!(p.cost, paid(&mut c));
    holds(&mut c, &format!("{} BETWEEN 0.0048 AND 0.006", p.cost));
    run(&mut c, &format!("SELECT llm_batch.alter_job({job}, max_cost => 100), llm_batch.resume({job})"));
    let p = wait_status(&mut c, job, "done");
    assert_eq!(p.cost, paid(&mut c));
    let cached = one(&mut c, "SELECT cached_input_tokens FROM llm_batch.progress");
    assert_eq!(cached, bed.provider.stats().cached_tokens as i64);
    assert!(cached * 10 > p.input_tokens * 8, "{cached} of {}", p.input_tokens);
    // Likewise a statement's.
    bed.provider.reset_stats();
    run(&mut c, "SET llm_batch.statement_max_cost = 0.004");
    used_up(&mut c, "SELECT count(*) FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic')");
    std::thread::sleep(Duration::from_millis(100));
    let paid = paid(&mut c);
    holds(&mut c, &format!("{paid} BETWEEN 0.003 AND 0.004"));
    written_tokens_are_dearer(&bed, &mut c);
}

/// A token of a prompt that Anthropic writes into its cache costs a quarter more than another.
fn written_tokens_are_dearer(bed: &Bed, c: &mut Client) {
    let url = bed.provider.base_of("anthropic");
    run(
        c,
        &format!(
            "RESET llm_batch.statement_max_cost;
             CREATE SERVER anthropic FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'anthropic', base_url '{url}');
             CREATE USER MAPPING FOR PUBLIC SERVER anthropic OPTIONS (api_key 'sk-test-0123456789');
             SELECT llm_batch.create_model('claude', 'anthropic', 'claude', input_price => 1, output_price => 5, cached_input_price => 0.1);
             SELECT llm_batch.alter_classifier('topic', model => 'claude', instruction => repeat('These are texts of a shop. ', 300));
             UPDATE tickets SET topic = NULL WHERE id <= 100"
        ),
    );
    // The probe of a model is on nobody's account.
    warm(c, "tickets");
    bed.provider.reset_stats();
    let job = backfill_with(c, "tickets", "max_cost => 1");
    let p = wait_status(c, job, "done");
    let s = bed.provider.stats();
    assert!(s.written_tokens > 1_024 && s.cached_tokens > 0, "{s:?}");
    let plain = s.prompt_tokens - s.cached_tokens - s.written_tokens;
    let sum =
        format!("{plain} + {} * 0.1 + {} * 1.25 + {} * 5", s.cached_tokens, s.written_tokens, s.completion_tokens);
    assert_eq!(p.cost, text(c, &format!("SELECT trim_scale(({sum}) * 0.000001)")));
}

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

/// 53400, in words that help.
#[track_caller]
fn used_up(client: &mut Client, sql: &str) -> String {
    let (code, message, detail, hint) = error(client, sql);
    assert_eq!(code, "53400", "{sql}: {message} {detail}");
    assert!(message.contains("budget of the statement"), "{message}");
    assert!(detail.contains("answered rows") && hint.contains("llm_batch.backfill()"), "{detail} {hint}");
    detail
}

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

#[test]
fn prices_come_from_the_list_unless_they_are_given() {
    let (_bed, mut c) = bed("money_list", Config::default(), 1);
    run(
        &mut c,
        "INSERT INTO llm_batch.list_price (provider, model, input_price, cached_input_price, output_price, as_of, is_own)
         VALUES ('127.0.0.1', 'luna', 1, NULL, 2, '2026-01-02', false), ('127.0.0.1', 'luna', 0.5, 0.05, 1.5, '2026-03-04', true),
                ('127.0.0.1', 'sol', 7, NULL, 8, '2026-05-06', true), ('elsewhere.example', 'astra', 9, NULL, 9, now(), true)",
    );
    let prices = |c: &mut Client, name: &str| {
        text(
            c,
            &format!(
                "SELECT concat_ws(' ', coalesce(input_price::text, '-'), coalesce(cached_input_price::text, '-'),
                        coalesce(output_price::text, '-'), coalesce(price_as_of::text, '-'))
                   FROM llm_batch.model WHERE name = '{name}'"
            ),
        )
    };
    let create = |c: &mut Client, model: &str, more: &str| {
        run(c, &format!("SELECT llm_batch.create_model('{model}', 'fake', '{model}'{more})"));
        prices(c, model)
    };
    // A row of one's own goes before the extension's.
    assert_eq!(create(&mut c, "luna", ""), "0.5 0.05 1.5 2026-03-04");
    assert_eq!(create(&mut c, "sol-2026-11-28", ""), "7 - 8 2026-05-06");
    assert_eq!(create(&mut c, "sol@20261128", ""), "7 - 8 2026-05-06");
    // Another host's prices, and those of a name that only begins alike, are no prices of this model.
    assert_eq!(create(&mut c, "astra", ""), "- - - -");
    assert_eq!(create(&mut c, "sol-mini", ""), "- - - -");
    // A price that is given goes before the list's.
    assert_eq!(create(&mut c, "sol", ", input_price => 3"), "3 - 8 -");
    let alter = |c: &mut Client, what: &str| {
        run(c, &format!("SELECT llm_batch.alter_model('luna', {what})"));
        prices(c, "luna")
    };
    assert_eq!(alter(&mut c, "requests_per_minute => 5"), "0.5 0.05 1.5 2026-03-04");
    // The model becomes another one: its prices go with it, or there are none.
    assert_eq!(alter(&mut c, "model => 'sol'"), "7 - 8 2026-05-06");
    assert_eq!(alter(&mut c, "model => 'unknown'"), "- - - -");
    assert_eq!(alter(&mut c, "model => 'luna', reset => '{input_price,output_price}'"), "0.5 0.05 1.5 2026-03-04");
    assert_eq!(alter(&mut c, "model => 'sol', input_price => 6"), "6 - 8 -");
    assert_eq!(alter(&mut c, "model => 'luna', reset => '{input_price,output_price}'"), "0.5 0.05 1.5 2026-03-04");
    // Prices that were given stay.
    assert_eq!(alter(&mut c, "output_price => 4"), "0.5 0.05 4 -");
    assert_eq!(alter(&mut c, "model => 'sol'"), "0.5 0.05 4 -");
}

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

/// The columns of an estimate of numbers: rows, requests, input and output tokens, rows of the sample; and the cost.
#[track_caller]
fn estimate(client: &mut Client, more: &str) -> ([i64; 5], String) {
    let sql = format!(
        "SELECT rows, requests, input_tokens, output_tokens, sample_rows, coalesce(cost::text, '')
           FROM llm_batch.estimate('tickets', input => 'body', target => 'topic', task => 'topic'{more})"
    );
    let row = client.query_one(&sql, &[]).unwrap_or_else(|e| panic!("{sql}\n{e:?}"));
    (std::array::from_fn(|i| row.get(i)), row.get(5))
}

#[track_caller]
fn close(estimated: i64, found: i64, percent: i64, what: &str) {
    assert!((estimated - found).abs() * 100 <= found * percent, "{what}: {estimated} was said, it was {found}");
}

#[test]
fn an_estimate_is_what_the_job_then_takes() {
    let (bed, mut c) = bed("money_estimate", Config::default(), 5_000);
    // Texts of all sizes; some rows have none, some are filled, some are filtered out.
    run(
        &mut c,
        "UPDATE tickets SET body = body || repeat(' and so on', (id % 7 * (id % 11))::int);
         UPDATE tickets SET body = NULL WHERE id % 100 = 1; UPDATE tickets SET body = repeat(' ', (id % 3)::int) WHERE id % 100 = 2;
         UPDATE tickets SET topic = want WHERE id % 100 = 3; ANALYZE tickets",
    );
    let (guess, _) = estimate(&mut c, ", filter => 'id > 500'");
    let stats = bed.provider.stats();
    assert_eq!(stats.requests, 0, "an estimate sent something: {stats:?}");
    // The lengths of answers are known when some have come.
    let some = "SELECT llm_classify_batch('SELECT id, body FROM tickets WHERE id <= 500', 'topic')";
    run(&mut c, some);
    let ([rows, requests, input, output, sample], cost) = estimate(&mut c, ", filter => 'id > 500'");
    assert_eq!((rows, sample), (4_500 - 45 * 3, 1_000));
    let job = backfill_with(&mut c, "tickets", "filter => 'id > 500'");
    let p = wait_status(&mut c, job, "done");
    assert_eq!(p.done, rows);
    close(requests, p.requests, 2, "requests");
    close(input, p.input_tokens, 2, "input");
    close(output, p.output_tokens, 2, "output");
    close(guess[1], p.requests, 2, "requests, as a guess");
    close(guess[2], p.input_tokens, 2, "input, as a guess");
    close(guess[3], p.output_tokens, 30, "output, as a guess");
    holds(&mut c, &format!("abs({cost} - {}) <= 0.02 * {}", p.cost, p.cost));
    holds(&mut c, &format!("{cost} = ({input} * {INPUT_PRICE} + {output} * {OUTPUT_PRICE}) * 0.000001"));
}

/// The same for the other kinds of tasks: what is said before and what is taken then, and the request that is shown.
#[test]
fn estimates_of_every_kind() {
    let (bed, mut c) = bed("money_kinds", Config::default(), 2_000);
    for (_, (task, setup, targets)) in kinds::<(String, String, String)>("estimates").unwrap() {
        run(&mut c, &setup);
        let call =
            |filter: &str| format!("'tickets', input => 'body', {targets}, task => '{task}', filter => '{filter}'");
        // The lengths of answers are known when some have come.
        let job = one(&mut c, &format!("SELECT llm_batch.backfill({})", call("id <= 500")));
        assert_eq!(wait_status(&mut c, job, "done").done, 500, "{task}");
        bed.provider.reset_stats();
        let sql = "SELECT rows, requests, input_tokens, output_tokens, example_request::text FROM";
        let said = c.query_one(&format!("{sql} llm_batch.estimate({})", call("id > 500")), &[]).unwrap();
        assert_eq!(bed.provider.stats().requests, 0, "{task}");
        let job = one(&mut c, &format!("SELECT llm_batch.backfill({})", call("id > 500")));
        let p = wait_status(&mut c, job, "done");
        assert_eq!((said.get::<_, i64>(0), p.done), (1_500, 1_500), "{task}");
        // Pages of the job need not end where requests do.
        let requests: i64 = said.get(1);
        assert!((requests - p.requests).abs() * 20 <= p.requests.max(20), "{task}: {requests} were said: {p:?}");
        close(said.get(2), p.input_tokens, 3, &format!("input of {task}"));
        close(said.get(3), p.output_tokens, 10, &format!("output of {task}"));
        let shown: serde_json::Value = serde_json::from_str(said.get(4)).unwrap();
        let sent = bed.provider.bodies().pop().unwrap();
        // All but the texts, and what depends on them.
        let keys = |of: &serde_json::Value| of.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(keys(&shown), keys(&sent), "{task}");
        for key in ["model", "temperature", "dimensions", "encoding_format", "response_format"] {
            assert_eq!(shown[key], sent[key], "{task}: {key}");
        }
        assert_eq!(shown["messages"][0], sent["messages"][0], "{task}");
    }
}

#[test]
fn estimates_count_the_same_text_once() {
    let (bed, mut c) = bed("money_same", Config::default(), 4_000);
    // 400 texts, one of them a thousand times, others up to ten times.
    run(
        &mut c,
        "UPDATE tickets t SET (body, want) = (SELECT o.body, o.want FROM tickets o
             WHERE o.id = CASE WHEN t.id <= 400 THEN t.id WHEN t.id % 4 = 0 THEN 1 ELSE 1 + (t.id * t.id) % 400 END)",
    );
    let texts = one(&mut c, "SELECT count(DISTINCT body) FROM tickets");
    // As it is unless someone says otherwise.
    run(&mut c, "SELECT llm_batch.alter_classifier('topic', options => '{}')");
    for sample in [300, 1_000] {
        let ([rows, requests, input, _, _], _) = estimate(&mut c, &format!(", sample_rows => {sample}"));
        assert_eq!((rows, requests), (4_000, (texts + 49) / 50));
        let (all, _) = estimate(&mut c, ", options => '{\"reuse\": false}'");
        assert_eq!(all[1], 80);
        assert!(input * 8 < all[2], "{input} {all:?}");
    }
    let job = backfill(&mut c, "tickets");
    let p = wait_status(&mut c, job, "done");
    assert_eq!(p.counts(), (4_000, 4_000, 0, 0, 0, 0));
    let reused = one(&mut c, "SELECT rows_reused FROM llm_batch.progress");
    assert_eq!(reused, 4_000 - texts);
    assert_eq!((wrong(&mut c, "tickets"), bed.provider.stats().rows.len() as i64), (0, texts));
    assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1));
    assert_eq!(p.cost, bill(&bed, &mut c));
}

#[test]
fn estimates_need_nobody_and_change_nothing() {
    let (bed, mut c) = bed("money_dead", Config::default(), 2_000);
    run(
        &mut c,
        "CREATE SERVER dead FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:9/v1');
         SELECT llm_batch.create_model('dead', server => 'dead', model => 'x', tokens_per_minute => 100000,
             requests_per_minute => 50);
         SELECT llm_batch.create_classifier('dead', labels => '[\"a\", \"b\"]', model => 'dead')",
    );
    let call = |task: &str, more: &str| {
        format!(
            "SELECT * FROM llm_batch.estimate('tickets', input => 'body', target => 'topic', task => '{task}'{more})"
        )
    };
    run(&mut c, "BEGIN TRANSACTION READ ONLY");
    let row = c
        .query_one(
            &format!(
                "SELECT rows, requests, input_tokens, cost::text, duration = make_interval(secs => greatest(
                        ceil((input_tokens + output_tokens) * 60.0 / 100000), ceil(requests * 60.0 / 50))::float8),
                        example_request #>> '{{model}}', example_request -> 'messages' IS NOT NULL
                   FROM ({}) e",
                call("dead", "")
            ),
            &[],
        )
        .unwrap();
    run(&mut c, "COMMIT");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (2_000, 40));
    assert!(row.get::<_, i64>(2) > 20_000);
    assert_eq!(row.get::<_, Option<String>>(3), None, "no prices");
    assert!(row.get::<_, bool>(4), "the tightest limit");
    assert_eq!((row.get::<_, &str>(5), row.get::<_, bool>(6)), ("x", true));
    // Without limits nobody knows how long; without rows nothing is taken.
    assert_eq!(text(&mut c, &format!("SELECT duration IS NULL FROM ({}) e", call("topic", ""))), "t");
    let (none, cost) = estimate(&mut c, ", filter => 'id < 0'");
    assert_eq!((none, cost.as_str()), ([0; 5], "0"));
    let (one_row, _) = estimate(&mut c, ", filter => 'id = 7'");
    assert_eq!((one_row[0], one_row[1], one_row[4]), (1, 1, 1));
    // Rights: SELECT is enough, and needed.
    run(&mut c, "CREATE ROLE reader LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO reader; SET ROLE reader");
    assert_eq!(error(&mut c, &call("topic", "")).0, "42501");
    run(&mut c, "RESET ROLE; GRANT SELECT ON tickets TO reader; SET ROLE reader");
    assert_eq!(estimate(&mut c, "").0[0], 2_000);
    assert_eq!(
        error(&mut c, "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic')").0,
        "42501"
    );
    run(&mut c, "RESET ROLE");
    for (sql, code) in [
        (call("topic", ", sample_rows => 0"), "22023"),
        (call("topic", ", sample_rows => 4001"), "22023"),
        (call("topic", ", options => '{\"max_tokens\": 5}'"), "22023"),
        (call("topic", ", filter => 'no_such_column'"), "42703"),
        (call("nothing", ""), "42704"),
        (call("topic", "").replace("'body'", "'random()::text'"), "0A000"),
    ] {
        let (found, message, ..) = error(&mut c, &sql);
        assert_eq!(found, code, "{sql}: {message}");
    }
    // On a large partitioned table, and with long texts, of which fewer make the sample.
    run(
        &mut c,
        "CREATE TABLE parts (id bigint PRIMARY KEY, body text, topic text) PARTITION BY HASH (id);
         CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO parts SELECT i, i || repeat(' long', 2000) FROM generate_series(1, 2000) i",
    );
    let row = c.query_one(&call("topic", "").replace("'tickets'", "'parts'"), &[]).unwrap();
    let (rows, requests, sample): (i64, i64, i64) = (row.get(0), row.get(1), row.get("sample_rows"));
    assert_eq!(rows, 2_000);
    assert!((200..=220).contains(&sample) && (250..=2_000).contains(&requests), "{sample} {requests}");
    let stats = bed.provider.stats();
    assert_eq!(stats.requests, 0, "{stats:?}");
    assert_eq!(one(&mut c, "SELECT count(*) FROM llm_batch.job"), 0);
}
