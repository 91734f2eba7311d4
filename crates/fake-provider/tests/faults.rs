//! Each fault does what it says.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{ErrorKind, Read, Write};

use llm_fake_provider::{Config, FakeProvider, Fault, Stats};
use serde_json::Value;
use support::*;

/// The outcome of one request with a fault.
fn with(fault: Fault) -> (Result<Response, ErrorKind>, Stats) {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let name = fault.name();
    provider.script([Some(fault)]);
    let mut client = Client::connect(&provider);
    client.send_chat(&three_rows());
    let outcome = client.receive();
    let stats = provider.stats();
    assert_eq!(stats.faults.get(name), Some(&1));
    assert_eq!(stats.in_flight, 0);
    (outcome, stats)
}

/// The text of an answer with a fault, and what counts as answered.
fn text(fault: Fault) -> (String, [u32; 3]) {
    let (outcome, stats) = with(fault);
    let response = outcome.unwrap();
    assert_eq!(response.finish_reason(), "stop");
    (response.content(), answered(&stats))
}

#[test]
fn refusals_are_not_billed() {
    for (fault, status, code) in [
        (Fault::Http500, 500, None),
        (Fault::Http503, 503, None),
        (Fault::RateLimit429, 429, Some("rate_limit_exceeded")),
        (Fault::SpendLimit429, 429, Some("insufficient_quota")),
        (Fault::TooLarge429, 429, Some("rate_limit_exceeded")),
    ] {
        let (outcome, stats) = with(fault.clone());
        let response = outcome.unwrap();
        assert_eq!(response.status, status);
        assert_eq!(response.json()["error"]["code"].as_str(), code);
        assert_eq!(response.header("retry-after"), None);
        let too_large = response.body.contains("Limit 30000, Requested 34472");
        assert_eq!(too_large, fault == Fault::TooLarge429);
        assert_eq!((stats.admitted, stats.prompt_tokens), (0, 0));
        assert!(stats.rows.is_empty());
        assert_eq!(stats.by_status[&status], 1);
    }
}

#[test]
fn statuses_and_redirects_as_given() {
    let (outcome, _) = with(Fault::Status(200, "<html>".into()));
    let response = outcome.unwrap();
    assert_eq!((response.status, response.body.as_str()), (200, "<html>"));
    let (outcome, _) = with(Fault::Redirect("http://x/\r\nevil: 1".into()));
    let response = outcome.unwrap();
    assert_eq!(response.status, 302);
    assert_eq!(response.header("location"), Some("http://x/evil: 1"));
}

#[test]
fn resets_before_and_after_billing() {
    let (outcome, stats) = with(Fault::ResetBefore);
    assert_eq!(outcome.err(), Some(ErrorKind::ConnectionReset));
    assert_eq!((stats.connections_reset, stats.admitted), (1, 0));
    assert_eq!(answered(&stats), [0, 0, 0]);

    let (outcome, stats) = with(Fault::ResetAfter);
    assert_eq!(outcome.err(), Some(ErrorKind::ConnectionReset));
    assert_eq!((stats.connections_reset, stats.admitted), (1, 1));
    assert_eq!(answered(&stats), [1, 1, 1]);
    assert!(stats.prompt_tokens > 0 && stats.last_answer_ms.is_some());
    assert!(stats.by_status.is_empty());
}

#[test]
fn connections_that_misbehave() {
    let (outcome, stats) = with(Fault::Raw(b"HTTP/1.1 299 Odd\r\ncontent-length: 3\r\n\r\na\0!".to_vec()));
    let response = outcome.unwrap();
    assert_eq!((response.status, response.body.len()), (299, 3));
    assert!(stats.by_status.is_empty() && stats.admitted == 0);

    let provider = FakeProvider::start(Config { poison: Some("rotten".into()), ..Config::default() }).unwrap();
    let mut body = three_rows();
    assert_eq!(chat(&provider, &body).status, 200);
    body["messages"][0]["content"] = "a rotten apple".into();
    assert_eq!(chat(&provider, &body).status, 500);
}

