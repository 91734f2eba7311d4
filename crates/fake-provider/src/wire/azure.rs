//! Azure OpenAI: OpenAI's, at the address of a deployment, with another header.

use serde_json::{Value, json};

use super::Wire;
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Azure;

/// The deployment whose model a path asks for `what`, under either address. `None` if it is another path.
fn of<'a>(path: &'a str, what: &str) -> Option<Option<&'a str>> {
    if path.strip_prefix("/openai/v1/") == Some(what) {
        return Some(None);
    }
    let (deployment, of) = path.strip_prefix("/openai/deployments/")?.split_once('/')?;
    of.strip_prefix(what)?.starts_with("?api-version=20").then_some(Some(deployment))
}

impl Wire for Azure {
    fn name(&self) -> &'static str {
        "azure"
    }

    fn base(&self) -> &'static str {
        ""
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        of(path, "chat/completions")
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        of(path, "embeddings")
    }

    fn key_header(&self) -> &'static str {
        "api-key"
    }

    fn request(&self, _request: &Request, body: &Value) -> Result<Value, String> {
        Ok(body.clone())
    }

    fn completion(&self, said: &Value) -> Value {
        let mut said = said.clone();
        said["choices"][0]["content_filter_results"] = json!({});
        said
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        let code = if error["code"].is_null() { json!(status.to_string()) } else { error["code"].clone() };
        (status, json!({"error": {"code": code, "message": error["message"], "param": error["param"]}}))
    }

    fn headers(&self, configured: RateHeaders) -> (RateHeaders, bool) {
        (if configured == RateHeaders::OpenAi { RateHeaders::Azure } else { configured }, true)
    }
}
