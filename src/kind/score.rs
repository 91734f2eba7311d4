//! Scorers: numbers within a range.

use pgrx::prelude::*;
use serde_json::{Value, json};

use super::value;
use crate::args::required;
use crate::error::{Error, Result};
use crate::json::Json;
use crate::scalar::{Answer, about};
use crate::task::define::{Made, alter, create};
use crate::text::Text;

pgrx::extension_sql_file!("../../sql/kind/score.sql", name = "score", requires = ["functions"]);

/// A bound of scores.
fn bound(given: Option<AnyNumeric>, name: &str) -> Result<Value> {
    let Some(given) = given else { return Ok(Value::Null) };
    let text = given.to_string();
    serde_json::from_str(&text).map_err(|_| Error::invalid(format!("\"{name}\" cannot be {text}")))
}

#[pg_extern(sql = false)]
fn create_scorer(
    name: Option<&str>,
    instruction: Option<&str>,
    low: Option<AnyNumeric>,
    high: Option<AnyNumeric>,
    model: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let members = json!({
        "instruction": required(instruction, "instruction")?,
        "low": bound(Some(required(low, "low")?), "low")?,
        "high": bound(Some(required(high, "high")?), "high")?,
        "examples": value(examples),
    });
    Ok(create("score", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn alter_scorer(
    name: Option<&str>,
    instruction: Option<&str>,
    low: Option<AnyNumeric>,
    high: Option<AnyNumeric>,
    model: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let members = json!({
        "instruction": instruction,
        "low": bound(low, "low")?,
        "high": bound(high, "high")?,
        "examples": value(examples),
    });
    Ok(alter("score", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn llm_score(input: Text, question: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<f32> {
    Ok(about("score", input, question, options, fcinfo)?.and_then(|score| score.parse().ok()))
}
