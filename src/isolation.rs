//! The option `isolation`: an expression of a job, or the third column of a query. The gateway receives the SHA-256 of the
//! value, so the value may have any length and stays unknown to it. NULL is a value of its own.

use pgrx::prelude::*;
use pgrx::{IntoDatum, direct_function_call};
use serde_json::Value;

use crate::error::{Error, Result};

/// The option of a job.
pub const OPTION: &str = "isolation";
/// Stands for NULL.
const NULL: &str = "";

/// Takes the expression out of a job's options.
pub fn take(options: &mut Value) -> Result<Option<String>> {
    match options.as_object_mut().and_then(|map| map.remove(OPTION)) {
        None => Ok(None),
        Some(Value::String(expression)) => Ok(Some(expression)),
        Some(other) => Err(Error::invalid(format!("invalid value for option \"{OPTION}\": {other}")).hint(
            "It must be a string with an SQL expression over the row, such as '{\"isolation\": \"tenant_id\"}'.",
        )),
    }
}

/// The SQL of what the gateway is told of a row; NULL if the job has no such option.
pub fn digest_sql(expression: Option<&str>) -> String {
    let Some(expression) = expression else { return "NULL::pg_catalog.text".to_owned() };
    // The line end closes a comment at the end of the expression. The bytes as they are, be they a text or not: read as
    // a bytea, nothing but a backslash means anything else.
    format!(
        r"COALESCE(pg_catalog.encode(pg_catalog.sha256(pg_catalog.replace((({expression}
))::pg_catalog.text, E'\\', E'\\\\')::pg_catalog.bytea), 'hex'), '{NULL}')"
    )
}

/// The same for a value at hand, as its type writes it.
pub fn digest(value: Option<&[u8]>) -> Result<String> {
    let Some(value) = value else { return Ok(NULL.to_owned()) };
    // SAFETY: a built-in function of one bytea, which is not NULL, on the main thread.
    let hash = unsafe { direct_function_call::<Vec<u8>>(pg_sys::sha256_bytea, &[value.to_vec().into_datum()]) };
    let hash = hash.ok_or_else(|| Error::invalid("an isolation has no hash"))?;
    Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}
