//! Routes: several models under one name, for jobs and sessions, with the accounts of each.

mod common;

use common::{
    Bed, PATIENCE, classifier, error, failures, labels_json, model, one, progress, rows, run, slow, text, tickets,
    wait_status, wrong,
};
use llm_fake_provider::{FakeProvider, Fault, embedding};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

#[test]
fn several_models_are_asked_as_one() {
    let bed = Bed::with("routes", slow(40));
    let second = FakeProvider::start(slow(20)).unwrap();
    let c = &mut bed.connect();
    two_models(&second, 4, c);
    tickets(c, "t", 1..=6000);
    run(c, "ALTER TABLE t ADD by jsonb");

    what_is_wrong(c);
    names_under_repeatable_read(&bed, c);
    names_in_open_transactions(&bed, c);
    the_second_goes_on(&bed, &second, c);
    both_share_the_rows(&bed, c);
    budgets_reckon_with_the_dearest(&bed, c);
    the_dear_one_helps_where_there_is_a_deadline(&bed, &second, c);
    every_server_must_be_allowed(&bed, c);
    sessions_and_vectors(&bed, c);
}

/// Two models that answer so many requests at once, and the task `topic2` for a route of both.
fn two_models(second: &FakeProvider, concurrent: u64, c: &mut Client) {
    let url = second.base_url();
    run(c, &format!("CREATE SERVER other FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url '{url}')"));
    run(c, "CREATE USER MAPPING FOR PUBLIC SERVER other OPTIONS (api_key 'sk-test-other-0123456789')");
    let concurrent = format!("max_concurrent_requests => {concurrent}");
    model(c, "cheap", &format!("input_price => 0.1, output_price => 0.4, {concurrent}"));
    run(
        c,
        &format!(
            "SELECT llm_batch.create_model('dear', server => 'other', model => 'fake-dear', input_price => 1.5,
                    output_price => 3, {concurrent})"
        ),
    );
    run(c, "SELECT llm_batch.create_route('both', ARRAY['cheap', 'dear'])");
    classifier(c, "topic2", &labels_json(&common::LABELS), "both", "{\"reuse\": false, \"max_rows_per_request\": 20}");
}

/// The account of a model: requests, tokens of prompts, tokens of answers.
fn account(c: &mut Client, job: i64, model: &str) -> [i64; 3] {
    let sql = "SELECT requests, input_tokens, output_tokens FROM llm_batch.progress_by_model WHERE job_id = $1 AND model = $2";
    c.query_opt(sql, &[&job, &model]).unwrap().map_or([0; 3], |row| [0, 1, 2].map(|i| row.get(i)))
}

/// Counts that a provider has and a model's account lacks.
fn missing(provider: &FakeProvider, account: [i64; 3]) -> [i64; 3] {
    let stats = provider.stats();
    let counted = [stats.admitted, stats.prompt_tokens, stats.completion_tokens];
    std::array::from_fn(|i| counted[i] as i64 - account[i])
}

