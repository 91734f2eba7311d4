//! Many rows in a request for the functions that are called row by row: a plan node that reads ahead. See README.md in
//! this folder.

mod ahead;
mod answers;
mod calls;
mod effects;
mod explain;
mod guards;
mod jit;
mod node;
mod nodes;
mod others;
mod place;
mod site;
mod wanted;

use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

use pgrx::prelude::*;

pub use answers::answered;
pub use others::author;

type Planner = unsafe extern "C-unwind" fn(
    *mut pg_sys::Query,
    *const c_char,
    c_int,
    pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt;

unsafe extern "C-unwind" {
    /// Postgres' own, and not pgrx' version, which turns errors into panics.
    fn standard_planner(
        query: *mut pg_sys::Query,
        text: *const c_char,
        cursor_options: c_int,
        parameters: pg_sys::ParamListInfo,
    ) -> *mut pg_sys::PlannedStmt;
}

/// The planner below: another extension's hook, or Postgres.
static NEXT_PLANNER: OnceLock<Planner> = OnceLock::new();

/// Has plans made with batch scans in them.
pub fn init() {
    node::register();
    // SAFETY: in the postmaster, on the main thread, while it loads libraries.
    unsafe {
        NEXT_PLANNER.get_or_init(|| pg_sys::planner_hook.unwrap_or(standard_planner));
        pg_sys::planner_hook = Some(plan);
    }
}

/// Every query of the server comes through here. An error of the planner passes as it is: pgrx would make it anew and lose
/// its context and the position in the query. It leaves by a jump, so nothing here may need to be dropped.
unsafe extern "C-unwind" fn plan(
    query: *mut pg_sys::Query,
    text: *const c_char,
    cursor_options: c_int,
    parameters: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: the arguments are handed on; the hook was set after NEXT_PLANNER.
    unsafe {
        let planner = NEXT_PLANNER.get().copied().unwrap_or(standard_planner);
        let has_policies = marked(query, cursor_options);
        let stmt = planner(query, text, cursor_options, parameters);
        placed(stmt, cursor_options, has_policies)
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn marked(query: *mut pg_sys::Query, cursor_options: c_int) -> bool {
    // SAFETY: the planner changes the query, too.
    unsafe { others::mark(query, place::is_cursor(cursor_options)) }
}

#[pg_guard]
unsafe extern "C-unwind" fn placed(
    stmt: *mut pg_sys::PlannedStmt,
    cursor_options: c_int,
    has_policies: bool,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: a plan that was just made.
    unsafe { place::place(stmt, cursor_options, has_policies) };
    stmt
}
