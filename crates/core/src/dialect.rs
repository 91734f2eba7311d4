//! The wire of OpenAI-compatible chat completions: requests and answers as data.
//!
//! Source: OpenAI's published API description (`/chat/completions`); what other servers leave out or add is tolerated.

mod stream;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::limiter::Tokens;

/// Parameters of a request that a user may not set for a model, because the gateway does.
pub const RESERVED_PARAMETERS: [&str; 7] =
    ["model", "messages", "response_format", "max_tokens", "max_completion_tokens", "stream", "n"];

/// What goes into a request.
#[derive(Debug)]
pub struct Request<'a> {
    /// The provider's name of the model.
    pub model: &'a str,
    /// The fixed prefix.
    pub system: &'a str,
    /// It stands at the head of the user's message: the server knows no role of the system.
    pub no_system_role: bool,
    /// The rows.
    pub user: &'a str,
    /// Most tokens of the answer.
    pub max_tokens: u64,
    /// Name that cap `max_completion_tokens`, as newer OpenAI models want it.
    pub max_completion_tokens: bool,
    /// The form of the answer.
    pub response_format: Option<Value>,
    /// Further parameters, as the user set them for the model.
    pub parameters: &'a Map<String, Value>,
}

/// The body of a request.
pub fn body(r: &Request) -> Value {
    let cap = if r.max_completion_tokens { "max_completion_tokens" } else { "max_tokens" };
    let messages = if r.no_system_role {
        json!([{"role": "user", "content": format!("{}\n\n{}", r.system, r.user)}])
    } else {
        json!([{"role": "system", "content": r.system}, {"role": "user", "content": r.user}])
    };
    let mut body = json!({
        "model": r.model,
        "messages": messages,
        cap: r.max_tokens,
    });
    if let Value::Object(map) = &mut body {
        if let Some(format) = &r.response_format {
            map.insert("response_format".into(), format.clone());
        }
        for (key, value) in r.parameters {
            if !RESERVED_PARAMETERS.contains(&key.as_str()) {
                map.insert(key.clone(), value.clone());
            }
        }
    }
    body
}

/// Tokens that a request has beside its texts: the frame of two messages and the beginning of the answer
/// (OpenAI's cookbook, "How to count tokens with tiktoken": 3 a message and 3).
pub const FRAME_TOKENS: usize = 9;

/// What a provider counts against its limit of tokens for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// What it took: of what is reserved before, the rest comes back with the answer.
    #[default]
    Used,
    /// The prompt and the cap of the answer, however short the answer is (Azure's documents).
    Reserved,
    /// The larger of the prompt and the cap of the answer (OpenAI's guide to rate limits).
    Larger,
}

impl Counts {
    /// What to reserve for a request with this prompt, for whose answer so many tokens are expected, and at most asked
    /// for.
    pub fn reserve(self, prompt: u64, expected_answer: u64, most_answer: u64) -> Tokens {
        match self {
            Self::Used => Tokens { input: prompt, output: expected_answer },
            Self::Reserved => Tokens { input: prompt, output: most_answer },
            Self::Larger => Tokens { input: prompt, output: most_answer.saturating_sub(prompt) },
        }
    }

    /// What stays counted of a reservation when the request took `used`.
    pub fn settle(self, reserved: Tokens, used: Tokens) -> Tokens {
        if self == Self::Used { used } else { reserved }
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// By itself.
    Complete,
    /// At the cap of tokens.
    Length,
    /// By the provider's filter, or the model refused.
    Refused,
}

/// What the provider says a request took. What it does not say is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of its prompt.
    pub input: Option<u64>,
    /// Tokens of its answer, thinking included.
    pub output: Option<u64>,
}

impl Usage {
    /// All of it, if nothing is missing.
    pub fn whole(self) -> Option<Tokens> {
        Some(Tokens { input: self.input?, output: self.output? })
    }

    /// With these in place of what is missing.
    pub fn or(self, missing: Tokens) -> Tokens {
        Tokens { input: self.input.unwrap_or(missing.input), output: self.output.unwrap_or(missing.output) }
    }

    /// That part of these which is missing.
    pub fn missing(self, of: Tokens) -> Tokens {
        let part = |known: Option<u64>, of: u64| if known.is_some() { 0 } else { of };
        Tokens { input: part(self.input, of.input), output: part(self.output, of.output) }
    }
}

/// The answer of a request with a status of 2xx.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The text; empty if there is none.
    pub text: String,
    /// How it ended.
    pub finish: Finish,
    /// There is reasoning beside the text.
    pub has_reasoning: bool,
    /// What it took.
    pub usage: Usage,
    /// Tokens of it that came before the answer, if the provider says.
    pub thought: Option<u64>,
    /// Tokens of the prompt that the provider had cached.
    pub cached_input: u64,
}

/// Why the body of a 2xx holds no answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// It carries an error: a 200 is no success at every provider.
    Said(Value),
    /// What is wrong with it, in words of ours.
    Other(&'static str),
}

/// A text without the byte order mark that some servers begin with.
pub(crate) fn without_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body)
}

/// Reads the body of a 2xx.
///
/// # Errors
/// If it is neither JSON nor a stream of it, is a stream that broke off, or carries an error.
pub fn reply(body: &[u8]) -> Result<Reply, Unread> {
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
    Ok(Reply { text, finish, has_reasoning, usage, thought, cached_input })
}

/// One answer is asked for. Of several, that without a number or with the first one is it.
fn is_first(choice: &Value) -> bool {
    choice["index"].as_u64().is_none_or(|index| index == 0)
}

/// Whether a part of a content is thought, and not said.
fn is_thought(part: &Value) -> bool {
    part["type"].as_str().is_some_and(|kind| kind.contains("think") || kind.contains("reason"))
}

/// Reads what a request took. A number that no request can have is none: no tokens of a prompt, or of an answer that
/// `has_text`.
fn usage(said: &Value, has_text: bool) -> Usage {
    let tokens = |name: &str| said[name].as_u64().filter(|n| *n < 1 << 32);
    let (input, output) = (tokens("prompt_tokens").filter(|n| *n > 0), tokens("completion_tokens"));
    let beyond = |part: u64| tokens("total_tokens").and_then(|total| total.checked_sub(part)).filter(|n| *n > 0);
    // Some leave what a model thinks out of the tokens of the completion, but not out of the total, nor of the bill.
    let all_output = output.max(input.and_then(beyond)).filter(|n| *n > 0 || !has_text);
    Usage { input: input.or_else(|| beyond(output?)), output: all_output }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        let b = body(&Request {
            model: "m",
            system: "s",
            no_system_role: true,
            user: "u",
            max_tokens: 9,
            max_completion_tokens: true,
            response_format: None,
            parameters: &parameters,
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
                finish: Finish::Complete,
                has_reasoning: false,
                usage: Usage { input: Some(7), output: Some(2) },
                thought: None,
                cached_input: 4
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
