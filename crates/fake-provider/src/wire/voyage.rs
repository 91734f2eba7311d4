//! Voyage's embeddings: OpenAI's, with its own names and errors.

use serde_json::{Value, json};

use super::{Wire, at_most, only};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Voyage;

impl Wire for Voyage {
    fn name(&self) -> &'static str {
        "voyage"
    }

    fn base(&self) -> &'static str {
        "/voyage/v1"
    }

    fn chat<'a>(&self, _path: &'a str) -> Option<Option<&'a str>> {
        None
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/voyage/v1/embeddings").then_some(None)
    }

    fn texts(&self, body: &Value) -> Result<Value, String> {
        only(
            body,
            "",
            &["model", "input", "input_type", "truncation", "output_dimension", "output_dtype", "encoding_format"],
        )?;
        if !(body["output_dtype"].is_null() || body["output_dtype"] == "float") {
            return Err("output_dtype: others than float are not made here".to_owned());
        }
        at_most(1_000, &body["input"], "The batch size limit is 1000.")?;
        let mut asked = body.clone();
        asked["dimensions"] = asked["output_dimension"].take();
        Ok(asked)
    }

    fn vectors(&self, said: &Value) -> Value {
        let mut said = said.clone();
        said["usage"] = json!({"total_tokens": said["usage"]["total_tokens"]});
        said
    }

    fn request(&self, _request: &Request, _body: &Value) -> Result<Value, String> {
        Err("there are no chats".to_owned())
    }

    fn completion(&self, said: &Value) -> Value {
        said.clone()
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        let status = if error["code"] == "insufficient_quota" { 402 } else { status };
        (status, json!({"detail": error["message"]}))
    }

    fn headers(&self, _configured: RateHeaders) -> (RateHeaders, bool) {
        (RateHeaders::None, false)
    }
}
