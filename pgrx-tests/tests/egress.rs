//! Destinations of requests: redirects, proxies, hosts that the owner of a server may not name.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::{Bed, PATIENCE, backfill, error, refused, run, text, tickets, wait_status};
use llm_fake_provider::{CA, Config, FakeProvider, Fault, OTHER_CA, TlsFront, private_address};
use pg_llm_batch_e2e::{Cluster, wait_until};
use postgres::Client;

/// Somewhere that nothing may be sent to. Returns what came nevertheless.
struct Elsewhere {
    port: u16,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Elsewhere {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).unwrap_or(0);
                keep.lock().unwrap().push(String::from_utf8_lossy(&buffer[..n]).into_owned());
                let _ = stream.write_all(b"HTTP/1.1 404 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        Self { port, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

#[test]
fn proxies_of_the_environment_are_not_used() {
    let proxy = Elsewhere::new();
    let mut builder = Cluster::builder("egress_proxy");
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        builder = builder.env(name, &format!("http://127.0.0.1:{}", proxy.port));
    }
    let bed = Bed::build(builder, Config::default());
    let client = &mut bed.connect();
    let environ = std::fs::read(format!("/proc/{}/environ", bed.cluster.pid())).unwrap();
    assert!(String::from_utf8_lossy(&environ).contains("HTTP_PROXY="), "the server does not have the variables");
    tickets(client, "tickets", 1..=100);
    let job = backfill(client, "tickets");
    bed.done(job);
    assert_eq!(text(client, "SELECT llm_classify('#r000001:bug#', 'topic')"), "bug");
    // A host that is not here: a proxy would be asked to connect to it.
    run(client, "ALTER SERVER fake OPTIONS (SET base_url 'https://nowhere.invalid/v1')");
    assert_eq!(error(client, "SELECT llm_classify('x', 'topic')").0, "08006");
    assert_eq!(proxy.heard(), Vec::<String>::new());
}

#[test]
fn redirects_are_not_followed() {
    let elsewhere = Elsewhere::new();
    let bed = Bed::new("egress_redirect");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    common::warm(client, "tickets");
    let there = format!("http://127.0.0.1:{}/v1/chat/completions?key=sk-test-0123456789abcdef", elsewhere.port);
    bed.provider.configure(|c| c.faults = vec![(Fault::Redirect(there.clone()), 1.0)]);
    let job = backfill(client, "tickets");
    let p = wait_status(client, job, "failed");
    let said = p.last_error.unwrap();
    assert!(said.contains("redirects are not followed") && !said.contains("0123456789"), "{said}");
    assert_eq!(error(client, "SELECT llm_classify('x', 'topic')").0, "HV024");
    assert_eq!(elsewhere.heard(), Vec::<String>::new());
    assert!(!bed.cluster.log().contains("0123456789"), "the key is in the log");
}

/// Sets the hosts that everyone may reach, and waits until new sessions have them.
#[track_caller]
fn allow(bed: &Bed, hosts: &str) {
    let client = &mut bed.connect();
    run(client, &format!("ALTER SYSTEM SET llm_batch.allowed_hosts = '{hosts}'"));
    run(client, "SELECT pg_reload_conf()");
    let shown = || text(&mut bed.connect(), "SHOW llm_batch.allowed_hosts");
    wait_until("the hosts are allowed", PATIENCE, shown, |v| v == hosts);
}

#[test]
fn hosts_of_servers_that_a_superuser_does_not_own() {
    let bed = Bed::new("egress_hosts");
    let client = &mut bed.connect();
    let port = bed.provider.base_url().rsplit_once(':').unwrap().1.trim_end_matches("/v1").to_owned();
    run(client, "CREATE ROLE alice LOGIN; GRANT USAGE ON FOREIGN DATA WRAPPER llm_provider TO alice");
    // With all of them allowed by name.
    let reserved = [
        "169.254.169.254",
        "0.0.0.0",
        "100.100.100.200",
        "[::]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::]",
    ];
    allow(&bed, &format!("127.0.0.1:{port}, localhost, {}", reserved.join(", ")));
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    run(
        alice,
        &format!(
            "CREATE SERVER hers FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'http://127.0.0.1:{port}/v1');
             SELECT llm_batch.create_model('hers', server => 'hers', model => 'x', request_timeout => '5 s');
             SELECT llm_batch.create_classifier('hers', labels => '[\"bug\", \"spam\"]', model => 'hers', options => '{{\"reuse\": false}}')"
        ),
    );
    let ask = "SELECT llm_classify('#r000001:bug#', 'hers')";
    let point =
        |alice: &mut Client, url: &str| run(alice, &format!("ALTER SERVER hers OPTIONS (SET base_url '{url}')"));
    assert_eq!(text(alice, ask), "bug");
    point(alice, &format!("http://localhost:{port}/v1"));
    assert_eq!(text(alice, ask), "bug");
    for host in reserved {
        point(alice, &format!("https://{host}/v1"));
        for role in [&mut *alice, &mut *client] {
            let (code, message, detail, _) = error(role, ask);
            assert_eq!(code, "42501", "{host}: {message}");
            assert!(detail.contains("metadata"), "{host}: {detail}");
        }
    }
    // Allowed on another port, or under another name.
    for host in ["127.0.0.1", "127.0.0.2:443", "localhost.localdomain", "[::1]"] {
        point(alice, &format!("https://{host}/v1"));
        let (code, _, detail, _) = error(alice, ask);
        assert_eq!(code, "42501", "{host}");
        assert!(detail.contains("allowed_hosts"), "{host}: {detail}");
    }
    // Spellings that readers of URLs differ about are no URLs here.
    for url in [
        "https://2852039166/v1",
        "https://0xa9.0xfe.0xa9.0xfe/v1",
        "https://0251.0376.0251.0376/v1",
        "https://169.254.169.254./v1",
        "https://localhost@169.254.169.254/v1",
        "https://localhost%2f@x/v1",
        "https://localhost\\@x/v1",
        "https://localhost#@x/v1",
        "http://169.254.169.254/v1",
    ] {
        let (code, ..) = error(alice, &format!("ALTER SERVER hers OPTIONS (SET base_url '{url}')"));
        assert_eq!(code, "HV024", "{url}");
    }
    // A superuser's server may lead anywhere: nobody listens here.
    point(alice, "https://0.0.0.0:9/v1");
    run(client, "ALTER SERVER hers OWNER TO postgres");
    assert_eq!(error(client, ask).0, "08006");
}

/// Users of an account share its limits and its troubles. A server of one's own whose account is named like another's
/// must not hold up that one.
#[test]
fn an_account_is_shared_only_among_servers_of_one_owner() {
    let bed = Bed::new("egress_account");
    let client = &mut bed.connect();
    let empty = llm_fake_provider::FakeProvider::start(Config {
        faults: vec![(Fault::SpendLimit429, 1.0)],
        ..Config::default()
    })
    .unwrap();
    tickets(client, "tickets", 1..=200);
    run(client, "ALTER SERVER fake OPTIONS (ADD account 'ours')");
    run(client, "CREATE ROLE alice LOGIN; GRANT USAGE ON FOREIGN DATA WRAPPER llm_provider TO alice");
    allow(&bed, "127.0.0.1");
    common::warm(client, "tickets");
    bed.provider.hold();
    let job = backfill(client, "tickets");
    wait_until("rows are in flight", PATIENCE, || bed.provider.stats().rows_in_flight, |n| *n > 0);
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    run(
        alice,
        &format!(
            "CREATE SERVER hers FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url '{}', account 'ours');
             SELECT llm_batch.create_model('hers', server => 'hers', model => 'fake-m');",
            empty.base_url()
        ),
    );
    run(alice, "SET llm_batch.default_model = 'hers'");
    let (code, message, ..) = error(alice, "SELECT llm_classify('x', ARRAY['a', 'b'])");
    assert_eq!(code, "53000", "{message}");
    assert_eq!(common::progress(client, job).status, "running");
    bed.provider.release();
    assert_eq!(bed.done(job).counts(), (200, 200, 0, 0, 0, 0));
}

const ASK: &str = "SELECT llm_classify('#r000001:bug#', 'topic')";

/// Calls `start` in a second network of this machine, with an address there that this network reaches over a virtual cable.
/// Sockets and threads that it makes stay in that network, which goes with the last of them. Otherwise says why not: it
/// needs `ip` and root's rights, which containers often lack.
fn in_second_network<T: Send>(start: impl FnOnce(IpAddr) -> T + Send) -> Result<T, String> {
    let ip = |args: String| match Command::new("ip").args(args.split(' ')).output() {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(format!("ip {args}: {}", String::from_utf8_lossy(&done.stderr).trim())),
        Err(error) => Err(format!("ip: {error}")),
    };
    // Tests of other processes have networks of their own.
    let pid = std::process::id();
    let [_, _, high, low] = (pid << 2).to_be_bytes();
    let address = |n: u8| Ipv4Addr::new(10, 213, high, low + n);
    let (near, far) = (format!("llm{pid}n"), format!("llm{pid}f"));
    let enter_and_start = || {
        // SAFETY: unshare takes an integer and touches no memory of ours. It changes this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(format!("unshare: {}", std::io::Error::last_os_error()));
        }
        ip(format!("link add {far} type veth peer name {near} netns {pid}"))?;
        ip(format!("address add {}/30 dev {far}", address(2)))?;
        ip(format!("link set {far} up"))?;
        ip("link set lo up".to_owned())?;
        Ok(start(address(2).into()))
    };
    let started = std::thread::scope(|scope| scope.spawn(enter_and_start).join().unwrap())?;
    ip(format!("address add {}/30 dev {near}", address(1)))?;
    ip(format!("link set {near} up"))?;
    Ok(started)
}

