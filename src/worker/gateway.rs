//! The gateway's process: owns the socket's file, starts the network thread, and from then on does what a process of
//! Postgres has to do (interrupts, configuration, log), while the thread never calls Postgres.

use std::os::fd::FromRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use llm_batch_gateway::{Gateway, Kept, Places, Settings};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::failure::failure_point;
use crate::process::{handle_signals, is_told_to_end, reload_if_asked, report, wait};
use crate::{kept, settings, shared};

/// The socket, relative to the data directory, which is the server's working directory. Base backups leave this
/// folder's content out.
pub const SOCKET: &str = "pg_stat_tmp/llm_batch.sock";

fn current_settings() -> Settings {
    Settings { enabled: settings::enabled(), memory: settings::gateway_memory(), cache: settings::gateway_cache() }
}

/// Binds the socket. There is one gateway a data directory, so what lies in its place is left of an earlier one, or is
/// nobody's: files, links and sockets are removed, a folder is not.
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

/// The file in the socket's place: its device and number.
fn file() -> Option<(u64, u64)> {
    std::fs::symlink_metadata(SOCKET).ok().map(|m| (m.dev(), m.ino()))
}

/// Fewer files than this bound what goes on at the same time in a way that is noticed.
const FEW_FILES: u64 = 4_096;

/// Raises the limit of open files as far as that may be done, and says how many there are. Postgres leaves it as the
/// server was started, often at 1,024, for programs that could not do with more; this process can.
fn raise_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain system calls on a struct of our own. Where the hard limit stands for none, the system may refuse it as
    // the soft one, which then stays.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return FEW_FILES;
        }
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0 {
            limit = raised;
        }
    }
    #[allow(clippy::useless_conversion)] // Not on every platform.
    limit.rlim_cur.into()
}

/// The places that the file limit of this process leaves.
fn places() -> Places {
    let files = raise_files();
    let places = Places::within(files);
    if files < FEW_FILES {
        pgrx::log!(
            "the llm_batch gateway may have {files} files open: at most {} requests are under way at the same time, and \
             {} sessions, of which {} of a role, ask at the same time",
            places.requests,
            places.sessions,
            places.of_a_role
        );
    }
    places
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

/// Notes on limits of this process' gateway.
static KEPT: OnceLock<Kept> = OnceLock::new();

/// Clients look into why it has gone, which they notice after this.
#[pg_guard]
extern "C-unwind" fn on_exit(_code: i32, _arg: pg_sys::Datum) {
    shared::gateway_ends(is_told_to_end());
    if let Some(known) = KEPT.get() {
        kept::put(&known.stock());
    }
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
    shared::gateway_starts();
    let (log, lines) = mpsc::channel();
    let (before, places) = (kept::get(), places());
    let started = bind()
        .and_then(|listener| without_signals(|| Gateway::start(listener, current_settings(), places, before, log)));
    let gateway = started.unwrap_or_else(|e| {
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_IO_ERROR,
            "could not start the llm_batch gateway",
            "llm_batch_gateway_main",
        )
        .set_detail(format!("{SOCKET}: {e}."))
        .set_hint("The gateway tries again every second.")
        .report(PgLogLevel::FATAL);
        unreachable!("FATAL ends the process")
    });
    let _ = KEPT.set(gateway.kept());
    let bound = file();
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
        // Nobody could connect any more. The postmaster starts a gateway anew, and clients come back to it.
        if file() != bound {
            error!("the socket {SOCKET} of the llm_batch gateway was removed or replaced");
        }
        if gateway.is_finished() {
            error!("the network thread of the llm_batch gateway ended");
        }
    }
}

unsafe extern "C-unwind" {
    /// The user at the other end of a Unix socket. The server has this function on every platform.
    fn getpeereid(socket: libc::c_int, uid: *mut libc::uid_t, gid: *mut libc::gid_t) -> libc::c_int;
}

/// Connects to the gateway, without waiting: with many clients before us it fails, to be tried again. A listener that
/// runs as another operating system user is sent nothing.
pub fn connect() -> std::io::Result<UnixStream> {
    let result = |returned: libc::c_int| if returned < 0 { Err(std::io::Error::last_os_error()) } else { Ok(returned) };
    // SAFETY: plain system calls on a descriptor that is ours alone; the address is zeroed, holds the path and a zero
    // byte, and outlives the call.
    let (stream, peer) = unsafe {
        let socket = result(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0))?;
        let stream = UnixStream::from_raw_fd(socket);
        result(libc::fcntl(socket, libc::F_SETFD, libc::FD_CLOEXEC))?;
        stream.set_nonblocking(true)?;
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path.iter_mut().zip(SOCKET.bytes()) {
            *to = from as libc::c_char;
        }
        let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        result(libc::connect(socket, (&raw const address).cast(), length))?;
        let (mut uid, mut gid) = (0, 0);
        result(getpeereid(socket, &mut uid, &mut gid))?;
        (stream, uid)
    };
    // SAFETY: reads this process' own user.
    if peer != unsafe { libc::geteuid() } {
        return Err(std::io::Error::other(format!("{SOCKET} belongs to the operating system user {peer}")));
    }
    Ok(stream)
}
