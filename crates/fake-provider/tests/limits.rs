//! Limits, latency and the gate.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use llm_fake_provider::{Config, FakeProvider, Fault, Latency, Limiter, OtherClient, RateHeaders, Reserve, RetryAfter};
use support::*;

/// The cost of the three rows.
fn cost() -> u64 {
    let provider = FakeProvider::start(Config::default()).unwrap();
    chat(&provider, &three_rows()).json()["usage"]["total_tokens"].as_u64().unwrap()
}

#[test]
fn the_token_limit_holds_and_refusals_cost_nothing() {
    let cap = 2 * cost() + 1;
    let window = Duration::from_millis(300);
    let provider = FakeProvider::start(Config { window, tokens_per_window: Some(cap), ..Config::default() }).unwrap();
    let start = Instant::now();
    let mut client = Client::connect(&provider);
    let (mut admitted, mut refused) = (0, 0);
    while admitted < 8 {
        match client.chat(&three_rows()).status {
            200 => admitted += 1,
            _ => refused += 1,
        }
    }
    // Two fit a window, so the eighth is in the fourth window.
    assert!(start.elapsed() >= 3 * window);
    assert!(refused > 0);
    let stats = provider.stats();
    assert_eq!(stats.peak_window_tokens, 2 * cost());
    assert_eq!(stats.peak_window_requests, 2);
    assert_eq!(stats.charged_tokens, 8 * cost());
    assert_eq!((stats.by_status[&200], stats.by_status[&429]), (8, refused));
    assert_eq!(answered(&stats), [8, 8, 8]);
    assert!(stats.window_used > 0.0 && stats.window_used <= 1.0, "{}", stats.window_used);
}

#[test]
fn what_a_429_says() {
    let provider = FakeProvider::start(Config {
        tokens_per_window: Some(cost()),
        requests_per_window: Some(5),
        ..Config::default()
    })
    .unwrap();
    let mut client = Client::connect(&provider);
    let first = client.chat(&three_rows());
    assert_eq!(first.header("x-ratelimit-remaining-tokens"), Some("0"));
    assert_eq!(first.header("x-ratelimit-limit-requests"), Some("5"));
    assert_eq!(first.header("x-ratelimit-remaining-requests"), Some("4"));
    assert_eq!(first.header("x-ratelimit-reset-tokens"), Some("1m0s"));
    assert!(first.header("date").is_some() && first.header("x-request-id").is_some());

    let full = client.chat(&three_rows());
    assert_eq!(full.status, 429);
    let error = &full.json()["error"];
    assert_eq!((error["code"].as_str(), error["type"].as_str()), (Some("rate_limit_exceeded"), Some("tokens")));
    let seconds: u64 = full.header("retry-after").unwrap().parse().unwrap();
    let ms: u64 = full.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds) && ms <= seconds * 1000 && ms > (seconds - 1) * 1000);

    provider.configure(|config| {
        config.tokens_per_window = None;
        config.requests_per_window = Some(1);
        config.retry_after = RetryAfter::None;
        config.rate_headers = RateHeaders::None;
    });
    let full = client.chat(&three_rows());
    assert_eq!(full.json()["error"]["type"], "requests");
    assert_eq!(full.header("retry-after"), None);
    assert_eq!(full.header("x-ratelimit-limit-requests"), None);

    provider.configure(|config| config.tokens_per_window = Some(cost() - 1));
    let never = client.chat(&three_rows());
    assert!(never.body.contains("Request too large"), "{}", never.body);
}

#[test]
fn reserves() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let charged = |reserve, max: u64| {
        provider.configure(|config| config.reserve = reserve);
        provider.reset_stats();
        let mut body = three_rows();
        body["max_tokens"] = max.into();
        let usage = chat(&provider, &body).json()["usage"].clone();
        (provider.stats().charged_tokens, usage["prompt_tokens"].as_u64().unwrap())
    };
    let (actual, prompt) = charged(Reserve::Actual, 500);
    assert_eq!(actual, cost());
    assert_eq!(charged(Reserve::PromptPlusMax, 500).0, prompt + 500);
    assert_eq!(charged(Reserve::Max, 500).0, 500);
    assert_eq!(charged(Reserve::Max, 5).0, prompt);
}

