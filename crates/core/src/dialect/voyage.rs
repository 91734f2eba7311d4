//! Voyage's embeddings; it answers no chats.
//!
//! Source: Voyage's published API reference (`/v1/embeddings`), 2026. The tokens of a request are bounded by the model.

use serde_json::Value;

use super::embeddings::{Embeddings, Texts};
use super::openai::embeddings::OpenaiEmbeddings;
use super::{Ask, Dialect, Reply, Unread};

pub(super) struct Voyage;

impl Dialect for Voyage {
    fn base_url(&self) -> Option<&'static str> {
        Some("https://api.voyageai.com/v1")
    }

    fn reserved(&self) -> &'static [&'static str] {
        &["model", "input", "input_type", "truncation", "output_dimension", "output_dtype", "encoding_format"]
    }

    fn asks(&self) -> bool {
        false
    }

    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String {
        Embeddings::url(self, base, model, version)
    }

    fn body(&self, _ask: &Ask) -> Value {
        Value::Null
    }

    fn reply(&self, _body: &[u8]) -> Result<Reply, Unread> {
        Err(Unread::Other("the provider answers no chats"))
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&Voyage)
    }
}

impl Embeddings for Voyage {
    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String {
        OpenaiEmbeddings.url(base, model, version)
    }

    fn most_texts(&self) -> usize {
        1_000
    }

    fn most_tokens(&self, model: &str) -> u64 {
        match model {
            "voyage-4-lite" | "voyage-3.5-lite" => 1_000_000,
            "voyage-4" | "voyage-3.5" | "voyage-code-4" => 320_000,
            _ => 120_000,
        }
    }

    fn body(&self, texts: &Texts) -> Value {
        texts.body([
            ("model", texts.model.into()),
            ("input", texts.texts.into()),
            ("input_type", texts.input_type.into()),
            // There is a word for base64 alone.
            ("encoding_format", texts.encoding_format().filter(|format| *format == "base64").into()),
            ("output_dimension", texts.length().into()),
            // A text that is too long is refused, not cut without a word.
            ("truncation", false.into()),
        ])
    }

    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread> {
        OpenaiEmbeddings.reply(body, texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Usage;
    use crate::dialect::embeddings::Encoding;
    use serde_json::json;

    #[test]
    fn a_request_is_written_as_documented() {
        let parameters = json!({"truncation": true, "user": "u"});
        let body = |encoding| {
            let texts = ["a".to_owned()];
            Embeddings::body(
                &Voyage,
                &Texts {
                    model: "voyage-4",
                    texts: &texts,
                    dimensions: 3,
                    input_type: Some("document"),
                    encoding,
                    parameters: parameters.as_object().unwrap(),
                },
            )
        };
        let mut plain =
            json!({"model": "voyage-4", "input": ["a"], "input_type": "document", "truncation": false, "user": "u"});
        assert_eq!(body(None), plain);
        plain["output_dimension"] = 3.into();
        assert_eq!(body(Some(Encoding::Floats)), plain);
        plain["encoding_format"] = "base64".into();
        assert_eq!(body(Some(Encoding::Base64)), plain);
    }

    #[test]
    fn answers_are_read() {
        let said = json!({
            "object": "list", "data": [{"object": "embedding", "embedding": [0.5, 1], "index": 0}],
            "model": "voyage-4", "usage": {"total_tokens": 10},
        });
        let reply = Embeddings::reply(&Voyage, said.to_string().as_bytes(), 1).unwrap();
        assert_eq!(
            (reply.text.as_str(), reply.usage),
            ("{\"100\":\"AAAAPwAAgD8=\"}", Usage { input: Some(10), output: Some(0) })
        );
    }
}
