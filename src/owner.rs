//! Owners of models, tasks and jobs: who has the rights of an owner, and who may become one. The rules are those of
//! `ALTER … OWNER TO`.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::args::unknown;
use crate::error::{Error, Result};
use crate::process::current_user;
use crate::{client, names, sql, txn};

/// The error for a job whose owner does not exist any more.
pub const GONE: &str = "the job's owner was dropped";

/// Returns true if the caller has the rights of an owner. If the owner was dropped, superusers have them.
pub fn is_mine(owner: Option<pg_sys::Oid>) -> bool {
    // SAFETY: catalog lookups on the main thread inside a transaction.
    unsafe {
        match owner {
            Some(owner) => pg_sys::has_privs_of_role(current_user(), owner),
            None => pg_sys::superuser_arg(current_user()),
        }
    }
}

/// The error for a caller without the rights of an owner.
pub fn denied(owner: Option<pg_sys::Oid>, what: &str) -> Error {
    let e = Error::denied(format!("must be owner of {what}"));
    if owner.is_some() {
        return e;
    }
    e.detail("Its owner was dropped, or was not restored.")
        .hint("A superuser can set another owner with llm_batch.set_owner().")
}

/// Refuses a caller without the rights of the owner of a model or task. Its table has the name of its kind.
pub fn check(kind: &str, name: &str) -> Result<()> {
    client::check_here()?;
    let owner = sql::row(
        &format!(
            "SELECT llm_batch.owner_now(o.owner, o.owner_name, o.home) FROM llm_batch.{kind} o
              WHERE o.name OPERATOR(pg_catalog.=) $1"
        ),
        &[name.into()],
        |row| row.maybe::<pg_sys::Oid>(1),
    )?;
    match owner {
        Some(owner) if is_mine(owner) => Ok(()),
        Some(owner) => Err(denied(owner, &format!("{kind} \"{name}\""))),
        None if names::check_free(name, kind).is_err() => {
            let is = if kind == "model" { "route" } else { "model" };
            Err(Error::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, format!("\"{name}\" is a {is}"))
                .hint(format!("Use llm_batch.alter_{is}() and drop_{is}().")))
        }
        None => Err(unknown(kind, name)),
    }
}

/// A role that the caller may make an owner: its name, and whether it can log in.
pub fn new(role: pg_sys::Oid) -> Result<(String, bool)> {
    let right = if cfg!(feature = "pg15") { "MEMBER" } else { "SET" };
    let found = sql::row(
        "SELECT r.rolname::pg_catalog.text, r.rolcanlogin, pg_catalog.pg_has_role(r.oid, $2)
           FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) $1",
        &[role.into(), right.into()],
        |r| Ok((r.get::<String>(1)?, r.get::<bool>(2)?, r.get::<bool>(3)?)),
    )?;
    match found {
        Some((name, can_login, true)) => Ok((name, can_login)),
        Some((name, _, false)) => Err(Error::denied(format!("must be able to SET ROLE \"{name}\""))),
        None => Err(Error::unknown(format!("role with OID {} does not exist", role.to_u32()))),
    }
}

/// Checks that the current user could still log in. If not, an open session continues, but a job does not.
pub fn check_login() -> Result<()> {
    let lost = sql::one::<String>(
        "SELECT CASE WHEN NOT r.rolcanlogin THEN 'it may not log in'
                     WHEN r.rolvaliduntil OPERATOR(pg_catalog.<) pg_catalog.now() THEN 'its VALID UNTIL has passed'
                     WHEN NOT pg_catalog.has_database_privilege(r.oid, pg_catalog.current_database(), 'CONNECT')
                     THEN 'it may not connect to the database' END
           FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) $1",
        &[current_user().into()],
    )?;
    lost.map_or(Ok(()), |right| Err(Error::denied(format!("the job's owner lost a right: {right}"))))
}

/// Expressions of a task run with its owner's rights, and call functions that the owner before may replace.
fn check_expressions(task: &str, new_owner: pg_sys::Oid) -> Result<()> {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    if !unsafe { pg_sys::superuser_arg(new_owner) } {
        return Ok(());
    }
    let is_strange = sql::row(
        "SELECT t.options OPERATOR(pg_catalog.?|) ARRAY['repair', 'check'] AS has_any,
                COALESCE((SELECT r.rolsuper FROM pg_catalog.pg_roles r
                           WHERE r.oid OPERATOR(pg_catalog.=) llm_batch.owner_now(t.owner, t.owner_name, t.home)), false) AS is_super
           FROM llm_batch.task t WHERE t.name OPERATOR(pg_catalog.=) $1",
        &[task.into()],
        |r| Ok(r.get::<bool>("has_any")? && !r.get::<bool>("is_super")?),
    )?;
    if is_strange != Some(true) {
        return Ok(());
    }
    Err(Error::denied("a task with checks or repairs cannot be given to a superuser")
        .detail("They would run with the superuser's rights, and may call functions of the owner before.")
        .hint("Create the task anew as the superuser."))
}

#[pg_extern(sql = false)]
fn set_owner(kind: &str, name: &str, new_owner: pg_sys::Oid) -> std::result::Result<(), ErrorReport> {
    if !["model", "route", "task"].contains(&kind) {
        return Err(Error::invalid(format!("unrecognized kind \"{kind}\""))
            .hint("Valid kinds are model, route and task. For a job, call llm_batch.set_owner(job_id, new_owner).")
            .into());
    }
    check(kind, name)?;
    let (role, _) = new(new_owner)?;
    if kind == "task" {
        check_expressions(name, new_owner)?;
    }
    txn::as_extension_owner(|| {
        sql::run(
            &format!("UPDATE llm_batch.{kind} SET owner = $2, owner_name = $3::name WHERE name = $1"),
            &[name.into(), new_owner.into(), role.into()],
        )
    })?;
    Ok(())
}
