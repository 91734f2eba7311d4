//! OpenAI's chat completions, as many others speak them too.
//!
//! Source: OpenAI's published API description (`/chat/completions`); what other servers leave out or add is tolerated.

mod decisions;
pub(super) mod embeddings;
mod logprobs;
mod stream;

use serde_json::{Value, json};

use super::decisions::Decisions;
use super::embeddings::Embeddings;
use super::{Ask, Dialect, Finish, Format, Reply, Unread, Usage, without_mark};

pub(super) struct Openai;

/// Parameters that the gateway sets.
pub(super) const RESERVED: [&str; 7] =
    ["model", "messages", "response_format", "max_tokens", "max_completion_tokens", "stream", "n"];

const TIER: &str = "service_tier";

impl Dialect for Openai {
    fn base_url(&self) -> Option<&'static str> {
        Some("https://api.openai.com/v1")
    }

    fn reserved(&self) -> &'static [&'static str] {
        &RESERVED
    }

    fn tier_parameter(&self) -> Option<&'static str> {
        Some(TIER)
    }

    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{base}/chat/completions")
    }

    fn body(&self, ask: &Ask) -> Value {
        let cap = if ask.max_completion_tokens { "max_completion_tokens" } else { "max_tokens" };
        let mut messages = vec![json!({"role": "user", "content": ask.user()})];
        if !ask.no_system_role {
            messages.insert(0, json!({"role": "system", "content": ask.system}));
        }
        let mut body = json!({"model": ask.model, "messages": messages, cap: ask.max_tokens});
        if let Value::Object(map) = &mut body {
            map.extend(ask.format.map(|format| ("response_format".to_owned(), response_format(format))));
            map.extend(ask.others(&RESERVED));
            ask.set_tier(map, TIER);
        }
        body
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        reply(body)
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&embeddings::OpenaiEmbeddings)
    }

    fn cache_write_surcharge(&self, model: &str) -> u64 {
        write_surcharge(model).unwrap_or(0)
    }

    fn decisions(&self) -> Option<&'static dyn Decisions> {
        Some(&decisions::OpenaiDecisions)
    }
}

/// From GPT-5.6 on, writing a token into the cache costs a quarter more than reading it anew (OpenAI's guide to prompt
/// caching), and so it is with Claude behind a proxy. Names may have others around them: `openai/gpt-5.6`, `ft:gpt-6:acme`.
/// `None`: the name does not tell.
pub(super) fn write_surcharge(model: &str) -> Option<u64> {
    let name = model.to_ascii_lowercase();
    if name.contains("claude") {
        return Some(25);
    }
    let version = name.split("gpt").skip(1).find_map(|rest| {
        let rest = rest.strip_prefix(['-', '_', ' ']).unwrap_or(rest);
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        rest.get(..end)?.trim_end_matches('.').parse::<f64>().ok()
    })?;
    // Azure writes 3.5 as "35".
    let version = if version >= 30.0 { version / 10.0 } else { version };
    Some(if version >= 5.6 { 25 } else { 0 })
}

fn response_format(format: &Format) -> Value {
    match format {
        Format::Json => json!({"type": "json_object"}),
        Format::Schema { strict, schema } => json!({
            "type": "json_schema",
            "json_schema": {"name": "answers", "strict": strict, "schema": schema},
        }),
    }
}