#[test]
fn a_refused_request_leaves_the_script_alone() {
    let provider = FakeProvider::start(Config { tokens_per_window: Some(cost()), ..Config::default() }).unwrap();
    let statuses = |n| (0..n).map(|_| chat(&provider, &three_rows()).status).collect::<Vec<_>>();
    provider.script([None, Some(Fault::EmptyAnswer), Some(Fault::Http500)]);
    assert_eq!(statuses(3), [200, 429, 429]);
    provider.configure(|config| config.tokens_per_window = None);
    assert_eq!(chat(&provider, &three_rows()).content(), "");
    assert_eq!(statuses(2), [500, 200]);
}

#[test]
fn latency_takes_its_time() {
    let provider = FakeProvider::start(Config {
        latency: Latency { base: Duration::from_millis(30), per_output_token: Duration::from_millis(1), spread: 0.0 },
        ..Config::default()
    })
    .unwrap();
    let start = Instant::now();
    let answer = chat(&provider, &three_rows()).json();
    let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(start.elapsed() >= Duration::from_millis(30 + tokens));
    let stats = provider.stats();
    assert!(stats.last_answer_ms.unwrap() >= stats.first_request_ms.unwrap() + 30);
}

#[test]
fn the_gate_holds_answers_that_are_billed() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    provider.hold();
    let mut clients = [0; 3].map(|_| Client::connect(&provider));
    for client in &mut clients {
        client.send_chat(&three_rows());
    }
    let stats = wait_for(&provider, |stats| stats.in_flight == 3);
    assert_eq!((stats.rows_in_flight, stats.by_status.len()), (9, 0));
    assert_eq!(answered(&stats), [3, 3, 3]);
    assert_eq!(stats.last_answer_ms, None);

    let [gone, mut second, mut third] = clients;
    drop(gone);
    wait_for(&provider, |stats| (stats.abandoned, stats.in_flight) == (1, 2));
    provider.reset_stats();
    provider.release();
    assert_eq!(second.receive().unwrap().content(), THREE_ANSWERS);
    assert_eq!(third.receive().unwrap().content(), THREE_ANSWERS);
    let stats = provider.stats();
    assert_eq!((stats.in_flight, stats.peak_in_flight, stats.peak_rows_in_flight), (0, 2, 6));
    // The gate is open.
    assert_eq!(second.chat(&three_rows()).status, 200);
    // A release also holds for a request that waits when the gate closes again at once.
    for _ in 0..50 {
        provider.hold();
        second.send_chat(&three_rows());
        wait_for(&provider, |stats| stats.in_flight == 1);
        provider.release();
        provider.hold();
        assert_eq!(second.receive().unwrap().content(), THREE_ANSWERS);
    }
}

#[test]
fn the_gate_lets_so_many_answers_through() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    for round in 1..=20 {
        provider.reset_stats();
        provider.hold_after(3);
        let mut clients = [0; 8].map(|_| Client::connect(&provider));
        for client in &mut clients {
            client.send_chat(&three_rows());
        }
        let stats = wait_for(&provider, |stats| stats.requests == 8 && stats.in_flight <= 5);
        assert_eq!((stats.in_flight, stats.by_status.get(&200)), (5, Some(&3)), "round {round}");
        assert!(provider.holds());
        provider.release();
        for client in &mut clients {
            assert_eq!(client.receive().unwrap().content(), THREE_ANSWERS);
        }
        assert_eq!(provider.stats().in_flight, 0);
    }
}

