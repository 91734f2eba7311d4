//! The arguments of a scalar function beside its text: the same for every row of a call.

use llm_batch_core::options::OnError;
use llm_batch_gateway::protocol::{Allowance, Verdict};
use pgrx::prelude::*;
use serde_json::{Value, json};

use crate::classifier::{self, Asked, Known};
use crate::error::{Error, Result};
use crate::options::{OfCall, of_call, of_question};
use crate::process::current_user;
use crate::settings;

/// The arguments of a call but its text.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// `llm_classify(input, task)`
    Task(String),
    /// `llm_classify(input, labels, options)`; the author of the view, policy or cursor that it stands in
    Labels(Vec<Option<String>>, Value, Option<pg_sys::Oid>),
    /// `llm_filter(input, question, options)`; the same
    YesNo(String, Value, Option<pg_sys::Oid>),
}

/// A question that can be asked.
pub struct Prepared {
    pub asked: Asked,
    /// What the statement may spend.
    pub limit: Allowance,
    pub conclude: Conclude,
}

/// How verdicts become answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Conclude {
    on_error: OnError,
}

impl Question {
    /// The model that the setting names, if that may be the one to be asked. Classifiers have their own.
    pub fn default_model(&self) -> Option<String> {
        (!matches!(self, Self::Task(_))).then(settings::default_model)
    }

    fn known(&self) -> Result<(Known, Allowance)> {
        Ok(match self {
            Self::Task(name) => {
                let OfCall { task: options, limit } = of_call(json!({}))?;
                (classifier::load(name, &options)?, limit)
            }
            Self::Labels(labels, options, author) => {
                let OfCall { task: options, limit } = of_call(options.clone())?;
                (classifier::from_labels(labels.clone(), &options, *author)?, limit)
            }
            Self::YesNo(question, options, author) => {
                let (OfCall { task: options, limit }, model) = of_question(options.clone())?;
                (classifier::from_question(question, model, &options, *author)?, limit)
            }
        })
    }

    /// The model's name and the most rows of a request, if the question is one that can be asked.
    pub fn model(&self) -> Option<(String, u32)> {
        let (known, _) = self.known().ok()?;
        Some((known.model, known.task.options.max_rows_per_request))
    }

    /// Looks up all that is needed to ask on behalf of the current user.
    pub fn prepare(&self) -> Result<Prepared> {
        let (known, limit) = self.known()?;
        let conclude = Conclude { on_error: known.task.options.on_error };
        Ok(Prepared { asked: known.stream(current_user(), true)?, limit, conclude })
    }
}

impl Conclude {
    /// The label of a verdict; without one NULL and a warning, or an error if the task's options say so.
    pub fn label(&self, verdict: &Verdict) -> Result<Option<String>> {
        let detail = match verdict {
            Verdict::Answer(answer) => return Ok(answer.0.first().cloned().flatten()),
            Verdict::Skip { class, detail } | Verdict::Fail { class, detail } => format!("{class}: {detail}"),
            Verdict::Withdrawn => return Ok(None),
        };
        let message = "the model gave no label for a text";
        match self.on_error {
            OnError::Error => Err(Error::new(PgSqlErrorCode::ERRCODE_DATA_EXCEPTION, message)
                .detail(detail)
                .hint("Set the option on_error to \"null\" to get NULL for such a text.")),
            OnError::Null => {
                ereport!(WARNING, PgSqlErrorCode::ERRCODE_WARNING, message, detail);
                Ok(None)
            }
        }
    }
}
