//! The process, for workers and sessions alike: its signals, its waits, its connection.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, Ordering};
use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorker, SignalWakeFlags};
use pgrx::prelude::*;

unsafe extern "C-unwind" {
    /// Postgres' own handler of SIGTERM: ends the process at the next check for interrupts, also in the midst of a
    /// long statement.
    fn die(signal: std::ffi::c_int);
    /// Postgres' own handler of SIGINT: cancels the statement. `lock_timeout` sends that signal too.
    fn StatementCancelHandler(signal: std::ffi::c_int);
    fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
    fn RegisterTimeout(timeout: std::ffi::c_int, handler: extern "C-unwind" fn()) -> std::ffi::c_int;
    fn enable_timeout_after(timeout: std::ffi::c_int, milliseconds: std::ffi::c_int);
    fn enable_timeout_every(timeout: std::ffi::c_int, first: pg_sys::TimestampTz, milliseconds: std::ffi::c_int);
    fn disable_timeout(timeout: std::ffi::c_int, keeps_indicator: bool);
}

/// The timeout that cancels a statement: of `TimeoutId`, in all versions.
const STATEMENT_TIMEOUT: std::ffi::c_int = 3;
/// As `RegisterTimeout()` is asked for one of an extension's own, in all versions: it takes the next that is free.
const OWN_TIMEOUT: std::ffi::c_int = 16;
/// Interval at which a process that holds on looks whether it has done so for too long, milliseconds.
const LOOK: std::ffi::c_int = 500;
/// Time for which it may hold on after a SIGTERM, microseconds: longer than it takes to write what it has. A function
/// of a user may catch each cancellation of its statement; it cannot catch the error of `die()`.
const LONGEST_HOLD: i64 = 6_000_000;

static IN_TRANSACTION: AtomicBool = AtomicBool::new(false);
static TOLD_TO_END: AtomicBool = AtomicBool::new(false);
/// When that was first, microseconds.
static TOLD_AT: AtomicI64 = AtomicI64::new(0);
/// The timeout that looks at it.
static HOLD_TIMEOUT: AtomicI32 = AtomicI32::new(0);
static HOLDS_ON: AtomicBool = AtomicBool::new(false);
static WRITES_LAST: AtomicBool = AtomicBool::new(false);

/// SIGTERM ends the process as it does any of Postgres. It is remembered, so that the end does not count as a death. A
/// process that has something to write first is woken, and its statement is cancelled.
extern "C-unwind" fn terminate(signal: std::ffi::c_int) {
    // SAFETY: the handlers that Postgres itself installs; they set flags and the latch. The clock is read.
    unsafe {
        if !TOLD_TO_END.swap(true, Ordering::Relaxed) {
            TOLD_AT.store(GetCurrentTimestamp(), Ordering::Relaxed);
        }
        if !HOLDS_ON.load(Ordering::Relaxed) {
            die(signal);
        } else if WRITES_LAST.load(Ordering::Relaxed) {
            // The postmaster sends it twice, to the process and to its group.
        } else if IN_TRANSACTION.load(Ordering::Relaxed) {
            StatementCancelHandler(signal);
        } else {
            pg_sys::SetLatch(pg_sys::MyLatch);
        }
    }
}

/// A process that was told to end, and holds on still, ends.
extern "C-unwind" fn look_at_hold() {
    // SAFETY: called by Postgres' handler of SIGALRM; reads the clock, and sets flags and the latch.
    unsafe {
        if TOLD_TO_END.load(Ordering::Relaxed) && TOLD_AT.load(Ordering::Relaxed) + LONGEST_HOLD < GetCurrentTimestamp()
        {
            die(pg_sys::SIGTERM as i32);
        }
    }
}

/// Sets whether a SIGTERM wakes this process instead of ending it. A process that holds on looks at `is_told_to_end()`,
/// writes what it has within a few seconds, and calls `end_now()`.
pub fn hold_on(value: bool) {
    HOLDS_ON.store(value, Ordering::Relaxed);
}