/// A model in another network, over http and behind a certificate of one's own.
#[test]
fn models_on_ones_own_network() {
    let bed = Bed::new("egress_own");
    let client = &mut bed.connect();
    run(client, "CREATE ROLE alice LOGIN; GRANT USAGE ON FOREIGN DATA WRAPPER llm_provider TO alice");
    run(client, "GRANT USAGE ON FOREIGN SERVER fake TO alice");
    let alice = &mut bed.cluster.connect_as("postgres", "alice");
    for option in ["allow_http 'true'", "allow_http 'ON'", "ca_file '/etc/ca.pem'"] {
        let create =
            format!("CREATE SERVER hers FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'https://a/v1', {option})");
        let name = option.split(' ').next().unwrap();
        refused(alice, &create, "42501", &[name, "Only a superuser"]);
    }
    for option in ["allow_http 'maybe'", "allow_http ''", "ca_file 'ca.pem'", "ca_file ''"] {
        let name = option.split(' ').next().unwrap();
        refused(client, &format!("ALTER SERVER fake OPTIONS (ADD {option})"), "HV024", &[name]);
    }
    let start = |at: IpAddr| {
        let away = FakeProvider::start(Config { listen: (at, 0).into(), ..Config::default() }).unwrap();
        let front = TlsFront::start(at, away.address()).unwrap();
        (away, front)
    };
    let (away, front) = in_second_network(start).unwrap_or_else(|why| match private_address() {
        Some(here) => {
            eprintln!("SKIPPED in part: a second network ({why}); {here}, an address of this machine, is used instead");
            start(here)
        }
        None => {
            eprintln!("SKIPPED in part: a second network ({why}), and this machine has no private address");
            start(Ipv4Addr::LOCALHOST.into())
        }
    });
    certificate(&bed, client, &away, &front);
    match away.address().ip() {
        here if here.is_loopback() => eprintln!("SKIPPED: http to another address"),
        here => plain(&bed, client, alice, &away, here),
    }
}

