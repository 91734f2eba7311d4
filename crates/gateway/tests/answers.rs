//! Forms of answers that models and servers give, from a server that answers as it is told: the labels read, and the
//! requests made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use llm_batch_gateway::protocol::*;
use llm_fake_provider::Config;
use serde_json::{Value, json};
use support::*;

/// Rows of a request: number and label.
type Rows = Vec<(String, String)>;
/// The status, and the body.
type Said = (u16, String);

/// A server that answers what `say` makes of a request and its rows. Its URL, and the requests that came.
fn server(say: impl Fn(&Value, &Rows) -> Said + Send + 'static) -> (String, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let bodies: Arc<Mutex<Vec<Value>>> = Arc::default();
    let seen = Arc::clone(&bodies);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut bytes = Vec::new();
            let body = loop {
                let mut chunk = [0; 65536];
                let n = stream.read(&mut chunk).unwrap_or(0);
                bytes.extend_from_slice(&chunk[..n]);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if let Some((_, body)) = text.split_once("\r\n\r\n")
                    && let Ok(body) = serde_json::from_str::<Value>(body)
                {
                    break body;
                }
                assert!(n > 0, "{text}");
            };
            let user = body["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap().to_owned();
            let row = |line: &str| {
                let (id, text) = line.split_once(": ")?;
                let label = text.split_once("#r")?.1.split_once(':')?.1.split_once('#')?.0;
                Some((id.to_owned(), label.to_owned()))
            };
            let rows: Rows = user.lines().filter_map(row).collect();
            let (status, said) = say(&body, &rows);
            seen.lock().unwrap().push(body);
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", said.len());
            let _ = stream.write_all(format!("{head}{said}").as_bytes());
        }
    });
    (url, bodies)
}

fn completion(content: &str) -> Said {
    let choice = json!({"message": {"content": content}, "finish_reason": "stop"});
    (200, json!({"choices": [choice], "usage": {"prompt_tokens": 900, "completion_tokens": 200}}).to_string())
}

fn map(rows: &Rows) -> String {
    Value::Object(rows.iter().map(|(id, label)| (id.clone(), json!(label))).collect()).to_string()
}

/// Forty rows of such a server: their outcomes, and the requests that came.
fn forty(setup: &Setup, say: impl Fn(&Value, &Rows) -> Said + Send + 'static) -> (Vec<(u64, Outcome)>, Vec<Value>) {
    let (url, bodies) = server(say);
    let nobody = provider(Config::default());
    let mut client = setup.client(&nobody, |s| {
        s.endpoint.base_url = url;
        s.model.max_concurrent_requests = Some(1);
    });
    client.rows(0..40);
    let got = client.answers(40).0.into_iter().collect();
    let bodies = bodies.lock().unwrap().clone();
    (got, bodies)
}

/// The same of a server that never gives a valid answer: why it is stopped. No row is charged anything.
fn given_up(setup: &Setup, say: impl Fn(&Value, &Rows) -> Said + Send + 'static) -> (Stop, Vec<Value>) {
    let (url, bodies) = server(say);
    let nobody = provider(Config::default());
    let mut client = setup.client(&nobody, |s| {
        s.endpoint.base_url = url;
        s.model.max_concurrent_requests = Some(1);
    });
    client.rows(0..40);
    let (mut stop, mut back) = (None, 0);
    while back < 40 {
        match client.hear("the rows back") {
            Some(FromGateway::Stopped(why)) => stop = Some(why),
            Some(FromGateway::Outcomes { outcomes, .. }) => {
                assert!(outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0), "{outcomes:?}");
                back += outcomes.len();
            }
            other => panic!("{other:?}"),
        }
    }
    let stop = stop.unwrap();
    assert_eq!(stop.reason, StopReason::NoAnswers);
    let bodies = bodies.lock().unwrap().clone();
    (stop, bodies)
}

