//! Endpoints for embeddings: texts go in as they are, and a vector of each comes back.
//!
//! The answer is rewritten into an object of numbers and vectors, these in one form ([`crate::vector`]) whatever the
//! provider's is. So everything behind this knows one form of answers, and holds each row's value against its task.

use serde_json::{Map, Value};

use super::{Reply, Unread, Usage};
use crate::vector;

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
        usage: Usage { input: input.filter(|n| *n > 0), output: Some(0) },
        thought: Some(0),
        ..Reply::default()
    }
}

/// The vectors of an answer that names no places: they go by their order if there are as many as there are texts. Else
/// nobody knows which is whose, and no text has one.
pub(super) fn in_order(vectors: impl IntoIterator<Item = Option<Vec<f32>>>, texts: usize) -> String {
    let all: Vec<Option<Vec<f32>>> = vectors.into_iter().collect();
    if all.len() == texts { answers((0..).zip(all)) } else { answers([]) }
}

/// The vectors of an answer, each with the place of its text, as JSON of numbers and vectors. A text with two vectors has
/// none: nobody knows which is its own. `None` is a vector that cannot be read.
pub(super) fn answers(vectors: impl IntoIterator<Item = (u64, Option<Vec<f32>>)>) -> String {
    let mut by_number = std::collections::BTreeMap::<u16, Vec<Option<Vec<f32>>>>::new();
    for (index, vector) in vectors {
        if let Some(number) = u16::try_from(index).ok().and_then(|n| n.checked_add(FIRST_NUMBER)) {
            by_number.entry(number).or_default().push(vector);
        }
    }
    let only = |(number, mut all): (u16, Vec<Option<Vec<f32>>>)| {
        let vector = all.pop().filter(|_| all.is_empty())?;
        Some(match vector {
            Some(vector) => format!("\"{number}\":\"{}\"", vector::encode(&vector)),
            None => format!("\"{number}\":null"),
        })
    };
    format!("{{{}}}", by_number.into_iter().filter_map(only).collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_without_places_are_as_many_as_the_texts() {
        let all = || [Some(vec![1.0]), None];
        assert_eq!(in_order(all(), 2), "{\"100\":\"AACAPw==\",\"101\":null}");
        assert_eq!((in_order(all(), 1), in_order(all(), 3)), ("{}".to_owned(), "{}".to_owned()));
    }

    #[test]
    fn a_place_that_is_doubled_or_no_place_has_no_answer() {
        let one = || Some(vec![1.0]);
        assert_eq!(
            answers([
                (1, one()),
                (0, None),
                (2, one()),
                (2, one()),
                (2_047, one()),
                (65_500, one()),
                (u64::MAX, one())
            ]),
            "{\"100\":null,\"101\":\"AACAPw==\",\"2147\":\"AACAPw==\"}"
        );
    }
}
