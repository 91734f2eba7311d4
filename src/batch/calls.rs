//! Which calls of a row's expressions can be asked about before the row's turn, and for which rows: those that evaluating
//! the expressions would come to.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;

use pgrx::PgList;
use pgrx::prelude::*;

use super::guards::{Guard, Test};
use super::nodes::{self, Distinct, list};
use crate::function::verb;
use crate::verb::Verb;

/// Which of our functions a node calls.
///
/// # Safety
/// `node` is a node or NULL.
pub unsafe fn called(node: *mut pg_sys::Node) -> Option<Verb> {
    // SAFETY: the caller's node is a node.
    unsafe { nodes::cast::<pg_sys::FuncExpr>(node, pg_sys::NodeTag::T_FuncExpr).and_then(|f| verb((*f).funcid)) }
}

/// Returns true if an expression, or a list of them, calls one of our functions.
///
/// # Safety
/// `node` is a planned expression or NULL.
pub unsafe fn has_calls(node: *mut pg_sys::Node) -> bool {
    // SAFETY: as the caller says.
    unsafe { nodes::any(node, &mut |node| called(node).is_some()) }
}

/// A call that can be asked about ahead.
#[derive(Debug)]
pub struct Call {
    pub verb: Verb,
    pub call: *mut pg_sys::FuncExpr,
    /// The innermost of its guards.
    pub guard: Option<usize>,
    /// 0, or one more than the highest of the calls that its text or its guards need the answers of.
    pub level: usize,
}

/// The calls of a node, and all guards within its expressions with their conditions.
#[derive(Default)]
pub struct Found {
    pub calls: Vec<Call>,
    pub guards: Vec<Guard>,
    pub conditions: Distinct,
}

/// The calls of a node that filters by `qual`, a list without an AND, and then computes the expressions of `targetlist`.
///
/// # Safety
/// Both are planned expressions of a node whose rows have neither aggregates nor window functions left to compute.
pub unsafe fn find(qual: *mut pg_sys::List, targetlist: *mut pg_sys::List) -> Found {
    let mut finder = Finder::default();
    // SAFETY: as the caller says.
    unsafe {
        for condition in list::<pg_sys::Node>(qual) {
            finder.walk(condition);
            finder.enter(Test::True, condition);
        }
        for entry in list::<pg_sys::TargetEntry>(targetlist) {
            finder.walk((*entry).expr.cast());
        }
    }
    finder.found
}

/// Returns true if an expression can be evaluated twice, with calls that can be asked about ahead, if any.
///
/// # Safety
/// `node` is a planned expression or NULL.
pub unsafe fn is_repeatable(node: *mut pg_sys::Node) -> bool {
    let mut finder = Finder::default();
    // SAFETY: as the caller says.
    unsafe {
        finder.walk(node);
        finder.level(node).is_some()
    }
}

/// Goes through expressions, with work in proportion to their size.
#[derive(Default)]
struct Finder {
    found: Found,
    /// The innermost guard of where it is.
    at: Option<usize>,
    /// The calls that were found, equal ones once, and for each the level of what needs its answer.
    calls: Distinct,
    needed: Vec<usize>,
    /// Those whose answer is there wherever it is, by position in `calls`; and in which order, behind which guard.
    passed: HashSet<usize>,
    order: Vec<(Option<usize>, usize)>,
    /// By expression, what `level()` says of it.
    levels: HashMap<*mut pg_sys::Node, Option<usize>>,
    /// Parameters that have a value only while a subplan runs.
    fleeting: HashSet<i32>,
}

impl Finder {
    /// Goes through an expression in the order in which it is evaluated. Into what may or may not be evaluated by rules
    /// not known here it does not go.
    unsafe fn walk(&mut self, node: *mut pg_sys::Node) {
        use pg_sys::NodeTag as T;
        if node.is_null() {
            return;
        }
        pgrx::check_for_interrupts!();
        let outer = self.at;
        // SAFETY: the tag says what a node is; the fields are those of planned expressions.
        unsafe {
            match (*node).type_ {
                T::T_FuncExpr => {
                    self.walk((*node.cast::<pg_sys::FuncExpr>()).args.cast());
                    self.call(node);
                }
                T::T_BoolExpr => {
                    let e = node.cast::<pg_sys::BoolExpr>();
                    let test = match (*e).boolop {
                        pg_sys::BoolExprType::AND_EXPR => Test::NotFalse,
                        // NOT has one argument.
                        _ => Test::NotTrue,
                    };
                    self.in_turn((*e).args, test);
                }
                T::T_CoalesceExpr => self.in_turn((*node.cast::<pg_sys::CoalesceExpr>()).args, Test::Null),
                T::T_CaseExpr => {
                    let e = node.cast::<pg_sys::CaseExpr>();
                    self.walk((*e).arg.cast());
                    for when in list::<pg_sys::CaseWhen>((*e).args) {
                        let condition = nodes::replace_case_test((*when).expr.cast(), (*e).arg.cast());
                        self.walk(condition);
                        let before = self.at;
                        self.enter(Test::True, condition);
                        self.walk((*when).result.cast());
                        self.leave(before);
                        self.enter(Test::NotTrue, condition);
                    }
                    self.walk((*e).defresult.cast());
                }
                // All of whose parts are always evaluated.
                T::T_List
                | T::T_OpExpr
                | T::T_DistinctExpr
                | T::T_NullIfExpr
                | T::T_ScalarArrayOpExpr
                | T::T_RelabelType
                | T::T_CoerceViaIO
                | T::T_CollateExpr
                | T::T_MinMaxExpr
                | T::T_ArrayExpr
                | T::T_RowExpr
                | T::T_NullTest
                | T::T_BooleanTest
                | T::T_FieldSelect
                | T::T_CoerceToDomain => nodes::children(node, &mut |child| self.walk(child)),
                // Its plan is another's matter; what is compared with its rows is evaluated here.
                T::T_SubPlan => {
                    let e = node.cast::<pg_sys::SubPlan>();
                    if (*e).subLinkType != pg_sys::SubLinkType::MULTIEXPR_SUBLINK {
                        self.fleeting.extend(PgList::<i32>::from_pg((*e).paramIds).iter_int());
                        self.walk((*e).testexpr);
                        self.walk((*e).args.cast());
                    }
                }
                _ => {}
            }
        }
        self.leave(outer);
    }

