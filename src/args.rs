//! Arguments of SQL functions, and the errors about the names in them.

use std::ffi::CStr;

use pgrx::prelude::*;

use crate::error::{Error, Result};

/// Refuses a NULL where a value is needed.
pub fn required<T>(value: Option<T>, name: &str) -> Result<T> {
    value.ok_or_else(|| {
        Error::new(PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED, format!("\"{name}\" must not be NULL"))
    })
}

/// A value of type `name`.
pub fn from_name(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}

/// A new object's name.
pub fn new_name(name: Option<&str>) -> Result<&str> {
    let name = required(name, "name")?;
    if name.trim().is_empty() || name.chars().count() > 200 {
        return Err(Error::invalid("a name must have 1 to 200 characters"));
    }
    Ok(name)
}

/// 42710.
pub fn exists(what: &str, name: &str, kind: &str) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT, format!("{what} \"{name}\" already exists"))
        .hint(format!("Change it with llm_batch.alter_{kind}()."))
}

/// 42704.
pub fn unknown(what: &str, name: &str) -> Error {
    let hint = match what {
        "task" => {
            "Create it with llm_batch.create_classifier(), create_extractor(), create_generator() or create_scorer()."
        }
        _ => "Create it with llm_batch.create_model().",
    };
    Error::unknown(format!("{what} \"{name}\" does not exist")).hint(hint)
}
