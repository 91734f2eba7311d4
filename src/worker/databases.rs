//! The databases of the cluster, as `pg_database` has them: which of them workers may connect to.

use std::ffi::CStr;

use pgrx::prelude::*;

use crate::process::my_database;
use crate::settings;

/// A database that workers may connect to.
pub struct Database {
    pub oid: u32,
    /// Jobs are looked for in it, by `llm_batch.databases`.
    pub is_searched: bool,
}

/// Templates are left to CREATE DATABASE, which nobody may be connected to them for.
fn is_open(row: &pg_sys::FormData_pg_database) -> bool {
    row.datallowconn && !row.datistemplate && row.datconnlimit != pg_sys::DATCONNLIMIT_INVALID_DB
}

fn is_searched(row: &pg_sys::FormData_pg_database, wanted: &[String]) -> bool {
    // SAFETY: a name of a catalog ends with a zero byte.
    let name = unsafe { CStr::from_ptr(row.datname.data.as_ptr()) }.to_string_lossy();
    wanted.is_empty() || wanted.iter().any(|w| *w == name)
}

/// All that workers may connect to, by their numbers. For the launcher, which is in no database.
pub fn open() -> Vec<Database> {
    let wanted = settings::databases();
    let mut found = Vec::new();
    // SAFETY: a transaction of a background worker; pg_database is a shared catalog and may be read without a
    // database. The scan is ended and the lock released before the commit.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::systable_beginscan(
            relation,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
            if is_open(row) {
                found.push(Database { oid: row.oid.to_u32(), is_searched: is_searched(row, &wanted) });
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
    }
    found.sort_by_key(|d| d.oid);
    found
}

/// Returns true if workers may connect to the database of this session.
pub fn is_mine_open() -> bool {
    mine(is_open)
}

/// Returns true if jobs are looked for in the database of this session.
pub fn is_mine_searched() -> bool {
    mine(|row| is_searched(row, &settings::databases()))
}

fn mine(is_so: impl FnOnce(&pg_sys::FormData_pg_database) -> bool) -> bool {
    // SAFETY: a catalog lookup on the main thread inside a transaction; the row is read before it is let go.
    unsafe {
        let oid = pg_sys::Datum::from(my_database());
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::DATABASEOID as i32, oid);
        if tuple.is_null() {
            return false;
        }
        let is_so = is_so(&*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>());
        pg_sys::ReleaseSysCache(tuple);
        is_so
    }
}
