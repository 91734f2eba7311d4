//! Models: their settings, limits and prices.

mod define;

use llm_batch_gateway::protocol::{Model, Prices};
use pgrx::datum::JsonB;
use pgrx::prelude::*;
use serde_json::Value;

use crate::args::unknown;
use crate::budget::Price;
use crate::error::{Error, Result};
use crate::process::current_user;
use crate::sql;

/// A model with the server it is asked through.
pub struct Known {
    pub server: pg_sys::Oid,
    pub model: Model,
    pub price: Price,
}

/// Looks a model up.
pub fn load(name: &str) -> Result<Known> {
    find(name)?.ok_or_else(|| unknown("model", name))
}

/// A model, if there is one of this name.
pub fn find(name: &str) -> Result<Option<Known>> {
    sql::row(
        "SELECT llm_batch.server_now(m.server, m.server_name, m.home) AS server, m.server_name::pg_catalog.text AS server_name,
                m.model, m.tokens_per_minute, m.requests_per_minute, m.input_tokens_per_minute, m.output_tokens_per_minute,
                m.inputs_per_minute,
                m.max_concurrent_requests, m.max_request_tokens, m.parameters,
                (EXTRACT(epoch FROM m.request_timeout) OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8 AS request_timeout_ms,
                m.input_price::pg_catalog.text AS input_price, m.output_price::pg_catalog.text AS output_price,
                m.cached_input_price::pg_catalog.text AS cached_input_price,
                pg_catalog.ceil(GREATEST(m.input_price, m.cached_input_price) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS input_rate,
                pg_catalog.ceil(m.output_price OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS output_rate,
                pg_catalog.ceil(COALESCE(m.cached_input_price, m.input_price) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS cached_rate
           FROM llm_batch.model m WHERE m.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
        |row| {
            let limit = |column: &str| Ok::<_, Error>(row.maybe::<i32>(column)?.map(|n| n.max(1) as u64));
            let rate = |column: &str| Ok::<_, Error>(row.maybe::<i64>(column)?.map(|n| n.max(0) as u64));
            let prices = (row.maybe::<String>("input_price")?, row.maybe::<String>("output_price")?);
            let rates = match (&prices, rate("input_rate")?, rate("output_rate")?) {
                ((Some(_), Some(_)), Some(input), Some(output)) => Some(Prices { input, output }),
                _ => None,
            };
            let parameters = match row.get::<JsonB>("parameters")?.0 {
                Value::Object(map) => map,
                _ => serde_json::Map::new(),
            };
            Ok(Known {
                server: match row.maybe("server")? {
                    Some(server) => server,
                    None => return Err(without_server(name, &row.get::<String>("server_name")?)),
                },
                model: Model {
                    model: row.get("model")?,
                    tokens_per_minute: limit("tokens_per_minute")?,
                    requests_per_minute: limit("requests_per_minute")?,
                    input_tokens_per_minute: limit("input_tokens_per_minute")?,
                    output_tokens_per_minute: limit("output_tokens_per_minute")?,
                    inputs_per_minute: limit("inputs_per_minute")?,
                    max_concurrent_requests: row.maybe::<i32>("max_concurrent_requests")?.map(|n| n.max(1) as u32),
                    request_timeout_ms: row.get::<i64>("request_timeout_ms")?.max(1) as u64,
                    max_request_tokens: row.get::<i32>("max_request_tokens")?.max(1) as u64,
                    parameters,
                    prices: rates,
                },
                price: Price {
                    input: prices.0,
                    output: prices.1,
                    cached_input: row.maybe("cached_input_price")?,
                    write_surcharge: 0,
                    flex_discount: 0,
                    rates,
                    input_rate: rates.unwrap_or_default().input,
                    cached_rate: rate("cached_rate")?.unwrap_or_default(),
                },
            })
        },
    )
}

/// Another server of that name may be another's: it is never taken for the one that is gone.
fn without_server(model: &str, server: &str) -> Error {
    Error::unknown(format!("server \"{server}\" of model \"{model}\" does not exist"))
        .detail("The server was dropped, or was not restored. A new server with the same name does not replace it.")
        .hint("The owner of the model can set another server with llm_batch.alter_model(…, server => …).")
}

/// The name of the model to use where none is named; `author` is that of the view, policy or cursor where that is so.
///
/// `llm_batch.default_model` decides where texts go. So a value holds for the texts of roles whose rights the role has that
/// set it, and for what the session itself asks, if its user may become that role.
pub fn default(author: Option<pg_sys::Oid>) -> Result<String> {
    let name = crate::settings::default_model();
    if name.is_empty() {
        return Err(Error::invalid("no model is specified")
            .hint("Name it in the argument or the option \"model\", or set llm_batch.default_model."));
    }
    let Some(by) = crate::settings::default_model_set_by() else { return Ok(name) };
    let me = current_user();
    // SAFETY: catalog lookups on the main thread inside a transaction.
    let (is_session, is_mine) = unsafe {
        let is_session = !pg_sys::InLocalUserIdChange() && !pg_sys::InSecurityRestrictedOperation();
        let is_session = is_session && pg_sys::is_member_of_role_nosuper(pg_sys::GetSessionUserId(), by);
        (is_session, |role| pg_sys::has_privs_of_role(by, role))
    };
    let strange_author = author.filter(|author| !is_mine(*author));
    let Some(role) = strange_author.or_else(|| (!is_session && !is_mine(me)).then_some(me)) else { return Ok(name) };
    let (setter, role) = (role_name(by)?, role_name(role)?);
    let (what, hint) = if strange_author.is_some() {
        (
            "In a view, a policy or a cursor of that role",
            "Name the model there: by a task, or by the option \"model\" of llm_filter().",
        )
    } else {
        (
            "In a SECURITY DEFINER function or left behind by one, or in a REFRESH or REINDEX,",
            "Name the model by a task, or by the option \"model\" of llm_filter(); or give the function a clause \
             SET llm_batch.default_model.",
        )
    };
    Err(Error::denied(format!("llm_batch.default_model of role {setter} does not hold for role {role}"))
        .detail(format!("{what} it would decide where the texts of role {role} go."))
        .hint(hint))
}

fn role_name(role: pg_sys::Oid) -> Result<String> {
    let name = sql::one::<String>("SELECT pg_catalog.pg_get_userbyid($1)::pg_catalog.text", &[role.into()])?;
    Ok(sql::name(&name.unwrap_or_default()))
}
