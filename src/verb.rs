//! The scalar functions that ask: what each takes and makes of it. One line a function; the plan node, the functions
//! themselves and EXPLAIN read it here.

use llm_batch_core::options::KEYS;
use llm_batch_core::task::{Spec, fields_from_names};
use pgrx::prelude::*;
use serde_json::{Map, Value, json};

use crate::args::wrong_kind;
use crate::error::{Error, Result};

/// The question that a function asks about its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// `llm_run(input, task)`, and `llm_classify()` and `llm_extract()` with a task
    Run,
    ClassifyTask,
    ExtractTask,
    /// `llm_embed(input, task)`
    Embed,
    /// `llm_classify(input, labels, options)`
    Classify,
    /// `llm_filter(input, question, options)`
    Filter,
    /// `llm_extract(input, fields, options)`
    Extract,
    /// `llm_generate(input, instruction, options)`
    Generate,
    /// `llm_summarize(input, options)`
    Summarize,
    /// `llm_translate(input, language, options)`
    Translate,
    /// `llm_score(input, question, options)`
    Score,
}

/// The arguments of a function between its text and its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    None,
    Text,
    Texts,
}

/// A function: its symbol, what it asks, its arguments behind the text.
struct Known(&'static str, Verb, Subject, bool);

const ALL: [Known; 11] = [
    Known("llm_run_wrapper", Verb::Run, Subject::Text, false),
    Known("llm_classify_wrapper", Verb::ClassifyTask, Subject::Text, false),
    Known("llm_extract_wrapper", Verb::ExtractTask, Subject::Text, false),
    Known("llm_embed_wrapper", Verb::Embed, Subject::Text, false),
    Known("llm_classify_labels_wrapper", Verb::Classify, Subject::Texts, true),
    Known("llm_filter_wrapper", Verb::Filter, Subject::Text, true),
    Known("llm_extract_fields_wrapper", Verb::Extract, Subject::Texts, true),
    Known("llm_generate_wrapper", Verb::Generate, Subject::Text, true),
    Known("llm_summarize_wrapper", Verb::Summarize, Subject::None, true),
    Known("llm_translate_wrapper", Verb::Translate, Subject::Text, true),
    Known("llm_score_wrapper", Verb::Score, Subject::Text, true),
];

/// The labels of a question's answers.
pub const YES: &str = "yes";
const NO: &str = "no";

impl Verb {
    /// The function with this symbol.
    pub fn of_symbol(symbol: &str) -> Option<Self> {
        ALL.iter().find(|known| known.0 == symbol).map(|known| known.1)
    }

    /// The arguments between the text and the options, and whether there are options.
    pub fn arguments(self) -> (Subject, bool) {
        ALL.iter().find(|known| known.1 == self).map_or((Subject::None, false), |known| (known.2, known.3))
    }

    /// The kind of task that it must be or make; any, for `llm_run()`.
    pub fn kind(self) -> Option<&'static str> {
        match self {
            Self::Run => None,
            Self::ClassifyTask | Self::Classify | Self::Filter => Some("classify"),
            Self::ExtractTask | Self::Extract => Some("extract"),
            Self::Generate | Self::Summarize | Self::Translate => Some("generate"),
            Self::Score => Some("score"),
            Self::Embed => Some("embed"),
        }
    }

    /// Returns true if its subject is the name of a task.
    pub fn names_task(self) -> bool {
        matches!(self, Self::Run | Self::ClassifyTask | Self::ExtractTask | Self::Embed)
    }

    /// Refuses a task of another kind.
    pub fn check_kind(self, name: &str, spec: &Spec) -> Result<()> {
        match self.kind().filter(|kind| *kind != spec.kind()) {
            None => Ok(()),
            Some(kind) => Err(wrong_kind(name, kind).hint("llm_run() asks tasks of every kind.")),
        }
    }

    /// Members of the specification that its options may have.
    fn own_options(self) -> Result<Vec<&'static str>> {
        let descriptions: &[&str] = if self.has_names() { &["descriptions"] } else { &[] };
        let of_kind = Spec::options(self.kind().unwrap_or("classify"))?;
        Ok(["instruction", "examples"].iter().chain(descriptions).chain(of_kind).copied().collect())
    }

    /// Its subject is an array: labels or fields, which may be described.
    fn has_names(self) -> bool {
        matches!(self, Self::Classify | Self::Extract)
    }

    /// Refuses what is none of its options, and a task where its subject is one.
    pub fn check_options(self, options: &Value, names_task: bool) -> Result<()> {
        if names_task && self.has_names() {
            return Err(Error::invalid("unrecognized option \"task\"")
                .hint("A second argument of type text names a task: llm_classify(input, task)."));
        }
        let own = self.own_options()?;
        let is_known = |key: &str| own.contains(&key) || KEYS.split(", ").any(|known| known == key);
        match options.as_object().and_then(|map| map.keys().find(|key| !is_known(key))) {
            None => Ok(()),
            Some(key) => {
                let task = if self.has_names() { "" } else { "task, " };
                Err(Error::invalid(format!("unrecognized option \"{key}\""))
                    .hint(format!("Valid options are: model, {task}{}, max_cost, max_tokens, {KEYS}.", own.join(", "))))
            }
        }
    }

    /// Refuses a task that does not answer as it returns.
    pub fn check_base(self, name: &str, spec: &Spec) -> Result<()> {
        self.check_kind(name, spec)?;
        let is_yes_or_no = || {
            let columns = spec.columns();
            let labels = columns.first().and_then(|column| column.values.as_deref()).unwrap_or_default();
            labels.len() == 2 && [YES, NO].iter().all(|word| labels.iter().any(|label| label == word))
        };
        if self == Self::Filter && !is_yes_or_no() {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
                format!("task \"{name}\" does not answer with yes or no"),
            )
            .hint("llm_filter() asks classifiers with the labels \"yes\" and \"no\"."));
        }
        Ok(())
    }

    /// The specification of what it asks: that of a task, if one is named, with what the options say, which is taken out of
    /// them, and its subject. Behind a task's instruction the subject may be empty.
    pub fn spec(self, subject: &[Option<String>], options: &mut Value, base: Option<&Spec>) -> Result<Spec> {
        let kind = self.kind().unwrap_or("classify");
        let mut spec = match base.map(serde_json::to_value) {
            Some(Ok(Value::Object(map))) => map,
            _ => Map::new(),
        };
        let mut take = |key: &str| options.as_object_mut().and_then(|o| o.remove(key)).filter(|v| !v.is_null());
        let descriptions = match self.has_names().then(|| take("descriptions")).flatten() {
            None => Map::new(),
            Some(Value::Object(map)) => map,
            Some(other) => {
                return Err(Error::invalid(format!("invalid value for option \"descriptions\": {other}"))
                    .hint("It must be an object of names and their descriptions."));
            }
        };
        for key in self.own_options()? {
            if let Some(value) = take(key) {
                spec.insert(key.to_owned(), value);
            }
        }
        let names: Vec<String> = subject.iter().map(|name| name.clone().unwrap_or_default()).collect();
        let words = names.first().map_or("", |s| s.trim());
        let instruction = spec.get("instruction").and_then(Value::as_str).unwrap_or_default().to_owned();
        let with = |words: String| if instruction.is_empty() { words } else { format!("{instruction}\n{words}") };
        if base.is_some() && words.is_empty() {
            return Ok(Spec::from_json(kind, &Value::Object(spec))?);
        }
        match self {
            Self::Run | Self::ClassifyTask | Self::ExtractTask | Self::Embed => {}
            Self::Classify => {
                if let Some(name) = descriptions.keys().find(|name| !names.contains(name)) {
                    return Err(Error::invalid(format!(
                        "the label \"{name}\" of a description is not among the labels"
                    )));
                }
                let label =
                    |name: &String| json!({"label": name, "description": descriptions.get(name).unwrap_or(&json!(""))});
                spec.insert("labels".to_owned(), names.iter().map(label).collect());
            }
            Self::Filter => {
                some(words, "question", "Ask a question that can be answered with yes or no.")?;
                let question = with(format!("Answer this question about each text: {words}"));
                spec.insert("instruction".to_owned(), question.into());
                spec.entry("labels").or_insert_with(|| json!({YES: "the answer is yes", NO: "the answer is no"}));
            }
            Self::Extract => {
                spec.insert("fields".to_owned(), json!(fields_from_names(&names, &descriptions)?));
            }
            Self::Generate => {
                some(words, "instruction", "Say what to write about each text.")?;
                spec.insert("instruction".to_owned(), with(words.to_owned()).into());
            }
            Self::Summarize => {
                spec.insert("instruction".to_owned(), with("Summarize each text.".to_owned()).into());
                let has_bound = ["max_words", "max_output_tokens"].iter().any(|key| spec.contains_key(*key));
                if !has_bound {
                    spec.insert("max_words".to_owned(), SUMMARY_WORDS.into());
                }
            }
            Self::Translate => {
                some(words, "language", "Name a language, such as German.")?;
                let translate = format!("Translate each text into {words}. Write nothing but the translation.");
                spec.insert("instruction".to_owned(), with(translate).into());
            }
            Self::Score => {
                some(words, "question", "Ask what the score tells of each text, such as how urgent it is.")?;
                spec.insert("instruction".to_owned(), with(words.to_owned()).into());
                spec.entry("low").or_insert_with(|| 0.into());
                spec.entry("high").or_insert_with(|| 1.into());
            }
        }
        Ok(Spec::from_json(kind, &Value::Object(spec))?)
    }
}

/// Most words of a summary, if nothing is said.
const SUMMARY_WORDS: u32 = 40;

fn some(words: &str, what: &str, hint: &str) -> Result<()> {
    if words.is_empty() {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("the {what} must not be empty"),
        )
        .hint(hint));
    }
    Ok(())
}
