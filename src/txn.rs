//! Transactions of workers, subtransactions, and the switch to the extension's owner.

use std::ffi::{CStr, CString};
use std::panic::AssertUnwindSafe;

use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::{process, sql};

/// Turns a caught error into ours.
fn caught(e: CaughtError) -> Error {
    Error::from(e)
}

/// Settings of each worker's transaction. They replace those of its role, its database or an earlier trigger.
const SETTINGS: &[(&CStr, &CStr)] = &[
    // The role that the process connected as.
    (c"role", c"none"),
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    (c"synchronous_commit", c"on"),
    (c"statement_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    (c"lock_timeout", c"2s"),
    (c"row_security", c"on"),
    // It would end the worker, and not the statement.
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    (c"transaction_timeout", c"0"),
];

/// Runs `f` in a transaction of its own, in a worker. An error, Postgres' or ours, rolls back and is returned.
pub fn run<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    for (name, value) in SETTINGS {
        // SAFETY: outside a transaction, on the main thread; names and values are valid.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
            );
        }
    }
    process::set_in_transaction(true);
    // SAFETY: called on a worker's main thread outside any transaction; each start is matched by a commit or an abort.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
    let result = PgTryBuilder::new(AssertUnwindSafe(|| {
        let value = f()?;
        // SAFETY: the snapshot pushed above; deferred triggers and constraints run in the commit, and may raise.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(value)
    }))
    .catch_others(|e| Err(caught(e)))
    .execute();
    // SAFETY: as above. Aborting does nothing where no transaction is in progress any more. Statistics are a worker's
    // own job to report; without them autovacuum would never hear of its writes.
    unsafe {
        if result.is_err() {
            pg_sys::AbortCurrentTransaction();
        }
        process::set_in_transaction(false);
        pg_sys::pgstat_report_stat(true);
    }
    result
}

/// Runs `f` in a subtransaction; an error rolls it back and is returned.
pub fn sub<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    subtransaction(true, f)
}

/// Returns true if there may be subtransactions here: beside parallel workers there may not, before Postgres 17.
pub fn has_subtransactions() -> bool {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    // SAFETY: read on the main thread.
    return !unsafe { pg_sys::IsInParallelMode() };
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    true
}

/// Runs expressions of a role's, with its rights and search_path, so that nothing is left of it but the value: a
/// security-restricted operation, which can write nothing, in a subtransaction that is rolled back with its locks and
/// settings. Where there can't be one nothing can be written either, and an error ends the statement.
pub fn restricted<T>(role: pg_sys::Oid, search_path: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    // A temporary schema comes last, and the one that there is already is hidden.
    let path = CString::new(format!("{search_path}, pg_temp"))
        .map_err(|_| Error::invalid("a search_path can't have a zero byte"))?;
    // With others an expression would mean something else to who asks than to its owner.
    let settings = [
        (c"search_path", path.as_c_str()),
        (c"standard_conforming_strings", c"on"),
        (c"transform_null_equals", c"off"),
        (c"row_security", c"on"),
    ];
    let hidden = HiddenTemporary::new();
    let run = || as_role(role, || with_settings(&settings, f));
    let result = if has_subtransactions() {
        subtransaction(false, || {
            // SAFETY: on the main thread inside a subtransaction, whose end restores it. As a setting it can't be local.
            unsafe { pg_sys::XactReadOnly = true };
            run()
        })
    } else {
        run()
    };
    if let Some(hidden) = hidden {
        hidden.end();
    }
    result
}

/// The session's temporary schema, hidden until this is dropped. It is of the role that asks: where a name is gone that an
/// expression of another role has, a temporary view of that name would be read with the other role's rights.
struct HiddenTemporary {
    schema: pg_sys::Oid,
    toast: pg_sys::Oid,
}

impl HiddenTemporary {
    /// `None` where there is none, or in a server with assertions, which allow it to parallel workers alone.
    fn new() -> Option<Self> {
        let (mut schema, mut toast) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        // SAFETY: on the main thread inside a transaction; the setting is a built-in one. Nothing that runs meanwhile can
        // make a temporary schema: it would have to write.
        unsafe {
            pg_sys::GetTempNamespaceState(&raw mut schema, &raw mut toast);
            if schema == pg_sys::InvalidOid {
                return None;
            }
            let asserts = pg_sys::GetConfigOption(c"debug_assertions".as_ptr(), true, false);
            if asserts.is_null() || CStr::from_ptr(asserts) != c"off" {
                return None;
            }
            pg_sys::SetTempNamespaceState(pg_sys::InvalidOid, pg_sys::InvalidOid);
            Some(Self { schema, toast })
        }
    }

    /// Shows it again. What was looked up of a temporary table meanwhile, by its OID or because it had changed, says that it
    /// is another session's: the session looks up anew what it knows.
    fn end(self) {
        drop(self);
        // SAFETY: on the main thread inside a transaction.
        unsafe { pg_sys::InvalidateSystemCaches() };
    }
}

impl Drop for HiddenTemporary {
    fn drop(&mut self) {
        // SAFETY: the state that new() found, on the main thread; this raises nothing.
        unsafe { pg_sys::SetTempNamespaceState(self.schema, self.toast) };
    }
}

