//! Routes: several models under one name, which stands wherever a model's may.

use llm_batch_gateway::protocol::{MOST_MODELS, Policy};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::args::{exists, new_name, required};
use crate::error::{Error, Result};
use crate::process::current_user;
use crate::{changes, client, model, names, owner, provider, sql, txn};

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
        "cheapest" => Ok(Policy::Cheapest { overflows: false }),
        _ => Err(Error::invalid(format!("unrecognized policy \"{name}\"")).hint(
            "Valid policies are failover, in the order of the models; spread, by the room in their limits; and cheapest, by \
             what rows cost.",
        )),
    }
}

/// Refuses an embedder whose route leads to different models: their vectors have nothing to do with each other.
/// `models`: what the provider calls them.
pub fn check_vectors<'a>(route: &str, mut models: impl Iterator<Item = &'a str>) -> Result<()> {
    let Some(first) = models.next() else { return Ok(()) };
    let Some(other) = models.find(|other| *other != first) else { return Ok(()) };
    Err(Error::invalid(format!("route \"{route}\" cannot embed"))
        .detail(format!("Vectors of \"{first}\" and of \"{other}\" cannot be compared."))
        .hint("Name one model of the provider under several keys or servers."))
}

/// Refuses models whose costs the policy cannot compare.
fn check_prices(models: &[String], policy: Policy) -> Result<()> {
    let Policy::Cheapest { .. } = policy else { return Ok(()) };
    models.iter().try_for_each(|name| model::load(name)?.price.check_for_route(name))
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
            return Err(Error::invalid(format!("model \"{name}\" is named twice"))
                .hint("Name each model once, the ones to be asked first at the front."));
        }
        if names::check_free(name, "model").is_err() {
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
    check_prices(&models, self::policy(policy)?)?;
    let owner = current_user();
    let made = txn::as_extension_owner(|| {
        names::claim(name)?;
        names::check_free(name, "route")?;
        models.iter().try_for_each(|model| names::hold(model))?;
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
    let (models_before, policy_before) = self::models(name)?;
    let policy_after = policy.map_or(Ok(policy_before), self::policy)?;
    check_prices(models.as_ref().unwrap_or(&models_before), policy_after)?;
    txn::as_extension_owner(|| {
        models.iter().flatten().try_for_each(|model| names::hold(model))?;
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
    Ok(txn::as_extension_owner(|| names::drop("route", name))?)
}
