//! Classifiers: what to ask.

use llm_batch_core::options::Options;
use llm_batch_core::task::{Spec, Task};
use llm_batch_gateway::protocol::Stream;
use pgrx::datum::{DatumWithOid, JsonB};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::{Value, json};

use crate::args::{exists, new_name, required, unknown};
use crate::budget::Price;
use crate::client::check_here;
use crate::error::{Error, Result};
use crate::json::Json;
use crate::options::check_of_classifier;
use crate::process::{current_user, my_database};
use crate::text::Text;
use crate::{changes, model, owner, sql, txn};

/// A task and the name of the model it is asked of.
pub struct Known {
    pub task: Task,
    pub model: String,
}

/// Looks a classifier up; `options` override its own.
pub fn load(name: &str, options: &Value) -> Result<Known> {
    let found = sql::row(
        "SELECT c.model, c.instruction, c.labels, c.examples, c.options FROM llm_batch.classifier c
          WHERE c.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
        |row| {
            let [labels, examples] =
                ["labels", "examples"].map(|name| row.get::<JsonB>(name).map_or(Value::Null, |v| v.0));
            let spec =
                json!({"instruction": row.get::<String>("instruction")?, "labels": labels, "examples": examples});
            Ok(Known {
                model: row.get("model")?,
                task: Task {
                    spec: Spec::from_json("classify", &spec)?,
                    options: Options::from_json([&row.get::<JsonB>("options")?.0, options])?,
                },
            })
        },
    )?;
    found.ok_or_else(|| unknown("classifier", name))
}

/// A task as a stream, with what its model is called and costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub stream: Stream,
    pub model: String,
    pub price: Price,
}

impl Asked {
    /// The same as a stream that spends only what it is allowed to.
    pub fn with_budget(mut self, is_in_dollars: bool) -> Result<Self> {
        if is_in_dollars {
            self.price.check(&self.model)?;
        }
        self.stream.budget = Some(self.price.rates.filter(|_| is_in_dollars).unwrap_or_default());
        Ok(self)
    }
}

impl Known {
    /// The task as a stream on behalf of a role, with the settings of this moment.
    pub fn stream(self, role: pg_sys::Oid, interactive: bool) -> Result<Asked> {
        let known = model::load(&self.model)?;
        let stream = Stream {
            database: my_database(),
            role: role.to_u32(),
            interactive,
            endpoint: crate::provider::endpoint(known.server, role)?,
            model: known.model,
            task: self.task,
            budget: None,
        };
        Ok(Asked { stream, model: self.model, price: known.price })
    }
}

/// What a classifier's row holds, checked.
struct Checked {
    labels: Value,
    examples: Value,
    options: Value,
}

fn check(labels: &Value, examples: &Value, options: &Value) -> Result<Checked> {
    let spec = Spec::from_json("classify", &json!({"labels": labels, "examples": examples}))?;
    let spec = serde_json::to_value(spec).unwrap_or_default();
    check_of_classifier(options)?;
    Ok(Checked { labels: spec["labels"].clone(), examples: spec["examples"].clone(), options: options.clone() })
}

/// Labels as text, in the order of the text: the model is shown them in it.
fn read_labels(text: Text) -> Result<Value> {
    serde_json::from_str(&text.checked()?).map_err(|e| {
        Error::new(PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION, "labels given as text must be JSON")
            .detail(format!("The text is not JSON: {e}."))
            .hint("Write '[\"billing\", \"other\"]' or ARRAY['billing', 'other'].")
    })
}

fn check_model(name: &str) -> Result<()> {
    let known = model::load(name)?;
    crate::provider::endpoint(known.server, current_user()).map(|_| ())
}

#[pg_extern(sql = false)]
fn create_classifier(
    name: Option<&str>,
    labels: Option<Text>,
    model: Option<&str>,
    instruction: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> std::result::Result<(), ErrorReport> {
    check_here()?;
    let name = new_name(name)?;
    let model = match model {
        Some(model) => model.to_owned(),
        None => model::default(None)?,
    };
    let json = |v: Option<Json>| v.map_or(Value::Null, |v| v.0);
    let options = json(options);
    let options = if options.is_null() { json!({}) } else { options };
    let checked = check(&read_labels(required(labels, "labels")?)?, &json(examples), &options)?;
    check_model(&model)?;
    let args: Vec<DatumWithOid> = vec![
        name.into(),
        current_user().into(),
        model.into(),
        instruction.unwrap_or_default().into(),
        JsonB(checked.labels).into(),
        JsonB(checked.examples).into(),
        JsonB(checked.options).into(),
    ];
    let made = txn::as_extension_owner(|| {
        sql::run(
            "INSERT INTO llm_batch.classifier (name, owner, owner_name, home, model, instruction, labels, examples, options)
             VALUES ($1, $2, pg_get_userbyid($2), llm_batch.home(), $3, $4, $5, $6, $7) ON CONFLICT (name) DO NOTHING RETURNING 1",
            &args,
        )
    })?;
    if made == 0 {
        return Err(exists("classifier", name).into());
    }
    Ok(())
}

#[pg_extern(sql = false)]
fn alter_classifier(
    name: Option<&str>,
    labels: Option<Text>,
    model: Option<&str>,
    instruction: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> std::result::Result<(), ErrorReport> {
    let name = required(name, "name")?;
    owner::check("classifier", name)?;
    if let Some(model) = model {
        check_model(model)?;
    }
    let now = sql::row(
        "SELECT labels, examples, options FROM llm_batch.classifier WHERE name = $1",
        &[name.into()],
        |row| Ok((row.get::<JsonB>(1)?.0, row.get::<JsonB>(2)?.0, row.get::<JsonB>(3)?.0)),
    )?;
    let (old_labels, old_examples, old_options) = now.unwrap_or_default();
    let new = |given: Option<Json>, old: Value| given.map_or(old, |g| g.0);
    // Examples may name labels, so all of it is checked together.
    let labels = labels.map_or(Ok(old_labels), read_labels)?;
    let checked = check(&labels, &new(examples, old_examples), &new(options, old_options))?;
    let args: Vec<DatumWithOid> = vec![
        name.into(),
        model.into(),
        instruction.into(),
        JsonB(checked.labels).into(),
        JsonB(checked.examples).into(),
        JsonB(checked.options).into(),
    ];
    txn::as_extension_owner(|| {
        sql::run(
            "UPDATE llm_batch.classifier SET model = coalesce($2, model), instruction = coalesce($3, instruction),
                    labels = $4, examples = $5, options = $6 WHERE name = $1",
            &args,
        )?;
        changes::tell();
        Ok(())
    })?;
    Ok(())
}

#[pg_extern(sql = false)]
fn drop_classifier(name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    let name = required(name, "name")?;
    owner::check("classifier", name)?;
    txn::as_extension_owner(|| {
        let job = sql::one::<i64>(
            "SELECT job_id FROM llm_batch.progress WHERE task = $1 AND status IN ('running', 'paused') ORDER BY 1",
            &[name.into()],
        )?;
        if let Some(job) = job {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
                format!("cannot drop classifier \"{name}\" because job {job} uses it"),
            )
            .hint(format!("Wait for the job, or end it with llm_batch.cancel({job}).")));
        }
        sql::run("DELETE FROM llm_batch.classifier WHERE name = $1", &[name.into()])
    })?;
    Ok(())
}
