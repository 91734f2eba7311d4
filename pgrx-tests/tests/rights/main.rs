//! Rights: Postgres' own hold, also in jobs; a job's worker has its owner's rights and no more.

#[path = "../common/mod.rs"]
mod common;

mod default_model;
mod gone;
mod login;
mod objects;
mod owner;
mod superuser;

use common::{Bed, PATIENCE, backfill_with, error, run, tickets, warm};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

/// The statement fails with 42501 and says this.
#[track_caller]
fn denied(client: &mut Client, sql: &str, says: &str) {
    let (code, message, detail, hint) = error(client, sql);
    assert_eq!(code, "42501", "{sql}\n{message}");
    let all = format!("{message}\n{detail}\n{hint}");
    assert!(all.contains(says), "{sql}\n{all}");
}

const BACKFILL: &str = "SELECT llm_batch.backfill('tickets', input => 'body', target => 'topic', task => 'topic')";

/// Roles `alice` and `bob` with USAGE on the server, and `tickets` of `alice`.
#[track_caller]
fn roles(bed: &Bed, rows: i64) -> Client {
    let mut client = bed.connect();
    tickets(&mut client, "tickets", 1..=rows);
    run(
        &mut client,
        "CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN;
         GRANT USAGE ON FOREIGN SERVER fake TO alice, bob;
         ALTER TABLE tickets OWNER TO alice;",
    );
    client
}

/// A job of `alice`, 5 rows a request, 2 at a time, whose first requests are held back.
#[track_caller]
fn held_job(bed: &Bed, client: &mut Client) -> i64 {
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    warm(client, "tickets");
    bed.provider.hold();
    let mut alice = bed.cluster.connect_as("postgres", "alice");
    let job = backfill_with(&mut alice, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    job
}
