//! A healthy model beside bad ones on one gateway, which take no more than their share of memory and files. Its times are
//! printed; `bench/run siege` measures them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use llm_batch_gateway::Places;
use llm_fake_provider::{Config, FakeProvider, Fault, Latency};
use support::relay::{message, twice};
use support::*;

/// Large enough that what else the machine does matters little.
const LATENCY: Duration = Duration::from_millis(200);
/// Sessions of the healthy model, and rows of each, one after the other.
const SESSIONS: u64 = 3;
const ROWS: u64 = 12;
/// The same, of the first seconds beside a bad one.
const FIRST_ROWS: u64 = 8;
/// Bad models, requests of each at a time.
const BAD: usize = 2;
const AT_A_TIME: u32 = 24;
/// Memory that this process may take more beside a bad model, with the providers in it. Of open files it may have four
/// fifths.
const MOST_MIB: u64 = 64;
const FILES: u64 = 1024;

/// A server that does something to each connection that has sent a request. Its URL, and how many did.
fn server(act: fn(&mut TcpStream)) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let seen = Arc::<AtomicU64>::default();
    let count = Arc::clone(&seen);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let count = Arc::clone(&count);
            std::thread::spawn(move || {
                let mut requests = BufReader::new(stream.try_clone().unwrap());
                while message(&mut requests).is_some() {
                    count.fetch_add(1, Ordering::Relaxed);
                    act(&mut stream);
                }
            });
        }
    });
    (url, seen)
}

fn continue_for_ever(stream: &mut TcpStream) {
    while stream.write_all(&b"HTTP/1.1 100 Continue\r\n\r\n".repeat(100)).is_ok() {}
}

fn a_byte_short(stream: &mut TcpStream) {
    const PART: [u8; 4096] = [b' '; 4096];
    let length = 4 << 20;
    let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n ").as_bytes());
    for _ in 1..length / PART.len() {
        if stream.write_all(&PART).is_err() {
            return;
        }
    }
    let _ = stream.write_all(&PART[2..]);
}

/// Memory (MiB) and open files of this process, with the providers in it.
fn takes() -> (u64, usize) {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")).unwrap();
    (pss.trim().parse::<u64>().unwrap() >> 10, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

/// The most of it, until it is told to stop.
fn most(stop: &AtomicBool) -> (u64, usize) {
    let mut most = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let now = takes();
        most = (most.0.max(now.0), most.1.max(now.1));
        std::thread::sleep(Duration::from_millis(50));
    }
    most
}

/// Times that rows of the healthy model took: the median and the 95th of a hundred.
fn times(setup: &Setup, healthy: &FakeProvider, first: u64, rows: u64) -> (Duration, Duration) {
    let session = |(n, mut client): (u64, Client)| {
        let row = move |i: u64| {
            let (start, row) = (Instant::now(), first + n * rows + i);
            client.rows(row..row + 1);
            let (got, _) = client.outcomes(1);
            assert!(is_right(row, &got[&row]), "{got:?}");
            start.elapsed()
        };
        (0..rows).map(row).collect::<Vec<_>>()
    };
    let client = |n: u64| (n, setup.client(healthy, |s| (s.interactive, s.role) = (true, n as u32)));
    let clients: Vec<_> = (0..SESSIONS).map(client).collect();
    let mut all: Vec<Duration> = std::thread::scope(|scope| {
        let sessions: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || session(client))).collect();
        sessions.into_iter().flat_map(|s| s.join().unwrap()).collect()
    });
    all.sort();
    (all[all.len() / 2], all[all.len() * 95 / 100])
}

