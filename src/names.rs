//! The names that models and routes share: a task names either.

use std::ffi::CString;

use pgrx::prelude::*;
use pgrx::{FromDatum, IntoDatum};

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
    match first_now(&format!("SELECT name FROM llm_batch.{other} WHERE name OPERATOR(pg_catalog.=) $1"), name)? {
        Some(_) => Err(exists(other, name, other).detail("Models and routes are named in the same places.")),
        None => Ok(()),
    }
}

/// The first name that a query for a name gives, as of now: in a REPEATABLE READ transaction, too, what others have
/// committed counts. For who has locked what others would have to lock first.
fn first_now(query: &str, name: &str) -> Result<Option<String>> {
    let query = CString::new(query).map_err(|_| Error::invalid("a statement can't have a zero byte"))?;
    let mut types = [pg_sys::TEXTOID];
    let Some(mut value) = name.into_datum() else { return Ok(None) };
    Spi::connect(|_| {
        // SAFETY: on the main thread inside a transaction, connected to SPI. A statement that is read-only sees by the
        // snapshot that is pushed; an error ends the (sub)transaction, which pops it. The result has one column, a text,
        // which is copied.
        unsafe {
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            pg_sys::SPI_execute_with_args(
                query.as_ptr(),
                1,
                types.as_mut_ptr(),
                &raw mut value,
                std::ptr::null(),
                true,
                1,
            );
            pg_sys::PopActiveSnapshot();
            let Some(table) = pg_sys::SPI_tuptable.as_ref().filter(|_| pg_sys::SPI_processed > 0) else {
                return Ok(None);
            };
            let mut is_null = false;
            let found = pg_sys::SPI_getbinval(*table.vals, table.tupdesc, 1, &raw mut is_null);
            Ok(String::from_datum(found, is_null))
        }
    })
}

/// Nobody else makes a model or a route of this name until the end of this transaction: they share their names. As the
/// extension's owner.
pub fn claim(name: &str) -> Result<()> {
    let Some(routes) = sql::one::<pg_sys::Oid>("SELECT 'llm_batch.route'::regclass::oid", &[])? else { return Ok(()) };
    // Neither a lock on a table nor an advisory lock: who keeps a transaction open would hold up all others. Two names with
    // the same hash wait for each other in vain, and no longer than that.
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    // SAFETY: takes a lock on the main thread inside a transaction; may raise. No object has a table of ours for its
    // class, so that this one is ours alone.
    unsafe { pg_sys::LockDatabaseObject(routes, pg_sys::Oid::from(hash), 0, pg_sys::ExclusiveLock as i32) };
    Ok(())
}

/// Drops a model or a route that nothing uses. As the extension's owner.
pub fn drop(kind: &str, name: &str) -> Result<()> {
    // A new user of the name waits from now on, and finds it gone.
    sql::run(&format!("SELECT 1 FROM llm_batch.{kind} WHERE name = $1 FOR UPDATE"), &[name.into()])?;
    let users = [
        ("task", "SELECT name FROM llm_batch.task WHERE model OPERATOR(pg_catalog.=) $1 ORDER BY 1 LIMIT 1"),
        ("route", "SELECT name FROM llm_batch.route WHERE $1 OPERATOR(pg_catalog.=) ANY (models) ORDER BY 1 LIMIT 1"),
    ];
    for (what, query) in users {
        if let Some(user) = first_now(query, name)? {
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
