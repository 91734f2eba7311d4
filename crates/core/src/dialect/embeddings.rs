//! Endpoints for embeddings: texts go in as they are, and a vector of each comes back.
//!
//! The answer is rewritten into the form of a chat's answers: an object of numbers, three digits each, and values. So
//! everything behind this knows one form of answers, and holds each row's value against its task.

use serde_json::{Map, Value};

use super::{Finish, Reply, Unread, Usage};

/// The number of the first text of a request; those of the others follow.
pub const FIRST_NUMBER: u16 = 100;

/// The part of a dialect that embeds texts.
pub trait Embeddings: Sync {
    /// The address of a model. `base`: without a slash at its end.
    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String;

    /// Most texts of a request.
    fn most_texts(&self) -> usize;

    /// Most tokens of a request to a model, all texts together.
    fn most_tokens(&self, model: &str) -> u64;

    /// Most texts a minute that the provider takes, unless the user says how many; by the limit of requests that the model
    /// has.
    fn inputs_per_minute(&self, _requests_per_minute: Option<u64>) -> Option<u64> {
        None
    }

    /// The body of a request.
    fn body(&self, texts: &Texts) -> Value;

    /// Reads the body of a 2xx to a request of so many texts: the reply's text is an object of numbers and vectors.
    ///
    /// # Errors
    /// If it is no answer, or carries an error.
    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread>;
}

/// The encoding of vectors. Their length is named as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Its bytes in base64.
    Base64,
    /// Its numbers.
    Floats,
}

/// The parts of a request.
#[derive(Debug)]
pub struct Texts<'a> {
    /// The provider's name of the model.
    pub model: &'a str,
    /// The texts, in the order of their numbers.
    pub texts: &'a [String],
    /// Numbers of a vector.
    pub dimensions: u32,
    /// The use of the vectors.
    pub input_type: Option<&'a str>,
    /// The encoding that is asked for. `None`: neither the length nor the encoding of vectors is named.
    pub encoding: Option<Encoding>,
    /// Further parameters, as the user set them for the model.
    pub parameters: &'a Map<String, Value>,
}

impl Texts<'_> {
    /// The encoding of vectors, if one is asked for.
    pub(super) fn encoding_format(&self) -> Option<&'static str> {
        self.encoding.map(|encoding| if encoding == Encoding::Base64 { "base64" } else { "float" })
    }

    /// Their length, if that is asked for.
    pub(super) fn length(&self) -> Option<u32> {
        self.encoding.map(|_| self.dimensions)
    }

    /// A body with those of these members that are not null, and the user's parameters that are not among them.
    pub(super) fn body<const N: usize>(&self, own: [(&str, Value); N]) -> Value {
        let is_own = |key: &str| own.iter().any(|(own, _)| *own == key);
        let mut body: Map<String, Value> =
            self.parameters.iter().filter(|(key, _)| !is_own(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        body.extend(own.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.to_owned(), value)));
        body.into()
    }
}

/// A reply with these vectors, for a request that took so many tokens.
pub(super) fn reply(text: String, input: Option<u64>) -> Reply {
    Reply {
        text,
        finish: Finish::Complete,
        has_reasoning: false,
        usage: Usage { input: input.filter(|n| *n > 0), output: Some(0) },
        thought: Some(0),
        cached_input: 0,
        refused: Vec::new(),
        written_input: 0,
    }
}

/// The vectors of an answer that names no places: they go by their order if there are as many as there are texts. Else
/// nobody knows which is whose, and no text has one.
pub(super) fn in_order(vectors: impl IntoIterator<Item = Option<Vec<f32>>>, texts: usize) -> String {
    let all: Vec<Option<Vec<f32>>> = vectors.into_iter().collect();
    if all.len() == texts { answers((0..).zip(all)) } else { answers([]) }
}

/// The vectors of an answer, each with the place of its text, as JSON of numbers and values. A text with two vectors has
/// none: nobody knows which is its own. `None` is a vector that cannot be read.
pub(super) fn answers(vectors: impl IntoIterator<Item = (u64, Option<Vec<f32>>)>) -> String {
    let mut by_number = std::collections::BTreeMap::<u16, Vec<Option<Vec<f32>>>>::new();
    for (index, vector) in vectors {
        let number = u16::try_from(index).ok().and_then(|n| n.checked_add(FIRST_NUMBER)).filter(|n| *n < 1_000);
        if let Some(number) = number {
            by_number.entry(number).or_default().push(vector);
        }
    }
    let only = |(number, mut all): (u16, Vec<Option<Vec<f32>>>)| {
        let vector = all.pop().filter(|_| all.is_empty())?;
        // A number that is not finite is written as null, and then it is no vector.
        Some(format!("\"{number}\":{}", serde_json::to_string(&vector).unwrap_or_else(|_| "null".to_owned())))
    };
    format!("{{{}}}", by_number.into_iter().filter_map(only).collect::<Vec<_>>().join(","))
}

/// A vector as JSON or base64 has it: numbers, or their bytes in single precision, the lowest byte first.
pub(super) fn vector(said: &Value) -> Option<Vec<f32>> {
    match said {
        Value::String(text) => {
            let bytes = base64(text)?;
            let (numbers, rest) = bytes.as_chunks::<4>();
            rest.is_empty().then(|| numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        Value::Array(numbers) => numbers.iter().map(|n| n.as_f64().map(|n| n as f32)).collect(),
        _ => None,
    }
}

/// The bytes of a text in base64; `None` if it is none.
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for four in text.chunks(4) {
        let mut bits = 0u32;
        for c in four {
            let value = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'+' | b'-' => 62,
                b'/' | b'_' => 63,
                _ => return None,
            };
            bits = (bits << 6) | u32::from(value);
        }
        let missing = 4 - four.len();
        if missing == 3 {
            return None;
        }
        let [_, all @ ..] = (bits << (6 * missing)).to_be_bytes();
        bytes.extend(all.iter().take(3 - missing));
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn base64_is_read_as_written_by_others() {
        for (text, bytes) in
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar"), ("Zg", "f")]
        {
            assert_eq!(base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!((base64("Z"), base64("Zm9v Zg"), base64("Zä")), (None, None, None));
        assert_eq!(vector(&json!("AACAPwAAAMA=")), Some(vec![1.0, -2.0]));
        assert_eq!(vector(&json!("AACAPwAA")), None);
    }

    #[test]
    fn vectors_without_places_are_as_many_as_the_texts() {
        let all = || [Some(vec![1.0]), None];
        assert_eq!(in_order(all(), 2), "{\"100\":[1.0],\"101\":null}");
        assert_eq!((in_order(all(), 1), in_order(all(), 3)), ("{}".to_owned(), "{}".to_owned()));
    }

    #[test]
    fn a_place_that_is_doubled_or_beyond_all_has_no_answer() {
        let one = || Some(vec![1.0]);
        assert_eq!(
            answers([(1, one()), (0, None), (2, one()), (2, one()), (900, one()), (u64::MAX, one())]),
            "{\"100\":null,\"101\":[1.0]}"
        );
        assert_eq!(answers([(0, Some(vec![f32::NAN, f32::INFINITY]))]), "{\"100\":[null,null]}");
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,40}", coded in "[A-Za-z0-9+/=]{0,40}") {
            let _ = (vector(&json!(text)), vector(&json!(coded)));
        }
    }
}
