//! The memory for texts that wait: nobody's share of it is another's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufReader, ErrorKind, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llm_batch_core::task::Spec;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::Config;
use serde_json::json;
use support::*;

const MEMORY: usize = 2 << 20;
/// A message.
const FRAME: usize = 512 << 10;
/// Bytes that a connection holds beside it: the buffer of its socket, and the first ones of a message.
const BESIDE: usize = 256 << 10;

/// Rows with about so many bytes of text.
fn large(first: u64, bytes: usize) -> Vec<u8> {
    let item = |n| Item { n, text: format!("{} {}", text(n), "word ".repeat(800)), isolation: None, again: None };
    encode(&ToGateway::Items((first..first + bytes as u64 / 4_000).map(item).collect())).unwrap()
}

/// Writes to all of these as much as is taken, until nothing is for a while: how many bytes that were.
fn pour(clients: &mut [Client], frames: &[Vec<u8>]) -> usize {
    let mut written = vec![0; clients.len()];
    let mut last = Instant::now();
    clients.iter().for_each(|client| client.stream.set_nonblocking(true).unwrap());
    while last.elapsed() < Duration::from_millis(500) {
        for ((client, frame), written) in clients.iter_mut().zip(frames).zip(&mut written) {
            match client.stream.write(&frame[*written..]) {
                Ok(0) => {}
                Ok(n) => (*written, last) = (*written + n, Instant::now()),
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock, "{e}"),
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    written.iter().sum()
}

/// Texts of a role, or for an account, whose server is silent: others go on, and who looks at what goes on.
#[test]
fn one_role_or_account_leaves_memory_for_others() {
    for (is_role, has_budget) in [(true, false), (true, true), (false, false)] {
        let (good, bad) = (provider(Config::default()), provider(Config::default()));
        let setup = Setup::new(MEMORY);
        bad.hold();
        let client = |n: u32| {
            let mut client = setup.client(&bad, |s| {
                s.interactive = n < 4;
                s.role = if is_role { 1 } else { n };
                s.endpoint.account = is_role.then(|| n.to_string());
                s.model.request_timeout_ms = 300_000;
                s.budget = has_budget.then_some(Prices { input: 1, output: 4 });
            });
            if has_budget {
                client.say(&ToGateway::Allow(Allowance { cost: 1 << 40, tokens: 1 << 40 }));
            }
            client
        };
        let mut greedy: Vec<Client> = (0..8).map(client).collect();
        let mut quiet = client(1);
        quiet.activity();
        let frames: Vec<Vec<u8>> =
            (0..8).map(|n| [large(n * 1_000, FRAME), large(n * 1_000 + 500, FRAME)].concat()).collect();
        let written = pour(&mut greedy, &frames);
        println!("{} of {} kB were taken", written >> 10, frames.iter().map(Vec::len).sum::<usize>() >> 10);
        let share = if is_role { MEMORY / 4 * 3 } else { MEMORY / 2 };
        assert!(written <= share + 2 * FRAME + greedy.len() * BESIDE, "{written}");
        let mut healthy = setup.client(&good, |s| s.role = if is_role { 2 } else { 1 });
        healthy.rows(9_000..9_050);
        let (got, _) = healthy.outcomes(50);
        assert!(got.iter().all(|(n, verdict)| is_right(*n, verdict)), "{got:?}");
        assert!(!setup.connect().activity().is_empty());
        // Of the same role and account, who hands over no rows is heard.
        assert!(!quiet.activity().is_empty());
        // They did not wait for a timeout.
        assert_eq!(bad.stats().abandoned, 0);
        // A client that leaves is missed, though nothing more is read.
        drop(greedy);
        let mut next = setup.client(&good, |s| s.role = 1);
        next.rows(9_100..9_150);
        assert_eq!(next.outcomes(50).0.len(), 50);
        let held = || setup.connect().activity().iter().map(|a| a.queued + a.in_flight_rows).sum::<u64>();
        wait("nothing is left of them", held, |n| *n == 0);
    }
}

/// A message counts as soon as it begins to come, and its buffer is not kept.
#[test]
fn frames_that_come_at_the_same_time_have_no_more_memory() {
    let provider = provider(Config::default());
    let setup = Setup::new(MEMORY);
    let mut clients: Vec<Client> = (0..40).map(|n| setup.client(&provider, |s| s.role = n)).collect();
    for client in &mut clients {
        client.activity();
    }
    // All but the last byte of each.
    let frames: Vec<Vec<u8>> = (0..40)
        .map(|n| large(n * 1_000, 2 * FRAME))
        .map(|mut f| {
            f.pop();
            f
        })
        .collect();
    let written = pour(&mut clients, &frames);
    println!("{} of {} MiB were taken", written >> 20, frames.iter().map(Vec::len).sum::<usize>() >> 20);
    assert!(written <= MEMORY + 2 * FRAME + clients.len() * BESIDE, "{written}");
}

/// Threads that do what takes long. They wait for more for ten seconds.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("tokio-")).count()
}

/// Tokens of long texts are counted beside the network's thread. Many who hand over some take no more of the machine.
#[test]
fn long_texts_of_many_take_a_part_of_the_machine() {
    let provider = provider(Config::default());
    let setup = Setup::new(64 << 20);
    let clients: Vec<Client> = (0..30)
        .map(|n| {
            let mut client = setup.client(&provider, |s| s.role = n);
            let long = format!("{} {}", text(n.into()), "word ".repeat(8_000));
            client.say(&ToGateway::Items(vec![Item { n: n.into(), text: long, isolation: None, again: None }]));
            client
        })
        .collect();
    for mut client in clients {
        assert_eq!(client.outcomes(1).0.len(), 1);
    }
    let cores = std::thread::available_parallelism().unwrap().get();
    println!("{} threads", threads());
    assert!(threads() <= cores.div_ceil(2) + 2, "{} threads for {cores} cores", threads());
}

/// A server that gives each request an answer of 4 MB, of zeros in a list. Its URL.
fn zeros() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let body = format!("{{\"choices\": [0{}]}}", ",0".repeat(2_000_000));
    let answer = Arc::new(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let mut requests = BufReader::new(stream.try_clone().unwrap());
                while support::relay::message(&mut requests).is_some() && stream.write_all(answer.as_bytes()).is_ok() {}
            });
        }
    });
    url
}

