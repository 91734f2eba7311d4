//! `create_model()`, `alter_model()` and `drop_model()`.

use std::ffi::CStr;

use llm_batch_core::dialect::Api;
use llm_batch_gateway::protocol::MAX_REQUEST_TOKENS;
use pgrx::datum::{DatumWithOid, Interval, JsonB};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::Value;

use crate::args::{exists, from_name, new_name, required};
use crate::error::{Error, Result};
use crate::json::Json;
use crate::price::{self, Listed};
use crate::process::current_user;
use crate::{changes, client, names, owner, provider, sql, txn};

/// Most that a million tokens may cost, dollars.
const MOST_PRICE: i64 = 1_000_000_000;

/// Settings of a model as they are given: `None` leaves a default, or what there is.
struct Settings {
    tokens_per_minute: Option<i32>,
    requests_per_minute: Option<i32>,
    input_tokens_per_minute: Option<i32>,
    output_tokens_per_minute: Option<i32>,
    inputs_per_minute: Option<i32>,
    input_price: Option<AnyNumeric>,
    output_price: Option<AnyNumeric>,
    cached_input_price: Option<AnyNumeric>,
    max_concurrent_requests: Option<i32>,
    request_timeout: Option<Interval>,
    max_request_tokens: Option<i32>,
    parameters: Option<Json>,
}

/// The value of a setting, as it is given.
enum Given<'a> {
    Number(Option<i32>),
    Price(Option<&'a AnyNumeric>),
    Timeout(Option<Interval>),
    Parameters(Option<&'a Json>),
}

impl Settings {
    /// Each setting's column, its default as SQL, and its value.
    fn table(&self) -> [(&'static str, &'static str, Given<'_>); 12] {
        use Given::{Number, Parameters, Price, Timeout};
        [
            ("tokens_per_minute", "NULL", Number(self.tokens_per_minute)),
            ("requests_per_minute", "NULL", Number(self.requests_per_minute)),
            ("input_tokens_per_minute", "NULL", Number(self.input_tokens_per_minute)),
            ("output_tokens_per_minute", "NULL", Number(self.output_tokens_per_minute)),
            ("inputs_per_minute", "NULL", Number(self.inputs_per_minute)),
            ("input_price", "NULL", Price(self.input_price.as_ref())),
            ("output_price", "NULL", Price(self.output_price.as_ref())),
            ("cached_input_price", "NULL", Price(self.cached_input_price.as_ref())),
            ("max_concurrent_requests", "NULL", Number(self.max_concurrent_requests)),
            // Long, because a request that is given up may have been paid.
            ("request_timeout", "interval '5 minutes'", Timeout(self.request_timeout)),
            // Every hosted model of today takes more; packs of 50 rows rarely get there.
            ("max_request_tokens", "16000", Number(self.max_request_tokens)),
            ("parameters", "'{}'", Parameters(self.parameters.as_ref())),
        ]
    }

    /// Refuses names that are not of settings.
    fn check_reset(&self, reset: &[String]) -> Result<()> {
        let names = self.table().map(|(column, ..)| column);
        let Some(other) = reset.iter().find(|other| !names.contains(&other.as_str())) else { return Ok(()) };
        Err(Error::invalid(format!("\"{other}\" cannot be reset"))
            .hint(format!("Settings that can be reset: {}.", names.join(", "))))
    }

    /// Returns true if a price is given.
    fn has_prices(&self) -> bool {
        self.input_price.is_some() || self.output_price.is_some() || self.cached_input_price.is_some()
    }

    /// With the prices of the list, if there are any, in place of those that are not given.
    fn with_prices(self, listed: Option<&Listed>) -> Self {
        match listed.map(|listed| listed.prices.clone()) {
            Some([input, output, cached]) => Self {
                input_price: self.input_price.or(input),
                output_price: self.output_price.or(output),
                cached_input_price: self.cached_input_price.or(cached),
                ..self
            },
            None => self,
        }
    }

    /// `api`: the dialect of the model's server.
    fn check(&self, api: Api) -> Result<()> {
        for (name, _, given) in self.table() {
            given.check(name, api)?;
        }
        if self.max_request_tokens.is_some_and(|n| n as u64 > MAX_REQUEST_TOKENS) {
            return Err(Error::invalid(format!("\"max_request_tokens\" must be at most {MAX_REQUEST_TOKENS}")));
        }
        Ok(())
    }
}

impl Given<'_> {
    fn check(&self, name: &str, api: Api) -> Result<()> {
        match self {
            Self::Number(Some(n)) if *n < 1 => Err(Error::invalid(format!("\"{name}\" must be greater than zero"))
                .hint("Leave it out for the default; a limit that is not set does not hold.")),
            Self::Price(Some(price)) => check_price(name, price),
            Self::Timeout(Some(timeout)) => {
                let ms = sql::one::<i64>(
                    "SELECT (EXTRACT(epoch FROM $1) OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8",
                    &[(*timeout).into()],
                )?;
                if !ms.is_some_and(|ms| (1..=86_400_000).contains(&ms)) {
                    return Err(Error::invalid(format!("\"{name}\" must be between 1 millisecond and 1 day"))
                        .hint("Write an interval, such as '2 min'."));
                }
                Ok(())
            }
            Self::Parameters(Some(Json(parameters))) => check_parameters(name, parameters, api),
            _ => Ok(()),
        }
    }

    fn datum(self) -> DatumWithOid<'static> {
        match self {
            Self::Number(n) => n.into(),
            Self::Price(price) => price.cloned().into(),
            Self::Timeout(timeout) => timeout.into(),
            Self::Parameters(parameters) => parameters.map(|p| JsonB(p.0.clone())).into(),
        }
    }
}

