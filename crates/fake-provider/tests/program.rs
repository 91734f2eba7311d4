//! The program and its options.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::*;

/// Killed at the end of the test, however that ends.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the program; its base URL, unless it refused its options.
fn start(options: &str) -> (Program, Option<String>) {
    let mut program = Command::new(env!("CARGO_BIN_EXE_llm-fake-provider"));
    program.args(options.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = program.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).unwrap_or_default();
    (Program(child), ready["base_url"].as_str().map(str::to_owned))
}

#[test]
fn limits_as_options() {
    let (_program, url) = start(
        "--limiter bucket --window 30 --tokens-per-window 5000 --input-tokens-per-window 4000 \
         --output-tokens-per-window 3000 --requests-per-window 10 --reserve prompt-plus-max --release \
         --other-client 0.2 --other-client-tokens 1500 --other-client-after 0 --other-client-yields \
         --rate-headers anthropic --retry-after date --cache-prefix",
    );
    let mut client = Client::to(&url.unwrap());
    let mut body = three_rows();
    body["max_tokens"] = 1_000.into();
    let first = client.chat(&body);
    assert_eq!(first.status, 200, "{}", first.body);
    for (header, value) in [
        ("anthropic-ratelimit-tokens-limit", "10000"),
        // 3,500 less the reservation.
        ("anthropic-ratelimit-tokens-remaining", "2000"),
        ("anthropic-ratelimit-input-tokens-limit", "8000"),
        ("anthropic-ratelimit-output-tokens-limit", "6000"),
        ("anthropic-ratelimit-requests-limit", "20"),
        ("anthropic-ratelimit-requests-remaining", "8"),
    ] {
        assert_eq!(first.header(header), Some(value), "{header}");
    }
    client.send("GET", "/stats", "", "");
    let stats = client.receive().unwrap().json();
    assert_eq!(stats["other_tokens"], 1_500);
    assert_eq!(
        stats["released_tokens"],
        stats["charged_tokens"].as_u64().unwrap() - first.json()["usage"]["total_tokens"].as_u64().unwrap()
    );
    body["max_tokens"] = 4_900.into();
    let large = client.chat(&body);
    assert_eq!(large.status, 429);
    assert!(large.header("retry-after").unwrap().ends_with(" GMT"), "{:?}", large.headers);
}

#[test]
fn no_headers_at_all() {
    let (_program, url) = start("--requests-per-window 1 --no-rate-headers --no-retry-after");
    let mut client = Client::to(&url.unwrap());
    assert_eq!(client.chat(&three_rows()).status, 200);
    let full = client.chat(&three_rows());
    assert_eq!((full.status, full.header("retry-after")), (429, None));
    assert!(full.headers.iter().all(|(name, _)| !name.contains("ratelimit")), "{:?}", full.headers);
}

#[test]
fn what_is_no_option() {
    for options in ["--limiter leaky", "--rate-headers", "--retry-after soon", "--other-client much"] {
        assert_eq!(start(options).1, None, "{options}");
    }
}
