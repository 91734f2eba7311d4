//! The plan node, as Postgres' executor knows it.

use std::ptr::{addr_of, null_mut};

use pgrx::PgMemoryContexts;
use pgrx::prelude::*;

use super::ahead::Ahead;
use super::nodes::make;
use super::wanted::Wanted;
use super::{calls, explain};
use crate::settings;

const NAME: *const std::ffi::c_char = c"LLM Batch".as_ptr();

/// Tables of functions, which are never written.
struct Methods<M>(M);

// SAFETY: nothing but constants.
unsafe impl<M> Sync for Methods<M> {}

static SCAN: Methods<pg_sys::CustomScanMethods> =
    Methods(pg_sys::CustomScanMethods { CustomName: NAME, CreateCustomScanState: Some(create) });

static EXEC: Methods<pg_sys::CustomExecMethods> = Methods(pg_sys::CustomExecMethods {
    CustomName: NAME,
    BeginCustomScan: Some(begin),
    ExecCustomScan: Some(exec),
    EndCustomScan: Some(end),
    ReScanCustomScan: Some(rescan),
    MarkPosCustomScan: None,
    RestrPosCustomScan: None,
    EstimateDSMCustomScan: None,
    InitializeDSMCustomScan: None,
    ReInitializeDSMCustomScan: None,
    InitializeWorkerCustomScan: None,
    ShutdownCustomScan: None,
    ExplainCustomScan: Some(explain_node),
});

/// Postgres' state of the node, and ours.
#[repr(C)]
struct State {
    css: pg_sys::CustomScanState,
    ahead: *mut Ahead,
}

/// Makes the node known, for plans that are read from text.
pub fn register() {
    // SAFETY: on the main thread; the methods live as long as the process.
    unsafe { pg_sys::RegisterCustomScanMethods(addr_of!(SCAN.0)) };
}

/// A batch scan over `child` in the place of `old`, which may be its child.
///
/// # Safety
/// All are parts of one finished plan; the expressions refer to the child's columns by `OUTER_VAR`.
pub unsafe fn plan(
    old: *mut pg_sys::Plan,
    child: *mut pg_sys::Plan,
    targetlist: *mut pg_sys::List,
    qual: *mut pg_sys::List,
    wanted: Wanted,
    has_policies: bool,
) -> *mut pg_sys::Plan {
    // SAFETY: as the caller says.
    unsafe {
        let scan = make::<pg_sys::CustomScan>(pg_sys::NodeTag::T_CustomScan);
        (*scan).methods = addr_of!(SCAN.0);
        wanted.write(scan, has_policies);
        let plan = scan.cast::<pg_sys::Plan>();
        (*plan).startup_cost = (*old).startup_cost;
        (*plan).total_cost = (*old).total_cost;
        (*plan).plan_rows = (*old).plan_rows;
        (*plan).plan_width = (*old).plan_width;
        (*plan).plan_node_id = (*old).plan_node_id;
        #[cfg(feature = "pg18")]
        {
            (*plan).disabled_nodes = (*old).disabled_nodes;
        }
        (*plan).targetlist = targetlist;
        (*plan).qual = qual;
        (*plan).lefttree = child;
        (*plan).extParam = pg_sys::bms_copy((*old).extParam);
        (*plan).allParam = pg_sys::bms_copy((*old).allParam);
        (*plan).initPlan = (*old).initPlan;
        (*old).initPlan = null_mut();
        plan
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn create(_scan: *mut pg_sys::CustomScan) -> *mut pg_sys::Node {
    // SAFETY: a node that begins with what Postgres knows of it.
    unsafe {
        let state = make::<State>(pg_sys::NodeTag::T_CustomScanState);
        (*state).css.methods = addr_of!(EXEC.0);
        state.cast()
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(node: *mut pg_sys::CustomScanState, estate: *mut pg_sys::EState, flags: i32) {
    // SAFETY: Postgres calls this once, with the node that create() made, in the memory context of the query.
    unsafe {
        let ps = &raw mut (*node).ss.ps;
        let plan = (*ps).plan;
        let not_for_child = pg_sys::EXEC_FLAG_BACKWARD | pg_sys::EXEC_FLAG_MARK;
        (*ps).lefttree = pg_sys::ExecInitNode((*plan).lefttree, estate, flags & !(not_for_child as i32));
        // The expressions read rows as the child gives them, and as they were kept: slots of two kinds.
        (*ps).outeropsset = true;
        (*ps).outeropsfixed = false;
        let found = calls::find((*plan).qual, (*plan).targetlist);
        // A row that is looked at again since others have changed it is asked about by itself.
        let is_on = settings::enable_batch_scan() && (*estate).es_epq_active.is_null();
        let (wanted, has_policies) = Wanted::read(plan.cast());
        let ahead = Ahead::new(ps, found, wanted, is_on, has_policies);
        // Dropped with the query, also after an error: then nobody calls end().
        (*node.cast::<State>()).ahead = PgMemoryContexts::For((*estate).es_query_cxt).leak_and_drop_on_delete(ahead);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn exec(node: *mut pg_sys::CustomScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: begin() was called, end() was not.
    unsafe {
        match (*(*node.cast::<State>()).ahead).next() {
            Ok(slot) => slot,
            Err(e) => {
                pgrx::pg_sys::panic::ErrorReport::from(e).report(PgLogLevel::ERROR);
                null_mut()
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn rescan(node: *mut pg_sys::CustomScanState) {
    // SAFETY: as of exec(). A child whose parameters have changed is rescanned when it is read.
    unsafe {
        (*(*node.cast::<State>()).ahead).restart();
        let child = (*node).ss.ps.lefttree;
        if (*child).chgParam.is_null() {
            pg_sys::ExecReScan(child);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn end(node: *mut pg_sys::CustomScanState) {
    // SAFETY: as of exec().
    unsafe {
        (*(*node.cast::<State>()).ahead).end();
        pg_sys::ExecEndNode((*node).ss.ps.lefttree);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn explain_node(
    node: *mut pg_sys::CustomScanState,
    ancestors: *mut pg_sys::List,
    es: *mut pg_sys::ExplainState,
) {
    // SAFETY: as of exec().
    unsafe { explain::explain(&mut *(*node.cast::<State>()).ahead, (*node).ss.ps.plan, ancestors, es) };
}
