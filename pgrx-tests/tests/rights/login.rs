//! Owners that may not log in, or not use the server any more.

use std::time::Duration;

use pg_llm_batch_e2e::wait_until;

use super::{BACKFILL, held_job, roles};
use crate::common::{self, Bed, PATIENCE, error, one, progress, run, text, tickets, wait_status};

#[test]
fn an_owner_that_loses_usage_or_login_in_the_middle() {
    let bed = Bed::new("rights_login");
    let client = &mut roles(&bed, 2000);
    let job = held_job(&bed, client);
    // Noticed with the next page.
    run(client, "REVOKE USAGE ON FOREIGN SERVER fake FROM alice");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    assert!(p.last_error.unwrap().contains("foreign server fake"));
    assert!(p.left > 0, "{}", p.left);
    run(
        client,
        &format!(
            "GRANT USAGE ON FOREIGN SERVER fake TO alice; ALTER ROLE alice NOLOGIN; SELECT llm_batch.resume({job})"
        ),
    );
    let p = wait_until(
        "the job says that its owner can't log in",
        PATIENCE,
        || progress(client, job),
        |p| p.status == "paused" && p.last_error.as_ref().is_some_and(|e| e.contains("log in")),
    );
    assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
    let (code, message, detail, hint) = error(client, BACKFILL.replace("'topic', task", "'want', task").as_str());
    assert!(code == "42809" || code == "28000", "{code} {message} {detail} {hint}");
    run(client, &format!("ALTER ROLE alice LOGIN; SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).counts(), (2000, 2000, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    // Gone altogether: a role that owns a job but nothing else may be dropped.
    assert!(bed.provider.stats().rows.values().all(|r| r.asked <= 2));
}

/// A session that is open goes on when its role may not log in any more; a job does not.
#[test]
fn an_owner_that_may_not_log_in_any_more() {
    let bed = Bed::new("rights_valid");
    let client = &mut roles(&bed, 4_000);
    let job = held_job(&bed, client);
    for (change, says, back) in [
        ("ALTER ROLE alice NOLOGIN", "log in", "ALTER ROLE alice LOGIN"),
        ("ALTER ROLE alice VALID UNTIL '2001-01-01'", "VALID UNTIL", "ALTER ROLE alice VALID UNTIL 'infinity'"),
        ("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC", "connect", "GRANT CONNECT ON DATABASE postgres TO PUBLIC"),
    ] {
        let before = one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL");
        run(client, change);
        bed.provider.release();
        let p = wait_status(client, job, "paused");
        assert_eq!(p.reason.as_deref(), Some("owner"), "{p:?}");
        assert!(p.last_error.clone().unwrap_or_default().contains(says), "{p:?}");
        let more = one(client, "SELECT count(*) FROM tickets WHERE topic IS NOT NULL") - before;
        assert!(more < 1_200, "{change}: {more} rows after it");
        bed.provider.hold();
        run(client, &format!("{back}; SELECT llm_batch.resume({job})"));
        wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    }
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (4_000, 4_000, 0, 0, 0, 0));
}

/// Its job is paused and cancelled, and has a budget: nobody is started for that who can't come up, again and again.
#[test]
fn a_job_whose_owner_cannot_log_in_is_left_alone() {
    let bed = Bed::new("rights_left_alone");
    let client = &mut roles(&bed, 100);
    tickets(client, "his", 1_001..=1_005);
    run(client, "ALTER TABLE his OWNER TO bob");
    let starts = || bed.cluster.log().matches("role \"alice\" is not permitted to log in").count();
    // Later than anything that is to start now.
    let job_of_bob = || {
        run(&mut bed.connect(), "UPDATE his SET topic = NULL");
        let job = one(&mut bed.cluster.connect_as("postgres", "bob"), &BACKFILL.replace("'tickets'", "'his'"));
        bed.done(job);
        job
    };
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    let job = held_job(&bed, client);
    common::pause_held(&bed, client, job);
    wait_until("its worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    run(client, "ALTER ROLE alice NOLOGIN");
    run(client, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1000000)"));
    let old = job_of_bob();
    assert_eq!(starts(), 0);
    // Resumed, and paused before anyone looks: one start is in vain. The search that follows it finds an old job to forget.
    run(
        client,
        &format!(
            "BEGIN; UPDATE llm_batch.job_state SET updated_at = now() - interval '91 days' WHERE job_id = {old};
             SELECT llm_batch.resume({job}); SELECT llm_batch.pause({job}); COMMIT"
        ),
    );
    wait_until("one was started", PATIENCE, starts, |n| *n == 1);
    let is_there = format!("SELECT count(*) FROM llm_batch.progress WHERE job_id = {old}");
    wait_until("a search has looked into it", PATIENCE, || one(client, &is_there), |n| *n == 0);
    bed.provider.configure(|c| c.latency.base = Duration::from_secs(3));
    job_of_bob();
    assert_eq!(starts(), 1);
    assert_eq!(text(client, &format!("SELECT llm_batch.cancel({job})")), "t");
    job_of_bob();
    assert_eq!((starts(), progress(client, job).status.as_str()), (1, "cancelled"));
}

#[test]
fn an_owner_without_login() {
    let bed = Bed::new("rights_nologin");
    let client = &mut roles(&bed, 10);
    run(client, "ALTER ROLE alice NOLOGIN");
    let (code, message, _, hint) = error(client, BACKFILL);
    assert_eq!(code, "28000");
    assert!(message.contains("\"alice\"") && hint.contains("ALTER ROLE alice LOGIN"), "{message} {hint}");
    // A group's table, by a member: the job is the member's own.
    run(client, "GRANT alice TO bob");
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let job = one(bob, BACKFILL);
    assert_eq!(text(client, &format!("SELECT owner_name FROM llm_batch.job WHERE id = {job}")), "bob");
    bed.done(job);
    run(client, "UPDATE tickets SET topic = NULL");
    let (code, ..) = error(bob, &format!("SET ROLE alice; {BACKFILL}"));
    assert_eq!(code, "28000");
    assert_eq!(bed.provider.stats().rows.values().map(|r| r.asked).max(), Some(1));
}
