//! Classification: one of the labels for every text.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::kind::{Answer, Column, Kind, LONGEST, Span, Unfit, one_line, only, shown, text};
use super::value::Type;
use super::verb::{Said, Subject, Verb, instruct};
use crate::choices::Choices;
use crate::codes::{Label, Legend};
use crate::options::{AskBy, Codes, Options};
use crate::{CountTokens, Error, prompt};

/// Fewest labels of a classifier.
pub const MIN_LABELS: usize = 2;
/// Most labels of a classifier: what one enum of a strict schema may hold without further limits
/// (OpenAI, "Structured Outputs", 250 values).
pub const MAX_LABELS: usize = 250;

/// A text whose label is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// The text.
    pub input: String,
    /// One of the task's labels.
    pub label: String,
}

/// A classifier's specification.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Classify {
    /// A description of the texts and how to choose; may be empty.
    pub instruction: String,
    /// The labels, in the order in which they are shown.
    pub labels: Vec<Label>,
    /// Examples shown to the model.
    pub examples: Vec<Example>,
}

impl Classify {
    pub(super) fn from_json(map: &Map<String, Value>) -> Result<Self, Error> {
        only(map, &["instruction", "labels", "examples"])?;
        let labels = labels_from_json(map.get("labels").unwrap_or(&Value::Null))?;
        let examples = examples_from_json(map.get("examples").unwrap_or(&Value::Null), &labels)?;
        Ok(Self { instruction: text(map, "instruction")?, labels, examples })
    }

    pub(super) fn columns(&self) -> Vec<Column> {
        let values = Some(self.labels.iter().map(|l| l.label.clone()).collect());
        vec![Column { name: "label".into(), of: Type::Labels, is_array: false, values }]
    }
}

/// The functions that ask for labels.
pub(super) static VERBS: [Verb; 3] = [
    Verb::of_tasks("classify"),
    Verb { name: "classify_labels", subject: Subject::Texts, put: classify },
    Verb { name: "filter", subject: Subject::Text, put: filter },
];
/// The labels of a question's answers.
pub const YES: &str = "yes";
/// As [`YES`].
pub const NO: &str = "no";

fn classify(spec: &mut Map<String, Value>, said: &Said) -> Result<(), Error> {
    let Said { names, descriptions, .. } = said;
    if let Some(name) = descriptions.keys().find(|name| !names.contains(name)) {
        return Err(Error::new(format!("the label \"{name}\" of a description is not among the labels")));
    }
    let label = |name: &String| json!({"label": name, "description": descriptions.get(name).unwrap_or(&json!(""))});
    spec.insert("labels".to_owned(), names.iter().map(label).collect());
    Ok(())
}

fn filter(spec: &mut Map<String, Value>, said: &Said) -> Result<(), Error> {
    let question = said.some("question", "Ask a question that can be answered with yes or no.")?;
    instruct(spec, &format!("Answer this question about each text: {question}"));
    spec.entry("labels").or_insert_with(|| json!({YES: "the answer is yes", NO: "the answer is no"}));
    Ok(())
}

/// A classifier with its codes.
#[derive(Debug)]
pub(super) struct Prepared {
    task: Classify,
    legend: Legend,
    /// Tokens of an answer: the mean over the labels, and the longest; none where nothing is written.
    span: Span,
    /// The labels are choices of a decision.
    decides: bool,
}

impl Prepared {
    pub(super) fn new(task: &Classify, options: &Options, count: CountTokens) -> Self {
        let decides = options.ask_by == AskBy::Decisions;
        let legend = Legend::new(&task.labels, if decides { Codes::Words } else { options.codes }, count);
        let tokens = |code: &String| prompt::tokens_of_a_row(&prompt::quote(code), count);
        let all: Vec<usize> = legend.codes().iter().map(tokens).collect();
        let mean = all.iter().sum::<usize>() as f64 / all.len().max(1) as f64;
        let span = Span { mean, planned: all.into_iter().max().unwrap_or(1) };
        Self { task: task.clone(), legend, span: if decides { Span { mean: 0.0, planned: 0 } } else { span }, decides }
    }

