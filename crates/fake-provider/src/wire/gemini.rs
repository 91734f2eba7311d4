//! Gemini's generateContent, batchEmbedContents and decisions. It has no headers about limits, and says in an error's
//! details how long to wait.

use serde_json::{Map, Value, json};

use super::{Wire, at_most, in_order, message, only, parts};
use crate::RateHeaders;
use crate::http::Request;

pub(crate) struct Gemini;

impl Wire for Gemini {
    fn name(&self) -> &'static str {
        "gemini"
    }

    fn base(&self) -> &'static str {
        "/v1beta"
    }

    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        Some(Some(path.strip_prefix("/v1beta/models/")?.strip_suffix(":generateContent")?))
    }

    fn embeds<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        Some(Some(path.strip_prefix("/v1beta/models/")?.strip_suffix(":batchEmbedContents")?))
    }

    fn texts(&self, body: &Value) -> Result<Value, String> {
        only(body, "", &["requests"])?;
        let all = &body["requests"];
        let at_most_100 = "* BatchEmbedContentsRequest.requests: at most 100 requests can be in one batch";
        at_most(100, all, at_most_100)?;
        let mut texts: Vec<&Value> = Vec::new();
        for one in all.as_array().into_iter().flatten() {
            only(one, "requests.", &["model", "content", "taskType", "title", "outputDimensionality"])?;
            if !one["model"].as_str().is_some_and(|model| model.starts_with("models/")) {
                return Err("* EmbedContentRequest.model: unexpected model name format".to_owned());
            }
            texts.push(&one["content"]["parts"][0]["text"]);
        }
        Ok(json!({"input": texts, "dimensions": all[0]["outputDimensionality"]}))
    }

    fn vectors(&self, said: &Value) -> Value {
        let (vectors, tokens) = in_order(said);
        let all: Vec<Value> = vectors.iter().map(|vector| json!({"values": vector})).collect();
        json!({"embeddings": all, "usageMetadata": {"promptTokenCount": tokens}})
    }

    fn decides(&self, path: &str) -> bool {
        path == "/v1beta/decisions"
    }

    fn questions(&self, body: &Value) -> Result<Value, String> {
        only(body, "", &["model", "input", "questions"])?;
        let Some(model) = body["model"].as_str().and_then(|model| model.strip_prefix("models/")) else {
            return Err("* CreateDecisionRequest.model: unexpected model name format".to_owned());
        };
        let mut questions: Vec<Value> = Vec::new();
        for (name, one) in body["questions"].as_object().into_iter().flatten() {
            only(one, "questions.", &["type", "instructions", "criteria"])?;
            questions.push(question(name, one));
        }
        Ok(json!({"model": model, "input": body["input"], "questions": questions}))
    }

    /// It knows no refusal of a question. If all are refused, the input is blocked.
    fn decisions(&self, said: &Value) -> Value {
        let usage = &said["usage"];
        let usage = json!({
            "total_input_tokens": usage["input_tokens"], "total_output_tokens": 0, "total_tokens": usage["total_tokens"],
            "total_cached_tokens": usage["input_tokens_details"]["cached_tokens"],
        });
        let all = said["answers"].as_array().map(Vec::as_slice).unwrap_or_default();
        if !all.is_empty() && all.iter().all(|answer| answer["type"] == "refusal") {
            return json!({"prompt_feedback": {"block_reason": "prohibited_content"}, "usage": usage});
        }
        let mut answers = Map::new();
        for answer in all.iter().filter(|answer| answer["type"] != "refusal") {
            let name = answer["name"].as_str().unwrap_or_default().to_owned();
            // Of a name that comes twice the first is left.
            answers.entry(name).or_insert_with(|| decided(answer));
        }
        json!({"answers": answers, "usage": usage})
    }

    fn key_header(&self) -> &'static str {
        "x-goog-api-key"
    }

    fn request(&self, _request: &Request, body: &Value) -> Result<Value, String> {
        only(body, "", &["contents", "systemInstruction", "generationConfig", "safetySettings", "serviceTier"])?;
        let config = &body["generationConfig"];
        let known =
            ["maxOutputTokens", "responseMimeType", "responseJsonSchema", "temperature", "seed", "thinkingConfig"];
        only(config, "generation_config.", &known)?;
        let mut messages: Vec<Value> = Vec::new();
        if !body["systemInstruction"].is_null() {
            messages.push(message("system", &body["systemInstruction"]["parts"]));
        }
        for content in body["contents"].as_array().ok_or("contents is not specified")? {
            messages.push(message(if content["role"] == "model" { "assistant" } else { "user" }, &content["parts"]));
        }
        let mut asked = json!({
            "messages": messages, "max_tokens": config["maxOutputTokens"], "service_tier": body["serviceTier"],
        });
        let schema = &config["responseJsonSchema"];
        match config["responseMimeType"].as_str() {
            Some("application/json") if schema.is_null() => asked["response_format"] = json!({"type": "json_object"}),
            Some("application/json") => {
                let schema = json!({"name": "x", "strict": schema["additionalProperties"] == false, "schema": schema});
                asked["response_format"] = json!({"type": "json_schema", "json_schema": schema});
            }
            Some(_) => return Err("response_mime_type: allowed mimetypes are application/json".to_owned()),
            None if !schema.is_null() => {
                return Err("response_json_schema is only supported with response_mime_type".to_owned());
            }
            None => {}
        }
        Ok(asked)
    }

    fn completion(&self, said: &Value) -> Value {
        let (text, finish, [input, cached, output, thought]) = parts(said);
        let usage = json!({
            "promptTokenCount": input, "candidatesTokenCount": output - thought, "thoughtsTokenCount": thought,
            "cachedContentTokenCount": cached, "totalTokenCount": input + output,
        });
        if finish == "content_filter" {
            return json!({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage});
        }
        let reason = match finish {
            "length" => "MAX_TOKENS",
            "refusal" => "SAFETY",
            _ => "STOP",
        };
        let parts: Vec<Value> = text.map(|text| json!({"text": text})).into_iter().collect();
        let content = json!({"role": "model", "parts": parts});
        json!({
            "candidates": [{"content": content, "finishReason": reason, "index": 0}],
            "usageMetadata": usage, "modelVersion": said["model"],
        })
    }

    fn error(&self, status: u16, error: &Value, wait: Option<u64>) -> (u16, Value) {
        let of = |kind: &str, mut more: Value| {
            more["@type"] = format!("type.googleapis.com/google.rpc.{kind}").into();
            more
        };
        let (status, name, details) = match status {
            429 if error["code"] == "resource_unavailable" => (503, "UNAVAILABLE", vec![]),
            401 => (400, "INVALID_ARGUMENT", vec![of("ErrorInfo", json!({"reason": "API_KEY_INVALID"}))]),
            404 => (404, "NOT_FOUND", vec![]),
            429 => {
                let day = if error["code"] == "insufficient_quota" { "Day" } else { "Minute" };
                let id = format!("GenerateRequestsPer{day}PerProjectPerModel");
                let mut details = vec![of("QuotaFailure", json!({"violations": [{"quotaId": id}]}))];
                let delay =
                    |ms: u64| of("RetryInfo", json!({"retryDelay": format!("{}.{:03}s", ms / 1000, ms % 1000)}));
                details.extend(wait.map(delay));
                (429, "RESOURCE_EXHAUSTED", details)
            }
            500 => (500, "INTERNAL", vec![]),
            503 => (503, "UNAVAILABLE", vec![]),
            status => (status, "INVALID_ARGUMENT", vec![]),
        };
        let error = json!({"code": status, "message": error["message"], "status": name, "details": details});
        (status, json!({"error": error}))
    }

    fn headers(&self, _configured: RateHeaders) -> (RateHeaders, bool) {
        (RateHeaders::None, false)
    }
}

