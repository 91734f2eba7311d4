//! Tells a job's worker that others have changed its task, model, endpoint or options, or what its owner may see.
//!
//! Postgres invalidates every process's caches after a committed change of foreign servers and user mappings. Models and
//! tasks are rows, for which it does not: a function that changes them invalidates their table. A process notices
//! all that at the start of its next transaction.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use pgrx::pg_sys;
use pgrx::prelude::*;

static HEARD: AtomicBool = AtomicBool::new(false);
static IS_REGISTERED: AtomicBool = AtomicBool::new(false);
/// The table of models, which is told of for routes and tasks too.
static TABLE: AtomicU32 = AtomicU32::new(0);
/// Something was told that may have changed which rows can be seen.
static RIGHTS: AtomicBool = AtomicBool::new(false);
/// Changes of roles and of who is a member of them.
static ROLES: AtomicU32 = AtomicU32::new(0);
const OF_ROLES: [i32; 2] =
    [pg_sys::SysCacheIdentifier::AUTHOID as i32, pg_sys::SysCacheIdentifier::AUTHMEMROLEMEM as i32];

/// Changes of tables, schemas and roles.
static CATALOGS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// The tables that the rows are read from.
    static WATCHED: RefCell<Vec<pg_sys::Oid>> = const { RefCell::new(Vec::new()) };
}

/// From now on changes are heard. In a transaction.
pub fn listen() {
    TABLE.store(model_table().to_u32(), Relaxed);
    register();
}

/// Registers the callbacks, once in a process: they cannot be taken back.
fn register() {
    if IS_REGISTERED.swap(true, Relaxed) {
        return;
    }
    // SAFETY: on the main thread; the functions live as long as the process and do nothing but set a flag or count.
    unsafe {
        for cache in [pg_sys::SysCacheIdentifier::FOREIGNSERVEROID, pg_sys::SysCacheIdentifier::USERMAPPINGOID] {
            pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(on_catalog), pg_sys::Datum::from(0));
        }
        // A policy may call functions.
        for cache in OF_ROLES.into_iter().chain([pg_sys::SysCacheIdentifier::PROCOID as i32]) {
            pg_sys::CacheRegisterSyscacheCallback(cache, Some(on_rights), pg_sys::Datum::from(0));
        }
        let schemas = pg_sys::SysCacheIdentifier::NAMESPACEOID as i32;
        pg_sys::CacheRegisterSyscacheCallback(schemas, Some(on_schema), pg_sys::Datum::from(0));
        pg_sys::CacheRegisterRelcacheCallback(Some(on_table), pg_sys::Datum::from(0));
    }
}

/// Returns true if anything was heard since this was last asked.
pub fn heard() -> bool {
    HEARD.swap(false, Relaxed)
}

/// Hears changes of these tables as such of rights from now on.
pub fn watch(tables: &[pg_sys::Oid]) {
    WATCHED.set(tables.to_vec());
}

/// Returns true if rights may have changed since this was last asked.
pub fn heard_of_rights() -> bool {
    RIGHTS.swap(false, Relaxed)
}

/// Another number each time that roles were changed. Postgres plans nothing anew for that, though policies depend on it.
pub fn of_roles() -> u32 {
    register();
    ROLES.load(Relaxed)
}

/// The same number for as long as no table, schema or role was changed: what a table is called, what it has and whose it is
/// has stayed the same then. Who has just locked a table has heard all that was changed in it before.
pub fn of_tables() -> u32 {
    CATALOGS.load(Relaxed)
}

/// The commit of this transaction tells that models or tasks have changed.
pub fn tell() {
    let oid = model_table();
    if oid != pg_sys::InvalidOid {
        // SAFETY: in a transaction, on the main thread, of a table that this transaction has locked or looked up.
        unsafe { pg_sys::CacheInvalidateRelcacheByRelid(oid) };
    }
}

fn model_table() -> pg_sys::Oid {
    // SAFETY: in a transaction, on the main thread; both look names up and give 0 for what is not there.
    unsafe { pg_sys::get_relname_relid(c"model".as_ptr(), pg_sys::get_namespace_oid(c"llm_batch".as_ptr(), true)) }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_catalog(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    HEARD.store(true, Relaxed);
}

#[pg_guard]
unsafe extern "C-unwind" fn on_rights(_arg: pg_sys::Datum, cache: i32, _hash: u32) {
    RIGHTS.store(true, Relaxed);
    if OF_ROLES.contains(&cache) {
        ROLES.fetch_add(1, Relaxed);
        CATALOGS.fetch_add(1, Relaxed);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_schema(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    CATALOGS.fetch_add(1, Relaxed);
}

#[pg_guard]
unsafe extern "C-unwind" fn on_table(_arg: pg_sys::Datum, table: pg_sys::Oid) {
    CATALOGS.fetch_add(1, Relaxed);
    // 0: of all tables, since too much was told at once.
    if table == pg_sys::InvalidOid || TABLE.load(Relaxed) == table.to_u32() {
        HEARD.store(true, Relaxed);
    }
    if table == pg_sys::InvalidOid || WATCHED.with_borrow(|watched| watched.contains(&table)) {
        RIGHTS.store(true, Relaxed);
    }
}
