//! A provider that harms whom it can: its own rows at the most, never anybody else's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, Fault, RateHeaders};
use serde_json::json;
use support::relay::{answer, before, twice};
use support::*;

#[test]
fn answers_that_come_twice_give_no_row_a_wrong_label() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let url = twice(&provider);
    for rows_a_request in [50, 1] {
        let all = if rows_a_request == 1 { 100 } else { 500 };
        let mut clients: Vec<(u64, Client)> = (0..5_u64)
            .map(|c| {
                let change = |s: &mut Stream| {
                    // The last one asks an honest model, on the same host and port.
                    let path = if c == 4 { "honest" } else { "twice" };
                    s.endpoint.base_url = format!("{url}/{path}/v1");
                    s.endpoint.api_key = Some(Secret(format!("key-{path}")));
                    s.model.model = if c == 4 { "honest".into() } else { "m".into() };
                    s.task.options.max_rows_per_request = rows_a_request;
                    // Groups of their own.
                    s.role = c as u32;
                };
                (c, setup.client(&provider, change))
            })
            .collect();
        for (c, client) in &mut clients {
            client.rows(*c * all..(*c + 1) * all);
        }
        for (c, client) in &mut clients {
            let (outcomes, spent) = client.answers(all as usize);
            let labels = outcomes.values().filter(|o| matches!(o.verdict, Verdict::Answer(_))).count();
            for (n, o) in &outcomes {
                assert!(!matches!(o.verdict, Verdict::Answer(_)) || is_right(*n, &o.verdict), "{c}: {n} {o:?}");
                // An answer to another request is charged to no row.
                assert!(o.attempts <= 1, "{c}: {n} {o:?}");
            }
            // A row that gets nothing else for its answer fails in the end.
            assert!(labels * 100 >= all as usize * 95, "{c}: {labels} of {all}");
            if *c == 4 {
                assert_eq!(labels, all as usize);
                let requests = all.div_ceil(u64::from(rows_a_request));
                assert_eq!((spent.requests, spent.unconfirmed_input_tokens), (requests, 0));
            }
        }
    }
    eprintln!("{} requests", provider.stats().requests);
}

#[test]
fn who_says_that_no_wait_is_needed_is_believed_once() {
    let setup = Setup::new(64 << 20);
    for head in ["retry-after: 0", "date: Wed, 21 Oct 2015 07:28:30 GMT\r\nretry-after: Wed, 21 Oct 2015 07:28:00 GMT"]
    {
        let provider = provider(Config::default());
        let answer = format!("HTTP/1.1 429 X\r\n{head}\r\ncontent-length: 2\r\n\r\n{{}}");
        provider.script(vec![Some(Fault::Raw(answer.into_bytes())); 4]);
        let mut client = setup.client(&provider, |s| s.model.max_concurrent_requests = Some(1));
        let start = Instant::now();
        client.rows(0..50);
        let (outcomes, spent) = client.outcomes(50);
        assert!(outcomes.iter().all(|(n, v)| is_right(*n, v)), "{outcomes:?}");
        // Three quarters of half a second, one and two.
        assert!(start.elapsed() > Duration::from_millis(2_600), "{head}: {:?}", start.elapsed());
        assert_eq!((spent.requests, client.activity().iter().map(|a| a.throttled).max()), (1, Some(4)));
    }
}

#[test]
fn what_was_not_measured_teaches_nothing_and_is_unconfirmed() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let url = twice(&provider);
    let budget = Some(Prices { input: 1, output: 4 });
    let ways = ["mute", "input", "output"];
    for (way, budget) in ways.into_iter().flat_map(|way| [(way, None), (way, budget)]) {
        provider.reset_stats();
        let model = &format!("{way} {}", budget.is_some());
        let mut client = setup.client(&provider, |s| {
            s.endpoint.base_url = format!("{url}/{way}/v1");
            s.model.model.clone_from(model);
            s.budget = budget;
        });
        if budget.is_some() {
            client.say(&ToGateway::Allow(Allowance { cost: 1 << 40, tokens: 1 << 40 }));
        }
        client.rows(0..500);
        let (outcomes, spent) = client.outcomes(500);
        assert!(outcomes.iter().all(|(n, v)| is_right(*n, v)), "{model}");
        assert_eq!(spent.requests, 10, "{model}");
        let seen = client.activity().into_iter().find(|a| a.model == *model).unwrap();
        assert_eq!((seen.token_ratio, seen.answer_ratio, seen.thinking_tokens), (1.0, 1.0, 0), "{model}");
        let bill = provider.stats();
        let half = |is_said: bool, sure: u64, unsure: u64, billed: u64| match (is_said, budget) {
            (true, _) => assert_eq!((sure, unsure), (billed, 0), "{model}: {spent:?}"),
            // As we estimate it.
            (false, None) => assert!(sure > 0 && unsure == 0, "{model}: {spent:?}"),
            // As the worst.
            (false, Some(_)) => assert!(sure == 0 && unsure >= billed, "{model}: {spent:?}"),
        };
        half(way == "input", spent.input_tokens, spent.unconfirmed_input_tokens, bill.prompt_tokens);
        half(way == "output", spent.output_tokens, spent.unconfirmed_output_tokens, bill.completion_tokens);
    }
}

