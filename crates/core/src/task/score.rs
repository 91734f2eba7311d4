//! Scores: a number within a range for every text.
//!
//! Decisions rate on a scale of at most ten levels and tell the place between two of them that they expect. So a score is
//! no coarser than one that is written.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value, json};

use super::kind::{Answer, Column, Example, Kind, LONGEST, Span, Unfit, bare, examples, only, shown, text};
use super::value::Type;
use super::verb::{Said, Subject, Verb, instruct};
use crate::choices::Choices;
use crate::options::{AskBy, Options};
use crate::{CountTokens, Error, prompt};

/// Steps from the lowest level to the highest, where these are not whole numbers of a short range.
const STEPS: u32 = 5;
/// Ranges of so many whole numbers have a level for each.
const SHORT: std::ops::RangeInclusive<f64> = 3.0..=9.0;
/// Digits of a score that is decided, about; and most of those that stand behind a point.
const DIGITS: i32 = 4;
const MOST_DIGITS: i32 = 330;
/// By so much an expected place may lie beyond the scale: probabilities do not come to one exactly.
const BEYOND: f64 = 1e-3;

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
        let (low, high) = task.range();
        if !(high - low).is_finite() {
            return Err(
                Error::new(format!("the range from {low} to {high} is too large")).hint("Such as 1 to 5 will do.")
            );
        }
        if low >= high {
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
        let (low, high) = self.range();
        low <= score && score <= high
    }

    /// The lowest and the highest score.
    fn range(&self) -> (f64, f64) {
        (self.low.as_f64().unwrap_or(0.0), self.high.as_f64().unwrap_or(0.0))
    }

    /// The steps between the levels of its scale.
    fn steps(&self) -> u32 {
        let (low, high) = self.range();
        let is_short = low.fract() == 0.0 && high.fract() == 0.0 && SHORT.contains(&(high - low));
        if is_short { (high - low) as u32 } else { STEPS }
    }

    /// The score at a place on the scale, from 0 to `steps()`, with the digits that tell scores apart.
    fn at(&self, place: f64) -> String {
        let (low, high) = self.range();
        let span = high - low;
        let digits = (DIGITS - span.log10().floor() as i32).clamp(0, MOST_DIGITS) as usize;
        let score = format!("{:.digits$}", low + span * (place / f64::from(self.steps())));
        let score = if score.contains('.') { score.trim_end_matches('0').trim_end_matches('.') } else { &score };
        match score.parse::<f64>() {
            Ok(rounded) if rounded <= low => self.low.to_string(),
            Ok(rounded) if rounded >= high => self.high.to_string(),
            _ if score == "-0" => "0".to_owned(),
            _ => score.to_owned(),
        }
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
    /// The levels, if it is decided.
    levels: Option<Vec<String>>,
}

impl Prepared {
    pub(super) fn new(task: &Score, options: &Options, count: CountTokens) -> Self {
        let longest = [task.low.to_string(), task.high.to_string(), "0.75".to_owned()];
        let tokens = longest.iter().map(|score| prompt::tokens_of_a_row(score, count)).max().unwrap_or(1);
        let decides = options.ask_by == AskBy::Decisions;
        let level = |step: u32| task.at(f64::from(step));
        let levels = decides.then(|| (0..=task.steps()).map(level).collect());
        Self { task: task.clone(), tokens: if decides { 0 } else { tokens }, levels }
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
        self.levels.is_none().then_some(LONGEST * self.tokens)
    }

    fn choices(&self) -> Option<Choices<'_>> {
        self.levels.as_deref().map(|names| Choices { names, are_levels: true })
    }

    fn read(&self, value: &RawValue) -> Result<Answer, Unfit> {
        let Score { low, high, .. } = &self.task;
        if self.levels.is_some() {
            let place: Option<f64> = serde_json::from_str(value.get()).ok();
            let scale = -BEYOND..=f64::from(self.task.steps()) + BEYOND;
            let place = place.filter(|place| scale.contains(place));
            return place.map(|place| Answer(vec![Some(self.task.at(place))])).ok_or_else(|| {
                Unfit::bad_value(format!("the score must be a place from 0 to {} on the scale", self.task.steps()))
            });
        }
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
    fn a_decided_score_is_a_place_on_the_scale() {
        let of = |low: Value, high: Value| {
            let spec =
                Spec::from_json("score", &json!({"instruction": "How glad?", "low": low, "high": high})).unwrap();
            spec.prepare(&Options { ask_by: AskBy::Decisions, ..Options::default() }, &str::len)
        };
        let levels = |low: Value, high: Value| of(low, high).choices().unwrap().names.to_vec();
        assert_eq!(levels(0.into(), 1.into()), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(levels(1.into(), 5.into()), ["1", "2", "3", "4", "5"]);
        assert_eq!(levels((-1).into(), 1.into()), ["-1", "-0.6", "-0.2", "0.2", "0.6", "1"]);
        assert_eq!(levels(0.into(), 10.into()), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(levels(0.5.into(), 3.5.into()), ["0.5", "1.1", "1.7", "2.3", "2.9", "3.5"]);
        for (low, high) in
            [(-8e307, 8e307), (0.0, 1e-300), (1.0, 1.000_000_1), (-1e9, 0.0), (0.123_456, 100.0), (0.0, 33_333.5)]
        {
            let all: Vec<f64> = levels(low.into(), high.into()).iter().map(|level| level.parse().unwrap()).collect();
            let are_rising = all.windows(2).all(|pair| pair[0] < pair[1]);
            assert!(are_rising && all.len() == 6 && all[0] == low && all[5] == high, "{low} {high}: {all:?}");
        }
        let kind = of(0.into(), 1.into());
        let read = |json: &str| kind.read(&RawValue::from_string(json.to_owned()).unwrap()).ok();
        for (place, score) in [
            ("0", "0"),
            ("5", "1"),
            ("2.5", "0.5"),
            ("1.0014472175540505", "0.2003"),
            ("5.0000003", "1"),
            ("-1e-9", "0"),
        ] {
            assert_eq!(read(place), Some(Answer(vec![Some(score.to_owned())])), "{place}");
        }
        for bad in ["-0.1", "5.01", "null", "\"0.2\"", "[1]", "true", "1e999"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_scorer_is_refused() {
        for bad in [
            json!({"instruction": "x", "low": 1, "high": 1}),
            json!({"instruction": "x", "low": 1}),
            json!({"instruction": "x", "low": -1e308, "high": 1e308}),
            json!({"instruction": "", "low": 0, "high": 1}),
            json!({"instruction": "x", "low": "0", "high": 1}),
            json!({"instruction": "x", "low": 0, "high": 1, "examples": [{"input": "i", "answer": 2}]}),
        ] {
            assert!(Spec::from_json("score", &bad).is_err(), "{bad}");
        }
    }
}
