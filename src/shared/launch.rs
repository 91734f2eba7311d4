//! What the launcher asks of the table: who is to be started, who has died, who is to give way.

use super::{ENTRIES, Entry, FOR_FINDERS, FREE, GIVES_WAY, Phase, TABLE, WAITS, set_latch};

/// Processes of jobs that were cancelled, or asked to give way, a while ago and have not noticed it. Each is named once.
pub fn deaf(now: i64) -> Vec<i32> {
    let is_deaf = |e: &&mut Entry| e.is_deaf_at().is_some_and(|at| at <= now);
    let deaf = |e: &mut Entry| {
        (e.cancelled, e.has_noticed) = (0, true);
        e.pid
    };
    TABLE.exclusive().entries.iter_mut().filter(is_deaf).map(deaf).collect()
}

/// Registers the launcher. Jobs that an earlier launcher was about to start are wanted again.
pub fn launcher_starts(pid: i32) {
    let mut table = TABLE.exclusive();
    table.launcher = pid;
    for e in &mut table.entries {
        if e.phase == Phase::Starting {
            e.phase = Phase::Wanted;
        }
    }
}

/// The workers to start, and the load.
pub struct Due {
    /// Finders first. Jobs that wait for a slot are due as soon as one is free.
    pub entries: Vec<Entry>,
    /// The owners of jobs that are starting or running, one for each job.
    pub owners: Vec<u32>,
    /// Finders that are.
    pub finders: usize,
    /// Jobs and finders that are starting.
    pub starting: usize,
}

/// The workers to start at `now`.
pub fn due(now: i64) -> Due {
    let table = TABLE.share();
    let is_due = |e: &&Entry| e.at <= now || (e.job != 0 && e.no_slot && e.at <= now + WAITS);
    let mut entries: Vec<Entry> =
        table.entries.iter().filter(|e| e.phase == Phase::Wanted).filter(is_due).copied().collect();
    entries.sort_by_key(|e| (e.job != 0, e.at));
    let busy = || table.entries.iter().filter(|e| matches!(e.phase, Phase::Starting | Phase::Running));
    Due {
        entries,
        owners: busy().filter(|e| e.job != 0).map(|e| e.owner).collect(),
        finders: busy().filter(|e| e.job == 0).count(),
        starting: busy().filter(|e| e.phase == Phase::Starting).count(),
    }
}

/// Counts the finders that run or are due, and tells whether there is room for jobs that they find.
pub fn searches(now: i64) -> (usize, bool) {
    let table = TABLE.share();
    let is_busy = |e: &Entry| match e.phase {
        Phase::Free => false,
        Phase::Wanted => e.at <= now,
        Phase::Starting | Phase::Running => true,
    };
    (table.entries.iter().filter(|e| e.job == 0 && is_busy(e)).count(), table.free() > FOR_FINDERS)
}

/// Returns true if something has found no entry; the caller sees to it.
pub fn take_missed() -> bool {
    std::mem::take(&mut TABLE.exclusive().missed)
}

/// When the next entry is due, or a worker that notices nothing is to be ended.
pub fn next_due() -> Option<i64> {
    let due = |e: &Entry| match e.phase {
        Phase::Wanted => Some(e.at),
        _ => e.is_deaf_at(),
    };
    TABLE.share().entries.iter().filter_map(due).min()
}

/// The launcher is about to start an entry; or could not, and tries again at `again`.
pub fn starting(database: u32, job: i64, now: i64) {
    if let Some(e) = TABLE.exclusive().find(database, job) {
        (e.phase, e.at, e.pid, e.no_slot) = (Phase::Starting, now, 0, false);
    }
}

pub fn no_slot(database: u32, job: i64, again: i64) {
    if let Some(e) = TABLE.exclusive().find(database, job) {
        (e.phase, e.at, e.no_slot) = (Phase::Wanted, again, true);
    }
}

/// Asks a job of this role, which has several workers, to give one back: the one that came up last. It queues again.
/// Nobody is asked while one that was asked has not gone.
pub fn ask_to_give_way(owner: u32, now: i64) {
    let mut table = TABLE.exclusive();
    let runs = |e: &Entry| e.phase == Phase::Running && e.job != 0;
    if table.entries.iter().any(|e| runs(e) && e.gives_way + GIVES_WAY > now) {
        return;
    }
    let own = table.entries.iter_mut().filter(|e| runs(e) && e.owner == owner && e.gives_way == 0);
    if let Some(e) = own.max_by_key(|e| e.at) {
        e.gives_way = now;
        let pid = e.pid;
        drop(table);
        set_latch(pid);
    }
}

/// Notes that no background worker was free for the last start, or that one was.
pub fn set_no_slot(value: bool) {
    TABLE.exclusive().no_slot = value;
}

/// Removes workers that were started a while ago and never came up: they could not connect.
pub fn bury(now: i64, patience: i64) {
    let mut table = TABLE.exclusive();
    for i in 0..ENTRIES {
        if table.entries.get(i).is_some_and(|e| e.phase == Phase::Starting && e.at + patience < now) {
            table.died(i, now, false);
        }
    }
}

/// Nobody wants a job any more that was about to be started.
pub fn unwant(database: u32, job: i64) {
    if let Some(e) = TABLE.exclusive().find(database, job).filter(|e| e.phase == Phase::Wanted) {
        *e = FREE;
    }
}
