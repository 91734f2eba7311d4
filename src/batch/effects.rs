//! Checks whether reading a plan's rows may do something, or give others later: then no row is read that may not be
//! taken.

use pgrx::prelude::*;

use super::nodes::{any, list};
use crate::function::verb;
use pg_sys::NodeTag as T;

/// Volatile functions of Postgres that nobody notices: random(), gen_random_uuid(), clock_timestamp(), timeofday(),
/// pg_sleep() (pg_proc.dat).
const UNNOTICED: [u32; 5] = [1598, 3432, 2649, 274, 2626];

/// Functions of Postgres that tell of the session what may be changed between two FETCHes: current_setting(), current_user,
/// session_user, current_schema, current_schemas() (pg_proc.dat).
const SESSION: [u32; 7] = [2077, 3294, 710, 745, 746, 1402, 1403];

/// Looks into plans, given the subplans of their statement.
pub struct Effects<'a> {
    pub subplans: &'a [*mut pg_sys::Plan],
    /// Between two rows anything may happen in the session.
    pub is_cursor: bool,
}

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

    /// The effects below a node that may stop before it has read all of its input.
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
        let plan = usize::try_from(id - 1).ok().and_then(|at| self.subplans.get(at));
        // SAFETY: as of of_plan().
        plan.is_some_and(|plan| unsafe { self.of_plan(*plan) })
    }

    unsafe fn of_expression(&self, node: *mut pg_sys::Node) -> bool {
        // SAFETY: planned expressions.
        unsafe {
            any(node, &mut |node| match (*node).type_ {
                T::T_NextValueExpr => true,
                T::T_SQLValueFunction => self.is_cursor && !is_time((*node.cast::<pg_sys::SQLValueFunction>()).op),
                T::T_SubPlan => self.of_subplan((*node.cast::<pg_sys::SubPlan>()).plan_id),
                T::T_List => false,
                _ => {
                    let check = if self.is_cursor { is_noticed_in_cursor } else { is_noticed };
                    pg_sys::check_functions_in_node(node, Some(check), std::ptr::null_mut())
                }
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

#[pg_guard]
unsafe extern "C-unwind" fn is_noticed_in_cursor(function: pg_sys::Oid, context: *mut std::ffi::c_void) -> bool {
    // A function of a user's that is stable may well read a setting.
    let may_read = || {
        function.to_u32() >= pg_sys::FirstNormalObjectId
            // SAFETY: on the main thread, in a transaction.
            && unsafe { pg_sys::func_volatile(function) } == pg_sys::PROVOLATILE_STABLE as std::ffi::c_char
            && verb(function).is_none()
    };
    // SAFETY: as of is_noticed().
    SESSION.contains(&function.to_u32())
        || asks_for_rights(function)
        || may_read()
        || unsafe { is_noticed(function, context) }
}

/// pg_has_role(), has_table_privilege() and their like, most of which are about the current role.
fn asks_for_rights(function: pg_sys::Oid) -> bool {
    // SAFETY: on the main thread, in a transaction; the name is copied, and freed with the planner's memory.
    unsafe {
        let name = pg_sys::get_func_name(function);
        !name.is_null()
            && function.to_u32() < pg_sys::FirstNormalObjectId
            && std::ffi::CStr::from_ptr(name).to_str().is_ok_and(|name| {
                name == "pg_has_role"
                    || name == "row_security_active"
                    || name.starts_with("has_") && name.ends_with("_privilege")
            })
    }
}

/// Returns true for `CURRENT_DATE` and its like, which stay the same in a transaction.
fn is_time(value: pg_sys::SQLValueFunctionOp::Type) -> bool {
    value <= pg_sys::SQLValueFunctionOp::SVFOP_LOCALTIMESTAMP_N
}