/// The server is killed in the middle of a job: what the providers have counted and the accounts by model have not is what
/// was in flight then, and at the end it is no more.
#[test]
fn accounts_by_model_after_a_kill() {
    const ROWS: i64 = 1000;
    const CONCURRENT: i64 = 2;
    let mut bed = Bed::with("routes_killed", slow(20));
    let second = FakeProvider::start(slow(20)).unwrap();
    let mut c = bed.connect();
    two_models(&second, CONCURRENT as u64, &mut c);
    run(&mut c, "SELECT llm_batch.alter_route('both', policy => 'spread')");
    tickets(&mut c, "t", 1..=ROWS);
    run(&mut c, "ALTER TABLE t ADD by jsonb");
    // The probe of a model is on nobody's account.
    run(&mut c, "BEGIN");
    job(&mut c, "");
    run(&mut c, "ROLLBACK");
    bed.provider.reset_stats();
    second.reset_stats();
    // Held, so that what is in flight is known: all slots are taken, and all that was answered is written.
    bed.provider.hold_after(10);
    second.hold_after(10);
    let job = job(&mut c, ", max_cost => 100");
    wait_until(
        "what was answered is written",
        PATIENCE,
        || {
            let written = one(&mut c, "SELECT count(topic) FROM t");
            [&bed.provider, &second].iter().fold((true, written), |(is_held, left), provider| {
                let stats = provider.stats();
                let is_held = is_held && provider.holds() && stats.in_flight as i64 == CONCURRENT;
                (is_held, left - stats.rows.len() as i64 + stats.rows_in_flight as i64)
            })
        },
        |found| *found == (true, 0),
    );
    let cheap = missing(&bed.provider, account(&mut c, job, "cheap"));
    let dear = missing(&second, account(&mut c, job, "dear"));
    assert_eq!((cheap[0], dear[0]), (CONCURRENT, CONCURRENT), "requests in flight");
    bed.cluster.kill9();
    bed.provider.release();
    second.release();
    bed.cluster.start();
    let mut c = bed.connect();
    assert_eq!(bed.done(job).counts(), (ROWS, ROWS, 0, 0, 0, 0), "{:?}", failures(&mut c, job));
    assert_eq!(wrong(&mut c, "t"), 0);
    accounts_agree(&mut c, job);
    assert_eq!(missing(&bed.provider, account(&mut c, job, "cheap")), cheap, "requests and tokens of cheap");
    assert_eq!(missing(&second, account(&mut c, job, "dear")), dear, "requests and tokens of dear");
    let asked = |provider: &FakeProvider| provider.stats().rows.values().map(|row| i64::from(row.asked)).sum::<i64>();
    assert_eq!(
        asked(&bed.provider) + asked(&second),
        ROWS + 2 * CONCURRENT * 20,
        "only what was in flight is asked again"
    );
    let within = format!(
        "SELECT cost_unconfirmed > 0 AND cost + cost_unconfirmed >=
                cost + ({} * 0.1 + {} * 0.4 + {} * 1.5 + {} * 3) * 0.000001 FROM llm_batch.progress WHERE job_id = {job}",
        cheap[1], cheap[2], dear[1], dear[2]
    );
    assert_eq!(text(&mut c, &within), "t", "what was lost is within what is unconfirmed");
}

fn job(c: &mut Client, more: &str) -> i64 {
    let options = "options => '{\"provenance_column\": \"by\"}'";
    one(c, &format!("SELECT llm_batch.backfill('t', 'body', 'topic', 'topic2', {options}{more})"))
}

/// The accounts by model are those of the job, and each row says which model answered it.
#[track_caller]
fn accounts_agree(c: &mut Client, job: i64) {
    let agree = text(
        c,
        &format!(
            "SELECT concat_ws(' ', sum(m.requests) = p.requests, sum(m.input_tokens) = p.input_tokens,
                    sum(m.output_tokens) = p.output_tokens, sum(m.cost) = p.cost, sum(m.rows_answered) >= p.rows_done)
               FROM llm_batch.progress_by_model m JOIN llm_batch.progress p USING (job_id) WHERE job_id = {job}
              GROUP BY p.requests, p.input_tokens, p.output_tokens, p.cost, p.rows_done"
        ),
    );
    assert_eq!(agree, "t t t t t");
    let said = text(
        c,
        &format!(
            "SELECT coalesce(string_agg(concat_ws(' ', m.model, m.rows_answered, b.n), ', '), 'none') FROM llm_batch.progress_by_model m
               LEFT JOIN (SELECT by->>'model' AS model, count(*) AS n FROM t WHERE (by->>'job')::bigint = {job} GROUP BY 1) b
                 ON b.model = m.model
              WHERE m.job_id = {job} AND m.rows_answered IS DISTINCT FROM coalesce(b.n, 0)"
        ),
    );
    assert_eq!(said, "none", "model, rows answered, rows that say so");
}

fn by(c: &mut Client, job: i64, model: &str) -> i64 {
    one(
        c,
        &format!(
            "SELECT coalesce(sum(rows_answered), 0)::bigint FROM llm_batch.progress_by_model
              WHERE job_id = {job} AND model = '{model}'"
        ),
    )
}

