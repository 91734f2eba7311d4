//! A provider that answers as no provider should: each answer is of its class, no row is lost, wrong or charged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use llm_batch_core::dialect::Api;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, Fault};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use support::*;

/// The end of fifty rows.
#[derive(Debug)]
struct End {
    outcomes: Vec<Outcome>,
    stop: Option<Stop>,
    spent: Spent,
}

#[track_caller]
fn fifty(client: &mut Client, what: &str) -> End {
    client.rows(0..50);
    let mut end = End { outcomes: Vec::new(), stop: None, spent: Spent::default() };
    while end.outcomes.len() < 50 {
        match client.hear(&format!("50 outcomes of {what}")) {
            Some(FromGateway::Outcomes { outcomes, spent, .. }) => {
                end.outcomes.extend(outcomes);
                add(&mut end.spent, &spent);
            }
            Some(FromGateway::Stopped(stop)) => end.stop = Some(stop),
            other => panic!("{what}: {other:?}"),
        }
    }
    end
}

#[track_caller]
fn all_right(end: &End, what: &str) {
    assert!(end.stop.is_none(), "{what}: {:?}", end.stop);
    for o in &end.outcomes {
        assert!(is_right(o.n, &o.verdict) && o.attempts == 1, "{what}: {o:?}");
    }
}

#[track_caller]
fn all_came_back(end: &End, reason: StopReason, what: &str) {
    assert_eq!(end.stop.as_ref().map(|s| s.reason), Some(reason), "{what}: {:?}", end.stop);
    assert!(end.outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0), "{what}");
    assert_eq!(end.spent.requests, 0, "{what}");
}

/// Whole answers as they are in core's fixtures: the class, and the bytes on the wire.
fn fixtures() -> Vec<(String, String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/fixtures");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let end = bytes.windows(2).position(|w| w == b"\n\n").unwrap();
        let (class, head) = std::str::from_utf8(&bytes[..end]).unwrap().split_once('\n').unwrap();
        let mut wire = format!("{}\r\nconnection: close\r\n\r\n", head.replace('\n', "\r\n")).into_bytes();
        wire.extend_from_slice(&bytes[end + 2..]);
        (path.file_stem().unwrap().to_string_lossy().into_owned(), class.to_owned(), wire)
    };
    std::fs::read_dir(folder).unwrap().map(read).collect()
}

#[test]
fn every_answer_of_the_fixtures_does_what_its_class_says() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let (mut seen, mut doubted) = (0, 0);
    for (name, class, wire) in fixtures() {
        let wait = class.strip_prefix("Rate(Some(").and_then(|rest| rest.strip_suffix("))")?.parse().ok());
        // No answers here, and no waits that only take time.
        if ["Complete", "Length", "Refused"].contains(&class.as_str())
            || wait.is_some_and(|ms: u64| (1_000..120_000).contains(&ms))
        {
            continue;
        }
        seen += 1;
        provider.reset_stats();
        provider.script([Some(Fault::Raw(wire))]);
        // A lane of its own each time.
        let named = |api: &&Api| name.split('-').next() == Some(api.name());
        let api = Api::ALL.iter().find(named).copied().unwrap_or_default();
        let mut client = setup.client(&provider, |s| {
            s.model.model = name.clone();
            s.endpoint.api = api;
            s.endpoint.base_url = provider.base_of(api.name());
        });
        let end = fifty(&mut client, &name);
        let requests = provider.stats().requests;
        let reason = match class.split('(').next().unwrap() {
            "Auth" => StopReason::Auth,
            "Spend" => StopReason::Spend,
            "Quota" => StopReason::Quota,
            "NotFound" => StopReason::NotFound,
            "Misplaced" => StopReason::Rejected,
            // More than two minutes are not sat out.
            "Rate" if class == "Rate(Some(86400000))" => StopReason::Quota,
            "Rate" | "Overload" | "Unsupported" => {
                all_right(&end, &name);
                assert_eq!((requests, end.spent.requests), (2, 1), "{name}");
                continue;
            }
            "TooLarge" | "OverLimit" | "Filtered" | "Rejected" => {
                all_right(&end, &name);
                assert!((3..=4).contains(&requests) && end.spent.requests == requests - 1, "{name}: {requests}");
                continue;
            }
            other => panic!("{name} is of class {other}"),
        };
        // A request without rows checks a class that rests on words alone. This provider answers it.
        if end.stop.is_none() && matches!(reason, StopReason::Spend | StopReason::NotFound) {
            all_right(&end, &name);
            assert!((3..=5).contains(&requests), "{name}: {requests}");
            doubted += 1;
            continue;
        }
        all_came_back(&end, reason, &name);
        assert_eq!(requests, 1, "{name}");
        assert!(end.stop.is_some_and(|s| s.message.contains("HTTP status") || s.message.contains("error: ")), "{name}");
    }
    assert!(seen > 55 && (1..=5).contains(&doubted), "{seen}, {doubted}");
}

