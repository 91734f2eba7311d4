//! The gateway's socket: whom it serves, who is served by it, what becomes of strange things in its place.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Bed, PATIENCE, backfill, error, left, one, progress, run, text, tickets, warm, wrong};
use pg_llm_batch_e2e::{go_on, stop, wait_until};

const ASK: &str = "SELECT llm_classify('#r900001:bug#', 'topic')";
/// `"activity"`: a whole message that is answered.
const ACTIVITY: &[u8] = b"\x0a\0\0\0\"activity\"";

fn socket(bed: &Bed) -> PathBuf {
    bed.cluster.data_dir().join("pg_stat_tmp/llm_batch.sock")
}

fn server_uid(bed: &Bed) -> u32 {
    fs::metadata(bed.cluster.data_dir()).unwrap().uid()
}

/// Returns true if the test may take any identity.
fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Runs `f` as the server's user, on a thread of its own, which alone changes.
fn as_server<T: Send>(bed: &Bed, f: impl FnOnce() -> T + Send) -> T {
    let uid = server_uid(bed);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if is_root() {
                // SAFETY: plain numbers; the bare system call changes this thread alone.
                assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) }, 0);
            }
            f()
        });
        thread.join().unwrap()
    })
}

/// The gateway's answer to these bytes, until it hangs up or has said something.
fn answer(mut stream: UnixStream, bytes: &[u8]) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(bytes);
    let mut said = vec![0; 4096];
    let n = stream.read(&mut said).unwrap_or(0);
    said.truncate(n);
    said
}

fn gateway_pid(bed: &Bed) -> u32 {
    let sql = "SELECT coalesce(max(pid), 0)::bigint FROM pg_stat_activity WHERE backend_type = 'llm_batch gateway'";
    let pid = wait_until("there is a gateway", PATIENCE, || one(&mut bed.connect(), sql), |pid| *pid != 0);
    u32::try_from(pid).unwrap()
}

#[test]
fn it_serves_its_own_user_alone() {
    let bed = Bed::new("socket_user");
    let path = socket(&bed);
    gateway_pid(&bed);
    wait_until("the socket is there", PATIENCE, || path.exists(), |there| *there);
    let about = fs::symlink_metadata(&path).unwrap();
    assert!(about.file_type().is_socket());
    assert_eq!(about.permissions().mode() & 0o777, 0o600);
    assert_eq!(about.uid(), server_uid(&bed));
    let said = as_server(&bed, || answer(UnixStream::connect(&path).unwrap(), ACTIVITY));
    assert!(!said.is_empty(), "the server's own user is served");
    if !is_root() {
        eprintln!("SKIPPED: the rest of it_serves_its_own_user_alone needs root");
        return;
    }
    // Root may connect to every socket; it is another user all the same.
    assert_eq!(answer(UnixStream::connect(&path).unwrap(), ACTIVITY), b"");
}

/// A listener of ours in the socket's place, and what it hears.
fn impostor(path: &PathBuf) -> Arc<Mutex<Vec<u8>>> {
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&heard);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, keep) = (stream.unwrap(), Arc::clone(&keep));
            std::thread::spawn(move || {
                let mut buffer = [0; 65536];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    keep.lock().unwrap().extend_from_slice(&buffer[..n]);
                }
            });
        }
    });
    heard
}

#[test]
fn nothing_is_said_to_an_impostor() {
    if !is_root() {
        eprintln!("SKIPPED nothing_is_said_to_an_impostor: needs root, to be another user than the server");
        return;
    }
    let bed = Bed::new("socket_impostor");
    let client = &mut bed.connect();
    assert_eq!(text(client, ASK), "bug");
    // Stopped, so that it does not notice before the session has met the impostor.
    let pid = gateway_pid(&bed);
    stop(pid.into());
    let heard = impostor(&socket(&bed));
    let session = &mut bed.connect();
    run(session, "SET statement_timeout = '5 s'");
    let (code, message, ..) = error(session, ASK);
    go_on(pid.into());
    assert_eq!(code, "57014", "{message}");
    assert_eq!(heard.lock().unwrap().len(), 0, "an impostor was told something");
    // The gateway sees that its socket is gone, and comes back.
    run(session, "RESET statement_timeout");
    assert_eq!(text(session, ASK), "bug");
    assert!(bed.cluster.log().contains("was removed or replaced"), "{}", bed.cluster.log());
    assert_eq!(heard.lock().unwrap().len(), 0, "an impostor was told something");
}

