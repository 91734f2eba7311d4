//! Mistral's: OpenAI's, with its own headers, errors and names.

use serde_json::{Value, json};

use super::{Wire, only};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Mistral;

impl Wire for Mistral {
    fn name(&self) -> &'static str {
        "mistral"
    }

    fn base(&self) -> &'static str {
        "/mistral/v1"
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/mistral/v1/chat/completions").then_some(None)
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/mistral/v1/embeddings").then_some(None)
    }

    fn texts(&self, body: &Value) -> Result<Value, String> {
        only(body, "body.", &["model", "input", "encoding_format", "output_dimension"])?;
        let mut asked = body.clone();
        asked["dimensions"] = asked["output_dimension"].take();
        Ok(asked)
    }

    fn request(&self, _request: &Request, body: &Value) -> Result<Value, String> {
        let known = [
            "model",
            "messages",
            "max_tokens",
            "response_format",
            "stream",
            "temperature",
            "random_seed",
            "safe_prompt",
        ];
        only(body, "body.", &known)?;
        Ok(body.clone())
    }

    /// Its messages have no refusals of their own, and what is thought is not told apart.
    fn completion(&self, said: &Value) -> Value {
        let mut said = said.clone();
        let choices = said["choices"].as_array_mut().into_iter().flatten();
        for message in choices.filter_map(|choice| choice["message"].as_object_mut()) {
            message.remove("refusal");
        }
        if let Some(usage) = said["usage"].as_object_mut() {
            usage.remove("completion_tokens_details");
        }
        said
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        let (kind, code) = match status {
            401 => return (401, json!({"message": "Unauthorized", "request_id": "x"})),
            429 if error["code"] == "insufficient_quota" => return (402, json!({"detail": "Payment required"})),
            404 => ("invalid_model", json!("1500")),
            429 => ("rate_limited", json!("1300")),
            status if status >= 500 => ("service_unavailable", json!("3700")),
            _ => ("invalid_request_error", error["code"].clone()),
        };
        (status, json!({"object": "error", "message": error["message"], "type": kind, "param": null, "code": code}))
    }

    fn headers(&self, configured: RateHeaders) -> (RateHeaders, bool) {
        (if configured == RateHeaders::OpenAi { RateHeaders::Mistral } else { configured }, true)
    }
}
