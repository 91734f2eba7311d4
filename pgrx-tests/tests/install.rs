//! `scripts/install` replaces the library of a server that runs, with another version: nothing dies, the server goes on with
//! the old library, and after a restart the new one says what is left to do.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Bed, PATIENCE, backfill_with, error, one, pids, run, slow, text, tickets, wait_status, wrong};
use pg_llm_batch_e2e::{Cluster, installed, wait_until};
use postgres::Client;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const LIBRARY: &str = "pg_llm_batch.so";
const CONTROL: &str = "pg_llm_batch.control";

/// A copy of the installation that other tests do not see. Postgres finds its folders from where its program is.
struct Copy(PathBuf);

impl Copy {
    fn new() -> Self {
        let copy = Self(std::env::temp_dir().join(format!("pg-e2e-install-{}", std::process::id())));
        for folder in ["bindir", "pkglibdir", "sharedir"] {
            let to = copy.folder(folder);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            shell("cp -as \"$0\" \"$1\"", &[&installed(folder), &to]);
        }
        // A link would lead back to the original.
        let real = "cp --remove-destination \"$0\" \"$1\"";
        for program in ["postgres", "pg_config"] {
            shell(real, &[&installed("bindir").join(program), &copy.folder("bindir").join(program)]);
        }
        let ([lib, extension], [lib_from, extension_from]) = (copy.targets(), targets(installed));
        shell(real, &[&lib_from.join(LIBRARY), &lib.join(LIBRARY)]);
        shell(real, &[&extension_from.join(CONTROL), &extension.join(CONTROL)]);
        // The file that other versions are made from.
        shell("strip -o \"$1\" \"$0\"", &[&lib_from.join(LIBRARY), &copy.0.join(LIBRARY)]);
        shell("cp \"$0\" \"$1\"", &[&extension_from.join(CONTROL), &copy.0.join(CONTROL)]);
        copy
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.0.join(installed(name).strip_prefix("/").unwrap())
    }

    fn targets(&self) -> [PathBuf; 2] {
        targets(|name| self.folder(name))
    }

    /// A package of another version: another build of the library, and the installed one's bytes but for the number, which
    /// is as long.
    fn package(&self, version: &str) -> PathBuf {
        let package = self.0.join(format!("package-{version}"));
        fs::create_dir_all(&package).unwrap();
        let edit = format!("LC_ALL=C sed s/{}/{version}/g \"$0\" >\"$1\"", VERSION.replace('.', r"\\."));
        for file in [LIBRARY, CONTROL] {
            shell(&edit, &[&self.0.join(file), &package.join(file)]);
        }
        fs::write(package.join(format!("pg_llm_batch--{VERSION}--{version}.sql")), "-- nothing to change\n").unwrap();
        package
    }

    /// Installs a package by the script, which a command such as `sudo` runs.
    fn install(&self, by: &[&str], package: &Path) -> Output {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/install");
        let config = format!("PG_CONFIG={}", self.folder("bindir").join("pg_config").display());
        command(by, &["env", &config, script, "from", package.to_str().unwrap()]).output().unwrap()
    }

