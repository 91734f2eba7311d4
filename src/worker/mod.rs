//! The background processes: what they have in common. See README.md in this folder.

pub mod databases;
pub mod gateway;
pub mod launcher;

use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime};
use pgrx::prelude::*;

use crate::process::{is_told_to_end, my_pid};
use crate::shared::{self, End};

const LIBRARY: &str = "pg_llm_batch";

/// Declares the processes that are always there.
pub fn register() {
    BackgroundWorkerBuilder::new("llm_batch gateway")
        .set_type("llm_batch gateway")
        .set_library(LIBRARY)
        .set_function("llm_batch_gateway_main")
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
    BackgroundWorkerBuilder::new("llm_batch launcher")
        .set_type("llm_batch launcher")
        .set_library(LIBRARY)
        .set_function("llm_batch_launcher_main")
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

/// The launcher's orders to a worker: database, job, owner.
pub fn orders() -> Option<(u32, i64, u32)> {
    let mut words = BackgroundWorker::get_extra().split(' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// Called when a worker ends in whatever way but by a signal that kills: frees its entry.
#[pg_guard]
pub extern "C-unwind" fn on_exit(_code: i32, _arg: pg_sys::Datum) {
    if let Some((database, job, _)) = orders() {
        // After goes() with another end the entry is no longer this process', and nothing happens here.
        let end = if is_told_to_end() { End::Told } else { End::Died };
        shared::goes(database, job, my_pid(), end);
    }
}
