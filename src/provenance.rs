//! The option `provenance_column`: a column in which a job says of each row which task answered it.
//!
//! It is written by the UPDATE that writes the targets, and by none other. Where a value is NULL it names the field and the
//! input's hash, so that a later job knows that this NULL is the answer to this text.

use pgrx::prelude::*;
use pgrx::spi::quote_literal;
use serde_json::{Value, json};

use crate::catalog::Target;
use crate::error::{Error, Result};
use crate::sql::{self, name};

/// The option of a job.
pub const OPTION: &str = "provenance_column";

/// Takes the column's name out of a job's options.
pub fn take(options: &mut Value) -> Result<Option<String>> {
    match options.as_object_mut().and_then(|map| map.remove(OPTION)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(column)) => Ok(Some(column)),
        Some(other) => Err(Error::invalid(format!("invalid value for option \"{OPTION}\": {other}"))
            .hint("It must be the name of a column of type jsonb, such as '{\"provenance_column\": \"topic_by\"}'.")),
    }
}

/// Checks that a column can hold the provenance of a table's rows.
pub fn check(column: &str, target: &Target) -> Result<()> {
    if target.columns.iter().any(|c| c.name == column) {
        return Err(Error::invalid(format!("column \"{column}\" cannot be both a target and the provenance column"))
            .hint("Name a column of its own, of type jsonb."));
    }
    let found = sql::row(
        "SELECT a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod),
                a.attgenerated OPERATOR(pg_catalog.<>) ''
           FROM pg_catalog.pg_attribute a
          WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND a.attname OPERATOR(pg_catalog.=) $2::pg_catalog.name
            AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped",
        &[target.relation.into(), column.into()],
        |r| Ok((r.get::<pg_sys::Oid>(1)?, r.get::<String>(2)?, r.get::<bool>(3)?)),
    )?;
    let Some((type_oid, type_name, is_generated)) = found else {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("provenance column \"{column}\" of {} does not exist", target.name),
        )
        .hint(format!("Add it with ALTER TABLE {} ADD COLUMN {} jsonb.", target.name, name(column))));
    };
    if type_oid != pg_sys::JSONBOID {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            format!("provenance column \"{column}\" of {} is of type {type_name}", target.name),
        )
        .hint("Name a column of type jsonb."));
    }
    if is_generated || target.key_names.iter().any(|key| key == column) {
        let what = if is_generated { "is generated" } else { "belongs to the key" };
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            format!("column \"{column}\" of {} cannot be the provenance column", target.name),
        )
        .detail(format!("The column {what}."))
        .hint("Name a column of its own, of type jsonb."));
    }
    Ok(())
}

/// The origin of a job's answers: the same for all of its rows, until the task or its model changes.
#[derive(Debug, Clone, PartialEq)]
pub struct By<'a> {
    pub job: i64,
    pub task: &'a str,
    pub version: i32,
    pub model: &'a str,
}

impl By<'_> {
    /// A row's provenance but for the moment, which the UPDATE adds. `nulls`: fields whose value is NULL, of the input with
    /// this hash.
    pub fn of_row(&self, is_reused: bool, nulls: &[&str], hash: i64) -> String {
        let how = if is_reused { "reused" } else { "asked" };
        let mut row =
            json!({"job": self.job, "task": self.task, "version": self.version, "model": self.model, "how": how});
        if let (Some(row), false) = (row.as_object_mut(), nulls.is_empty()) {
            row.insert("nulls".to_owned(), json!(nulls));
            row.insert("input".to_owned(), json!(hash));
        }
        row.to_string()
    }
}

/// The test whether the NULL of a target is the answer.
pub struct Known<'a> {
    pub column: &'a str,
    pub task: &'a str,
    /// This version of the task, or a later one.
    pub version: i32,
}

impl Known<'_> {
    /// SQL that is true if the NULL of a field is the answer, else false or NULL. A value that somebody else has
    /// written there must not raise.
    pub fn is_answer(&self, field: &str, hash: &str) -> String {
        let column = name(self.column);
        let holds = json!({"task": self.task, "nulls": [field]}).to_string();
        format!(
            "{column} OPERATOR(pg_catalog.@>) {}::pg_catalog.jsonb
             AND ({column} OPERATOR(pg_catalog.->) 'version') OPERATOR(pg_catalog.>=) '{}'::pg_catalog.jsonb
             AND ({column} OPERATOR(pg_catalog.->) 'input') OPERATOR(pg_catalog.=) pg_catalog.to_jsonb({hash})",
            quote_literal(holds),
            self.version
        )
    }
}
