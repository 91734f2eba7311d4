//! Kinds of tasks, a file each: the functions that make and change tasks of the kind, and its verbs. Their SQL is in
//! `sql/kind`. The rest of this crate knows no kind but through `llm_batch_core::task`.

mod classify;
mod embed;
mod extract;
mod generate;
mod score;

use pgrx::prelude::*;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::json::Json;
use crate::text::Text;

/// Reads JSON given as text, whose objects keep their order: the model is shown labels and fields in it.
fn read(text: Option<Text>, what: &str, sample: &str) -> Result<Value> {
    let Some(text) = text else { return Ok(Value::Null) };
    serde_json::from_str(&text.checked()?).map_err(|e| {
        Error::new(PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION, format!("{what} given as text must be JSON"))
            .detail(format!("The text is not JSON: {e}."))
            .hint(format!("Write {sample}."))
    })
}

fn value(given: Option<Json>) -> Value {
    given.map_or(Value::Null, |given| given.0)
}