#[test]
fn it_comes_back_when_it_is_removed() {
    let bed = Bed::new("socket_removed");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=300);
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n > 0);
    fs::remove_file(socket(&bed)).unwrap();
    wait_until(
        "it is noticed",
        PATIENCE,
        || bed.cluster.log(),
        |log| log.contains("the socket pg_stat_tmp/llm_batch.sock of the llm_batch gateway was removed or replaced"),
    );
    bed.provider.release();
    assert_eq!(text(&mut bed.connect(), ASK), "bug");
    bed.done(job);
    assert_eq!(wrong(client, "tickets") + left(client, "tickets"), 0);
}

#[test]
fn what_lies_in_its_place_at_the_start() {
    let mut bed = Bed::new("socket_start");
    let path = socket(&bed);
    let precious = bed.cluster.socket_dir().join("precious");
    fs::write(&precious, "do not touch").unwrap();
    fs::set_permissions(&precious, fs::Permissions::from_mode(0o666)).unwrap();
    for what in ["a stale socket", "a file", "a link to a file", "a dead link", "another one's socket"] {
        bed.cluster.stop();
        let _ = fs::remove_file(&path);
        let mut heard = None;
        match what {
            "a stale socket" => drop(UnixListener::bind(&path).unwrap()),
            "a file" => fs::write(&path, "text").unwrap(),
            "a link to a file" => symlink(&precious, &path).unwrap(),
            "a dead link" => symlink("/nowhere/at/all", &path).unwrap(),
            _ => heard = Some(impostor(&path)),
        }
        bed.cluster.start();
        assert_eq!(text(&mut bed.connect(), ASK), "bug", "{what}");
        assert!(heard.is_none_or(|h| h.lock().unwrap().is_empty()), "{what}");
        let about = fs::symlink_metadata(&path).unwrap();
        assert!(about.file_type().is_socket() && about.permissions().mode() & 0o777 == 0o600, "{what}: {about:?}");
    }
    assert_eq!(fs::read_to_string(&precious).unwrap(), "do not touch");
    assert_eq!(fs::metadata(&precious).unwrap().permissions().mode() & 0o777, 0o666);
    // A folder is nothing to remove unasked.
    bed.cluster.stop();
    let _ = fs::remove_file(&path);
    fs::create_dir_all(path.join("with/something/in/it")).unwrap();
    bed.cluster.start();
    let said = "could not start the llm_batch gateway";
    wait_until("the log says so", PATIENCE, || bed.cluster.log(), |log| log.contains(said));
    assert!(bed.cluster.log().contains("pg_stat_tmp/llm_batch.sock: "), "{}", bed.cluster.log());
    assert_eq!(one(&mut bed.connect(), "SELECT 1::bigint"), 1);
    assert!(path.join("with/something/in/it").exists());
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(text(&mut bed.connect(), ASK), "bug");
}

/// Resident memory of a process, kB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_thousand_clients_that_make_no_sense() {
    // SAFETY: reads and writes a struct of plain numbers.
    unsafe {
        let mut limit = std::mem::zeroed::<libc::rlimit>();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max.min(20_000);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
    let bed = Bed::new("socket_thousand");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=2_000);
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n > 0);
    let path = socket(&bed);
    let pid = gateway_pid(&bed);
    let before = resident(pid);
    as_server(&bed, || {
        let mut open = Vec::new();
        for n in 0..1_000 {
            // Connecting waits while the gateway has not taken those before.
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
            let _ = match n % 4 {
                0 => Ok(()),
                1 => stream.write_all(&[0xff; 1000]),
                2 => stream.write_all(b"\0\0\xff\0{\"items\":[{\"n\":1,\"text\":\"xxxxxxxxxxxxxxxxxxxxxxxxx"),
                _ => stream.write_all(b"\x03\0\0\0abc"),
            };
            open.push(stream);
        }
        let grown = resident(pid).saturating_sub(before);
        assert!(grown < 64 << 10, "the gateway has grown by {grown} kB");
        // The others go on meanwhile: rows that are under way, a new session, one that asks.
        bed.provider.release();
        assert_eq!(text(&mut bed.connect(), ASK), "bug");
        bed.done(job);
    });
    assert_eq!(progress(client, job).counts(), (2_000, 2_000, 0, 0, 0, 0));
    assert_eq!(wrong(client, "tickets"), 0);
    assert_eq!(gateway_pid(&bed), pid, "it is the same gateway");
    assert!(bed.provider.stats().rows.values().all(|row| row.asked == 1), "rows were paid for again");
}
