//! The options of a task: the same keys wherever options are taken.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;

/// The way in which the gateway asks for machine-readable answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StructuredOutput {
    /// The strongest form that fits the answer shape and that the endpoint does not refuse.
    #[default]
    Auto,
    /// `response_format` with a JSON schema.
    JsonSchema,
    /// `response_format` with `json_object`.
    JsonObject,
    /// No `response_format` at all.
    None,
}

/// The service that a task is asked of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskBy {
    /// In a chat: the answer is written.
    #[default]
    Chat,
    /// At the endpoint for decisions: each row is a question with choices.
    Decisions,
    /// In the way that takes less money, where there are both.
    Auto,
}

/// The tier at which a provider serves a task's chats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceTier {
    /// The normal one, or what the parameters of the model say.
    #[default]
    Default,
    /// Half the price, slower, and not always there. Without capacity the rows wait.
    Flex,
    /// The same. Without capacity the rows are asked at the normal tier after a while.
    FlexOrDefault,
}

/// The codes that stand for labels in a request and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codes {
    /// The label if it is one token, else its beginning, else letters.
    #[default]
    Auto,
    /// The labels themselves.
    Words,
    /// `A`, `B`, … `Z`, `AA`, …
    Letters,
}

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerShape {
    /// `{"417":"billing"}`
    #[default]
    Map,
    /// As `Map`, with a schema that names the ids of each pack: costs more tokens, forces an answer for every row.
    Properties,
}

/// The treatment of a text that is larger than a request may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// The row is skipped.
    #[default]
    Skip,
    /// The text is cut to what fits.
    Truncate,
}

/// The result of a function that returns a label, for a row that the model gives none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// NULL, with a warning.
    #[default]
    Null,
    /// The statement ends with an error.
    Error,
}

/// The options of a task, complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Most rows in one request, 1 to 500; of an embedder to 2,048.
    pub max_rows_per_request: u32,
    /// Completed requests without a valid answer until a row is given up, 1 to 10.
    pub max_attempts: u32,
    /// Weight among jobs, 1 to 100.
    pub priority: u32,
    /// The service that it is asked of.
    #[serde(default)]
    pub ask_by: AskBy,
    /// The tier at which it is served.
    #[serde(default)]
    pub service_tier: ServiceTier,
    /// The way in which machine-readable answers are asked for.
    pub structured_output: StructuredOutput,
    /// The codes that stand for labels.
    pub codes: Codes,
    /// The form of an answer.
    pub answer_shape: AnswerShape,
    /// The treatment of a text that is too large.
    pub too_long: TooLong,
    /// A text that was answered before, for the same task, model and role, is not asked again.
    pub reuse: bool,
    /// The result of `llm_classify()` and `llm_filter()` for a row without an answer. Functions that return a status,
    /// and jobs, report it there instead.
    pub on_error: OnError,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_rows_per_request: 50,
            max_attempts: 3,
            priority: 50,
            ask_by: AskBy::default(),
            service_tier: ServiceTier::default(),
            structured_output: StructuredOutput::default(),
            codes: Codes::default(),
            answer_shape: AnswerShape::default(),
            too_long: TooLong::default(),
            reuse: true,
            on_error: OnError::default(),
        }
    }
}

/// Most rows of a request: their numbers have three digits. An embedder's texts have none.
const MOST_ROWS: u32 = 500;
const MOST_TEXTS: u32 = 2_048;

/// The keys of a task's options.
pub const KEYS: &str = "max_rows_per_request, max_attempts, priority, ask_by, service_tier, structured_output, codes, \
                        answer_shape, too_long, reuse, on_error";
/// Those of a task with a name alone, and of a job.
const OF_TASK: &str = "repair, check, check_hint";
const OF_JOB: &str = "isolation, provenance_column, confidence_column, deadline";

