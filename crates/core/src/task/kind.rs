//! The interface of a kind of task: its columns, its words to the model, the reading of an answer.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::value::Type;
use crate::Error;
use crate::choices::Choices;
use crate::codes::Legend;
use crate::members::Members;
use crate::{trouble, vector};

/// A column of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name: a field's, or that of the only value.
    pub name: String,
    /// The type of its values.
    pub of: Type,
    /// A value is a list of these.
    pub is_array: bool,
    /// All its values, if they are known beforehand.
    pub values: Option<Vec<String>>,
}

impl Column {
    /// A value as JSON.
    pub fn json(&self, text: Option<&str>) -> String {
        match text {
            None => "null".to_owned(),
            Some(text) if self.is_array => vector::to_json(text).unwrap_or_else(|| "null".to_owned()),
            Some(text) if self.of.is_json() => text.to_owned(),
            Some(text) => Value::from(text).to_string(),
        }
    }
}

/// The answer of one row: a text for each column, `None` is NULL. Lists are texts of JSON, or vectors ([`vector`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer(pub Vec<Option<String>>);

/// Why the value that an answer gives for a row is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// `unknown_code`, `bad_value`
    pub class: &'static str,
    /// The value that was wanted, for the model that is asked again: nothing of what it wrote.
    pub wanted: String,
    /// In words, for the user.
    pub detail: String,
}

impl Unfit {
    /// An answer that is none of the labels.
    pub(crate) fn unknown_code() -> Self {
        let detail = "the model answered with something that is not a label".to_owned();
        Self { class: "unknown_code", wanted: "the answer must be one of the labels".into(), detail }
    }

    /// A value that is the number of its row: small models take it for a number that they look for in the text, which does
    /// not hold it.
    pub(crate) fn number_of_the_row() -> Self {
        let wanted = "no value is the number of the row".to_owned();
        let detail = "the model gave the row's number in the request as a value".to_owned();
        Self { class: "bad_value", wanted, detail }
    }

    pub(super) fn bad_value(wanted: impl Into<String>) -> Self {
        let wanted = wanted.into();
        Self { class: "bad_value", detail: wanted.clone(), wanted }
    }

    /// Adds the given value to the detail, cut.
    pub(super) fn not(mut self, given: &str) -> Self {
        let cut: String = trouble::one_line(given).chars().take(60).collect();
        self.detail.push_str(&format!(", not {cut}"));
        self
    }
}

/// The factor by which an answer of known length may be longer than planned, in other words or another layout.
pub(super) const LONGEST: usize = 4;

/// Tokens of one row's answer, with its number and the signs around it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// As it is in the mean.
    pub mean: f64,
    /// As it is planned for, before anything is known of the task's answers: what they take is learnt in relation to it.
    pub planned: usize,
}

/// A task that is ready to be asked.
pub trait Kind: fmt::Debug + Send + Sync {
    /// Names that the values of a row's answer may be written under, if it has names.
    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
    /// The first part of the system message: the instruction, the meaning of answers, examples.
    fn head(&self) -> String;
    /// The sentence that asks: "Answer with … for every number, in JSON on one line …".
    fn asks_for(&self) -> String;
    /// Two answers in JSON, as examples of the form.
    fn samples(&self) -> [String; 2];
    /// The JSON schema of one row's answer.
    fn schema(&self) -> Value;
    /// Tokens of the answer to a row of so many tokens.
    fn tokens(&self, input: usize) -> Span;
    /// Most tokens of the answer to a row, with its number and the signs around it, if its user has set them.
    fn most_tokens(&self) -> Option<usize> {
        None
    }
    /// Most tokens of JSON that the answer to a row is waited for: a model that has written more writes on until its cap,
    /// whatever that is. `None` where an answer may have any length.
    fn longest(&self) -> Option<usize> {
        None
    }
    /// Reads one row's answer, as [`Self::samples`] writes it.
    ///
    /// # Errors
    /// The reason why the value is not an answer.
    fn read(&self, value: &RawValue) -> Result<Answer, Unfit>;
    /// What a row's answer is chosen from, if that is decided and not written.
    fn choices(&self) -> Option<Choices<'_>> {
        None
    }
    /// Returns true if an answer is a vector, in a form of ours alone.
    fn has_vectors(&self) -> bool {
        false
    }
    /// The codes, if an answer is one of them: then answers of other forms can be read too.
    fn legend(&self) -> Option<&Legend> {
        None
    }
}

/// Names under which models write an answer that has none.
const NAMES: [&str; 8] = ["answer", "value", "result", "output", "response", "content", "text", "score"];

/// The value of an answer that has no name: of an object the only member, if its name says no more than that it is the
/// answer, or the one that has the kind's `own` name, with whatever is said beside it.
pub(super) fn bare<'a>(value: &'a RawValue, own: &str) -> &'a str {
    let Ok(Members(members)) = serde_json::from_str(value.get()) else { return value.get() };
    let is_own = |(name, _): &&(String, &RawValue)| name.eq_ignore_ascii_case(own);
    let mut named = members.iter().filter(is_own);
    match (named.next(), named.next(), members.as_slice()) {
        (Some((_, inner)), None, _) => inner.get(),
        (None, _, [(name, inner)]) if NAMES.iter().any(|known| known.eq_ignore_ascii_case(name)) => inner.get(),
        _ => value.get(),
    }
}

/// A text and its answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The text.
    pub input: String,
    /// Its answer, in the form of the kind.
    pub answer: Value,
}

/// Takes a string from a specification.
pub(super) fn text(map: &Map<String, Value>, key: &str) -> Result<String, Error> {
    match map.get(key) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.trim().to_owned()),
        Some(other) => Err(Error::new(format!("\"{key}\" must be a text, not {other}"))),
    }
}

/// Takes a whole number within a range from a specification.
pub(super) fn whole(map: &Map<String, Value>, key: &str, least: u64, most: u64) -> Result<Option<u64>, Error> {
    let Some(value) = map.get(key) else { return Ok(None) };
    value.as_u64().filter(|n| (least..=most).contains(n)).map(Some).ok_or_else(|| {
        Error::new(format!("invalid value for option \"{key}\": {value}"))
            .hint(format!("It must be a whole number from {least} to {most}."))
    })
}

/// Refuses members that the kind does not take.
pub(super) fn only(map: &Map<String, Value>, keys: &[&str]) -> Result<(), Error> {
    match map.keys().find(|key| !keys.contains(&key.as_str())) {
        Some(key) => {
            Err(Error::new(format!("unrecognized option \"{key}\""))
                .hint(format!("Valid ones are: {}.", keys.join(", "))))
        }
        None => Ok(()),
    }
}

/// Takes the examples from a specification: an array of `{"input", "answer"}`.
pub(super) fn examples(map: &Map<String, Value>, sample: &str) -> Result<Vec<Example>, Error> {
    let Some(value) = map.get("examples") else { return Ok(Vec::new()) };
    Deserialize::deserialize(value).map_err(|_| {
        Error::new("examples must be a JSON array of objects with \"input\" and \"answer\"")
            .hint(format!("Write '[{{\"input\": \"I was charged twice\", \"answer\": {sample}}}]'."))
    })
}

/// Examples as the model is shown them.
pub(super) fn shown<'a>(examples: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let lines: String =
        examples.into_iter().map(|(input, answer)| format!("{} -> {answer}\n", crate::prompt::quote(input))).collect();
    if lines.is_empty() { lines } else { format!("\nExamples:\n{lines}") }
}

/// A description on one line: one that spans lines would look like more of what it describes.
pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
