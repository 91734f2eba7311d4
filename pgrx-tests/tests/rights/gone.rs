//! Owners and servers that go, and jobs that are forgotten.

use pg_llm_batch_e2e::wait_until;
use postgres::Client;

use super::{BACKFILL, denied, roles};
use crate::common::{self, Bed, PATIENCE, backfill_with, error, one, progress, run, text, wait_status, warm};

/// Jobs know a task by its name: who takes the name of one that was dropped would get the rows of others.
#[test]
fn the_name_of_a_dropped_task() {
    let bed = Bed::new("rights_names");
    let client = &mut roles(&bed, 10);
    run(client, "CREATE ROLE carol LOGIN; GRANT USAGE ON FOREIGN SERVER fake TO carol");
    let connect = |role: &str| bed.cluster.connect_as("postgres", role);
    let (alice, bob, carol) = (&mut connect("alice"), &mut connect("bob"), &mut connect("carol"));
    let create =
        &format!("SELECT llm_batch.create_classifier('named', '{}', 'm')", common::labels_json(&common::LABELS));
    run(bob, create);
    let start = "SELECT llm_batch.backfill('tickets', 'body', 'topic', 'named')";
    let job = one(alice, start);
    wait_status(client, job, "done");
    run(bob, "SELECT llm_batch.drop_task('named')");
    denied(carol, create, "was another role's");
    run(client, &format!("SELECT llm_batch.retry_failed({job})"));
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.task WHERE name = 'named'"), 0);
    // Its owner's again, and then a superuser's.
    run(bob, create);
    run(bob, "SELECT llm_batch.drop_task('named')");
    run(client, "DROP OWNED BY bob; DROP ROLE bob");
    denied(carol, create, "was another role's");
    run(client, create);
    assert_eq!(one(client, "SELECT version::bigint FROM llm_batch.task WHERE name = 'named'"), 3);
}

