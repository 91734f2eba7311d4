//! What to ask: a task of one of several kinds.
//!
//! A kind is one file here. It says what the model is told, the JSON form of one row's answer, how many tokens an answer
//! takes, and how it is read and checked. Nothing else knows kinds.

mod classify;
mod extract;
mod generate;
mod score;
mod value;

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::codes::Legend;
use crate::options::Options;
use crate::{CountTokens, Error};

pub use classify::{Classify, Example as LabelExample, Label, check_labels, labels_from_json};
pub use extract::{Extract, fields_from_names};
pub use generate::Generate;
pub use score::Score;
pub use value::{Type, array_literal};

/// Most bytes of a specification, as JSON: instruction, labels or fields, examples. That is some 60,000 tokens of prose,
/// sent with every request; and each stream that asks it is kept in memory.
pub const MAX_SPEC_BYTES: usize = 256 << 10;

/// A task: what to ask, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// What an answer is.
    pub spec: Spec,
    /// How to ask.
    pub options: Options,
}

/// What is asked, by its kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Spec {
    /// One of the labels.
    Classify(Classify),
    /// Several typed values by name.
    Extract(Extract),
    /// A text.
    Generate(Generate),
    /// A number within a range.
    Score(Score),
}

/// What a kind's file gives, beside [`Kind`].
struct Known {
    name: &'static str,
    /// Members of the specification that a user writes among the options.
    options: &'static [&'static str],
    read: fn(&Map<String, Value>) -> Result<Spec, Error>,
}

/// All kinds: the one place that lists them, with [`Spec`] and [`Spec::prepare`].
const KINDS: [Known; 4] = [
    Known { name: "classify", options: &[], read: |m| Classify::from_json(m).map(Spec::Classify) },
    Known { name: "extract", options: &[], read: |m| Extract::from_json(m).map(Spec::Extract) },
    Known { name: "generate", options: generate::OPTIONS, read: |m| Generate::from_json(m).map(Spec::Generate) },
    Known { name: "score", options: &[], read: |m| Score::from_json(m).map(Spec::Score) },
];

impl Spec {
    /// Reads what a user has written of a task of this kind: an object, of which `null` members count as not there.
    ///
    /// # Errors
    /// An unknown kind, what the kind does not take, or more than [`MAX_SPEC_BYTES`].
    pub fn from_json(kind: &str, spec: &Value) -> Result<Self, Error> {
        let known = known(kind)?;
        let mut map =
            spec.as_object().cloned().ok_or_else(|| Error::new("a task's specification must be an object"))?;
        map.retain(|key, value| key != "kind" && !value.is_null());
        let spec = (known.read)(&map)?;
        let bytes = serde_json::to_string(&map).map_or(0, |text| text.len());
        if bytes > MAX_SPEC_BYTES {
            return Err(Error::too_large(format!("the task has {bytes} bytes, and may have {MAX_SPEC_BYTES}"))
                .hint("Shorten the instruction, the descriptions or the examples: they are sent with every request."));
        }
        Ok(spec)
    }

    /// Members of a specification that a user writes among the options of the task.
    ///
    /// # Errors
    /// An unknown kind.
    pub fn options(kind: &str) -> Result<&'static [&'static str], Error> {
        known(kind).map(|known| known.options)
    }

    /// The name of its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Classify(_) => "classify",
            Self::Extract(_) => "extract",
            Self::Generate(_) => "generate",
            Self::Score(_) => "score",
        }
    }

    /// The columns of an answer, in its order.
    pub fn columns(&self) -> Vec<Column> {
        match self {
            Self::Classify(task) => task.columns(),
            Self::Extract(task) => task.columns(),
            Self::Generate(_) => vec![Column { name: "text".into(), of: Type::Text, is_array: false, values: None }],
            Self::Score(_) => vec![Column { name: "score".into(), of: Type::Numeric, is_array: false, values: None }],
        }
    }

    /// Makes the task ready to be asked.
    pub fn prepare(&self, options: &Options, count: CountTokens) -> Box<dyn Kind> {
        match self {
            Self::Classify(task) => Box::new(classify::Prepared::new(task, options, count)),
            Self::Extract(task) => Box::new(extract::Prepared::new(task, options, count)),
            Self::Generate(task) => Box::new(generate::Prepared::new(task, count)),
            Self::Score(task) => Box::new(score::Prepared::new(task, count)),
        }
    }

    /// Whether the values of an answer have names, even if there is one alone.
    pub fn has_names(&self) -> bool {
        matches!(self, Self::Extract(_))
    }

    /// An answer as one text: its only value, or the JSON of all.
    pub fn to_text(&self, answer: &Answer) -> Option<String> {
        if self.has_names() { Some(self.to_json(answer)) } else { answer.0.first().cloned().flatten() }
    }

    /// An answer as JSON, an object by the columns' names if there may be several. Numbers keep their digits.
    pub fn to_json(&self, answer: &Answer) -> String {
        let columns = self.columns();
        let mut values =
            columns.iter().zip(&answer.0).map(|(column, text)| (&column.name, column.json(text.as_deref())));
        if self.has_names() {
            let members: Vec<String> =
                values.map(|(name, value)| format!("{}:{value}", Value::from(name.as_str()))).collect();
            format!("{{{}}}", members.join(","))
        } else {
            values.next().map_or_else(|| "null".to_owned(), |(_, value)| value)
        }
    }
}

