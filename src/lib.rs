//! The Postgres edge of pg_llm_batch: settings, SQL functions, catalog access, workers. The only room with `unsafe`.
//!
//! Functions are declared by hand in `sql/`, where grants, search paths and comments stand beside them; `sql = false`
//! keeps pgrx from declaring them again.
// pgrx reports an error with its SQLSTATE only from its own ErrorReport, which is large; errors are rare.
#![allow(clippy::result_large_err)]

use pgrx::prelude::*;

mod activity;
mod args;
mod ask;
mod asking;
mod batch;
mod beside;
mod blank;
mod budget;
mod catalog;
mod changes;
mod checks;
mod client;
mod deadline;
mod error;
mod expression;
mod failure;
mod field;
mod function;
mod isolation;
mod job;
mod json;
mod kept;
mod kind;
mod model;
mod names;
mod options;
mod owner;
mod price;
mod process;
mod provenance;
mod provider;
mod question;
mod route;
mod rows;
mod scalar;
mod settings;
mod shared;
mod split;
mod sql;
mod statement;
mod task;
mod text;
mod txn;
mod vector;
mod verb;
mod version;
mod worker;

::pgrx::pg_module_magic!(name, version);

pgrx::extension_sql_file!("../sql/tables.sql", name = "tables", bootstrap);
pgrx::extension_sql_file!("../sql/prices.sql", name = "prices", requires = ["tables"]);
pgrx::extension_sql_file!("../sql/functions.sql", name = "functions", requires = ["prices"]);
pgrx::extension_sql_file!("../sql/views.sql", name = "views", requires = ["functions"], finalize);

#[cfg(not(panic = "unwind"))]
compile_error!("Postgres errors cross Rust frames as panics: build with panic = \"unwind\"");

/// Called by Postgres when the library is loaded.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    keep_backtraces_out();
    settings::init();
    // SAFETY: flags that the postmaster sets before it loads libraries, read on the main thread. pg_upgrade starts servers
    // to read or fill their catalogs: nothing else may happen in them.
    let (is_preloaded, is_upgrade) =
        unsafe { (pg_sys::process_shared_preload_libraries_in_progress, pg_sys::IsBinaryUpgrade) };
    if is_preloaded {
        shared::init();
        kept::init();
        if !is_upgrade {
            worker::register();
            batch::init();
        }
    }
}

/// pgrx puts a backtrace into the DETAIL of errors where the server's environment asks for one (RUST_BACKTRACE), in the way
/// of what helps a user. The std of this library reads the environment when it is first asked for one, which is here, and
/// never again. Other libraries have a std of their own, and find the environment as it was.
fn keep_backtraces_out() {
    const VARIABLE: &str = "RUST_LIB_BACKTRACE";
    let was = std::env::var_os(VARIABLE);
    // SAFETY: a library is loaded on the main thread, of the postmaster or of a session; no other thread of them changes
    // or reads the environment.
    unsafe {
        std::env::set_var(VARIABLE, "0");
        drop(std::backtrace::Backtrace::capture());
        match was {
            Some(value) => std::env::set_var(VARIABLE, value),
            None => std::env::remove_var(VARIABLE),
        }
    }
}
