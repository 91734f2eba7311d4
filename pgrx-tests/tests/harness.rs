//! The harness itself, without the extension.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use pg_llm_batch_e2e::{Cluster, wait_until};

fn count(cluster: &Cluster) -> i64 {
    let mut client = cluster.connect("postgres");
    client.query_one("SELECT count(*) FROM t", &[]).unwrap().get(0)
}

fn panic_message(run: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("it should panic");
    panic.downcast_ref::<String>().expect("a formatted message").clone()
}

#[test]
fn tables_survive_kill_and_restart() {
    let mut cluster = Cluster::builder("survive").preload(false).start();
    let mut client = cluster.connect("postgres");
    client.batch_execute("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 1000)").unwrap();
    let first_pid = cluster.pid();
    cluster.kill9();
    assert!(client.batch_execute("SELECT 1").is_err());
    assert!(cluster.try_connect_as("postgres", "postgres").is_err());

    cluster.start();
    assert_ne!(cluster.pid(), first_pid);
    assert_eq!(count(&cluster), 1000);
    assert!(cluster.log().contains("automatic recovery in progress"));

    cluster.restart();
    assert_eq!(count(&cluster), 1000);
    assert!(cluster.stop().success());
    cluster.start();
    cluster.stop_immediate();
    cluster.start();
    assert_eq!(count(&cluster), 1000);
}

#[test]
fn kill9_again_and_again_with_busy_sessions() {
    let mut cluster = Cluster::builder("busy").preload(false).start();
    cluster.connect("postgres").batch_execute("CREATE TABLE t (a int)").unwrap();
    for round in 1..=3 {
        let done = std::thread::scope(|scope| {
            let mut client = cluster.connect("postgres");
            // Counts the commits it was told of, until the server is gone.
            let writer = scope
                .spawn(move || (0..).take_while(|_| client.execute("INSERT INTO t VALUES (1)", &[]).is_ok()).count());
            let before = count(&cluster);
            let timeout = Duration::from_secs(20);
            wait_until("some rows", timeout, || count(&cluster), |now| *now > before + 20);
            cluster.kill9();
            writer.join().unwrap()
        });
        cluster.start();
        assert!(count(&cluster) >= done as i64, "round {round}");
    }
    cluster.kill9();
    // Dropped as it is: shared memory is freed nonetheless.
}

#[test]
fn settings_roles_and_psql() {
    let cluster = Cluster::builder("settings")
        .preload(false)
        .conf("application_name", r"it's a \ name")
        .conf("work_mem", "1MB")
        .conf("work_mem", "2MB")
        .start();
    let output = cluster.psql("postgres", "CREATE ROLE app LOGIN; SHOW application_name;\n\\echo done\nSHOW work_mem;");
    assert!(output.status.success(), "{output:?}");
    // psql sets its own application_name.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "psql\ndone\n2MB\n");
    let output = cluster.psql("postgres", "SELECT 1/0; SELECT 2");
    assert!(!output.status.success() && output.stdout.is_empty());

    let mut client = cluster.connect_as("postgres", "app");
    let row = client.query_one("SELECT current_user::text, current_setting('application_name')", &[]).unwrap();
    assert_eq!(row.get::<_, String>(0), "app");
    assert_eq!(row.get::<_, String>(1), r"it's a \ name");
    assert!(cluster.try_connect_as("postgres", "nobody").is_err());
}

#[test]
fn a_failed_start_tells_why() {
    let mut cluster =
        Cluster::builder("failed").preload(false).conf("shared_preload_libraries", "no_such_library").create();
    let error = cluster.try_start().unwrap_err();
    assert!(error.contains("no_such_library"), "{error}");
    let message = panic_message(|| cluster.start());
    assert!(message.contains("no_such_library"), "{message}");
}

#[test]
fn a_panic_keeps_the_log() {
    let mut socket_dir = None;
    let message = panic_message(|| {
        let cluster = Cluster::builder("panic").preload(false).start();
        socket_dir = Some(cluster.socket_dir().to_owned());
        let error = cluster.psql("postgres", "SELECT 1/0");
        panic!("{}", error.status);
    });
    assert!(message.contains("exit status"), "{message}");
    assert!(!socket_dir.unwrap().exists());
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => dir.into(),
        None => std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
    };
    let log = std::fs::read_to_string(target.join("e2e-logs/panic/postgres.log")).unwrap();
    assert!(log.contains("division by zero"), "{log}");
}

#[test]
fn wait_until_gives_the_last_value() {
    let mut calls = 0;
    let mut next = || {
        calls += 1;
        calls
    };
    let second = Duration::from_secs(1);
    assert_eq!(wait_until("three", second, &mut next, |n| *n == 3), 3);
    let message = panic_message(|| {
        wait_until("a tenth", Duration::ZERO, &mut next, |n| *n == 10);
    });
    assert_eq!(message, "a tenth: not within 0ns; the last value is 4");
}