    fn code(&self, label: &str) -> String {
        let at = self.task.labels.iter().position(|l| l.label == label);
        at.and_then(|i| self.legend.codes().get(i)).map_or(label, String::as_str).to_owned()
    }
}

/// The lines of a legend: `code = label: description`.
pub(super) fn lines(labels: &[Label], legend: &Legend) -> String {
    let line = |(label, code): (&Label, &String)| {
        let name = if *code == label.label { String::new() } else { format!(" = {}", label.label) };
        let description = one_line(&label.description);
        let sign = if description.is_empty() { "" } else { ": " };
        format!("{code}{name}{sign}{description}\n")
    };
    labels.iter().zip(legend.codes()).map(line).collect()
}

impl Kind for Prepared {
    fn head(&self) -> String {
        let Classify { instruction, labels, examples } = &self.task;
        let instruction = instruction.trim();
        let instruction = if instruction.is_empty() { "Classify each text." } else { instruction };
        let examples = shown(examples.iter().map(|e| (e.input.as_str(), self.code(&e.label))));
        format!("{instruction}\n\nLabels:\n{}{examples}", lines(labels, &self.legend))
    }

    fn asks_for(&self) -> String {
        let are_labels = self.legend.codes().iter().zip(&self.task.labels).all(|(c, l)| *c == l.label);
        format!(
            "Answer with the {} for every number, in JSON on one line without spaces",
            if are_labels { "label" } else { "code" }
        )
    }

    fn samples(&self) -> [String; 2] {
        [0, 1].map(|i| prompt::quote(self.legend.codes().get(i).map_or("", String::as_str)))
    }

    fn schema(&self) -> Value {
        json!({"type": "string", "enum": self.legend.codes()})
    }

    fn tokens(&self, _: usize) -> Span {
        self.span
    }

    fn longest(&self) -> Option<usize> {
        (!self.decides).then_some(LONGEST * self.span.planned)
    }

    fn read(&self, value: &RawValue) -> Result<Answer, Unfit> {
        let named = serde_json::from_str::<String>(value.get()).ok();
        let label = named.and_then(|code| self.legend.resolve(&code)).and_then(|i| self.task.labels.get(i));
        label.map(|l| Answer(vec![Some(l.label.clone())])).ok_or_else(Unfit::unknown_code)
    }

    fn choices(&self) -> Option<Choices<'_>> {
        self.decides.then(|| Choices { names: self.legend.codes(), are_levels: false })
    }

    /// Decisions come as JSON, in which no code has to be recognized.
    fn legend(&self) -> Option<&Legend> {
        (!self.decides).then_some(&self.legend)
    }
}

/// Reads labels: an object label → description, an array of labels, or an array of `{"label", "description"}`.
///
/// # Errors
/// Any other form, fewer than 2 or more than 250 labels, an empty label, one given twice (compared without case,
/// since models do not keep it).
pub fn labels_from_json(value: &Value) -> Result<Vec<Label>, Error> {
    let bad = || {
        Error::new("labels must be a JSON object or array").hint(
            "Write '{\"billing\": \"invoices, refunds\", \"other\": \"\"}', '[\"billing\", \"other\"]' or \
             '[{\"label\": \"billing\", \"description\": \"invoices\"}]'.",
        )
    };
    let labels: Vec<Label> = match value {
        Value::Object(map) => map
            .iter()
            .map(|(label, description)| match description {
                Value::String(s) => Ok(Label { label: label.clone(), description: s.clone() }),
                Value::Null => Ok(Label { label: label.clone(), description: String::new() }),
                _ => Err(bad()),
            })
            .collect::<Result<_, _>>()?,
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(s) => Ok(Label { label: s.clone(), description: String::new() }),
                Value::Object(o) if o.keys().all(|k| k == "label" || k == "description") => {
                    Label::deserialize(item).map_err(|_| bad())
                }
                _ => Err(bad()),
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(bad()),
    };
    check_labels(labels)
}

