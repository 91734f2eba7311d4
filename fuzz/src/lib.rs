//! Properties that hold for any bytes. The fuzzer calls these functions, and so does `cargo test` with the corpora
//! (crates/gateway/tests/corpus.rs).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Debug;

use llm_batch_core::answer::{self, Verdict};
use llm_batch_core::codes::Legend;
use llm_batch_core::dialect::{Api, Reply, Sent, Service};
use llm_batch_core::options::{AskBy, Codes, Options};
use llm_batch_core::task::{Answer, Spec, Type};
use llm_batch_core::trouble::{self, Report, Trouble, one_line};
use llm_batch_core::{headers, task, url};
use llm_batch_gateway::protocol::{FromGateway, Secret, ToGateway, decode, encode};
use serde_json::{Value, json};

/// A function that panics if something does not hold, by the name of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 5] =
    [("answer", answer), ("headers", headers), ("options", options), ("outcome", outcome), ("frames", frames)];

const IDS: [u16; 3] = [417, 902, 118];
const LABELS: [&str; 5] = ["billing", "bug", "3", "true", "ü"];

/// A day in ms: no wait is longer.
const DAY: u64 = 86_400_000;

/// The text of an answer: labels for rows that were asked, each named by the text.
pub fn answer(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let options = |codes| Options { codes, ..Options::default() };
    let all = [Codes::Words, Codes::Letters, Codes::Auto]
        .map(|codes| ("classify", json!({"labels": LABELS}), options(codes)));
    let decisions = Options { ask_by: AskBy::Decisions, ..Options::default() };
    let others = [
        ("generate", json!({"instruction": "x"})),
        ("score", json!({"instruction": "x", "low": 0, "high": 10})),
        ("embed", json!({"dimensions": 2})),
        ("extract", json!({"fields": {"c": {"labels": LABELS}, "n": "numeric", "tags": "text[]"}})),
        ("extract", json!({"fields": {"from": "date", "to": "date", "at": "timestamptz", "j": "jsonb"}})),
    ];
    let others = others.map(|(kind, spec)| (kind, spec, options(Codes::Auto)));
    let decided = ("classify", json!({"labels": LABELS}), decisions);
    for (kind, spec, options) in all.into_iter().chain(others).chain([decided]) {
        let spec = Spec::from_json(kind, &spec).unwrap();
        let kind = spec.prepare(&options, &|s| s.len());
        let of = |ids: &[u16]| answer::read(&text, ids, &*kind).unwrap_or_else(|| vec![Verdict::Missing; ids.len()]);
        let all = of(&IDS);
        assert_eq!(all.len(), IDS.len());
        for (id, verdict) in IDS.iter().zip(&all) {
            if let Verdict::Answer(answer) = verdict {
                check(&spec, answer);
            }
            // An id may be written with escapes, or as 4.17e2.
            let mut numbers = text.split(|c: char| !"+-.eE0123456789".contains(c));
            let is_named = text.contains(&id.to_string())
                || text.contains('\\')
                || numbers.any(|n| n.parse() == Ok(f64::from(*id)));
            assert!(is_named || *verdict == Verdict::Missing, "{id} is not in {text:?}");
        }
        // The order in which they are asked makes no difference.
        let reversed: Vec<u16> = IDS.iter().rev().copied().collect();
        assert!(of(&reversed).iter().rev().eq(&all));
    }
}

/// Each value is of its column's type, and no text has what Postgres takes for no text.
fn check(spec: &Spec, answer: &Answer) {
    let columns = spec.columns();
    assert_eq!(columns.len(), answer.0.len());
    for (column, value) in columns.iter().zip(&answer.0) {
        let Some(value) = value else { continue };
        assert!(!value.contains('\0'));
        if let Some(values) = column.values.as_ref().filter(|_| !column.is_array) {
            assert!(values.contains(value), "{value:?}");
        }
        if column.is_array {
            assert!(task::array_literal(value).is_some(), "{value:?}");
        }
        if matches!(column.of, Type::Numeric | Type::Real | Type::Integer | Type::Bigint) && !column.is_array {
            assert!(value.parse::<f64>().is_ok(), "{value:?}");
        }
    }
    assert!(serde_json::from_str::<Value>(&spec.to_json(answer)).is_ok());
}

/// A status (two bytes, big endian) and a body.
pub fn outcome(data: &[u8]) {
    let Some((status, body)) = data.split_first_chunk::<2>() else { return };
    Api::ALL.iter().for_each(|api| outcome_in(*api, u16::from_be_bytes(*status) % 600, body));
}

fn outcome_in(api: Api, status: u16, body: &[u8]) {
    for service in [Service::Chat, Service::Embeddings, Service::Decisions] {
        outcome_by(trouble::outcome(api, Sent { service, ids: &IDS, texts: &[], is_flex: true }, status, body, None));
    }
}

