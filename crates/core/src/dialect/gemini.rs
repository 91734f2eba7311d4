//! Gemini's generateContent, batchEmbedContents and decisions.
//!
//! Source: Google's published API reference (the first two, and rate limits) and Python client (decisions), late 2026. The
//! key goes into a header, never into the URL.

use serde_json::{Map, Value, json};

use super::decisions::{self, Decisions, Questions};
use super::embeddings::{Embeddings, Texts, in_order, reply};
use super::{Ask, Dialect, Finish, Format, Reply, Unread, Usage, parsed, segment, tokens};
use crate::class::{Parameter, Trouble};
use crate::vector;

pub(super) struct Gemini;

/// In both spellings that are taken there.
const RESERVED: [&str; 17] = [
    "model",
    "contents",
    "systemInstruction",
    "system_instruction",
    "generationConfig",
    "generation_config",
    "maxOutputTokens",
    "max_output_tokens",
    "responseMimeType",
    "responseSchema",
    "responseJsonSchema",
    "candidateCount",
    "candidate_count",
    "response_mime_type",
    "response_schema",
    "response_json_schema",
    "stream",
];

/// Parameters of a request. All others are of its `generationConfig`.
const OF_REQUEST: [&str; 7] = ["safetySettings", "cachedContent", TIER, "labels", "tools", "toolConfig", "store"];
const TIER: &str = "serviceTier";

impl Dialect for Gemini {
    fn base_url(&self) -> Option<&'static str> {
        Some("https://generativelanguage.googleapis.com/v1beta")
    }

    fn reserved(&self) -> &'static [&'static str] {
        &RESERVED
    }

    fn tier_parameter(&self) -> Option<&'static str> {
        Some(TIER)
    }

    fn url(&self, base: &str, model: &str, _version: Option<&str>) -> String {
        format!("{base}/models/{}:generateContent", segment(bare(model)))
    }

    fn key_header(&self) -> (&'static str, &'static str) {
        ("x-goog-api-key", "")
    }

    fn body(&self, ask: &Ask) -> Value {
        let mut config = Map::new();
        config.insert("maxOutputTokens".to_owned(), ask.max_tokens.into());
        if let Some(format) = ask.format {
            config.insert("responseMimeType".to_owned(), "application/json".into());
            if let Format::Schema { schema, .. } = format {
                config.insert("responseJsonSchema".to_owned(), schema.clone());
            }
        }
        let mut body = Map::new();
        if !ask.no_system_role {
            body.insert("systemInstruction".to_owned(), json!({"parts": [{"text": ask.system}]}));
        }
        body.insert("contents".to_owned(), json!([{"role": "user", "parts": [{"text": ask.user()}]}]));
        for (key, value) in ask.others(&RESERVED) {
            if OF_REQUEST.contains(&key.as_str()) { &mut body } else { &mut config }.insert(key, value);
        }
        ask.set_tier(&mut body, TIER);
        body.insert("generationConfig".to_owned(), config.into());
        body.into()
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let candidate = said["candidates"].as_array().and_then(|all| all.first()).unwrap_or(&Value::Null);
        let parts = candidate["content"]["parts"].as_array().map(Vec::as_slice).unwrap_or_default();
        let (thoughts, texts): (Vec<&Value>, Vec<&Value>) = parts.iter().partition(|part| part["thought"] == true);
        let text: String = texts.iter().filter_map(|part| part["text"].as_str()).collect();
        let finish = match candidate["finishReason"].as_str() {
            Some("MAX_TOKENS") => Finish::Length,
            Some("SAFETY" | "RECITATION" | "LANGUAGE" | "BLOCKLIST" | "PROHIBITED_CONTENT" | "SPII") => Finish::Refused,
            None if !said["promptFeedback"]["blockReason"].is_null() => Finish::Refused,
            _ => Finish::Complete,
        };
        let usage = &said["usageMetadata"];
        let thought = tokens(&usage["thoughtsTokenCount"]);
        let input = tokens(&usage["promptTokenCount"]).filter(|n| *n > 0);
        let beyond = || tokens(&usage["totalTokenCount"])?.checked_sub(input?);
        let written = tokens(&usage["candidatesTokenCount"]).map(|n| n + thought.unwrap_or(0)).or_else(beyond);
        Ok(Reply {
            finish,
            has_reasoning: !thoughts.is_empty(),
            usage: Usage { input, output: written.filter(|n| *n < 1 << 32 && (*n > 0 || text.is_empty())) },
            thought,
            cached_input: tokens(&usage["cachedContentTokenCount"]).unwrap_or(0),
            is_flex: usage[TIER].as_str().is_some_and(|tier| tier.eq_ignore_ascii_case("flex")),
            text,
            ..Reply::default()
        }
        .consistent())
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&Gemini)
    }

    fn decisions(&self) -> Option<&'static dyn Decisions> {
        Some(&Gemini)
    }

    fn trouble(&self, status: u16, error: &Value, words: &str) -> Option<Trouble> {
        let details = error["details"].as_array().map(Vec::as_slice).unwrap_or_default();
        if status == 400 && details.iter().any(|d| d["reason"] == "API_KEY_INVALID") {
            return Some(Trouble::Auth);
        }
        // The wait that is printed beside the quota of a day is not that of the day.
        let is_of_day = |violation: &Value| violation["quotaId"].as_str().is_some_and(|id| id.contains("PerDay"));
        let mut violations = details.iter().filter_map(|d| d["violations"].as_array()).flatten();
        if status == 429 && violations.any(is_of_day) {
            return Some(Trouble::Quota(None));
        }
        let of_form = ["response_mime_type", "responsemimetype", "response_schema", "response_json_schema"];
        let is_of_form = || of_form.iter().chain(&["responseschema", "responsejsonschema"]).any(|w| words.contains(w));
        (status == 400 && is_of_form()).then_some(Trouble::Unsupported(Parameter::ResponseFormat))
    }
}

