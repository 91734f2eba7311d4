//! System One's decisions, as llama.cpp's server gives them.

use serde_json::{Map, Value, json};

use super::gemini::{decided, question};
use super::{Wire, only};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct SystemOne;

impl Wire for SystemOne {
    fn name(&self) -> &'static str {
        "systemone"
    }

    fn base(&self) -> &'static str {
        "/systemone/v1"
    }

    fn chat<'a>(&self, _path: &'a str) -> Option<Option<&'a str>> {
        None
    }

    fn decides(&self, path: &str) -> bool {
        path == "/systemone/v1/systemone"
    }

    fn questions(&self, body: &Value) -> Result<Value, String> {
        only(body, "", &["model", "state", "questions"])?;
        let mut questions: Vec<Value> = Vec::new();
        for (name, one) in body["questions"].as_object().into_iter().flatten() {
            only(one, "questions.", &["type", "instructions", "criteria"])?;
            questions.push(question(name, one));
        }
        Ok(json!({"model": body["model"], "input": body["state"], "questions": questions}))
    }

    /// It knows no refusals: what is refused has no answer.
    fn decisions(&self, said: &Value) -> Value {
        let all = said["answers"].as_array().into_iter().flatten().filter(|answer| answer["type"] != "refusal");
        let mut answers = Map::new();
        for answer in all {
            let name = answer["name"].as_str().unwrap_or_default().to_owned();
            // Of a name that comes twice the first is left.
            answers.entry(name).or_insert_with(|| decided(answer));
        }
        let usage = json!({"input_tokens": said["usage"]["input_tokens"], "output_tokens": 0});
        json!({"model": said["model"], "answers": answers, "usage": usage})
    }

    fn request(&self, _request: &Request, _body: &Value) -> Result<Value, String> {
        Err("there are no chats".to_owned())
    }

    fn completion(&self, said: &Value) -> Value {
        said.clone()
    }

    /// A model that decides nothing is not implemented.
    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        let is_missing = error["code"] == "unknown_url";
        let status = if is_missing { 501 } else { status };
        let (kind, message) = if is_missing {
            ("not_supported_error", "This model is not a decision model".into())
        } else {
            ("invalid_request_error", error["message"].clone())
        };
        (status, json!({"error": {"code": status, "message": message, "type": kind}}))
    }

    fn headers(&self, _configured: RateHeaders) -> (RateHeaders, bool) {
        (RateHeaders::None, false)
    }
}