    /// Goes through expressions, each of which is evaluated if the test holds of those before it.
    unsafe fn in_turn(&mut self, args: *mut pg_sys::List, test: Test) {
        // SAFETY: as in walk().
        unsafe {
            let mut previous = None;
            for arg in list::<pg_sys::Node>(args) {
                if let Some(before) = previous.replace(arg) {
                    self.enter(test, before);
                }
                self.walk(arg);
            }
        }
    }

    /// Goes on behind a guard, whose condition it has gone through.
    unsafe fn enter(&mut self, test: Test, condition: *mut pg_sys::Node) {
        // SAFETY: as in walk().
        let (level, condition) = unsafe { (self.level(condition), self.found.conditions.add(condition)) };
        let level = self.level_here().zip(level).map(|(before, own)| before.max(own));
        self.found.guards.push(Guard { outer: self.at, test, condition, level });
        self.at = Some(self.found.guards.len() - 1);
    }

    /// Goes on where it was before guards were entered.
    fn leave(&mut self, outer: Option<usize>) {
        // Calls found behind them need no evaluation any more. Guards have higher numbers than those around them.
        while let Some((_, call)) = self.order.pop_if(|(guard, _)| *guard > outer) {
            self.passed.remove(&call);
        }
        self.at = outer;
    }

    /// The level of what is evaluated here; none if what leads to it can't be evaluated twice.
    fn level_here(&self) -> Option<usize> {
        self.at.map_or(Some(0), |i| self.found.guards.get(i)?.level)
    }

    /// Enters a call, if it and what leads to it can be evaluated twice.
    unsafe fn call(&mut self, node: *mut pg_sys::Node) {
        // SAFETY: as in walk().
        unsafe {
            let (Some(verb), f) = (called(node), node.cast::<pg_sys::FuncExpr>()) else { return };
            let Some(before) = self.level_here() else { return };
            if self.calls.position(node).is_some_and(|call| self.passed.contains(&call)) {
                return;
            }
            let args = list::<pg_sys::Node>((*f).args);
            let Some((input, others)) = args.split_first() else { return };
            // The question must be the same for all rows.
            let mut is_fixed =
                |arg: *mut pg_sys::Node| !nodes::has_columns(arg) && !has_calls(arg) && self.level(arg).is_some();
            if !others.iter().all(|arg| is_fixed(*arg)) {
                return;
            }
            let Some(own) = self.level(*input) else { return };
            let level = before.max(own);
            let call = self.calls.add(node);
            self.needed.resize(self.needed.len().max(call + 1), 0);
            if let Some(needed) = self.needed.get_mut(call) {
                *needed = (*needed).max(level + 1);
            }
            self.passed.insert(call);
            self.order.push((self.at, call));
            self.found.calls.push(Call { verb, call: f, guard: self.at, level });
        }
    }

    /// The level of what needs an expression that it has gone through; none if evaluating it once more does harm or gives
    /// something else. Our own functions do no harm, if they were found.
    unsafe fn level(&mut self, node: *mut pg_sys::Node) -> Option<usize> {
        if node.is_null() {
            return Some(0);
        }
        if let Some(level) = self.levels.get(&node) {
            return *level;
        }
        pgrx::check_for_interrupts!();
        // SAFETY: as in walk().
        unsafe {
            let mut level = if called(node).is_some() {
                self.calls.position(node).and_then(|call| self.needed.get(call).copied())
            } else {
                self.is_repeatable(node).then_some(0)
            };
            nodes::children(node, &mut |child| {
                level = level.and_then(|level| Some(level.max(self.level(child)?)));
            });
            self.levels.insert(node, level);
            level
        }
    }

    /// Returns true if a node does no harm and gives the same if what it is made of does.
    unsafe fn is_repeatable(&self, node: *mut pg_sys::Node) -> bool {
        use pg_sys::NodeTag as T;
        // SAFETY: as in walk().
        unsafe {
            match (*node).type_ {
                T::T_NextValueExpr | T::T_CoerceToDomainValue => false,
                // Its plan is not looked into. A plan that may run in a parallel worker changes nothing.
                T::T_SubPlan => (*node.cast::<pg_sys::SubPlan>()).parallel_safe,
                T::T_Param => !self.fleeting.contains(&(*node.cast::<pg_sys::Param>()).paramid),
                T::T_List => true,
                _ => !pg_sys::check_functions_in_node(node, Some(is_volatile), std::ptr::null_mut()),
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn is_volatile(function: pg_sys::Oid, _context: *mut std::ffi::c_void) -> bool {
    // SAFETY: on the main thread, in a transaction.
    unsafe { pg_sys::func_volatile(function) == pg_sys::PROVOLATILE_VOLATILE as std::ffi::c_char }
}

/// A call as EXPLAIN writes expressions.
///
/// # Safety
/// The context is of the plan node that the call was found in.
pub unsafe fn deparse(call: &Call, context: *mut pg_sys::List, with_prefix: bool) -> String {
    // SAFETY: as the caller says; the text is palloc'd and ends with a NUL.
    unsafe {
        let text = pg_sys::deparse_expression(call.call.cast(), context, with_prefix, false);
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}
