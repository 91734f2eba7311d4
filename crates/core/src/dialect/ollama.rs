//! Ollama's own chat and embeddings.
//!
//! Source: Ollama's published API (`docs/api.md`), 2026. A prompt that is longer than `num_ctx` is cut there without a word,
//! and the default may be 4,096 tokens, so each request names it. It is the same for all requests to a model, since another
//! one makes the server load the model anew.

use serde_json::{Value, json};

use super::embeddings::{Embeddings, Texts, in_order, reply};
use super::{Ask, Dialect, Finish, Format, Reply, Unread, Usage, parsed, tokens};
use crate::class::{Parameter, Trouble};
use crate::vector;

pub(super) struct Ollama;

const RESERVED: [&str; 6] = ["model", "messages", "stream", "format", "num_predict", "options"];

/// Parameters of a request. All others are of its `options`.
const OF_REQUEST: [&str; 6] = ["think", "keep_alive", "tools", "truncate", "shift", "logprobs"];

impl Dialect for Ollama {
    fn base_url(&self) -> Option<&'static str> {
        Some("http://localhost:11434")
    }

    fn reserved(&self) -> &'static [&'static str] {
        &RESERVED
    }

    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{}/api/chat", base.trim_end_matches("/api"))
    }

    fn body(&self, ask: &Ask) -> Value {
        let mut messages = vec![json!({"role": "user", "content": ask.user()})];
        if !ask.no_system_role {
            messages.insert(0, json!({"role": "system", "content": ask.system}));
        }
        let mut body = json!({"model": ask.model, "messages": messages, "stream": false});
        // A prompt that is too long is refused, not cut without a word.
        body["truncate"] = false.into();
        body["shift"] = false.into();
        body["options"] = json!({"num_ctx": ask.context, "num_predict": ask.max_tokens});
        match ask.format {
            Some(Format::Json) => body["format"] = "json".into(),
            Some(Format::Schema { schema, .. }) => body["format"] = schema.clone(),
            None => {}
        }
        for (key, value) in ask.others(&RESERVED) {
            let place = if OF_REQUEST.contains(&key.as_str()) { &mut body } else { &mut body["options"] };
            place[key] = value;
        }
        body
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let message = &said["message"];
        let text = message["content"].as_str().unwrap_or_default().to_owned();
        if said["done"] == false {
            return Err(Unread::Other("the provider's answer is a stream that broke off"));
        }
        Ok(Reply {
            finish: if said["done_reason"] == "length" { Finish::Length } else { Finish::Complete },
            has_reasoning: message["thinking"].as_str().is_some_and(|thinking| !thinking.is_empty()),
            // A prompt that is still there from before may have no count.
            usage: Usage {
                input: tokens(&said["prompt_eval_count"]).filter(|n| *n > 0),
                output: tokens(&said["eval_count"]).filter(|n| *n > 0 || text.is_empty()),
            },
            text,
            ..Reply::default()
        })
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&Ollama)
    }

    fn trouble(&self, status: u16, _error: &Value, words: &str) -> Option<Trouble> {
        if status >= 400 && words.contains("context length") {
            return Some(Trouble::TooLarge);
        }
        (status == 400 && words.contains("invalid format")).then_some(Trouble::Unsupported(Parameter::ResponseFormat))
    }
}

/// It names no bounds of a request. Ours keep one short: texts are answered one after another.
impl Embeddings for Ollama {
    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{}/api/embed", base.trim_end_matches("/api"))
    }

    fn most_texts(&self) -> usize {
        128
    }

    fn most_tokens(&self, _model: &str) -> u64 {
        64_000
    }

    /// Nothing says what vectors are for, nor how they are written.
    fn body(&self, texts: &Texts) -> Value {
        texts.body([
            ("model", texts.model.into()),
            ("input", texts.texts.into()),
            ("dimensions", texts.length().into()),
            // A text that is too long is refused, not cut without a word.
            ("truncate", false.into()),
        ])
    }

    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let vectors = said["embeddings"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(reply(in_order(vectors.iter().map(vector::read), texts), tokens(&said["prompt_eval_count"])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::tests::{ask, schema};
    use crate::limiter::Tokens;

    #[test]
    fn a_request_is_written_as_documented() {
        let parameters = json!({"temperature": 0, "think": false, "keep_alive": "30m", "num_predict": 1});
        let format = schema(true);
        let want = json!({
            "model": "m",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "stream": false,
            "truncate": false,
            "shift": false,
            "options": {"num_ctx": 100, "num_predict": 9, "temperature": 0},
            "format": {"type": "object"},
            "think": false,
            "keep_alive": "30m",
        });
        assert_eq!(Dialect::body(&Ollama, &Ask { format: Some(&format), ..ask(&parameters) }), want);
        // A num_ctx that the user sets goes before ours.
        let parameters = json!({"num_ctx": 50});
        let body =
            Dialect::body(&Ollama, &Ask { format: Some(&Format::Json), no_system_role: true, ..ask(&parameters) });
        assert_eq!((&body["options"]["num_ctx"], &body["format"]), (&json!(50), &json!("json")));
        assert_eq!(body["messages"], json!([{"role": "user", "content": "s\n\nu"}]));
        for base in ["http://localhost:11434", "http://localhost:11434/api"] {
            assert_eq!(Dialect::url(&Ollama, base, "m", None), "http://localhost:11434/api/chat");
        }
    }

    #[test]
    fn answers_are_read() {
        let mut said = json!({
            "model": "m", "created_at": "2026-08-04T08:52:19Z",
            "message": {"role": "assistant", "content": "{}", "thinking": "hm"},
            "done": true, "done_reason": "stop", "total_duration": 4_883_583_458_u64, "prompt_eval_count": 26,
            "eval_count": 298,
        });
        let of = |said: &Value| Dialect::reply(&Ollama, said.to_string().as_bytes());
        let reply = of(&said).unwrap();
        assert_eq!((reply.text.as_str(), reply.finish, reply.has_reasoning), ("{}", Finish::Complete, true));
        assert_eq!(reply.usage.whole(), Some(Tokens { input: 26, output: 298 }));
        said["done_reason"] = "length".into();
        assert_eq!(of(&said).unwrap().finish, Finish::Length);
        said["done"] = false.into();
        assert!(of(&said).is_err());
        assert!(matches!(of(&json!({"error": "model requires more system memory"})), Err(Unread::Said(_))));
    }
}
