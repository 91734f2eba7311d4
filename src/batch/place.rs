//! Places batch scans in a finished plan. See README.md in this folder.

use std::ptr::null_mut;

use pgrx::prelude::*;

use super::calls::{find, has_calls, is_repeatable};
use super::effects::Effects;
use super::nodes::{Distinct, any, list, make, mutate, replace, to_list};
use super::wanted::Wanted;
use super::{jit, node};
use crate::settings;
use pg_sys::NodeTag as T;

/// Returns true if a query's rows are fetched one by one, with anything in between.
pub fn is_cursor(cursor_options: i32) -> bool {
    cursor_options as u32 & pg_sys::CURSOR_OPT_FAST_PLAN != 0
}

/// Puts batch scans into a plan.
///
/// # Safety
/// The plan is finished and nobody else's; `has_policies` says whether row security holds for what it reads.
pub unsafe fn place(stmt: *mut pg_sys::PlannedStmt, cursor_options: i32, has_policies: bool) {
    // SAFETY: as the caller says.
    unsafe {
        // A plan lists the functions that it calls, but those of Postgres: most plans are done with here.
        let calls_functions =
            |item: &*mut pg_sys::PlanInvalItem| (**item).cacheId == pg_sys::SysCacheIdentifier::PROCOID as i32;
        if !list::<pg_sys::PlanInvalItem>((*stmt).invalItems).iter().any(calls_functions) {
            return;
        }
        let is_cursor = is_cursor(cursor_options);
        // Whose calls they are is in the plan of a cursor, which PL/pgSQL keeps: another role gets another one.
        (*stmt).dependsOnRole |= is_cursor;
        jit::decide(stmt);
        if !settings::enable_batch_scan() {
            return;
        }
        let has = |option: u32| cursor_options as u32 & option != 0;
        // A policy may read a setting, or ask who reads, which may both be others at the next FETCH.
        if is_cursor && has_policies {
            return;
        }
        let mut placer = Placer { placed: 0, subplans: list((*stmt).subplans), is_cursor, has_policies };
        let wanted = if is_cursor { Wanted::Unknown } else { Wanted::All };
        // A plan that can go back may be scrolled by a cursor, though nobody said SCROLL.
        let goes_back = has(pg_sys::CURSOR_OPT_SCROLL)
            || is_cursor
                && !has(pg_sys::CURSOR_OPT_NO_SCROLL)
                && (*stmt).rowMarks.is_null()
                && pg_sys::ExecSupportsBackwardScan((*stmt).planTree);
        (*stmt).planTree = placer.plan((*stmt).planTree, wanted);
        if placer.placed > 0 && goes_back && !pg_sys::ExecSupportsBackwardScan((*stmt).planTree) {
            (*stmt).planTree = materialize((*stmt).planTree);
        }
        replace((*stmt).subplans, &mut |plan| placer.plan(plan, Wanted::Unknown));
    }
}

struct Placer {
    placed: usize,
    subplans: Vec<*mut pg_sys::Plan>,
    is_cursor: bool,
    has_policies: bool,
}

