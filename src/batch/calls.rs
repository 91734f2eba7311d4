//! Which calls of a row's expressions can be asked about before the row's turn, and for which rows: those that evaluating
//! the expressions would come to.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;

use pgrx::PgList;
use pgrx::prelude::*;

use super::nodes::{self, list, to_list};

/// The oid of the language C (pg_language.dat).
const C_LANGUAGE: u32 = 13;

/// The functions that a batch scan knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// `llm_classify(input, task)`
    Task,
    /// `llm_classify(input, labels, options)`
    Labels,
    /// `llm_filter(input, question, options)`
    Filter,
}

thread_local! {
    /// By oid, what a function is, as far as that was looked up; forgotten when functions change.
    static VERBS: RefCell<Option<HashMap<u32, Option<Verb>>>> = const { RefCell::new(None) };
}

/// Which of our functions this is: one in C, of our library, whatever it is called and wherever it lives.
pub fn verb(function: pg_sys::Oid) -> Option<Verb> {
    // Built-in ones have no entry of ours.
    if function.to_u32() < pg_sys::FirstNormalObjectId {
        return None;
    }
    let known = VERBS.with_borrow_mut(|verbs| {
        let verbs = verbs.get_or_insert_with(|| {
            // SAFETY: on the main thread; the function lives as long as the process. Registered once in a process.
            unsafe {
                pg_sys::CacheRegisterSyscacheCallback(
                    pg_sys::SysCacheIdentifier::PROCOID as i32,
                    Some(forget),
                    pg_sys::Datum::from(0),
                );
            }
            HashMap::new()
        });
        verbs.get(&function.to_u32()).copied()
    });
    known.unwrap_or_else(|| {
        let found = look_up(function);
        VERBS.with_borrow_mut(|verbs| verbs.as_mut().map(|v| v.insert(function.to_u32(), found)));
        found
    })
}

#[pg_guard]
unsafe extern "C-unwind" fn forget(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    VERBS.with_borrow_mut(|verbs| {
        if let Some(verbs) = verbs {
            verbs.clear();
        }
    });
}

fn look_up(function: pg_sys::Oid) -> Option<Verb> {
    // SAFETY: on the main thread, in a transaction; the tuple is released and its attributes are copies by then.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::PROCOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(function));
        if tuple.is_null() {
            return None;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        let text = |attribute: u32| {
            let mut is_null = false;
            let datum = pg_sys::SysCacheGetAttr(cache, tuple, attribute as i16, &mut is_null);
            String::from_datum(datum, is_null).unwrap_or_default()
        };
        let is_c = (*form).prolang == pg_sys::Oid::from(C_LANGUAGE);
        let verb = if is_c && text(pg_sys::Anum_pg_proc_probin).ends_with("pg_llm_batch") {
            match text(pg_sys::Anum_pg_proc_prosrc).as_str() {
                "llm_classify_wrapper" => Some(Verb::Task),
                "llm_classify_labels_wrapper" => Some(Verb::Labels),
                "llm_filter_wrapper" => Some(Verb::Filter),
                _ => None,
            }
        } else {
            None
        };
        pg_sys::ReleaseSysCache(tuple);
        verb
    }
}

/// Which of our functions a node calls.
unsafe fn called(node: *mut pg_sys::Node) -> Option<Verb> {
    // SAFETY: the caller's node is a node.
    unsafe { nodes::cast::<pg_sys::FuncExpr>(node, pg_sys::NodeTag::T_FuncExpr).and_then(|f| verb((*f).funcid)) }
}

/// Whether an expression, or a list of them, calls one of our functions.
///
/// # Safety
/// `node` is a planned expression or NULL.
pub unsafe fn has_calls(node: *mut pg_sys::Node) -> bool {
    // SAFETY: as the caller says.
    unsafe { nodes::any(node, &mut |node| called(node).is_some()) }
}

/// What has to hold for an evaluation to come further.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guard {
    True(*mut pg_sys::Node),
    NotTrue(*mut pg_sys::Node),
    NotFalse(*mut pg_sys::Node),
    Null(*mut pg_sys::Node),
}

impl Guard {
    fn condition(self) -> *mut pg_sys::Node {
        match self {
            Self::True(node) | Self::NotTrue(node) | Self::NotFalse(node) | Self::Null(node) => node,
        }
    }

