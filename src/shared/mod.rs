//! The table of wanted and running jobs in shared memory: how a commit reaches the launcher, and how the launcher
//! knows what has died. A database's search for jobs (a finder) is an entry too, with job 0.
//!
//! ```text
//!            want()                   launcher                worker
//!   (none) ─────────> Wanted(at) ───────────────> Starting ──────────> Running
//!     ^                   ^                            │                  │
//!     │                   └── died, no slot: later ────┴──────────────────┤
//!     └────────────────────────── finished ───────────────────────────────┘
//! ```

pub mod launch;

use pgrx::prelude::*;
use pgrx::{PGRXSharedMemory, PgLwLock, pg_shmem_init};

/// Most jobs and finders that are wanted or running at the same time. More jobs than that wait in their tables until a
/// search finds room for them. Tests have fewer.
const ENTRIES: usize = if cfg!(feature = "failure_points") { 64 } else { 256 };
/// As many of these are reserved for finders that are to run soon: jobs and finders that wait do not get them.
const FOR_FINDERS: usize = 16;
/// Most entries that the jobs of one role take.
const OF_A_ROLE: usize = (ENTRIES - FOR_FINDERS) / 4 * 3;

/// The launcher comes up so soon after the server (microseconds), or never.
const START: i64 = 5_000_000;

/// Time (microseconds) that a worker has to give way before another one is asked.
const GIVES_WAY: i64 = 30_000_000;
/// A job that waits for a slot is looked at so often (microseconds).
pub const WAITS: i64 = 1_000_000;

/// First wait before what died is started again, microseconds; doubled each time it dies young and without progress.
const RESTART: i64 = 1_000_000;
/// Longest such wait, microseconds.
const MOST_RESTART: i64 = 300_000_000;
/// A worker that has not looked at its row so long (microseconds) after its job was cancelled is ended: code of a user
/// keeps it, such as a trigger.
const DEAF: i64 = 15_000_000;
/// A worker that lived so long (microseconds) was well.
const WELL: i64 = 60_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Free,
    Wanted,
    Starting,
    Running,
}

/// A job of a database, or its finder.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub database: u32,
    pub job: i64,
    /// The role to run as; 0 for finders.
    pub owner: u32,
    pub phase: Phase,
    /// Wanted: not before; Starting, Running: since. Microseconds, as Postgres counts them.
    pub at: i64,
    pid: i32,
    /// The number of times that it died, one after the other.
    deaths: u32,
    /// No background worker was free for it.
    pub no_slot: bool,
    /// Its row in `llm_batch.job` was changed.
    poked: bool,
    /// It was cancelled then (microseconds), or 0.
    cancelled: i64,
    /// Since when (microseconds) its worker is to make room for another role's job, or 0; and whether it has noticed that.
    gives_way: i64,
    has_noticed: bool,
    /// The worker before was told to end: it did not die of its work.
    pub told: bool,
}

const FREE: Entry = Entry {
    database: 0,
    job: 0,
    owner: 0,
    phase: Phase::Free,
    at: 0,
    pid: 0,
    deaths: 0,
    no_slot: false,
    poked: false,
    cancelled: 0,
    gives_way: 0,
    has_noticed: false,
    told: false,
};

impl Entry {
    /// It was cancelled, and its worker has not looked at its row since.
    fn waits_for_its_worker(&self) -> bool {
        self.phase == Phase::Running && self.poked && self.cancelled != 0
    }

    /// From when on its worker is deaf: code of a user's does not return, while the job is cancelled, or another role waits
    /// for the worker's place.
    fn is_deaf_at(&self) -> Option<i64> {
        let cancelled = self.waits_for_its_worker().then_some(self.cancelled + DEAF);
        let is_asked = self.phase == Phase::Running && self.gives_way != 0 && !self.has_noticed;
        cancelled.into_iter().chain(is_asked.then_some(self.gives_way + GIVES_WAY)).min()
    }
}

#[derive(Clone, Copy)]
struct Table {
    /// When the server started, or started anew after a crash.
    born: i64,
    /// 0 if none has come up yet.
    launcher: i32,
    /// A gateway has come up.
    had_gateway: bool,
    /// No background worker was free at the last start of anything.
    no_slot: bool,
    /// Something found no entry, and is to be searched for.
    missed: bool,
    /// Databases of which the log was told that their extension is of another version than the library.
    told: [u32; 16],
    /// The gateway was told to end.
    gateway_told: bool,
    entries: [Entry; ENTRIES],
}

// SAFETY: plain data without pointers.
unsafe impl PGRXSharedMemory for Table {}

impl Default for Table {
    fn default() -> Self {
        Self {
            born: now(),
            launcher: 0,
            had_gateway: false,
            no_slot: false,
            missed: false,
            told: [0; 16],
            gateway_told: false,
            entries: [FREE; ENTRIES],
        }
    }
}

// SAFETY: the name is this library's own.
static TABLE: PgLwLock<Table> = unsafe { PgLwLock::new(c"llm_batch jobs") };
static READY: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

