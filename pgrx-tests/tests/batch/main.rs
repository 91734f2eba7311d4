//! Plain SQL is batched: what the node "LLM Batch" asks, of which rows, in how many requests.

#[path = "../common/mod.rs"]
mod common;

mod cursors;
mod plans;
mod requests;
mod rows;
mod wrong;

use std::collections::BTreeSet;

use common::{Bed, PATIENCE, one, run, text};
use pg_llm_batch_e2e::wait_until;
use postgres::{Client, SimpleQueryMessage};

/// A plan, a line each.
fn explain(c: &mut Client, options: &str, sql: &str) -> String {
    let messages = c.simple_query(&format!("EXPLAIN ({options}) {sql}")).unwrap();
    let line = |m: &SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => row.get(0).map(|line| format!("{line}\n")),
        _ => None,
    };
    messages.iter().filter_map(line).collect()
}

/// Waits until nothing is under way any more: a statement that ends early leaves requests behind.
fn settle(bed: &Bed) {
    let c = &mut bed.connect();
    let under_way = "SELECT coalesce(sum(queued + in_flight_requests), 0)::bigint FROM llm_batch.activity";
    wait_until("nothing is under way", PATIENCE, || one(c, under_way), |n| *n == 0);
    wait_until("nothing is being answered", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 0);
    // A request that was given up on its way comes before this one, or never.
    text(c, "SELECT llm_classify('#r777777:bug# ' || clock_timestamp(), 'topic')");
}

fn count_anew(bed: &Bed) {
    settle(bed);
    bed.provider.reset_stats();
}

/// The ids of the rows that are asked about by a statement, which are asked about once.
fn asked(bed: &Bed, c: &mut Client, sql: &str) -> BTreeSet<i64> {
    count_anew(bed);
    run(c, sql);
    let rows = bed.provider.stats().rows;
    assert!(rows.values().all(|r| r.asked == 1), "{sql}: {rows:?}");
    rows.keys().map(|id| id.parse().unwrap()).collect()
}

/// A table `t` of texts whose topic is `bug` for every fourth row, with a question that every third answers with yes.
/// Texts carry the id, questions the id and a 9 before it.
fn questions(c: &mut Client, rows: i64) {
    run(
        c,
        &format!(
            "SET llm_batch.default_model = 'm';
             CREATE TABLE t (id int PRIMARY KEY, body text, ask text, topic text);
             INSERT INTO t SELECT i, format('#r%s:%s#', i, CASE WHEN i % 4 = 0 THEN 'bug' ELSE 'spam' END),
                    format('#r9%s:%s#', lpad(i::text, 6, '0'), CASE WHEN i % 3 = 0 THEN 'yes' ELSE 'no' END)
               FROM generate_series(1, {rows}) i;
             ANALYZE t"
        ),
    );
}

const ASK: i64 = 9_000_000;