#[test]
fn bad_providers_take_no_more_than_their_share() {
    let healthy = provider(Config { latency: Latency { base: LATENCY, ..Latency::default() }, ..Config::default() });
    let plain = provider(Config { latency: Latency { base: LATENCY, ..Latency::default() }, ..Config::default() });
    let relay = twice(&plain);
    let by = |way: &str| format!("{relay}/{way}/v1");
    let endless = provider(Config { faults: vec![(Fault::Endless, 1.0)], ..Config::default() });
    let raw = |head: &str| Fault::Raw(format!("HTTP/1.1 {head}content-length: 2\r\n\r\n{{}}").into_bytes());
    let absurd = "x-ratelimit-limit-tokens: 1\r\nx-ratelimit-limit-requests: 1\r\nx-ratelimit-remaining-tokens: 0\r\n";
    let absurd = provider(Config {
        faults: vec![
            (raw(&format!("500 X\r\n{absurd}")), 0.3),
            (raw(&format!("429 X\r\n{absurd}")), 0.2),
            (Fault::TooLarge429, 0.2),
        ],
        ..Config::default()
    });
    let no_wait = provider(Config { faults: vec![(raw("429 X\r\nretry-after: 0\r\n"), 1.0)], ..Config::default() });
    let (hangs, hanging) = server(|_| std::thread::sleep(Duration::from_secs(600)));
    let (continues, continuing) = server(continue_for_ever);
    let (short, shortening) = server(a_byte_short);
    type Bad<'a> = (&'a str, String, Box<dyn Fn() -> u64 + 'a>);
    let bad: [Bad; 10] = [
        // Nothing bad: what 48 requests at a time take of two cores, which the providers share.
        ("fast", plain.base_url(), Box::new(|| plain.stats().requests)),
        ("hangs", hangs, Box::new(move || hanging.load(Ordering::Relaxed))),
        ("100 Continue for ever", continues, Box::new(move || continuing.load(Ordering::Relaxed))),
        ("4 MiB, a byte short", short, Box::new(move || shortening.load(Ordering::Relaxed))),
        ("answers twice", by("twice"), Box::new(|| plain.stats().requests)),
        ("no usage", by("mute"), Box::new(|| plain.stats().requests)),
        ("half of the usage", by("input"), Box::new(|| plain.stats().requests)),
        ("a body without end", endless.base_url(), Box::new(|| endless.stats().requests)),
        ("absurd limits", absurd.base_url(), Box::new(|| absurd.stats().requests)),
        ("retry-after: 0", no_wait.base_url(), Box::new(|| no_wait.stats().requests)),
    ];
    println!(
        "{:24} {:>15} {:>15} {:>15} {:>9} {:>10} {:>10}",
        "beside", "p50, p95 alone", "at first", "later", "requests", "MiB, most", "files, most"
    );
    let mut first = 0;
    for (what, url, requests) in &bad {
        let setup = Setup::within(Places::within(FILES));
        let alone = times(&setup, &healthy, first, ROWS);
        let (before, rest) = (requests(), takes());
        let stop = AtomicBool::new(false);
        let (at_first, beside, most) = std::thread::scope(|scope| {
            let watching = scope.spawn(|| most(&stop));
            let clients: Vec<Client> = (0..BAD)
                .map(|n| {
                    let mut client = setup.client(&healthy, |s| {
                        s.endpoint.base_url.clone_from(url);
                        s.model.model = format!("bad{n}");
                        // With a limit it begins with many at a time.
                        s.model.requests_per_minute = Some(1_000_000);
                        s.model.max_concurrent_requests = Some(AT_A_TIME);
                        s.model.request_timeout_ms = 300_000;
                        s.task.options.max_rows_per_request = 1;
                    });
                    client.rows(0..2_000);
                    client
                })
                .collect();
            let at_first = times(&setup, &healthy, first + SESSIONS * ROWS, FIRST_ROWS);
            wait("the bad ones are at it", requests, |n| *n >= before + 4);
            let beside = times(&setup, &healthy, first + 2 * SESSIONS * ROWS, ROWS);
            drop(clients);
            stop.store(true, Ordering::Relaxed);
            (at_first, beside, watching.join().unwrap())
        });
        first += 3 * SESSIONS * ROWS;
        let seen = requests() - before;
        let ms = |(p50, p95): (Duration, Duration)| format!("{}, {} ms", p50.as_millis(), p95.as_millis());
        println!(
            "{what:24} {:>15} {:>15} {:>15} {seen:>9} {:>10} {:>10}",
            ms(alone),
            ms(at_first),
            ms(beside),
            format!("{}, {}", rest.0, most.0),
            format!("{}, {}", rest.1, most.1),
        );
        assert!(most.1 as u64 * 5 <= FILES * 4, "{what}: {} files", most.1);
        // The providers' memory is in it, and what they have not given back of the time before.
        assert!(most.0 <= rest.0 + MOST_MIB, "{what}: {} MiB, {} before", most.0, rest.0);
    }
}
