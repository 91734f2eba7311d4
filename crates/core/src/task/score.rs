//! Scores: a number within a range for every text.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value, json};

use super::kind::{Answer, Column, Example, Kind, LONGEST, Span, Unfit, bare, examples, only, shown, text};
use super::value::Type;
use super::verb::{Said, Subject, Verb, instruct};
use crate::{CountTokens, Error, prompt};

/// A scorer's specification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The meaning of the number.
    pub instruction: String,
    /// The lowest score.
    pub low: Number,
    /// The highest score.
    pub high: Number,
    /// Texts with their scores.
    pub examples: Vec<Example>,
}

impl Score {
    pub(super) fn from_json(map: &Map<String, Value>) -> Result<Self, Error> {
        only(map, &["instruction", "low", "high", "examples"])?;
        let bound = |key: &str| match map.get(key) {
            Some(Value::Number(n)) if n.as_f64().is_some_and(f64::is_finite) => Ok(n.clone()),
            _ => Err(Error::new(format!("\"{key}\" must be a number"))),
        };
        let task = Self {
            instruction: text(map, "instruction")?,
            low: bound("low")?,
            high: bound("high")?,
            examples: examples(map, "0.9")?,
        };
        if task.instruction.is_empty() {
            return Err(Error::new("the instruction must not be empty").hint("Say what the score tells of each text."));
        }
        if task.low.as_f64() >= task.high.as_f64() {
            return Err(Error::new(format!("the lowest score {} is not below the highest, {}", task.low, task.high))
                .hint("Write the lowest first: low => 1, high => 5."));
        }
        for e in &task.examples {
            if !e.answer.as_f64().is_some_and(|n| task.has(n)) {
                return Err(Error::new(format!("the answer {} of an example is not within the range", e.answer))
                    .hint(format!("It must be a number from {} to {}.", task.low, task.high)));
            }
        }
        Ok(task)
    }

    pub(super) fn columns(&self) -> Vec<Column> {
        vec![Column { name: "score".into(), of: Type::Numeric, is_array: false, values: None }]
    }

    fn has(&self, score: f64) -> bool {
        self.low.as_f64().is_some_and(|low| low <= score) && self.high.as_f64().is_some_and(|high| score <= high)
    }
}

/// The function that asks for scores.
pub(super) static VERBS: [Verb; 1] = [Verb { name: "score", subject: Subject::Text, put: score }];

fn score(spec: &mut Map<String, Value>, said: &Said) -> Result<(), Error> {
    instruct(spec, said.some("question", "Ask what the score tells of each text, such as how urgent it is.")?);
    spec.entry("low").or_insert_with(|| 0.into());
    spec.entry("high").or_insert_with(|| 1.into());
    Ok(())
}

/// A scorer that is ready to be asked.
#[derive(Debug)]
pub(super) struct Prepared {
    task: Score,
    tokens: usize,
}

impl Prepared {
    pub(super) fn new(task: &Score, count: CountTokens) -> Self {
        let longest = [task.low.to_string(), task.high.to_string(), "0.75".to_owned()];
        let tokens = longest.iter().map(|score| prompt::tokens_of_a_row(score, count)).max().unwrap_or(1);
        Self { task: task.clone(), tokens }
    }
}

impl Kind for Prepared {
    fn head(&self) -> String {
        let Score { instruction, low, high, examples } = &self.task;
        let answers = examples.iter().map(|e| (e.input.as_str(), e.answer.to_string()));
        format!("{instruction}\nA score is a number from {low} to {high}.\n{}", shown(answers))
    }

    fn asks_for(&self) -> String {
        "Answer with the score for every number, in JSON on one line without spaces".into()
    }

    fn samples(&self) -> [String; 2] {
        [Type::Numeric.form().into(), "…".into()]
    }

    fn schema(&self) -> Value {
        json!({"type": "number"})
    }

    fn tokens(&self, _: usize) -> Span {
        Span { mean: self.tokens as f64, planned: self.tokens }
    }

    fn longest(&self) -> Option<usize> {
        Some(LONGEST * self.tokens)
    }

    fn read(&self, value: &RawValue) -> Result<Answer, Unfit> {
        let Score { low, high, .. } = &self.task;
        let number = Type::Numeric.read(bare(value, "score"), None, false);
        let score = number.ok().filter(|n| n.parse().is_ok_and(|n| self.task.has(n)));
        let score =
            score.ok_or_else(|| Unfit::bad_value(format!("the score must be a number from {low} to {high}")))?;
        Ok(Answer(vec![Some(score)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::task::Spec;

    #[test]
    fn a_score_is_within_its_range() {
        let spec = Spec::from_json("score", &json!({"instruction": "How glad?", "low": 0, "high": 1})).unwrap();
        let kind = spec.prepare(&Options::default(), &str::len);
        let read = |json: &str| kind.read(&RawValue::from_string(json.to_owned()).unwrap()).ok();
        for good in ["0", "1", "0.75", "\"0.5\""] {
            assert_eq!(read(good), Some(Answer(vec![Some(good.trim_matches('"').to_owned())])));
        }
        assert!(RawValue::from_string(kind.samples()[0].clone()).is_err(), "a sample is no score");
        for bad in ["1.01", "-1", "null", "\"high\"", "[0.5]", "true", "\"NaN\"", "1e999"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_scorer_is_refused() {
        for bad in [
            json!({"instruction": "x", "low": 1, "high": 1}),
            json!({"instruction": "x", "low": 1}),
            json!({"instruction": "", "low": 0, "high": 1}),
            json!({"instruction": "x", "low": "0", "high": 1}),
            json!({"instruction": "x", "low": 0, "high": 1, "examples": [{"input": "i", "answer": 2}]}),
        ] {
            assert!(Spec::from_json("score", &bad).is_err(), "{bad}");
        }
    }
}
