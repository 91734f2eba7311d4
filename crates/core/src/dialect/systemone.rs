//! System One, the interface of decision models: llama.cpp, vLLM, SGLang, Ollama and LiteLLM serve it. It answers no chats.
//!
//! Source: TypeSafe's published API reference (`/v1/systemone`), 2026, and llama.cpp's `tools/server/server-decision.cpp`:
//! questions and answers are members of objects, by names of one's own; a score is a place on a scale of 2 to 10 levels,
//! from 0. Ollama takes 64 questions; the number of choices depends on the model, 26 to 255.

use serde_json::Value;

use super::decisions::{self, Decisions, Questions};
use super::{Ask, Dialect, Reply, Unread, Usage, parsed, tokens};

pub(super) struct SystemOne;

impl Dialect for SystemOne {
    fn base_url(&self) -> Option<&'static str> {
        None
    }

    fn reserved(&self) -> &'static [&'static str] {
        &["model", "state", "questions"]
    }

    fn asks(&self) -> bool {
        false
    }

    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        Decisions::url(self, base)
    }

    fn body(&self, _ask: &Ask) -> Value {
        Value::Null
    }

    fn reply(&self, _body: &[u8]) -> Result<Reply, Unread> {
        Err(Unread::Other("the provider answers no chats"))
    }

    fn decisions(&self) -> Option<&'static dyn Decisions> {
        Some(&SystemOne)
    }
}

impl Decisions for SystemOne {
    fn url(&self, base: &str) -> String {
        format!("{base}/systemone")
    }

    fn most_questions(&self) -> usize {
        64
    }

    fn body(&self, questions: &Questions) -> Value {
        let all = decisions::by_number(questions.ids, questions.choices, &Value::Null);
        questions.body([("model", questions.model.into()), ("state", questions.input.into()), ("questions", all)], &[])
    }

    fn reply(&self, body: &[u8], ids: &[u16]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let usage = &said["usage"];
        let input = tokens(&usage["input_tokens"]).filter(|n| *n > 0);
        let output = tokens(&usage["output_tokens"]).or(Some(0));
        Ok(decisions::reply_by_number(body, ids, Usage { input, output }).consistent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Choices;
    use serde_json::{Map, json};

    fn body(choices: Choices) -> Value {
        let parameters = json!({"model": "x", "state": "y", "temperature": 0});
        let parameters: &Map<String, Value> = parameters.as_object().unwrap();
        let questions = Questions { model: "laya", input: "417: \"x\"\n", ids: &[417], choices, parameters };
        Decisions::body(&SystemOne, &questions)
    }

    #[test]
    fn a_request_is_written_as_documented() {
        let names = ["a".to_owned(), "b".to_owned()];
        let choices = |are_levels| Choices { names: &names, are_levels };
        let of = |question: Value| json!({"model": "laya", "state": "417: \"x\"\n", "questions": {"417": question}});
        let choice = json!({
            "type": "choice", "instructions": "Which label is right for text 417?", "criteria": {"a": null, "b": null},
        });
        assert_eq!(body(choices(false)), of(choice));
        let score = json!({"type": "score", "instructions": "What is the score of text 417?", "criteria": ["a", "b"]});
        assert_eq!(body(choices(true)), of(score));
        assert_eq!(Dialect::url(&SystemOne, "http://x/v1", "laya", None), "http://x/v1/systemone");
    }

    /// The form of llama.cpp's answer.
    #[test]
    fn answers_are_read() {
        let said = json!({
            "model": "laya",
            "answers": {
                "417": {"type": "choice", "choice": "b", "probabilities": {"a": 0.25, "b": 0.75}, "confidence": 0.5},
                "902": {"type": "score", "score": 1.5, "legend": {"0": "low", "1": "middle", "2": "high"},
                        "probabilities": {"0": 0.1, "1": 0.3, "2": 0.6}, "confidence": 0.0},
                "118": {"type": "noul", "noul": 0.5},
            },
            "usage": {"input_tokens": 103, "output_tokens": 0},
        });
        let read = |said: &Value| Decisions::reply(&SystemOne, said.to_string().as_bytes(), &[417, 902, 118]).unwrap();
        let reply = read(&said);
        assert_eq!(reply.text, "{\"417\":\"b\",\"902\":1.5}");
        assert_eq!((reply.confidence(417), reply.confidence(902)), (Some(0.75), Some(0.6)));
        assert_eq!(reply.usage, Usage { input: Some(103), output: Some(0) });
        for odd in [json!({}), json!({"answers": []}), json!({"answers": {"417": 3}}), json!({"answers": {"x": {}}})] {
            assert!(!read(&odd).text.contains("\"b\""), "{odd}");
        }
        let error =
            br#"{"error":{"code":501,"message":"This model is not a decision model","type":"not_supported_error"}}"#;
        assert!(Decisions::reply(&SystemOne, error, &[417]).is_err());
    }
}
