//! The expressions of a task: read from its options, and made one statement.

use llm_batch_core::task::{Column, Type};
use pgrx::prelude::*;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::field::{sql_type, type_oid};
use crate::sql;

/// The options: each is a text, or for an extractor an object of fields and texts.
pub const OPTIONS: [&str; 3] = ["repair", "check", "check_hint"];
/// The row that expressions read, as SQL calls it.
pub const ROW: &str = "llm_batch row";
/// Most bytes of what a model is told.
const MOST_HINT: usize = 500;

/// The expressions for one value of an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rule {
    pub repair: Option<String>,
    pub check: Option<String>,
    pub hint: Option<String>,
}

/// The texts of an option by the positions of their columns.
pub fn by_column(key: &str, value: &Value, has_names: bool, columns: &[Column]) -> Result<Vec<(usize, String)>> {
    let wrong = || {
        let hint = match has_names {
            true => "It must be an object of fields and texts, such as {\"amount\": \"…\"}.",
            false => "It must be a text with an SQL expression, such as \"length(answer) < 400\".",
        };
        Error::invalid(format!("invalid value for option \"{key}\": {value}")).hint(hint)
    };
    match value {
        Value::String(text) if !has_names => Ok(vec![(0, text.clone())]),
        Value::Object(map) if has_names => map
            .iter()
            .map(|(name, text)| {
                let at = columns.iter().position(|c| c.name == *name).ok_or_else(|| {
                    let names: Vec<&str> = columns.iter().map(|c| c.name.as_str()).collect();
                    Error::invalid(format!("option \"{key}\" names a field \"{name}\" that does not exist"))
                        .hint(format!("Valid fields are: {}.", names.join(", ")))
                })?;
                Ok((at, text.as_str().ok_or_else(wrong)?.to_owned()))
            })
            .collect(),
        _ => Err(wrong()),
    }
}

/// It stands on the row's line, in a request that other rows share.
pub fn hint(text: &str) -> Result<String> {
    let text = text.trim();
    if text.is_empty() || text.len() > MOST_HINT || text.chars().any(char::is_control) {
        return Err(Error::invalid(format!("option \"check_hint\" must be one line of at most {MOST_HINT} bytes"))
            .hint("It stands in the request behind the row that is asked again: \"write it in German\"."));
    }
    Ok(text.to_owned())
}

/// The name of an answer's column in SQL.
fn called(column: &Column, has_names: bool) -> String {
    if has_names { sql::name(&column.name) } else { "answer".to_owned() }
}

pub fn sql_oid(column: &Column) -> pg_sys::Oid {
    let of = type_oid(column.of).unwrap_or(pg_sys::TEXTOID);
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    if column.is_array { unsafe { pg_sys::get_array_type(of) } } else { of }
}

pub fn nothing(_: usize) -> String {
    "NULL".to_owned()
}

/// The row that expressions read: its values come from `value`, by their numbers; the input has number 1.
pub fn from(columns: &[Column], has_names: bool, value: &dyn Fn(usize) -> String) -> String {
    let mut all = Vec::new();
    // A field of this name is what is meant.
    if !has_names || columns.iter().all(|c| c.name != "input") {
        all.push(format!("{}::pg_catalog.text AS input", value(1)));
    }
    all.extend(columns.iter().zip(2..).map(|(column, i)| {
        format!("{}::{} AS {}", value(i), sql_type(column.of, column.is_array), called(column, has_names))
    }));
    format!("(SELECT {} OFFSET 0) \"{ROW}\"", all.join(", "))
}

/// Repairs see the answer as it came, checks as the repairs have left it. The line ends close comments.
pub fn statement(columns: &[Column], rules: &[Rule], has_names: bool) -> String {
    let all = || columns.iter().zip(rules);
    let mut repaired: Vec<String> = all()
        .map(|(column, rule)| {
            let name = called(column, has_names);
            match &rule.repair {
                Some(repair) => format!("CAST(({repair}\n) AS {}) AS {name}", sql_type(column.of, column.is_array)),
                None => name,
            }
        })
        .collect();
    if !has_names || columns.iter().all(|c| c.name != "input") {
        repaired.push("input".to_owned());
    }
    let written = |(column, rule): (&Column, &Rule)| {
        let name = called(column, has_names);
        match column.of {
            _ if rule.repair.is_none() => "NULL".to_owned(),
            Type::Jsonb if !column.is_array => format!("{name}::pg_catalog.text"),
            // Whatever DateStyle, TimeZone and the like say.
            _ => format!("(pg_catalog.to_jsonb({name}) OPERATOR(pg_catalog.#>>) '{{}}')"),
        }
    };
    let check = |(_, rule): (&Column, &Rule)| rule.check.as_ref().map_or("NULL".to_owned(), |c| format!("({c}\n)"));
    format!(
        "SELECT ARRAY[{}]::pg_catalog.text[], ARRAY[{}]::pg_catalog.bool[] FROM (SELECT {} FROM {} OFFSET 0) \"{ROW}\"",
        all().map(written).collect::<Vec<_>>().join(", "),
        all().map(check).collect::<Vec<_>>().join(", "),
        repaired.join(", "),
        from(columns, has_names, &|i| format!("(${i})")),
    )
}