impl Placer {
    /// The plan with batch scans in it.
    unsafe fn plan(&mut self, plan: *mut pg_sys::Plan, wanted: Wanted) -> *mut pg_sys::Plan {
        if plan.is_null() {
            return plan;
        }
        pgrx::check_for_interrupts!();
        // SAFETY: the tag says what a node is.
        unsafe {
            pg_sys::check_stack_depth();
            let mut left = wanted.below();
            let mut right = wanted.below();
            match (*plan).type_ {
                // Workers below, and plans of others: not ours to change.
                T::T_Gather | T::T_GatherMerge | T::T_CustomScan | T::T_ForeignScan => return self.lift(plan, wanted),
                T::T_ModifyTable | T::T_Sort | T::T_Hash => left = Wanted::All,
                T::T_Agg if (*plan.cast::<pg_sys::Agg>()).aggstrategy != pg_sys::AggStrategy::AGG_SORTED => {
                    left = Wanted::All;
                }
                T::T_Result => left = wanted,
                T::T_NestLoop => right = Wanted::Unknown,
                // One row of the outer side is read before it is known whether the inner one has any; or either ends first.
                T::T_HashJoin => left = Wanted::Unknown,
                T::T_MergeJoin => (left, right) = (Wanted::Unknown, Wanted::Unknown),
                T::T_Limit => {
                    let limit = plan.cast::<pg_sys::Limit>();
                    let (count, offset) = ((*limit).limitCount, (*limit).limitOffset);
                    let is_fixed =
                        !pg_sys::contain_volatile_functions(count) && !pg_sys::contain_volatile_functions(offset);
                    let is_exact = (*limit).limitOption == pg_sys::LimitOption::LIMIT_OPTION_COUNT;
                    if !count.is_null() && is_fixed && is_exact {
                        left = Wanted::Limit { count, offset, is_sure: wanted == Wanted::All };
                    } else if !count.is_null() {
                        left = Wanted::Unknown;
                    }
                }
                T::T_Append => {
                    replace((*plan.cast::<pg_sys::Append>()).appendplans, &mut |child| self.plan(child, wanted));
                }
                T::T_MergeAppend => {
                    replace((*plan.cast::<pg_sys::MergeAppend>()).mergeplans, &mut |child| self.plan(child, wanted));
                }
                T::T_SubqueryScan => {
                    let scan = plan.cast::<pg_sys::SubqueryScan>();
                    let wanted = if (*plan).qual.is_null() { wanted } else { wanted.below() };
                    (*scan).subplan = self.plan((*scan).subplan, wanted);
                }
                _ => {}
            }
            (*plan).lefttree = self.plan((*plan).lefttree, left);
            let before = self.placed;
            (*plan).righttree = self.plan((*plan).righttree, right);
            // A merge join goes back in its inner side, which a batch scan can't.
            if (*plan).type_ == T::T_MergeJoin
                && self.placed > before
                && !matches!((*(*plan).righttree).type_, T::T_Material | T::T_Sort)
            {
                (*plan).righttree = materialize((*plan).righttree);
            }
            if (*plan).type_ == T::T_Agg {
                self.below_aggregate(plan.cast(), left);
            }
            self.lift(plan, wanted)
        }
    }

    /// The node itself, or a batch scan above it that does what of it comes after the first call: the rest of its
    /// filter, and its target list. The node then yields the columns which those need.
    unsafe fn lift(&mut self, plan: *mut pg_sys::Plan, wanted: Wanted) -> *mut pg_sys::Plan {
        // SAFETY: the tag says what a node is. Reasons to refuse are looked at before anything is changed.
        unsafe {
            let join = match (*plan).type_ {
                T::T_NestLoop | T::T_MergeJoin | T::T_HashJoin => Some(plan.cast::<pg_sys::Join>()),
                _ => None,
            };
            if !may_be_below(plan) {
                return plan;
            }
            let (mut kept, mut lifted) = split((*plan).qual);
            let mut kept_of_join = None;
            if let Some(join) = join {
                let (before, after) = split((*join).joinqual);
                // Which rows of an outer join find no partner hangs on all of its condition.
                if !after.is_empty() && (*join).jointype == pg_sys::JoinType::JOIN_INNER {
                    lifted = [after, std::mem::take(&mut kept), lifted].concat();
                    kept_of_join = Some(before);
                }
            }
            if lifted.is_empty() && !has_calls((*plan).targetlist.cast()) {
                return plan;
            }
            let is_exact = lifted.is_empty() && matches!(wanted, Wanted::Limit { is_sure: true, .. });
            let conditions = kept.iter().chain(kept_of_join.iter().flatten());
            let effects = Effects { subplans: &self.subplans, is_cursor: self.is_cursor };
            if wanted != Wanted::All && !is_exact && effects.of_node(plan, conditions.copied()) {
                return plan;
            }
            // A node that does nothing but compute gives way.
            let is_plain_result = (*plan).type_ == T::T_Result
                && kept.is_empty()
                && (*plan.cast::<pg_sys::Result>()).resconstantqual.is_null();
            let mut columns = Columns::default();
            let (targetlist, qual) = if is_plain_result {
                ((*plan).targetlist, to_list(lifted))
            } else {
                let lifted = to_list(lifted);
                (columns.take((*plan).targetlist.cast()).cast(), columns.take(lifted.cast()).cast())
            };
            if find(qual, targetlist).calls.is_empty() {
                return plan;
            }
            self.placed += 1;
            let child = if is_plain_result {
                (*plan).lefttree
            } else {
                (*plan).targetlist = to_list(columns.entries());
                if let (Some(join), Some(kept)) = (join, kept_of_join) {
                    (*join).joinqual = to_list(kept);
                    // The columns that are kept need not be those that make the rows unique.
                    (*join).inner_unique = false;
                }
                (*plan).qual = to_list(kept);
                (*plan).async_capable = false;
                plan
            };
            node::plan(plan, child, targetlist, qual, wanted, self.has_policies)
        }
    }

