//! The launcher: has every database searched for jobs at the start of the server (and at promotion), and from then on
//! starts the workers that the table in shared memory wants.

use std::collections::VecDeque;
use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorkerBuilder, BgWorkerStartTime};
use pgrx::prelude::*;

use super::LIBRARY;
use super::databases::{self, Database};
use crate::failure::failure_point;
use crate::process::{handle_signals, my_pid, reload_if_asked, report, wait};
use crate::settings;
use crate::shared::launch::{self, Due};
use crate::shared::{self, Entry};

/// A worker that has not come up after so long (microseconds) could not connect.
const PATIENCE: i64 = 10_000_000;
/// Interval at which all databases are searched, microseconds: for changes that no commit told of.
const SEARCH: i64 = 300_000_000;
/// The same after something did not fit into the table, microseconds.
const SEARCH_MISSED: i64 = 10_000_000;
/// The next try where no background worker was free, microseconds.
const NO_SLOT: i64 = 3_000_000;
/// Interval at which the log is told of the same, microseconds.
const SAY: i64 = 600_000_000;
/// Most finders at a time. Each takes some 20 ms.
const FINDERS: usize = 2;
/// Background workers that finders leave to others: jobs, parallel queries, replication.
const LEFT_FREE: usize = 2;
/// A finder that has waited so long (microseconds) takes one of these.
const FINDER_PATIENCE: i64 = 2_000_000;

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn llm_batch_launcher_main(_arg: pg_sys::Datum) {
    handle_signals();
    // SAFETY: at the start of a background worker; no database, but shared catalogs can be read.
    unsafe { pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0) };
    launch::launcher_starts(my_pid());
    report(pg_sys::BackendState::STATE_IDLE, "");
    let mut launcher = Launcher::default();
    loop {
        reload_if_asked();
        let now = shared::now();
        launch::bury(now, PATIENCE);
        for pid in launch::deaf(now) {
            terminate(pid);
        }
        if settings::enabled() {
            launcher.turn(now);
        }
        let due = launch::next_due().filter(|_| settings::enabled());
        let pause = due.map_or(10_000_000, |at| at - shared::now()).clamp(100_000, 10_000_000);
        wait(None, Some(Duration::from_micros(pause as u64)));
    }
}

/// State that the launcher alone has. The next launcher begins anew.
#[derive(Default)]
struct Launcher {
    /// Databases to be searched, one after the other. However many there are, each has its turn.
    queue: VecDeque<u32>,
    /// Databases that could be searched when they were last looked at.
    known: Vec<u32>,
    /// When all were queued.
    all_queued: Option<i64>,
    /// When the log was told that no background worker is free, or that there are too many jobs.
    said_no_slot: Option<i64>,
    said_missed: Option<i64>,
}

impl Launcher {
    fn turn(&mut self, now: i64) {
        let open = databases::open();
        self.queue_searches(&open, now);
        self.want_searches(&open, now);
        self.launch(&open, now);
    }

    /// Queues what was made or opened since, and all databases now and then.
    fn queue_searches(&mut self, open: &[Database], now: i64) {
        let is_over = |time| self.all_queued.is_none_or(|at| at + time < now);
        let missed = self.queue.is_empty() && is_over(SEARCH_MISSED) && launch::take_missed();
        let all = missed || is_over(SEARCH);
        let searched: Vec<u32> = open.iter().filter(|d| d.is_searched).map(|d| d.oid).collect();
        for database in &searched {
            // In order of their numbers.
            if (all || self.known.binary_search(database).is_err()) && !self.queue.contains(database) {
                self.queue.push_back(*database);
            }
        }
        self.known = searched;
        if all {
            self.all_queued = Some(now);
        }
        if missed && is_time(&mut self.said_missed, now) {
            pgrx::log!("llm_batch has more jobs than it can track at a time; databases are searched again as jobs end");
        }
    }

    /// Hands over as many searches as may run, while there is room for what they find.
    fn want_searches(&mut self, open: &[Database], now: i64) {
        let (busy, has_room) = launch::searches(now);
        for _ in busy..FINDERS {
            if !has_room {
                return;
            }
            let Some(database) = self.queue.pop_front() else { return };
            if is_open(open, database) {
                shared::want(database, 0, 0, now);
            }
        }
    }

    fn launch(&mut self, open: &[Database], now: i64) {
        let Due { mut entries, mut owners, mut finders, mut starting } = launch::due(now);
        entries.retain(|entry| {
            let is_open = is_open(open, entry.database);
            if !is_open {
                // Dropped, or closed to connections: a job there is found again should it be opened.
                launch::unwant(entry.database, entry.job);
            }
            is_open
        });
        let (mut jobs, searches): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(|e| e.job != 0);
        for entry in searches {
            if may_search(&entry, finders, starting, now) && self.start(&entry, now) {
                finders += 1;
                starting += 1;
            }
        }
        let mut waiting = Vec::new();
        while owners.len() < settings::max_job_workers() {
            // The role with the fewest workers has the next, and of its jobs the one that has waited already.
            let turn = |e: &Entry| (held(&owners, e.owner), !e.no_slot, e.at);
            let next = jobs.iter().enumerate().min_by_key(|(_, e)| turn(e)).map(|(i, _)| i);
            let Some(entry) = next.map(|i| jobs.remove(i)) else { break };
            if self.start(&entry, now) {
                owners.push(entry.owner);
            } else {
                waiting.push(entry.owner);
            }
        }
        for entry in jobs {
            launch::no_slot(entry.database, entry.job, now + shared::WAITS);
            waiting.push(entry.owner);
        }
        // A role that has none is not to wait for one that has several, which may be at it for days.
        if waiting.iter().any(|owner| held(&owners, *owner) == 0)
            && let Some(owner) = owners.iter().copied().max_by_key(|owner| held(&owners, *owner))
            && held(&owners, owner) > 1
        {
            launch::ask_to_give_way(owner, now);
        }
    }