#[test]
fn answers_of_all_shapes_are_read_from_one_request() {
    type Shape = (&'static str, &'static str, fn(&str, &str) -> String, &'static str);
    let shapes: [Shape; 13] = [
        (
            "wrapped objects",
            "{\"answers\":{",
            |i, l| format!("\"{i}\":{{\"label\":\"{l}\",\"confidence\":0.9}},"),
            "\"x\":1}}",
        ),
        ("objects, numbers", "[", |i, l| format!("{{\"id\":{i},\"label\":\"{l}\"}},"), "{}]"),
        ("objects, strings", "[", |i, l| format!("{{\"ticket\":\"{i}\",\"topic\":\"{l}\"}},"), "{}]"),
        ("JSON lines", "", |i, l| format!("{{\"id\":{i},\"label\":\"{l}\"}}\n"), ""),
        ("Python's quotes", "{", |i, l| format!("'{i}': '{l}', "), "'done': True, 'note': None}"),
        ("bold lines", "Here they are:\n\n", |i, l| format!("- {i}: **{l}**\n"), "\nTell me if 417 is wrong."),
        (
            "a thought",
            "<think>{\"417\":\"bug\"} or</think>{",
            |i, l| format!("\"{i}\":\"{l}\","),
            "\"x\":\"</think>\"}",
        ),
        ("a thinking", "<thinking>hm</thinking>{", |i, l| format!("\"{i}\":\"{l}\","), "\"x\":\"<think>\"}"),
        ("a reasoning", "<reasoning>hm</reasoning>{", |i, l| format!("\"{i}\":\"{l}\","), "\"x\":1}"),
        ("THINK", "[THINK]hm[/THINK]{", |i, l| format!("\"{i}\":\"{l}\","), "\"x\":1}"),
        ("a lone end", "so 417 is a bug.\n</think>\n\n{", |i, l| format!("\"{i}\":\"{l}\","), "\"x\":1}"),
        (
            "channels",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{",
            |i, l| format!("\"{i}\":\"{l}\","),
            "\"x\":1}",
        ),
        ("a table", "| id | label |\n|---|---|\n", |i, l| format!("| {i} | {l} |\n"), ""),
    ];
    let setup = Setup::new(64 << 20);
    for (name, open, row, close) in shapes {
        let answer = move |rows: &Rows| {
            let rows: String = rows.iter().map(|(id, label)| row(id, label)).collect();
            format!("{open}{rows}{close}")
        };
        let (got, bodies) = forty(&setup, move |_, rows| completion(&answer(rows)));
        let right = got.iter().filter(|(n, o)| is_right(*n, &o.verdict)).count();
        println!("{name:20} {right} of 40 rows from {} request(s)", bodies.len());
        assert_eq!((right, bodies.len()), (40, 1), "{name}");
    }
}

#[test]
fn a_stream_that_nobody_asked_for_is_read_as_one_answer() {
    let setup = Setup::new(64 << 20);
    let (got, bodies) = forty(&setup, |_, rows| {
        let answer = map(rows);
        let mut said = String::from(": ping\r\n\r\n");
        for part in answer.as_bytes().chunks(7) {
            let delta =
                json!({"choices": [{"delta": {"content": String::from_utf8_lossy(part)}, "finish_reason": null}]});
            said.push_str(&format!("data: {delta}\r\n\r\n"));
        }
        said.push_str("data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\r\n\r\n");
        said.push_str(
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":77,\"completion_tokens\":7}}\r\n\r\ndata: [DONE]",
        );
        (200, said)
    });
    assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict)));
    assert_eq!(bodies.len(), 1);
}

#[test]
fn an_answer_that_is_all_reasoning_is_none_and_says_how_to_turn_it_off() {
    let setup = Setup::new(64 << 20);
    for field in ["reasoning_content", "reasoning", "thinking"] {
        let (stop, bodies) = given_up(&setup, move |_, rows| {
            let message = json!({"content": "", field: map(rows)});
            (200, json!({"choices": [{"message": message, "finish_reason": "stop"}]}).to_string())
        });
        assert!(stop.message.contains("enable_thinking") && stop.message.contains("alter_model"), "{stop:?}");
        assert!(bodies.len() <= 20, "{}", bodies.len());
        // If others are answered, the row's detail says it.
        let (got, _) = forty(&setup, move |_, rows| {
            if rows.len() > 1 {
                let most = rows.iter().skip(1).cloned().collect();
                return completion(&map(&most));
            }
            let message = json!({"content": "", field: map(rows)});
            (200, json!({"choices": [{"message": message, "finish_reason": "stop"}]}).to_string())
        });
        let skipped: Vec<_> = got.iter().filter(|(n, o)| !is_right(*n, &o.verdict)).collect();
        assert!(!skipped.is_empty());
        for (_, outcome) in skipped {
            let Verdict::Skip { class, detail } = &outcome.verdict else { panic!("{outcome:?}") };
            assert_eq!(class, "no_answer");
            assert!(detail.contains("enable_thinking") && detail.contains("alter_model"), "{detail}");
        }
    }
}