impl Options {
    /// Reads a JSON object. Later objects override earlier ones key by key.
    ///
    /// # Errors
    /// An unknown key, or a value outside its range, with the valid ones as the hint.
    pub fn from_json<'a>(layers: impl IntoIterator<Item = &'a Value>) -> Result<Self, Error> {
        layers.into_iter().try_fold(Self::default(), Self::with)
    }

    /// These, overridden by those of a JSON object.
    ///
    /// # Errors
    /// As of [`Self::from_json`].
    pub fn with(mut self, layer: &Value) -> Result<Self, Error> {
        match layer {
            Value::Object(map) => self.apply(map)?,
            Value::Null => {}
            _ => {
                return Err(Error::new("options must be a JSON object")
                    .hint(format!("Write them as '{{\"key\": value}}'. Valid keys are: {KEYS}.")));
            }
        }
        Ok(self)
    }

    /// These, without those that mean nothing: a decision is not written, so it is asked for in no form.
    #[must_use]
    pub fn in_effect(mut self) -> Self {
        if self.ask_by == AskBy::Decisions {
            self.structured_output = StructuredOutput::None;
        }
        self
    }

    /// Refuses more rows in a request than a task may have that is not an embedder's.
    ///
    /// # Errors
    /// If they are more.
    pub(crate) fn check_rows(&self) -> Result<(), Error> {
        rows(&self.max_rows_per_request.into(), MOST_ROWS).map(|_| ())
    }

    fn apply(&mut self, map: &Map<String, Value>) -> Result<(), Error> {
        for (key, value) in map {
            match key.as_str() {
                "max_rows_per_request" => self.max_rows_per_request = rows(value, MOST_TEXTS)?,
                "max_attempts" => self.max_attempts = number(key, value, 1, 10)?,
                "priority" => self.priority = number(key, value, 1, 100)?,
                "ask_by" => self.ask_by = word(key, value, "auto, chat, decisions")?,
                "service_tier" => self.service_tier = word(key, value, "default, flex, flex_or_default")?,
                "structured_output" => {
                    self.structured_output = word(key, value, "auto, json_schema, json_object, none")?
                }
                "codes" => self.codes = word(key, value, "auto, words, letters")?,
                "answer_shape" => self.answer_shape = word(key, value, "map, properties")?,
                "too_long" => self.too_long = word(key, value, "skip, truncate")?,
                "reuse" => self.reuse = word(key, value, "true, false")?,
                "on_error" => self.on_error = word(key, value, "null, error")?,
                _ => {
                    return Err(Error::new(format!("unrecognized option \"{key}\""))
                        .hint(format!("Valid options are: {KEYS}; of a task also {OF_TASK}; of a job {OF_JOB}.")));
                }
            }
        }
        Ok(())
    }
}

fn number(key: &str, value: &Value, min: u32, max: u32) -> Result<u32, Error> {
    value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| (min..=max).contains(n)).ok_or_else(|| {
        Error::new(format!("invalid value for option \"{key}\": {value}"))
            .hint(format!("It must be a whole number from {min} to {max}."))
    })
}

/// Rows in a request: the kind that allows the most of them is known later.
fn rows(value: &Value, max: u32) -> Result<u32, Error> {
    number("max_rows_per_request", value, 1, max).map_err(|e| {
        e.hint(format!("It must be a whole number from 1 to {MOST_ROWS}, or to {MOST_TEXTS} for an embedder."))
    })
}

fn word<T: for<'de> Deserialize<'de>>(key: &str, value: &Value, valid: &str) -> Result<T, Error> {
    T::deserialize(value).map_err(|_| {
        Error::new(format!("invalid value for option \"{key}\": {value}")).hint(format!("Valid values are: {valid}."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn later_layers_win_key_by_key() {
        let o =
            Options::from_json([&json!({"max_rows_per_request": 20, "codes": "letters"}), &json!({"codes": "words"})]);
        let o = o.unwrap();
        assert_eq!((o.max_rows_per_request, o.codes, o.max_attempts), (20, Codes::Words, 3));
    }

    #[test]
    fn unknown_keys_and_values_name_the_valid_ones() {
        let e = Options::from_json([&json!({"max_rows": 20})]).unwrap_err();
        assert_eq!(e.message, "unrecognized option \"max_rows\"");
        assert!(e.hint.unwrap().contains("max_rows_per_request"));
        for bad in [
            json!({"max_attempts": 0}),
            json!({"priority": 1.5}),
            json!({"codes": "emoji"}),
            json!({"ask_by": "cheapest"}),
            json!({"service_tier": "priority"}),
            json!([1]),
            json!({"max_attempts": "3"}),
        ] {
            assert!(Options::from_json([&bad]).unwrap_err().hint.is_some(), "{bad}");
        }
    }
}