fn check_price(name: &str, price: &AnyNumeric) -> Result<()> {
    let refuse = |what: String| {
        Err(Error::invalid(format!("\"{name}\" must {what}")).hint("Prices are in dollars per million tokens."))
    };
    if *price < AnyNumeric::from(0) || price.is_nan() {
        return refuse("not be negative".to_owned());
    }
    if *price > AnyNumeric::from(MOST_PRICE) {
        return refuse(format!("be at most {MOST_PRICE}"));
    }
    Ok(())
}

fn check_parameters(name: &str, parameters: &Value, api: Api) -> Result<()> {
    let Value::Object(map) = parameters else {
        return Err(
            Error::invalid(format!("\"{name}\" must be a JSON object")).hint("Write it as '{\"temperature\": 0}'.")
        );
    };
    match map.keys().find(|k| api.dialect().reserved().contains(&k.as_str())) {
        Some(key) => Err(Error::invalid(format!("parameter \"{key}\" cannot be set"))
            .detail("pg_llm_batch sets it for each request.")),
        None => Ok(()),
    }
}

/// Refuses an empty name of a model, and a server that the caller cannot use: now, so that a mistake shows before a row is
/// sent. The address of the server, if one is given.
fn check_place(server: Option<pg_sys::Oid>, model: Option<&str>) -> Result<Option<String>> {
    if model.is_some_and(|m| m.trim().is_empty()) {
        return Err(Error::invalid("\"model\" must not be empty").hint("Specify the provider's name of the model."));
    }
    server.map(base_url).transpose()
}

fn base_url(server: pg_sys::Oid) -> Result<String> {
    Ok(provider::endpoint(server, current_user())?.base_url)
}

/// The model of the provider and its prices of the list, if they are to be taken from there once more: all `are_reset`, or
/// they were taken from there and the model or its server becomes another one.
fn listed_anew(
    name: &str,
    place: Option<&str>,
    model: Option<&str>,
    are_reset: bool,
) -> Result<Option<(String, Option<Listed>)>> {
    let known = sql::row(
        "SELECT llm_batch.server_now(m.server, m.server_name, m.home) AS server, m.model, m.price_as_of IS NOT NULL AS is_listed
           FROM llm_batch.model m WHERE m.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
        |row| Ok((row.maybe("server")?, row.get::<String>("model")?, row.get::<bool>("is_listed")?)),
    )?;
    let Some((known_server, known_model, was_listed)) = known else { return Ok(None) };
    if !are_reset && !(was_listed && (place.is_some() || model.is_some())) {
        return Ok(None);
    }
    let model = model.map_or(known_model, str::to_owned);
    let known_place = || known_server.map(base_url).transpose();
    let listed = match place.map_or_else(known_place, |place| Ok(Some(place.to_owned())))? {
        Some(place) => price::listed(&place, &model)?,
        None => None,
    };
    Ok(Some((model, listed)))
}

