//! The CPU time of a row in the provider's thread, everything included.
//!
//! `cargo run --release -p llm_fake_provider --example speed [REQUESTS]` sends
//! that many requests (default 4,000) of 50 rows of some 37 tokens, with some 450
//! tokens of instructions, over 8 connections. The client's own work is not
//! counted. Linux only: the thread's CPU time is read from `/proc`.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use llm_fake_provider::{Config, FakeProvider};
use serde_json::{Value, json};

const ROWS: u64 = 50;
const CONNECTIONS: usize = 8;
const LABELS: [&str; 8] = ["billing", "bug", "refund", "praise", "account", "shipping", "spam", "other"];
const WORDS: &str = "the invoice arrived twice and my card was charged again please refund it app crashes whenever \
                     I open settings page since yesterday's update cannot log in with new password delivery late 3 \
                     weeks thanks for quick help über café 2024-05-01";

fn main() -> Result<(), Box<dyn Error>> {
    let requests: u64 = std::env::args().nth(1).map_or(Ok(4000), |text| text.parse())?;
    let provider = FakeProvider::start(Config {
        tokens_per_window: Some(1 << 40),
        requests_per_window: Some(1 << 30),
        ..Config::default()
    })?;
    let url = provider.base_url();
    let address = url.trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(BufReader::new(TcpStream::connect(&address)?));
    }

    // Ready-made, in batches, so that a long run does not hold all of its bodies.
    let (mut cpu, mut wall, mut sent) = (0, 0.0, 0);
    while sent < requests {
        let batch: Vec<String> = (sent..requests.min(sent + 1000)).map(request).collect();
        let (cpu_before, begun) = (provider_cpu()?, Instant::now());
        for round in batch.chunks(CONNECTIONS) {
            for (connection, request) in connections.iter_mut().zip(round) {
                connection.get_mut().write_all(request.as_bytes())?;
            }
            for (connection, _) in connections.iter_mut().zip(round) {
                read_answer(connection)?;
            }
        }
        cpu += provider_cpu()? - cpu_before;
        wall += begun.elapsed().as_secs_f64();
        sent += batch.len() as u64;
    }

    let resident = resident_kb()? / 1024;
    let stats = provider.stats();
    let rows = sent * ROWS;
    let right = stats.rows.values().filter(|row| row.answered == row.asked).count() as u64;
    if stats.admitted != sent || right != rows {
        return Err(format!("{} of {sent} requests, {right} of {rows} rows", stats.admitted).into());
    }
    println!(
        "{rows} rows of {:.1} tokens: {:.2} us of CPU a row, {:.0} rows/s, {} MB resident",
        stats.prompt_tokens as f64 / rows as f64,
        cpu as f64 / 1000.0 / rows as f64,
        rows as f64 / wall,
        resident,
    );
    Ok(())
}

/// A request's bytes, head and body. No two rows are alike.
fn request(number: u64) -> String {
    let mut system = String::from("Sort each customer message of a web shop by what it is about.\n\nLabels:\n");
    for (index, label) in LABELS.iter().enumerate() {
        let code = char::from(b'a' + index as u8);
        let about = "messages about this, its variants, and whatever a reader would take for it, but not the others";
        system.push_str(&format!("{code} = {label}: {about}, in any language, long or short, however polite\n"));
    }
    let manner = "Decide by the main concern. When two labels fit, take the one that comes first in the list. ";
    system.push_str(&format!("\n{}\nAnswer as {{\"r\":[{{\"i\":417,\"c\":\"a\"}}]}}", manner.repeat(10)));
    let words: Vec<&str> = WORDS.split(' ').collect();
    let mut user = String::new();
    let mut random = fastrand::Rng::with_seed(number);
    for row in 0..ROWS {
        let id = number * ROWS + row;
        let mut text = format!("#r{id:07}:{}#", LABELS[(id % 8) as usize]);
        for _ in 0..19 {
            text.push(' ');
            text.push_str(words[random.usize(..words.len())]);
        }
        user.push_str(&format!("{}: {}\n", 100 + row, Value::from(text)));
    }
    let codes: Vec<String> = (0..8u8).map(|index| char::from(b'a' + index).to_string()).collect();
    let body = json!({
        "model": "m",
        "messages": [{ "role": "system", "content": system }, { "role": "user", "content": user }],
        "max_completion_tokens": 2000,
        "response_format": { "type": "json_schema", "json_schema": { "name": "labels", "strict": true, "schema": {
            "type": "object",
            "properties": { "r": { "type": "array", "items": {
                "type": "object",
                "properties": { "i": { "type": "integer" }, "c": { "type": "string", "enum": codes } },
                "required": ["i", "c"],
                "additionalProperties": false,
            } } },
            "required": ["r"],
            "additionalProperties": false,
        } } },
    })
    .to_string();
    format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn read_answer(connection: &mut BufReader<TcpStream>) -> Result<(), Box<dyn Error>> {
    let mut length = 0;
    let mut line = String::new();
    loop {
        line.clear();
        connection.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some(("content-length", value)) => length = value.parse()?,
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    connection.read_exact(&mut vec![0; length])?;
    Ok(())
}

/// CPU time of the provider's thread, in ns.
fn provider_cpu() -> Result<u64, Box<dyn Error>> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let path = task?.path();
        if std::fs::read_to_string(path.join("comm"))?.trim_end() == "fake-provider" {
            let schedstat = std::fs::read_to_string(path.join("schedstat"))?;
            return Ok(schedstat.split(' ').next().unwrap_or_default().parse()?);
        }
    }
    Err("the provider has no thread".into())
}

fn resident_kb() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