/// Runs `f` in a subtransaction, which is rolled back after an error, and after all unless `keeps`.
fn subtransaction<T>(keeps: bool, f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: called inside a transaction, on the main thread; context and owner are restored as PL/pgSQL does it
    // (pl_exec.c, exec_stmt_block), whether the subtransaction is released or rolled back.
    unsafe {
        let context = pg_sys::CurrentMemoryContext;
        let owner = pg_sys::CurrentResourceOwner;
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(context);
        let result = PgTryBuilder::new(AssertUnwindSafe(f)).catch_others(|e| Err(caught(e))).execute();
        if result.is_ok() && keeps {
            pg_sys::ReleaseCurrentSubTransaction();
        } else {
            pg_sys::MemoryContextSwitchTo(context);
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::CurrentResourceOwner = owner;
        result
    }
}

/// Runs statements of ours, and nothing of a user's, with the rights of the extension's owner and a search_path that
/// holds nothing of anyone else's: nobody else may write our tables.
pub fn as_extension_owner<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let owner: pg_sys::Oid = sql::one(
        "SELECT extowner FROM pg_catalog.pg_extension WHERE extname OPERATOR(pg_catalog.=) 'pg_llm_batch'",
        &[],
    )?
    .ok_or_else(|| Error::unknown("extension \"pg_llm_batch\" does not exist"))?;
    as_role(owner, || with_settings(OWN_PATH, f))
}

/// The caller's search_path, without temporary schemas, which are the session's alone.
pub fn search_path() -> Result<String> {
    let path = sql::one::<String>(
        "SELECT pg_catalog.string_agg(pg_catalog.quote_ident(s.name), ', ' ORDER BY s.n)
           FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) WITH ORDINALITY s (name, n)
          WHERE NOT pg_catalog.starts_with(s.name, 'pg_temp')",
        &[],
    )?;
    Ok(path.unwrap_or_else(|| "pg_catalog".to_owned()))
}

/// A search_path that holds nothing of anyone's.
pub const OWN_PATH: &[(&CStr, &CStr)] = &[(c"search_path", c"pg_catalog, pg_temp")];

/// Runs `f` under these settings; then what was set before holds again.
pub fn with_settings<T>(settings: &[(&CStr, &CStr)], f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: on the main thread inside a transaction; an error on the way out ends the (sub)transaction, which ends the
    // nest level too.
    let level = unsafe {
        let level = pg_sys::NewGUCNestLevel();
        for (name, value) in settings {
            pg_sys::set_config_option(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_SAVE,
                true,
                0,
                false,
            );
        }
        level
    };
    let result = f();
    // SAFETY: the level opened above.
    unsafe { pg_sys::AtEOXact_GUC(true, level) };
    result
}

/// Refuses to go on where `default_transaction_read_only` is on for this role or database, or for the server: that is
/// how a database is frozen. A setting made since this process connected counts.
pub fn check_writable() -> Result<()> {
    const NAME: &CStr = c"default_transaction_read_only";
    // As Postgres ranks them: a role in a database, a role, a database, all.
    let set = sql::one::<bool>(
        "SELECT o.option_value::pg_catalog.bool
           FROM pg_catalog.pg_db_role_setting s, pg_catalog.pg_options_to_table(s.setconfig) o
          WHERE s.setdatabase OPERATOR(pg_catalog.=) ANY (ARRAY[0, $1]::pg_catalog.oid[])
            AND s.setrole OPERATOR(pg_catalog.=) ANY (ARRAY[0, $2]::pg_catalog.oid[])
            AND o.option_name OPERATOR(pg_catalog.=) 'default_transaction_read_only'
          ORDER BY s.setrole OPERATOR(pg_catalog.=) 0, s.setdatabase OPERATOR(pg_catalog.=) 0 LIMIT 1",
        &[pg_sys::Oid::from(process::my_database()).into(), process::current_user().into()],
    )?;
    // SAFETY: on the main thread; the name is that of a parameter that every server has, whose value is a C string.
    let is_frozen = set.unwrap_or_else(|| unsafe {
        let value = pg_sys::GetConfigOptionResetString(NAME.as_ptr());
        !value.is_null() && CStr::from_ptr(value) == c"on"
    });
    if !is_frozen {
        return Ok(());
    }
    Err(Error::new(PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION, "the database is read-only")
        .detail("default_transaction_read_only is on for the job's owner."))
}

/// Runs `f` with the rights of a role, as a security-restricted operation: what of a user's runs in it can leave nothing
/// behind (a deferred trigger, a temporary table) that would run with the caller's rights later.
pub fn as_role<T>(role: pg_sys::Oid, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut user = pg_sys::InvalidOid;
    let mut context = 0;
    // SAFETY: on the main thread; an error on the way out aborts the (sub)transaction, which restores both values.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let restricted = pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION;
        pg_sys::SetUserIdAndSecContext(role, context | restricted as i32);
    }
    let result = f();
    // SAFETY: the values read above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    result
}

/// Waits until a transaction is over for every process: a commit is seen a moment before its changes of rights and
/// tables are heard.
pub fn wait_for(id: pg_sys::TransactionId) {
    // SAFETY: on the main thread inside a transaction that is not the one waited for.
    unsafe {
        pg_sys::XactLockTableWait(id, std::ptr::null_mut(), std::ptr::null_mut(), pg_sys::XLTW_Oper::XLTW_None);
        pg_sys::AcceptInvalidationMessages();
    }
}
