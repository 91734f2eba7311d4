//! No key is ever shown.

use llm_fake_provider::Fault;
use pg_llm_batch_e2e::wait_until;

use super::{KEY, call};
use crate::common::{Bed, PATIENCE, backfill, backfill_with, error, failures, progress, run, text, tickets};

#[test]
fn keys_are_never_shown() {
    // Keys of other forms than "sk-…", long and short, and one with quotes in it.
    let long = format!("sk-proj-{}", "aB3xY9".repeat(26));
    let keys = [
        KEY,
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
        "Zx9-short",
        "q\"uo'te\\d-0123456789",
        "c2Vj/cmV0+a2V5/MDEy==",
        long.as_str(),
    ];
    let bed = Bed::new("errors_keys");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=20);
    let mut shown = String::new();
    for (i, key) in keys.iter().enumerate() {
        let quoted = key.replace('\'', "''");
        run(client, &format!("ALTER USER MAPPING FOR PUBLIC SERVER fake OPTIONS (SET api_key '{quoted}')"));
        let json = |text: &str| serde_json::json!({ "error": { "message": text } }).to_string();
        let middle = "word ".repeat(50);
        // Long texts are cut; no part of a key must be left at the end.
        let cut = (140..=300).step_by(20).map(|n| json(&format!("{}'{key}'", "x".repeat(n))));
        let mut bodies = vec![
            json(&format!("Incorrect API key provided: {key}.")),
            json(&format!("Bearer {key}")),
            json(&format!("key=\"{key}\", {middle}")),
            json(&format!("({key})")),
            format!("<html>{key}</html>"),
            format!("{{\"message\": \"{key}\"}}"),
            (*key).to_owned(),
            json(key),
            // As some servers write JSON.
            json(&format!("the key {key} is wrong")).replace('/', "\\/"),
            json("#").replace('#', &key.chars().map(|c| format!("\\u{:04x}", u32::from(c))).collect::<String>()),
        ];
        bodies.extend(cut);
        for (j, body) in bodies.iter().enumerate() {
            for status in [401, 400, 404, 429, 500, 200] {
                if [500, 200].contains(&status) && j > 1 {
                    // These wait and try again.
                    continue;
                }
                bed.provider.configure(|c| c.faults = vec![(Fault::Status(status, body.clone()), 1.0)]);
                if status == 429 {
                    // The probe is content with that, and rows wait: a job, to be cancelled.
                    if j > 1 {
                        continue;
                    }
                    let before = bed.provider.stats().requests;
                    let job = backfill(client, "tickets");
                    wait_until("refused", PATIENCE, || bed.provider.stats().requests, |n| *n >= before + 3);
                    shown += &text(client, "SELECT string_agg(a::text, ' ') FROM llm_batch.activity a");
                    run(client, &format!("SELECT llm_batch.cancel({job})"));
                    continue;
                }
                let (_, message, detail, hint) = error(client, &call("relation => 'tickets'"));
                shown += &format!("{i}/{j}/{status}: {message}\n{detail}\n{hint}\n");
            }
        }
        // In a job that fails, and one that pauses; and rows that fail.
        bed.provider.script([None, None]);
        bed.provider.configure(|c| c.faults = vec![(Fault::Status(400, bodies[0].clone()), 1.0)]);
        run(client, "UPDATE tickets SET topic = NULL");
        let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 5}'");
        wait_until(
            "the job has ended",
            PATIENCE,
            || progress(client, job),
            |p| ["done", "failed"].contains(&p.status.as_str()),
        );
        shown += &format!("{:?}", failures(client, job));
    }
    for view in [
        "progress",
        "activity",
        "failure",
        "job",
        "job_state",
        "model",
        "list_price",
        "task",
        "task_history",
        "row_failure",
    ] {
        shown += &text(client, &format!("SELECT coalesce(string_agg(x::text, ' '), '') FROM llm_batch.{view} x"));
    }
    shown +=
        &text(client, "SELECT string_agg(a::text, ' ') FROM pg_stat_activity a WHERE backend_type LIKE 'llm_batch%'");
    let log = bed.cluster.log();
    for key in keys {
        for (place, all) in [("the views and errors", &shown), ("the log", &log)] {
            // Seven characters of it are a part that is worth something.
            let part: String = key.chars().take(7).collect();
            let at = all.find(&part).map(|at| {
                let start = all.floor_char_boundary(at.saturating_sub(200));
                all[start..all.ceil_char_boundary((at + 60).min(all.len()))].to_owned()
            });
            assert_eq!(at, None, "a part of the key {key} is in {place}");
        }
    }
}
