//! The arguments of a scalar function beside its text: the same for every row of a call.

use llm_batch_core::options::OnError;
use llm_batch_core::task::{Spec, Task};
use llm_batch_gateway::protocol::{Allowance, Verdict};
use pgrx::prelude::*;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::options::{OfCall, OfQuestion, of_call, of_question};
use crate::process::current_user;
use crate::task::{self, Asked, Known};
use crate::verb::Verb;
use crate::{model, settings, sql};

/// The arguments of a call but its text.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    pub verb: Verb,
    /// The name of a task, a question; or labels, or fields.
    pub subject: Vec<Option<String>>,
    pub options: Value,
    /// The author of the view, policy or cursor that it stands in.
    pub author: Option<pg_sys::Oid>,
}

/// A question that can be asked.
pub struct Prepared {
    pub asked: Asked,
    /// Most that the statement may spend.
    pub limit: Allowance,
    pub conclude: Conclude,
}

/// Turns verdicts into answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Conclude {
    spec: Spec,
    on_error: OnError,
}

impl Question {
    /// The model that the setting names, if that may be the one to be asked. Tasks have their own.
    pub fn default_model(&self) -> Option<String> {
        (!self.verb.names_task()).then(settings::default_model)
    }

    fn known(&self) -> Result<(Known, Allowance)> {
        if !self.verb.names_task() {
            return ad_hoc(self.verb, &self.subject, self.options.clone(), self.author);
        }
        let name = self.subject.first().cloned().flatten().unwrap_or_default();
        let OfCall { task: options, limit } = of_call(self.options.clone())?;
        let known = task::load(&name, &options).map_err(|e| {
            if self.verb.has_array_form() && name.trim_start().starts_with(['{', '[']) {
                return e.hint(
                    "A text names a task. To ask without one, write an array: of labels, such as ARRAY['billing', 'other'] or \
                     '{billing,other}'::text[], or of fields, such as ARRAY['amount numeric', 'due date'].",
                );
            }
            // A name may have spaces, but is rather a text that has the place of one.
            if !name.trim().contains(char::is_whitespace) || e.code != PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT {
                return e;
            }
            e.hint("The text to ask about comes first, and the name of a task behind it.")
        })?;
        self.verb.check_kind(&name, &known.task.spec)?;
        Ok((known, limit))
    }

    /// The model's name and the most rows of a request, if the question is one that can be asked.
    pub fn model(&self) -> Option<(String, u32)> {
        let (known, _) = self.known().ok()?;
        Some((known.model, known.task.options.max_rows_per_request))
    }

    /// Looks up all that is needed to ask on behalf of the current user.
    pub fn prepare(&self) -> Result<Prepared> {
        let (known, limit) = self.known()?;
        let conclude = Conclude { spec: known.task.spec.clone(), on_error: known.task.options.on_error };
        Ok(Prepared { asked: known.stream(current_user(), true)?, limit, conclude })
    }
}

/// Prepares a verb with a subject of its own. The model is that of the options, or of the task that they name, or else
/// the default one.
pub fn ad_hoc(
    verb: Verb,
    subject: &[Option<String>],
    options: Value,
    author: Option<pg_sys::Oid>,
) -> Result<(Known, Allowance)> {
    let OfQuestion { call: OfCall { task: mut options, limit }, model, task: name } = of_question(options)?;
    verb.check_options(&options, name.is_some())?;
    if let ([Some(words)], true, None) = (subject, verb.is_instructed(), &name) {
        refuse_name(words)?;
    }
    let base = name.as_deref().map(|name| task::load(name, &Value::Null)).transpose()?;
    if let (Some(name), Some(base)) = (&name, &base) {
        verb.check_base(name, &base.task.spec)?;
    }
    let spec = verb.spec(subject, &mut options, base.as_ref().map(|base| &base.task.spec))?;
    let (before, of_task, checks) =
        base.map_or_else(Default::default, |base| (base.task.options, Some(base.model), base.checks));
    let task = Task { spec, options: before.with(&options)? };
    let model = model.or(of_task).map_or_else(|| model::default(author), Ok)?;
    Ok((Known { model, version: 0, task, checks }, limit))
}

/// Refuses the name of a task of the caller's where an instruction stands: the model would be told the name alone, and paid
/// for. What others call their tasks is no reason.
fn refuse_name(instruction: &str) -> Result<()> {
    // An instruction has more than a word.
    if instruction.contains(char::is_whitespace) {
        return Ok(());
    }
    let found = sql::one::<i32>(
        "SELECT 1 FROM llm_batch.task t
          WHERE t.name OPERATOR(pg_catalog.=) $1 AND llm_batch.owner_now(t.owner, t.owner_name, t.home) OPERATOR(pg_catalog.=) $2",
        &[instruction.into(), current_user().into()],
    )?;
    match found {
        None => Ok(()),
        Some(_) => Err(Error::invalid(format!("\"{instruction}\" is the name of a task, not an instruction")).hint(
            "llm_run(input, task) asks a task. To use its instruction with other options, set the option \"task\".",
        )),
    }
}

impl Conclude {
    /// The answer of a verdict; without one NULL and a warning, or an error if the task's options say so.
    pub fn answer(&self, verdict: &Verdict) -> Result<Option<String>> {
        let detail = match verdict {
            Verdict::Answer(answer) => return Ok(self.spec.to_text(answer)),
            Verdict::Skip { class, detail } | Verdict::Fail { class, detail } => format!("{class}: {detail}"),
            Verdict::Withdrawn => return Ok(None),
        };
        let message = "the model gave no answer for a text";
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