/// A job's owner is dropped; the table is another's now. Models and servers change hands and names meanwhile.
#[test]
fn owners_and_servers_that_go() {
    let bed = Bed::new("rights_owners");
    let client = &mut roles(&bed, 200);
    // A job of bob's on alice's table, which goes on under a role that owns nothing else.
    run(
        client,
        "GRANT SELECT, UPDATE ON tickets TO bob; CREATE ROLE carol LOGIN; ALTER TABLE tickets ADD by text;
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.by := current_user; RETURN NEW; END $$;
         CREATE TRIGGER note BEFORE UPDATE ON tickets FOR EACH ROW EXECUTE FUNCTION note();
         SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)",
    );
    warm(client, "tickets");
    bed.provider.hold();
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    run(bob, "SELECT llm_batch.create_model('his', 'fake', 'x')");
    let job = backfill_with(bob, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);

    // The table's owner may pause it, and no more.
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    assert_eq!(text(alice, &format!("SELECT llm_batch.pause({job})")), "t");
    assert_eq!(progress(alice, job).reason.as_deref(), Some("user"));
    denied(alice, &format!("SELECT llm_batch.resume({job})"), "must be owner of job");
    denied(alice, &format!("SELECT llm_batch.alter_job({job}, max_tokens => 1000000)"), "must be owner of job");
    assert_eq!(text(bob, &format!("SELECT llm_batch.resume({job})")), "t");

    // Given to another role while it runs: the table's owner, and nobody who is not asked.
    denied(alice, &format!("SELECT llm_batch.set_owner({job}, 'alice')"), "must be owner of job");
    denied(bob, &format!("SELECT llm_batch.set_owner({job}, 'alice')"), "SET ROLE \"alice\"");
    denied(client, &format!("SELECT llm_batch.set_owner({job}, 'postgres')"), "superuser");
    // Not to a superuser even if the table is his: bob wrote the expressions.
    run(client, "ALTER TABLE tickets OWNER TO postgres");
    denied(client, &format!("SELECT llm_batch.set_owner({job}, 'postgres')"), "no superuser owned");
    run(client, "ALTER TABLE tickets OWNER TO alice");
    run(client, &format!("SELECT llm_batch.set_owner({job}, 'alice')"));
    bed.provider.release();
    let p = bed.done(job);
    assert_eq!(p.counts(), (200, 200, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, "tickets"), 0);
    assert_eq!(text(client, "SELECT owner FROM llm_batch.progress"), "alice");
    // Rows that were under way were written as bob.
    assert_eq!(one(client, "SELECT count(*) FROM tickets WHERE by = 'alice'"), 190);
    assert_eq!(bed.provider.stats().rows.values().map(|r| r.asked).max(), Some(1), "what was sent was asked again");

    // Bob again: the table's owner may cancel it.
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.hold();
    let job = backfill_with(bob, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    assert_eq!(text(alice, &format!("SELECT llm_batch.cancel({job})")), "t");
    assert_eq!(progress(alice, job).status, "cancelled");
    bed.provider.release();
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("its worker has gone", PATIENCE, || one(client, workers), |n| *n == 0);
    assert!(common::left(client, "tickets") > 0);

    // The owner is dropped in the middle.
    bed.provider.hold();
    let job = backfill_with(bob, "tickets", "options => '{\"max_rows_per_request\": 5}'");
    wait_until("two requests are in flight", PATIENCE, || bed.provider.stats().in_flight, |n| *n == 2);
    run(client, "DROP OWNED BY bob; DROP ROLE bob");
    bed.provider.release();
    let p = wait_status(client, job, "paused");
    assert_eq!((p.reason.as_deref(), p.last_error.as_deref()), (Some("owner"), Some("the job's owner was dropped")));
    assert_eq!(text(client, &format!("SELECT owner FROM llm_batch.progress WHERE job_id = {job}")), "bob");
    let e = error(client, &format!("SELECT llm_batch.resume({job})"));
    assert!(e.0 == "28000" && e.1.contains("dropped") && e.3.contains("set_owner"), "{e:?}");
    // The table's owner sees it, may take it over or end it; others may not.
    let carol = &mut bed.cluster.connect_as("postgres", "carol");
    for call in ["resume({})", "cancel({})", "pause({})", "forget({})", "set_owner({}, 'carol')"] {
        denied(carol, &format!("SELECT llm_batch.{}", call.replace("{}", &job.to_string())), "must be owner");
    }
    denied(alice, &format!("SELECT llm_batch.resume({job})"), "Its owner was dropped");
    let e = error(alice, BACKFILL);
    assert!(e.0 == "55006" && e.1.contains(&format!("job {job}")), "{e:?}");
    run(alice, &format!("SELECT llm_batch.set_owner({job}, 'alice'); SELECT llm_batch.resume({job})"));
    bed.done(job);
    assert_eq!((common::wrong(client, "tickets"), common::left(client, "tickets")), (0, 0));

    // His model: nobody's but a superuser's, who gives it to carol.
    denied(carol, "SELECT llm_batch.alter_model('his', requests_per_minute => 5)", "Its owner was dropped");
    run(client, "SELECT llm_batch.set_owner('model', 'his', 'carol')");
    run(carol, "SELECT llm_batch.alter_model('his', requests_per_minute => 5)");
    denied(carol, "SELECT llm_batch.set_owner('model', 'his', 'alice')", "SET ROLE");
    let e = error(client, "SELECT llm_batch.set_owner('server', 'fake', 'alice')");
    assert_eq!(e.0, "22023", "{e:?}");

    // A server is followed by its number: renamed, it is the same; of the same name, another one.
    run(client, "ALTER SERVER fake RENAME TO real");
    assert_eq!(text(client, "SELECT llm_classify('#r000001:bug#', 'topic')"), "bug");
    let url = bed.provider.base_url();
    run(
        client,
        &format!(
            "DROP SERVER real CASCADE; CREATE SERVER real FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{url}');
             CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{url}')"
        ),
    );
    let asked = bed.provider.stats().requests;
    let e = error(client, "SELECT llm_classify('#r000002:bug#', 'topic')");
    assert!(e.0 == "42704" && e.1.contains("of model \"m\" does not exist") && e.3.contains("alter_model"), "{e:?}");
    assert_eq!(bed.provider.stats().requests, asked);
    run(client, "SELECT llm_batch.alter_model('m', server => 'real')");
    assert_eq!(text(client, "SELECT llm_classify('#r000002:bug#', 'topic')"), "bug");
}

