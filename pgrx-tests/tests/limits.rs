//! Limits: of tokens, requests, concurrency, time; and what a server does not support is learnt once.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::*;
use llm_fake_provider::{Config, Fault, Latency, RateHeaders};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

fn base(ms: u64) -> Latency {
    Latency { base: Duration::from_millis(ms), ..Latency::default() }
}

/// A session that classifies rows and holds each label against the one wanted; the number of rows.
fn classify(c: &mut Client, query: &str, task: &str, options: &str) -> usize {
    let answers = c
        .query(
            "SELECT id, label, status, detail FROM llm_classify_batch($1, $2, $3::text::jsonb)",
            &[&query, &task, &options],
        )
        .unwrap_or_else(|e| panic!("{options}: {e:?}"));
    for row in &answers {
        let (id, label, status): (String, Option<String>, String) = (row.get(0), row.get(1), row.get(2));
        let detail: Option<String> = row.get(3);
        assert_eq!(status, "ok", "{id} {detail:?} {options}");
        let id: i64 = id.parse().unwrap();
        assert_eq!(label.as_deref(), Some(LABELS[(id % 8) as usize]), "{id} {options}");
    }
    answers.len()
}

/// The provider's window. The gateway keeps in 6 s what this one keeps in 5: on a busy machine a request may get there
/// some hundred milliseconds late.
const WINDOW: Duration = Duration::from_secs(5);

/// Two databases, three jobs and five sessions at once, all on one account and model.
fn everybody_at_once(bed: &Bed, settings: &str, rows_a_job: i64, rows_a_session: i64, options: &str) {
    let mut c = bed.connect();
    run(&mut c, "CREATE DATABASE other");
    let mut d = bed.cluster.connect("other");
    install(&mut d, &bed.provider.base_url());
    for client in [&mut c, &mut d] {
        model(client, "limited", settings);
        classifier(client, "slow", &labels_json(&LABELS), "limited", options);
    }
    tickets(&mut c, "a", 1..=rows_a_job);
    tickets(&mut c, "b", 100_001..=100_000 + rows_a_job);
    tickets(&mut d, "a", 200_001..=200_000 + rows_a_job);
    for client in [&mut c, &mut d] {
        run(client, "CREATE TABLE s (id bigint PRIMARY KEY, body text, want text)");
    }

    let start = Instant::now();
    std::thread::scope(|scope| {
        for n in 1..=5 {
            let first = 300_000 + n * 10_000;
            scope.spawn(move || {
                let db = if n % 2 == 0 { "other" } else { "postgres" };
                let mut client = bed.cluster.connect(db);
                let last = first + rows_a_session - 1;
                rows(&mut client, "s", first..=last);
                let query = format!("SELECT id, body FROM s WHERE id BETWEEN {first} AND {last}");
                assert_eq!(classify(&mut client, &query, "slow", "{}"), rows_a_session as usize);
            });
        }
        let start_job = |client: &mut Client, table: &str| {
            let sql =
                format!("SELECT llm_batch.backfill('{table}', input => 'body', target => 'topic', task => 'slow')");
            one(client, &sql)
        };
        let jobs = [start_job(&mut c, "a"), start_job(&mut c, "b")];
        let other = start_job(&mut d, "a");
        for job in jobs {
            assert_eq!(wait_status(&mut c, job, "done").counts(), (rows_a_job, rows_a_job, 0, 0, 0, 0));
        }
        assert_eq!(wait_status(&mut d, other, "done").counts(), (rows_a_job, rows_a_job, 0, 0, 0, 0));
    });
    println!("all were done after {:?}", start.elapsed());
    for table in ["a", "b"] {
        assert_eq!((wrong(&mut c, table), left(&mut c, table)), (0, 0));
    }
    assert_eq!((wrong(&mut d, "a"), left(&mut d, "a")), (0, 0));
    let stats = bed.provider.stats();
    println!(
        "{} requests, at most {} and {} tokens in a window, {:.2} used, {:?}",
        stats.requests, stats.peak_window_requests, stats.peak_window_tokens, stats.window_used, stats.by_status
    );
    assert_eq!(stats.rows.len() as i64, 3 * rows_a_job + 5 * rows_a_session);
    assert!(stats.rows.values().all(|row| (row.asked, row.answered) == (1, 1)));
    assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "no 429, nor anything else");
}