/// The first goes down in the middle of a job.
fn the_second_goes_on(bed: &Bed, second: &FakeProvider, c: &mut Client) {
    let job = job(c, ", filter => 'id <= 4000'");
    wait_until("some rows are done", PATIENCE, || progress(c, job).done, |done| *done >= 500);
    // A pack may have gone to it where this machine stood still.
    assert!(by(c, job, "dear") < 100, "the second is not asked as long as the first answers");
    bed.provider.configure(|config| config.faults = vec![(Fault::Http503, 1.0)]);
    let p = bed.done(job);
    assert_eq!(p.counts(), (4000, 4000, 0, 0, 0, 0), "{:?}", failures(c, job));
    assert_eq!(wrong(c, "t"), 0);
    accounts_agree(c, job);
    assert!(by(c, job, "cheap") >= 500 && by(c, job, "dear") > 0);
    let stats = second.stats();
    let billed = text(
        c,
        &format!(
            "SELECT concat_ws(' ', input_tokens, output_tokens, requests, cost = (input_tokens * 1.5 + output_tokens * 3) * 0.000001)
               FROM llm_batch.progress_by_model WHERE job_id = {job} AND model = 'dear'"
        ),
    );
    let charged = format!("{} {} {} t", stats.prompt_tokens, stats.completion_tokens, stats.admitted);
    assert_eq!(billed, charged, "by the second provider's own account");
    bed.provider.configure(|config| config.faults.clear());
}

fn both_share_the_rows(bed: &Bed, c: &mut Client) {
    run(c, "SELECT llm_batch.alter_route('both', policy => 'spread')");
    classifier(c, "alone", &labels_json(&common::LABELS), "cheap", "{}");
    let again = "SELECT llm_classify('#r000001:bug#', 'alone')";
    wait_until("the first answers again", PATIENCE, || c.query(again, &[]).is_ok(), |is_ok| *is_ok);
    let job = job(c, ", filter => 'id <= 5000'");
    assert_eq!(bed.done(job).counts(), (1000, 1000, 0, 0, 0, 0), "{:?}", failures(c, job));
    accounts_agree(c, job);
    assert!(by(c, job, "cheap") > 100 && by(c, job, "dear") > 100, "{} {}", by(c, job, "cheap"), by(c, job, "dear"));
}

/// A budget that the cheap model alone would not use up is kept though the dear one may be asked.
fn budgets_reckon_with_the_dearest(bed: &Bed, c: &mut Client) {
    run(c, "SELECT llm_batch.alter_route('both', ARRAY['cheap', 'dear'], 'spread')");
    let job = job(c, ", max_cost => 0.01");
    let p = wait_status(c, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("budget"), "{p:?}");
    let kept = format!("SELECT cost + cost_unconfirmed <= max_cost FROM llm_batch.progress WHERE job_id = {job}");
    assert_eq!(text(c, &kept), "t");
    accounts_agree(c, job);
    run(c, &format!("SELECT llm_batch.alter_job({job}, max_cost => 100)"));
    run(c, &format!("SELECT llm_batch.resume({job})"));
    bed.done(job);
    accounts_agree(c, job);
    assert_eq!(wrong(c, "t"), 0);
}