/// This process, which was told to end, writes what it has: another SIGTERM changes nothing.
pub fn write_last() {
    HOLDS_ON.store(true, Ordering::Relaxed);
    WRITES_LAST.store(true, Ordering::Relaxed);
}

/// Ends the process as a SIGTERM does.
pub fn end_now() {
    // SAFETY: on the main thread; sets flags.
    unsafe { die(pg_sys::SIGTERM as i32) };
    pgrx::check_for_interrupts!();
}

/// Cancels what this process does in a transaction then.
pub fn cancel_after(milliseconds: i32) {
    // SAFETY: on the main thread of a process that is connected to a database: the timeout is registered.
    unsafe { enable_timeout_after(STATEMENT_TIMEOUT, milliseconds) };
}

/// A limit of time, until this is dropped: then what this process does is cancelled, as by `pg_cancel_backend()`.
pub struct TimeLimit(());

/// Its timeout, once it is registered.
static LIMIT_TIMEOUT: AtomicI32 = AtomicI32::new(0);
static IS_TIME_UP: AtomicBool = AtomicBool::new(false);

extern "C-unwind" fn time_is_up() {
    // SAFETY: called by Postgres' handler of SIGALRM; reads and sets flags, and sets the latch.
    unsafe {
        // A cancellation that came before it is another's, and goes on as such.
        if pg_sys::QueryCancelPending == 0 {
            IS_TIME_UP.store(true, Ordering::Relaxed);
            StatementCancelHandler(pg_sys::SIGINT as i32);
        }
    }
}

impl TimeLimit {
    pub fn new(milliseconds: i32) -> Self {
        IS_TIME_UP.store(false, Ordering::Relaxed);
        // SAFETY: on the main thread of a process that is connected to a database. A process registers one timeout here,
        // and has room for ten.
        unsafe {
            if LIMIT_TIMEOUT.load(Ordering::Relaxed) == 0 {
                LIMIT_TIMEOUT.store(RegisterTimeout(OWN_TIMEOUT, time_is_up), Ordering::Relaxed);
            }
            enable_timeout_after(LIMIT_TIMEOUT.load(Ordering::Relaxed), milliseconds);
        }
        Self(())
    }

    /// Ends it in order: where the time is up, an error is raised unless one was already.
    pub fn end(self) {
        if IS_TIME_UP.load(Ordering::Relaxed) {
            pgrx::check_for_interrupts!();
        }
        drop(self);
        IS_TIME_UP.store(false, Ordering::Relaxed);
    }

    /// Returns true if the time of the last one was up; said once.
    pub fn was_up() -> bool {
        IS_TIME_UP.swap(false, Ordering::Relaxed)
    }
}

impl Drop for TimeLimit {
    fn drop(&mut self) {
        // SAFETY: on the main thread; the timeout is registered, and this raises nothing. A cancellation that comes after
        // another error is forgotten.
        unsafe {
            disable_timeout(LIMIT_TIMEOUT.load(Ordering::Relaxed), false);
            if IS_TIME_UP.load(Ordering::Relaxed) {
                pg_sys::QueryCancelPending = 0;
            }
        }
    }
}

/// Returns true if this is a worker of ours, in a transaction.
pub fn is_worker() -> bool {
    IN_TRANSACTION.load(Ordering::Relaxed)
}

/// Returns true if this process was sent a SIGTERM.
pub fn is_told_to_end() -> bool {
    TOLD_TO_END.load(Ordering::Relaxed)
}

/// SIGINT cancels a worker's statement; outside a transaction there is nothing to cancel, and an error would end the
/// process.
extern "C-unwind" fn cancel(signal: std::ffi::c_int) {
    if IN_TRANSACTION.load(Ordering::Relaxed) {
        // SAFETY: the handler that Postgres itself installs; sets flags and the latch.
        unsafe { StatementCancelHandler(signal) };
    }
}

