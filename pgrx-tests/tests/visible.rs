//! The view of a DBA: the processes while a job runs, and the statistics that autovacuum goes by.

mod common;

use common::{Bed, PATIENCE, backfill, one, progress, run, slow, text, tickets};
use pg_llm_batch_e2e::{Cluster, wait_until};

#[test]
fn processes_are_seen_and_what_they_write_is_counted() {
    let builder = Cluster::builder("visible").conf("autovacuum_naptime", "1s").conf("update_process_title", "on");
    let bed = Bed::build(builder, slow(50));
    let mut c = bed.connect();
    tickets(&mut c, "t", 1..=20_000);
    run(&mut c, "ANALYZE t; SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    let job = backfill(&mut c, "t");
    wait_until("some of it is done", PATIENCE, || progress(&mut c, job).done, |n| *n >= 1_000);

    let seen =
        "SELECT string_agg(concat_ws('/', backend_type, application_name, datname, usename), ' ' ORDER BY backend_type)
                  FROM pg_stat_activity WHERE backend_type LIKE 'llm\\_batch%'";
    let expected = format!(
        "llm_batch gateway//postgres llm_batch job/llm_batch job {job}/postgres/postgres llm_batch launcher//postgres"
    );
    wait_until("the processes are seen", PATIENCE, || text(&mut c, seen), |s| *s == expected);
    let pid = one(&mut c, "SELECT pid::bigint FROM pg_stat_activity WHERE backend_type = 'llm_batch job'");
    let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(title.contains(&format!("llm_batch job {job}")), "{title}");

    // While the worker is at it, not only when it has gone.
    let updated = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 't'";
    wait_until("its updates are counted", PATIENCE, || one(&mut c, updated), |n| *n >= 500);
    assert_eq!(progress(&mut c, job).status, "running", "too fast to show anything");
    let analyzed = "SELECT autoanalyze_count FROM pg_stat_user_tables WHERE relname = 't'";
    wait_until("autovacuum comes to the table", PATIENCE, || one(&mut c, analyzed), |n| *n >= 1);
    let ours = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'job_state'";
    wait_until("so are those of our tables", PATIENCE, || one(&mut c, ours), |n| *n >= 10);
    bed.done(job);
    let idle = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'llm_batch job'";
    wait_until("the worker has gone", PATIENCE, || one(&mut c, idle), |n| *n == 0);
}