/// A provider's answer with this head and message.
fn says(status: u16, head: &str, message: &str) -> Fault {
    let body = format!("{{\"error\": {{\"message\": \"{message}\"}}}}");
    let length = body.len();
    Fault::Raw(format!("HTTP/1.1 {status} X\r\n{head}content-length: {length}\r\n\r\n{body}").into_bytes())
}

#[test]
fn one_absurd_limit_takes_no_row_and_no_time() {
    const TOO_LARGE: &str = "Request too large for m on tokens per min (TPM): Limit 1, Requested 2.";
    let setup = Setup::new(64 << 20);
    let heads = [
        "x-ratelimit-limit-tokens: 1\r\nx-ratelimit-remaining-tokens: 1\r\n",
        "x-ratelimit-limit-requests: 1\r\n",
        "anthropic-ratelimit-output-tokens-limit: 1\r\nanthropic-ratelimit-input-tokens-limit: 1\r\n",
    ];
    let mut absurd: Vec<(String, Fault)> = Vec::new();
    for status in [429, 500] {
        absurd.extend(heads.map(|head| (format!("{status} {head}"), says(status, head, "no"))));
        absurd.push((format!("{status}, in words"), says(status, heads[0], TOO_LARGE)));
    }
    absurd.push(("413, in words".into(), says(413, "", TOO_LARGE)));
    absurd.push(("200, in words".into(), says(200, heads[1], TOO_LARGE)));
    for (n, (what, fault)) in absurd.into_iter().enumerate() {
        for (rows_a_request, is_first) in [(50, true), (50, false), (1, true), (1, false)] {
            let provider = provider(Config::default());
            let mut client = setup.client(&provider, |s| {
                s.model.model = format!("m{n}{is_first}{rows_a_request}");
                s.task.options.max_rows_per_request = rows_a_request;
            });
            if !is_first {
                client.rows(1_000..1_060);
                client.answers(60);
            }
            provider.script([Some(fault.clone())]);
            let start = Instant::now();
            for first in [0, 200] {
                client.rows(first..first + 60);
                let (got, _) = client.answers(60);
                assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{what}: {got:?}");
            }
            let took = start.elapsed();
            assert!(took < Duration::from_secs(10), "{what}, {rows_a_request} rows a request: {took:?}");
            let model = format!("m{n}{is_first}{rows_a_request}");
            let seen = client.activity().into_iter().find(|a| a.model == model).unwrap();
            assert_eq!((seen.tokens_limit, seen.requests_limit), (None, None), "{what}");
        }
    }
}

#[test]
fn a_limit_that_is_too_small_for_every_row_stops_and_charges_none() {
    let setup = Setup::new(64 << 20);
    for rows in [1_u64, 1_000] {
        let provider = provider(Config { faults: vec![(Fault::TooLarge429, 1.0)], ..Config::default() });
        let mut client = setup.client(&provider, |s| s.model.model = format!("m{rows}"));
        client.rows(0..rows);
        let (mut stop, mut got) = (None, Vec::new());
        while got.len() < rows as usize {
            match client.hear("the rows back") {
                Some(FromGateway::Stopped(why)) => stop = Some(why),
                Some(FromGateway::Outcomes { outcomes, .. }) => got.extend(outcomes),
                other => panic!("{other:?}"),
            }
        }
        let requests = provider.stats().requests;
        if rows == 1 {
            // One row says nothing about others.
            let Verdict::Fail { class, detail } = &got[0].verdict else { panic!("{got:?}") };
            assert!(class == "provider_error" && detail.contains("Limit 30000, Requested 34472"), "{detail}");
            // Beside each a question without rows, which is refused in the same words.
            assert_eq!((requests, stop), (10, None));
            continue;
        }
        let stop = stop.unwrap();
        assert_eq!((stop.reason, stop.retry_after_ms), (StopReason::Quota, Some(60_000)));
        assert!(stop.message.contains("Limit 30000, Requested 34472"), "{stop:?}");
        assert!(got.iter().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0), "{got:?}");
        assert!(requests < 30, "{requests}");
        // It was the provider's mood.
        provider.configure(|c| c.faults.clear());
        client.open(&provider, |s| s.model.model = format!("m{rows}"));
        client.rows(0..rows);
        assert!(client.answers(rows as usize).0.iter().all(|(n, o)| is_right(*n, &o.verdict)));
    }
}