/// By costs the dear model is asked for a job with a deadline alone, and for statements.
fn the_dear_one_helps_where_there_is_a_deadline(bed: &Bed, second: &FakeProvider, c: &mut Client) {
    run(c, "SELECT llm_batch.alter_route('both', ARRAY['dear', 'cheap'], 'cheapest'); UPDATE t SET topic = NULL");
    let first = job(c, ", filter => 'id <= 1000'");
    assert_eq!(bed.done(first).counts(), (1000, 1000, 0, 0, 0, 0), "{:?}", failures(c, first));
    // A pack may have gone to it where this machine stood still.
    assert!(by(c, first, "dear") < 100, "{}", by(c, first, "dear"));
    accounts_agree(c, first);
    run(c, "SET timezone = 'Asia/Tokyo'; SET datestyle = 'SQL, DMY'");
    let deadline = "options => '{\"deadline\": \"2 hours\"}', filter => 'id <= 3000'";
    let hurried = one(c, &format!("SELECT llm_batch.backfill('t', 'body', 'topic', 'topic2', {deadline})"));
    let left = format!(
        "SELECT deadline - now() BETWEEN '1 hour 50 min' AND '2 hours' FROM llm_batch.progress WHERE job_id = {hurried}"
    );
    assert_eq!(text(c, &left), "t");
    run(c, "RESET timezone; RESET datestyle");
    assert_eq!(text(c, &left), "t");
    assert_eq!(bed.done(hurried).counts(), (2000, 2000, 0, 0, 0, 0), "{:?}", failures(c, hurried));
    assert!(by(c, hurried, "cheap") > 100 && by(c, hurried, "dear") > 100, "{}", by(c, hurried, "dear"));
    assert_eq!(wrong(c, "t"), 0);
    // Nobody waits minutes for ten packs.
    run(c, "SELECT llm_batch.alter_model('cheap', requests_per_minute => 2)");
    let before = second.stats().admitted;
    let asked = "SELECT count(*) FROM t WHERE id <= 200 AND llm_classify(body, 'topic2') = want";
    assert_eq!(one(c, asked), 200);
    assert!(second.stats().admitted > before);
    // A deadline that comes while a job waits for the cheap one, which would take hours.
    run(c, "UPDATE t SET topic = NULL");
    let late = job(c, ", filter => 'id <= 1000'");
    let queued = "SELECT coalesce(sum(queued), 0)::bigint FROM llm_batch.activity WHERE model = 'fake-cheap'";
    wait_until("rows wait for the cheap one", PATIENCE, || one(c, queued), |n| *n > 0);
    run(c, &format!("SELECT llm_batch.alter_job({late}, deadline => '2 hours')"));
    assert_eq!(bed.done(late).counts(), (1000, 1000, 0, 0, 0, 0), "{:?}", failures(c, late));
    assert!(by(c, late, "dear") > 500, "{}", by(c, late, "dear"));
    run(c, "UPDATE t SET topic = NULL; BEGIN");
    let paused = job(c, "");
    let alter = |deadline: &str| format!("SELECT llm_batch.alter_job({paused}, deadline => {deadline})");
    run(c, &format!("SELECT llm_batch.pause({paused}); {}; COMMIT", alter("'2 hours'")));
    let is_set = format!("SELECT count(deadline) FROM llm_batch.progress WHERE job_id = {paused}");
    for (deadline, then) in [("NULL", 1), ("'infinity'", 0), ("'1 day'", 1)] {
        run(c, &alter(deadline));
        assert_eq!(one(c, &is_set), then, "{deadline}");
    }
    for (deadline, says) in [("'soon'", "interval"), ("'2 hours ago'", "not in the future")] {
        let (code, message, _, hint) = error(c, &alter(deadline));
        assert!(code == "22023" && format!("{message} {hint}").contains(says), "{code} {message} {hint}");
    }
    run(c, &format!("SELECT llm_batch.cancel({paused})"));
    run(c, "SELECT llm_batch.alter_model('cheap', reset => '{requests_per_minute}')");
    run(c, "SELECT llm_batch.alter_route('both', ARRAY['cheap', 'dear'])");
}

/// A role that asks a route needs USAGE on the server of each of its models.
fn every_server_must_be_allowed(bed: &Bed, c: &mut Client) {
    run(c, "CREATE ROLE half LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO half; GRANT ALL ON SCHEMA public TO half");
    let half = &mut bed.cluster.connect_as("postgres", "half");
    for sql in [
        "SELECT llm_classify('a text', 'topic2')",
        "SELECT llm_batch.create_route('mine', ARRAY['cheap', 'dear'])",
        "SELECT llm_batch.create_classifier('mine', '[\"a\", \"b\"]', 'both')",
    ] {
        let (code, message, ..) = error(half, sql);
        assert!(code == "42501" && message.contains("other"), "{sql}: {code} {message}");
    }
    run(c, "GRANT USAGE ON FOREIGN SERVER other TO half");
    run(half, "SELECT llm_batch.create_route('mine', ARRAY['cheap', 'dear']); SELECT llm_batch.drop_route('mine')");
    for sql in ["SELECT llm_batch.alter_route('both', policy => 'failover')", "SELECT llm_batch.drop_route('both')"] {
        assert_eq!(error(half, sql).0, "42501", "{sql}");
    }
    run(c, "SELECT llm_batch.set_owner('route', 'both', 'half')");
    run(half, "SELECT llm_batch.alter_route('both', policy => 'failover')");
}