fn certificate(bed: &Bed, client: &mut Client, away: &FakeProvider, front: &TlsFront) {
    run(client, &format!("ALTER SERVER fake OPTIONS (SET base_url 'https://{}/v1')", front.address));
    refused(client, ASK, "08006", &["invalid peer certificate", "ca_file"]);
    run(client, "ALTER SERVER fake OPTIONS (ADD ca_file '/nowhere')");
    refused(client, ASK, "58P01", &["ca_file of server \"fake\"", "\"/nowhere\"", "No such file", "PEM"]);
    let file = bed.cluster.socket_dir().join("ca.pem");
    let write = |content: &str| {
        std::fs::write(&file, content).unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    };
    write("nothing");
    run(client, &format!("ALTER SERVER fake OPTIONS (SET ca_file '{}')", file.display()));
    refused(client, ASK, "58P01", &["no usable certificate"]);
    refused(client, "SELECT llm_batch.create_model('other', server => 'fake', model => 'x')", "58P01", &["ca_file"]);
    write(CA);
    assert_eq!(text(client, ASK), "bug");
    // A file that was changed holds for the next answer.
    write(OTHER_CA);
    refused(client, ASK, "08006", &["invalid peer certificate"]);
    write(CA);
    let mut again = || client.query_one(ASK, &[]).map_or_else(|e| e.to_string(), |row| row.get(0));
    wait_until("it is asked again", PATIENCE, &mut again, |answer| answer == "bug");
    fills(bed, client, away, "sealed");
    run(client, "ALTER SERVER fake OPTIONS (DROP ca_file)");
}

