//! The option `provenance_column`: a column in which a job says of each row which task answered it.
//!
//! It is written by the UPDATE that writes the targets, and by none other. Where a value is NULL it names the field and the
//! input's hash, so that a later job knows that this NULL is the answer to this text.

use pgrx::spi::quote_literal;
use serde_json::{Value, json};

use crate::sql::name;

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
        let row = json!({"job": self.job, "task": self.task, "version": self.version, "model": self.model, "how": how});
        with_nulls(row, nulls, hash)
    }
}

/// The provenance of a row whose values repairs have changed.
pub fn repaired(by: &str, nulls: &[&str], hash: i64) -> String {
    serde_json::from_str(by).map_or_else(|_| by.to_owned(), |row| with_nulls(row, nulls, hash))
}

fn with_nulls(mut row: Value, nulls: &[&str], hash: i64) -> String {
    if let Some(row) = row.as_object_mut() {
        row.remove("nulls");
        row.remove("input");
        if !nulls.is_empty() {
            row.insert("nulls".to_owned(), json!(nulls));
            row.insert("input".to_owned(), json!(hash));
        }
    }
    row.to_string()
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
