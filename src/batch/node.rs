//! The plan node, as Postgres' executor knows it.

use std::ptr::{addr_of, null_mut};

use pgrx::PgMemoryContexts;
use pgrx::prelude::*;

use super::ahead::Ahead;
use super::nodes::{list, make, to_list};
use super::place::Wanted;
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
        let (kind, bounds) = match wanted {
            Wanted::All => (0, [null_mut(), null_mut()]),
            Wanted::Unknown => (1, [null_mut(), null_mut()]),
            Wanted::Limit { count, offset, is_sure } => (if is_sure { 2 } else { 3 }, [count, offset]),
        };
        let flags = [!bounds[0].is_null(), !bounds[1].is_null(), has_policies].map(i32::from);
        let flags = [kind].into_iter().chain(flags);
        (*scan).custom_private = to_list(flags.map(|flag| pg_sys::makeInteger(flag)));
        let bounds = bounds.into_iter().filter(|b| !b.is_null());
        (*scan).custom_exprs = to_list(bounds.map(|b| pg_sys::copyObjectImpl(b.cast()).cast::<pg_sys::Node>()));
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

/// Reads back what `plan()` has written: what is wanted, and whether there are policies.
unsafe fn wanted(scan: *mut pg_sys::CustomScan) -> (Wanted, bool) {
    // SAFETY: a node made by plan(), or a copy of it.
    unsafe {
        let flags: Vec<i32> = list::<pg_sys::Integer>((*scan).custom_private).into_iter().map(|i| (*i).ival).collect();
        let mut bounds = list::<pg_sys::Node>((*scan).custom_exprs).into_iter();
        let mut bound = |flag: usize| {
            if flags.get(flag) == Some(&1) { bounds.next().unwrap_or(null_mut()) } else { null_mut() }
        };
        let wanted = match flags.first() {
            Some(0) => Wanted::All,
            Some(kind @ (2 | 3)) => Wanted::Limit { count: bound(1), offset: bound(2), is_sure: *kind == 2 },
            _ => Wanted::Unknown,
        };
        (wanted, flags.get(3) == Some(&1))
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
        let (wanted, has_policies) = wanted(plan.cast());
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
