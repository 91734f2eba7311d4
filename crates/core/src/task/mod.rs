//! Tasks of several kinds.
//!
//! A kind is one file, or one folder, here. It says what the model is told, the JSON form of one row's answer, how many
//! tokens an answer takes, and how it is read and checked. Nothing else knows kinds.

mod classify;
mod embed;
mod extract;
mod generate;
mod kind;
mod score;
mod value;
mod verb;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dialect::Service;
use crate::options::{AskBy, Options, ServiceTier};
use crate::{CountTokens, Error};

pub use crate::codes::Label;
pub use classify::{Classify, Example as LabelExample, NO, YES, check_labels, labels_from_json};
pub use embed::Embed;
pub use extract::Extract;
pub use generate::Generate;
pub use kind::{Answer, Column, Example, Kind, Span, Unfit};
pub use score::Score;
pub use value::{Type, array_literal};
pub use verb::{Said, Subject, Verb};

/// Most bytes of a specification, as JSON: instruction, labels or fields, examples. That is some 60,000 tokens of prose,
/// sent with every request; and each stream that asks it is kept in memory.
pub const MAX_SPEC_BYTES: usize = 256 << 10;

/// A task: what to ask, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The specification of an answer.
    pub spec: Spec,
    /// The options for asking.
    pub options: Options,
}

impl Task {
    /// The provider's service that it asks; where it may ask either, the one that it falls back to.
    pub fn service(&self) -> Service {
        Self::service_of(self.spec.kind(), self.options.ask_by)
    }

    /// The provider's service that tasks of a kind ask.
    pub fn service_of(kind: &str, ask_by: AskBy) -> Service {
        match (kind, ask_by) {
            ("embed", _) => Service::Embeddings,
            ("classify" | "score", AskBy::Decisions) => Service::Decisions,
            _ => Service::Chat,
        }
    }

    /// The same task by decisions, if it may be asked so or in a chat.
    pub fn decided(&self) -> Option<Self> {
        let (Spec::Classify(_) | Spec::Score(_), AskBy::Auto) = (&self.spec, self.options.ask_by) else { return None };
        let options = Options { ask_by: AskBy::Decisions, ..self.options.clone() }.in_effect();
        Some(Self { spec: self.spec.clone(), options })
    }

    /// Refuses options that its kind cannot be asked with.
    ///
    /// # Errors
    /// If it is to be decided and is no choice among labels and no score; if it has a tier and is no chat; if it is to be
    /// asked about more rows in a request than it can be.
    pub fn check(&self) -> Result<(), Error> {
        if self.options.service_tier != ServiceTier::Default && self.service() != Service::Chat {
            let message = format!("{} have no option \"service_tier\"", self.service().name());
            return Err(Error::new(message).hint("Providers serve chats alone at the tier \"flex\"."));
        }
        if self.service() != Service::Embeddings {
            self.options.check_rows()?;
        }
        if self.options.ask_by != AskBy::Decisions || self.service() == Service::Decisions {
            return Ok(());
        }
        let message = format!("a task of kind \"{}\" cannot be asked by decisions", self.spec.kind());
        Err(Error::new(message).hint(
            "Decisions choose among labels, or levels of a score: they answer classifiers, scorers and llm_filter().",
        ))
    }
}

/// The specification of an answer, by kind.
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
    /// A vector.
    Embed(Embed),
}

/// The entry points of a kind's file, beside [`Kind`].
struct Known {
    name: &'static str,
    /// The users' noun for a task of the kind, as in `create_classifier()`.
    noun: &'static str,
    /// Members of the specification that a user writes among the options.
    options: &'static [&'static str],
    verbs: &'static [Verb],
    read: fn(&Map<String, Value>) -> Result<Spec, Error>,
}

