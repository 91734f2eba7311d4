//! Verbs: functions that ask about one text, in words of their own or by the name of a task. The file of a kind has its own.

use serde_json::{Map, Value};

use crate::Error;

/// The argument of a verb between the text and the options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The name of a task. There are no options.
    Task,
    /// There is none.
    None,
    /// Words: a question, an instruction, a language.
    Text,
    /// Labels or fields, which may be described.
    Texts,
}

/// A function that asks about one text.
#[derive(Debug)]
pub struct Verb {
    /// Its name: the function of the library is `llm_NAME_wrapper`.
    pub name: &'static str,
    /// Its argument between the text and the options.
    pub subject: Subject,
    /// Puts the subject into a specification, which has what a task and the options say.
    pub put: fn(&mut Map<String, Value>, &Said) -> Result<(), Error>,
}

impl Verb {
    /// One that asks tasks by their names.
    pub(super) const fn of_tasks(name: &'static str) -> Self {
        Self { name, subject: Subject::Task, put: |_, _| Ok(()) }
    }
}

/// The subject of a call.
#[derive(Debug)]
pub struct Said<'a> {
    /// Its words; the first of several.
    pub words: &'a str,
    /// Labels or fields.
    pub names: &'a [String],
    /// Descriptions of them.
    pub descriptions: &'a Map<String, Value>,
}

impl Said<'_> {
    /// The words, which must not be empty.
    pub(super) fn some(&self, what: &str, hint: &str) -> Result<&str, Error> {
        if self.words.is_empty() {
            return Err(Error::new(format!("the {what} must not be empty")).hint(hint));
        }
        Ok(self.words)
    }
}

/// Adds words to the instruction.
pub(super) fn instruct(spec: &mut Map<String, Value>, words: &str) {
    let before = spec.get("instruction").and_then(Value::as_str).filter(|before| !before.is_empty());
    let all = before.map_or_else(|| words.to_owned(), |before| format!("{before}\n{words}"));
    spec.insert("instruction".to_owned(), all.into());
}