/// The name of a model without what stands before it in paths.
fn bare(model: &str) -> &str {
    model.strip_prefix("models/").unwrap_or(model)
}

impl Embeddings for Gemini {
    fn url(&self, base: &str, model: &str, _version: Option<&str>) -> String {
        format!("{base}/models/{}:batchEmbedContents", segment(bare(model)))
    }

    fn most_texts(&self) -> usize {
        100
    }

    /// No bound of all texts together is published; that of one is 8,192.
    fn most_tokens(&self, _model: &str) -> u64 {
        200_000
    }

    /// Each text counts as a request.
    fn inputs_per_minute(&self, requests_per_minute: Option<u64>) -> Option<u64> {
        requests_per_minute
    }

    /// Each text is a request, with all that is said of vectors.
    fn body(&self, texts: &Texts) -> Value {
        let of = |text: &String| {
            texts.body([
                ("model", format!("models/{}", bare(texts.model)).into()),
                ("content", json!({"parts": [{"text": text}]})),
                ("taskType", texts.input_type.into()),
                ("outputDimensionality", texts.length().into()),
            ])
        };
        json!({"requests": texts.texts.iter().map(of).collect::<Vec<Value>>()})
    }

    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let all = said["embeddings"].as_array().map(Vec::as_slice).unwrap_or_default();
        let vectors = all.iter().map(|one| vector::read(&one["values"]).map(of_length_one));
        Ok(reply(in_order(vectors, texts), tokens(&said["usageMetadata"]["promptTokenCount"])))
    }
}

impl Decisions for Gemini {
    fn most_questions(&self) -> usize {
        1_000
    }

    fn body(&self, questions: &Questions) -> Value {
        let all = decisions::by_number(questions.ids, questions.choices, &"".into());
        let model = format!("models/{}", bare(questions.model));
        questions.body([("model", model.into()), ("input", questions.input.into()), ("questions", all)], &[])
    }

    fn reply(&self, body: &[u8], ids: &[u16]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let usage = &said["usage"];
        let input = tokens(&usage["total_input_tokens"]).filter(|n| *n > 0);
        let output = tokens(&usage["total_output_tokens"]).or(Some(0));
        let reply = decisions::reply_by_number(body, ids, Usage { input, output });
        let is_blocked = !said["prompt_feedback"]["block_reason"].is_null();
        Ok(Reply {
            finish: if is_blocked { Finish::Refused } else { Finish::Complete },
            cached_input: tokens(&usage["total_cached_tokens"]).unwrap_or(0),
            ..reply
        }
        .consistent())
    }
}

