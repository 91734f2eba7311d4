//! The names that models and routes share: a task names either.

use pgrx::prelude::*;

use crate::args::{exists, unknown};
use crate::error::{Error, Result};
use crate::{changes, sql};

/// Keeps a model or route from being dropped until the transaction ends. As the extension's owner.
pub fn hold(name: &str) -> Result<()> {
    for kind in ["model", "route"] {
        let held = sql::rows_mut(
            &format!("SELECT 1 FROM llm_batch.{kind} WHERE name = $1 FOR KEY SHARE"),
            &[name.into()],
            |row| row.get::<i32>(1),
        )?;
        if !held.is_empty() {
            return Ok(());
        }
    }
    Err(unknown("model", name))
}

/// Refuses a name that a route or a model has already.
pub fn check_free(name: &str, new: &str) -> Result<()> {
    let other = if new == "model" { "route" } else { "model" };
    let found = sql::one_mut::<bool>(
        &format!("SELECT EXISTS (SELECT FROM llm_batch.{other} o WHERE o.name OPERATOR(pg_catalog.=) $1)"),
        &[name.into()],
    )?;
    match found {
        Some(true) => Err(exists(other, name, other).detail("Models and routes are named in the same places.")),
        _ => Ok(()),
    }
}

/// Nobody else makes a model or a route until the end of this transaction: they share their names. As the extension's owner.
pub fn hold_all() -> Result<()> {
    sql::run("LOCK TABLE llm_batch.route IN SHARE UPDATE EXCLUSIVE MODE", &[])?;
    Ok(())
}

/// Drops a model or a route that nothing uses. As the extension's owner.
pub fn drop(kind: &str, name: &str) -> Result<()> {
    // A new user of the name waits from now on, and finds it gone.
    sql::run(&format!("SELECT 1 FROM llm_batch.{kind} WHERE name = $1 FOR UPDATE"), &[name.into()])?;
    let users = [
        ("task", "SELECT name FROM llm_batch.task WHERE model = $1 ORDER BY 1 LIMIT 1"),
        ("route", "SELECT name FROM llm_batch.route WHERE $1 = ANY (models) ORDER BY 1 LIMIT 1"),
    ];
    for (what, query) in users {
        if let Some(user) = sql::one_mut::<String>(query, &[name.into()])? {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST,
                format!("cannot drop {kind} \"{name}\" because {what} \"{user}\" uses it"),
            )
            .hint(match what {
                "task" => "Drop the task with llm_batch.drop_task(), or give it another model.",
                _ => "Drop the route with llm_batch.drop_route(), or give it other models.",
            }));
        }
    }
    sql::run(&format!("DELETE FROM llm_batch.{kind} WHERE name = $1"), &[name.into()])?;
    changes::tell();
    Ok(())
}
