//! Keys: nowhere but where Postgres itself keeps them. And the way around what Postgres does with them: a file.

mod common;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::{Bed, LABELS, PATIENCE, backfill, backfill_with, classifier, error, labels_json, run, text, tickets};
use common::{progress, wait_status, warm};
use llm_fake_provider::{Config, Fault};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// Needs escapes everywhere, and has an end that needs none, by which it is found in whatever escapes.
const KEY: &str = r#"se/cret+Ab="c\d-tail9876543210"#;
const TAIL: &str = "tail9876543210";

/// Nobody has said the key.
#[track_caller]
fn silent(what: &str, said: &str) {
    if let Some(at) = said.find(TAIL) {
        let before: String = said[..at].chars().rev().take(200).collect::<Vec<_>>().into_iter().rev().collect();
        panic!("{what}: the key is in it, after {before}");
    }
}

/// The texts in which providers and proxies quote it.
fn echoes() -> Vec<String> {
    let json = serde_json::to_string(KEY).unwrap();
    let escaped = |f: &dyn Fn(char) -> String| -> String {
        KEY.chars().map(|c| if c.is_alphanumeric() || c == '-' { c.to_string() } else { f(c) }).collect()
    };
    let url = escaped(&|c| format!("%{:02X}", u32::from(c)));
    let html = escaped(&|c| format!("&#{};", u32::from(c)));
    let unicode = escaped(&|c| format!("\\u{:04x}", u32::from(c)));
    let twice = serde_json::to_string(&format!("upstream said {{\"error\": {json}}}")).unwrap();
    vec![
        format!("{{\"error\": {{\"message\": {json}, \"code\": {json}, \"type\": {json}}}}}"),
        format!("{{\"error\": {{\"message\": \"Incorrect API key provided: {unicode}.\"}}}}"),
        format!("{{\"error\": {{\"message\": \"GET /v1?key={url} failed\"}}}}"),
        format!("{{\"error\": {{\"message\": {twice}}}}}"),
        format!("<html><body>Authorization: Bearer {html}</body></html>"),
        format!("Bearer {KEY} is not known"),
        format!("{{\"error\": {{\"message\": \"{}...{TAIL}\"}}}}", &KEY[..8]),
    ]
}

/// All that any of our tables and views says, and what Postgres says of our processes.
#[track_caller]
fn all_rows(client: &mut Client) -> String {
    let tables: Vec<String> = client
        .query(
            "SELECT c.oid::regclass::text FROM pg_class c
              WHERE c.relnamespace = 'llm_batch'::regnamespace AND c.relkind IN ('r', 'v', 'm')",
            &[],
        )
        .unwrap()
        .iter()
        .map(|r| r.get(0))
        .collect();
    assert!(tables.len() >= 8, "{tables:?}");
    let more = ["pg_stat_activity", "pg_foreign_server", "pg_settings", "pg_stat_ssl", "tickets", "pg_locks"];
    let mut rows = String::new();
    for table in tables.iter().map(String::as_str).chain(more) {
        let sql = format!("SELECT coalesce(string_agg(t::text, E'\\n'), '') FROM {table} t");
        rows.push_str(&text(client, &sql));
    }
    rows
}

/// Command lines, titles and environments of a server's processes.
fn processes(postmaster: u32) -> String {
    let mut said = String::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<u32>().ok());
        if parent == Some(postmaster) || entry.file_name().to_str() == Some(&postmaster.to_string()) {
            for file in ["cmdline", "comm", "environ"] {
                let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
                said.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
    }
    said
}