#[test]
fn bytes_that_are_no_answer_are_survived_and_named() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let ok = "HTTP/1.1 200 OK\r\n";
    let many_headers: String = (0..500).map(|n| format!("x-{n}: {n}\r\n")).collect();
    let raw = |text: String| Fault::Raw(text.into_bytes());
    let deep = format!(r#"{{"choices":{}"#, "[".repeat(100_000));
    let bomb =
        [b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n\x1f\x8b\x08\0\0\0\0\0".as_slice(), &[0; 50_000]].concat();
    let cases = [
        (Fault::Raw(Vec::new()), "the connection failed"),
        (Fault::ResetBefore, "the connection failed"),
        (raw("SSH-2.0-OpenSSH_9.2\r\n".into()), "HTTP"),
        (Fault::Raw((0..=255).collect()), "HTTP"),
        (raw("HTTP/9.9 777 ?\r\n\r\n".into()), "HTTP"),
        (raw(format!("{ok}content-length: 5000\r\n\r\n{{")), "the connection failed"),
        (raw(format!("{ok}content-length: -1\r\n\r\n{{}}")), "content-length"),
        (raw(format!("{ok}content-length: 1\r\ncontent-length: 2\r\n\r\n{{}}")), "content-length"),
        (raw(format!("{ok}content-length: 99999999999999999999\r\n\r\n{{}}")), "content-length"),
        (raw(format!("{ok}transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{{}}")), "the connection failed"),
        (raw(format!("{ok}transfer-encoding: chunked\r\n\r\nzz\r\n{{}}")), "the connection failed"),
        (raw(format!("{ok}x: {}\r\n\r\n{{}}", "a".repeat(1 << 20))), "the connection failed"),
        (raw(format!("{ok}{many_headers}\r\n{{}}")), "the connection failed"),
        (raw(format!("{ok}\r\n{deep}")), "not JSON"),
        (raw(format!("HTTP/1.1 500 X\r\n\r\n{deep}")), "HTTP status 500: {\"choices\":[[["),
        (raw(format!("{ok}content-length: 3\r\n\r\n{{}}extra")), "not JSON"),
        (raw("HTTP/1.1 204 No Content\r\n\r\n".into()), "not JSON"),
        (Fault::Raw(bomb), "not requested: \"gzip\""),
        (raw("HTTP/1.1 503 X\r\ncontent-encoding: br\r\n\r\n\u{1b}[2J".into()), "HTTP status 503"),
        (raw("HTTP/1.1 500 X\r\n\r\n{\"error\":{\"message\":\"a\\u0000\\u001b[2J\\nb\"}}".into()), "500: a [2J b"),
        (raw("HTTP/1.1 100 Continue\r\n\r\n".repeat(100_000)), "too many interim responses"),
        (raw(format!("{}{ok}content-length: 2\r\n\r\n{{}}", "HTTP/1.1 102 Processing\r\n\r\n".repeat(40))), "interim"),
        (Fault::Endless, "larger than "),
        (Fault::Drip, "timed out"),
        (Fault::Hang, "timed out"),
    ];
    for (i, (fault, says)) in cases.into_iter().enumerate() {
        let what = format!("{i} ({says})");
        provider.script([Some(fault)]);
        let mut client = setup.client(&provider, |s| {
            s.model.model = format!("m{i}");
            s.model.request_timeout_ms = 3_000;
        });
        let end = fifty(&mut client, &what);
        all_right(&end, &what);
        let seen = client.activity().into_iter().find(|a| a.model == format!("m{i}")).unwrap();
        let said = seen.last_error.unwrap().message;
        assert!(said.contains(says) && !said.contains(char::is_control), "{what}: {said}");
        assert_eq!((seen.errors, seen.throttled), (1, 0), "{what}");
    }
}

#[test]
fn headers_of_nonsense_neither_stop_nor_hurry_anybody() {
    let setup = Setup::new(64 << 20);
    for (i, head) in [
        "retry-after: 99999\r\nretry-after-ms: NaN\r\n",
        "x-ratelimit-limit-tokens: 1\r\nx-ratelimit-limit-requests: -7\r\n",
        "anthropic-ratelimit-output-tokens-limit: 1\r\nanthropic-ratelimit-input-tokens-limit: 2\r\n",
        "x-ratelimit-limit-tokens: 99999999999999999999\r\nx-ratelimit-remaining-tokens: 18446744073709551615\r\n",
        "x-ratelimit-remaining-tokens: -1\r\nx-ratelimit-remaining-requests: -9223372036854775808\r\n",
        "x-ratelimit-remaining-tokens: inf\r\nx-ratelimit-reset-tokens: \u{221e}\r\n",
        "x-ratelimit-remaining-tokens: 5\r\nx-ratelimit-remaining-tokens: five\r\ndate: never\r\ndate: now\r\n",
        "x-ratelimit-reset-requests: 99999999999h\r\nx-ratelimit-remaining-requests-day: 0\r\n",
        "content-type: text/\u{ff}\r\ncontent-type: image/png\r\nset-cookie: a=b\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        let provider = provider(Config { extra_head: head.as_bytes().to_vec(), ..Config::default() });
        let mut client = setup.client(&provider, |s| {
            s.model.model = format!("m{i}");
            s.task.options.max_rows_per_request = 10;
        });
        for _ in 0..4 {
            all_right(&fifty(&mut client, head), head);
        }
        assert!(provider.stats().rows.values().all(|row| (row.asked, row.answered) == (4, 4)), "{head}");
    }
}

#[test]
fn names_that_do_not_resolve_and_certificates_that_nobody_knows() {
    let setup = Setup::new(64 << 20);
    let plain = provider(Config::default());
    // A server whose certificate is its own.
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from(include_bytes!("tls/certificate.der").as_slice())],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(include_bytes!("tls/key.der").as_slice())),
        )
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = Arc::new(config);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut tls = rustls::StreamOwned::new(connection, stream);
            let mut byte = [0];
            // A client that trusts the certificate speaks: that must not happen.
            if std::io::Read::read(&mut tls, &mut byte).is_ok_and(|n| n > 0) {
                let _ = tls.write_all(b"HTTP/1.1 401 TRUSTED\r\ncontent-length: 0\r\n\r\n");
            }
        }
    });
    for (url, says) in [
        (plain.base_url().replace("http://", "https://"), "could not connect"),
        (format!("https://localhost:{port}/v1"), "certificate"),
        (format!("https://127.0.0.1:{port}/v1"), "certificate"),
        ("https://nowhere.invalid/v1".to_owned(), "could not connect"),
        ("http://127.0.0.1:1/v1".to_owned(), "refused"),
    ] {
        let mut client = setup.client(&plain, |s| s.endpoint.base_url = url.clone());
        let end = fifty(&mut client, &url);
        all_came_back(&end, StopReason::ProviderDown, &url);
        // It never came to a request, so nothing may have been charged.
        assert_eq!(end.spent, Spent::default(), "{url}");
        let said = end.stop.unwrap().message;
        assert!(said.contains(says), "{url}: {said}");
    }
    assert_eq!(plain.stats().requests, 0);
}

