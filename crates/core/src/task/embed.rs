//! Vectors: a list of numbers for every text, from an endpoint for embeddings. Their form on the way is that of
//! [`crate::vector`].

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::kind::{Answer, Column, Kind, Span, Unfit, only, text, whole};
use super::value::Type;
use super::verb::Verb;
use crate::{Error, parts, vector};

/// Most numbers of a vector: those of the largest models that are known, twice.
const MOST_DIMENSIONS: u64 = 8_192;
/// Bytes of the answers of a request, about.
const MOST_ANSWERS: f64 = (3 << 20) as f64;
/// A number of a vector in base64 has fewer bytes, and what stands around them.
const IN_BASE64: f64 = 6.5;
/// Bytes of a number in JSON, as the longest are written.
const BYTES_PER_NUMBER: u64 = 24;
/// So many numbers take the room of what stands around a vector.
const AROUND: u32 = 16;

/// An embedder's specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Embed {
    /// Numbers of a vector.
    pub dimensions: u32,
    /// The purpose of the vectors, in the provider's words, if it asks for that.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub input_type: Option<String>,
}

impl Embed {
    pub(super) fn from_json(map: &Map<String, Value>) -> Result<Self, Error> {
        only(map, &["dimensions", "input_type"])?;
        let dimensions = whole(map, "dimensions", 1, MOST_DIMENSIONS)?.and_then(|n| u32::try_from(n).ok());
        let dimensions = dimensions.ok_or_else(|| {
            Error::new("an embedder must have \"dimensions\"").hint("Say how many numbers a vector of the model has.")
        })?;
        let input_type = Some(text(map, "input_type")?).filter(|of| !of.is_empty());
        Ok(Self { dimensions, input_type })
    }

    /// Most texts of a request: their vectors are no larger than an answer may be. `number`: bytes of each of their
    /// numbers, as the server has written them before.
    pub fn most_rows(&self, number: Option<f64>) -> usize {
        let one = number.unwrap_or(BYTES_PER_NUMBER as f64) * f64::from(self.dimensions + AROUND);
        ((MOST_ANSWERS / one) as usize).max(1)
    }

    /// Bytes of an answer with the vectors of so many texts, for each of their numbers.
    pub fn number(&self, bytes: usize, rows: usize) -> f64 {
        let number = bytes as f64 / rows.max(1) as f64 / f64::from(self.dimensions + AROUND);
        // In a list each number is a part of the body, however short it is written.
        if number < IN_BASE64 { number } else { number.max(MOST_ANSWERS / (parts::MOST as f64 * 0.9)) }
    }

    /// Most tokens of an answer to so many texts, were it one of a chat.
    pub fn most_answer(rows: usize) -> u64 {
        // Vectors that are too long are read as well: that they are is what the user is told.
        (MOST_DIMENSIONS * BYTES_PER_NUMBER / 4).saturating_mul(rows as u64)
    }

    pub(super) fn columns(&self) -> Vec<Column> {
        vec![Column { name: "embedding".into(), of: Type::Real, is_array: true, values: None }]
    }
}

/// The function that asks for vectors.
pub(super) static VERBS: [Verb; 1] = [Verb::of_tasks("embed")];

/// An embedder that is ready to be asked.
#[derive(Debug)]
pub(super) struct Prepared(pub Embed);

impl Kind for Prepared {
    // Nothing is said to a model: its endpoint takes texts alone.
    fn head(&self) -> String {
        String::new()
    }

    fn asks_for(&self) -> String {
        String::new()
    }

    fn samples(&self) -> [String; 2] {
        Default::default()
    }

    fn schema(&self) -> Value {
        json!({})
    }

    fn tokens(&self, _: usize) -> Span {
        Span { mean: 0.0, planned: 0 }
    }

    fn has_vectors(&self) -> bool {
        true
    }

    fn read(&self, value: &RawValue) -> Result<Answer, Unfit> {
        let dimensions = self.0.dimensions as usize;
        let text: &str = serde_json::from_str(value.get()).unwrap_or("none");
        let vector = vector::decode(text).ok_or_else(|| Unfit::bad_value("the answer must be a list of numbers"))?;
        if vector.len() != dimensions {
            return Err(Unfit::bad_value(format!(
                "the answer must be a vector of {dimensions} dimensions, not {}",
                vector.len()
            )));
        }
        if vector.iter().any(|n| !n.is_finite()) || vector.iter().all(|n| *n == 0.0) {
            return Err(Unfit::bad_value("the answer must be a vector of finite numbers that are not all zero"));
        }
        Ok(Answer(vec![Some(text.to_owned())]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::task::Spec;

    fn read(dimensions: u32, json: &str) -> Option<String> {
        let kind = Spec::from_json("embed", &json!({"dimensions": dimensions})).unwrap();
        let kind = kind.prepare(&Options::default(), &str::len);
        let raw = RawValue::from_string(json.to_owned()).unwrap();
        kind.read(&raw).ok().and_then(|answer| answer.0.into_iter().next().flatten())
    }

    #[test]
    fn a_vector_has_its_length_and_is_finite_and_not_zero() {
        let of = |numbers: &[f32]| Value::from(vector::encode(numbers)).to_string();
        assert_eq!(read(2, &of(&[0.5, -1.0])), Some(vector::encode(&[0.5, -1.0])));
        for bad in
            [&[0.5][..], &[1.0, 2.0, 3.0], &[0.0, 0.0], &[0.0, -0.0], &[1.0, f32::INFINITY], &[f32::NAN, 1.0], &[]]
        {
            assert_eq!(read(2, &of(bad)), None, "{bad:?}");
        }
        for bad in ["[0.5,-1.0]", "null", "\"[1,2]\"", "\"none\"", "1", "\"AACAPwAAAMA\\u003d\""] {
            assert_eq!(read(2, bad), None, "{bad}");
        }
    }

    #[test]
    fn a_request_has_as_many_texts_as_the_vectors_of_its_server_allow() {
        let of = |dimensions: u32| Embed { dimensions, input_type: None };
        assert_eq!([384, 1_536, 8_192].map(|n| of(n).most_rows(None)), [327, 84, 15]);
        // An answer in base64.
        let number = of(384).number(327 * (vector::bytes(384) + 60), 327);
        assert_eq!([256, 384, 1_536].map(|n| of(n).most_rows(Some(number))), [2_194, 1_492, 384]);
    }

    #[test]
    fn what_is_no_embedder_is_refused() {
        for bad in [
            json!({}),
            json!({"dimensions": 0}),
            json!({"dimensions": 1.5}),
            json!({"dimensions": 100_000}),
            json!({"dimensions": 3, "input_type": 1}),
            json!({"dimensions": 3, "instruction": "x"}),
        ] {
            assert!(Spec::from_json("embed", &bad).is_err(), "{bad}");
        }
    }
}