#[allow(clippy::too_many_arguments)]
#[pg_extern(sql = false)]
fn create_model(
    name: Option<&str>,
    server: Option<&CStr>,
    model: Option<&str>,
    tokens_per_minute: Option<i32>,
    requests_per_minute: Option<i32>,
    input_tokens_per_minute: Option<i32>,
    output_tokens_per_minute: Option<i32>,
    inputs_per_minute: Option<i32>,
    input_price: Option<AnyNumeric>,
    output_price: Option<AnyNumeric>,
    cached_input_price: Option<AnyNumeric>,
    max_concurrent_requests: Option<i32>,
    request_timeout: Option<Interval>,
    max_request_tokens: Option<i32>,
    parameters: Option<Json>,
) -> std::result::Result<(), ErrorReport> {
    let name = new_name(name)?;
    client::check_usable()?;
    let (server, server_name) = provider::named(from_name(required(server, "server")?))?;
    let model = required(model, "model")?;
    let settings = Settings {
        tokens_per_minute,
        requests_per_minute,
        input_tokens_per_minute,
        output_tokens_per_minute,
        inputs_per_minute,
        input_price,
        output_price,
        cached_input_price,
        max_concurrent_requests,
        request_timeout,
        max_request_tokens,
        parameters,
    };
    settings.check(provider::api_of(server)?)?;
    let place = check_place(Some(server), Some(model))?;
    let is_by_hand = settings.has_prices();
    let listed = match (&settings.input_price, &settings.output_price, place) {
        (Some(_), Some(_), _) | (.., None) => None,
        (.., Some(place)) => Some(price::listed(&place, model)?),
    };
    let taken = listed.as_ref().and_then(Option::as_ref);
    let settings = settings.with_prices(taken);
    let mut args: Vec<DatumWithOid> =
        vec![name.into(), current_user().into(), server.into(), server_name.into(), model.into()];
    let (mut columns, mut values) = (String::new(), String::new());
    for (column, default, given) in settings.table() {
        args.push(given.datum());
        columns += &format!(", {column}");
        values += &format!(", coalesce(${}, {default})", args.len());
    }
    args.push(taken.filter(|_| !is_by_hand).map(|listed| listed.as_of).into());
    columns += ", price_as_of";
    values += &format!(", ${}", args.len());
    let made = txn::as_extension_owner(|| {
        names::claim(name)?;
        names::check_free(name, "model")?;
        sql::run(
            &format!(
                "INSERT INTO llm_batch.model (name, owner, owner_name, home, server, server_name, model{columns})
                 VALUES ($1, $2, pg_get_userbyid($2), llm_batch.home(), $3, $4::name, $5{values})
                 ON CONFLICT (name) DO NOTHING RETURNING 1"
            ),
            &args,
        )
    })?;
    if made == 0 {
        return Err(exists("model", name, "model").into());
    }
    if let Some(listed) = listed {
        price::tell(model, listed.as_ref());
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
#[pg_extern(sql = false)]
fn alter_model(
    name: Option<&str>,
    server: Option<&CStr>,
    model: Option<&str>,
    tokens_per_minute: Option<i32>,
    requests_per_minute: Option<i32>,
    input_tokens_per_minute: Option<i32>,
    output_tokens_per_minute: Option<i32>,
    inputs_per_minute: Option<i32>,
    input_price: Option<AnyNumeric>,
    output_price: Option<AnyNumeric>,
    cached_input_price: Option<AnyNumeric>,
    max_concurrent_requests: Option<i32>,
    request_timeout: Option<Interval>,
    max_request_tokens: Option<i32>,
    parameters: Option<Json>,
    reset: Option<Vec<Option<String>>>,
) -> std::result::Result<(), ErrorReport> {
    let name = required(name, "name")?;
    owner::check("model", name)?;
    let server = server.map(|name| provider::named(from_name(name))).transpose()?;
    let settings = Settings {
        tokens_per_minute,
        requests_per_minute,
        input_tokens_per_minute,
        output_tokens_per_minute,
        inputs_per_minute,
        input_price,
        output_price,
        cached_input_price,
        max_concurrent_requests,
        request_timeout,
        max_request_tokens,
        parameters,
    };
    let place = match &server {
        Some((server, _)) => Some(*server),
        None => sql::one::<pg_sys::Oid>("SELECT m.server FROM llm_batch.model m WHERE m.name = $1", &[name.into()])?,
    };
    settings.check(place.map_or(Ok(Api::default()), provider::api_of)?)?;
    let place = check_place(server.as_ref().map(|s| s.0), model)?;
    let reset: Vec<String> = reset.unwrap_or_default().into_iter().flatten().collect();
    settings.check_reset(&reset)?;
    let is_reset = |column: &str| reset.iter().any(|name| name == column);
    let is_by_hand = settings.has_prices();
    let anew = listed_anew(name, place.as_deref(), model, is_reset("input_price") && is_reset("output_price"))?;
    let taken = anew.as_ref().and_then(|(_, listed)| listed.as_ref());
    let settings = settings.with_prices(taken);
    let (server, server_name) = server.unzip();
    let mut args: Vec<DatumWithOid> = vec![name.into(), server.into(), server_name.into(), model.into()];
    let mut assignments = String::new();
    if anew.is_some() || is_by_hand || price::COLUMNS.into_iter().any(is_reset) {
        args.push(taken.filter(|_| !is_by_hand).map(|listed| listed.as_of).into());
        assignments += &format!(", price_as_of = ${}", args.len());
    }
    for (column, default, given) in settings.table() {
        args.push(given.datum());
        assignments += &if anew.is_some() && price::COLUMNS.contains(&column) {
            format!(", {column} = ${}", args.len())
        } else if is_reset(column) {
            format!(", {column} = {default}")
        } else {
            format!(", {column} = coalesce(${}, {column})", args.len())
        };
    }
    txn::as_extension_owner(|| {
        sql::run(
            &format!(
                "UPDATE llm_batch.model SET server = coalesce($2, server), server_name = coalesce($3::name, server_name),
                     model = coalesce($4, model){assignments}
                  WHERE name = $1"
            ),
            &args,
        )?;
        changes::tell();
        Ok(())
    })?;
    anew.into_iter().for_each(|(model, listed)| price::tell(&model, listed.as_ref()));
    Ok(())
}

#[pg_extern(sql = false)]
fn drop_model(name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    let name = required(name, "name")?;
    owner::check("model", name)?;
    Ok(txn::as_extension_owner(|| names::drop("model", name))?)
}
