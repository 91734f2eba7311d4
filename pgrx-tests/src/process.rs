//! Processes: who descends from whom, who lives, signals.

use std::fs;

/// A process. The start time, in clock ticks since boot, tells it from a later
/// one that was given the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    parent: u32,
    start_ticks: u64,
    /// Ended, and not yet reaped by its parent.
    zombie: bool,
}

impl Process {
    /// Reads `/proc/PID/stat`; `None` when there is no such process.
    pub(crate) fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the command, in parentheses; it may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(Self {
            pid,
            zombie: matches!(*fields.first()?, "Z" | "X"),
            parent: fields.get(1)?.parse().ok()?,
            start_ticks: fields.get(19)?.parse().ok()?,
        })
    }

    /// Returns true if it has ended. Orphans may stay zombies for long: not every container has an init process that
    /// reaps them.
    pub(crate) fn is_gone(&self) -> bool {
        Self::find(self.pid).is_none_or(|now| now.zombie || now.start_ticks != self.start_ticks)
    }

    /// Sends a signal, unless the process is gone.
    pub(crate) fn signal(&self, signal: i32) {
        if !self.is_gone() {
            // SAFETY: kill takes two integers and touches no memory of ours.
            unsafe { libc::kill(self.pid as libc::pid_t, signal) };
        }
    }
}

/// Stops a process, until `go_on()`.
pub fn stop(pid: i64) {
    signal(pid, libc::SIGSTOP);
}

/// Lets a process that is stopped go on.
pub fn go_on(pid: i64) {
    signal(pid, libc::SIGCONT);
}

fn signal(pid: i64, signal: i32) {
    if let Some(process) = u32::try_from(pid).ok().and_then(Process::find) {
        process.signal(signal);
    }
}

/// Ends a process and all its descendants at once, as a power cut would; returns
/// them. None of them gets to see another one die, as all are stopped first.
pub(crate) fn kill_tree(root: u32) -> Vec<Process> {
    let mut tree: Vec<Process> = Process::find(root).into_iter().collect();
    let mut stopped = 0;
    // A process that is not stopped yet may fork: look until nothing new comes.
    while stopped < tree.len() {
        for process in &tree[stopped..] {
            process.signal(libc::SIGSTOP);
        }
        stopped = tree.len();
        for process in all() {
            let known = |pid| tree.iter().any(|p| p.pid == pid);
            if known(process.parent) && !known(process.pid) {
                tree.push(process);
            }
        }
    }
    for process in &tree {
        process.signal(libc::SIGKILL);
    }
    tree
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter_map(Process::find).collect()
}
