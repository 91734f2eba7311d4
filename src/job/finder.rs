//! The finder: a short-lived process in one database that looks for jobs to run, and wakes those whose pause is over.

use pgrx::prelude::*;

use super::store::{self, Outcome};
use super::tidy;
use crate::error::Result;
use crate::failure::failure_point;
use crate::process::{handle_signals, my_database, my_pid, report};
use crate::shared::{self, End, launch};
use crate::worker::{on_exit, orders};
use crate::{sql, txn, version};

/// The next search where a prepared transaction is open or the extension is to be updated, microseconds.
const AGAIN: i64 = 10_000_000;

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn llm_batch_finder_main(_arg: pg_sys::Datum) {
    handle_signals();
    let Some((database, _, _)) = orders() else { return };
    if shared::comes_up(database, 0, my_pid()).is_none() {
        return;
    }
    // SAFETY: at the start of a background worker; as the bootstrap superuser, since it reads only our own tables.
    unsafe {
        pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0));
        pg_sys::BackgroundWorkerInitializeConnectionByOid(pg_sys::Oid::from(database), pg_sys::InvalidOid, 0);
    }
    let found = txn::run(search);
    // Later and apart: what holds this up holds up no job.
    if let Err(e) = txn::run(tidy::tidy_up) {
        pgrx::log!("llm_batch could not remove old jobs: {}", e.one_line());
    }
    let end = match found {
        Ok(Some(at)) => End::Again(at),
        Ok(None) => End::Finished,
        Err(e) => {
            pgrx::log!("llm_batch could not search for jobs: {}", e.one_line());
            End::Died
        }
    };
    report(pg_sys::BackendState::STATE_IDLE, "");
    shared::goes(database, 0, my_pid(), end);
}

/// Wants every job that is to run; when to look again, if a pause of one will be over then.
fn search() -> Result<Option<i64>> {
    sql::set_local("search_path", "pg_catalog, pg_temp")?;
    let Some(version) = version::installed()? else { return Ok(None) };
    if version != version::LIBRARY {
        if shared::first_told(my_database()) {
            let e = version::differs(&version);
            let database = sql::one::<String>("SELECT current_database()::text", &[])?.unwrap_or_default();
            let text = format!(
                "jobs in database \"{database}\" wait until the extension and the library have the same version"
            );
            ereport!(WARNING, e.code, text, format!("{}. {}", e.message, e.hint.unwrap_or_default()));
        }
        return Ok(Some(shared::now() + AGAIN));
    }
    let jobs = sql::rows(
        "SELECT j.id, j.owner,
                s.epoch = j.epoch AND s.status = 'paused' AS waits,
                (extract(epoch FROM s.resume_at - clock_timestamp()) * 1000000)::bigint AS microseconds,
                o.shut_out, j.epoch,
                (extract(epoch FROM clock_timestamp() - s.updated_at) * 1000000)::bigint AS age,
                CASE WHEN s.epoch = j.epoch THEN s.starts ELSE 0 END AS starts, d.is_due
           FROM llm_batch.job j JOIN llm_batch.job_state s ON s.job_id = j.id
           LEFT JOIN pg_roles r ON r.oid = j.owner
          CROSS JOIN LATERAL (SELECT j.wanted = 'running'
                AND (s.epoch < j.epoch OR s.status = 'running' OR (s.status = 'paused' AND s.resume_at IS NOT NULL))) d (is_due)
          CROSS JOIN LATERAL (SELECT
                CASE WHEN r.oid IS NULL THEN 'the job''s owner was dropped'
                     WHEN NOT r.rolcanlogin THEN 'the job''s owner lost a right: it may not log in'
                     WHEN NOT has_database_privilege(j.owner, current_database(), 'CONNECT')
                     THEN 'the job''s owner lost a right: it may not connect to the database' END) o (shut_out)
          WHERE j.home = llm_batch.home() AND (d.is_due OR o.shut_out IS NOT NULL)
          ORDER BY j.id",
        &[],
        |row| {
            let job = (row.get::<i64>("id")?, row.get::<pg_sys::Oid>("owner")?.to_u32());
            // After a crash of the whole server only the tables know how often a job's worker died.
            let died = u32::try_from(row.get::<i32>("starts")? - 1).unwrap_or(0);
            let left_alone = shared::pause(died) - row.get::<i64>("age")?;
            let wait = if row.get::<bool>("waits")? { row.maybe::<i64>("microseconds")?.unwrap_or(0) } else { left_alone };
            Ok((job, wait.max(0), row.maybe::<String>("shut_out")?, row.get::<i32>("epoch")?, row.get::<bool>("is_due")?))
        },
    )?;
    failure_point!("find");
    let now = shared::now();
    // A prepared transaction may hold a job, or something else that wakes one; its commit tells nobody.
    let prepared =
        sql::one::<bool>("SELECT true FROM pg_prepared_xacts WHERE database = current_database() LIMIT 1", &[])?;
    let mut next = prepared.map(|_| now + AGAIN);
    for ((id, owner), wait, shut_out, epoch, is_due) in jobs {
        if let Some(why) = shut_out {
            if is_due {
                store::end(id, epoch, &Outcome::Paused("owner", Some(why), None), true)?;
            }
            // Also what waits for a worker to see that it is not to run: none can come up.
            launch::unwant(my_database(), id);
            continue;
        }
        if wait == 0 {
            shared::found(my_database(), id, owner);
        } else {
            next = Some(next.map_or(now + wait, |n: i64| n.min(now + wait)));
        }
    }
    Ok(next)
}