/// Jobs that have ended are forgotten when someone says so, or after a while; the log keeps their accounts.
#[test]
fn jobs_that_are_forgotten() {
    let mut bed = Bed::new("rights_forget");
    let client = &mut roles(&bed, 20);
    run(
        client,
        "GRANT SELECT, UPDATE ON tickets TO bob; UPDATE tickets SET body = repeat('word ', 100000) WHERE id = 1",
    );
    let bob = &mut bed.cluster.connect_as("postgres", "bob");
    let mut again = || {
        run(&mut bed.connect(), "UPDATE tickets SET topic = NULL");
        let job = one(bob, BACKFILL);
        assert_eq!(bed.done(job).counts(), (20, 19, 1, 0, 0, 0));
        job
    };
    let (first, second, old) = (again(), again(), again());
    run(client, &format!("SELECT llm_batch.forget({first})"));
    // The table's owner may, too.
    run(&mut bed.cluster.connect_as("postgres", "alice"), &format!("SELECT llm_batch.forget({second})"));
    let left = |client: &mut Client| {
        text(
            client,
            "SELECT concat_ws('; ', (SELECT string_agg(job_id::text, ' ') FROM llm_batch.progress), (SELECT string_agg(job_id::text, ' ') FROM llm_batch.failure))",
        )
    };
    assert_eq!(left(client), format!("{old}; {old}"));
    run(client, "UPDATE tickets SET topic = NULL");
    bed.provider.hold_after(1);
    let open = one(bob, BACKFILL);
    run(client, &format!("SELECT llm_batch.pause({open})"));
    let e = error(client, &format!("SELECT llm_batch.forget({open})"));
    assert!(e.0 == "55000" && e.3.contains("cancel"), "{e:?}");
    bed.provider.release();
    wait_status(client, open, "paused");
    // Ended jobs older than the setting go with the next search, and only these.
    run(client, "UPDATE llm_batch.job_state SET updated_at = now() - interval '89 days'");
    bed.cluster.restart();
    let client = &mut bed.connect();
    let searches = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch finder'";
    wait_until("the search at the start is over", PATIENCE, || one(client, searches), |n| *n == 0);
    assert_eq!(
        text(client, "SELECT string_agg(job_id::text, ' ' ORDER BY 1) FROM llm_batch.progress"),
        format!("{old} {open}")
    );
    run(client, "UPDATE llm_batch.job_state SET updated_at = now() - interval '91 days'");
    bed.cluster.restart();
    let client = &mut bed.connect();
    wait_until(
        "the old job is forgotten",
        PATIENCE,
        || text(client, "SELECT string_agg(job_id::text, ' ') FROM llm_batch.progress"),
        |jobs| *jobs == open.to_string(),
    );
    assert_eq!(one(client, "SELECT count(*) FROM llm_batch.row_failure"), 0);
    let log = bed.cluster.log();
    for said in [
        format!("llm_batch job {first} is done: column topic of public.tickets"),
        format!("llm_batch job {second} is forgotten: column topic of public.tickets"),
        format!(
            "llm_batch job {old} is forgotten, as llm_batch.keep_finished_jobs says: column topic of public.tickets, task topic, by bob: 19 rows done, 1 skipped"
        ),
    ] {
        assert!(log.contains(&said), "{said}\n{log}");
    }
}
