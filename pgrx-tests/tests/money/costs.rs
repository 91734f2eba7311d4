//! What was spent is what the provider charges.

use std::time::Duration;

use llm_fake_provider::{Config, Fault};
use postgres::Client;

use super::{INPUT_PRICE, OUTPUT_PRICE, bed, bill, holds, paused_by_budget, used_up};
use crate::common::{Bed, backfill, backfill_with, error, one, run, slow, text, wait_status, warm, wrong};

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
fn the_tier_of_an_answer_decides_its_price() {
    let (bed, mut c) = bed("money_flex", slow(5), 900);
    run(
        &mut c,
        "SELECT llm_batch.alter_classifier('topic', options => '{\"service_tier\": \"flex\", \"reuse\": false, \"max_rows_per_request\": 20}')",
    );
    run(
        &mut c,
        "INSERT INTO llm_batch.list_price (provider, model, input_price, output_price, batch_input_price, batch_output_price)
         VALUES ('127.0.0.1', 'fake-m', 1, 1, 0.5, 0.5)",
    );
    // What was charged, with this discount (percent) on what was served at the tier "flex".
    let paid = |c: &mut Client, discount: u64| {
        let s = bed.provider.stats();
        let of = |all: u64, flex: u64| format!("({all} - {flex} * {discount} * 0.01)");
        let (input, output) =
            (of(s.prompt_tokens, s.flex_prompt_tokens), of(s.completion_tokens, s.flex_completion_tokens));
        let paid =
            text(c, &format!("SELECT trim_scale(({input} * {INPUT_PRICE} + {output} * {OUTPUT_PRICE}) * 0.000001)"));
        bed.provider.reset_stats();
        (paid, s.flex_prompt_tokens, s.prompt_tokens)
    };
    let throttled = "SELECT throttled_429 + errors FROM llm_batch.activity WHERE model = 'fake-m'";
    let before = one(&mut c, throttled);
    // Twice there is no capacity: that is waited for, and is no limit.
    bed.provider.script([Some(Fault::NoCapacity429), Some(Fault::NoCapacity429)]);
    let job = backfill_with(&mut c, "tickets", "filter => 'id <= 300', max_cost => 1");
    let p = wait_status(&mut c, job, "done");
    let (cost, flex, all) = paid(&mut c, 50);
    assert!(flex == all && all > 0, "{flex} of {all}");
    assert_eq!((p.done, p.input_tokens, p.cost), (300, all as i64, cost));
    assert_eq!(one(&mut c, throttled), before);
    // A job that may go on at the normal tier pays the whole price.
    bed.provider.configure(|config| config.faults = vec![(Fault::NoCapacity429, 1.0)]);
    let may = "filter => 'id <= 600', options => '{\"service_tier\": \"flex_or_default\"}'";
    let job = backfill_with(&mut c, "tickets", may);
    let p = wait_status(&mut c, job, "done");
    let (cost, flex, _) = paid(&mut c, 50);
    assert_eq!((p.done, p.cost, flex), (300, cost, 0));
    bed.provider.configure(|config| config.faults = Vec::new());
    // The smaller of two discounts.
    run(
        &mut c,
        "UPDATE llm_batch.list_price SET batch_input_price = 0.2, batch_output_price = 0.25 WHERE model = 'fake-m'",
    );
    let job = backfill(&mut c, "tickets");
    let p = wait_status(&mut c, job, "done");
    let (cost, flex, all) = paid(&mut c, 75);
    assert_eq!((p.done, &p.cost, flex), (300, &cost, all));
    let by_model = format!("SELECT trim_scale(cost) FROM llm_batch.progress_by_model WHERE job_id = {job}");
    assert_eq!(text(&mut c, &by_model), p.cost);
    let asked = "SELECT count(*) FROM tickets WHERE id <= 40 AND llm_classify(body, 'topic') = want";
    assert_eq!(one(&mut c, asked), 40);
    assert_eq!(bed.provider.bodies().last().unwrap()["service_tier"], "flex");
    // Gemini has another name for it, says in a header at which tier it answered, and in a 503 that there is no capacity.
    let url = bed.provider.base_of("gemini");
    let prices = format!("input_price => {INPUT_PRICE}, output_price => {OUTPUT_PRICE}");
    run(
        &mut c,
        &format!(
            "CREATE SERVER google FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'gemini', base_url '{url}');
             CREATE USER MAPPING FOR PUBLIC SERVER google OPTIONS (api_key 'sk-test');
             SELECT llm_batch.create_model('g', server => 'google', model => 'fake-m', {prices});
             SELECT llm_batch.alter_classifier('topic', model => 'g'); UPDATE tickets SET topic = NULL WHERE id <= 300"
        ),
    );
    assert_eq!(one(&mut c, asked), 40);
    bed.provider.reset_stats();
    let errors = "SELECT sum(throttled_429 + errors)::bigint FROM llm_batch.activity";
    let before = one(&mut c, errors);
    bed.provider.script([Some(Fault::Http503)]);
    let job = backfill(&mut c, "tickets");
    let p = wait_status(&mut c, job, "done");
    let (cost, flex, all) = paid(&mut c, 75);
    assert_eq!((p.done, &p.cost, flex, one(&mut c, errors)), (300, &cost, all, before));
    assert_eq!(bed.provider.bodies().last().unwrap()["serviceTier"], "flex");
    assert_eq!(wrong(&mut c, "tickets"), 0);

    run(
        &mut c,
        "CREATE SERVER claude FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'anthropic');
         SELECT llm_batch.create_model('haiku', 'claude', 'claude-haiku'), llm_batch.create_model('vectors', 'fake', 'v')",
    );
    let flex = r#"options => '{"service_tier": "flex"}'"#;
    for (sql, code, says) in [
        (
            format!("SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', 'haiku', {flex})"),
            "0A000",
            "openai, gemini",
        ),
        ("SELECT llm_batch.alter_classifier('topic', model => 'haiku')".to_owned(), "0A000", "tier \"flex\""),
        (format!("SELECT llm_batch.create_embedder('x', 'vectors', 3, {flex})"), "22023", "service_tier"),
        (
            r#"SELECT llm_batch.alter_classifier('topic', options => '{"service_tier": "cheap"}')"#.to_owned(),
            "22023",
            "default, flex, flex_or_default",
        ),
    ] {
        let (found, message, detail, hint) = error(&mut c, &sql);
        assert!(
            found == code && format!("{message} {detail} {hint}").contains(says),
            "{sql}: {found} {message} {hint}"
        );
    }
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