/// All kinds: the one place that lists them, with [`Spec`] and its `match`es.
static KINDS: [Known; 5] = [
    Known {
        name: "classify",
        noun: "classifier",
        options: &[],
        verbs: &classify::VERBS,
        read: |m| Classify::from_json(m).map(Spec::Classify),
    },
    Known {
        name: "extract",
        noun: "extractor",
        options: &[],
        verbs: &extract::VERBS,
        read: |m| Extract::from_json(m).map(Spec::Extract),
    },
    Known {
        name: "generate",
        noun: "generator",
        options: generate::OPTIONS,
        verbs: &generate::VERBS,
        read: |m| Generate::from_json(m).map(Spec::Generate),
    },
    Known {
        name: "score",
        noun: "scorer",
        options: &[],
        verbs: &score::VERBS,
        read: |m| Score::from_json(m).map(Spec::Score),
    },
    Known {
        name: "embed",
        noun: "embedder",
        options: &[],
        verbs: &embed::VERBS,
        read: |m| Embed::from_json(m).map(Spec::Embed),
    },
];

/// The verb that asks tasks of every kind.
static RUN: Verb = Verb::of_tasks("run");

/// The verb of this name, and the kind of task that it asks; any, if there is none.
pub fn verb(name: &str) -> Option<(&'static Verb, Option<&'static str>)> {
    if name == RUN.name {
        return Some((&RUN, None));
    }
    KINDS.iter().find_map(|kind| Some((kind.verbs.iter().find(|verb| verb.name == name)?, Some(kind.name))))
}

/// Returns true if a verb of this kind takes labels or fields in place of a task's name.
pub fn takes_texts(kind: &str) -> bool {
    known(kind).is_ok_and(|known| known.verbs.iter().any(|verb| verb.subject == Subject::Texts))
}

/// The users' noun for a task of a kind.
pub fn noun(kind: &str) -> &'static str {
    known(kind).map_or("task", |known| known.noun)
}

/// The nouns for tasks of all kinds.
pub fn nouns() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|known| known.noun)
}

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
            Self::Embed(_) => "embed",
        }
    }

    /// The columns of an answer, in its order.
    pub fn columns(&self) -> Vec<Column> {
        match self {
            Self::Classify(task) => task.columns(),
            Self::Extract(task) => task.columns(),
            Self::Generate(task) => task.columns(),
            Self::Score(task) => task.columns(),
            Self::Embed(task) => task.columns(),
        }
    }

    /// Makes the task ready to be asked.
    pub fn prepare(&self, options: &Options, count: CountTokens) -> Box<dyn Kind> {
        match self {
            Self::Classify(task) => Box::new(classify::Prepared::new(task, options, count)),
            Self::Extract(task) => Box::new(extract::Prepared::new(task, options, count)),
            Self::Generate(task) => Box::new(generate::Prepared::new(task, count)),
            Self::Score(task) => Box::new(score::Prepared::new(task, options, count)),
            Self::Embed(task) => Box::new(embed::Prepared(task.clone())),
        }
    }

    /// The time zones that its fields name.
    pub fn time_zones(&self) -> Vec<&str> {
        match self {
            Self::Extract(task) => task.fields.iter().filter_map(|field| field.time_zone.as_deref()).collect(),
            _ => Vec::new(),
        }
    }

    /// Options that differ from the common defaults: vectors come back in packs as large as they may be.
    pub fn defaults(&self) -> Value {
        match self {
            Self::Embed(_) => serde_json::json!({"max_rows_per_request": 500}),
            _ => Value::Null,
        }
    }

    /// The embedder, if an answer is a vector.
    pub fn embeds(&self) -> Option<&Embed> {
        if let Self::Embed(task) = self { Some(task) } else { None }
    }

    /// Returns true if the values of an answer have names, even if there is only one.
    pub fn has_names(&self) -> bool {
        matches!(self, Self::Extract(_))
    }

    /// An answer as one text: its only value, an array as Postgres writes it, or the JSON of all.
    pub fn to_text(&self, answer: &Answer) -> Option<String> {
        if self.has_names() {
            return Some(self.to_json(answer));
        }
        let text = answer.0.first().cloned().flatten()?;
        if self.embeds().is_some() { array_literal(&text) } else { Some(text) }
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