/// Reads the body of a 2xx.
///
/// # Errors
/// If it is neither JSON nor a stream of it, is a stream that broke off, or carries an error.
fn reply(body: &[u8]) -> Result<Reply, Unread> {
    let body = without_mark(body);
    let json: Value = match serde_json::from_slice(body) {
        Ok(json) => json,
        Err(_) => stream::whole(body)?,
    };
    if !json["error"].is_null() {
        return Err(Unread::Said(json["error"].clone()));
    }
    let choice = json["choices"].as_array().and_then(|all| all.iter().find(|choice| is_first(choice)));
    let choice = choice.unwrap_or(&Value::Null);
    if !choice["error"].is_null() || choice["finish_reason"] == "error" {
        return Err(Unread::Said(choice["error"].clone()));
    }
    let message = &choice["message"];
    let text = match &message["content"] {
        Value::String(s) => s.clone(),
        Value::Array(parts) => parts.iter().filter(|p| !is_thought(p)).filter_map(|p| p["text"].as_str()).collect(),
        _ => String::new(),
    };
    let has_thought_part = message["content"].as_array().is_some_and(|parts| parts.iter().any(is_thought));
    let finish = match choice["finish_reason"].as_str() {
        Some("length" | "model_length" | "max_tokens") => Finish::Length,
        Some("content_filter" | "refusal" | "safety") => Finish::Refused,
        _ if message["refusal"].as_str().is_some_and(|r| !r.is_empty()) => Finish::Refused,
        _ => Finish::Complete,
    };
    let reasoning = ["reasoning_content", "reasoning", "reasoning_details", "thinking"];
    let says_reasoning = |name: &str| match message.get(name).unwrap_or(&Value::Null) {
        Value::String(s) => !s.trim().is_empty(),
        Value::Array(parts) => !parts.is_empty(),
        _ => false,
    };
    let has_reasoning = has_thought_part || reasoning.into_iter().any(says_reasoning);
    let usage = usage(&json["usage"], !text.is_empty());
    let cached = json["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    let cached_input = usage.input.map_or(0, |input| cached.min(input));
    let thought = json["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64();
    let written_input = json["usage"]["prompt_tokens_details"]["cache_write_tokens"].as_u64().unwrap_or(0);
    let is_flex = json[TIER] == "flex";
    let confidences = logprobs::confidences(&text, &choice["logprobs"]["content"]);
    let reply = Reply { text, finish, has_reasoning, usage, thought, cached_input, written_input, ..Reply::default() };
    Ok(Reply { is_flex, confidences, ..reply }.consistent())
}

/// One answer is asked for. Of several, that without a number or with the first one is it.
fn is_first(choice: &Value) -> bool {
    choice["index"].as_u64().is_none_or(|index| index == 0)
}

/// Returns true if a part of a content is thought, and not said.
fn is_thought(part: &Value) -> bool {
    part["type"].as_str().is_some_and(|kind| kind.contains("think") || kind.contains("reason"))
}

/// Reads what a request took. A number that no request can have is none: no tokens of a prompt, or of an answer that
/// `has_text`.
fn usage(said: &Value, has_text: bool) -> Usage {
    let tokens = |name: &str| super::tokens(&said[name]);
    let (input, output) = (tokens("prompt_tokens").filter(|n| *n > 0), tokens("completion_tokens"));
    let beyond = |part: u64| tokens("total_tokens").and_then(|total| total.checked_sub(part)).filter(|n| *n > 0);
    // Some leave what a model thinks out of the tokens of the completion, but not out of the total, nor of the bill.
    let all_output = output.max(input.and_then(beyond)).filter(|n| *n > 0 || !has_text);
    Usage { input: input.or_else(|| beyond(output?)), output: all_output }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Api;
    use crate::limiter::Tokens;
    use proptest::prelude::*;

    #[test]
    fn writes_into_the_cache_cost_more_from_gpt_5_6_on() {
        for (model, percent) in [
            ("gpt-6-luna", Some(25)),
            ("gpt-5.6", Some(25)),
            ("gpt-5.6-luna", Some(25)),
            ("gpt-10", Some(25)),
            ("openai/gpt-5.6", Some(25)),
            ("azure/eu/GPT-6-luna", Some(25)),
            ("ft:gpt-6:acme::1", Some(25)),
            ("chatgpt-6.1-latest", Some(25)),
            ("our-gpt56-deployment", Some(25)),
            ("mygpt/gpt-5.6.", Some(25)),
            ("anthropic/claude-haiku", Some(25)),
            ("gpt-5.5", Some(0)),
            ("gpt-5-mini", Some(0)),
            ("gpt-4o", Some(0)),
            ("openai/gpt-4.1-mini", Some(0)),
            ("gpt-35-turbo", Some(0)),
            ("gpt-", None),
            ("6", None),
            ("gpt-oss-120b", None),
            ("prod-chat", None),
        ] {
            assert_eq!(write_surcharge(model), percent, "{model}");
            // The name of a deployment at Azure may tell nothing: the dearer one is reserved there.
            let of = |api: Api| api.dialect().cache_write_surcharge(model);
            assert_eq!((of(Api::Openai), of(Api::Azure)), (percent.unwrap_or(0), percent.unwrap_or(25)), "{model}");
        }
        let body = json!({
            "choices": [{"message": {"content": "{}"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 1,
                      "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 7}},
        });
        // No more than there are.
        let reply = reply(body.to_string().as_bytes()).unwrap();
        assert_eq!((reply.cached_input, reply.written_input), (4, 5));
    }

    #[test]
    fn what_is_said_of_tokens_is_read_as_far_as_it_can_be() {
        let of = |said: Value| {
            let Usage { input, output } = usage(&said, true);
            (input, output)
        };
        let (p, c, t) = ("prompt_tokens", "completion_tokens", "total_tokens");
        assert_eq!(of(json!({p: 7, c: 2, t: 9})), (Some(7), Some(2)));
        assert_eq!(of(json!({p: 7, c: 2, t: 90})), (Some(7), Some(83)));
        assert_eq!(of(json!({p: 7, t: 9})), (Some(7), Some(2)));
        assert_eq!(of(json!({c: 2, t: 9})), (Some(7), Some(2)));
        for said in [json!({p: 7}), json!({p: 7, t: 7}), json!({p: 7, c: 0}), json!({p: 7, c: -1}), json!({p: 7, t: 1})]
        {
            assert_eq!(of(said), (Some(7), None));
        }
        for said in [json!({c: 2}), json!({p: 0, c: 2}), json!({c: 2, t: 2}), json!({p: 1e30, c: 2})] {
            assert_eq!(of(said), (None, Some(2)));
        }
        for said in [json!(null), json!({}), json!({t: 9}), json!({p: "7", c: 1_u64 << 32})] {
            assert_eq!(of(said), (None, None));
        }
        assert_eq!(usage(&json!({p: 7, c: 0}), false).whole(), Some(Tokens { input: 7, output: 0 }));
    }

    #[test]
    fn user_parameters_are_added_but_cannot_replace_ours() {
        let Value::Object(parameters) = json!({"temperature": 0, "model": "other", "n": 5}) else { panic!() };
        let b = Openai.body(&Ask {
            model: "m",
            system: "s",
            no_system_role: true,
            user: "u",
            max_tokens: 9,
            max_completion_tokens: true,
            context: 100,
            format: None,
            parameters: &parameters,
            no_sampling: false,
            tier: Default::default(),
        });
        assert_eq!(b["model"], "m");
        assert_eq!(b["messages"], json!([{"role": "user", "content": "s\n\nu"}]));
        assert_eq!(b["max_completion_tokens"], 9);
        assert_eq!((b.get("n"), b.get("max_tokens"), b.get("response_format")), (None, None, None));
        assert_eq!(b["temperature"], 0);
    }

    #[test]
    fn replies_are_read() {
        let ok = br#"{"choices":[{"message":{"content":"{}"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}"#;
        assert_eq!(
            reply(ok).unwrap(),
            Reply {
                text: "{}".into(),
                usage: Usage { input: Some(7), output: Some(2) },
                cached_input: 4,
                ..Reply::default()
            }
        );
        let of = |body: Value| reply(body.to_string().as_bytes()).unwrap();
        let (mine, other) = (json!({"content": "mine"}), json!({"content": "other"}));
        let several = json!([{"index": 1, "message": other}, {"index": 0, "message": mine}, {"message": other}]);
        assert_eq!(of(json!({"choices": several})).text, "mine");
        let unnumbered = json!([{"message": mine}, {"message": other}]);
        assert_eq!(of(json!({"choices": unnumbered})).text, "mine");
        let parts = json!([
            {"type": "thinking", "text": "thought"}, {"type": "text", "text": "said"}, {"type": "reasoning", "text": "x"},
        ]);
        let parted = of(json!({"choices": [{"message": {"content": parts}}]}));
        assert_eq!((parted.text.as_str(), parted.has_reasoning), ("said", true));
        let events = [
            json!({"choices": [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": "sa"}}]}),
            json!({"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "length"}]}),
            json!({"choices": [{"index": 0, "delta": {"content": parts}, "finish_reason": "stop"}]}),
        ];
        let streamed: String = events.map(|event| format!("data: {event}\n\n")).concat();
        let streamed = reply(streamed.as_bytes()).unwrap();
        assert_eq!((streamed.text.as_str(), streamed.has_reasoning), ("sasaid", true));
        assert_eq!(streamed.finish, Finish::Complete);
        let refusal = br#"{"choices":[{"message":{"content":null,"refusal":"no"},"finish_reason":"stop"}]}"#;
        assert_eq!(reply(refusal).unwrap().finish, Finish::Refused);
        assert_eq!(reply(br#"{"choices":[{"finish_reason":"length"}]}"#).unwrap().finish, Finish::Length);
        assert_eq!(reply(br#"{"error":{"code":1}}"#), Err(Unread::Said(json!({"code": 1}))));
        assert!(reply(b"<html>").is_err());
        assert_eq!(reply(b"{}").unwrap().text, "");
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = reply(&bytes);
        }
    }
}