/// A session is answered though the first refuses its key. Vectors come from the same model behind two servers.
fn sessions_and_vectors(bed: &Bed, c: &mut Client) {
    bed.provider.configure(|config| config.api_key = Some("another".into()));
    rows(c, "t", 7001..=7040);
    let right = "SELECT count(*) FROM t WHERE id > 7000 AND llm_classify(body, 'topic2') = want";
    assert_eq!(one(c, right), 40);
    let batch =
        "SELECT count(*) FROM llm_run_batch('SELECT id, body FROM t WHERE id > 7000', 'topic2') WHERE status = 'ok'";
    assert_eq!(one(c, batch), 40);
    for (name, server) in [("v1", "fake"), ("v2", "other")] {
        run(c, &format!("SELECT llm_batch.create_model('{name}', '{server}', 'same')"));
    }
    run(c, "SELECT llm_batch.create_route('vectors', ARRAY['v1', 'v2'])");
    run(c, "SELECT llm_batch.create_embedder('e', 'vectors', 16)");
    let vector: Vec<f32> = c.query_one("SELECT llm_embed('a text', 'e')", &[]).unwrap().get(0);
    assert_eq!(vector, embedding("a text", 16));
    let (code, message, detail, _) = error(c, "SELECT llm_batch.create_embedder('f', 'both', 16)");
    assert!(code == "22023" && message.contains("both") && detail.contains("fake-dear"), "{code} {message} {detail}");
}

