//! Making a cluster: `initdb` once per installation, then copies.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Cluster;
use crate::install::{copy_dir, give_to_server, program, run, server_program, stdout, target_dir};

/// Any port does: every cluster has a socket directory of its own.
pub(crate) const PORT: u16 = 5432;

/// Settings of a cluster to be made.
#[derive(Clone, Debug)]
pub struct Builder {
    name: String,
    conf: Vec<(String, String)>,
    env: Vec<(String, String)>,
    preload: bool,
    server: PathBuf,
    files: Option<(u64, u64)>,
}

impl Builder {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            conf: Vec::new(),
            env: Vec::new(),
            preload: true,
            server: "postgres".into(),
            files: None,
        }
    }

    /// Sets a parameter in `postgresql.conf`; the last value given counts, also
    /// over the defaults of this harness.
    pub fn conf(mut self, name: &str, value: &str) -> Self {
        self.conf.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets a variable in the server's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets whether `shared_preload_libraries` holds `pg_llm_batch`. Default true.
    pub fn preload(mut self, preload: bool) -> Self {
        self.preload = preload;
        self
    }

    /// The server's program, if it is that of a copy of the installation.
    pub fn server(mut self, program: &Path) -> Self {
        self.server = program.to_owned();
        self
    }

    /// The soft and the hard limit of open files with which the server is started.
    pub fn files(mut self, soft: u64, hard: u64) -> Self {
        self.files = Some((soft, hard));
        self
    }

    /// Makes the cluster and starts it.
    #[track_caller]
    pub fn start(self) -> Cluster {
        let mut cluster = self.create();
        cluster.start();
        cluster
    }

    /// Makes the cluster without starting it.
    pub fn create(self) -> Cluster {
        let dir = new_dir();
        copy_dir(template(), &dir.join("data"));
        let conf_file = dir.join("data/postgresql.conf");
        fs::write(&conf_file, self.conf_text(&dir)).unwrap_or_else(|e| panic!("cannot write {conf_file:?}: {e}"));
        Cluster::new(self.name, dir, self.env, self.server, self.files)
    }

    /// The whole `postgresql.conf`. It replaces that of `initdb`, whose owner
    /// and mode the file keeps.
    fn conf_text(&self, dir: &Path) -> String {
        let socket_dir = dir.to_string_lossy();
        let mut lines = vec![
            ("listen_addresses", ""),
            ("unix_socket_directories", &*socket_dir),
            ("max_connections", "100"),
            ("max_worker_processes", "32"),
            ("log_line_prefix", "%m [%p] %b %q%u@%d "),
            // Writes of a killed server are in the operating system's cache and survive it: only a crash of the machine
            // needs these.
            ("fsync", "off"),
            ("full_page_writes", "off"),
        ];
        let port = PORT.to_string();
        lines.push(("port", &port));
        if self.preload {
            lines.push(("shared_preload_libraries", "pg_llm_batch"));
        }
        lines.extend(self.conf.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        lines
            .into_iter()
            .map(|(name, value)| {
                let value = value.replace('\\', r"\\").replace('\'', "''");
                format!("{name} = '{value}'\n")
            })
            .collect()
    }
}

/// A new directory of the server's account, with a path short enough for
/// sockets (107 bytes in all).
pub(crate) fn new_dir() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pg-e2e-{}-{count}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {
                give_to_server(&dir);
                return dir;
            }
            // Left over from a killed process that had our id.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => panic!("cannot make {dir:?}: {error}"),
        }
    }
}

/// A data directory as `initdb` leaves it, kept under Cargo's target directory
/// for this and later runs.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let work = new_dir();
        let version = stdout(&run(program("postgres").arg("--version")));
        let version: String = version.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect();
        let owner = fs::metadata(&work).expect("it was just made").uid();
        let parent = target_dir().join("e2e-template");
        let template = parent.join(format!("{version}-{owner}"));
        if !template.exists() {
            run(server_program("initdb", &work)
                .arg("--pgdata=data")
                .args(["--username=postgres", "--auth=trust", "--no-sync"])
                .args(["--encoding=UTF8", "--locale=C.UTF-8"]));
            fs::create_dir_all(&parent).expect("the target directory can be written");
            // Whole or not at all, as other test processes look for it too.
            let unfinished = parent.join(format!("unfinished-{}", std::process::id()));
            copy_dir(&work.join("data"), &unfinished);
            if let Err(error) = fs::rename(&unfinished, &template) {
                let _ = fs::remove_dir_all(&unfinished);
                assert!(template.exists(), "cannot make {template:?}: {error}");
            }
        }
        let _ = fs::remove_dir_all(&work);
        template
    })
}