    /// Aggregates that are computed of what calls give: a batch scan below computes it, as further columns.
    unsafe fn below_aggregate(&mut self, agg: *mut pg_sys::Agg, wanted: Wanted) {
        // SAFETY: an Agg of a finished plan. Reasons to refuse are looked at before anything is changed.
        unsafe {
            let plan = agg.cast::<pg_sys::Plan>();
            let calls = |node: *mut pg_sys::Node| {
                (*node).type_ == T::T_Aggref && {
                    let a = node.cast::<pg_sys::Aggref>();
                    // The filter is evaluated for the argument and for the aggregate.
                    (has_calls((*a).args.cast()) || has_calls((*a).aggfilter.cast()))
                        && is_repeatable((*a).aggfilter.cast())
                }
            };
            let lists = [(*plan).targetlist, (*plan).qual];
            if !(*agg).chain.is_null()
                || (*agg).aggsplit != pg_sys::AggSplit::AGGSPLIT_SIMPLE
                || !lists.iter().any(|l| any(l.cast(), &mut |node| calls(node)))
            {
                return;
            }
            let child = (*plan).lefttree;
            let passed = list::<pg_sys::TargetEntry>(outer_references((*child).targetlist));
            let mut computed = Columns { first: passed.len(), ..Columns::default() };
            let mut change = |node: *mut pg_sys::Node| {
                if !calls(node) {
                    return ((*node).type_ == T::T_Aggref).then_some(node);
                }
                let a = pg_sys::copyObjectImpl(node.cast()).cast::<pg_sys::Aggref>();
                let filter = (*a).aggfilter;
                for argument in list::<pg_sys::TargetEntry>((*a).args) {
                    if has_calls((*argument).expr.cast()) {
                        let mut value = (*argument).expr.cast();
                        if !filter.is_null() {
                            value = only_when(filter.cast(), value);
                        }
                        (*argument).expr = computed.column(value).cast();
                    }
                }
                if has_calls(filter.cast()) {
                    (*a).aggfilter = computed.column(filter.cast()).cast();
                }
                Some(a.cast())
            };
            let [targetlist, qual] = lists.map(|l| mutate(l.cast(), &mut change).cast::<pg_sys::List>());
            let below = to_list(passed.into_iter().chain(computed.entries()));
            if find(null_mut(), below).calls.is_empty() {
                return;
            }
            self.placed += 1;
            (*plan).targetlist = targetlist;
            (*plan).qual = qual;
            (*plan).lefttree = node::plan(child, child, below, null_mut(), wanted, self.has_policies);
        }
    }
}

/// Returns true if a batch scan can stand above a node: it has expressions that another node can compute of its
/// columns.
unsafe fn may_be_below(plan: *mut pg_sys::Plan) -> bool {
    // SAFETY: the tag says what a node is.
    unsafe {
        match (*plan).type_ {
            T::T_SeqScan
            | T::T_SampleScan
            | T::T_IndexScan
            | T::T_IndexOnlyScan
            | T::T_BitmapHeapScan
            | T::T_TidScan
            | T::T_TidRangeScan
            | T::T_SubqueryScan
            | T::T_FunctionScan
            | T::T_ValuesScan
            | T::T_TableFuncScan
            | T::T_CteScan
            | T::T_NamedTuplestoreScan
            | T::T_WorkTableScan
            | T::T_ForeignScan
            | T::T_NestLoop
            | T::T_MergeJoin
            | T::T_HashJoin
            | T::T_Gather
            | T::T_GatherMerge
            | T::T_Group
            | T::T_Agg => true,
            // Its run condition names columns of the target list.
            T::T_WindowAgg => (*plan.cast::<pg_sys::WindowAgg>()).runCondition.is_null(),
            T::T_Result => !(*plan).lefttree.is_null(),
            _ => false,
        }
    }
}

