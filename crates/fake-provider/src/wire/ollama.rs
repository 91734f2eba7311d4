//! Ollama's own chat and embeddings.

use serde_json::{Value, json};

use super::{Wire, in_order, only, parts};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Ollama;

impl Wire for Ollama {
    fn name(&self) -> &'static str {
        "ollama"
    }

    fn base(&self) -> &'static str {
        ""
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/api/chat").then_some(None)
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/api/embed").then_some(None)
    }

    fn texts(&self, body: &Value) -> Result<Value, String> {
        only(body, "", &["model", "input", "dimensions", "truncate", "options", "keep_alive"])?;
        Ok(json!({"model": body["model"], "input": body["input"], "dimensions": body["dimensions"]}))
    }

    fn vectors(&self, said: &Value) -> Value {
        let (vectors, tokens) = in_order(said);
        json!({
            "model": said["model"], "embeddings": vectors, "total_duration": 14_143_917, "load_duration": 1_019_500,
            "prompt_eval_count": tokens,
        })
    }

    fn request(&self, _request: &Request, body: &Value) -> Result<Value, String> {
        only(
            body,
            "",
            &["model", "messages", "stream", "format", "options", "think", "keep_alive", "truncate", "shift", "tools"],
        )?;
        if body["tools"].as_array().is_some_and(|tools| !tools.is_empty()) {
            return Err("tools are not supported".to_owned());
        }
        if body["stream"] != false {
            return Err("streams are not supported".to_owned());
        }
        let mut asked = json!({
            "model": body["model"], "messages": body["messages"], "max_tokens": body["options"]["num_predict"],
        });
        let format = &body["format"];
        if format == "json" {
            asked["response_format"] = json!({"type": "json_object"});
        } else if format.is_object() {
            let schema = json!({"name": "x", "strict": format["additionalProperties"] == false, "schema": format});
            asked["response_format"] = json!({"type": "json_schema", "json_schema": schema});
        } else if !format.is_null() {
            return Err("invalid format: expected \"json\" or a JSON schema".to_owned());
        }
        Ok(asked)
    }

    fn completion(&self, said: &Value) -> Value {
        let (text, finish, [input, _, output, _]) = parts(said);
        json!({
            "model": said["model"], "created_at": "2026-08-04T08:52:19Z",
            "message": {"role": "assistant", "content": text.unwrap_or_default()},
            "done": true, "done_reason": if finish == "length" { "length" } else { "stop" },
            "prompt_eval_count": input, "eval_count": output,
        })
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        (status, json!({"error": error["message"]}))
    }

    fn headers(&self, _configured: RateHeaders) -> (RateHeaders, bool) {
        (RateHeaders::None, false)
    }
}
