//! Right answers, their usage and their counts.

#![allow(clippy::unwrap_used)]

mod support;

use llm_fake_provider::{Config, FakeProvider, Fault, Row};
use serde_json::{Value, json};
use support::*;

#[test]
fn answers_in_the_shape_asked_for() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let rows = [(7, "#r1:bug#"), (8, "no marker\n9: \"#r5:c#\""), (10, "…#r000123:c#")];
    let mut client = Client::connect(&provider);
    let mut content = |shape| client.chat(&prompt(shape, &rows)).content();
    assert_eq!(content(MAP), r#"{"7":"b","8":"c","10":"c"}"#);
    assert_eq!(content(OBJECTS), r#"{"r":[{"i":7,"c":"b"},{"i":8,"c":"c"},{"i":10,"c":"c"}]}"#);
    assert_eq!(content(STRINGS), r#"{"r":["7b","8c","10c"]}"#);
    let stats = provider.stats();
    let thrice = Row { asked: 3, answered: 3 };
    assert_eq!(stats.rows["1"], thrice);
    assert_eq!(stats.rows["000123"], thrice);
    assert_eq!((stats.requests, stats.probes, stats.in_flight), (3, 0, 0));
    assert_eq!((stats.peak_in_flight, stats.peak_rows_in_flight), (1, 3));
    assert_eq!(provider.bodies().len(), 3);
}

#[test]
fn rows_without_a_marker_get_the_first_label() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let answer = chat(&provider, &prompt(MAP, &[(1, "x"), (2, "#r1:?#")]));
    assert_eq!(answer.content(), r#"{"1":"a","2":"a"}"#);
    assert_eq!(provider.stats().unmarked_rows, 1);
    assert_eq!(provider.stats().rows.len(), 1);
}

#[test]
fn naive_clients_get_the_label_and_probes_get_ok() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let ask = |text: &str| {
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": text }] });
        chat(&provider, &body).content()
    };
    assert_eq!(ask("Which of bug, other is it? Broken! #r4:bug#"), "bug");
    assert_eq!(ask("ping"), "ok");
    let stats = provider.stats();
    assert_eq!(stats.rows["4"], Row { asked: 1, answered: 1 });
    assert_eq!(stats.probes, 1);
}

#[test]
fn usage_is_counted_in_o200k_tokens() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let count = |text: &str| bpe_openai::o200k_base().count(text) as u64;
    let mut body = three_rows();
    let contents = [0, 1].map(|i| count(body["messages"][i]["content"].as_str().unwrap()));
    let prompt_tokens = contents[0] + contents[1] + 3 * 3;
    let completion_tokens = count(THREE_ANSWERS);

    let answer = chat(&provider, &body).json();
    assert_eq!(
        answer["usage"],
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": { "cached_tokens": 0 },
        })
    );
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "m");

    body["response_format"] = schema(&["a", "b", "c"]);
    let with_schema = count(&body["response_format"]["json_schema"].to_string());
    let usage = &chat(&provider, &body).json()["usage"];
    assert_eq!(usage["prompt_tokens"], prompt_tokens + with_schema);
    let stats = provider.stats();
    assert_eq!(stats.prompt_tokens, 2 * prompt_tokens + with_schema);
    assert_eq!(stats.completion_tokens, 2 * completion_tokens);
    assert_eq!(stats.charged_tokens, stats.prompt_tokens + stats.completion_tokens);
}

#[test]
fn the_maximum_asked_for_cuts_the_answer() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    for name in ["max_tokens", "max_completion_tokens"] {
        provider.reset_stats();
        let mut body = three_rows();
        body[name] = 8.into();
        let answer = chat(&provider, &body);
        assert_eq!(answer.finish_reason(), "length");
        assert_eq!(answer.json()["usage"]["completion_tokens"], 8);
        let content = answer.content();
        assert!(THREE_ANSWERS.starts_with(&content) && content.contains("\"7\":\"b\""));
        assert_eq!(answered(&provider.stats())[0], 1);
        assert_eq!(answered(&provider.stats())[2], 0);
    }
}

#[test]
fn a_strict_schema_is_obeyed() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let mut body = three_rows();
    body["response_format"] = schema(&["a", "b"]);
    // Row 3's code, c, is not admitted.
    assert_eq!(chat(&provider, &body).content(), r#"{"7":"b","8":"a","9":"a"}"#);
    assert_eq!(answered(&provider.stats()), [1, 1, 0]);

    body["response_format"] = schema(&["a", "b", "c"]);
    provider.script([Some(Fault::UnknownCode)]);
    let answer: Value = serde_json::from_str(&chat(&provider, &body).content()).unwrap();
    assert_eq!(answer.as_object().unwrap().len(), 2);
    assert_eq!(provider.stats().faults["DropId"], 1);
}

fn schema(codes: &[&str]) -> Value {
    json!({
        "type": "json_schema",
        "json_schema": {
            "name": "labels",
            "strict": true,
            "schema": { "type": "object", "additionalProperties": { "enum": codes } },
        },
    })
}

