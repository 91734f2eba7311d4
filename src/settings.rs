//! Settings. Nothing that names a host, a file or a key can be set by a plain session.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::version::LIBRARY_C;

static ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);
static ENABLE_BATCH_SCAN: GucSetting<bool> = GucSetting::<bool>::new(true);
static DATABASES: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static ALLOWED_HOSTS: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static MAX_JOB_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(4);
// A row of 40 tokens takes some 500 bytes while it waits: 64 MB is a hundred thousand rows, more than any limit lets
// through in a minute.
static GATEWAY_MEMORY: GucSetting<i32> = GucSetting::<i32>::new(64 * 1024);
// An answer takes some 60 bytes: 16 MB is a quarter of a million texts.
static GATEWAY_CACHE: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024);
// Minutes: of days Postgres has no unit of its own, but takes '90d'.
static KEEP_FINISHED_JOBS: GucSetting<i32> = GucSetting::<i32>::new(90 * 24 * 60);
const DEFAULT_MODEL_NAME: &CStr = c"llm_batch.default_model";
static DEFAULT_MODEL: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static LIBRARY_VERSION: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(LIBRARY_C));
// An expression over one answer takes microseconds, one that looks something up milliseconds.
static CHECK_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(5_000);
static STATEMENT_MAX_COST: GucSetting<f64> = GucSetting::<f64>::new(-1.0);

pub fn init() {
    define_of_server();
    define_of_sessions();
    GucRegistry::define_string_guc(
        c"llm_batch.library_version",
        c"Shows the version of the library that the server runs.",
        c"The version of the extension in pg_extension must be the same.",
        &LIBRARY_VERSION,
        GucContext::Internal,
        GucFlags::DISALLOW_IN_FILE,
    );
    // Also reserves the prefix: a mistyped llm_batch.* is warned of.
    // SAFETY: a constant string, on the main thread, in _PG_init.
    unsafe { pgrx::pg_sys::MarkGUCPrefixReserved(c"llm_batch".as_ptr()) };
}

/// The settings that hold for the whole server and come from its configuration.
fn define_of_server() {
    GucRegistry::define_bool_guc(
        c"llm_batch.enabled",
        c"Enables requests to language models.",
        c"Turning it off stops all requests at once. Jobs continue when it is turned on again.",
        &ENABLED,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"llm_batch.databases",
        c"Lists the databases that are searched for jobs when the server starts.",
        c"Names are separated by commas. An empty value means all databases.",
        &DATABASES,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"llm_batch.allowed_hosts",
        c"Lists the hosts that foreign servers not owned by a superuser may reach.",
        c"Entries are host or host:port, separated by commas. An empty value means none.",
        &ALLOWED_HOSTS,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"llm_batch.max_job_workers",
        c"Sets the maximum number of jobs that run at the same time.",
        c"Each running job takes one of max_worker_processes.",
        &MAX_JOB_WORKERS,
        0,
        64,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"llm_batch.gateway_memory",
        c"Sets the memory for texts that wait to be sent.",
        c"Sessions and jobs wait while it is used up.",
        &GATEWAY_MEMORY,
        1024,
        1024 * 1024,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"llm_batch.gateway_cache",
        c"Sets the memory for answers that are kept for later rows with the same text.",
        c"0 keeps none. Rows still share a request that is under way for the same text.",
        &GATEWAY_CACHE,
        0,
        1024 * 1024,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"llm_batch.keep_finished_jobs",
        c"Sets how long jobs that have ended stay in llm_batch.progress.",
        c"-1 keeps them for ever. The server log has a summary of each.",
        &KEEP_FINISHED_JOBS,
        -1,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_MIN,
    );
}