fn outcome_by(result: Result<Reply, Report>) {
    match result {
        Ok(reply) => {
            let usage = reply.usage.or(Default::default());
            assert!(usage.input < 1 << 32 && usage.output < 1 << 32 && reply.cached_input <= usage.input);
            assert!(reply.refused.iter().all(|id| IDS.contains(id)), "{:?}", reply.refused);
            answer(reply.text.as_bytes());
        }
        Err(report) => {
            if let Trouble::Rate(wait) | Trouble::Quota(wait) | Trouble::Overload(wait) = report.trouble {
                assert!(wait.is_none_or(|ms| ms <= DAY));
            }
            let line = one_line(&report.message);
            assert!(!line.is_empty() && line.chars().count() <= 301 && !line.contains(char::is_control), "{line:?}");
            headers::limit_in(&report.message);
        }
    }
}

/// Header lines, and the same bytes as a message that may name a limit.
pub fn headers(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let lines: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(": ")).collect();
    let said = headers::read(|name| lines.iter().find(|(n, _)| *n == name).map(|(_, value)| *value));
    assert!(said.wait.is_none_or(|ms| ms <= DAY));
    for side in [said.requests, said.tokens, said.input_tokens, said.output_tokens] {
        assert!(side.reset.is_none_or(|ms| ms <= DAY));
        assert!(side.limit.into_iter().chain(side.remaining).all(|n| n <= 1_000_000_000_000));
    }
    if let Some((limit, requested)) = headers::limit_in(&text) {
        assert!(text.contains("Limit") && limit.max(requested) <= 1_000_000_000_000);
    }
}

/// Frames as a client or the gateway may get them, whole or in pieces.
pub fn frames(data: &[u8]) {
    both_ways::<ToGateway>(data);
    both_ways::<FromGateway>(data);
    // A stream prints the same whatever its key.
    let mut buffer = data.to_vec();
    while let Ok(Some(message)) = decode::<ToGateway>(&mut buffer) {
        let ToGateway::Open(mut stream) = message else { continue };
        let [a, b] = ["a", "b"].map(|key| {
            stream.endpoint.api_key = Some(Secret(key.to_owned()));
            format!("{stream:?}")
        });
        assert_eq!(a, b);
    }
}

fn both_ways<T: serde::Serialize + for<'de> serde::Deserialize<'de> + PartialEq + Debug>(data: &[u8]) {
    let mut buffer = data.to_vec();
    let mut messages = Vec::new();
    while let Ok(Some(message)) = decode::<T>(&mut buffer) {
        messages.push(message);
        assert!(data.ends_with(&buffer));
    }
    for message in &messages {
        let mut frame = encode(message).unwrap();
        assert_eq!(decode::<T>(&mut frame).unwrap().as_ref(), Some(message));
        assert!(frame.is_empty());
    }
    // The same messages come out of the bytes one by one.
    let mut buffer = Vec::new();
    let mut again = Vec::new();
    'bytes: for byte in data {
        buffer.push(*byte);
        loop {
            match decode::<T>(&mut buffer) {
                Ok(Some(message)) => again.push(message),
                Ok(None) => break,
                Err(_) => break 'bytes,
            }
        }
    }
    assert_eq!(again, messages);
}

/// Texts that a user may write: options and labels as JSON, a base_url.
pub fn options(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(target) = url::parse(&text, true) {
        // Whom the HTTP client would talk to is who was checked. It alone knows which international names are none.
        let read = match ::url::Url::parse(&text) {
            Ok(read) => read,
            Err(_) if target.host.split('.').any(|part| part.starts_with("xn--")) => return,
            Err(e) => panic!("{text:?} is read by one and not the other: {e}"),
        };
        let host = read.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let same = |a: &str, b: &str| match (a.parse::<std::net::IpAddr>(), b.parse::<std::net::IpAddr>()) {
            (Ok(a), Ok(b)) => a == b,
            _ => a == b,
        };
        assert!(same(&target.host, host), "{text:?}: {} is not {host}", target.host);
        assert_eq!((read.scheme() == "https", read.username(), read.password()), (target.https, "", None));
        assert!((read.query(), read.fragment()) == (None, None));
    }
    let Ok(value) = serde_json::from_str::<Value>(&text) else { return };
    if let Ok(options) = Options::from_json([&value]) {
        assert!((1..=500).contains(&options.max_rows_per_request) && (1..=10).contains(&options.max_attempts));
        assert_eq!(Options::from_json([&serde_json::to_value(&options).unwrap()]).unwrap(), options);
    }
    if let Ok(labels) = task::labels_from_json(&value) {
        assert!(!labels.is_empty());
        for codes in [Codes::Words, Codes::Letters, Codes::Auto] {
            let legend = Legend::new(&labels, codes, &|s| s.len());
            // Each label has a code that means it and no other.
            assert_eq!(legend.codes().len(), labels.len());
            for (i, code) in legend.codes().iter().enumerate() {
                assert_eq!(legend.resolve(code), Some(i), "{code:?} of {labels:?}");
            }
        }
    }
}