pub fn init() {
    pg_shmem_init!(TABLE);
    READY.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// Returns true if the library was preloaded; without that there is no table, no gateway and no launcher.
pub fn is_ready() -> bool {
    READY.load(std::sync::atomic::Ordering::Relaxed)
}

/// Microseconds, as Postgres counts them.
pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

impl Table {
    fn find(&mut self, database: u32, job: i64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|e| e.phase != Phase::Free && e.database == database && e.job == job)
    }

    fn free(&self) -> usize {
        self.entries.iter().filter(|e| e.phase == Phase::Free).count()
    }

    /// `None` if there is no room, which is remembered.
    fn find_or_add(&mut self, database: u32, job: i64, owner: u32) -> Option<(&mut Entry, bool)> {
        if self.find(database, job).is_some() {
            return self.find(database, job).map(|e| (e, false));
        }
        let is_own = |e: &&Entry| e.phase != Phase::Free && e.job != 0 && e.owner == owner;
        let has_share = job == 0 || self.entries.iter().filter(is_own).count() < OF_A_ROLE;
        if !has_share || self.free() <= if job == 0 { 0 } else { FOR_FINDERS } {
            self.missed = true;
            return None;
        }
        self.entries.iter_mut().find(|e| e.phase == Phase::Free).map(|e| (e, true))
    }

    /// A finder that waits gives its entry back where there are few: all databases are searched again instead.
    fn waits(&mut self, i: usize) {
        let is_scarce = self.free() < FOR_FINDERS;
        if let Some(e) = self.entries.get_mut(i).filter(|e| e.job == 0 && is_scarce) {
            *e = FREE;
            self.missed = true;
        }
    }
}

impl Table {
    /// A worker died. It is started again after a while; a search goes before it, which finds out whether its owner
    /// may still log in.
    fn died(&mut self, i: usize, now: i64, told: bool) {
        let Some(e) = self.entries.get_mut(i) else { return };
        died(e, now, told);
        let Entry { database, job, at, .. } = *e;
        if job != 0
            && let Some((finder, true)) = self.find_or_add(database, 0, 0)
        {
            *finder = Entry { database, phase: Phase::Wanted, at: at - 1_000_000, ..FREE };
        }
        self.waits(i);
    }
}

fn set_latch(pid: i32) {
    if pid > 0 {
        // SAFETY: BackendPidGetProc returns a process of the array or NULL; a latch may be set at any time, and one
        // set too many wakes somebody for nothing.
        unsafe {
            let process = pg_sys::BackendPidGetProc(pid);
            if !process.is_null() {
                pg_sys::SetLatch(&raw mut (*process).procLatch);
            }
        }
    }
}

/// Wants a job (or, with job 0, a search) to run, not before `at`. A job that runs already is told to look at its row
/// again. Raises nothing: it is called when a transaction has committed. A full table is made up for by a search.
pub fn want(database: u32, job: i64, owner: u32, at: i64) {
    let mut pids = (0, 0);
    {
        let mut table = TABLE.exclusive();
        if let Some((entry, is_new)) = table.find_or_add(database, job, owner) {
            // It may have been given another owner.
            entry.owner = owner;
            if is_new {
                *entry = Entry { database, job, owner, phase: Phase::Wanted, at, ..FREE };
            } else if entry.phase == Phase::Wanted {
                entry.at = entry.at.min(at);
            } else {
                entry.poked = true;
                pids.1 = entry.pid;
            }
        }
        pids.0 = table.launcher;
    }
    set_latch(pids.0);
    set_latch(pids.1);
}

/// Tells a job that runs to look at its row again; `is_cancelled`: and to end. As with `want()`, raises nothing.
pub fn poke(database: u32, job: i64, is_cancelled: bool) {
    let mut table = TABLE.exclusive();
    let launcher = table.launcher;
    if let Some(e) = table.find(database, job).filter(|e| e.phase != Phase::Wanted) {
        e.poked = true;
        if is_cancelled {
            e.cancelled = now();
        }
        let pid = e.pid;
        drop(table);
        set_latch(pid);
        if is_cancelled {
            set_latch(launcher);
        }
    }
}

/// Wants a job that a search has found to run, if nobody does yet. An entry that is wanted, waits or runs is left
/// alone.
pub fn found(database: u32, job: i64, owner: u32) {
    let mut table = TABLE.exclusive();
    let launcher = table.launcher;
    if let Some((entry, true)) = table.find_or_add(database, job, owner) {
        *entry = Entry { database, job, owner, phase: Phase::Wanted, at: now(), ..FREE };
        drop(table);
        set_latch(launcher);
    }
}

/// Returns true if the log has not been told of this database yet. Beyond the table's room it is told each time.
pub fn first_told(database: u32) -> bool {
    let mut table = TABLE.exclusive();
    let place = table.told.iter_mut().find(|d| **d == database || **d == 0);
    place.is_none_or(|d| std::mem::replace(d, database) != database)
}

/// The caller's job has done rows: one of its deaths is forgiven.
pub fn progressed(database: u32, job: i64) {
    if let Some(e) = TABLE.exclusive().find(database, job) {
        e.deaths = e.deaths.saturating_sub(1);
    }
}

