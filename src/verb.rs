//! The scalar functions that ask: each file of a kind in core has its own, and `llm_run()` asks tasks of every kind. The plan
//! node, the functions themselves and EXPLAIN read here which they are.

use llm_batch_core::options::KEYS;
use llm_batch_core::task::{self, NO, Said, Spec, Subject, YES};
use pgrx::prelude::*;
use serde_json::{Map, Value};

use crate::args::wrong_kind;
use crate::error::{Error, Result};

/// A function that asks about its text.
#[derive(Debug, Clone, Copy)]
pub struct Verb {
    of: &'static task::Verb,
    /// The kind of task that it must be or make; any, for `llm_run()`.
    kind: Option<&'static str>,
}

impl PartialEq for Verb {
    fn eq(&self, other: &Self) -> bool {
        self.of.name == other.of.name
    }
}

impl Verb {
    fn known(name: &str) -> Option<Self> {
        task::verb(name).map(|(of, kind)| Self { of, kind })
    }

    /// The verb of this name.
    pub fn named(name: &str) -> Result<Self> {
        Self::known(name).ok_or_else(|| Error::unknown(format!("there is no function llm_{name}()")))
    }

    /// The function with this symbol.
    pub fn of_symbol(symbol: &str) -> Option<Self> {
        symbol.strip_prefix("llm_")?.strip_suffix("_wrapper").and_then(Self::known)
    }

    /// The argument between the text and the options. A name of a task has none behind it.
    pub fn subject(self) -> Subject {
        self.of.subject
    }

    /// Returns true if its subject is the name of a task.
    pub fn names_task(self) -> bool {
        self.of.subject == Subject::Task
    }

    /// Returns true if its subject is an instruction or a question: not the language of `llm_translate()`.
    pub fn is_instructed(self) -> bool {
        self.of.subject == Subject::Text && self.of.name != "translate"
    }

    /// Returns true if the same function takes labels or fields in place of a task's name.
    pub fn has_array_form(self) -> bool {
        self.kind.is_some_and(task::takes_texts)
    }

    /// Refuses a task of another kind.
    pub fn check_kind(self, name: &str, spec: &Spec) -> Result<()> {
        match self.kind.filter(|kind| *kind != spec.kind()) {
            None => Ok(()),
            Some(kind) => {
                Err(wrong_kind(name, kind)
                    .hint("llm_run(), llm_run_array() and llm_run_batch() ask tasks of every kind."))
            }
        }
    }

    /// Members of the specification that its options may have.
    fn own_options(self) -> Result<Vec<&'static str>> {
        let descriptions: &[&str] = if self.has_names() { &["descriptions"] } else { &[] };
        let of_kind = Spec::options(self.kind.unwrap_or("classify"))?;
        Ok(["instruction", "examples"].iter().chain(descriptions).chain(of_kind).copied().collect())
    }

    /// Its subject is an array: labels or fields, which may be described.
    fn has_names(self) -> bool {
        self.of.subject == Subject::Texts
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
        if self.of.name == "filter" && !is_yes_or_no() {
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
        let kind = self.kind.unwrap_or("classify");
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
        if base.is_some() && words.is_empty() {
            return Ok(Spec::from_json(kind, &Value::Object(spec))?);
        }
        (self.of.put)(&mut spec, &Said { words, names: &names, descriptions: &descriptions })?;
        Ok(Spec::from_json(kind, &Value::Object(spec))?)
    }
}
