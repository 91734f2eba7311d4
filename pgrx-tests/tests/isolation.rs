//! Rows that are kept apart by an expression of a job or a column of a query: what the provider is sent, who evaluates
//! it, what is refused.

mod common;

use std::collections::BTreeSet;

use common::{Bed, backfill_with, error, one, progress, run, text, tickets, wait_status, wrong};
use llm_fake_provider::Config;
use postgres::Client;

/// A cluster with tickets of six tenants, by `id % 6`: among them NULL, the empty text, what SQL and JSON quote, and two
/// that differ in the last of a million characters.
fn tenants(name: &str, rows: i64) -> (Bed, Client) {
    let bed = Bed::with(name, Config::default());
    let mut client = bed.connect();
    tickets(&mut client, "tickets", 1..=rows);
    run(
        &mut client,
        "ALTER TABLE tickets ADD tenant text;
         UPDATE tickets SET tenant = CASE id % 6 WHEN 1 THEN '' WHEN 2 THEN E'''; DROP TABLE tickets; -- \"\\\\ \\n👩‍👩‍👧\\u202e'
             WHEN 3 THEN repeat('x', 1000000) || 'a' WHEN 4 THEN repeat('x', 1000000) || 'b' WHEN 5 THEN 'a' END;
         ANALYZE tickets",
    );
    (bed, client)
}

/// The ids of the tickets in each of the last 100 requests.
fn packs(bed: &Bed) -> Vec<Vec<i64>> {
    let of = |body: &serde_json::Value| {
        let user = body["messages"][1]["content"].as_str().unwrap_or_default();
        user.split("#r").skip(1).filter_map(|s| s.split(':').next()?.parse().ok()).collect()
    };
    bed.provider.bodies().iter().map(of).filter(|pack: &Vec<i64>| !pack.is_empty()).collect()
}

/// No request had rows of two tenants, and rows of one tenant did share requests.
#[track_caller]
fn apart(bed: &Bed, tenants: i64) {
    let packs = packs(bed);
    for pack in &packs {
        let of: BTreeSet<i64> = pack.iter().map(|id| id % tenants).collect();
        assert_eq!(of.len(), 1, "{pack:?}");
    }
    assert!(packs.iter().any(|pack| pack.len() > 5), "{packs:?}");
}

#[test]
fn a_job_keeps_tenants_apart() {
    let (bed, mut c) = tenants("isolation_job", 600);
    let job = backfill_with(&mut c, "tickets", "options => '{\"isolation\": \"tenant -- comment\"}'");
    let p = wait_status(&mut c, job, "done");
    assert_eq!((p.counts(), wrong(&mut c, "tickets")), ((600, 600, 0, 0, 0, 0), 0));
    apart(&bed, 6);
    assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1));
    // The value itself goes nowhere.
    assert!(bed.provider.bodies().iter().all(|body| !body.to_string().contains("xxxxx")));
    // Without it they share.
    bed.provider.reset_stats();
    run(&mut c, "UPDATE tickets SET topic = NULL");
    let job = backfill_with(&mut c, "tickets", "options => '{}'");
    wait_status(&mut c, job, "done");
    assert!(packs(&bed).iter().rev().take(5).any(|pack| pack.iter().any(|id| id % 6 != pack[0] % 6)));
}

#[test]
fn a_statement_keeps_tenants_apart_and_shares_answers_with_a_job_of_the_same_tenant() {
    let (bed, mut c) = tenants("isolation_query", 300);
    // All ticket texts are one of two; answers are reused.
    run(
        &mut c,
        "SELECT llm_batch.alter_classifier('topic', options => '{}');
         CREATE TABLE same AS SELECT t.id, o.body, o.want, t.tenant FROM tickets t JOIN tickets o ON o.id = 1 + t.id % 2",
    );
    let ask = |c: &mut Client, query: &str| {
        one(c, &format!("SELECT count(*) FROM llm_classify_batch($q${query}$q$, 'topic') b WHERE b.status = 'ok'"))
    };
    assert_eq!(ask(&mut c, "SELECT id, body, tenant FROM tickets"), 300);
    apart(&bed, 6);
    // A text of one tenant is no answer for another: each is asked once a tenant that has not asked it.
    bed.provider.reset_stats();
    assert_eq!(ask(&mut c, "SELECT id, body, tenant FROM same"), 300);
    let asked: u32 = bed.provider.stats().rows.values().map(|row| row.asked).sum();
    assert_eq!(asked, 6, "six tenants have one of the two texts each, and none had it before");
    // A job of the same tenants finds all of it.
    bed.provider.reset_stats();
    run(&mut c, "ALTER TABLE same ADD PRIMARY KEY (id), ADD topic text");
    let job = backfill_with(&mut c, "same", "options => '{\"isolation\": \"tenant\"}'");
    wait_status(&mut c, job, "done");
    assert_eq!((wrong(&mut c, "same"), bed.provider.stats().rows.len()), (0, 0));
    // Questions without `isolation` share nothing with those before.
    assert_eq!(ask(&mut c, "SELECT id, body FROM same"), 300);
    assert_eq!(bed.provider.stats().rows.len(), 2);
}

#[test]
fn an_estimate_says_what_keeping_apart_costs() {
    let (bed, mut c) = tenants("isolation_estimate", 1_200);
    let estimate = |c: &mut Client, isolation: &str| {
        one(
            c,
            &format!(
                "SELECT requests FROM llm_batch.estimate('tickets', input => 'body', target => 'topic', task => 'topic',
                     options => '{{\"isolation\": \"{isolation}\"}}', sample_rows => 1200)"
            ),
        )
    };
    assert_eq!([estimate(&mut c, "1"), estimate(&mut c, "tenant"), estimate(&mut c, "id")], [24, 24, 1_200]);
    assert_eq!(estimate(&mut c, "id / 10"), 121);
    // A table whose values follow its key, also from a part of it.
    let part = one(
        &mut c,
        "SELECT requests FROM llm_batch.estimate('tickets', input => 'body', target => 'topic', task => 'topic',
             options => '{\"isolation\": \"id / 10\"}', sample_rows => 300)",
    );
    assert!((115..=135).contains(&part), "{part}");
    assert_eq!(bed.provider.stats().requests, 0);
}

#[test]
fn what_is_no_expression_over_the_row_is_refused() {
    let (bed, mut c) = tenants("isolation_errors", 12);
    let c = &mut c;
    run(
        c,
        "CREATE TABLE victim (a int); CREATE FUNCTION noisy(text) RETURNS text LANGUAGE sql VOLATILE AS 'SELECT $1'",
    );
    for call in ["backfill", "estimate"] {
        let with = |options: &str| {
            format!(
                "SELECT llm_batch.{call}('tickets', input => 'body', target => 'topic', task => 'topic', options => {options})"
            )
        };
        let says = |c: &mut Client, expression: &str, code: &[&str], says: &str| {
            let (found, message, detail, hint) =
                error(c, &with(&format!("jsonb_build_object('isolation', $x${expression}$x$)")));
            let all = format!("{message} {detail} {hint}");
            assert!(code.contains(&found.as_str()) && all.contains(says), "{expression}: {found} {all}");
        };
        for expression in ["random()", "noisy(tenant)", "tenant || clock_timestamp()", "(SELECT noisy(tenant))"] {
            says(c, expression, &["0A000"], "isolation can't be evaluated by a job It has a volatile function");
        }
        says(c, "max(tenant)", &["0A000"], "aggregate");
        says(c, "count(*) OVER ()", &["0A000"], "window");
        says(c, "unnest(ARRAY[tenant, body])", &["0A000"], "set-returning");
        says(c, "nothing", &["42703"], "nothing");
        says(c, "other.tenant", &["42P01"], "other");
        for expression in [
            "",
            " ",
            "--",
            "tenant, id",
            "tenant) , (1",
            "tenant) FROM tickets; DROP TABLE victim; --",
            "tenant AS x",
            "(tenant",
            "'",
            "*",
        ] {
            says(c, expression, &["42601", "0A000"], "");
        }
        for options in ["'{\"isolation\": 7}'", "'{\"isolation\": null}'", "'{\"isolation\": [\"tenant\"]}'"] {
            let (code, message, _, hint) = error(c, &with(options));
            assert_eq!(code, "22023", "{message}");
            assert!(message.contains("isolation") && hint.contains("tenant_id"), "{message} {hint}");
        }
    }
    run(c, "SET llm_batch.default_model = 'm'");
    // Statements without a table.
    for sql in [
        "SELECT llm_batch.create_classifier('x', labels => '[\"a\", \"b\"]', options => '{\"isolation\": \"tenant\"}')",
        "SELECT * FROM llm_classify_batch('SELECT id, body FROM tickets', 'topic', '{\"isolation\": \"tenant\"}')",
        "SELECT llm_classify('x', ARRAY['a', 'b'], '{\"isolation\": \"tenant\"}')",
    ] {
        let (code, message, _, hint) = error(c, sql);
        assert_eq!((code.as_str(), message.as_str()), ("22023", "unrecognized option \"isolation\""));
        assert!(hint.contains("third column"), "{hint}");
    }
    assert_eq!(one(c, "SELECT count(*) FROM pg_class WHERE relname = 'victim'"), 1);
    assert_eq!((one(c, "SELECT count(*) FROM llm_batch.progress"), bed.provider.stats().requests), (0, 0));
}

#[test]
fn it_is_evaluated_as_the_jobs_owner_under_his_search_path() {
    let (bed, mut c) = tenants("isolation_owner", 60);
    // Raises for anybody else, and is found by the search_path of who calls backfill().
    run(
        &mut c,
        "CREATE ROLE shop LOGIN; CREATE SCHEMA shop AUTHORIZATION shop; GRANT USAGE ON FOREIGN SERVER fake TO shop;
         ALTER TABLE tickets SET SCHEMA shop; ALTER TABLE shop.tickets OWNER TO shop;
         CREATE FUNCTION shop.mine(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
         BEGIN
             IF current_user <> 'shop' OR session_user NOT IN ('shop', 'postgres') THEN
                 RAISE 'evaluated as %', current_user;
             END IF;
             RETURN $1;
         END $$",
    );
    let options = "options => '{\"isolation\": \"mine(tenant)\"}'";
    run(&mut c, "SET search_path = shop, public");
    let job = backfill_with(&mut c, "tickets", options);
    wait_status(&mut c, job, "done");
    assert_eq!(wrong(&mut c, "shop.tickets"), 0);
    apart(&bed, 6);
    assert_eq!(text(&mut c, &format!("SELECT owner FROM llm_batch.progress WHERE job_id = {job}")), "shop");
    // A right that he lacks stops the job as any other right that is missing.
    run(
        &mut c,
        "UPDATE tickets SET topic = NULL; CREATE TABLE public.secret (a text); CREATE TABLE public.other (a text)",
    );
    let (code, message, ..) = error(
        &mut c,
        "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic',
                           options => '{\"isolation\": \"(SELECT a FROM public.secret LIMIT 1)\"}')",
    );
    assert_eq!(code, "42501", "{message}");
    run(&mut c, "GRANT SELECT ON public.secret TO shop");
    bed.provider.hold();
    let job =
        backfill_with(&mut c, "tickets", "options => '{\"isolation\": \"(SELECT a FROM public.secret LIMIT 1)\"}'");
    run(&mut c, &format!("SELECT llm_batch.pause({job})"));
    bed.provider.release();
    wait_status(&mut c, job, "paused");
    run(&mut c, "UPDATE tickets SET topic = NULL; REVOKE SELECT ON public.secret FROM shop");
    run(&mut c, &format!("SELECT llm_batch.resume({job})"));
    wait_status(&mut c, job, "paused");
    assert_eq!(progress(&mut c, job).reason.as_deref(), Some("owner"));
}
