//! Decides whether a plan is compiled (JIT). Postgres decides by the plan's cost, most of which comes from our
//! functions. They wait for the network, which compilation does not make faster.

use std::collections::HashMap;
use std::ptr::null_mut;

use pgrx::prelude::*;

use super::calls::called;
use super::nodes::{any, cast, list};
use pg_sys::NodeTag as T;

/// Has a plan compiled only if it would be without what our functions cost.
///
/// # Safety
/// The plan is finished and as the planner made it.
pub unsafe fn decide(stmt: *mut pg_sys::PlannedStmt) {
    // SAFETY: as the caller says; settings are read on the main thread.
    unsafe {
        let flags = (*stmt).jitFlags as u32;
        if flags & pg_sys::PGJIT_PERFORM == 0 {
            return;
        }
        let plan = (*stmt).planTree;
        let mut costs =
            Costs { tables: list((*stmt).rtable), subplans: list((*stmt).subplans), shares: HashMap::new() };
        let ours = costs.of_plan(plan);
        if ours == 0.0 {
            return;
        }
        let cost = (*plan).total_cost - ours;
        // A flag that the planner has not set for the whole cost is not set for less.
        let is_below = |limit: f64| limit < 0.0 || cost <= limit;
        let cleared = if is_below(pg_sys::jit_above_cost) {
            flags
        } else {
            [
                (pg_sys::jit_optimize_above_cost, pg_sys::PGJIT_OPT3),
                (pg_sys::jit_inline_above_cost, pg_sys::PGJIT_INLINE),
            ]
            .into_iter()
            .filter(|(limit, _)| is_below(*limit))
            .fold(0, |cleared, (_, flag)| cleared | flag)
        };
        (*stmt).jitFlags = (flags & !cleared) as i32;
    }
}

/// The costs of a statement's plans, and the part of our functions in them.
struct Costs {
    tables: Vec<*mut pg_sys::RangeTblEntry>,
    subplans: Vec<*mut pg_sys::Plan>,
    /// The part of subplans that were looked at, by number.
    shares: HashMap<i32, f64>,
}

impl Costs {
    /// The part of a plan's cost. The planner counts expressions for each row: those of the target list for the rows that a
    /// node gives, a filter for those that come to it. How many these are can't be seen in nodes other than a table's scan:
    /// all that such a node costs besides is then taken for its filter.
    unsafe fn of_plan(&mut self, plan: *mut pg_sys::Plan) -> f64 {
        if plan.is_null() {
            return 0.0;
        }
        pgrx::check_for_interrupts!();
        // SAFETY: the tag says what a node is.
        unsafe {
            pg_sys::check_stack_depth();
            let (mut below, mut ours) = (0.0, 0.0);
            for (child, times) in children(plan) {
                below += (*child).total_cost * times;
                ours += self.of_plan(child) * times;
            }
            for subplan in list::<pg_sys::SubPlan>((*plan).initPlan) {
                let cost = (*subplan).startup_cost + (*subplan).per_call_cost;
                below += cost;
                ours += cost * self.share(subplan);
            }
            let total = (*plan).total_cost;
            if below > total {
                // Not all of it is read.
                ours *= total / below;
            }
            let mut given = self.of_row((*plan).targetlist.cast()) * (*plan).plan_rows;
            let mut filter = self.of_row((*plan).qual.cast());
            match (*plan).type_ {
                T::T_NestLoop | T::T_MergeJoin | T::T_HashJoin => {
                    filter += self.of_row((*plan.cast::<pg_sys::Join>()).joinqual.cast());
                }
                // Arguments of aggregates are computed for the rows that come in.
                T::T_Agg if !(*plan).lefttree.is_null() => {
                    let mut aggregated = 0.0;
                    any((*plan).targetlist.cast(), &mut |node| {
                        if (*node).type_ == T::T_Aggref {
                            aggregated += self.of_row(node);
                        }
                        false
                    });
                    given += aggregated * ((*(*plan).lefttree).plan_rows - (*plan).plan_rows);
                }
                _ => {}
            }
            let mut rest = (total - below - given).max(0.0);
            // The planner counts what is grouped by once more, where it is a column by now. What it has not counted so is
            // a subquery's.
            if matches!((*plan).type_, T::T_Agg | T::T_Group | T::T_WindowAgg) {
                let mut again = 0.0;
                any((*plan).targetlist.cast(), &mut |node| {
                    again += self.of_column((*plan).lefttree, node);
                    false
                });
                again *= (*plan).plan_rows;
                if again <= rest {
                    given += again;
                    rest -= again;
                }
            }
            let filtered = match (*plan).type_ {
                _ if filter == 0.0 => 0.0,
                T::T_SeqScan => filter * self.rows(plan.cast()),
                _ => rest * filter / (filter + pg_sys::cpu_tuple_cost),
            };
            (ours + given + filtered).min(total)
        }
    }

