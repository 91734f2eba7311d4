//! Options, apart by who reads them: those of a task are read by core, a budget by the statement, the rest by jobs and
//! `llm_filter()`.

use llm_batch_core::options::Options;
use llm_batch_gateway::protocol::Allowance;
use serde_json::Value;

use crate::budget::{UNLIMITED, picodollars};
use crate::error::{Error, Result};
use crate::{beside, deadline, isolation, settings};

/// The options of a function that asks.
pub struct OfCall {
    pub task: Value,
    /// Most that the statement may spend; `llm_batch.statement_max_cost` holds as well.
    pub limit: Allowance,
}

/// Reads those of `llm_classify()` and the like: the task's, and a budget.
pub fn of_call(mut options: Value) -> Result<OfCall> {
    let cost = match take(&mut options, "max_cost") {
        None => UNLIMITED,
        Some(v) => match v.as_f64().filter(|n| *n > 0.0) {
            Some(n) => picodollars(n),
            None => return Err(wrong("max_cost", &v, "It must be a number of dollars greater than zero.")),
        },
    };
    let tokens = match take(&mut options, "max_tokens") {
        None => UNLIMITED,
        Some(v) => match v.as_u64().filter(|n| *n > 0) {
            Some(n) => n,
            None => return Err(wrong("max_tokens", &v, "It must be a whole number greater than zero.")),
        },
    };
    refuse_isolation(&options)?;
    let cost = cost.min(settings::statement_max_cost().map_or(UNLIMITED, picodollars));
    Ok(OfCall { task: options, limit: Allowance { cost, tokens } })
}

/// The options of `llm_filter()` and the like: a model and a task besides.
pub struct OfQuestion {
    pub call: OfCall,
    pub model: Option<String>,
    pub task: Option<String>,
}

pub fn of_question(mut options: Value) -> Result<OfQuestion> {
    let mut name = |key: &str| match take(&mut options, key) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name)),
        Some(other) => Err(wrong(key, &other, &format!("It must be the name of a {key}."))),
    };
    let (model, task) = (name("model")?, name("task")?);
    Ok(OfQuestion { call: of_call(options)?, model, task })
}

/// The options of `backfill()` and `estimate()`.
pub struct OfJob {
    pub task: Value,
    /// The expression that keeps rows apart.
    pub isolation: Option<String>,
    /// The column that says which task answered a row.
    pub provenance: Option<String>,
    /// The column for the probability of the answer.
    pub confidence: Option<String>,
    /// When it is to be done.
    pub deadline: Option<String>,
}

pub fn of_job(mut options: Value) -> Result<OfJob> {
    let isolation = isolation::take(&mut options)?;
    let (provenance, confidence) = (beside::PROVENANCE.take(&mut options)?, beside::CONFIDENCE.take(&mut options)?);
    let deadline = deadline::take(&mut options)?;
    refuse_budget(&options)?;
    Ok(OfJob { task: options, isolation, provenance, confidence, deadline })
}

/// Checks those of a task, which has no others.
pub fn check_of_task(options: &Value) -> Result<Options> {
    refuse_isolation(options)?;
    refuse_budget(options)?;
    Ok(Options::from_json([options])?)
}

/// Takes an option out. NULL stands for none.
fn take(options: &mut Value, key: &str) -> Option<Value> {
    options.as_object_mut()?.remove(key).filter(|v| !v.is_null())
}

fn wrong(key: &str, value: &Value, hint: &str) -> Error {
    Error::invalid(format!("invalid value for option \"{key}\": {value}")).hint(hint)
}

/// Isolation belongs to a table's rows.
fn refuse_isolation(options: &Value) -> Result<()> {
    if options.get(isolation::OPTION).is_none() {
        return Ok(());
    }
    Err(Error::invalid("unrecognized option \"isolation\"").hint(
        "It is an option of llm_batch.backfill() and llm_batch.estimate(). For llm_classify_batch() it is the third \
         column of the query.",
    ))
}

/// Budgets belong to jobs and statements.
fn refuse_budget(options: &Value) -> Result<()> {
    match ["max_cost", "max_tokens"].iter().find(|key| options.get(**key).is_some()) {
        None => Ok(()),
        Some(key) => Err(Error::invalid(format!("unrecognized option \"{key}\"")).hint(
            "A budget is an argument of llm_batch.backfill(), or an option of the functions that ask, such as \
             llm_classify_batch().",
        )),
    }
}
