//! OpenAI's decisions, as vLLM serves them too.
//!
//! Source: OpenAI's published Python client, `/decisions`: 1 to 400 questions, 2 to 255 choices each. vLLM takes 200
//! questions and 26 choices.

use serde_json::Value;

use super::super::decisions::{Decisions, Questions, named, question, reply};
use super::super::{Reply, Unread, Usage, parsed, tokens};

pub(in super::super) struct OpenaiDecisions;

/// Further members that a request may have.
const MAY_HAVE: [&str; 3] = ["prompt_cache_key", "prompt_cache_options", "safety_identifier"];

impl Decisions for OpenaiDecisions {
    fn most_questions(&self) -> usize {
        200
    }

    fn body(&self, questions: &Questions) -> Value {
        let all: Vec<Value> = questions.ids.iter().map(|id| question(*id, questions.choices)).collect();
        questions.body(
            [("model", questions.model.into()), ("input", questions.input.into()), ("questions", all.into())],
            &MAY_HAVE,
        )
    }

    fn reply(&self, body: &[u8], ids: &[u16]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let answers = said["answers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let usage = &said["usage"];
        let input = tokens(&usage["input_tokens"]).or_else(|| tokens(&usage["prompt_tokens"])).filter(|n| *n > 0);
        let output = tokens(&usage["output_tokens"]).or(Some(0));
        let cached_input = tokens(&usage["input_tokens_details"]["cached_tokens"]).unwrap_or(0);
        let written_input = tokens(&usage["input_tokens_details"]["cache_write_tokens"]).unwrap_or(0);
        let reply = reply(named(answers, ids), ids, Usage { input, output });
        Ok(Reply { cached_input, written_input, ..reply }.consistent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Choices;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn a_request_is_written_as_documented() {
        let parameters = json!({"prompt_cache_key": "k", "reasoning_effort": "none", "model": "x", "temperature": 0});
        let body = OpenaiDecisions.body(&Questions {
            model: "gpt-6-luna",
            input: "Labels:\na\nb\n\n417: \"x\"\n",
            ids: &[417],
            choices: Choices { names: &["a".to_owned(), "b".to_owned()], are_levels: false },
            parameters: parameters.as_object().unwrap(),
        });
        let question = json!({
            "type": "choice", "name": "417", "instructions": "Which label is right for text 417?",
            "choices": [{"value": "a"}, {"value": "b"}],
        });
        let input = "Labels:\na\nb\n\n417: \"x\"\n";
        assert_eq!(
            body,
            json!({"prompt_cache_key": "k", "model": "gpt-6-luna", "input": input, "questions": [question]})
        );
        assert_eq!(OpenaiDecisions.url("https://x/v1"), "https://x/v1/decisions");
        let levels = Choices { names: &["1".to_owned(), "2".to_owned()], are_levels: true };
        let question = json!({
            "type": "score", "name": "417", "instructions": "What is the score of text 417?",
            "levels": [{"label": "1"}, {"label": "2"}],
        });
        let parameters = &serde_json::Map::new();
        let questions = Questions { model: "m", input, ids: &[417], choices: levels, parameters };
        assert_eq!(OpenaiDecisions.body(&questions)["questions"], json!([question]));
    }

    #[test]
    fn answers_are_read() {
        let said = json!({
            "model": "gpt-6-luna",
            "answers": [
                {"type": "choice", "name": "417", "choice": "b", "confidence": 0.9,
                 "probabilities": [{"value": "a", "probability": 0.1}, {"value": "b", "probability": 0.9}]},
                {"type": "refusal", "name": "902"},
                {"type": "score", "name": "118", "score": 1.8, "confidence": 0.7,
                 "probabilities": [{"value": 1, "label": "2", "probability": 0.2}, {"value": 2, "label": "3", "probability": 0.8}]},
            ],
            "usage": {"input_tokens": 812, "input_tokens_details": {"cached_tokens": 512, "cache_write_tokens": 0},
                      "output_tokens": 0, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 812},
        });
        let reply = OpenaiDecisions.reply(said.to_string().as_bytes(), &[417, 902, 118]).unwrap();
        assert_eq!((reply.text.as_str(), reply.refused.as_slice()), ("{\"417\":\"b\",\"118\":1.8}", &[902][..]));
        assert_eq!((reply.confidence(417), reply.confidence(118)), (Some(0.9), Some(0.8)));
        assert_eq!((reply.usage, reply.cached_input), (Usage { input: Some(812), output: Some(0) }, 512));
        assert!(OpenaiDecisions.reply(b"{\"error\":{\"message\":\"no\"}}", &[417]).is_err());
        assert!(OpenaiDecisions.reply(b"<html>", &[417]).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..60), json in r#"[{}\[\]":,a-z0-9]{0,60}"#) {
            for body in [bytes, json.clone().into_bytes(), format!("{{\"answers\":[{json}]}}").into_bytes()] {
                let _ = OpenaiDecisions.reply(&body, &[417, 902]);
            }
        }
    }
}