#[test]
fn jobs_and_sessions_share_one_limit_of_tokens() {
    // A minute's limit is kept in every tenth of a minute.
    const PER_WINDOW: u64 = 50_000;
    let bed = Bed::with(
        "tokens_per_minute",
        Config { window: WINDOW, tokens_per_window: Some(PER_WINDOW), latency: base(200), ..Config::default() },
    );
    everybody_at_once(&bed, "tokens_per_minute => 500000", 1_500, 300, "{}");
    let stats = bed.provider.stats();
    assert!(stats.peak_window_tokens <= PER_WINDOW, "{}", stats.peak_window_tokens);
    assert!(stats.charged_tokens > 2 * PER_WINDOW, "too few rows to show anything: {}", stats.charged_tokens);
    let throttled = "SELECT sum(throttled_429)::bigint FROM llm_batch.activity";
    assert_eq!(one(&mut bed.connect(), throttled), 0);
}

#[test]
fn jobs_and_sessions_share_one_limit_of_requests() {
    const PER_WINDOW: u64 = 30;
    let bed = Bed::with(
        "requests_per_minute",
        Config { window: WINDOW, requests_per_window: Some(PER_WINDOW), latency: base(100), ..Config::default() },
    );
    everybody_at_once(&bed, "requests_per_minute => 300", 100, 20, r#"{"max_rows_per_request": 5}"#);
    let stats = bed.provider.stats();
    assert!(stats.peak_window_requests <= PER_WINDOW, "{}", stats.peak_window_requests);
    assert!(stats.requests > 2 * PER_WINDOW, "too few rows to show anything: {}", stats.requests);
}

#[test]
fn the_scalar_function_is_under_the_same_limit() {
    const PER_WINDOW: u64 = 30;
    let bed =
        Bed::with("scalar", Config { window: WINDOW, requests_per_window: Some(PER_WINDOW), ..Config::default() });
    let mut c = bed.connect();
    model(&mut c, "limited", "requests_per_minute => 300");
    classifier(&mut c, "slow", &labels_json(&LABELS), "limited", "{}");
    tickets(&mut c, "t", 1..=70);
    // One by one: rows of a batch scan would be two requests.
    run(&mut c, "SET llm_batch.enable_batch_scan = off");
    assert_eq!(one(&mut c, "SELECT count(*) FROM t WHERE llm_classify(body, 'slow') = want"), 70);
    let stats = bed.provider.stats();
    assert_eq!((stats.requests, stats.by_status.get(&200)), (70, Some(&70)), "{:?}", stats.by_status);
    assert!(stats.peak_window_requests <= PER_WINDOW);
}

#[test]
fn a_limit_that_is_not_known_is_met_with_patience() {
    // The model knows no limit, the provider has one, and says how long to wait.
    let bed = Bed::with(
        "retry_after",
        Config {
            window: Duration::from_secs(4),
            requests_per_window: Some(5),
            rate_headers: RateHeaders::None,
            ..Config::default()
        },
    );
    let mut c = bed.connect();
    run(&mut c, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 1)");
    tickets(&mut c, "t", 1..=600);
    let job = backfill(&mut c, "t");
    let p = bed.done(job);
    assert_eq!(p.counts(), (600, 600, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
    let stats = bed.provider.stats();
    assert!(stats.rows.values().all(|row| (row.asked, row.answered) == (1, 1)));
    assert_eq!(stats.admitted, 13, "12 packs and the probe");
    // 5, 5 and 3 are admitted in windows of their own: a refusal at the end of the first and of the second (or a few
    // more, where the machine is slow and they are spread). Whoever does
    // not wait as long as he is told to is refused over and over.
    let refused = stats.by_status.get(&429).copied().unwrap_or_default();
    assert!((1..=6).contains(&refused), "{:?}", stats.by_status);
    assert_eq!(one(&mut c, "SELECT sum(throttled_429)::bigint FROM llm_batch.activity"), refused as i64);
    assert_eq!(p.requests, 12, "a 429 is charged to nobody");
}

/// 4,000 rows through a provider whose limit is half of what it is said to be: how many requests it answered, refused.
fn lower_limit(name: &str, rate_headers: RateHeaders) -> (u64, u64) {
    let config = Config {
        window: Duration::from_secs(4),
        tokens_per_window: Some(30_000),
        rate_headers,
        latency: base(100),
        ..Config::default()
    };
    let bed = Bed::with(name, config);
    let mut c = bed.connect();
    run(&mut c, "SELECT llm_batch.alter_model('m', tokens_per_minute => 900000)");
    tickets(&mut c, "t", 1..=4_000);
    let job = backfill(&mut c, "t");
    let p = bed.done(job);
    assert_eq!(p.counts(), (4_000, 4_000, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
    let stats = bed.provider.stats();
    assert!(stats.rows.values().all(|row| (row.asked, row.answered) == (1, 1)));
    (stats.by_status[&200], stats.by_status.get(&429).copied().unwrap_or_default())
}

#[test]
fn refusals_stay_few_where_the_limit_is_lower_than_was_said() {
    let (fine, refused) = lower_limit("lower_limit", RateHeaders::None);
    assert!(refused > 0, "nothing was tested");
    // The share of the limit that is used is cut with each.
    assert!(refused * 10 <= fine, "{fine} requests were answered and {refused} refused");
}

#[test]
fn a_lower_limit_is_read_from_the_first_answer() {
    let (fine, refused) = lower_limit("reported_limit", RateHeaders::OpenAi);
    assert_eq!(refused, 0, "{fine} were answered");
}

#[test]
fn no_more_requests_at_a_time_than_the_model_allows() {
    let bed = Bed::with("concurrency", slow(100));
    let mut c = bed.connect();
    let small = r#"options => '{"max_rows_per_request": 10}'"#;
    // Without a setting of the model's, it begins with four.
    for (i, (allowed, expected)) in [(Some(3), 3), (Some(1), 1), (None, 4)].into_iter().enumerate() {
        let (name, first) = (format!("t{i}"), i as i64 * 10_000 + 1);
        let settings = allowed.map_or(String::new(), |n| format!("max_concurrent_requests => {n}"));
        model(&mut c, &name, &settings);
        classifier(&mut c, &name, &labels_json(&LABELS), &name, "{}");
        tickets(&mut c, &name, first..=first + 399);
        bed.provider.reset_stats();
        run(&mut c, "BEGIN");
        let job = one(
            &mut c,
            &format!(
                "SELECT llm_batch.backfill('{name}', input => 'body', target => 'topic', task => '{name}', {small})"
            ),
        );
        bed.provider.hold();
        run(&mut c, "COMMIT");
        // As many as are allowed are sent without waiting for an answer, and all that is left later is no more.
        let in_flight = || bed.provider.stats().in_flight;
        wait_until(&format!("{expected} requests are under way"), PATIENCE, in_flight, |n| *n >= expected);
        bed.provider.release();
        assert_eq!(bed.done(job).counts(), (400, 400, 0, 0, 0, 0));
        assert_eq!((wrong(&mut c, &name), left(&mut c, &name)), (0, 0));
        let peak = bed.provider.stats().peak_in_flight;
        assert!(peak == expected || allowed.is_none(), "{peak} {allowed:?}");
        let now = one(&mut c, &format!("SELECT requests_allowed FROM llm_batch.activity WHERE model = 'fake-{name}'"));
        assert!(if let Some(n) = allowed { now == n } else { now > 4 }, "{now} {allowed:?}");
    }
}

#[test]
fn a_request_that_hangs_is_given_up_and_sent_again() {
    let bed = Bed::new("hang");
    let mut c = bed.connect();
    run(&mut c, "SELECT llm_batch.alter_model('m', request_timeout => '2 s')");
    tickets(&mut c, "t", 1..=100);
    run(&mut c, "BEGIN");
    let job = backfill(&mut c, "t");
    bed.provider.reset_stats();
    bed.provider.script([Some(Fault::Hang)]);
    run(&mut c, "COMMIT");
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "t"), left(&mut c, "t")), (0, 0));
    let stats = bed.provider.stats();
    assert_eq!((stats.abandoned, stats.requests), (1, 3), "{stats:?}");
    let mut asked: Vec<u32> = stats.rows.values().map(|row| row.asked).collect();
    asked.sort_unstable();
    assert_eq!((&asked[..50], &asked[50..]), (&[1; 50][..], &[2; 50][..]));

    // All of them hang: the provider is down, the job waits, and goes on by itself.
    tickets(&mut c, "u", 1001..=1100);
    run(&mut c, "BEGIN");
    let job = backfill(&mut c, "u");
    bed.provider.configure(|config| config.faults = vec![(Fault::Hang, 1.0)]);
    run(&mut c, "COMMIT");
    let p = wait_status(&mut c, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("provider_down"));
    assert!(p.last_error.as_ref().is_some_and(|e| e.contains("timed out")), "{p:?}");
    assert_eq!(p.counts(), (100, 0, 0, 0, 0, 100));
    bed.provider.configure(|config| config.faults.clear());
    // Not a pause that ends wait().
    run(&mut c, &format!("CALL llm_batch.wait({job})"));
    assert_eq!(progress(&mut c, job).counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!((wrong(&mut c, "u"), left(&mut c, "u")), (0, 0));
}

/// Runs jobs against a server that lacks something; the statuses it answered.
fn against(bed: &Bed, name: &str, packs: i64, options: &str, change: impl FnOnce(&mut Config)) -> BTreeMap<u16, u64> {
    let mut c = bed.connect();
    model(&mut c, name, "max_concurrent_requests => 2");
    classifier(&mut c, name, &labels_json(&LABELS), name, options);
    tickets(&mut c, name, 1..=10 * packs);
    bed.provider.configure(|config| {
        (config.json_schema, config.json_object, config.max_tokens_param) = (true, true, true);
        change(config);
    });
    bed.provider.reset_stats();
    let backfill = format!(
        r#"SELECT llm_batch.backfill('{name}', input => 'body', target => 'topic', task => '{name}', options => '{{"max_rows_per_request": 10, "reuse": false}}')"#
    );
    let job = one(&mut c, &backfill);
    assert_eq!(bed.done(job).counts(), (10 * packs, 10 * packs, 0, 0, 0, 0), "{name}");
    assert_eq!((wrong(&mut c, name), left(&mut c, name)), (0, 0), "{name}");
    let first = bed.provider.stats();
    assert!(first.rows.values().all(|row| (row.asked, row.answered) == (1, 1)), "{name}");
    // The learnt limits stay: a further job runs into nothing.
    run(&mut c, &format!("UPDATE {name} SET topic = NULL"));
    bed.provider.reset_stats();
    let job = one(&mut c, &backfill);
    bed.done(job);
    assert_eq!(bed.provider.stats().by_status.keys().collect::<Vec<_>>(), [&200], "{name}, a second time");
    assert_eq!((wrong(&mut c, name), left(&mut c, name)), (0, 0), "{name}");
    first.by_status
}

#[test]
fn what_a_server_does_not_support_is_learnt_once() {
    let bed = Bed::new("learnt");
    let statuses = |refused: u64, fine: u64| {
        let mut map = BTreeMap::from([(200, fine)]);
        if refused > 0 {
            map.insert(400, refused);
        }
        map
    };
    // One pack, so that there is never more than one request under way that could be refused. The probe is the second
    // request that is fine.
    let (map, named) = (r#"{"answer_shape": "map"}"#, r#"{"answer_shape": "properties"}"#);
    assert_eq!(against(&bed, "has_all", 1, map, |_| {}), statuses(0, 2));
    assert_eq!(against(&bed, "no_mode", 1, map, |c| c.json_object = false), statuses(1, 2));
    assert_eq!(against(&bed, "no_schema", 1, named, |c| c.json_schema = false), statuses(1, 2));
    let neither = |c: &mut Config| (c.json_schema, c.json_object) = (false, false);
    assert_eq!(against(&bed, "neither", 1, named, neither), statuses(2, 2));
    assert_eq!(against(&bed, "old_name", 1, map, |c| c.max_tokens_param = false), statuses(1, 2));
    let nothing = |c: &mut Config| (c.json_schema, c.json_object, c.max_tokens_param) = (false, false, false);
    assert_eq!(against(&bed, "nothing", 1, named, nothing), statuses(3, 2));

    // Many packs: no more refusals than requests under way at the first one.
    let many = against(&bed, "many", 30, named, neither);
    assert!((2..=4).contains(&many[&400]), "{many:?}");
    assert_eq!(many[&200], 31);
}

#[test]
fn a_form_that_the_task_insists_on_is_not_given_up() {
    let bed = Bed::with("insists", Config { json_schema: false, ..Config::default() });
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=10);
    let job = backfill_with(
        &mut c,
        "t",
        r#"options => '{"answer_shape": "properties", "structured_output": "json_schema"}'"#,
    );
    let p = wait_status(&mut c, job, "failed");
    assert!(p.last_error.as_ref().is_some_and(|e| e.contains("json_schema")), "{p:?}");
    assert_eq!(p.counts(), (10, 0, 0, 0, 0, 10));
    assert_eq!(bed.provider.stats().by_status.get(&400), Some(&1));
}

#[test]
fn every_shape_with_every_kind_of_code_and_structure() {
    let bed = Bed::new("shapes");
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=7);
    // Labels of several tokens, of one beginning, with what JSON and patterns escape, and in other scripts.
    let odd = [
        "very positive",
        "very negative",
        "it's \"quoted\"",
        r"back\slash",
        "Größe & Maß",
        "価格",
        "a (b) [c] {d}",
        "a=b, c:d",
    ];
    classifier(&mut c, "odd", &labels_json(&odd).replace('\'', "''"), "m", "{}");
    run(&mut c, "CREATE TABLE o (id bigint PRIMARY KEY, body text, want text, topic text)");
    for (id, label) in (2001i64..).zip(odd) {
        let body = format!("Text #r{id:06}:{label}#");
        c.execute("INSERT INTO o VALUES ($1, $2, $3)", &[&id, &body, &label]).unwrap();
    }
    for shape in ["map", "properties"] {
        for codes in ["auto", "words", "letters"] {
            for structured in ["auto", "json_schema", "json_object", "none"] {
                let options = format!(
                    r#"{{"answer_shape": "{shape}", "codes": "{codes}", "structured_output": "{structured}", "reuse": false}}"#
                );
                bed.provider.reset_stats();
                assert_eq!(classify(&mut c, "SELECT id, body FROM t", "topic", &options), 7);
                let got = c
                    .query(
                        "SELECT o.want, r.label, r.status, r.detail FROM o LEFT JOIN
                         llm_classify_batch('SELECT id, body FROM o', 'odd', $1::text::jsonb) r ON r.id = o.id::text",
                        &[&options],
                    )
                    .unwrap_or_else(|e| panic!("{options}: {e:?}"));
                for row in &got {
                    let (want, label): (String, Option<String>) = (row.get(0), row.get(1));
                    let (status, detail): (Option<String>, Option<String>) = (row.get(2), row.get(3));
                    assert_eq!(label.as_ref(), Some(&want), "{options} {status:?} {detail:?}");
                }
                let stats = bed.provider.stats();
                assert!(stats.rows.values().all(|row| row.asked == 1), "{options} {:?}", stats.rows);
                assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{options}");
            }
        }
    }
}

#[test]
fn what_the_views_show_of_a_limit() {
    let bed = Bed::with("activity", Config { latency: base(50), ..Config::default() });
    let mut c = bed.connect();
    model(&mut c, "limited", "tokens_per_minute => 60000, requests_per_minute => 600");
    classifier(&mut c, "slow", &labels_json(&LABELS), "limited", "{}");
    tickets(&mut c, "t", 1..=2_000);
    bed.provider.hold();
    bed.provider.release();
    let job = one(&mut c, "SELECT llm_batch.backfill('t', input => 'body', target => 'topic', task => 'slow')");
    // 60,000 tokens a minute last for a long time: the job is held up by the limit.
    let limits = wait_until(
        "the limiter holds the job up",
        PATIENCE,
        || {
            let row = c
                .query_one(
                    "SELECT queued, tokens_limit, requests_limit, used, tokens_in_window, requests_total, throttled_429
                       FROM llm_batch.activity WHERE model = 'fake-limited'",
                    &[],
                )
                .unwrap();
            let limits: (Option<i64>, Option<i64>) = (row.get(1), row.get(2));
            (row.get::<_, i64>(0), limits, row.get::<_, f64>(3), row.get::<_, i64>(4), row.get::<_, i64>(5))
        },
        |(queued, _, used, _, requests)| *queued > 0 && *used > 0.8 && *requests > 0,
    );
    assert_eq!(limits.1, (Some(60_000), Some(600)));
    assert!(limits.3 <= 60_000 && limits.2 <= 1.0, "{limits:?}");
    run(&mut c, &format!("SELECT llm_batch.cancel({job})"));
    wait_status(&mut c, job, "cancelled");
    wait_until(
        "the queue is given back",
        PATIENCE,
        || one(&mut c, "SELECT coalesce(sum(queued), 0)::bigint FROM llm_batch.activity"),
        |n| *n == 0,
    );
}

#[test]
fn what_was_sent_is_known_to_the_next_gateway() {
    let bed = Bed::new("restarted");
    let mut c = bed.connect();
    // Its short window is a minute.
    model(&mut c, "limited", "tokens_per_minute => 90000");
    classifier(&mut c, "slow", &labels_json(&LABELS), "limited", "{}");
    tickets(&mut c, "t", 1..=301);
    let activity = "SELECT tokens_in_window, used FROM llm_batch.activity WHERE model = 'fake-limited'";
    let look =
        |c: &mut Client| c.query_opt(activity, &[]).unwrap().map(|row| (row.get::<_, i64>(0), row.get::<_, f64>(1)));
    // A refusal ends the supposition of a first start, that the minute before it was used up.
    bed.provider.script([Some(Fault::RateLimit429)]);
    assert_eq!(classify(&mut c, "SELECT id, body FROM t WHERE id <= 300", "slow", "{}"), 300);
    let (sent, used) = look(&mut c).unwrap();
    assert!(sent > 0 && used < 0.5, "{sent} {used}");
    let charged = bed.provider.stats().charged_tokens as i64;

    let gateway = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'llm_batch gateway'";
    let pid: i32 = c.query_one(gateway, &[]).unwrap().get(0);
    run(&mut c, &format!("SELECT pg_terminate_backend({pid}, 10000)"));
    wait_until(
        "another gateway runs",
        PATIENCE,
        || c.query_opt(gateway, &[]).unwrap().map(|row| row.get::<_, i32>(0)),
        |new| new.is_some_and(|new| new != pid),
    );
    let start = Instant::now();
    bed.provider.reset_stats();
    assert_eq!(classify(&mut c, "SELECT id, body FROM t WHERE id = 301", "slow", r#"{"reuse": false}"#), 1);
    println!("the first row after the restart took {:?}", start.elapsed());
    let (sent, used) = look(&mut c).unwrap();
    // Neither forgotten nor taken for a minute's worth.
    assert!(sent >= charged && used < 0.5, "{sent} of {charged}, {used}");
    assert_eq!(bed.provider.stats().by_status.keys().collect::<Vec<_>>(), [&200]);
}