/// A member of an object of questions, as one of a list.
pub(super) fn question(name: &str, one: &Value) -> Value {
    let mut asked = json!({"type": one["type"], "name": name, "instructions": one["instructions"]});
    if one["type"] == "score" {
        let levels = one["criteria"].as_array().into_iter().flatten();
        asked["levels"] = levels.map(|label| json!({"label": label})).collect();
    } else {
        let labels = one["criteria"].as_object().into_iter().flatten();
        asked["choices"] = labels.map(|(label, _)| json!({"value": label})).collect();
    }
    asked
}

/// An answer of a list, as a member of an object: what is listed there has a name of its own here.
pub(super) fn decided(answer: &Value) -> Value {
    let all = || answer["probabilities"].as_array().into_iter().flatten();
    let key = |one: &Value| one["value"].as_str().map_or_else(|| one["value"].to_string(), str::to_owned);
    let probabilities: Map<String, Value> = all().map(|one| (key(one), one["probability"].clone())).collect();
    let mut decided =
        json!({"type": answer["type"], "confidence": answer["confidence"], "probabilities": probabilities});
    if answer["type"] == "score" {
        decided["score"] = answer["score"].clone();
        decided["legend"] = all().map(|one| (key(one), one["label"].clone())).collect::<Map<_, _>>().into();
    } else {
        decided["choice"] = answer["choice"].clone();
    }
    decided
}