#[test]
fn a_key_is_told_nowhere() {
    let builder = Cluster::builder("keys_nowhere")
        .conf("log_min_messages", "debug5")
        .conf("log_error_verbosity", "verbose")
        .conf("log_connections", "on")
        .conf("debug_print_plan", "on");
    let bed = Bed::build(builder, Config { api_key: Some(KEY.to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=40);
    run(client, "DROP USER MAPPING FOR PUBLIC SERVER fake");
    // Postgres itself would log this one, with its plan: not what is tested here.
    run(client, "SET log_min_messages = 'panic'");
    let quoted = KEY.replace('\'', "''");
    run(client, &format!("CREATE USER MAPPING FOR PUBLIC SERVER fake OPTIONS (api_key '{quoted}')"));
    run(client, "RESET log_min_messages");
    // The session's last statement is seen until it says another one.
    run(client, "SELECT");
    let ask = "SET client_min_messages = debug5; SELECT llm_classify('#r000001:bug#', 'topic')";
    let output = bed.cluster.psql("postgres", ask);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("bug"), "{output:?}");
    silent("psql", &String::from_utf8_lossy(&output.stderr));
    let job = backfill(client, "tickets");
    bed.done(job);

    classifier(client, "brief", &labels_json(&LABELS), "m", "{\"reuse\": false, \"max_attempts\": 1}");
    let echoes = echoes();
    // A 429 or 500 is tried again for long, and holds up what follows: few of them, at the end.
    let at_once = echoes.iter().flat_map(|echo| [400, 401, 402, 403, 404, 413, 422].map(|status| (status, echo)));
    let in_time = echoes.iter().step_by(3).flat_map(|echo| [200, 429, 500].map(|status| (status, echo)));
    let mut jobs = 0;
    for (status, echo) in at_once.chain(in_time) {
        bed.provider.configure(|c| c.faults = vec![(Fault::Status(status, echo.clone()), 1.0)]);
        let patience = if matches!(status, 200 | 429 | 500) { 1500 } else { 60_000 };
        let ask = format!(
            "SET client_min_messages = debug5; SET statement_timeout = {patience};
             SELECT llm_classify('#r000001:bug#', 'brief')"
        );
        let output = bed.cluster.psql("postgres", &ask);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        silent(&format!("psql, status {status}, {echo}"), &said);
        assert!(said.contains("ERROR") || said.contains("WARNING"), "{status}: {said}");
        if matches!(status, 400 | 401 | 402 | 404) && *echo == echoes[0] {
            bed.provider.configure(|c| c.faults.clear());
            run(client, "UPDATE tickets SET topic = NULL");
            warm(client, "tickets");
            bed.provider.configure(|c| c.faults = vec![(Fault::Status(status, echo.clone()), 1.0)]);
            let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 20}'");
            let p = wait_until("the job has ended", PATIENCE, || progress(client, job), |p| p.status != "running");
            jobs += 1;
            assert!(p.last_error.is_some() || p.failed > 0, "{p:?}");
            run(client, &format!("SELECT llm_batch.cancel({job})"));
            wait_until("it is over", PATIENCE, || progress(client, job).status, |s| s != "running" && s != "paused");
        }
        silent("a row", &all_rows(client));
    }
    assert_eq!(jobs, 4);
    let there = format!("https://x.example/?key={KEY}");
    bed.provider.configure(|c| c.faults = vec![(Fault::Redirect(there), 1.0)]);
    let (_, message, detail, hint) = error(client, "SELECT llm_classify('x', 'topic')");
    silent("a redirect", &format!("{message}{detail}{hint}"));
    silent("a row", &all_rows(client));
    silent("a process", &processes(bed.cluster.pid()));
    let log = bed.cluster.log();
    assert!(log.contains("DEBUG:  ") && log.contains("[redacted]"), "the log says too little to tell");
    silent("the log", &log);
}

