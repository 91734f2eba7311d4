//! Arguments of SQL functions, and the errors about the names in them.

use std::ffi::CStr;

use llm_batch_core::task::{noun, nouns};
use pgrx::prelude::*;

use crate::error::{Error, Result};

/// Most characters of a name.
const MOST_NAME: usize = 200;

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
    if name.trim().is_empty() || name.chars().count() > MOST_NAME {
        return Err(Error::invalid(format!("a name must have 1 to {MOST_NAME} characters"))
            .hint("Choose a name under which it is used from now on, such as 'topic'."));
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
    let create = match what {
        "task" => {
            let all: Vec<String> = nouns().map(|noun| format!("create_{noun}()")).collect();
            let (last, others) = all.split_last().map_or(("", &[][..]), |(last, others)| (last.as_str(), others));
            format!("Create it with llm_batch.{} or {last}.", others.join(", "))
        }
        "route" => "Create it with llm_batch.create_route().".to_owned(),
        _ => {
            "Create it with llm_batch.create_model(), or with llm_batch.create_route() from several models.".to_owned()
        }
    };
    // What is given for a name may be a text of any length.
    let cut: String = name.chars().take(MOST_NAME).collect();
    let dots = if cut.len() < name.len() { "…" } else { "" };
    let lists = if what == "model" {
        "tables llm_batch.model and llm_batch.route list".to_owned()
    } else {
        format!("table llm_batch.{what} lists")
    };
    Error::unknown(format!("{what} \"{cut}{dots}\" does not exist"))
        .hint(format!("The {lists} those that exist. {create}"))
}

/// With its article.
pub fn a(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// 42809, for a task that is not of the kind that a function is for.
pub fn wrong_kind(name: &str, wanted: &str) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, format!("task \"{name}\" is not {}", a(noun(wanted))))
}