    /// The package is in place, and nothing else was left there.
    fn has(&self, package: &Path) {
        for (folder, mode) in self.targets().iter().zip([0o755, 0o644]) {
            for file in fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()) {
                let name = file.file_name().unwrap().to_str().unwrap();
                assert!(!name.starts_with('.'), "{file:?} was left behind");
                if let Ok(new) = fs::read(package.join(name)) {
                    assert!(fs::read(&file).unwrap() == new, "{file:?} is not the new one");
                    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, mode, "{file:?}");
                }
            }
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        for folder in self.targets() {
            let _ = fs::set_permissions(folder, Permissions::from_mode(0o755));
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The folders of a package: for the library, and for the rest.
fn targets(folder: impl Fn(&str) -> PathBuf) -> [PathBuf; 2] {
    [folder("pkglibdir"), folder("sharedir").join("extension")]
}

fn command(by: &[&str], words: &[&str]) -> Command {
    let mut all = by.iter().chain(words);
    let mut command = Command::new(all.next().unwrap());
    command.args(all).current_dir("/").env_remove("RUST_BACKTRACE");
    command
}

#[track_caller]
fn shell(script: &str, files: &[&Path]) {
    let output = Command::new("sh").arg("-c").arg(script).args(files).output().unwrap();
    assert!(output.status.success(), "{script} {files:?}: {output:?}");
}

/// Ends a thread, also when this one panics.
struct Set<'a>(&'a AtomicBool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn library(client: &mut Client) -> String {
    text(client, "SHOW llm_batch.library_version")
}

/// The gateway, the launcher and the job's worker.
fn processes(client: &mut Client) -> Vec<i32> {
    ["llm_batch gateway", "llm_batch launcher", "llm_batch job"].iter().flat_map(|kind| pids(client, kind)).collect()
}

#[test]
fn a_server_goes_on_while_its_library_is_replaced() {
    let copy = Copy::new();
    let builder = Cluster::builder("install")
        .server(&copy.folder("bindir").join("postgres"))
        .env("LD_LIBRARY_PATH", installed("libdir").to_str().unwrap());
    let mut bed = Bed::build(builder, slow(20));
    let client = &mut bed.connect();
    assert!(
        text(client, "SELECT setting FROM pg_config WHERE name = 'PKGLIBDIR'").starts_with(copy.0.to_str().unwrap())
    );
    // More than is done in the time of this test.
    tickets(client, "tickets", 1..=100_000);
    run(client, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 2)");
    let job = backfill_with(client, "tickets", "options => '{\"max_rows_per_request\": 10}'");
    let done = format!("SELECT rows_done FROM llm_batch.progress WHERE job_id = {job}");
    wait_until("rows are written", PATIENCE, || one(client, &done), |n| *n > 0);
    let before = processes(client);
    assert_eq!(before.len(), 3, "{before:?}");

    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let user: &[&str] = if is_root { &["runuser", "-u", "postgres", "--"] } else { &[] };
    let root: &[&str] = if is_root { &[] } else { &["sudo", "-n"] };
    let (statements, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let last = std::thread::scope(|scope| {
        // Each with a process of its own, which the postmaster forks.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert_eq!(text(&mut bed.connect(), "SELECT llm_classify('#r900001:bug#', 'topic')"), "bug");
                statements.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _end = Set(&over);
        let mut last = None;
        // The installing user, a command that has to work first, and the mode of the folders.
        for (i, (who, by, needs, mode)) in [
            ("root", root, [root, &["true"]].concat(), 0o755),
            ("a user who may write there", user, [user, &["true"]].concat(), 0o777),
            ("a user with sudo", user, [user, &["sudo", "-n", "true"]].concat(), 0o555),
        ]
        .into_iter()
        .enumerate()
        {
            if !command(&needs, &[]).output().is_ok_and(|o| o.status.success()) {
                println!("SKIPPED, as {needs:?} does not work here: an installation by {who}");
                continue;
            }
            let version = format!("{}{}", 7 + i, &VERSION[1..]);
            let package = copy.package(&version);
            for folder in copy.targets() {
                fs::set_permissions(folder, Permissions::from_mode(mode)).unwrap();
            }
            let found = (one(client, &done), statements.load(Ordering::Relaxed));
            let output = copy.install(by, &package);
            assert!(output.status.success(), "{who}: {output:?}");
            copy.has(&package);
            wait_until(
                &format!("job and statements go on after {who} has installed"),
                PATIENCE,
                || (one(client, &done), statements.load(Ordering::Relaxed)),
                |now| now.0 > found.0 + 100 && now.1 > found.1 + 10,
            );
            assert_eq!((processes(client), library(&mut bed.connect())), (before.clone(), VERSION.to_owned()), "{who}");
            last = Some(version);
        }
        last.expect("one of the ways works")
    });

    bed.cluster.restart();
    let client = &mut bed.connect();
    assert_eq!(library(client), last);
    let e = error(client, "SELECT llm_classify('#r900001:bug#', 'topic')");
    let said = format!("has version {VERSION}, but the server runs library version {last}");
    assert!(e.0 == "55000" && e.1.contains(&said) && e.3.contains("Run ALTER EXTENSION pg_llm_batch UPDATE"), "{e:?}");
    wait_until(
        "the log says so",
        PATIENCE,
        || bed.cluster.log(),
        |log| log.contains("jobs in database \"postgres\" wait"),
    );
    let (found, update) = (one(client, &done), "ALTER EXTENSION pg_llm_batch UPDATE");
    assert!(pids(client, "llm_batch job").is_empty());
    run(client, update);
    wait_until("the job goes on", PATIENCE, || one(client, &done), |n| *n > found + 100);
    run(client, &format!("SELECT llm_batch.cancel({job})"));
    wait_status(client, job, "cancelled");
    assert_eq!(wrong(client, "tickets"), 0);
    let log = bed.cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("terminated by signal"), "{log}");
}