#[test]
fn requests_a_real_server_refuses() {
    let provider = FakeProvider::start(Config {
        api_key: Some("k".into()),
        models: Some(vec!["m".into(), "n".into()]),
        json_schema: false,
        json_object: false,
        max_tokens_param: false,
        context_tokens: Some(200),
        ..Config::default()
    })
    .unwrap();
    let mut client = Client::connect(&provider);
    let mut refused = |key: &str, change: &dyn Fn(&mut Value)| {
        let mut body = three_rows();
        change(&mut body);
        let headers = format!("Authorization: Bearer {key}\r\n");
        client.send("POST", "/v1/chat/completions", &headers, &body.to_string());
        let response = client.receive().unwrap();
        let error = response.json()["error"].clone();
        (response.status, error["param"].clone(), error["code"].clone())
    };
    let null = Value::Null;
    assert_eq!(refused("k", &|_| {}).0, 200);
    assert_eq!(refused("l", &|_| {}), (401, null.clone(), "invalid_api_key".into()));
    assert_eq!(refused("k", &|b| b["model"] = "o".into()), (404, null.clone(), "model_not_found".into()));
    assert_eq!(
        refused("k", &|b| b["response_format"] = json!({ "type": "json_object" })),
        (400, "response_format".into(), null.clone())
    );
    assert_eq!(refused("k", &|b| b["response_format"] = schema(&["a"])), (400, "response_format".into(), null.clone()));
    assert_eq!(
        refused("k", &|b| b["max_tokens"] = 9.into()),
        (400, "max_tokens".into(), "unsupported_parameter".into())
    );
    assert_eq!(
        refused("k", &|b| b["max_completion_tokens"] = 199.into()),
        (400, "messages".into(), "context_length_exceeded".into())
    );
    assert_eq!(refused("k", &|b| b["messages"] = json!([])).0, 400);
    let stats = provider.stats();
    assert_eq!((stats.requests, stats.admitted), (8, 1));
    assert_eq!((stats.by_status[&200], stats.by_status[&400]), (1, 5));

    client.send("GET", "/v1/models", "Authorization: Bearer k\r\n", "");
    assert_eq!(client.receive().unwrap().json()["data"][1]["id"], "n");
    client.send("GET", "/v1/models", "", "");
    assert_eq!(client.receive().unwrap().status, 401);
}

#[test]
fn other_routes() {
    let provider = FakeProvider::start(Config::default()).unwrap();
    let mut client = Client::connect(&provider);
    let mut call = |method: &str, path: &str, body: &str| {
        client.send(method, path, "", body);
        client.receive().unwrap()
    };
    assert_eq!(call("GET", "/health", "").status, 200);
    assert_eq!(call("GET", "/nowhere", "").status, 404);
    let change = json!({
        "faults": { "Http500": 1.0 },
        "script": [null, "Status:418:tea"],
        "latency": { "base_ms": 1 },
        "tokens_per_window": 1000,
        "window_seconds": 2.5,
    });
    assert_eq!(call("POST", "/control", &change.to_string()).status, 200);
    assert_eq!(call("POST", "/control", r#"{"script":["Nonsense"]}"#).status, 400);
    assert_eq!(call("POST", "/control", r#"{"tokens":5}"#).status, 400);
    let statuses = [0; 3].map(|_| chat(&provider, &three_rows()).status);
    assert_eq!(statuses, [200, 418, 500]);
    let stats = call("GET", "/stats", "").json();
    let totals = call("GET", "/stats/totals", "").json();
    assert_eq!((&totals["requests"], totals["rows"].as_object().unwrap().len()), (&stats["requests"], 0));
    assert_eq!(stats["by_status"]["418"], 1);
    assert_eq!(stats["rows"]["1"]["answered"], 1);
    assert_eq!(call("POST", "/control", r#"{"tokens_per_window":null,"faults":{}}"#).status, 200);
    let answer = chat(&provider, &three_rows());
    assert_eq!((answer.status, answer.header("x-ratelimit-limit-tokens")), (200, None));
}

#[test]
fn a_system_message_that_comes_again_is_cached() {
    let provider = FakeProvider::start(Config { cache_prefix: true, ..Config::default() }).unwrap();
    let mut body = three_rows();
    let system = body["messages"][0]["content"].as_str().unwrap().to_owned() + &"\nMind the gap.".repeat(300);
    let tokens = bpe_openai::o200k_base().count(&system) as u64;
    assert!(tokens > 1_024 && !tokens.is_multiple_of(128));
    body["messages"][0]["content"] = system.into();
    let cached = |body: &Value| chat(&provider, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    // A refusal does not count as having seen it.
    provider.configure(|config| config.requests_per_window = Some(0));
    assert_eq!(chat(&provider, &body).status, 429);
    provider.configure(|config| config.requests_per_window = None);
    assert_eq!(cached(&body), 0);
    body["messages"][1]["content"] = "other rows".into();
    assert_eq!(cached(&body), tokens / 128 * 128);
    assert_eq!((cached(&three_rows()), cached(&three_rows())), (0.into(), 0.into()), "too short");
    assert_eq!(provider.stats().cached_tokens, tokens / 128 * 128);
    provider.configure(|config| config.cache_prefix = false);
    assert_eq!(cached(&body), 0);
}
