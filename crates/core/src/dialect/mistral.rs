//! Mistral: OpenAI's wire, with names of its own.
//!
//! Source: Mistral's published API description and SDK, 2026. Its limits are in `x-ratelimit-*-minute` and `-month`. It publishes
//! no bound of a request's texts; all of them together may have 16,384 tokens, by what its clients keep to.

use serde_json::Value;

use super::embeddings::{Embeddings, Texts};
use super::openai::embeddings::OpenaiEmbeddings;
use super::{Ask, Dialect, Reply, Unread, openai};
use crate::class::Trouble;

pub(super) struct Mistral;

impl Dialect for Mistral {
    fn base_url(&self) -> Option<&'static str> {
        Some("https://api.mistral.ai/v1")
    }

    fn reserved(&self) -> &'static [&'static str] {
        &openai::RESERVED
    }

    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String {
        openai::Openai.url(base, model, version)
    }

    /// The cap has one name, whatever a refusal seems to say; a seed has another one.
    fn body(&self, ask: &Ask) -> Value {
        let mut body = openai::Openai.body(&Ask { max_completion_tokens: false, ..*ask });
        if let Value::Object(map) = &mut body
            && let Some(seed) = map.remove("seed")
        {
            map.insert("random_seed".to_owned(), seed);
        }
        body
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        openai::Openai.reply(body)
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&Mistral)
    }

    /// Texts that are too many together.
    fn trouble(&self, status: u16, _error: &Value, words: &str) -> Option<Trouble> {
        let is_large = words.contains("too many tokens overall") || words.contains("too many inputs");
        (status == 400 && is_large).then_some(Trouble::TooLarge)
    }
}

impl Embeddings for Mistral {
    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String {
        OpenaiEmbeddings.url(base, model, version)
    }

    fn most_texts(&self) -> usize {
        256
    }

    fn most_tokens(&self, _model: &str) -> u64 {
        16_000
    }

    /// The length of a vector has another name. Nothing says what vectors are for.
    fn body(&self, texts: &Texts) -> Value {
        texts.body([
            ("model", texts.model.into()),
            ("input", texts.texts.into()),
            ("encoding_format", texts.encoding_format().into()),
            ("output_dimension", texts.length().into()),
        ])
    }

    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread> {
        OpenaiEmbeddings.reply(body, texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::tests::{ask, schema};
    use serde_json::json;

    #[test]
    fn a_request_is_written_as_documented() {
        let (parameters, format) = (json!({"seed": 7, "safe_prompt": false}), schema(true));
        let asked = Ask { format: Some(&format), max_completion_tokens: true, ..ask(&parameters) };
        let format = json!({"name": "answers", "strict": true, "schema": {"type": "object"}});
        let want = json!({
            "model": "m",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "max_tokens": 9,
            "response_format": {"type": "json_schema", "json_schema": format},
            "safe_prompt": false,
            "random_seed": 7,
        });
        assert_eq!(Dialect::body(&Mistral, &asked), want);
    }
}