/// The types of `response_format` in these requests, `-` for none.
fn forms(bodies: &[Value]) -> String {
    let of = |body: &Value| body["response_format"]["type"].as_str().unwrap_or("-").to_owned();
    bodies.iter().map(of).collect::<Vec<_>>().join(" ")
}

#[test]
fn forms_that_are_refused_or_answered_in_prose_are_learnt_and_charge_no_row() {
    let setup = Setup::new(64 << 20);
    let refused = || (400, json!({"error": "'response_format.type' must be 'json_schema' or 'text'"}).to_string());
    let is = |body: &Value, form: &str| body["response_format"]["type"] == form;
    let prose = || completion("I would say that most of them are about billing.");
    type Say = Box<dyn Fn(&Value, &Rows) -> Said + Send>;
    let cases: [(&str, Say, &str); 5] = [
        (
            "json_object is refused",
            Box::new(move |b, rows| if is(b, "json_object") { refused() } else { completion(&map(rows)) }),
            "json_object json_schema",
        ),
        (
            "both are refused",
            Box::new(move |b, rows| if b["response_format"].is_object() { refused() } else { completion(&map(rows)) }),
            "json_object json_schema -",
        ),
        (
            "json_object is answered in prose",
            Box::new(move |b, rows| if is(b, "json_object") { prose() } else { completion(&map(rows)) }),
            "json_object json_object json_schema",
        ),
        (
            "both are answered in prose",
            Box::new(move |b, rows| if b["response_format"].is_object() { prose() } else { completion(&map(rows)) }),
            "json_object json_object json_schema json_schema -",
        ),
        (
            "the role of the system is refused",
            Box::new(move |b, rows| {
                let messages = b["messages"].as_array().unwrap();
                match messages[0]["role"].as_str() {
                    Some("system") => (400, json!({"message": "System role not supported"}).to_string()),
                    _ => completion(&map(rows)),
                }
            }),
            "json_object json_object",
        ),
    ];
    for (what, say, want) in cases {
        let (got, bodies) = forty(&setup, say);
        assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{what}: {got:?}");
        assert_eq!(forms(&bodies), want, "{what}");
    }
}

#[test]
fn prose_of_one_task_takes_no_form_from_another() {
    let setup = Setup::new(64 << 20);
    let (url, bodies) = server(|body, rows| {
        let is_essay = body["messages"][0]["content"].as_str().unwrap().contains("essay");
        match body["response_format"].is_object() && is_essay {
            true => completion("Most of these tickets are, as it seems to me, about billing."),
            false => completion(&map(rows)),
        }
    });
    let nobody = provider(Config::default());
    for instruction in ["Write an essay on each.", "Tickets.", "Write an essay on each."] {
        let mut client = setup.client(&nobody, |s| {
            s.endpoint.base_url.clone_from(&url);
            s.model.max_concurrent_requests = Some(1);
            s.task.spec = tickets(instruction);
        });
        client.rows(0..40);
        let got = client.answers(40).0;
        assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict) && o.attempts == 1), "{instruction}: {got:?}");
    }
    let bodies = bodies.lock().unwrap().clone();
    // Five for the first, in which it finds its form; then one each.
    assert_eq!(forms(&bodies), "json_object json_object json_schema json_schema - json_object -");
}

#[test]
fn prose_in_every_form_ends() {
    let setup = Setup::new(64 << 20);
    let (stop, bodies) = given_up(&setup, |_, _| completion("I can't tell."));
    assert!(stop.message.contains("\"I can't tell.\""), "{stop:?}");
    assert!(bodies.len() <= 20, "{}", bodies.len());
    assert!(forms(&bodies).starts_with("json_object json_object json_schema json_schema - "), "{}", forms(&bodies));
}