    /// Starts a worker; false if there is no room for it.
    fn start(&mut self, entry: &Entry, now: i64) -> bool {
        launch::starting(entry.database, entry.job, now);
        failure_point!("launch");
        let is_job = entry.job != 0;
        let (kind, function) = if is_job {
            ("llm_batch job", "llm_batch_job_main")
        } else {
            ("llm_batch finder", "llm_batch_finder_main")
        };
        let name = if is_job { format!("llm_batch job {}", entry.job) } else { kind.to_owned() };
        let is_started = BackgroundWorkerBuilder::new(&name)
            .set_type(kind)
            .set_library(LIBRARY)
            .set_function(function)
            .set_extra(&format!("{} {} {}", entry.database, entry.job, entry.owner))
            .enable_spi_access()
            .set_start_time(BgWorkerStartTime::RecoveryFinished)
            .set_restart_time(None)
            .set_notify_pid(my_pid())
            .load_dynamic()
            .is_ok();
        launch::set_no_slot(!is_started);
        if is_started {
            failure_point!("launched");
            return true;
        }
        launch::no_slot(entry.database, entry.job, now + NO_SLOT);
        // At the first time it may be that the place of a process that has just ended is not free yet.
        if entry.no_slot && is_time(&mut self.said_no_slot, now) {
            ereport!(
                WARNING,
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                "no background worker is free for llm_batch; jobs wait",
                "Raise max_worker_processes. Each running job needs one, and pg_llm_batch three more."
            );
        }
        false
    }
}

/// Ends a job's worker as `pg_terminate_backend()` does.
fn terminate(pid: i32) {
    // SAFETY: finds a process of Postgres or none, on the main thread; a signal to one that has just gone reaches nobody.
    unsafe {
        if !pg_sys::BackendPidGetProc(pid).is_null() {
            pgrx::log!(
                "llm_batch ends the worker of a job that was cancelled, or is to give way, and does not notice it: process {pid}"
            );
            libc::kill(pid, libc::SIGTERM);
        }
    }
}

/// The number of workers that a role has.
fn held(owners: &[u32], owner: u32) -> usize {
    owners.iter().filter(|o| **o == owner).count()
}

fn is_open(open: &[Database], oid: u32) -> bool {
    open.binary_search_by_key(&oid, |d| d.oid).is_ok()
}

/// Returns true if something may be said (again), which it then is.
fn is_time(said: &mut Option<i64>, now: i64) -> bool {
    let is_time = said.is_none_or(|at| at + SAY < now);
    if is_time {
        *said = Some(now);
    }
    is_time
}

/// Returns true if a finder may start beside so many others. Where few background workers are free it waits for a
/// while; where none is even then, its start fails and says so.
fn may_search(entry: &Entry, finders: usize, starting: usize, now: i64) -> bool {
    let (free, seen) = workers();
    let free = free.saturating_sub(starting);
    // One that has done its work is seen until it has ended.
    let finders = finders.max(seen);
    finders < FINDERS && (free > LEFT_FREE || (finders == 0 && entry.at + FINDER_PATIENCE < now))
}

/// The numbers of free `max_worker_processes` and of finders, as `pg_stat_activity` shows them.
fn workers() -> (usize, usize) {
    // SAFETY: on the main thread; a position of the copy that is made below, so that there is a process. The type's name
    // is copied by Postgres, and ends with a zero byte.
    let is_finder = |i| unsafe {
        #[cfg(feature = "pg15")]
        let process = pg_sys::pgstat_fetch_stat_local_beentry(i);
        #[cfg(not(feature = "pg15"))]
        let process = pg_sys::pgstat_get_local_beentry_by_index(i);
        if process.is_null() || (*process).backendStatus.st_backendType != pg_sys::BackendType::B_BG_WORKER {
            return None;
        }
        let kind = pg_sys::GetBackgroundWorkerTypeByPid((*process).backendStatus.st_procpid);
        Some(!kind.is_null() && std::ffi::CStr::from_ptr(kind) == c"llm_batch finder")
    };
    // SAFETY: on the main thread; makes a copy of what processes say of themselves, outside of any transaction, and
    // forgets it. The setting is read.
    unsafe {
        let count = pg_sys::pgstat_fetch_stat_numbackends();
        let busy: Vec<bool> = (1..=count).filter_map(is_finder).collect();
        pg_sys::pgstat_clear_backend_activity_snapshot();
        let all = usize::try_from(pg_sys::max_worker_processes).unwrap_or(0);
        (all.saturating_sub(busy.len()), busy.iter().filter(|is_finder| **is_finder).count())
    }
}
