//! A cluster and its life.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Output, Stdio};
use std::thread::{panicking, sleep};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::Builder;
use crate::builder::PORT;
use crate::install::{program, server_program, target_dir};
use crate::process::{Process, kill_tree};

/// For starts and stops: recovery and checkpoints on a busy machine take a while.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);
/// As much of the log as a panic shows, in lines.
const TAIL_LINES: usize = 40;

/// A Postgres cluster in a temporary directory.
///
/// Dropping it stops the server and removes the directory. When the test is
/// panicking, the server's log is kept in `e2e-logs/NAME/` of Cargo's target
/// directory.
pub struct Cluster {
    name: String,
    dir: PathBuf,
    env: Vec<(String, String)>,
    program: PathBuf,
    /// Limits of open files, soft and hard.
    files: Option<(u64, u64)>,
    server: Option<Child>,
    /// Killed and not started since: shared memory is left behind.
    crashed: bool,
}

impl Cluster {
    /// Starts the making of a cluster. The name is for the kept log.
    pub fn builder(name: &str) -> Builder {
        Builder::new(name)
    }

    pub(crate) fn new(
        name: String,
        dir: PathBuf,
        env: Vec<(String, String)>,
        program: PathBuf,
        files: Option<(u64, u64)>,
    ) -> Self {
        Self { name, dir, env, program, files, server: None, crashed: false }
    }

    /// Starts the server and waits until it takes connections, after a crash
    /// until it has recovered.
    #[track_caller]
    pub fn start(&mut self) {
        if let Err(message) = self.try_start() {
            panic!("{message}");
        }
    }