fn known(kind: &str) -> Result<&'static Known, Error> {
    KINDS.iter().find(|known| known.name == kind).ok_or_else(|| {
        let names: Vec<&str> = KINDS.iter().map(|known| known.name).collect();
        Error::new(format!("unrecognized kind of task \"{kind}\""))
            .hint(format!("Valid kinds are: {}.", names.join(", ")))
    })
}

/// A column of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name: a field's, or that of the only value.
    pub name: String,
    /// What its values are.
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
            Some(text) if self.is_array || self.of.is_json() => text.to_owned(),
            Some(text) => Value::from(text).to_string(),
        }
    }
}

/// The answer of one row: a text for each column, `None` is NULL. Lists are texts of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer(pub Vec<Option<String>>);

/// Why the value that an answer gives for a row is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// `unknown_code`, `bad_value`
    pub class: &'static str,
    /// What it should have been, for the model that is asked again: nothing of what it wrote.
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

    fn bad_value(wanted: impl Into<String>) -> Self {
        let wanted = wanted.into();
        Self { class: "bad_value", detail: wanted.clone(), wanted }
    }

    /// With what was given instead, cut.
    fn not(mut self, given: &str) -> Self {
        let cut: String = given.chars().take(60).collect();
        self.detail.push_str(&format!(", not {cut}"));
        self
    }
}

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
    /// What the model is told first: the instruction, what answers mean, examples.
    fn head(&self) -> String;
    /// What is asked for: "Answer with … for every number, in JSON on one line …".
    fn asks_for(&self) -> String;
    /// Two answers in JSON, as examples of the form.
    fn samples(&self) -> [String; 2];
    /// The JSON schema of one row's answer.
    fn schema(&self) -> Value;
    /// Tokens of the answer to a row of so many tokens.
    fn tokens(&self, input: usize) -> Span;
    /// Reads one row's answer, as [`Self::samples`] writes it.
    ///
    /// # Errors
    /// What is wrong with it.
    fn read(&self, value: &RawValue) -> Result<Answer, Unfit>;
    /// The codes, if an answer is one of them: then answers of other forms can be read too.
    fn legend(&self) -> Option<&Legend> {
        None
    }
}

/// The members of an object as they are written, none of them lost.
pub(crate) struct Members<'a>(pub Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut all = Vec::new();
                while let Some(member) = map.next_entry()? {
                    all.push(member);
                }
                Ok(Members(all))
            }
        }
        d.deserialize_map(All)
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
fn text(map: &Map<String, Value>, key: &str) -> Result<String, Error> {
    match map.get(key) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.trim().to_owned()),
        Some(other) => Err(Error::new(format!("\"{key}\" must be a text, not {other}"))),
    }
}

/// Takes a whole number within a range from a specification.
fn whole(map: &Map<String, Value>, key: &str, least: u64, most: u64) -> Result<Option<u64>, Error> {
    let Some(value) = map.get(key) else { return Ok(None) };
    value.as_u64().filter(|n| (least..=most).contains(n)).map(Some).ok_or_else(|| {
        Error::new(format!("invalid value for option \"{key}\": {value}"))
            .hint(format!("It must be a whole number from {least} to {most}."))
    })
}

/// Refuses members that the kind does not take.
fn only(map: &Map<String, Value>, keys: &[&str]) -> Result<(), Error> {
    match map.keys().find(|key| !keys.contains(&key.as_str())) {
        Some(key) => {
            Err(Error::new(format!("unrecognized option \"{key}\""))
                .hint(format!("Valid ones are: {}.", keys.join(", "))))
        }
        None => Ok(()),
    }
}

/// Takes the examples from a specification: an array of `{"input", "answer"}`.
fn examples(map: &Map<String, Value>, sample: &str) -> Result<Vec<Example>, Error> {
    let Some(value) = map.get("examples") else { return Ok(Vec::new()) };
    Deserialize::deserialize(value).map_err(|_| {
        Error::new("examples must be a JSON array of objects with \"input\" and \"answer\"")
            .hint(format!("Write '[{{\"input\": \"I was charged twice\", \"answer\": {sample}}}]'."))
    })
}

/// Examples as the model is shown them.
fn shown<'a>(examples: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let lines: String =
        examples.into_iter().map(|(input, answer)| format!("{} -> {answer}\n", crate::prompt::quote(input))).collect();
    if lines.is_empty() { lines } else { format!("\nExamples:\n{lines}") }
}

/// A description on one line: one that spans lines would look like more of what it describes.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