#[test]
fn a_bucket_gives_back_evenly_what_a_rolling_window_gives_back_at_once() {
    let window = Duration::from_millis(1_500);
    let provider = FakeProvider::start(Config {
        limiter: Limiter::Bucket,
        window,
        tokens_per_window: Some(3 * cost()),
        ..Config::default()
    })
    .unwrap();
    let mut client = Client::connect(&provider);
    let start = Instant::now();
    let mut admitted = 0;
    let full = loop {
        let response = client.chat(&three_rows());
        if response.status == 429 {
            break response;
        }
        admitted += 1;
    };
    assert!(admitted >= 3, "{admitted}");
    let wait: u64 = full.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((1..=500).contains(&wait), "a third of the window at most, not {wait} ms");
    std::thread::sleep(Duration::from_millis(wait));
    assert_eq!(client.chat(&three_rows()).status, 200);
    if start.elapsed() < window {
        // More than the limit, within one window.
        assert_eq!(provider.stats().peak_window_tokens, (admitted + 1) * cost());
    }
}

#[test]
fn prompts_and_completions_have_limits_of_their_own() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let usage = chat(&provider, &three_rows()).json()["usage"].clone();
    for (cap, word, of) in [
        ("input_tokens_per_window", "input", "prompt_tokens"),
        ("output_tokens_per_window", "output", "completion_tokens"),
    ] {
        let used = usage[of].as_u64().unwrap();
        let mut client = Client::connect(&provider);
        let mut set = |cap: &str, value: Option<u64>| {
            client.send("POST", "/control", "", &serde_json::json!({ cap: value }).to_string());
            assert_eq!(client.receive().unwrap().status, 200);
        };
        // One request is in the window already.
        set(cap, Some(2 * used));
        assert_eq!(chat(&provider, &three_rows()).status, 200);
        let full = chat(&provider, &three_rows());
        assert_eq!((full.status, full.json()["error"]["type"].as_str()), (429, Some("tokens")));
        let says = format!("on {word} tokens per min: Limit {}, Used {}, Requested {used}.", 2 * used, 2 * used);
        assert!(full.body.contains(&says) && full.header("retry-after").is_some(), "{}", full.body);
        set(cap, Some(used - 1));
        let large = chat(&provider, &three_rows());
        assert!(large.body.contains(&format!("Request too large for m on {word} tokens per min")), "{}", large.body);
        set(cap, None);
        // The next turn begins with one request in the window again.
        provider.configure(|config| config.window = Duration::from_millis(1));
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(chat(&provider, &three_rows()).status, 200);
        std::thread::sleep(Duration::from_millis(2));
        provider.configure(|config| config.window = Duration::from_secs(60));
        assert_eq!(chat(&provider, &three_rows()).status, 200);
    }
}

#[test]
fn a_reservation_that_was_not_used_is_given_back_after_the_answer() {
    for limiter in [Limiter::Rolling, Limiter::Bucket] {
        let provider = FakeProvider::start(Config {
            limiter,
            tokens_per_window: Some(1_500),
            reserve: Reserve::PromptPlusMax,
            release: true,
            window: Duration::from_secs(3_600),
            ..Config::default()
        })
        .unwrap();
        let mut body = three_rows();
        body["max_tokens"] = 1_000.into();
        provider.hold();
        let mut first = Client::connect(&provider);
        first.send_chat(&body);
        wait_for(&provider, |stats| stats.in_flight == 1);
        assert_eq!(chat(&provider, &body).status, 429, "no room for two reservations");
        provider.release();
        assert_eq!(first.receive().unwrap().status, 200);
        let stats = provider.stats();
        assert_eq!(stats.charged_tokens - stats.released_tokens, cost());
        assert_eq!(chat(&provider, &body).status, 200, "there is room after the answer");
        // Left: all but two answers and this reservation. (A bucket may have got a token meanwhile.)
        provider.configure(|config| config.release = false);
        let left = chat(&provider, &body).header("x-ratelimit-remaining-tokens").unwrap().parse::<u64>().unwrap();
        let prompt = stats.prompt_tokens;
        assert!((0..=5).contains(&(left - (1_500 - 2 * cost() - prompt - 1_000))), "{left}");
        assert_eq!(chat(&provider, &body).status, 429, "nothing is given back any more");
    }
}