#[test]
fn a_row_that_a_true_limit_has_no_room_for_is_skipped_and_says_which() {
    for headers in [RateHeaders::OpenAi, RateHeaders::None] {
        let setup = Setup::new(64 << 20);
        let config = Config { tokens_per_window: Some(6_000), rate_headers: headers, ..Config::default() };
        let provider = provider(config);
        let mut client = setup.client(&provider, |_| {});
        client.rows(0..5);
        client.answers(5);
        // 8,000 tokens, and a few small ones.
        let large = Item { n: 5, text: format!("{} {}", text(5), "word ".repeat(8_000)), isolation: None, again: None };
        client.say(&ToGateway::Items(vec![large]));
        client.rows(6..9);
        let (got, _) = client.answers(4);
        assert!([6, 7, 8].iter().all(|n| is_right(*n, &got[n].verdict)), "{got:?}");
        let Verdict::Skip { class, detail } = &got[&5].verdict else { panic!("{got:?}") };
        assert!(class == "too_long" && detail.contains("Limit 6000, Requested"), "{detail}");
        println!("{headers:?}: {detail}, {} requests", provider.stats().requests);
        let limit = client.only_activity().tokens_limit;
        assert_eq!(limit, matches!(headers, RateHeaders::OpenAi).then_some(6_000));
    }
}

/// Two rows are larger than the limit, one is not. Several pairs are under way when the first is refused.
#[test]
fn no_row_is_too_long_that_was_not_sent_alone() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config {
        tokens_per_window: Some(6_000),
        window: Duration::from_millis(200),
        rate_headers: RateHeaders::None,
        ..Config::default()
    });
    let mut client = setup.client(&provider, |s| {
        s.task.options.max_rows_per_request = 2;
        s.model.max_request_tokens = 100_000;
    });
    let long = |n| Item { n, text: format!("{} {}", text(n), "word ".repeat(4_000)), isolation: None, again: None };
    client.say(&ToGateway::Items((0..16).map(long).collect()));
    let (got, _) = client.answers(16);
    assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict)), "{got:?}");
}

/// A provider may say too small a limit with each answer. A row that does not fit into it is tried.
#[test]
fn a_limit_that_a_row_shows_not_to_be_one_is_given_up() {
    let setup = Setup::new(64 << 20);
    let head = b"x-ratelimit-limit-tokens: 3000\r\n".to_vec();
    let provider = provider(Config { extra_head: head, ..Config::default() });
    let mut client = setup.client(&provider, |_| {});
    client.rows(0..5);
    client.answers(5);
    assert_eq!(client.only_activity().tokens_limit, Some(3_000));
    let large = Item { n: 5, text: format!("{} {}", text(5), "word ".repeat(8_000)), isolation: None, again: None };
    client.say(&ToGateway::Items(vec![large]));
    let (got, _) = client.answers(1);
    assert!(is_right(5, &got[&5].verdict), "{got:?}");
    assert_eq!(client.only_activity().tokens_limit, None);
}

/// A text that a provider refuses, and quotes.
const POISON: &str = "POISON";

/// The texts that are refused, in a request.
fn poisoned(texts: &str) -> Option<String> {
    let line = texts.lines().find(|line| line.contains(POISON) && line.starts_with(|c: char| c.is_ascii_digit()))?;
    serde_json::from_str(line.split_once(": ")?.1).ok()
}