/// A job fills a new table through the provider that is away.
#[track_caller]
fn fills(bed: &Bed, client: &mut Client, away: &FakeProvider, table: &str) {
    away.reset_stats();
    tickets(client, table, 1..=100);
    let job = backfill(client, table);
    assert_eq!(bed.done(job).counts(), (100, 100, 0, 0, 0, 0));
    assert_eq!(common::wrong(client, table), 0);
    let stats = away.stats();
    assert_eq!(stats.rows.len(), 100, "{stats:?}");
}

fn plain(bed: &Bed, client: &mut Client, alice: &mut Client, away: &FakeProvider, here: IpAddr) {
    away.reset_stats();
    let url = away.base_url();
    let point = |url: &str| format!("ALTER SERVER fake OPTIONS (SET base_url '{url}')");
    refused(client, &point(&url), "HV024", &["http is for this machine alone", "allow_http 'true'"]);
    run(client, &format!("ALTER SERVER fake OPTIONS (ADD allow_http 'true', SET base_url '{url}')"));
    assert_eq!(text(client, ASK), "bug");
    assert_eq!(text(alice, ASK), "bug");
    assert_eq!(away.stats().requests, 2);
    fills(bed, client, away, "clear");
    for never in ["http://169.254.169.254/v1", "http://8.8.8.8/v1", "http://100.100.100.200/v1", "http://[fe80::1]/v1"]
    {
        refused(client, &point(never), "HV024", &["private addresses alone"]);
    }
    refused(client, "ALTER SERVER fake OPTIONS (DROP allow_http)", "HV024", &["http is for this machine alone"]);
    refused(client, "ALTER SERVER fake OPTIONS (SET allow_http 'false')", "HV024", &["http is for this machine alone"]);

    // It counts only while a superuser owns the server, whatever hosts are allowed.
    let listed = if here.is_ipv6() { format!("[{here}]") } else { here.to_string() };
    allow(bed, &format!("127.0.0.1, {listed}"));
    run(client, "ALTER SERVER fake OWNER TO alice");
    for role in [&mut *alice, &mut *client] {
        refused(role, ASK, "42501", &["\"fake\"", "\"allow_http\"", "servers of superusers", "(DROP allow_http)"]);
    }
    for change in [
        format!("SET base_url '{url}x'"),
        "SET base_url 'https://a/v1'".to_owned(),
        "ADD account 'x'".to_owned(),
        "SET allow_http 'on'".to_owned(),
    ] {
        refused(
            alice,
            &format!("ALTER SERVER fake OPTIONS ({change})"),
            "42501",
            &["\"allow_http\"", "(DROP allow_http"],
        );
    }
    // Without it the server is hers to change.
    let home = bed.provider.base_url();
    run(alice, &format!("ALTER SERVER fake OPTIONS (DROP allow_http, SET base_url '{home}')"));
    assert_eq!(text(alice, ASK), "bug");
    // Not even a superuser gives it to a server of hers.
    run(client, "ALTER SERVER fake OPTIONS (ADD allow_http 'true')");
    refused(alice, ASK, "42501", &["\"allow_http\""]);
    run(client, "REASSIGN OWNED BY alice TO postgres");
    run(client, &point(&url));
    assert_eq!(text(client, ASK), "bug");
    run(client, "CREATE ROLE chief LOGIN SUPERUSER; ALTER SERVER fake OWNER TO chief");
    assert_eq!(text(client, ASK), "bug");
    run(client, "GRANT USAGE ON FOREIGN DATA WRAPPER llm_provider TO chief; ALTER ROLE chief NOSUPERUSER");
    refused(client, ASK, "42501", &["\"allow_http\""]);
}