/// The settings that each session can set for itself.
fn define_of_sessions() {
    GucRegistry::define_string_guc(
        DEFAULT_MODEL_NAME,
        c"Model of llm_classify() with labels, and of tasks that name none.",
        c"A name given to llm_batch.create_model().",
        &DEFAULT_MODEL,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"llm_batch.enable_batch_scan",
        c"Enables the planner's use of batch scans.",
        c"With a batch scan, rows of llm_classify() and llm_filter() share requests. Without it each row takes its own.",
        &ENABLE_BATCH_SCAN,
        GucContext::Userset,
        GucFlags::EXPLAIN,
    );
    GucRegistry::define_int_guc(
        c"llm_batch.check_timeout",
        c"Sets the maximum time that a task's repairs and checks may take for a row.",
        c"A row for which they take longer has failed.",
        &CHECK_TIMEOUT,
        1,
        3_600_000,
        GucContext::Userset,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_float_guc(
        c"llm_batch.statement_max_cost",
        c"Sets the maximum cost in dollars of all llm_*() calls of a statement.",
        c"-1 means no limit. Jobs have budgets of their own.",
        &STATEMENT_MAX_COST,
        -1.0,
        1e6,
        GucContext::Userset,
        GucFlags::default(),
    );
}

pub fn enabled() -> bool {
    ENABLED.get()
}

pub fn enable_batch_scan() -> bool {
    ENABLE_BATCH_SCAN.get()
}

pub fn max_job_workers() -> usize {
    MAX_JOB_WORKERS.get().max(0) as usize
}

/// Bytes.
pub fn gateway_memory() -> usize {
    GATEWAY_MEMORY.get().max(1) as usize * 1024
}

/// Bytes.
pub fn gateway_cache() -> usize {
    GATEWAY_CACHE.get().max(0) as usize * 1024
}

/// Minutes.
pub fn keep_finished_jobs() -> Option<i32> {
    Some(KEEP_FINISHED_JOBS.get()).filter(|minutes| *minutes >= 0)
}

pub fn default_model() -> String {
    text(&DEFAULT_MODEL)
}

/// The role that `default_model` is set by; none where the server's or the database's configuration says it.
pub fn default_model_set_by() -> Option<pg_sys::Oid> {
    use pg_sys::GucSource as S;
    // SAFETY: on the main thread; our own setting's record, which lives as long as the process.
    unsafe {
        let setting = record(DEFAULT_MODEL_NAME).as_ref()?;
        match setting.source {
            // ALTER ROLE SET, of the role that has logged in: it may do so itself.
            S::PGC_S_USER | S::PGC_S_DATABASE_USER => Some(pg_sys::GetAuthenticatedUserId()),
            source if source >= S::PGC_S_CLIENT => Some(setting.srole),
            _ => None,
        }
    }
}

/// Postgres' record of a setting, or NULL.
unsafe fn record(name: &CStr) -> *mut pg_sys::config_generic {
    // SAFETY: on the main thread; the table of settings has as many records as Postgres says, whose names are C strings.
    unsafe {
        #[cfg(not(feature = "pg15"))]
        return pg_sys::find_option(name.as_ptr(), false, true, 0);
        #[cfg(feature = "pg15")]
        {
            let all = pg_sys::get_guc_variables();
            let mut records = (0..pg_sys::GetNumConfigOptions() as usize).map(|at| *all.add(at));
            records.find(|record| CStr::from_ptr((**record).name) == name).unwrap_or(std::ptr::null_mut())
        }
    }
}

/// Milliseconds.
pub fn check_timeout() -> i32 {
    CHECK_TIMEOUT.get()
}

/// Dollars.
pub fn statement_max_cost() -> Option<f64> {
    Some(STATEMENT_MAX_COST.get()).filter(|dollars| *dollars >= 0.0)
}

pub fn databases() -> Vec<String> {
    list(&DATABASES)
}

pub fn allowed_hosts() -> Vec<String> {
    list(&ALLOWED_HOSTS)
}

fn text(setting: &GucSetting<Option<CString>>) -> String {
    setting.get().map(|s| s.to_string_lossy().trim().to_owned()).unwrap_or_default()
}

fn list(setting: &GucSetting<Option<CString>>) -> Vec<String> {
    text(setting).split(',').map(|s| s.trim().trim_matches('"').to_owned()).filter(|s| !s.is_empty()).collect()
}
