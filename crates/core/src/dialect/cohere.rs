//! Cohere's chat and embeddings, version 2.
//!
//! Source: Cohere's published API reference (`/v2/chat`, `/v2/embed`), 2026. What a request took is what is billed.

use serde_json::{Value, json};

use super::embeddings::{Embeddings, Texts, in_order, reply};
use super::{Ask, Dialect, Finish, Format, Reply, Unread, Usage, parsed, tokens};
use crate::class::Trouble;
use crate::vector;

pub(super) struct Cohere;

const RESERVED: [&str; 5] = ["model", "messages", "max_tokens", "response_format", "stream"];

impl Dialect for Cohere {
    fn base_url(&self) -> Option<&'static str> {
        Some("https://api.cohere.com/v2")
    }

    fn reserved(&self) -> &'static [&'static str] {
        &RESERVED
    }

    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{base}/chat")
    }

    fn body(&self, ask: &Ask) -> Value {
        let mut messages = vec![json!({"role": "user", "content": ask.user()})];
        if !ask.no_system_role {
            messages.insert(0, json!({"role": "system", "content": ask.system}));
        }
        let mut body = json!({"model": ask.model, "messages": messages, "max_tokens": ask.max_tokens, "stream": false});
        if let Some(format) = ask.format {
            body["response_format"] = json!({"type": "json_object"});
            if let Format::Schema { schema, .. } = format {
                body["response_format"]["json_schema"] = schema.clone();
            }
        }
        if let Value::Object(map) = &mut body {
            map.extend(ask.others(&RESERVED));
        }
        body
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let parts = said["message"]["content"].as_array().map(Vec::as_slice).unwrap_or_default();
        let text: String = parts.iter().filter(|p| p["type"] == "text").filter_map(|p| p["text"].as_str()).collect();
        let finish = match said["finish_reason"].as_str() {
            Some("MAX_TOKENS") => Finish::Length,
            Some("ERROR_TOXIC") => Finish::Refused,
            Some("ERROR" | "TIMEOUT") => return Err(Unread::Other("the provider broke off the answer")),
            _ => Finish::Complete,
        };
        let usage = &said["usage"];
        let count = |name: &str| {
            let billed = tokens(&usage["billed_units"][name]);
            billed.or_else(|| tokens(&usage["tokens"][name])).filter(|n| *n > 0)
        };
        Ok(Reply {
            finish,
            has_reasoning: parts.iter().any(|part| part["type"] == "thinking"),
            usage: Usage { input: count("input_tokens"), output: count("output_tokens") },
            cached_input: tokens(&usage["cached_tokens"]).unwrap_or(0),
            text,
            ..Reply::default()
        }
        .consistent())
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&Cohere)
    }

    /// A trial key has so many calls a month.
    fn trouble(&self, status: u16, _error: &Value, words: &str) -> Option<Trouble> {
        (status == 429 && (words.contains("/ month") || words.contains("per month"))).then_some(Trouble::Quota(None))
    }
}

/// The use of vectors if the embedder names none: the provider requires one.
const INPUT_TYPE: &str = "search_document";

impl Embeddings for Cohere {
    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{base}/embed")
    }

    fn most_texts(&self) -> usize {
        96
    }

    fn most_tokens(&self, _model: &str) -> u64 {
        128_000
    }

    /// Of a key that is paid for.
    fn inputs_per_minute(&self, _requests_per_minute: Option<u64>) -> Option<u64> {
        Some(2_000)
    }

    fn body(&self, texts: &Texts) -> Value {
        texts.body([
            ("model", texts.model.into()),
            ("texts", texts.texts.into()),
            ("input_type", texts.input_type.unwrap_or(INPUT_TYPE).into()),
            ("embedding_types", json!([texts.encoding_format().unwrap_or("float")])),
            ("output_dimension", texts.length().into()),
            // A text that is too long is refused, not cut without a word.
            ("truncate", "NONE".into()),
        ])
    }

    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let vectors = ["base64", "float"].iter().find_map(|name| said["embeddings"][name].as_array());
        let vectors = vectors.map(Vec::as_slice).unwrap_or_default();
        let input = tokens(&said["meta"]["billed_units"]["input_tokens"]);
        Ok(reply(in_order(vectors.iter().map(vector::read), texts), input))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::tests::{ask, schema};
    use crate::limiter::Tokens;

    #[test]
    fn a_request_is_written_as_documented() {
        let (parameters, format) = (json!({"temperature": 0, "max_tokens": 1}), schema(true));
        let want = json!({
            "model": "m",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "max_tokens": 9,
            "stream": false,
            "response_format": {"type": "json_object", "json_schema": {"type": "object"}},
            "temperature": 0,
        });
        assert_eq!(Dialect::body(&Cohere, &Ask { format: Some(&format), ..ask(&parameters) }), want);
        let body =
            Dialect::body(&Cohere, &Ask { format: Some(&Format::Json), no_system_role: true, ..ask(&parameters) });
        assert_eq!(body["response_format"], json!({"type": "json_object"}));
        assert_eq!(body["messages"], json!([{"role": "user", "content": "s\n\nu"}]));
    }

    #[test]
    fn answers_are_read() {
        let mut said = json!({
            "id": "c14c80c3", "finish_reason": "COMPLETE",
            "message": {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "{}"}]},
            "usage": {"billed_units": {"input_tokens": 5, "output_tokens": 418},
                      "tokens": {"input_tokens": 71, "output_tokens": 418}, "cached_tokens": 3},
        });
        let of = |said: &Value| Dialect::reply(&Cohere, said.to_string().as_bytes());
        let reply = of(&said).unwrap();
        assert_eq!((reply.text.as_str(), reply.finish, reply.has_reasoning), ("{}", Finish::Complete, true));
        assert_eq!((reply.usage.whole(), reply.cached_input), (Some(Tokens { input: 5, output: 418 }), 3));
        said["finish_reason"] = "MAX_TOKENS".into();
        assert_eq!(of(&said).unwrap().finish, Finish::Length);
        said["finish_reason"] = "TIMEOUT".into();
        assert!(of(&said).is_err());
    }
}