/// Rows of two roles, one of them with a text that is refused: whatever is said of that, it fails alone.
#[track_caller]
fn only_the_row_is_rejected(what: &str, words: &str, refuse: fn(&str) -> Option<Vec<u8>>) {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let url = before(&provider, refuse);
    let of = |role: u32| {
        let url = url.clone();
        move |s: &mut Stream| (s.role, s.endpoint.base_url) = (role, url)
    };
    let mut other = setup.client(&provider, of(1));
    other.rows(0..50);
    assert!(other.answers(50).0.iter().all(|(n, o)| is_right(*n, &o.verdict)));
    let mut client = setup.client(&provider, of(2));
    client.rows(1_000..1_020);
    let item = Item { n: 1_020, text: format!("{} {POISON} {words}", text(1_020)), isolation: None, again: None };
    client.say(&ToGateway::Items(vec![item]));
    client.rows(1_021..1_040);
    for first in [100, 2_000, 4_000] {
        other.rows(first..first + 500);
        let got = other.answers(500).0;
        assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{what}: {words}: {got:?}");
    }
    let (got, _) = client.answers(40);
    for (n, outcome) in got {
        if n == 1_020 {
            assert!(
                matches!(&outcome.verdict, Verdict::Fail { class, .. } if class == "rejected"),
                "{what}: {words}: {outcome:?}"
            );
        } else {
            assert!(is_right(n, &outcome.verdict), "{what}: {words}: {n} {outcome:?}");
        }
    }
    // Nothing was learnt of it either. Requests without rows do not count.
    let mut bodies = provider.bodies();
    bodies.retain(|b| b["messages"][1]["content"] != "Say ok.");
    assert!(bodies.iter().all(|b| b["max_tokens"].as_u64().is_some_and(|cap| cap > 16)), "{words}");
    assert!(bodies.iter().all(|b| b["messages"][0]["role"] == "system"), "{words}");
    assert!(bodies.iter().all(|b| !b["response_format"].is_null()), "{words}");
}

#[test]
fn a_row_that_is_quoted_in_a_refusal_harms_no_other() {
    for words in [
        "insufficient_quota",
        "billing_error, and max_tokens at most 16",
        "max_tokens at most 16",
        "model_not_found",
        "response_format json_schema not supported",
        "system role not supported",
    ] {
        only_the_row_is_rejected("quoted", words, |texts| {
            let text = poisoned(texts)?;
            let error =
                json!({"error": {"message": format!("invalid input: {text}"), "type": "invalid_request_error"}});
            Some(answer(400, &error.to_string()))
        });
        only_the_row_is_rejected("quoted as JSON", words, |texts| {
            let message = format!("refused: {}", json!({"input": poisoned(texts)?}));
            Some(answer(422, &json!({"error": {"message": message}}).to_string()))
        });
    }
}

