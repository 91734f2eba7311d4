//! The parts of the views that come from shared memory and the gateway.

use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::{Activity, FromGateway, ToGateway};
use pgrx::datum::JsonB;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::client::{Client, Received, in_recovery};
use crate::error::{Error, Result};
use crate::shared::{self, Idle};
use crate::{process, settings, sql, worker};

/// Why a job that is to run does not, in a word; NULL if it does, or will in a moment.
#[pg_extern(sql = false)]
fn waits_for(job_id: i64) -> Option<&'static str> {
    // A session where nothing of ours runs knows nothing of it.
    if !shared::is_ready() || in_recovery() {
        return None;
    }
    if !settings::enabled() {
        return Some("disabled");
    }
    match shared::idle(process::my_database(), job_id) {
        Idle::Not => None,
        _ if !worker::databases::is_mine_open() => Some("no_connections"),
        Idle::NoSlot => Some("no_worker_slot"),
        Idle::NotFound => (!worker::databases::is_mine_searched()).then_some("disabled"),
    }
}

/// Identifies this database and the extension in it: a dump or a template may carry our tables elsewhere.
#[pg_extern(sql = false)]
fn home() -> String {
    // SAFETY: the identifier is read from the control file at the start of the server; a catalog lookup on the main
    // thread inside a transaction.
    let (cluster, extension) =
        unsafe { (pg_sys::GetSystemIdentifier(), pg_sys::get_extension_oid(c"pg_llm_batch".as_ptr(), true)) };
    format!("{cluster} {} {}", process::my_database(), extension.to_u32())
}

fn fetch() -> Result<Vec<Activity>> {
    // On a standby there is no gateway, so nothing is going on.
    if in_recovery() {
        return Ok(Vec::new());
    }
    let mut client = Client::connect()?;
    client.send(&ToGateway::Activity)?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        match client.receive(Duration::from_secs(1))? {
            Received::Message(FromGateway::Activity(rows)) => return Ok(rows),
            Received::Message(_) | Received::Nothing => {}
            Received::Lost => break,
        }
    }
    Err(Error::new(PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE, "the llm_batch gateway did not answer"))
}

/// The state of each account and model that the caller may see, as an array of objects.
#[pg_extern(sql = false)]
fn gateway_activity() -> std::result::Result<JsonB, ErrorReport> {
    let all = sql::one::<bool>("SELECT pg_has_role('pg_monitor', 'USAGE')", &[])?.unwrap_or(false);
    let mine: Vec<u32> = sql::rows("SELECT oid FROM pg_roles WHERE pg_has_role(oid, 'USAGE')", &[], |r| {
        Ok(r.get::<pg_sys::Oid>(1)?.to_u32())
    })?;
    // SAFETY: a catalog lookup on the main thread, inside a transaction.
    let is_superuser = unsafe { pg_sys::superuser() };
    let rows = fetch()?.into_iter().filter(|a| all || a.roles.iter().any(|role| mine.contains(role))).map(|a| {
        let last_error = a.last_error.as_ref().map(|e| e.shown(is_superuser || mine.contains(&e.role)));
        let mut row = serde_json::json!(a);
        row["last_error"] = serde_json::json!(last_error);
        row
    });
    Ok(JsonB(rows.collect()))
}