/// Checks number and distinctness of labels; see [`labels_from_json`].
///
/// # Errors
/// As [`labels_from_json`].
pub fn check_labels(labels: Vec<Label>) -> Result<Vec<Label>, Error> {
    if !(MIN_LABELS..=MAX_LABELS).contains(&labels.len()) {
        let message = format!("a classifier needs {MIN_LABELS} to {MAX_LABELS} labels, not {}", labels.len());
        return Err(Error::new(message).hint("Write '[\"billing\", \"other\"]': each text gets one of them."));
    }
    let mut seen = HashSet::new();
    for l in &labels {
        if l.label.trim().is_empty() {
            return Err(Error::new("a label must not be empty")
                .hint("Name it, such as \"other\": a text gets the label that fits best, and never none."));
        }
        if l.label.chars().any(char::is_control) {
            return Err(Error::new(format!("label {:?} contains a control character", l.label)));
        }
        if l.label.trim() != l.label {
            return Err(Error::new(format!("label \"{}\" begins or ends with a space", l.label)));
        }
        if !seen.insert(l.label.to_lowercase()) {
            return Err(Error::new(format!("label \"{}\" is given twice", l.label))
                .hint("Labels are compared without regard to case."));
        }
    }
    Ok(labels)
}

/// Reads examples: an array of `{"input", "label"}`.
///
/// # Errors
/// Any other form, or a label that is not among `labels`.
pub fn examples_from_json(value: &Value, labels: &[Label]) -> Result<Vec<Example>, Error> {
    if value.is_null() {
        return Ok(Vec::new());
    }
    let examples: Vec<Example> = Deserialize::deserialize(value).map_err(|_| {
        Error::new("examples must be a JSON array of objects with \"input\" and \"label\"")
            .hint("Write '[{\"input\": \"I was charged twice\", \"label\": \"billing\"}]'.")
    })?;
    for e in &examples {
        if !labels.iter().any(|l| l.label == e.label) {
            return Err(Error::new(format!("the label \"{}\" of an example is not among the labels", e.label))
                .hint("Give the example one of the labels, or add its label to them."));
        }
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_of_labels_mean_the_same() {
        let a = labels_from_json(&json!({"x": "", "y": ""})).unwrap();
        assert_eq!(a, labels_from_json(&json!(["x", "y"])).unwrap());
        assert_eq!(a, labels_from_json(&json!([{"label": "x"}, {"label": "y", "description": ""}])).unwrap());
    }

    #[test]
    fn bad_labels_are_refused() {
        let many: Vec<String> = (0..251).map(|i| format!("l{i}")).collect();
        for bad in [
            json!(["x"]),
            json!(["x", ""]),
            json!(["x", "X"]),
            json!("x"),
            json!([1, 2]),
            json!({"x": 1, "y": 2}),
            json!([{"label": "x", "desc": "y"}, "z"]),
            json!(many),
            json!(["a\nb", "c"]),
            json!([" a", "b"]),
        ] {
            assert!(labels_from_json(&bad).is_err(), "{bad}");
        }
        assert_eq!(labels_from_json(&json!(many[..250])).unwrap().len(), 250);
    }

    #[test]
    fn examples_must_use_the_labels() {
        let labels = labels_from_json(&json!(["x", "y"])).unwrap();
        assert!(examples_from_json(&json!([{"input": "i", "label": "z"}]), &labels).is_err());
        assert_eq!(examples_from_json(&json!([{"input": "i", "label": "y"}]), &labels).unwrap().len(), 1);
        assert!(examples_from_json(&Value::Null, &labels).unwrap().is_empty());
    }
}
