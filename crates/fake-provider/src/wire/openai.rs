//! OpenAI's own: nothing is to be done.

use serde_json::Value;

use super::Wire;
use crate::http::Request;

pub(crate) struct Openai;

impl Wire for Openai {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn base(&self) -> &'static str {
        "/v1"
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/v1/chat/completions").then_some(None)
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/v1/embeddings").then_some(None)
    }

    fn decides(&self, path: &str) -> bool {
        path == "/v1/decisions"
    }

    fn request(&self, _request: &Request, body: &Value) -> Result<Value, String> {
        Ok(body.clone())
    }

    fn completion(&self, said: &Value) -> Value {
        said.clone()
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        (status, serde_json::json!({"error": error}))
    }
}