/// Says whether a statement may be cancelled from now on. A cancellation that came too late is forgotten. In a
/// transaction code of users may run: a process that holds on does so for a bounded time.
pub fn set_in_transaction(value: bool) {
    IN_TRANSACTION.store(value, Ordering::Relaxed);
    let timeout = HOLD_TIMEOUT.load(Ordering::Relaxed);
    if timeout != 0 {
        // SAFETY: on the main thread; the timeout is registered.
        unsafe {
            if value && HOLDS_ON.load(Ordering::Relaxed) {
                enable_timeout_every(timeout, GetCurrentTimestamp() + i64::from(LOOK) * 1_000, LOOK);
            } else {
                disable_timeout(timeout, false);
            }
        }
    }
    if !value {
        // SAFETY: a flag that the handler above sets and that is read on the main thread.
        unsafe { pg_sys::QueryCancelPending = 0 };
    }
}

/// Sets the signal handlers, then lets signals in.
pub fn handle_signals() {
    // SAFETY: at the start of a background worker, while signals are blocked. pgrx' attach_signal_handlers unblocks
    // them as its last act.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        {
            pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(terminate));
            pg_sys::pqsignal(pg_sys::SIGINT as i32, Some(cancel));
        }
        #[cfg(feature = "pg18")]
        {
            pg_sys::pqsignal_be(pg_sys::SIGTERM as i32, Some(terminate));
            pg_sys::pqsignal_be(pg_sys::SIGINT as i32, Some(cancel));
        }
        HOLD_TIMEOUT.store(RegisterTimeout(OWN_TIMEOUT, look_at_hold), Ordering::Relaxed);
    }
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
}

/// A socket to wait for besides the latch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    pub descriptor: i32,
    pub for_writing: bool,
}

/// Waits for the process' latch, a socket or the time, and does what interrupts ask for: it may not return. In a
/// session, an interrupt raises an error.
pub fn wait(socket: Option<Socket>, timeout: Option<Duration>) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH;
    let mut ms = -1;
    if let Some(t) = timeout {
        events |= pg_sys::WL_TIMEOUT;
        // Rounded up: a wait of no milliseconds would be repeated until the time is up.
        ms = t.as_micros().div_ceil(1000).min(60_000) as i64;
    }
    // SAFETY: on the main thread; the latch is the process' own, the descriptor is open.
    unsafe {
        match socket {
            // Postgres keeps what the kernel needs for such a wait, and makes it anew for a socket.
            None => pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, ms, pg_sys::PG_WAIT_EXTENSION),
            Some(Socket { descriptor, for_writing }) => {
                events |= pg_sys::WL_SOCKET_READABLE;
                if for_writing {
                    events |= pg_sys::WL_SOCKET_WRITEABLE;
                }
                pg_sys::WaitLatchOrSocket(pg_sys::MyLatch, events as i32, descriptor, ms, pg_sys::PG_WAIT_EXTENSION)
            }
        };
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

/// Reads the configuration again if SIGHUP asked for it.
pub fn reload_if_asked() {
    if BackgroundWorker::sighup_received() {
        // SAFETY: on the main thread of a worker, outside any transaction.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
}

/// Sets the state and text in `pg_stat_activity`.
pub fn report(state: pg_sys::BackendState::Type, text: &str) {
    if let Ok(text) = std::ffi::CString::new(text) {
        // SAFETY: the text is copied.
        unsafe { pg_sys::pgstat_report_activity(state, text.as_ptr()) };
    }
}

/// The database this process is connected to.
pub fn my_database() -> u32 {
    // SAFETY: set at connection, read on the main thread.
    unsafe { pg_sys::MyDatabaseId.to_u32() }
}

/// This process.
pub fn my_pid() -> i32 {
    // SAFETY: set at the start of the process.
    unsafe { pg_sys::MyProcPid }
}

/// The role whose rights apply.
pub fn current_user() -> pg_sys::Oid {
    // SAFETY: reads a variable on the main thread.
    unsafe { pg_sys::GetUserId() }
}
