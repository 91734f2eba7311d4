//! Cohere's chat and embeddings, version 2.

use serde_json::{Value, json};

use super::{Wire, at_most, in_order, only, parts};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Cohere;

impl Wire for Cohere {
    fn name(&self) -> &'static str {
        "cohere"
    }

    fn base(&self) -> &'static str {
        "/v2"
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/v2/chat").then_some(None)
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        (path == "/v2/embed").then_some(None)
    }

    fn texts(&self, body: &Value) -> Result<Value, String> {
        only(body, "", &["model", "texts", "input_type", "embedding_types", "output_dimension", "truncate"])?;
        at_most(96, &body["texts"], "invalid request: total number of texts must be at most 96")?;
        let uses = ["search_document", "search_query", "classification", "clustering"];
        if !uses.contains(&body["input_type"].as_str().unwrap_or_default()) {
            return Err("invalid request: valid input_type must be provided with the provided model".to_owned());
        }
        Ok(json!({
            "model": body["model"], "input": body["texts"], "dimensions": body["output_dimension"],
            "encoding_format": body["embedding_types"][0],
        }))
    }

    fn vectors(&self, said: &Value) -> Value {
        let (vectors, tokens) = in_order(said);
        let name = if vectors.iter().any(|vector| vector.is_string()) { "base64" } else { "float" };
        json!({
            "id": "da6e531f", "embeddings": {name: vectors}, "texts": [],
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
            "response_type": "embeddings_by_type",
        })
    }

    fn request(&self, _request: &Request, body: &Value) -> Result<Value, String> {
        let known = ["model", "messages", "max_tokens", "response_format", "stream", "temperature", "seed", "thinking"];
        only(body, "", &known)?;
        let mut asked = body.clone();
        let schema = &body["response_format"]["json_schema"];
        if !schema.is_null() {
            let strict = schema["additionalProperties"] == false;
            let schema = json!({"name": "x", "strict": strict, "schema": schema});
            asked["response_format"] = json!({"type": "json_schema", "json_schema": schema});
        }
        Ok(asked)
    }

    fn completion(&self, said: &Value) -> Value {
        let (text, finish, [input, cached, output, _]) = parts(said);
        let reason = match finish {
            "length" => "MAX_TOKENS",
            "refusal" | "content_filter" => "ERROR_TOXIC",
            _ => "COMPLETE",
        };
        let content: Vec<Value> = text.map(|text| json!({"type": "text", "text": text})).into_iter().collect();
        let counts = json!({"input_tokens": input, "output_tokens": output});
        json!({
            "id": "c14c80c3", "finish_reason": reason, "message": {"role": "assistant", "content": content},
            "usage": {"billed_units": counts, "tokens": counts, "cached_tokens": cached},
        })
    }

    fn error(&self, status: u16, error: &Value, _wait: Option<u64>) -> (u16, Value) {
        let status = if error["code"] == "insufficient_quota" { 402 } else { status };
        (status, json!({"id": "x", "message": error["message"]}))
    }

    fn headers(&self, configured: RateHeaders) -> (RateHeaders, bool) {
        (if configured == RateHeaders::OpenAi { RateHeaders::None } else { configured }, true)
    }
}
