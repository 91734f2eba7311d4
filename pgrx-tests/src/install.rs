//! The installed Postgres, and the account its server runs under.

use std::ffi::OsStr;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Debian's place, for when `pg_config` is not on the `PATH`.
const DEBIAN_PG_CONFIG: &str = "/usr/lib/postgresql/15/bin/pg_config";

/// Directory of the programs: that of `$PG_CONFIG`, else of `pg_config` on the
/// `PATH`, else Debian's.
pub(crate) fn bindir() -> &'static Path {
    static BINDIR: OnceLock<PathBuf> = OnceLock::new();
    BINDIR.get_or_init(|| {
        let given = std::env::var_os("PG_CONFIG");
        let tries = match &given {
            Some(path) => vec![path.as_os_str()],
            None => vec![OsStr::new("pg_config"), OsStr::new(DEBIAN_PG_CONFIG)],
        };
        tries
            .iter()
            .find_map(|program| Command::new(program).arg("--bindir").output().ok())
            .map(|output| PathBuf::from(stdout(&output).trim()))
            .unwrap_or_else(|| panic!("none of {tries:?} runs; set PG_CONFIG"))
    })
}

/// One of the programs, without the caller's `PG*` variables, and without those that make Rust's panics wordy: the
/// server's log is to read as its users would see it.
pub(crate) fn program(name: impl AsRef<Path>) -> Command {
    let mut command = Command::new(bindir().join(name));
    command.env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("PG") {
            command.env_remove(variable);
        }
    }
    command
}

/// A program that runs as the server's account, in `dir`.
pub(crate) fn server_program(name: impl AsRef<Path>, dir: &Path) -> Command {
    let mut command = program(name);
    command.current_dir(dir);
    if let Some((uid, gid)) = server_account() {
        command.uid(uid).gid(gid);
    }
    command
}

/// Gives a directory to the server's account.
pub(crate) fn give_to_server(dir: &Path) {
    if let Some((uid, gid)) = server_account() {
        chown(dir, Some(uid), Some(gid)).unwrap_or_else(|e| panic!("chown {dir:?}: {e}"));
    }
}

/// Ids of the user `postgres` and its group when we are root, under which the
/// server refuses to run; otherwise none: the server runs as we do.
fn server_account() -> Option<(u32, u32)> {
    static ACCOUNT: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    *ACCOUNT.get_or_init(|| {
        // SAFETY: geteuid takes nothing and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return None;
        }
        let id = |option| {
            let output = run(Command::new("id").args([option, "postgres"]));
            stdout(&output).trim().parse().expect("id prints a number")
        };
        Some((id("-u"), id("-g")))
    })
}

/// Copies a directory, owners and modes included.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--reflink=auto"]).args([from, to]));
}

/// Runs a command that has to succeed.
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        panic!("{command:?}: {}\n{}{stderr}", output.status, stdout(&output));
    }
    output
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Cargo's target directory, for what outlives a test.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
    }
}