/// The caller's job has listed what it died of: whatever it dies of next, it need not wait long.
pub fn listed_a_crash(database: u32, job: i64) {
    if let Some(e) = TABLE.exclusive().find(database, job) {
        e.deaths = e.deaths.min(2);
    }
}

/// Returns true if the caller's job was told to look at its row again, since the last call.
pub fn was_poked(database: u32, job: i64) -> bool {
    TABLE.exclusive().find(database, job).is_some_and(|e| std::mem::take(&mut e.poked))
}

/// Why nobody is at a job that is to run, as far as this table knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idle {
    /// Somebody is, or will be in a moment.
    Not,
    /// No background worker is free.
    NoSlot,
    /// It has not been found since the server started.
    NotFound,
}

pub fn idle(database: u32, job: i64) -> Idle {
    let table = TABLE.share();
    let entry = table.entries.iter().find(|e| e.phase != Phase::Free && e.database == database && e.job == job);
    let no_launcher = table.launcher == 0 && table.born + START < now();
    match entry {
        Some(e) if e.phase != Phase::Wanted => Idle::Not,
        Some(e) if e.no_slot || no_launcher => Idle::NoSlot,
        Some(_) => Idle::Not,
        None if table.no_slot || table.missed || table.free() <= FOR_FINDERS || no_launcher => Idle::NoSlot,
        None => Idle::NotFound,
    }
}

/// The processes that are always there, if Postgres had room to register them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    Gateway,
    Launcher,
}

/// Returns true if a process has come up since the server started.
pub fn has_come_up(process: Process) -> bool {
    let table = TABLE.share();
    match process {
        Process::Gateway => table.had_gateway,
        Process::Launcher => table.launcher != 0,
    }
}

pub fn gateway_starts() {
    let mut table = TABLE.exclusive();
    (table.had_gateway, table.gateway_told) = (true, false);
}

/// The gateway ends, because it was told to or of something.
pub fn gateway_ends(told: bool) {
    TABLE.exclusive().gateway_told = told;
}

/// Returns true if the gateway that has just gone was told to, and did not die of something.
pub fn was_gateway_told() -> bool {
    TABLE.share().gateway_told
}

/// Returns true if the caller's job is to make room for another role's.
pub fn gives_way(database: u32, job: i64) -> bool {
    TABLE.exclusive().find(database, job).filter(|e| e.gives_way != 0).is_some_and(|e| {
        e.has_noticed = true;
        true
    })
}

fn died(e: &mut Entry, now: i64, told: bool) {
    if e.phase == Phase::Running && e.at + WELL < now {
        e.deaths = 0;
    }
    e.deaths += u32::from(!told);
    (e.phase, e.at, e.pid, e.told) = (Phase::Wanted, now + pause(e.deaths.max(1)), 0, told);
}

/// Pause after so many deaths in a row, microseconds.
pub fn pause(deaths: u32) -> i64 {
    if deaths == 0 { 0 } else { (RESTART << (deaths - 1).min(10)).min(MOST_RESTART) }
}

/// A worker comes up. `None` if nobody wants it any more, or another one has taken its place.
pub fn comes_up(database: u32, job: i64, pid: i32) -> Option<Entry> {
    let mut table = TABLE.exclusive();
    let e = table.find(database, job)?;
    if e.phase != Phase::Starting {
        return None;
    }
    let before = *e;
    *e = Entry {
        phase: Phase::Running,
        at: now(),
        pid,
        poked: false,
        cancelled: 0,
        gives_way: 0,
        has_noticed: false,
        told: false,
        ..before
    };
    Some(before)
}

/// The end of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its work is done: it is not wanted any more, unless it was poked meanwhile.
    Finished,
    /// It is to run again at this time.
    Again(i64),
    /// It died of something.
    Died,
    /// It was told to end, by SIGTERM, and is to run again.
    Told,
}

/// A worker goes.
pub fn goes(database: u32, job: i64, pid: i32, end: End) {
    let launcher = {
        let mut table = TABLE.exclusive();
        let found = table
            .entries
            .iter()
            .position(|e| e.phase == Phase::Running && e.database == database && e.job == job && e.pid == pid);
        let now = now();
        if matches!(end, End::Died | End::Told)
            && let Some(i) = found
        {
            table.died(i, now, end == End::Told);
        } else if let Some(i) = found
            && let Some(e) = table.entries.get_mut(i)
        {
            match end {
                End::Finished if e.poked => {
                    *e = Entry { phase: Phase::Wanted, at: now, pid: 0, deaths: 0, poked: false, ..*e };
                }
                End::Finished => *e = FREE,
                End::Again(at) => {
                    let at = if e.poked { now } else { at };
                    *e = Entry { phase: Phase::Wanted, at, pid: 0, deaths: 0, poked: false, ..*e };
                    table.waits(i);
                }
                End::Died | End::Told => {}
            }
        }
        table.launcher
    };
    set_latch(launcher);
}
