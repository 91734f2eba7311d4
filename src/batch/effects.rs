//! Whether reading a plan's rows may do something: then no row is read that may not be taken.

use pgrx::prelude::*;

use super::calls::verb;
use super::nodes::{any, list};
use pg_sys::NodeTag as T;

/// Volatile functions of Postgres that nobody notices: random(), gen_random_uuid(), clock_timestamp(), timeofday(),
/// pg_sleep() (pg_proc.dat).
const UNNOTICED: [u32; 5] = [1598, 3432, 2649, 274, 2626];

/// Looks into plans, given the subplans of their statement.
pub struct Effects<'a>(pub &'a [*mut pg_sys::Plan]);

impl Effects<'_> {
    /// Side effects of a node's rows, before its target list is computed; `conditions` are those that it has to check.
    ///
    /// # Safety
    /// All are parts of one finished plan.
    pub unsafe fn of_node(
        &self,
        plan: *mut pg_sys::Plan,
        conditions: impl IntoIterator<Item = *mut pg_sys::Node>,
    ) -> bool {
        // SAFETY: as the caller says.
        unsafe { conditions.into_iter().any(|c| self.of_expression(c)) || self.below(plan) }
    }

    unsafe fn of_plan(&self, plan: *mut pg_sys::Plan) -> bool {
        // SAFETY: the tag says what a node is; a part of the plan.
        unsafe {
            if plan.is_null() {
                return false;
            }
            pg_sys::check_stack_depth();
            let join = match (*plan).type_ {
                T::T_LockRows => return true,
                T::T_NestLoop | T::T_MergeJoin | T::T_HashJoin => (*plan.cast::<pg_sys::Join>()).joinqual,
                _ => std::ptr::null_mut(),
            };
            let lists = [(*plan).targetlist, (*plan).qual, join];
            lists.into_iter().any(|list| self.of_expression(list.cast())) || self.below(plan)
        }
    }

    /// What a node reads, where it does not read all of it in any case.
    unsafe fn below(&self, plan: *mut pg_sys::Plan) -> bool {
        // SAFETY: as of of_plan().
        unsafe {
            match (*plan).type_ {
                // A modification that is part of a query is always done to its end.
                T::T_Sort | T::T_Hash | T::T_ModifyTable => return false,
                T::T_Agg if (*plan.cast::<pg_sys::Agg>()).aggstrategy != pg_sys::AggStrategy::AGG_SORTED => {
                    return false;
                }
                T::T_SubqueryScan => return self.of_plan((*plan.cast::<pg_sys::SubqueryScan>()).subplan),
                T::T_CteScan => return self.of_subplan((*plan.cast::<pg_sys::CteScan>()).ctePlanId),
                T::T_ValuesScan => {
                    return self.of_expression((*plan.cast::<pg_sys::ValuesScan>()).values_lists.cast());
                }
                T::T_Append => return self.of_plans((*plan.cast::<pg_sys::Append>()).appendplans),
                T::T_MergeAppend => return self.of_plans((*plan.cast::<pg_sys::MergeAppend>()).mergeplans),
                _ => {}
            }
            self.of_plan((*plan).lefttree) || self.of_plan((*plan).righttree)
        }
    }

    unsafe fn of_plans(&self, plans: *mut pg_sys::List) -> bool {
        // SAFETY: as of of_plan().
        unsafe { list::<pg_sys::Plan>(plans).into_iter().any(|plan| self.of_plan(plan)) }
    }

    unsafe fn of_subplan(&self, id: i32) -> bool {
        let plan = usize::try_from(id - 1).ok().and_then(|at| self.0.get(at));
        // SAFETY: as of of_plan().
        plan.is_some_and(|plan| unsafe { self.of_plan(*plan) })
    }

    unsafe fn of_expression(&self, node: *mut pg_sys::Node) -> bool {
        // SAFETY: planned expressions.
        unsafe {
            any(node, &mut |node| match (*node).type_ {
                T::T_NextValueExpr => true,
                T::T_SubPlan => self.of_subplan((*node.cast::<pg_sys::SubPlan>()).plan_id),
                T::T_List => false,
                _ => pg_sys::check_functions_in_node(node, Some(is_noticed), std::ptr::null_mut()),
            })
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn is_noticed(function: pg_sys::Oid, _context: *mut std::ffi::c_void) -> bool {
    // SAFETY: on the main thread, in a transaction.
    let is_volatile = unsafe { pg_sys::func_volatile(function) } == pg_sys::PROVOLATILE_VOLATILE as std::ffi::c_char;
    is_volatile && !UNNOTICED.contains(&function.to_u32()) && verb(function).is_none()
}