/// A list of conditions up to the first that has a call, and from there on.
unsafe fn split(qual: *mut pg_sys::List) -> (Vec<*mut pg_sys::Node>, Vec<*mut pg_sys::Node>) {
    // SAFETY: a list of conditions.
    unsafe {
        let mut before = list::<pg_sys::Node>(qual);
        let at = before.iter().position(|condition| has_calls(*condition)).unwrap_or(before.len());
        let after = before.split_off(at);
        (before, after)
    }
}

/// Expressions that a node yields as columns of its own, each once.
#[derive(Default)]
struct Columns {
    /// The number of other columns before them.
    first: usize,
    expressions: Distinct,
}

impl Columns {
    /// A reference to the column of an expression.
    unsafe fn column(&mut self, expression: *mut pg_sys::Node) -> *mut pg_sys::Node {
        // SAFETY: planned expressions.
        unsafe {
            let at = self.expressions.add(expression);
            outer_column(expression, self.first + at)
        }
    }

    /// The expressions with references to the columns in the place of what only the node can compute.
    unsafe fn take(&mut self, expressions: *mut pg_sys::Node) -> *mut pg_sys::Node {
        // SAFETY: planned expressions.
        unsafe {
            mutate(expressions, &mut |node| {
                let is_leaf = matches!((*node).type_, T::T_Var | T::T_Aggref | T::T_WindowFunc | T::T_GroupingFunc);
                is_leaf.then(|| self.column(node))
            })
        }
    }

    unsafe fn entries(&self) -> impl Iterator<Item = *mut pg_sys::TargetEntry> {
        let numbers = self.first as i16 + 1..;
        // SAFETY: new entries; the columns are expressions of the node.
        let entry = |(column, number): (&*mut pg_sys::Node, i16)| unsafe {
            pg_sys::makeTargetEntry(column.cast(), number, null_mut(), false)
        };
        self.expressions.expressions.iter().zip(numbers).map(entry)
    }
}

/// A reference to the column of the child, counted from 0, that holds what `expression` gives.
unsafe fn outer_column(expression: *mut pg_sys::Node, at: usize) -> *mut pg_sys::Node {
    // SAFETY: a planned expression.
    unsafe {
        pg_sys::makeVar(
            pg_sys::OUTER_VAR,
            at as i16 + 1,
            pg_sys::exprType(expression),
            pg_sys::exprTypmod(expression),
            pg_sys::exprCollation(expression),
            0,
        )
        .cast()
    }
}

/// The target list of a node that passes its child's rows through.
unsafe fn outer_references(targetlist: *mut pg_sys::List) -> *mut pg_sys::List {
    // SAFETY: a target list.
    unsafe {
        let reference = |(at, entry): (usize, *mut pg_sys::TargetEntry)| {
            let new = pg_sys::flatCopyTargetEntry(entry);
            (*new).expr = outer_column((*entry).expr.cast(), at).cast();
            new
        };
        to_list(list::<pg_sys::TargetEntry>(targetlist).into_iter().enumerate().map(reference))
    }
}

/// `CASE WHEN condition THEN value END`
unsafe fn only_when(condition: *mut pg_sys::Node, value: *mut pg_sys::Node) -> *mut pg_sys::Node {
    // SAFETY: new nodes over planned expressions.
    unsafe {
        let when = make::<pg_sys::CaseWhen>(T::T_CaseWhen);
        (*when).expr = condition.cast();
        (*when).result = value.cast();
        let case = make::<pg_sys::CaseExpr>(T::T_CaseExpr);
        (*case).casetype = pg_sys::exprType(value);
        (*case).casecollid = pg_sys::exprCollation(value);
        (*case).args = to_list([when]);
        (*case).defresult =
            pg_sys::makeNullConst((*case).casetype, pg_sys::exprTypmod(value), (*case).casecollid).cast();
        case.cast()
    }
}

/// A node that keeps its child's rows, to go back in them.
unsafe fn materialize(child: *mut pg_sys::Plan) -> *mut pg_sys::Plan {
    // SAFETY: a finished plan.
    unsafe {
        let plan = pg_sys::materialize_finished_plan(child);
        (*plan).targetlist = outer_references((*child).targetlist);
        plan
    }
}
