//! A provider that harms whom it can: its own rows at the most, never anybody else's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault};
use support::*;

/// A message of HTTP with a body of known length: its first line, the rest of its head, its body. `None` at the end.
fn message(from: &mut impl BufRead) -> Option<(String, String, Vec<u8>)> {
    let (mut first, mut head, mut length) = (String::new(), String::new(), 0);
    from.read_line(&mut first).ok().filter(|n| *n > 0)?;
    loop {
        let mut line = String::new();
        from.read_line(&mut line).ok().filter(|n| *n > 0)?;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        head.push_str(&line);
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).ok()?;
    Some((first, head, body))
}

/// Stands before a provider. Under `/twice` each answer comes twice on its connection: the second at once, or when the
/// next request has come, before its own. Under `/mute` answers do not say what they took, under `/input` and `/output`
/// a half of it.
fn twice(provider: &FakeProvider) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let to = provider.base_url().trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    std::thread::spawn(move || {
        for (n, client) in listener.incoming().enumerate() {
            let (client, server) = (client.unwrap(), TcpStream::connect(&to).unwrap());
            std::thread::spawn(move || relay(client, server, n % 2 == 0));
        }
    });
    url
}

fn relay(mut client: TcpStream, mut server: TcpStream, at_once: bool) {
    let (mut requests, mut answers) = (BufReader::new(client.try_clone().unwrap()), server.try_clone().unwrap());
    let mut answers = BufReader::new(&mut answers);
    let mut kept: Vec<u8> = Vec::new();
    while let Some((first, head, body)) = message(&mut requests) {
        let way = ["/twice", "/honest", "/mute", "/input", "/output"].into_iter().find(|way| first.contains(way)).unwrap();
        let is_twice = way == "/twice";
        let asked = [first.replace(way, "").as_bytes(), head.as_bytes(), &body].concat();
        if server.write_all(&asked).is_err() {
            return;
        }
        let Some((first, head, mut body)) = message(&mut answers) else { return };
        let hidden: &[&str] = match way {
            "/mute" => &["\"usage\""],
            "/input" => &["\"completion_tokens\"", "\"total_tokens\""],
            "/output" => &["\"prompt_tokens\"", "\"total_tokens\""],
            _ => &[],
        };
        let mut text = String::from_utf8(body).unwrap();
        for name in hidden {
            text = text.replace(name, &name.to_uppercase());
        }
        body = text.into_bytes();
        let answer = [first.as_bytes(), head.as_bytes(), &body].concat();
        let mut all = std::mem::take(&mut kept);
        all.extend_from_slice(&answer);
        if is_twice && at_once {
            all.extend_from_slice(&answer);
        } else if is_twice {
            kept = answer;
        }
        if client.write_all(&all).is_err() {
            return;
        }
    }
}

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
            let labels = outcomes.values().filter(|o| matches!(o.verdict, Verdict::Label(_))).count();
            for (n, o) in &outcomes {
                assert!(!matches!(o.verdict, Verdict::Label(_)) || is_right(*n, &o.verdict), "{c}: {n} {o:?}");
                // What answers another request is held against no row.
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