/// Makes `path` a file that the server can read.
fn write(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

const ASK: &str = "SELECT llm_classify('#r000001:bug#', 'topic')";

/// Postgres tells a key in a user mapping in its own ways, and can't tell one in a file.
#[test]
fn a_key_in_a_file_is_not_what_postgres_tells() {
    let builder = Cluster::builder("keys_file").conf("log_statement", "all").conf("log_min_duration_statement", "0");
    let bed = Bed::build(builder, Config { api_key: Some(KEY.to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=5);
    let file = bed.cluster.socket_dir().join("key");
    write(&file, &format!("{KEY}\n"));
    run(client, "DROP USER MAPPING FOR PUBLIC SERVER fake");
    run(client, &format!("ALTER SERVER fake OPTIONS (ADD api_key_file '{}')", file.display()));
    assert_eq!(text(client, ASK), "bug");
    silent("a row", &all_rows(client));
    let mappings = "SELECT count(*)::text || coalesce(string_agg(m::text, ''), '') FROM pg_user_mappings m";
    silent("pg_user_mappings", &text(client, mappings));
    silent("a process", &processes(bed.cluster.pid()));
    silent("the log", &bed.cluster.log());
    // With a user mapping it would have been in the log and in the catalog, for superusers.
    run(client, &format!("CREATE USER MAPPING FOR PUBLIC SERVER fake OPTIONS (api_key '{KEY}')"));
    assert!(text(client, mappings).contains(TAIL));
    assert!(bed.cluster.log().contains(TAIL));
}

#[test]
fn what_a_key_file_may_be() {
    let bed = Bed::with("keys_rules", Config { api_key: Some("sk-first".to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    run(client, "DROP USER MAPPING FOR PUBLIC SERVER fake; ALTER SERVER fake OPTIONS (ADD api_key_file '/nowhere')");
    let point = |client: &mut Client, path: &str| {
        run(client, &format!("ALTER SERVER fake OPTIONS (SET api_key_file '{path}')"));
    };
    // Relative to what, would be the question.
    for path in ["key", "./key", "../key", "~/key"] {
        let (code, message, ..) = error(client, &format!("ALTER SERVER fake OPTIONS (SET api_key_file '{path}')"));
        assert_eq!(code, "HV024", "{path}: {message}");
        assert!(message.contains("absolute"), "{message}");
    }
    let dir = bed.cluster.socket_dir();
    let at = |name: &str| dir.join(name);
    write(&at("empty"), " \n\n");
    write(&at("two"), "sk-secret-line-one\nsk-secret-line-two\n");
    write(&at("binary"), "sk-secret\u{1}");
    write(&at("umlaut"), "sk-secret-ü");
    write(&at("large"), &"sk-secret".repeat(1000));
    write(&at("closed"), "sk-secret");
    fs::set_permissions(at("closed"), fs::Permissions::from_mode(0o000)).unwrap();
    let fifo = CString::new(at("fifo").to_str().unwrap()).unwrap();
    // SAFETY: a path that ends in a zero byte and outlives the call.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o666) }, 0);
    // A read from a pipe without a writer would wait for ever.
    run(client, "SET statement_timeout = '30 s'");
    let names =
        ["empty", "two", "binary", "umlaut", "large", "closed", "fifo", "missing"].map(|n| at(n).display().to_string());
    for path in
        names.iter().map(String::as_str).chain(["/", "/tmp", "/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem"])
    {
        point(client, path);
        let (code, message, detail, hint) = error(client, ASK);
        assert_eq!(code, "58P01", "{path}: {message}");
        assert!(detail.contains(&format!("\"{path}\"")), "{path}: {detail}");
        assert!(!format!("{message}{detail}{hint}").contains("secret"), "{path}: {detail}");
    }
    // A link is followed, as secrets are mounted; the content counts anew each time.
    write(&at("one"), "  sk-first\r\n");
    std::os::unix::fs::symlink(at("one"), at("link")).unwrap();
    point(client, &at("link").display().to_string());
    assert_eq!(text(client, ASK), "bug");
    bed.provider.configure(|c| c.api_key = Some("sk-second".to_owned()));
    assert_eq!(error(client, ASK).0, "28000");
    write(&at("one"), "sk-second");
    assert_eq!(text(client, ASK), "bug");
    assert!(!bed.cluster.log().contains("secret"), "{}", bed.cluster.log());
}

/// The key is changed in the middle of a job; first the provider is told, then the file.
#[test]
fn a_changed_file_holds_for_the_next_request_of_a_job() {
    let bed = Bed::with("keys_changed", Config { api_key: Some("sk-first".to_owned()), ..Config::default() });
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=3_000);
    let file = bed.cluster.socket_dir().join("key");
    write(&file, "sk-first");
    run(client, "DROP USER MAPPING FOR PUBLIC SERVER fake");
    run(client, &format!("ALTER SERVER fake OPTIONS (ADD api_key_file '{}')", file.display()));
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    // Gone for a moment, as when it is replaced in two steps: the job waits to be told.
    fs::remove_file(&file).unwrap();
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("auth"), "{p:?}");
    assert!(p.last_error.as_ref().is_some_and(|e| e.contains("/key\"")), "{p:?}");
    let before = p.done;
    bed.provider.configure(|c| c.api_key = Some("sk-second".to_owned()));
    write(&file, "sk-second");
    run(client, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (3_000, 3_000, 0, 0, 0, 0));
    assert!(before < 3_000);
    assert_eq!(common::wrong(client, "tickets"), 0);
}