#[test]
fn another_client_takes_from_the_same_limit() {
    let provider = FakeProvider::start(Config {
        tokens_per_window: Some(100_000),
        other_client: Some(OtherClient { share: 0.4, request_tokens: 40_000, ..OtherClient::default() }),
        ..Config::default()
    })
    .unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(provider.stats().other_tokens, 0, "it begins with our first request");
    let response = chat(&provider, &three_rows());
    let left: u64 = response.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
    assert_eq!(left, 60_000 - cost());
    let stats = provider.stats();
    assert_eq!((stats.requests, stats.charged_tokens, stats.peak_window_tokens), (1, cost(), cost()));
    assert_eq!((stats.other_tokens, stats.peak_window_tokens_all), (40_000, 40_000 + cost()));

    // Anew, and soon enough to see it take its part, whether or not there is room.
    let mut client = Client::connect(&provider);
    client.send(
        "POST",
        "/control",
        "",
        r#"{"other_client":{"share":90,"request_tokens":30000,"after_seconds":0.5},"reset_stats":true}"#,
    );
    assert_eq!(client.receive().unwrap().status, 200);
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(client.chat(&three_rows()).status, 200, "it has not begun");
    assert_eq!(provider.stats().other_tokens, 0);
    let stats = wait_for(&provider, |stats| stats.other_tokens >= 90_000);
    assert_eq!(stats.peak_window_tokens_all, 40_000 + 2 * cost() + stats.other_tokens);
    assert_eq!(client.chat(&three_rows()).status, 429);

    // Set again, it waits for a request of ours again; by either way to set it.
    let interval = Duration::from_millis(200);
    client.send(
        "POST",
        "/control",
        "",
        r#"{"other_client":{"share":90,"request_tokens":30000,"after_seconds":0.5},"reset_stats":true}"#,
    );
    assert_eq!(client.receive().unwrap().status, 200);
    std::thread::sleep(2 * interval);
    assert_eq!(provider.stats().other_tokens, 0);
    client.chat(&three_rows());
    provider.configure(|config| {
        config.other_client = Some(OtherClient { share: 90.0, request_tokens: 30_000, ..OtherClient::default() });
    });
    std::thread::sleep(4 * interval);
    assert_eq!(provider.stats().other_tokens, 0);
    client.chat(&three_rows());
    wait_for(&provider, |stats| stats.other_tokens >= 60_000);

    client.send("POST", "/control", "", r#"{"other_client":null,"reset_stats":true}"#);
    assert_eq!(client.receive().unwrap().status, 200);
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(provider.stats().other_tokens, 0);
}

#[test]
fn means_of_what_is_in_flight_and_of_the_delays() {
    let base = Duration::from_millis(200);
    let provider =
        FakeProvider::start(Config { latency: Latency { base, ..Latency::default() }, ..Config::default() }).unwrap();
    assert_eq!(provider.stats().in_flight_mean, 0.0);
    let mut clients = [0; 4].map(|_| Client::connect(&provider));
    for client in &mut clients {
        client.send_chat(&three_rows());
    }
    let [gone, others @ ..] = clients;
    drop(gone);
    for mut client in others {
        assert_eq!(client.receive().unwrap().status, 200);
    }
    let stats = wait_for(&provider, |stats| stats.in_flight == 0);
    // All at once, most of the time; one left soon.
    assert!((0.7..4.0).contains(&stats.in_flight_mean), "{}", stats.in_flight_mean);
    assert!((stats.rows_in_flight_mean - 3.0 * stats.in_flight_mean).abs() < 1e-9);
    assert!((stats.latency_ms_mean - 200.0).abs() < 1e-9, "{}", stats.latency_ms_mean);
    // The time after the last answer does not count.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(provider.stats().in_flight_mean, stats.in_flight_mean);
    provider.reset_stats();
    assert_eq!((provider.stats().in_flight_mean, provider.stats().latency_ms_mean), (0.0, 0.0));
}