    /// The part of the cost of a referenced column, which a node below computes.
    unsafe fn of_column(&mut self, child: *mut pg_sys::Plan, node: *mut pg_sys::Node) -> f64 {
        // SAFETY: the tag says what a node is; columns are counted from 1.
        unsafe {
            let column = cast::<pg_sys::Var>(node, T::T_Var).filter(|v| (**v).varno == pg_sys::OUTER_VAR);
            let (Some(column), false) = (column, child.is_null()) else { return 0.0 };
            let entries = list::<pg_sys::TargetEntry>((*child).targetlist);
            let Some(entry) = entries.get((*column).varattno as usize - 1) else { return 0.0 };
            let expression = (**entry).expr.cast::<pg_sys::Node>();
            if (*expression).type_ == T::T_Var {
                self.of_column((*child).lefttree, expression)
            } else {
                self.of_row(expression)
            }
        }
    }

    /// The rows of a table, as the planner has estimated them.
    unsafe fn rows(&self, scan: *mut pg_sys::Scan) -> f64 {
        // SAFETY: the planner has locked the tables of the statement; entries are counted from 1.
        unsafe {
            let Some(table) = self.tables.get((*scan).scanrelid as usize - 1) else { return 0.0 };
            let relation = pg_sys::RelationIdGetRelation((**table).relid);
            if relation.is_null() {
                return 0.0;
            }
            let (mut pages, mut rows, mut visible) = (0, 0.0, 0.0);
            pg_sys::estimate_rel_size(relation, null_mut(), &mut pages, &mut rows, &mut visible);
            pg_sys::RelationClose(relation);
            rows
        }
    }

    /// The part of the cost of expressions for a row.
    unsafe fn of_row(&mut self, expressions: *mut pg_sys::Node) -> f64 {
        let mut cost = 0.0;
        // SAFETY: planned expressions; the tag says what a node is.
        unsafe {
            any(expressions, &mut |node| {
                if called(node).is_some() {
                    let mut function = pg_sys::QualCost::default();
                    let id = (*node.cast::<pg_sys::FuncExpr>()).funcid;
                    pg_sys::add_function_cost(null_mut(), id, node, &mut function);
                    cost += function.per_tuple;
                } else if (*node).type_ == T::T_SubPlan {
                    let subplan = node.cast::<pg_sys::SubPlan>();
                    cost += (*subplan).per_call_cost * self.share(subplan);
                }
                false
            });
        }
        cost
    }

    /// Which part of a subplan's cost.
    unsafe fn share(&mut self, subplan: *mut pg_sys::SubPlan) -> f64 {
        // SAFETY: a subplan of the statement; they are counted from 1.
        unsafe {
            let id = (*subplan).plan_id;
            if let Some(share) = self.shares.get(&id) {
                return *share;
            }
            // A recursive query is part of itself.
            self.shares.insert(id, 0.0);
            let plan = self.subplans.get(id as usize - 1).copied().unwrap_or(null_mut());
            let ours = self.of_plan(plan);
            let share = if ours > 0.0 { ours / (*plan).total_cost } else { 0.0 };
            self.shares.insert(id, share);
            share
        }
    }
}

/// The nodes below one, and how often each is run.
unsafe fn children(plan: *mut pg_sys::Plan) -> Vec<(*mut pg_sys::Plan, f64)> {
    // SAFETY: the tag says what a node is.
    unsafe {
        let (left, right) = ((*plan).lefttree, (*plan).righttree);
        let mut below = vec![left, right];
        let mut times = 1.0;
        match (*plan).type_ {
            T::T_Append => below.extend(list::<pg_sys::Plan>((*plan.cast::<pg_sys::Append>()).appendplans)),
            T::T_MergeAppend => below.extend(list::<pg_sys::Plan>((*plan.cast::<pg_sys::MergeAppend>()).mergeplans)),
            T::T_SubqueryScan => below.push((*plan.cast::<pg_sys::SubqueryScan>()).subplan),
            // These keep what they have read.
            T::T_NestLoop if !matches!((*right).type_, T::T_Material | T::T_Memoize) => {
                times = (*left).plan_rows.max(1.0);
            }
            _ => {}
        }
        let times = |child: *mut pg_sys::Plan| if child == right { times } else { 1.0 };
        below.into_iter().filter(|child| !child.is_null()).map(|child| (child, times(child))).collect()
    }
}
