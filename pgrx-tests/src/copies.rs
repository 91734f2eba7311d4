//! Copies of clusters: base backups, standbys, files; and the programs that work against a running server.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};

use crate::Cluster;
use crate::builder::{PORT, new_dir};
use crate::install::{copy_dir, program, run, server_program};

impl Cluster {
    /// One of Postgres' programs (or, by a full path, of another installation's), set to connect to this server as a role; it runs as the server's account.
    pub fn tool(&self, name: &str, role: &str) -> Command {
        let mut command = server_program(name, self.socket_dir());
        command.env("PGHOST", self.socket_dir()).env("PGPORT", PORT.to_string()).env("PGUSER", role);
        command
    }

    /// Runs such a program, which has to succeed, as superuser.
    #[track_caller]
    pub fn run_tool(&self, name: &str, args: &[&str]) -> Output {
        run(self.tool(name, "postgres").args(args))
    }

    /// A copy of the running server's files, by `pg_basebackup`. Not started.
    #[track_caller]
    pub fn base_backup(&self, name: &str) -> Cluster {
        let dir = new_dir();
        run(self.tool("pg_basebackup", "postgres").args(["-c", "fast", "-X", "stream", "-D"]).arg(dir.join("data")));
        Self::moved(name, dir)
    }

    /// A standby that streams from this server, started.
    #[track_caller]
    pub fn standby(&self, name: &str) -> Cluster {
        let mut standby = self.base_backup(name);
        let primary = self.socket_dir().display();
        standby.set("primary_conninfo", &format!("host={primary} port={PORT} user=postgres"));
        let signal = standby.data_dir().join("standby.signal");
        File::create(&signal).unwrap_or_else(|e| panic!("cannot make {signal:?}: {e}"));
        standby.start();
        standby
    }

    /// A copy of the files of a server that does not run. Not started.
    #[track_caller]
    pub fn copy(&self, name: &str) -> Cluster {
        assert!(!self.is_running(), "the server is running");
        let dir = new_dir();
        copy_dir(&self.data_dir(), &dir.join("data"));
        Self::moved(name, dir)
    }

    fn moved(name: &str, dir: PathBuf) -> Cluster {
        let cluster = Cluster::new(name.to_owned(), dir, Vec::new(), "postgres".into(), None);
        cluster.set("unix_socket_directories", &cluster.socket_dir().to_string_lossy());
        cluster
    }

    /// Sets a parameter in `postgresql.conf`, for the next start or reload.
    #[track_caller]
    pub fn set(&self, name: &str, value: &str) {
        let file = self.data_dir().join("postgresql.conf");
        let line = format!("{name} = '{}'\n", value.replace('\\', r"\\").replace('\'', "''"));
        let written = fs::OpenOptions::new().append(true).open(&file).and_then(|mut f| f.write_all(line.as_bytes()));
        written.unwrap_or_else(|e| panic!("cannot write {file:?}: {e}"));
    }

    /// Promotes a standby by `pg_ctl`, and waits until it is one no more.
    #[track_caller]
    pub fn promote(&self) {
        run(server_program("pg_ctl", self.socket_dir()).args(["promote", "-w", "-D"]).arg(self.data_dir()));
    }
}

/// A folder of the installation, as `pg_config` calls it: `bindir`, `pkglibdir`, `sharedir`, `libdir`.
pub fn installed(folder: &str) -> PathBuf {
    let output = run(program("pg_config").arg(format!("--{folder}")));
    PathBuf::from(crate::install::stdout(&output).trim())
}

/// The folder that the extension's scripts are installed in.
pub fn extension_dir() -> PathBuf {
    installed("sharedir").join("extension")
}
