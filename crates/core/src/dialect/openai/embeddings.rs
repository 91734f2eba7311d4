//! OpenAI's embeddings.
//!
//! Source: OpenAI's published API description (`/embeddings`): at most 2,048 inputs and 300,000 tokens a request.

use serde_json::Value;

use super::super::embeddings::{Embeddings, Texts, answers, reply};
use super::super::{Reply, Unread, parsed, tokens};
use crate::vector;

/// Dialects that speak as OpenAI does differ in the address alone.
pub(in super::super) struct OpenaiEmbeddings;

impl Embeddings for OpenaiEmbeddings {
    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{base}/embeddings")
    }

    fn most_texts(&self) -> usize {
        2_048
    }

    fn most_tokens(&self, _model: &str) -> u64 {
        300_000
    }

    fn body(&self, texts: &Texts) -> Value {
        texts.body([
            ("model", texts.model.into()),
            ("input", texts.texts.into()),
            ("encoding_format", texts.encoding_format().into()),
            ("dimensions", texts.length().into()),
            ("input_type", texts.input_type.into()),
        ])
    }

    fn reply(&self, body: &[u8], _texts: usize) -> Result<Reply, Unread> {
        let json = parsed(body)?;
        let data = json["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        // A vector without the index of its text belongs to none.
        let vectors = data.iter().filter_map(|one| Some((one["index"].as_u64()?, vector::read(&one["embedding"]))));
        let usage = &json["usage"];
        let input = tokens(&usage["prompt_tokens"]).filter(|n| *n > 0).or_else(|| tokens(&usage["total_tokens"]));
        Ok(reply(answers(vectors), input))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Usage;
    use crate::dialect::embeddings::Encoding;
    use proptest::prelude::*;
    use serde_json::{Map, json};

    #[test]
    fn answers_go_by_their_index() {
        let body = json!({
            "data": [
                {"index": 1, "embedding": [0.5, 1]},
                {"index": 0, "embedding": "AACAPwAAAMA="},
                {"embedding": [3, 4]},
                {"index": -1, "embedding": [3, 4]},
            ],
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        });
        let reply = OpenaiEmbeddings.reply(body.to_string().as_bytes(), 2).unwrap();
        assert_eq!(reply.text, "{\"100\":\"AACAPwAAAMA=\",\"101\":\"AAAAPwAAgD8=\"}");
        assert_eq!(reply.usage, Usage { input: Some(7), output: Some(0) });
        assert!(OpenaiEmbeddings.reply(b"{\"error\":{\"message\":\"no\"}}", 2).is_err());
        assert!(OpenaiEmbeddings.reply(b"<html>", 2).is_err());
    }

    #[test]
    fn a_request_names_length_and_encoding_as_long_as_they_are_not_refused() {
        let body = |encoding: Option<Encoding>| {
            OpenaiEmbeddings.body(&Texts {
                model: "m",
                texts: &["a".to_owned()],
                dimensions: 3,
                input_type: None,
                encoding,
                parameters: &Map::new(),
            })
        };
        let named = |of| json!({"model": "m", "input": ["a"], "encoding_format": of, "dimensions": 3});
        assert_eq!(body(Some(Encoding::Base64)), named("base64"));
        assert_eq!(body(Some(Encoding::Floats)), named("float"));
        assert_eq!(body(None), json!({"model": "m", "input": ["a"]}));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..60), text in "\\PC{0,60}") {
            let _ = OpenaiEmbeddings.reply(&bytes, 2);
            let _ = OpenaiEmbeddings.reply(text.as_bytes(), 2);
            let _ = OpenaiEmbeddings.reply(json!({"data": [{"index": 0, "embedding": text}]}).to_string().as_bytes(), 2);
        }
    }
}
