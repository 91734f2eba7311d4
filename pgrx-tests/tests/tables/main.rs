//! Tables, keys, targets, inputs and texts of all kinds.

#[path = "../common/mod.rs"]
mod common;

mod columns;
mod keys;
mod texts;
mod triggers;

use common::*;
use postgres::Client;

/// Runs a script and then a job given by the arguments of `backfill()`; its progress when it is done.
#[track_caller]
fn fill(bed: &Bed, c: &mut Client, script: &str, arguments: &str) -> (i64, Progress) {
    run(c, script);
    bed.provider.reset_stats();
    let job = one(c, &format!("SELECT llm_batch.backfill({arguments})"));
    let p = bed.done(job);
    (job, p)
}

#[track_caller]
fn all_done(p: &Progress, rows: i64) {
    assert_eq!(p.counts(), (rows, rows, 0, 0, 0, 0), "{p:?}");
}

/// An expression that makes a text with the marker of row `n`.
fn marked(n: &str, label: &str) -> String {
    format!("concat('Text #r', lpad(({n})::text, 6, '0'), ':', {label}, '#')")
}

/// The label that row `n` is to get, as an expression.
fn label(n: &str) -> String {
    format!("('{{{}}}'::text[])[1 + ({n}) % 8]", LABELS.join(","))
}
