//! The headers that tell limits.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use llm_fake_provider::{Config, FakeProvider, OtherClient, RateHeaders};
use support::*;

fn number(response: &Response, header: &str) -> i64 {
    response.header(header).unwrap().parse().unwrap()
}

#[test]
fn a_minutes_limit_and_what_is_really_left() {
    let provider = FakeProvider::start(Config {
        window: Duration::from_secs(600),
        tokens_per_window: Some(20_000),
        requests_per_window: Some(2),
        rate_headers: RateHeaders::Mistral,
        ..Config::default()
    })
    .unwrap();
    let mut client = Client::connect(&provider);
    let first = client.chat(&three_rows());
    let cost = first.json()["usage"]["total_tokens"].as_i64().unwrap();
    assert_eq!(number(&first, "x-ratelimit-limit-req-minute"), 0, "0.2, rounded");
    assert_eq!(number(&first, "x-ratelimit-remaining-req-minute"), 1);
    assert_eq!(number(&first, "x-ratelimit-limit-tokens-minute"), 2_000);
    assert_eq!(number(&first, "x-ratelimit-remaining-tokens-minute"), 20_000 - cost);
    assert_eq!(number(&first, "x-ratelimit-tokens-query-cost"), cost);
    assert_eq!(first.header("x-ratelimit-limit-tokens"), None);
    client.chat(&three_rows());
    let full = client.chat(&three_rows());
    assert_eq!(full.status, 429);
    assert_eq!(number(&full, "x-ratelimit-remaining-req-minute"), 0);
    assert_eq!(number(&full, "x-ratelimit-remaining-tokens-minute"), 20_000 - 2 * cost);
}

#[test]
fn only_limits_that_are_set_are_told() {
    let provider = FakeProvider::start(Config {
        input_tokens_per_window: Some(10_000),
        output_tokens_per_window: Some(10_000),
        rate_headers: RateHeaders::Anthropic,
        ..Config::default()
    })
    .unwrap();
    let response = chat(&provider, &three_rows());
    let told: Vec<_> = response.headers.iter().filter(|(name, _)| name.contains("ratelimit")).collect();
    assert_eq!(told.len(), 6, "{told:?}");
    assert_eq!(number(&response, "anthropic-ratelimit-input-tokens-limit"), 10_000);
    assert_eq!(number(&response, "anthropic-ratelimit-output-tokens-remaining"), 10_000);
    let reset = response.header("anthropic-ratelimit-input-tokens-reset").unwrap();
    assert!(reset.len() == 20 && reset.ends_with('Z'), "{reset}");
    assert!(response.header("date").is_some());
}

#[test]
fn what_azure_tells_may_be_less_than_nothing() {
    let provider = FakeProvider::start(Config {
        tokens_per_window: Some(1_000),
        rate_headers: RateHeaders::Azure,
        other_client: Some(OtherClient { share: 1.0, request_tokens: 1_500, ..OtherClient::default() }),
        ..Config::default()
    })
    .unwrap();
    let response = chat(&provider, &three_rows());
    assert_eq!((response.status, number(&response, "x-ratelimit-remaining-tokens")), (429, -500));
    assert_eq!(number(&response, "x-ratelimit-limit-tokens"), 1_000);
    assert_eq!(response.header("x-ratelimit-reset-tokens"), None);
}

#[test]
fn ways_to_say_when_to_come_again() {
    let provider = FakeProvider::start(Config { requests_per_window: Some(1), ..Config::default() }).unwrap();
    let mut client = Client::connect(&provider);
    assert_eq!(client.chat(&three_rows()).status, 200);
    let mut told = |style: &str| {
        client.send("POST", "/control", "", &format!(r#"{{"retry_after":"{style}","rate_headers":"none"}}"#));
        assert_eq!(client.receive().unwrap().status, 200);
        let full = client.chat(&three_rows());
        assert!(full.headers.iter().all(|(name, _)| !name.contains("ratelimit")));
        ["retry-after", "retry-after-ms"].map(|name| full.header(name).map(str::to_owned))
    };
    assert_eq!(told("none"), [None, None]);
    let [seconds, ms] = told("seconds");
    assert!((50..=60).contains(&seconds.unwrap().parse().unwrap()) && ms.is_none());
    let [date, ms] = told("date");
    assert!(date.unwrap().ends_with(" GMT") && ms.is_none());
    let [seconds, ms] = told("both");
    assert!(seconds.is_some() && ms.is_some());
}
