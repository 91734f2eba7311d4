//! Helpers for Postgres' node trees.

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ptr::null_mut;

use pgrx::PgList;
use pgrx::prelude::*;

/// A node as a struct, if it has this tag.
///
/// # Safety
/// `node` is a node or NULL, and `T` is what the tag stands for.
pub unsafe fn cast<T>(node: *mut pg_sys::Node, tag: pg_sys::NodeTag) -> Option<*mut T> {
    // SAFETY: every node begins with its tag.
    (!node.is_null() && unsafe { (*node).type_ } == tag).then_some(node.cast())
}

/// A new node, all zero but its tag.
///
/// # Safety
/// `T` is what the tag stands for.
pub unsafe fn make<T>(tag: pg_sys::NodeTag) -> *mut T {
    // SAFETY: as many bytes as the struct has, in the current memory context.
    unsafe {
        let node = pg_sys::palloc0(size_of::<T>()).cast::<pg_sys::Node>();
        (*node).type_ = tag;
        node.cast()
    }
}

/// The pointers of a list; none of NIL.
///
/// # Safety
/// `list` is NIL or a list of pointers to `T`.
pub unsafe fn list<T>(list: *mut pg_sys::List) -> Vec<*mut T> {
    // SAFETY: as the caller says.
    unsafe { PgList::from_pg(list).iter_ptr().collect() }
}

/// Replaces every pointer of a list.
///
/// # Safety
/// As of `list()`.
pub unsafe fn replace<T>(list: *mut pg_sys::List, with: &mut dyn FnMut(*mut T) -> *mut T) {
    // SAFETY: a list has `length` elements.
    unsafe {
        if list.is_null() {
            return;
        }
        for i in 0..(*list).length as usize {
            let cell = (*list).elements.add(i);
            (*cell).ptr_value = with((*cell).ptr_value.cast()).cast();
        }
    }
}

/// A list of pointers.
pub fn to_list<T>(items: impl IntoIterator<Item = *mut T>) -> *mut pg_sys::List {
    let mut list = PgList::new();
    for item in items {
        list.push(item);
    }
    list.into_pg()
}

type Visit<'a> = &'a mut dyn FnMut(*mut pg_sys::Node) -> bool;

/// Returns true if `found` holds for a node of an expression, or of a list of them; looked at from the top.
///
/// # Safety
/// `node` is a planned expression or NULL.
pub unsafe fn any(node: *mut pg_sys::Node, mut found: Visit<'_>) -> bool {
    // SAFETY: the context is the visitor, which lives while the tree is walked.
    unsafe { any_below(node, (&raw mut found).cast()) }
}

#[pg_guard]
unsafe extern "C-unwind" fn any_below(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: see any().
    unsafe {
        let found = &mut *context.cast::<Visit<'_>>();
        (!is_list(node) && found(node)) || pg_sys::expression_tree_walker(node, Some(any_below), context)
    }
}

unsafe fn is_list(node: *mut pg_sys::Node) -> bool {
    // SAFETY: the caller's node is a node.
    unsafe { (*node).type_ == pg_sys::NodeTag::T_List }
}

/// Visits what a node is made of, in order, but not what that is made of.
///
/// # Safety
/// As of `any()`.
pub unsafe fn children(node: *mut pg_sys::Node, visit: &mut dyn FnMut(*mut pg_sys::Node)) {
    #[pg_guard]
    unsafe extern "C-unwind" fn child(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
        // SAFETY: the context is the visitor below.
        unsafe { (*context.cast::<&mut dyn FnMut(*mut pg_sys::Node)>())(node) };
        false
    }
    let mut visit = visit;
    // SAFETY: the context is the visitor, which lives while the tree is walked.
    unsafe { pg_sys::expression_tree_walker(node, Some(child), (&raw mut visit).cast()) };
}

/// Returns true if an expression depends on the row.
///
/// # Safety
/// As of `any()`.
pub unsafe fn has_columns(node: *mut pg_sys::Node) -> bool {
    // SAFETY: as the caller says.
    unsafe { any(node, &mut |node| (*node).type_ == pg_sys::NodeTag::T_Var) }
}

/// Expressions, equal ones once, by position.
#[derive(Default)]
pub struct Distinct {
    pub expressions: Vec<*mut pg_sys::Node>,
    /// By fingerprint, where they are.
    positions: HashMap<u64, Vec<usize>>,
}

impl Distinct {
    /// The position of an expression, if it was added.
    ///
    /// # Safety
    /// As of `any()`; what was added still exists.
    pub unsafe fn position(&self, expression: *mut pg_sys::Node) -> Option<usize> {
        // SAFETY: as the caller says.
        unsafe { self.look_up(fingerprint(expression), expression) }
    }

