//! The gateway's process: owns the socket's file, starts the network thread, and from then on does what a process of
//! Postgres has to do (interrupts, configuration, log), while the thread never calls Postgres.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::Duration;

use llm_batch_gateway::{Gateway, Settings};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::{handle_signals, is_told_to_end, reload_if_asked, report, wait};
use crate::failure::failure_point;
use crate::{settings, shared};

/// The socket, relative to the data directory, which is the server's working directory. Base backups leave this
/// folder's content out.
pub const SOCKET: &str = "pg_stat_tmp/llm_batch.sock";

fn current_settings() -> Settings {
    Settings { enabled: settings::enabled(), memory: settings::gateway_memory(), cache: settings::gateway_cache() }
}

/// Binds the socket. There is one gateway a data directory, so what lies in its place is left of an earlier one.
fn bind() -> std::io::Result<UnixListener> {
    match std::fs::remove_file(SOCKET) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::create_dir_all("pg_stat_tmp")?;
    let listener = UnixListener::bind(SOCKET)?;
    std::fs::set_permissions(SOCKET, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Runs `f` with all signals blocked, so that threads it starts never get one: handlers call Postgres.
fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: sets and restores this thread's own mask; sigset_t may be all zeroes before sigfillset.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let value = f();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        value
    }
}

/// Clients look into why it has gone, which they notice after this.
#[pg_guard]
extern "C-unwind" fn on_exit(_code: i32, _arg: pg_sys::Datum) {
    shared::set_gateway_told(is_told_to_end());
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn llm_batch_gateway_main(_arg: pg_sys::Datum) {
    handle_signals();
    // SAFETY: at the start of a background worker. No database: seen in pg_stat_activity, takes part in barriers.
    unsafe {
        pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0));
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
    shared::set_gateway_told(false);
    let (log, lines) = mpsc::channel();
    let started = bind().and_then(|listener| without_signals(|| Gateway::start(listener, current_settings(), log)));
    let gateway = started.unwrap_or_else(|e| {
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_IO_ERROR,
            "could not start the llm_batch gateway",
            "llm_batch_gateway_main",
        )
        .set_detail(format!("{SOCKET}: {e}"))
        .report(PgLogLevel::FATAL);
        unreachable!("FATAL ends the process")
    });
    report(pg_sys::BackendState::STATE_IDLE, "");
    loop {
        // Ends here, without unwinding, when the server shuts down: the thread dies with the process.
        wait(None, Some(Duration::from_millis(500)));
        failure_point!("gateway");
        reload_if_asked();
        gateway.configure(current_settings());
        while let Ok(line) = lines.try_recv() {
            pgrx::log!("{line}");
        }
        if gateway.is_finished() {
            error!("the network thread of the llm_batch gateway ended");
        }
    }
}

/// Connects to the gateway.
pub fn connect() -> std::io::Result<UnixStream> {
    let stream = UnixStream::connect(SOCKET)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}