/// Reads a connection until that is enough. Returns the text, and whether more follows within a moment.
fn bytes(fault: Fault, is_enough: impl Fn(&[u8]) -> bool) -> (Vec<u8>, bool) {
    let provider = FakeProvider::start(Config { faults: vec![(fault, 1.0)], ..Config::default() }).unwrap();
    let mut stream = std::net::TcpStream::connect(provider.address()).unwrap();
    let body = three_rows().to_string();
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let (mut got, mut part) = (Vec::new(), vec![0; 65536]);
    while !is_enough(&got) {
        let n = stream.read(&mut part).unwrap();
        assert!(n > 0, "closed after {} bytes", got.len());
        got.extend_from_slice(part.get(..n).unwrap());
    }
    stream.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
    let has_more = stream.read(&mut part).is_ok();
    (got, has_more)
}

#[test]
fn answers_without_end_short_of_it_or_twice() {
    let (text, has_more) = bytes(Fault::Continues, |got| got.len() >= 1 << 20);
    assert!(has_more && text.starts_with(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"));
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 4194304\r\n\r\n";
    let length = head.len() + (4 << 20) - 1;
    let (short, has_more) = bytes(Fault::ByteShort, |got| got.len() >= length);
    assert!(short.starts_with(head) && short.len() == length && !has_more, "{} {has_more}", short.len());
    let are_same = |got: &[u8]| !got.is_empty() && got.split_at(got.len() / 2).0 == got.split_at(got.len() / 2).1;
    let (twice, has_more) = bytes(Fault::Twice, are_same);
    assert!(twice.ends_with(b"}") && !has_more, "{}", String::from_utf8_lossy(&twice));
}

#[test]
fn bills_that_say_half_or_nothing() {
    let usage = |fault| {
        let (outcome, stats) = with(fault);
        assert!(stats.prompt_tokens > 0 && stats.completion_tokens > 0);
        outcome.unwrap().json()["usage"].clone()
    };
    assert_eq!(usage(Fault::NoUsage), Value::Null);
    let half = usage(Fault::PromptUsage);
    assert!(half["prompt_tokens"].as_u64() > Some(0) && half.as_object().unwrap().len() == 1, "{half}");
}

#[test]
fn faults_of_some_models_befall_no_other() {
    let (faults, faulty) = (vec![(Fault::Http500, 1.0)], Some("bad".to_owned()));
    let provider = FakeProvider::start(Config { faults, faulty, ..Config::default() }).unwrap();
    for (model, status) in [("bad-1", 500), ("good", 200)] {
        let mut body = three_rows();
        body["model"] = model.into();
        assert_eq!(chat(&provider, &body).status, status, "{model}");
    }
}

#[test]
fn rows_left_out_invented_or_doubled() {
    let (text_, counts) = text(Fault::DropId);
    let map: Value = serde_json::from_str(&text_).unwrap();
    assert_eq!((map.as_object().unwrap().len(), sum(counts)), (2, 2));

    let (text_, counts) = text(Fault::InventId);
    let map: Value = serde_json::from_str(&text_).unwrap();
    assert_eq!((map.as_object().unwrap().len(), sum(counts)), (3, 2));
    assert!(map.get("1009").is_some(), "{text_}");

    let (text_, counts) = text(Fault::DoubleId);
    assert_eq!((text_.matches(':').count(), sum(counts)), (4, 3));
    let map: Value = serde_json::from_str(&text_).unwrap();
    assert_eq!(map.as_object().unwrap().len(), 3);
    assert_ne!(map.to_string(), THREE_ANSWERS);

    let (text_, counts) = text(Fault::UnknownCode);
    assert_eq!((text_.matches("\"zz\"").count(), sum(counts)), (1, 2));
}

fn sum(counts: [u32; 3]) -> u32 {
    counts.iter().sum()
}

#[test]
fn texts_cut_empty_or_wrapped() {
    let (text_, counts) = text(Fault::MalformedJson);
    assert!(THREE_ANSWERS.starts_with(&text_));
    assert!(serde_json::from_str::<Value>(&text_).is_err());
    assert_eq!(counts, [1, 0, 0]);

    assert_eq!(text(Fault::EmptyAnswer), (String::new(), [0, 0, 0]));

    let (text_, counts) = text(Fault::Prose);
    let fenced = format!("```json\n{THREE_ANSWERS}\n```");
    assert!(text_.contains(&fenced) && !text_.starts_with('`'), "{text_}");
    assert_eq!(counts, [1, 1, 1]);

    let (outcome, stats) = with(Fault::CutByLength);
    let response = outcome.unwrap();
    assert_eq!(response.finish_reason(), "length");
    assert!(THREE_ANSWERS.starts_with(&response.content()));
    assert_eq!(answered(&stats)[2], 0);
    let usage = &response.json()["usage"];
    let tokens = bpe_openai::o200k_base().count(&*response.content());
    assert_eq!(usage["completion_tokens"], tokens);
}

#[test]
fn refused_and_filtered_answers() {
    let (outcome, stats) = with(Fault::Refusal);
    let message = outcome.unwrap().json()["choices"][0]["message"].clone();
    assert!(message["content"].is_null() && message["refusal"].is_string());
    assert_eq!(answered(&stats), [0, 0, 0]);
    assert!(stats.completion_tokens > 0);

    let (outcome, stats) = with(Fault::ContentFilter);
    let response = outcome.unwrap();
    assert_eq!(response.finish_reason(), "content_filter");
    assert_eq!(response.content(), "");
    assert_eq!(answered(&stats), [0, 0, 0]);
}

#[test]
fn hanging_ends_with_the_client_or_on_release() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    provider.script([Some(Fault::Hang), Some(Fault::Hang)]);
    let mut impatient = Client::connect(&provider);
    impatient.send_chat(&three_rows());
    let stats = wait_for(&provider, |stats| stats.in_flight == 1);
    assert_eq!((stats.admitted, stats.prompt_tokens), (1, 0));
    assert!(stats.charged_tokens > 0);
    drop(impatient);
    let stats = wait_for(&provider, |stats| stats.abandoned == 1);
    assert_eq!(answered(&stats), [0, 0, 0]);

    let mut patient = Client::connect(&provider);
    patient.send_chat(&three_rows());
    wait_for(&provider, |stats| stats.in_flight == 1);
    // Others are served meanwhile.
    assert_eq!(chat(&provider, &three_rows()).status, 200);
    provider.release();
    assert_eq!(patient.receive().unwrap().content(), THREE_ANSWERS);
    assert_eq!(answered(&provider.stats()), [2, 2, 2]);
}

#[test]
fn probabilities_are_kept_and_repeatable() {
    let outcomes = |seed| {
        let provider = FakeProvider::start(Config {
            faults: vec![(Fault::Http500, 0.3), (Fault::EmptyAnswer, 0.2)],
            seed,
            ..Config::default()
        })
        .unwrap();
        let mut client = Client::connect(&provider);
        (0..400).map(|_| client.chat(&three_rows()).status).for_each(drop);
        provider.stats().faults
    };
    let counts = outcomes(5);
    // Means of 120 and 80, standard deviations of 9 and 8.
    assert!((75..165).contains(&counts["Http500"]), "{counts:?}");
    assert!((40..120).contains(&counts["EmptyAnswer"]), "{counts:?}");
    assert_eq!(outcomes(5), counts);
}

#[test]
fn dropping_the_provider_frees_the_port() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let mut client = Client::connect(&provider);
    provider.hold();
    client.send_chat(&three_rows());
    wait_for(&provider, |stats| stats.in_flight == 1);
    let url = provider.base_url();
    let listen = url.trim_start_matches("http://").trim_end_matches("/v1").parse().unwrap();
    drop(provider);
    assert!(client.receive().is_err());
    let config = Config { listen, ..Config::default() };
    let provider = FakeProvider::start(config).unwrap();
    assert_eq!(chat(&provider, &three_rows()).status, 200);
}
