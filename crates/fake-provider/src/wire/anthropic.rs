//! Anthropic's Messages.

use serde_json::{Value, json};

use super::{Wire, message, only, parts};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Anthropic;

impl Wire for Anthropic {
    fn name(&self) -> &'static str {
        "anthropic"
    }

    fn base(&self) -> &'static str {
        "/v1"
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/v1/messages").then_some(None)
    }

    fn key_header(&self) -> &'static str {
        "x-api-key"
    }

    fn request(&self, request: &Request, body: &Value) -> Result<Value, String> {
        let known =
            ["model", "max_tokens", "system", "messages", "output_config", "thinking", "metadata", "temperature"];
        only(body, "", &known)?;
        let version = request.header("anthropic-version").ok_or("anthropic-version: header is required")?;
        if version >= "2026-10-21" && !body["temperature"].is_null() {
            return Err("`temperature` is not supported with this API version".to_owned());
        }
        if !body["max_tokens"].is_u64() {
            return Err("max_tokens: Field required".to_owned());
        }
        let mut messages: Vec<Value> = Vec::new();
        if !body["system"].is_null() {
            messages.push(message("system", &body["system"]));
        }
        let said = body["messages"].as_array().ok_or("messages: Field required")?;
        for one in said {
            let role = one["role"].as_str().filter(|role| matches!(*role, "user" | "assistant"));
            messages
                .push(message(role.ok_or("messages.0.role: Input should be 'user' or 'assistant'")?, &one["content"]));
        }
        let mut asked = json!({"model": body["model"], "messages": messages, "max_tokens": body["max_tokens"]});
        let config = &body["output_config"];
        only(config, "output_config.", &["format", "effort"])?;
        if !config["format"].is_null() {
            let schema = &config["format"]["schema"];
            if config["format"]["type"] != "json_schema" || schema["additionalProperties"] != false {
                let why = "For 'object' type, 'additionalProperties' must be explicitly set to false";
                return Err(format!("output_config.format.schema: {why}"));
            }
            asked["response_format"] =
                json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
        }
        Ok(asked)
    }

    fn tells_writes(&self) -> bool {
        true
    }

    fn completion(&self, said: &Value) -> Value {
        let (text, finish, [input, cached, output, thought]) = parts(said);
        let reason = match finish {
            "length" => "max_tokens",
            "refusal" | "content_filter" => "refusal",
            _ => "end_turn",
        };
        let written = said["usage"]["prompt_tokens_details"]["written_tokens"].as_u64().unwrap_or(0);
        json!({
            "id": "msg_01", "type": "message", "role": "assistant", "model": said["model"],
            "content": text.map(|text| json!({"type": "text", "text": text})).into_iter().collect::<Vec<_>>(),
            "stop_reason": reason, "stop_sequence": null,
            "usage": {
                "input_tokens": input - cached - written, "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": written,
                "output_tokens": output, "output_tokens_details": {"thinking_tokens": thought},
                "service_tier": "standard",
            },
        })
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        let (status, kind) = match status {
            401 => (401, "authentication_error"),
            404 => (404, "not_found_error"),
            429 if error["code"] == "insufficient_quota" => (402, "billing_error"),
            429 => (429, "rate_limit_error"),
            500 => (500, "api_error"),
            503 => (529, "overloaded_error"),
            status => (status, "invalid_request_error"),
        };
        let error = json!({"type": kind, "message": error["message"]});
        (status, json!({"type": "error", "error": error, "request_id": "req_01"}))
    }

    fn headers(&self, configured: RateHeaders) -> (RateHeaders, bool) {
        (if configured == RateHeaders::OpenAi { RateHeaders::Anthropic } else { configured }, true)
    }
}
