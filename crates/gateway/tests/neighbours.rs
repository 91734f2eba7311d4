//! A healthy model beside bad ones on one gateway: it is as fast as alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use llm_fake_provider::{Config, FakeProvider, Fault, Latency};
use support::relay::{message, twice};
use support::*;

/// Large enough that what else the machine does matters little.
const LATENCY: Duration = Duration::from_millis(200);
/// Sessions of the healthy model, and rows of each, one after the other.
const SESSIONS: u64 = 3;
const ROWS: u64 = 24;
/// Bad models, requests of each at a time.
const BAD: usize = 2;
const AT_A_TIME: u32 = 24;
/// A machine that is busy with other things is given so many chances.
const ROUNDS: usize = 3;

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
    let length = 4 << 20;
    let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").as_bytes());
    let _ = stream.write_all(&vec![b' '; length - 1]);
}

/// How long rows of the healthy model took: the median and the 95th of a hundred.
fn times(setup: &Setup, healthy: &FakeProvider, first: u64) -> (Duration, Duration) {
    let session = |(n, mut client): (u64, Client)| {
        let row = move |i: u64| {
            let (start, row) = (Instant::now(), first + n * ROWS + i);
            client.rows(row..row + 1);
            let (got, _) = client.outcomes(1);
            assert!(is_right(row, &got[&row]), "{got:?}");
            start.elapsed()
        };
        (0..ROWS).map(row).collect::<Vec<_>>()
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
fn bad_providers_do_not_slow_a_healthy_model() {
    let healthy = provider(Config { latency: Latency { base: LATENCY, ..Latency::default() }, ..Config::default() });
    let plain = provider(Config { latency: Latency { base: LATENCY, ..Latency::default() }, ..Config::default() });
    let twice = format!("{}/twice/v1", twice(&plain));
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
    let bad: [Bad; 6] = [
        ("hangs", hangs, Box::new(move || hanging.load(Ordering::Relaxed))),
        ("100 Continue for ever", continues, Box::new(move || continuing.load(Ordering::Relaxed))),
        ("4 MiB, a byte short", short, Box::new(move || shortening.load(Ordering::Relaxed))),
        ("answers twice", twice, Box::new(|| plain.stats().requests)),
        ("absurd limits", absurd.base_url(), Box::new(|| absurd.stats().requests)),
        ("retry-after: 0", no_wait.base_url(), Box::new(|| no_wait.stats().requests)),
    ];
    println!("{:24} {:>12} {:>12} {:>12} {:>12} {:>10}", "beside", "p50 alone", "p95 alone", "p50", "p95", "requests");
    let mut slow = Vec::new();
    let mut first = 0;
    for (what, url, requests) in &bad {
        let mut is_fine = false;
        for _ in 0..ROUNDS {
            let setup = Setup::new(64 << 20);
            let alone = times(&setup, &healthy, first);
            let before = requests();
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
            wait("the bad ones are at it", requests, |n| *n >= before + 4);
            let beside = times(&setup, &healthy, first + SESSIONS * ROWS);
            first += 2 * SESSIONS * ROWS;
            let seen = requests() - before;
            println!(
                "{what:24} {:>12.1?} {:>12.1?} {:>12.1?} {:>12.1?} {seen:>10}",
                alone.0, alone.1, beside.0, beside.1
            );
            drop(clients);
            if beside.0 <= alone.0 * 3 / 2 && beside.1 <= alone.1 * 3 / 2 {
                is_fine = true;
                break;
            }
        }
        if !is_fine {
            slow.push(*what);
        }
    }
    assert!(slow.is_empty(), "{slow:?}");
}
