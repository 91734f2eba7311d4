//! Which version of the extension a database has. The library is the server's, and changes with a restart; the SQL is
//! each database's, and changes with `ALTER EXTENSION … UPDATE`: until both are done, nothing of ours runs there.

use std::ffi::CStr;

use crate::error::{Error, Result};
use crate::sql;

/// The library's version; also the setting `llm_batch.library_version`, which update scripts look at.
pub const LIBRARY: &str = env!("CARGO_PKG_VERSION");
pub const LIBRARY_C: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => c"",
};

/// The version of the extension in this database, if it is there.
pub fn installed() -> Result<Option<String>> {
    sql::one::<String>(
        "SELECT extversion FROM pg_catalog.pg_extension WHERE extname OPERATOR(pg_catalog.=) 'pg_llm_batch'",
        &[],
    )
}

/// Refuses an extension that is not of the library's version.
pub fn check() -> Result<()> {
    match installed()? {
        Some(version) if version != LIBRARY => Err(differs(&version)),
        _ => Ok(()),
    }
}

/// The error for a difference, with a hint on the older side.
pub fn differs(version: &str) -> Error {
    let numbers = |v: &str| v.split('.').map(|n| n.parse().unwrap_or(0)).collect::<Vec<u32>>();
    let hint = if numbers(version) < numbers(LIBRARY) {
        "Run ALTER EXTENSION pg_llm_batch UPDATE in this database."
    } else {
        "The server still runs the old library. Restart it to finish the upgrade."
    };
    Error::state(format!(
        "extension \"pg_llm_batch\" has version {version}, but the server runs library version {LIBRARY}"
    ))
    .hint(hint)
}
