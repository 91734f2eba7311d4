//! How the answer of a row becomes the value of a job's column. The target is json or jsonb: all of an answer, as JSON. Else
//! it is the only value of an answer, as a text that goes through the type of the value into that of the column, as by an
//! assignment.

use llm_batch_core::task::{Answer, Column, Spec, Type, array_literal};
use pgrx::prelude::*;

use crate::catalog::{self, Target};
use crate::error::{Error, Result};

/// Category of types whose values are texts.
const STRINGS: core::ffi::c_char = b'S' as core::ffi::c_char;

/// The answer of a row as the text that is written.
#[derive(Debug, Clone)]
pub enum Fit {
    /// All of it as JSON.
    Json(Spec),
    /// A list as an array of Postgres.
    Array,
    /// The first value, as it is.
    Value,
}

impl Fit {
    /// For a column of a type, and how the text `value` is written to it in SQL; `target_type` as SQL names the type.
    pub fn new(spec: &Spec, type_oid: pg_sys::Oid, value: &str, target_type: &str) -> (Self, String) {
        let columns = spec.columns();
        let cast = |value: &str| format!("{value}::{target_type}");
        let only = match columns.as_slice() {
            [only] if !spec.has_names() => only,
            [only] if !catalog::is_json(type_oid) => only,
            _ => return (Self::Json(spec.clone()), cast(value)),
        };
        if catalog::is_json(type_oid) {
            let json = if is_json_text(only) { value.to_owned() } else { format!("pg_catalog.to_json({value})") };
            return (Self::Value, cast(&json));
        }
        // By assignment: a text that is too long for its column raises, where a cast would cut it.
        if is_string(type_oid) && (only.is_array || only.of != Type::Labels) {
            return (Self::Value, value.to_owned());
        }
        let fit = if only.is_array { Self::Array } else { Self::Value };
        match sql_type(only.of) {
            None => (fit, cast(value)),
            Some((name, _)) => {
                let list = if only.is_array { "[]" } else { "" };
                (fit, cast(&format!("{value}::pg_catalog.{name}{list}")))
            }
        }
    }

    /// What is written for an answer; none stays NULL.
    pub fn text(&self, answer: &Answer) -> Option<String> {
        match self {
            Self::Value => answer.0.first()?.clone(),
            Self::Array => array_literal(answer.0.first()?.as_deref()?),
            Self::Json(spec) => Some(spec.to_json(answer)),
        }
    }
}

/// Checks that answers fit a column. Raises what the type's input function raises.
pub fn check(spec: &Spec, target: &Target) -> Result<()> {
    check_types(spec, &target.column, target.type_oid)?;
    match spec.columns().as_slice() {
        [Column { values: Some(labels), is_array: false, .. }] => {
            catalog::check_labels(target, labels.iter().map(String::as_str))
        }
        _ => Ok(()),
    }
}

/// The same but for the labels.
pub fn check_types(spec: &Spec, column: &str, type_oid: pg_sys::Oid) -> Result<()> {
    let columns = spec.columns();
    let is_json = catalog::is_json(type_oid);
    let only = match columns.as_slice() {
        _ if is_json && spec.has_names() => return Ok(()),
        [only] => only,
        _ => {
            return Err(mismatch(format!(
                "an answer has {} fields but column \"{column}\" is of type {}",
                columns.len(),
                type_name(type_oid)?
            ))
            .hint("Give each field a column of its own with targets => '{\"column\": \"field\"}', or fill a column of type jsonb."));
        }
    };
    let is_label = only.of == Type::Labels && !only.is_array;
    if is_label || is_json || is_string(type_oid) || can_assign(only, type_oid) {
        return Ok(());
    }
    let what = if spec.has_names() { format!("field \"{}\"", only.name) } else { "the answer".to_owned() };
    let of = format!("{}{}", named(only.of), if only.is_array { "[]" } else { "" });
    let fits = if of == "text" { of.clone() } else { format!("{of}, text") };
    Err(mismatch(format!("{what} is of type {of} but column \"{column}\" is of type {}", type_name(type_oid)?))
        .hint(format!("Fill a column of type {fits} or jsonb.")))
}

fn mismatch(message: String) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH, message)
}

fn is_json_text(column: &Column) -> bool {
    column.is_array || column.of.is_json()
}

fn is_string(type_oid: pg_sys::Oid) -> bool {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    unsafe { pg_sys::TypeCategory(type_oid) == STRINGS }
}

/// The type of a value in pg_catalog, if it isn't a text.
fn sql_type(of: Type) -> Option<(&'static str, pg_sys::Oid)> {
    match of {
        Type::Text | Type::Labels => None,
        Type::Integer => Some(("int4", pg_sys::INT4OID)),
        Type::Bigint => Some(("int8", pg_sys::INT8OID)),
        Type::Numeric => Some(("numeric", pg_sys::NUMERICOID)),
        Type::Real => Some(("float4", pg_sys::FLOAT4OID)),
        Type::Boolean => Some(("bool", pg_sys::BOOLOID)),
        Type::Date => Some(("date", pg_sys::DATEOID)),
        Type::Timestamptz => Some(("timestamptz", pg_sys::TIMESTAMPTZOID)),
        Type::Jsonb => Some(("jsonb", pg_sys::JSONBOID)),
    }
}

/// Whether an assignment takes values of the column's type.
fn can_assign(column: &Column, to: pg_sys::Oid) -> bool {
    let from = sql_type(column.of).map_or(pg_sys::TEXTOID, |(_, oid)| oid);
    // SAFETY: catalog lookups on the main thread inside a transaction; both arrays have one element.
    unsafe {
        let from = if column.is_array { pg_sys::get_array_type(from) } else { from };
        pg_sys::can_coerce_type(1, &from, &to, pg_sys::CoercionContext::COERCION_ASSIGNMENT)
    }
}

fn type_name(oid: pg_sys::Oid) -> Result<String> {
    let name = crate::sql::one::<String>("SELECT pg_catalog.format_type($1, NULL)", &[oid.into()])?;
    Ok(name.unwrap_or_default())
}

fn named(of: Type) -> &'static str {
    if of == Type::Labels { Type::Text.name() } else { of.name() }
}