    /// As an expression that is never NULL.
    unsafe fn expression(self) -> *mut pg_sys::Node {
        // SAFETY: new nodes over a planned expression of type boolean, or any type for Null.
        unsafe {
            let test = |kind| {
                let test = nodes::make::<pg_sys::BooleanTest>(pg_sys::NodeTag::T_BooleanTest);
                (*test).arg = self.condition().cast();
                (*test).booltesttype = kind;
                test.cast::<pg_sys::Node>()
            };
            match self {
                Self::True(_) => test(pg_sys::BoolTestType::IS_TRUE),
                Self::NotTrue(_) => test(pg_sys::BoolTestType::IS_NOT_TRUE),
                Self::NotFalse(_) => test(pg_sys::BoolTestType::IS_NOT_FALSE),
                Self::Null(_) => {
                    let test = nodes::make::<pg_sys::NullTest>(pg_sys::NodeTag::T_NullTest);
                    (*test).arg = self.condition().cast();
                    (*test).nulltesttype = pg_sys::NullTestType::IS_NULL;
                    test.cast()
                }
            }
        }
    }
}

/// A call that can be asked about ahead.
#[derive(Debug)]
pub struct Call {
    pub verb: Verb,
    pub call: *mut pg_sys::FuncExpr,
    guards: Vec<Guard>,
    /// 0, or one more than the highest of the calls that its text or its guards need the answers of.
    pub level: usize,
}

impl Call {
    /// Conditions under which the call is reached, as a list without an AND.
    ///
    /// # Safety
    /// The expressions that the call was found in still exist.
    pub unsafe fn conditions(&self) -> *mut pg_sys::List {
        // SAFETY: as the caller says.
        to_list(self.guards.iter().map(|guard| unsafe { guard.expression() }))
    }
}

/// The calls of a node that filters by `qual`, a list without an AND, and then computes the expressions of `targetlist`.
///
/// # Safety
/// Both are planned expressions of a node whose rows have neither aggregates nor window functions left to compute.
pub unsafe fn find(qual: *mut pg_sys::List, targetlist: *mut pg_sys::List) -> Vec<Call> {
    let mut finder = Finder::default();
    let mut guards = Vec::new();
    // SAFETY: as the caller says.
    unsafe {
        for condition in list::<pg_sys::Node>(qual) {
            finder.walk(condition, &guards);
            guards.push(Guard::True(condition));
        }
        for entry in list::<pg_sys::TargetEntry>(targetlist) {
            finder.walk((*entry).expr.cast(), &guards);
        }
    }
    finder.calls
}

/// Whether an expression can be evaluated twice, with calls that can be asked about ahead, if any.
///
/// # Safety
/// `node` is a planned expression or NULL.
pub unsafe fn is_repeatable(node: *mut pg_sys::Node) -> bool {
    let mut finder = Finder::default();
    // SAFETY: as the caller says.
    unsafe {
        finder.walk(node, &[]);
        finder.level(node).is_some()
    }
}

#[derive(Default)]
struct Finder {
    calls: Vec<Call>,
    /// Parameters that have a value only while a subplan runs.
    fleeting: Vec<i32>,
}