/// A vector that was shortened has not the length that distances are measured by.
fn of_length_one(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|n| f64::from(*n).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|n| *n = (f64::from(*n) / length) as f32);
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Choices;
    use crate::dialect::tests::{ask, schema};
    use crate::limiter::Tokens;
    use crate::options::ServiceTier;

    #[test]
    fn a_request_is_written_as_documented() {
        let parameters = json!({
            "temperature": 0, "thinkingConfig": {"thinkingBudget": 0}, "serviceTier": "flex", "maxOutputTokens": 1,
            "generationConfig": {},
        });
        let format = schema(true);
        let body = Dialect::body(&Gemini, &Ask { format: Some(&format), ..ask(&parameters) });
        let want = json!({
            "systemInstruction": {"parts": [{"text": "s"}]},
            "contents": [{"role": "user", "parts": [{"text": "u"}]}],
            "serviceTier": "flex",
            "generationConfig": {
                "maxOutputTokens": 9, "responseMimeType": "application/json", "responseJsonSchema": {"type": "object"},
                "temperature": 0, "thinkingConfig": {"thinkingBudget": 0},
            },
        });
        assert_eq!(body, want);
        let of = |tier| Dialect::body(&Gemini, &Ask { tier, ..ask(&parameters) })["serviceTier"].clone();
        assert_eq!((of(ServiceTier::Flex), of(ServiceTier::FlexOrDefault)), (json!("flex"), json!(null)));
        let parameters = json!({});
        let of = |tier| Dialect::body(&Gemini, &Ask { tier, ..ask(&parameters) })["serviceTier"].clone();
        assert_eq!((of(ServiceTier::Flex), of(ServiceTier::Default)), (json!("flex"), json!(null)));
        let body =
            Dialect::body(&Gemini, &Ask { no_system_role: true, format: Some(&Format::Json), ..ask(&parameters) });
        assert_eq!(body.get("systemInstruction"), None);
        assert_eq!(body["contents"][0]["parts"][0]["text"], "s\n\nu");
        assert_eq!(body["generationConfig"], json!({"maxOutputTokens": 9, "responseMimeType": "application/json"}));
        for model in ["gemini-3.8-flash", "models/gemini-3.8-flash"] {
            assert_eq!(
                Dialect::url(&Gemini, "https://x/v1beta", model, None),
                "https://x/v1beta/models/gemini-3.8-flash:generateContent"
            );
        }
        assert_eq!(
            Dialect::url(&Gemini, "https://x", "a/../b?key=1#", None),
            "https://x/models/a%2F..%2Fb%3Fkey%3D1%23:generateContent"
        );
    }

    #[test]
    fn decisions_are_asked_and_read_as_documented() {
        let parameters = json!({"thinkingConfig": {"thinkingLevel": "minimal"}});
        let body = Decisions::body(
            &Gemini,
            &Questions {
                model: "gemini-decision-1",
                input: "417: \"x\"\n",
                ids: &[417],
                choices: Choices { names: &["a".to_owned(), "b".to_owned()], are_levels: false },
                parameters: parameters.as_object().unwrap(),
            },
        );
        let question = json!({
            "type": "choice", "instructions": "Which label is right for text 417?", "criteria": {"a": "", "b": ""},
        });
        let input = "417: \"x\"\n";
        assert_eq!(body, json!({"model": "models/gemini-decision-1", "input": input, "questions": {"417": question}}));
        assert_eq!(Decisions::url(&Gemini, "https://x/v1beta"), "https://x/v1beta/decisions");
        let of = |said: &str| Decisions::reply(&Gemini, said.as_bytes(), &[417, 902]).unwrap();
        let reply = of(
            r#"{"answers": {"417": {"type": "choice", "choice": "b", "confidence": 0.9, "probabilities": {"a": 0.1, "b": 0.9}},
                "902": {"type": "choice", "choice": "a"}, "902": {"type": "choice", "choice": "b"}, "x": 1},
                "usage": {"total_input_tokens": 10, "total_cached_tokens": 4, "total_output_tokens": 0, "total_tokens": 10}}"#,
        );
        assert_eq!(reply.text, r#"{"417":"b","902":"a","902":"b"}"#);
        assert_eq!((reply.usage, reply.cached_input), (Usage { input: Some(10), output: Some(0) }, 4));
        let blocked = of(r#"{"prompt_feedback": {"block_reason": "safety"}, "usage": {"total_input_tokens": 10}}"#);
        assert_eq!((blocked.finish, blocked.text.as_str()), (Finish::Refused, "{}"));
        for odd in
            ["{}", r#"{"answers": []}"#, r#"{"answers": {"417": 3}, "answers": {}}"#, r#"{"answers": {"417": null}}"#]
        {
            assert!(!of(odd).text.contains('b'), "{odd}");
        }
    }

    #[test]
    fn answers_are_read() {
        let of = |said: Value| Dialect::reply(&Gemini, said.to_string().as_bytes()).unwrap();
        let reply = of(json!({
            "candidates": [{"content": {"role": "model", "parts": [{"text": "hm", "thought": true}, {"text": "{}"}]},
                            "finishReason": "STOP", "index": 0}],
            "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 20, "thoughtsTokenCount": 5,
                              "cachedContentTokenCount": 8, "totalTokenCount": 35},
            "modelVersion": "gemini-3.8-flash",
        }));
        assert_eq!((reply.text.as_str(), reply.finish, reply.has_reasoning), ("{}", Finish::Complete, true));
        assert_eq!(reply.usage.whole(), Some(Tokens { input: 10, output: 25 }));
        assert_eq!((reply.thought, reply.cached_input), (Some(5), 8));
        for (reason, finish) in [
            ("MAX_TOKENS", Finish::Length),
            ("SAFETY", Finish::Refused),
            ("PROHIBITED_CONTENT", Finish::Refused),
            ("SOMETHING_NEW", Finish::Complete),
        ] {
            assert_eq!(of(json!({"candidates": [{"finishReason": reason}]})).finish, finish, "{reason}");
        }
        let blocked = of(json!({
            "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
            "usageMetadata": {"promptTokenCount": 10, "totalTokenCount": 10},
        }));
        assert_eq!((blocked.finish, blocked.usage.whole()), (Finish::Refused, Some(Tokens { input: 10, output: 0 })));
    }
}
