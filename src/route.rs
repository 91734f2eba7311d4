//! Routes: several models under one name, which stands wherever a model's may.

use llm_batch_gateway::protocol::{MOST_MODELS, Policy};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::args::{exists, new_name, required, unknown};
use crate::error::{Error, Result};
use crate::process::current_user;
use crate::{changes, client, model, owner, provider, sql, txn};

/// The models behind a name, and which of them takes rows: those of a route, or the one of this name.
pub fn models(name: &str) -> Result<(Vec<String>, Policy)> {
    let found = sql::row(
        "SELECT r.models, r.policy FROM llm_batch.route r WHERE r.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
        |row| Ok((row.get::<Vec<Option<String>>>("models")?, row.get::<String>("policy")?)),
    )?;
    match found {
        Some((models, name)) => Ok((models.into_iter().flatten().collect(), policy(&name)?)),
        None => Ok((vec![name.to_owned()], Policy::default())),
    }
}

/// The same with all that is known of each.
pub fn known(name: &str) -> Result<(Vec<(String, model::Known)>, Policy)> {
    if let Some(known) = model::find(name)? {
        return Ok((vec![(name.to_owned(), known)], Policy::default()));
    }
    let (names, policy) = models(name)?;
    let load = |name: String| model::load(&name).map(|known| (name, known));
    Ok((names.into_iter().map(load).collect::<Result<_>>()?, policy))
}

fn policy(name: &str) -> Result<Policy> {
    match name {
        "failover" => Ok(Policy::Failover),
        "spread" => Ok(Policy::Spread),
        _ => Err(Error::invalid(format!("unrecognized policy \"{name}\""))
            .hint("Valid policies are failover, in the order of the models, and spread, by the room in their limits.")),
    }
}

/// Refuses an embedder whose route leads to different models: their vectors have nothing to do with each other.
/// `models`: what the provider calls them.
pub fn check_vectors(route: &str, models: &[String]) -> Result<()> {
    let Some(first) = models.first() else { return Ok(()) };
    let Some(other) = models.iter().find(|other| *other != first) else { return Ok(()) };
    Err(Error::invalid(format!("route \"{route}\" cannot embed"))
        .detail(format!("Vectors of \"{first}\" and of \"{other}\" cannot be compared."))
        .hint("Name one model of the provider under several keys or servers."))
}

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
pub fn hold_names() -> Result<()> {
    sql::run("LOCK TABLE llm_batch.route IN SHARE UPDATE EXCLUSIVE MODE", &[])?;
    Ok(())
}

/// Drops a model or a route that nothing uses. As the extension's owner.
pub fn drop(kind: &str, name: &str) -> Result<()> {
    // What comes to use it from now on waits, and finds it gone.
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

/// Checks the models of a route: that there are some, none twice, and that the caller may use each one's server.
fn check(models: Vec<Option<String>>) -> Result<Vec<String>> {
    let count = models.len();
    let models: Vec<String> = models.into_iter().flatten().collect();
    if models.len() < count || !(1..=MOST_MODELS).contains(&count) {
        return Err(Error::invalid(format!("\"models\" must name 1 to {MOST_MODELS} models"))
            .hint("Write them as ARRAY['first', 'second'], the ones to be asked first at the front."));
    }
    for (i, name) in models.iter().enumerate() {
        if models.iter().take(i).any(|before| before == name) {
            return Err(Error::invalid(format!("model \"{name}\" is named twice")));
        }
        if check_free(name, "model").is_err() {
            return Err(Error::invalid(format!("\"{name}\" is a route")).hint("A route consists of models."));
        }
        provider::endpoint(model::load(name)?.server, current_user())?;
    }
    Ok(models)
}

#[pg_extern(sql = false)]
fn create_route(
    name: Option<&str>,
    models: Option<Vec<Option<String>>>,
    policy: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    let name = new_name(name)?;
    client::check_usable()?;
    let models = check(required(models, "models")?)?;
    let policy = required(policy, "policy")?;
    self::policy(policy)?;
    let owner = current_user();
    let made = txn::as_extension_owner(|| {
        hold_names()?;
        check_free(name, "route")?;
        models.iter().try_for_each(|model| hold(model))?;
        sql::run(
            "INSERT INTO llm_batch.route (name, owner, owner_name, home, models, policy)
             VALUES ($1, $2, pg_get_userbyid($2), llm_batch.home(), $3, $4) ON CONFLICT (name) DO NOTHING RETURNING 1",
            &[name.into(), owner.into(), models.clone().into(), policy.into()],
        )
    })?;
    if made == 0 {
        return Err(exists("route", name, "route").into());
    }
    Ok(())
}

#[pg_extern(sql = false)]
fn alter_route(
    name: Option<&str>,
    models: Option<Vec<Option<String>>>,
    policy: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    let name = required(name, "name")?;
    owner::check("route", name)?;
    let models = models.map(check).transpose()?;
    policy.map(self::policy).transpose()?;
    txn::as_extension_owner(|| {
        models.iter().flatten().try_for_each(|model| hold(model))?;
        sql::run(
            "UPDATE llm_batch.route SET models = coalesce($2, models), policy = coalesce($3, policy) WHERE name = $1",
            &[name.into(), models.clone().into(), policy.into()],
        )?;
        changes::tell();
        Ok(())
    })?;
    Ok(())
}

#[pg_extern(sql = false)]
fn drop_route(name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    let name = required(name, "name")?;
    owner::check("route", name)?;
    Ok(txn::as_extension_owner(|| drop("route", name))?)
}