#[test]
fn a_key_that_is_echoed_in_any_way_is_redacted() {
    const KEY: &str = "secret-key-0123456789";
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let bodies = [
        (500, format!("<html>{KEY}</html>")),
        (429, format!(r#"{{"error":{{"message":"{KEY}"}}}}"#)),
        (200, format!(r#"{{"error":"{KEY}"}}"#)),
        (200, r#"{"error":{"message":"bad \u0073ecret-key-0123456789","code":403}}"#.to_owned()),
        (200, format!(r#"{{"choices":[{{"error":{{"message":"Bearer {KEY}"}}}}]}}"#)),
        (400, format!(r#"{{"error":{{"message":"{}{KEY}"}}}}"#, "x".repeat(290))),
    ];
    for (i, (status, body)) in bodies.into_iter().enumerate() {
        provider.script([Some(Fault::Status(status, body))]);
        let mut client = setup.client(&provider, |s| {
            s.endpoint.api_key = Some(Secret(KEY.into()));
            s.model.model = format!("m{i}");
        });
        let end = fifty(&mut client, "an echo");
        let seen = format!("{:?} {:?}", end.stop, client.activity());
        assert!(!seen.contains("secret"), "{seen}");
    }
    let lines: Vec<String> = setup.log.try_iter().collect();
    assert!(lines.len() >= 5 && lines.iter().all(|line| !line.contains("secret")), "{lines:#?}");
}
