//! The launcher: starts a search for jobs in every database at the start of the server (and at promotion), and from
//! then on the workers that the table in shared memory wants.

use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorkerBuilder, BgWorkerStartTime};
use pgrx::prelude::*;

use super::{LIBRARY, handle_signals, my_pid, reload_if_asked, report, wait};
use crate::failure::failure_point;
use crate::{settings, shared};

/// A worker that has not come up after so long (microseconds) could not connect.
const PATIENCE: i64 = 10_000_000;
/// How often all databases are searched, microseconds: for what no commit told of (a full table, a database that was
/// opened).
const SEARCH: i64 = 300_000_000;
/// The next try where no background worker was free, microseconds.
const NO_SLOT: i64 = 10_000_000;

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn llm_batch_launcher_main(_arg: pg_sys::Datum) {
    handle_signals();
    // SAFETY: at the start of a background worker; no database, but shared catalogs can be read.
    unsafe { pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0) };
    shared::launcher_starts(my_pid());
    report(pg_sys::BackendState::STATE_IDLE, "");
    let mut warned = false;
    let mut searched = None;
    loop {
        reload_if_asked();
        let now = shared::now();
        if searched.is_none_or(|at| at + SEARCH < now) {
            searched = Some(now);
            for database in databases(&settings::databases()) {
                shared::want(database, 0, 0, now);
            }
        }
        shared::bury(now, PATIENCE);
        if settings::enabled() {
            launch(now, &mut warned);
        }
        let due = shared::next_due().filter(|_| settings::enabled());
        let pause = due.map_or(10_000_000, |at| at - shared::now()).clamp(100_000, 10_000_000);
        wait(None, Some(Duration::from_micros(pause as u64)));
    }
}

fn launch(now: i64, warned: &mut bool) {
    let (due, mut running) = shared::due(now);
    let all = if due.is_empty() { Vec::new() } else { databases(&[]) };
    for entry in due {
        let is_job = entry.job != 0;
        if !all.contains(&entry.database) {
            // Dropped, or closed to connections: a job there is found again should it be opened.
            shared::unwant(entry.database, entry.job);
            continue;
        }
        if is_job && running >= settings::max_job_workers() {
            shared::no_slot(entry.database, entry.job, now + 1_000_000);
            continue;
        }
        shared::starting(entry.database, entry.job, now);
        failure_point!("launch");
        let (kind, function) = if is_job {
            ("llm_batch job", "llm_batch_job_main")
        } else {
            ("llm_batch finder", "llm_batch_finder_main")
        };
        let name = if is_job { format!("llm_batch job {}", entry.job) } else { kind.to_owned() };
        let started = BackgroundWorkerBuilder::new(&name)
            .set_type(kind)
            .set_library(LIBRARY)
            .set_function(function)
            .set_extra(&format!("{} {} {}", entry.database, entry.job, entry.owner))
            .enable_spi_access()
            .set_start_time(BgWorkerStartTime::RecoveryFinished)
            .set_restart_time(None)
            .set_notify_pid(my_pid())
            .load_dynamic();
        match started {
            Ok(_) => {
                failure_point!("launched");
                *warned = false;
                running += usize::from(is_job);
            }
            Err(_) => {
                shared::no_slot(entry.database, entry.job, now + NO_SLOT);
                if !*warned {
                    *warned = true;
                    ereport!(
                        WARNING,
                        PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                        "no background worker is free for llm_batch; jobs wait",
                        "Raise max_worker_processes: each running job needs one, and pg_llm_batch three more."
                    );
                }
            }
        }
    }
}

/// The databases that can be connected to; of these the ones of the given names, if any are given.
fn databases(wanted: &[String]) -> Vec<u32> {
    let mut found = Vec::new();
    // SAFETY: a transaction of a background worker; pg_database is a shared catalog and may be read without a
    // database. The scan is ended and the lock released before the commit.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::systable_beginscan(
            relation,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let row = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
            let name = std::ffi::CStr::from_ptr((*row).datname.data.as_ptr()).to_string_lossy();
            if (*row).datallowconn && !(*row).datistemplate && (wanted.is_empty() || wanted.iter().any(|w| *w == name))
            {
                found.push((*row).oid.to_u32());
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
    }
    found
}