#[test]
fn who_says_in_words_alone_that_all_is_over_is_asked_without_rows() {
    for (words, refuse) in [
        (
            "1",
            (|texts| poisoned(texts).map(|_| answer(400, r#"{"error": {"message": "insufficient_quota"}}"#)))
                as fn(&str) -> _,
        ),
        ("2", |texts| poisoned(texts).map(|_| answer(400, r#"{"error": {"message": "model_not_found"}}"#))),
    ] {
        only_the_row_is_rejected("not quoted", words, refuse);
    }
    // An error about all requests is believed.
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let spent =
        |_: &str| Some(answer(400, r#"{"error": {"message": "You have reached your specified API usage limits."}}"#));
    let url = before(&provider, spent);
    let mut client = setup.client(&provider, |s| s.endpoint.base_url = url);
    client.rows(0..10);
    let stop = loop {
        match client.hear("a stop") {
            Some(FromGateway::Stopped(stop)) => break stop,
            Some(FromGateway::Outcomes { .. }) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(stop.reason, StopReason::Spend, "{stop:?}");
}

#[test]
fn a_cap_that_is_said_to_be_absurdly_small_takes_no_row() {
    let setup = Setup::new(64 << 20);
    for rows in [1, 60] {
        for words in ["max_tokens is too large: at most 1", "max_tokens is too large: 400 exceeds the maximum of 17"] {
            let provider = provider(Config::default());
            let mut client = setup.client(&provider, |s| s.model.model = format!("{words}{rows}"));
            provider.script([Some(says(400, "", words))]);
            client.rows(0..rows);
            let (got, _) = client.answers(rows as usize);
            assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{words}: {got:?}");
            // Each request has room for its rows.
            for body in provider.bodies().iter().filter(|body| body["messages"][1]["content"] != "Say ok.") {
                let (cap, texts) = (body["max_tokens"].as_u64(), body["messages"][1]["content"].as_str());
                let rows = texts.unwrap().matches("#r").count() as u64;
                assert!(cap.unwrap() >= 16 + rows, "{words}: {cap:?} for {rows} rows");
            }
        }
    }
}

/// The stop that a client is told at the end.
#[track_caller]
fn stop(client: &mut Client) -> Stop {
    loop {
        match client.hear("a stop") {
            Some(FromGateway::Stopped(stop)) => return stop,
            Some(FromGateway::Outcomes { outcomes, .. }) => {
                assert!(outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn), "{outcomes:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Chunk sizes, extensions and blanks without end never come to what is in a chunk.
#[test]
fn what_is_between_the_parts_of_an_answer_has_an_end() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    for (n, pour) in [("zeros", b'0'), ("blanks", b' ')] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            use std::io::Write;
            let mut stream = listener.accept().unwrap().0;
            let mut requests = std::io::BufReader::new(stream.try_clone().unwrap());
            support::relay::message(&mut requests).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5").unwrap();
            let start = Instant::now();
            let mut sent = 0;
            while start.elapsed() < Duration::from_secs(10) {
                match stream.write(&[pour; 4096]) {
                    Ok(n) => sent += n,
                    Err(_) => break,
                }
            }
            sender.send((sent, start.elapsed())).unwrap();
        });
        let mut client = setup.client(&provider, |s| (s.endpoint.base_url, s.model.model) = (url, n.into()));
        client.rows(0..10);
        let (sent, took) = receiver.recv().unwrap();
        // Buffers of both sides included.
        assert!(sent < 16 << 20 && took < Duration::from_secs(5), "{n}: {sent} bytes in {took:?}");
    }
}

#[test]
fn who_answers_probes_and_nothing_else_is_left_alone_and_that_is_said() {
    // Each takes some rounds of probes: all at once.
    std::thread::scope(|scope| {
        for (what, own) in [
            ("500", answer(500, r#"{"error": {"message": "boom"}}"#)),
            ("no head", b"HTTP/1.1 2".to_vec()),
            ("no status", b"HTTP/1.1 099 x\r\ncontent-length: 0\r\n\r\n".to_vec()),
        ] {
            scope.spawn(move || only_probes_are_answered(what, &own));
        }
    });
}

#[track_caller]
fn only_probes_are_answered(what: &str, own: &[u8]) {
    let own = own.to_vec();
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let requests = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = std::sync::Arc::clone(&requests);
    let url = before(&provider, move |texts| {
        (!texts.contains("Say ok.")).then(|| {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            own.clone()
        })
    });
    let change = |s: &mut Stream| (s.endpoint.base_url, s.model.request_timeout_ms) = (url.clone(), 500);
    let mut client = setup.client(&provider, change);
    client.rows(0..500);
    let first = stop(&mut client);
    assert_eq!(first.reason, StopReason::ProviderDown, "{what}: {first:?}");
    let wait = first.retry_after_ms.unwrap_or_default();
    assert!((1_000..=60_000).contains(&wait), "{what}: {first:?}");
    let sent = requests.load(std::sync::atomic::Ordering::Relaxed);
    assert!(sent <= 60, "{what}: {sent}");
    let mut other = setup.client(&provider, |s| s.role = 11);
    assert!(other.activity().iter().any(|a| a.last_error.is_some()), "{what}");
    println!("{what}: {sent} requests; {first:?}");
}

#[test]
fn who_has_no_patience_harms_no_other() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let probes = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = std::sync::Arc::clone(&probes);
    let url = before(&provider, move |texts| {
        if texts.contains("Say ok.") {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        // One that is too slow for whoever asks with little patience.
        if texts.contains("#r50") {
            std::thread::sleep(Duration::from_secs(600));
        }
        None
    });
    let mut other = setup.client(&provider, |s| (s.role, s.endpoint.base_url) = (1, url.clone()));
    other.rows(0..10);
    other.answers(10);
    let mut hasty = setup.client(&provider, |s| {
        (s.role, s.endpoint.base_url, s.model.request_timeout_ms) = (2, url.clone(), 100);
        s.task.options.max_rows_per_request = 1;
    });
    // No answer of the other one makes up meanwhile for what takes too long.
    hasty.rows(5_000..5_040);
    assert_eq!(stop(&mut hasty).reason, StopReason::ProviderDown);
    assert_eq!(other.only_activity().breaker, llm_batch_core::breaker::State::Closed);
    other.rows(100..400);
    let (got, _) = other.answers(300);
    assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{got:?}");
    // The endpoint was not suspected: an open circuit is probed before anything else is sent.
    assert_eq!(probes.load(std::sync::atomic::Ordering::Relaxed), 0);
}