/// A transaction that began before another made a route, and a task with a model, sees neither: a model of the same name
/// is not made, and the model is not dropped.
fn names_under_repeatable_read(bed: &Bed, c: &mut Client) {
    model(c, "used", "");
    for (makes, sql, code, says) in [
        (
            "SELECT llm_batch.create_route('twin', ARRAY['m'])",
            "SELECT llm_batch.create_model('twin', 'fake', 'x')",
            "42710",
            "alter_route",
        ),
        (
            "SELECT llm_batch.create_model('twin2', 'fake', 'x')",
            "SELECT llm_batch.create_route('twin2', ARRAY['m'])",
            "42710",
            "alter_model",
        ),
        (
            "SELECT llm_batch.create_scorer('uses', 'x', model => 'used')",
            "SELECT llm_batch.drop_model('used')",
            "2BP01",
            "uses",
        ),
        (
            "SELECT llm_batch.create_route('uses', ARRAY['used']), llm_batch.drop_task('uses')",
            "SELECT llm_batch.drop_model('used')",
            "2BP01",
            "uses",
        ),
    ] {
        let other = &mut bed.connect();
        run(other, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM llm_batch.model");
        run(c, makes);
        let (found, message, _, hint) = error(other, sql);
        assert!(found == code && format!("{message}\n{hint}").contains(says), "{sql}: {found} {message} {hint}");
    }
    run(
        c,
        "SELECT llm_batch.drop_route('uses'), llm_batch.drop_route('twin');
         SELECT llm_batch.drop_model(n) FROM unnest('{twin2,used}'::text[]) n",
    );
}

/// Who keeps a transaction open holds up those who want the same name, and nobody else.
fn names_in_open_transactions(bed: &Bed, c: &mut Client) {
    let other = &mut bed.connect();
    run(c, "BEGIN; SELECT llm_batch.create_model('open', server => 'fake', model => 'x')");
    run(other, "SET lock_timeout = '30s'");
    run(other, "SELECT llm_batch.create_model('mine', server => 'fake', model => 'x')");
    run(other, "SELECT llm_batch.create_route('ours', ARRAY['mine', 'dear'])");
    run(other, "SET lock_timeout = '100ms'");
    assert_eq!(error(other, "SELECT llm_batch.create_route('open', ARRAY['mine'])").0, "55P03");
    run(c, "COMMIT");
    run(other, "RESET lock_timeout");
    assert_eq!(error(other, "SELECT llm_batch.create_route('open', ARRAY['mine'])").0, "42710");
    run(c, "SELECT llm_batch.drop_route('ours'); SELECT llm_batch.drop_model(n) FROM unnest('{mine,open}'::text[]) n");
}

/// A deadline that is none.
const DEADLINE: &str = "SELECT llm_batch.backfill('t', 'body', 'topic', 'topic2', options => '{\"deadline\": 7}')";

fn what_is_wrong(c: &mut Client) {
    let deadline = |text: &str| DEADLINE.replace('7', &format!("\"{text}\""));
    let [soon, ago, past, never] = ["soon", "2 hours ago", "2001-01-01 00:00+00", "infinity"].map(deadline);
    run(c, "SELECT llm_batch.create_route('alone', ARRAY['m'], 'spread')");
    run(c, "SELECT llm_batch.create_model('free', 'fake', 'x'), llm_batch.create_route('free_too', ARRAY['free'])");
    run(c, "SELECT llm_batch.create_route('thrifty', ARRAY['m'], 'cheapest')");
    for (sql, code, says) in [
        ("SELECT llm_batch.create_route('x', NULL)", "22004", "models"),
        ("SELECT llm_batch.create_route('x', '{}')", "22023", "1 to 16"),
        ("SELECT llm_batch.create_route('x', ARRAY['m', NULL])", "22023", "1 to 16"),
        ("SELECT llm_batch.create_route('x', ARRAY['m', 'm'])", "22023", "twice"),
        ("SELECT llm_batch.create_route('x', ARRAY['m', 'nobody'])", "42704", "nobody"),
        ("SELECT llm_batch.create_route('x', ARRAY['both'])", "22023", "is a route"),
        ("SELECT llm_batch.create_route('x', ARRAY['m'], 'fastest')", "22023", "spread"),
        ("SELECT llm_batch.create_route('', ARRAY['m'])", "22023", "200"),
        ("SELECT llm_batch.create_route('m', ARRAY['m'])", "42710", "alter_model"),
        ("SELECT llm_batch.create_route('both', ARRAY['m'])", "42710", "alter_route"),
        ("SELECT llm_batch.create_model('both', 'fake', 'x')", "42710", "alter_route"),
        ("SELECT llm_batch.alter_route('nobody', policy => 'spread')", "42704", "create_route"),
        ("SELECT llm_batch.alter_route('both', policy => 'dearest')", "22023", "cheapest"),
        ("SELECT llm_batch.create_route('x', ARRAY['m', 'free'], 'cheapest')", "55000", "\"free\" has no prices"),
        ("SELECT llm_batch.alter_route('free_too', policy => 'cheapest')", "55000", "alter_model"),
        ("SELECT llm_batch.alter_route('thrifty', ARRAY['free'])", "55000", "input_price"),
        (DEADLINE, "22023", "interval"),
        (soon.as_str(), "22023", "\"soon\""),
        (ago.as_str(), "22023", "not in the future"),
        (past.as_str(), "22023", "not in the future"),
        (never.as_str(), "22023", "not in the future"),
        ("SELECT llm_run_batch('SELECT 1', 'topic2', options => '{\"deadline\": \"2 hours\"}')", "22023", "of a job"),
        ("SELECT llm_batch.drop_route('nobody')", "42704", "create_route"),
        ("SELECT llm_batch.drop_route('both')", "2BP01", "topic2"),
        ("SELECT llm_batch.drop_model('cheap')", "2BP01", "both"),
        ("SELECT llm_batch.drop_model('m')", "2BP01", "topic"),
        ("SELECT llm_batch.set_owner('path', 'both', 'postgres')", "22023", "route"),
    ] {
        let (found, message, detail, hint) = error(c, sql);
        let all = format!("{message}\n{detail}\n{hint}");
        assert!(found == code && all.contains(says), "{sql}\n{found} {all}");
    }
    run(
        c,
        "SELECT llm_batch.drop_route(n) FROM unnest('{alone,free_too,thrifty}'::text[]) n; SELECT llm_batch.drop_model('free')",
    );
}