    /// Like `start`; the error holds what the server logged meanwhile.
    pub fn try_start(&mut self) -> Result<(), String> {
        assert!(self.server.is_none(), "the server is running already");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log_start = self.log().len();
            let error = match self.start_once(deadline) {
                Ok(()) => {
                    self.crashed = false;
                    return Ok(());
                }
                Err(error) => error,
            };
            let log = self.log().split_off(log_start);
            // Just after a kill the kernel may still count processes as attached.
            let in_use = log.contains("pre-existing shared memory block");
            if !in_use || Instant::now() > deadline {
                return Err(format!("{error}; its log ends\n{}", tail(&log)));
            }
            sleep(PAUSE);
        }
    }

    fn start_once(&mut self, deadline: Instant) -> Result<(), String> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .and_then(|file| Ok((file.try_clone()?, file)));
        let (stdout, stderr) = log.map_err(|e| format!("cannot open the log: {e}"))?;
        let mut command = server_program(&self.program, &self.dir);
        if let Some((soft, hard)) = self.files {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            // SAFETY: a system call on a struct of our own.
            let set = move || match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            };
            // SAFETY: between fork and exec nothing but a system call on a copied struct is done.
            unsafe { command.pre_exec(set) };
        }
        let child = command
            .arg("-D")
            .arg(self.data_dir())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|e| format!("cannot run the server: {e}"))?;
        let child = self.server.insert(child);
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                self.server = None;
                return Err(format!("the server did not start: {status}"));
            }
            if connect(&self.dir, "postgres", "postgres").is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.kill_all();
                return Err(format!("the server did not start within {PATIENCE:?}"));
            }
            sleep(PAUSE);
        }
    }

    /// Stops the server in fast mode: sessions end, a checkpoint is made.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.stop_with(libc::SIGINT)
    }

    /// Stops the server in immediate mode: the next start recovers.
    #[track_caller]
    pub fn stop_immediate(&mut self) -> ExitStatus {
        self.stop_with(libc::SIGQUIT)
    }

    #[track_caller]
    fn stop_with(&mut self, signal: i32) -> ExitStatus {
        assert!(self.server.is_some(), "the server is not running");
        match self.end(signal, PATIENCE) {
            Some(status) => status,
            None => {
                self.kill_all();
                panic!(
                    "the server did not stop within {PATIENCE:?} and was killed; its log ends\n{}",
                    tail(&self.log())
                );
            }
        }
    }

    /// Signals the postmaster and waits for it to end.
    fn end(&mut self, signal: i32, patience: Duration) -> Option<ExitStatus> {
        let child = self.server.as_mut()?;
        let deadline = Instant::now() + patience;
        if let Some(postmaster) = Process::find(child.id()) {
            postmaster.signal(signal);
        }
        while Instant::now() < deadline {
            if let Ok(Some(status)) = child.try_wait() {
                self.server = None;
                return Some(status);
            }
            sleep(PAUSE);
        }
        None
    }

    /// Stops in fast mode and starts again.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Kills the postmaster and all processes below it at once, as a power cut
    /// would, and waits until they are gone. The next `start` recovers.
    #[track_caller]
    pub fn kill9(&mut self) {
        assert!(self.server.is_some(), "the server is not running");
        let left = self.kill_all();
        assert!(left.is_empty(), "processes that survive SIGKILL: {left:?}");
    }

    /// Kills all processes; returns those that did not go.
    fn kill_all(&mut self) -> Vec<Process> {
        let Some(mut child) = self.server.take() else {
            return Vec::new();
        };
        self.crashed = true;
        let mut left = kill_tree(child.id());
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Reaps the postmaster.
            let _ = child.try_wait();
            left.retain(|process| !process.is_gone());
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            sleep(PAUSE);
        }
    }

    /// A session of the superuser, `postgres`.
    #[track_caller]
    pub fn connect(&self, db: &str) -> Client {
        self.connect_as(db, "postgres")
    }

    /// A session of a role; none needs a password.
    #[track_caller]
    pub fn connect_as(&self, db: &str, role: &str) -> Client {
        match self.try_connect_as(db, role) {
            Ok(client) => client,
            Err(error) => panic!("cannot connect to {db} as {role}: {error}; the log ends\n{}", tail(&self.log())),
        }
    }

    /// A session of a role, or why there is none.
    pub fn try_connect_as(&self, db: &str, role: &str) -> Result<Client, postgres::Error> {
        connect(&self.dir, db, role)
    }

    /// Runs a script through `psql`, as superuser, up to the first error. Rows
    /// come unaligned and without headings.
    pub fn psql(&self, db: &str, sql: &str) -> Output {
        let mut child = program("psql")
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-"])
            .args(["-U", "postgres", "-p", &PORT.to_string(), "-d", db, "-h"])
            .arg(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("psql runs");
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        std::thread::scope(|scope| {
            // On the side, as psql may have to write before it reads on. It fails
            // when psql ends early, which its status tells.
            scope.spawn(move || {
                let _ = stdin.write_all(sql.as_bytes());
            });
            child.wait_with_output().expect("psql can be waited for")
        })
    }

    /// Runs one of Postgres' programs as superuser, with options of its own.
    pub fn run_program(&self, name: &str, options: &[&str]) -> Output {
        let mut command = program(name);
        command.args(["-U", "postgres", "-p", &PORT.to_string(), "-h"]).arg(&self.dir).args(options);
        command.output().unwrap_or_else(|e| panic!("{name} does not run: {e}"))
    }

    /// Directory of the server's socket, for `host`.
    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// Number in the socket's name, for `port`. Nothing listens on TCP.
    pub fn port(&self) -> u16 {
        PORT
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn is_running(&self) -> bool {
        self.server.is_some()
    }

    /// Process id of the postmaster.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        let server = self.server.as_ref();
        server.expect("the server is running").id()
    }

    /// All the server has logged since the cluster was made.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn keep_log(&self) {
        let dir = target_dir().join("e2e-logs").join(&self.name);
        let file = dir.join("postgres.log");
        let kept = fs::create_dir_all(&dir).and_then(|()| fs::copy(self.log_file(), &file));
        match kept {
            Ok(_) => eprintln!("the server's log is kept in {}", file.display()),
            Err(error) => eprintln!("the server's log cannot be kept: {error}"),
        }
    }

    /// A killed server leaves shared memory behind, out of the reach of
    /// `remove_dir_all`. Postgres frees it when it next starts, for which a
    /// single-user session without input is enough.
    fn free_shared_memory(&self) {
        let _ = server_program("postgres", &self.dir)
            .args(["--single", "-c", "shared_preload_libraries=", "-D"])
            .arg(self.data_dir())
            .arg("postgres")
            .stdin(Stdio::null())
            .output();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.server.is_some() && self.end(libc::SIGQUIT, PATIENCE / 6).is_none() {
            self.kill_all();
        }
        if panicking() {
            self.keep_log();
        }
        if self.crashed {
            self.free_shared_memory();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn connect(socket_dir: &Path, db: &str, role: &str) -> Result<Client, postgres::Error> {
    postgres::Config::new().host_path(socket_dir).port(PORT).dbname(db).user(role).connect(NoTls)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