impl Finder {
    /// Goes through an expression in the order in which it is evaluated. Into what may or may not be evaluated by rules
    /// not known here it does not go.
    unsafe fn walk(&mut self, node: *mut pg_sys::Node, guards: &[Guard]) {
        use pg_sys::NodeTag as T;
        if node.is_null() {
            return;
        }
        // SAFETY: the tag says what a node is; the fields are those of planned expressions.
        unsafe {
            match (*node).type_ {
                T::T_FuncExpr => {
                    self.walk((*node.cast::<pg_sys::FuncExpr>()).args.cast(), guards);
                    self.call(node, guards);
                }
                T::T_BoolExpr => {
                    let e = node.cast::<pg_sys::BoolExpr>();
                    let mut guards = guards.to_vec();
                    for arg in list::<pg_sys::Node>((*e).args) {
                        self.walk(arg, &guards);
                        match (*e).boolop {
                            pg_sys::BoolExprType::AND_EXPR => guards.push(Guard::NotFalse(arg)),
                            pg_sys::BoolExprType::OR_EXPR => guards.push(Guard::NotTrue(arg)),
                            _ => {}
                        }
                    }
                }
                T::T_CoalesceExpr => {
                    let mut guards = guards.to_vec();
                    for arg in list::<pg_sys::Node>((*node.cast::<pg_sys::CoalesceExpr>()).args) {
                        self.walk(arg, &guards);
                        guards.push(Guard::Null(arg));
                    }
                }
                T::T_CaseExpr => {
                    let e = node.cast::<pg_sys::CaseExpr>();
                    self.walk((*e).arg.cast(), guards);
                    let mut guards = guards.to_vec();
                    for when in list::<pg_sys::CaseWhen>((*e).args) {
                        let condition = nodes::replace_case_test((*when).expr.cast(), (*e).arg.cast());
                        self.walk(condition, &guards);
                        let reached = [guards.as_slice(), &[Guard::True(condition)]].concat();
                        self.walk((*when).result.cast(), &reached);
                        guards.push(Guard::NotTrue(condition));
                    }
                    self.walk((*e).defresult.cast(), &guards);
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
                | T::T_CoerceToDomain => nodes::children(node, &mut |child| self.walk(child, guards)),
                // Its plan is another's matter; what is compared with its rows is evaluated here.
                T::T_SubPlan => {
                    let e = node.cast::<pg_sys::SubPlan>();
                    if (*e).subLinkType != pg_sys::SubLinkType::MULTIEXPR_SUBLINK {
                        self.fleeting.extend(PgList::<i32>::from_pg((*e).paramIds).iter_int());
                        self.walk((*e).testexpr, guards);
                        self.walk((*e).args.cast(), guards);
                    }
                }
                _ => {}
            }
        }
    }

    /// Enters a call, if it and what leads to it can be evaluated twice.
    unsafe fn call(&mut self, node: *mut pg_sys::Node, guards: &[Guard]) {
        // SAFETY: as in walk().
        unsafe {
            let (Some(verb), f) = (called(node), node.cast::<pg_sys::FuncExpr>()) else { return };
            let is_known = |c: &Call| guards.starts_with(&c.guards) && pg_sys::equal(c.call.cast(), f.cast());
            if self.calls.iter().any(is_known) {
                return;
            }
            let args = list::<pg_sys::Node>((*f).args);
            let Some((input, others)) = args.split_first() else { return };
            // What is asked must be the same for all rows.
            let is_fixed =
                |arg: *mut pg_sys::Node| !nodes::has_columns(arg) && !has_calls(arg) && self.is_repeatable(arg);
            if !others.iter().all(|arg| is_fixed(*arg)) {
                return;
            }
            let mut level = 0;
            for part in guards.iter().map(|g| g.condition()).chain([*input]) {
                match self.level(part) {
                    Some(needed) => level = level.max(needed),
                    None => return,
                }
            }
            self.calls.push(Call { verb, call: f, guards: guards.to_vec(), level });
        }
    }

    /// The level of what needs this expression; none if it can't be evaluated twice.
    unsafe fn level(&self, node: *mut pg_sys::Node) -> Option<usize> {
        // SAFETY: as in walk().
        unsafe {
            let mut level = 0;
            let mut is_known = true;
            nodes::any(node, &mut |node| {
                if called(node).is_some() {
                    let equal = self.calls.iter().filter(|c| pg_sys::equal(c.call.cast(), node.cast()));
                    match equal.map(|c| c.level + 1).max() {
                        Some(needed) => level = level.max(needed),
                        None => is_known = false,
                    }
                }
                !is_known
            });
            (is_known && self.is_repeatable(node)).then_some(level)
        }
    }

    /// Whether evaluating an expression once more does no harm and gives the same. Our own functions do not count.
    unsafe fn is_repeatable(&self, node: *mut pg_sys::Node) -> bool {
        use pg_sys::NodeTag as T;
        // SAFETY: as in walk().
        unsafe {
            !nodes::any(node, &mut |node| match (*node).type_ {
                T::T_NextValueExpr | T::T_CoerceToDomainValue => true,
                // Its plan is not looked into. What may run in a parallel worker changes nothing.
                T::T_SubPlan => !(*node.cast::<pg_sys::SubPlan>()).parallel_safe,
                T::T_Param => self.fleeting.contains(&(*node.cast::<pg_sys::Param>()).paramid),
                _ if called(node).is_some() => false,
                _ => pg_sys::check_functions_in_node(node, Some(is_volatile), std::ptr::null_mut()),
            })
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