    /// Adds an expression. Returns its position.
    ///
    /// # Safety
    /// As of `position()`.
    pub unsafe fn add(&mut self, expression: *mut pg_sys::Node) -> usize {
        // SAFETY: as the caller says.
        unsafe {
            let fingerprint = fingerprint(expression);
            self.look_up(fingerprint, expression).unwrap_or_else(|| {
                self.expressions.push(expression);
                let new = self.expressions.len() - 1;
                self.positions.entry(fingerprint).or_default().push(new);
                new
            })
        }
    }

    unsafe fn look_up(&self, fingerprint: u64, expression: *mut pg_sys::Node) -> Option<usize> {
        let is_it = |at: &usize| {
            // SAFETY: as of position().
            let is_equal = |other: &*mut pg_sys::Node| unsafe { pg_sys::equal(other.cast(), expression.cast()) };
            self.expressions.get(*at).is_some_and(is_equal)
        };
        self.positions.get(&fingerprint)?.iter().copied().find(is_it)
    }
}

/// A number that is the same for equal expressions, and hardly for others.
unsafe fn fingerprint(expression: *mut pg_sys::Node) -> u64 {
    use pg_sys::NodeTag as T;
    let mut hasher = DefaultHasher::new();
    // SAFETY: the tag says what a node is. Only what equal() looks at is looked at.
    unsafe {
        any(expression, &mut |node| {
            ((*node).type_ as u32).hash(&mut hasher);
            match (*node).type_ {
                T::T_Var => {
                    let var = node.cast::<pg_sys::Var>();
                    ((*var).varno, (*var).varattno).hash(&mut hasher);
                }
                T::T_Param => (*node.cast::<pg_sys::Param>()).paramid.hash(&mut hasher),
                T::T_FuncExpr => (*node.cast::<pg_sys::FuncExpr>()).funcid.to_u32().hash(&mut hasher),
                T::T_OpExpr => (*node.cast::<pg_sys::OpExpr>()).opno.to_u32().hash(&mut hasher),
                T::T_Aggref => (*node.cast::<pg_sys::Aggref>()).aggfnoid.to_u32().hash(&mut hasher),
                T::T_Const if !(*node.cast::<pg_sys::Const>()).constisnull => {
                    let constant = node.cast::<pg_sys::Const>();
                    let value = (*constant).constvalue;
                    if (*constant).constbyval {
                        value.value().hash(&mut hasher);
                    } else if (*constant).constlen == -1 {
                        let size = pgrx::varsize_any(value.cast_mut_ptr());
                        std::slice::from_raw_parts(value.cast_mut_ptr::<u8>(), size).hash(&mut hasher);
                    }
                }
                _ => {}
            }
            false
        });
    }
    hasher.finish()
}

type Change<'a> = &'a mut dyn FnMut(*mut pg_sys::Node) -> Option<*mut pg_sys::Node>;

/// A copy of an expression, or of a list of them, in which what `change` gives is in the place of what it was given.
///
/// # Safety
/// As of `any()`.
pub unsafe fn mutate(node: *mut pg_sys::Node, mut change: Change<'_>) -> *mut pg_sys::Node {
    // SAFETY: the context is the visitor, which lives while the tree is walked.
    unsafe { mutate_below(node, (&raw mut change).cast()) }
}

#[pg_guard]
unsafe extern "C-unwind" fn mutate_below(node: *mut pg_sys::Node, context: *mut c_void) -> *mut pg_sys::Node {
    if node.is_null() {
        return null_mut();
    }
    // SAFETY: see mutate().
    unsafe {
        let change = &mut *context.cast::<Change<'_>>();
        if !is_list(node)
            && let Some(other) = change(node)
        {
            return other;
        }
        #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
        return pg_sys::expression_tree_mutator_impl(node, Some(mutate_below), context);
        #[cfg(feature = "pg15")]
        {
            // Declared without the arguments that it is called with.
            type Declared = unsafe extern "C-unwind" fn() -> *mut pg_sys::Node;
            type Actual = unsafe extern "C-unwind" fn(*mut pg_sys::Node, *mut c_void) -> *mut pg_sys::Node;
            let mutator = std::mem::transmute::<Actual, Declared>(mutate_below);
            pg_sys::expression_tree_mutator(node, Some(mutator), context)
        }
    }
}

/// The condition of `CASE value WHEN …` with the value written into it.
///
/// # Safety
/// As of `any()`.
pub unsafe fn replace_case_test(condition: *mut pg_sys::Node, value: *mut pg_sys::Node) -> *mut pg_sys::Node {
    if value.is_null() {
        return condition;
    }
    // SAFETY: as the caller says.
    unsafe {
        mutate(condition, &mut |node| match (*node).type_ {
            pg_sys::NodeTag::T_CaseTestExpr => Some(value),
            // Expressions within it stand for another value.
            pg_sys::NodeTag::T_CaseExpr | pg_sys::NodeTag::T_ArrayCoerceExpr => Some(node),
            _ => None,
        })
    }
}