/// A value of JSON takes two bytes as it comes, and a hundred once it is read.
#[test]
fn what_is_small_to_send_and_large_to_read_is_not_read() {
    let provider = provider(Config::default());
    let setup = Setup::new(64 << 20);
    let url = zeros();
    let mut client = setup.client(&provider, |s| {
        s.endpoint.base_url = url;
        s.model.max_concurrent_requests = Some(8);
        s.task.options.max_rows_per_request = 1;
        // The answer to a row may have so many bytes.
        let task = json!({"instruction": "Explain it.", "max_output_tokens": 8_000});
        s.task.spec = Spec::from_json("generate", &task).unwrap();
    });
    let (before, is_over) = (memory(), AtomicBool::new(false));
    let (most, last) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut most = 0;
            while !is_over.load(Ordering::Relaxed) {
                most = memory().max(most);
                std::thread::sleep(Duration::from_millis(5));
            }
            most
        });
        client.rows(0..100);
        let last = loop {
            match client.hear("the end") {
                Some(FromGateway::Stopped(stop)) => break stop,
                Some(FromGateway::Outcomes { .. }) => {}
                other => panic!("{other:?}"),
            }
        };
        is_over.store(true, Ordering::Relaxed);
        (watching.join().unwrap(), last)
    });
    println!("{before} MiB before, {most} at most; {last:?}");
    assert!(last.message.contains("has more parts than an answer can have"), "{last:?}");
    // Eight bodies here, and eight there.
    assert!(most <= before + 160, "{before} MiB before, {most} at most");
}
