//! The option `deadline` of a job: until when it is to be done. A route by costs asks its dearer models too then, while the
//! cheaper have no room.

use llm_batch_gateway::protocol::Policy;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::{sql, txn};

/// The option of a job.
pub const OPTION: &str = "deadline";
/// The values that it may have.
const VALUES: &str =
    "It must be a point in time, such as \"2026-12-24 08:00+01\", or an interval from now on, such as \"2 hours\".";

/// Takes it out of a job's options.
pub fn take(options: &mut Value) -> Result<Option<String>> {
    match options.as_object_mut().and_then(|map| map.remove(OPTION)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Error::invalid(format!("invalid value for option \"{OPTION}\": {other}")).hint(VALUES)),
    }
}

/// Returns true if it is none: there is no point in time until which all is to be done.
pub fn is_none(text: &str) -> bool {
    text.trim().eq_ignore_ascii_case("infinity")
}

/// The point in time that is meant, as text that any session reads alike.
pub fn resolve(text: &str) -> Result<String> {
    let read = |at: &str| {
        let sql = format!(
            "SELECT pg_catalog.isfinite(q.at) AND q.at OPERATOR(pg_catalog.>) pg_catalog.clock_timestamp(),
                    pg_catalog.to_json(q.at) OPERATOR(pg_catalog.#>>) '{{}}' FROM (SELECT {at}) q (at)"
        );
        txn::sub(|| sql::row(&sql, &[text.into()], |row| Ok((row.get::<bool>(1)?, row.get::<String>(2)?))))
    };
    let found = read("$1::pg_catalog.timestamptz")
        .or_else(|_| read("pg_catalog.now() OPERATOR(pg_catalog.+) $1::pg_catalog.interval"))
        .map_err(|_| Error::invalid(format!("invalid value for option \"{OPTION}\": \"{text}\"")).hint(VALUES))?;
    match found {
        Some((true, at)) => Ok(at),
        _ => Err(Error::invalid(format!("the deadline \"{text}\" is not in the future")).hint(VALUES)),
    }
}

/// Says that a deadline makes no difference, if that is so.
pub fn tell_if_useless(policy: Policy, model: &str) {
    if let Policy::Cheapest { .. } = policy {
        return;
    }
    let message = format!("the deadline of the job makes no difference with model \"{model}\"");
    let detail =
        "Only a route with the policy \"cheapest\" heeds it. With others a job is always as fast as it can be.";
    let hint = "Create such a route with llm_batch.create_route(…, policy => 'cheapest').";
    ErrorReport::new(PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION, message, "pg_llm_batch")
        .set_detail(detail)
        .set_hint(hint)
        .report(PgLogLevel::NOTICE);
}
