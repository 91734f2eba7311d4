//! The parts of a query that other roles wrote. A call in a policy or a view runs with the rights of the querying role, and
//! one in a cursor with those of the fetching role. So the `llm_batch.default_model` of that role would decide where texts of
//! the others go.
//! Before a query is planned, each such call is marked with its author: the owner of the view or of the policy's table, or
//! the SECURITY DEFINER function's whose cursor it is.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::null_mut;

use pgrx::prelude::*;

use super::nodes::{cast, list};
use crate::function::{source, verb};
use crate::process::current_user;
use pg_sys::NodeTag as T;

/// The position of an expression that comes out of the catalogs. One written in the query has its place there.
const STORED: i32 = -1;

/// Marks the calls of others. Returns true if policies hold for the query.
///
/// # Safety
/// The query is about to be planned: nobody else needs it as it is.
pub unsafe fn mark(query: *mut pg_sys::Query, is_cursor: bool) -> bool {
    // SAFETY: as the caller says; on the main thread.
    unsafe {
        let definer = (is_cursor && pg_sys::InLocalUserIdChange()).then(current_user);
        let walk = Walk { definer, ..Walk::default() };
        walk.query(query);
        walk.has_policies.get()
    }
}

/// The author of a call, if it is marked.
///
/// # Safety
/// `call` is a node or NULL.
pub unsafe fn author(call: *mut pg_sys::Node) -> Option<pg_sys::Oid> {
    // SAFETY: the caller's node is a node.
    let call = unsafe { cast::<pg_sys::FuncExpr>(call, T::T_FuncExpr)?.as_ref()? };
    // A position that is none: nobody shows it.
    (call.location < STORED).then(|| pg_sys::Oid::from((STORED - call.location) as u32))
}

#[derive(Default)]
struct Walk {
    /// Whose function opens the cursor.
    definer: Option<pg_sys::Oid>,
    /// The view, or the table with the policy, whose expressions are being looked at.
    relation: Cell<Option<pg_sys::Oid>>,
    /// The relation that the query changes.
    changed: Cell<Option<pg_sys::Oid>>,
    has_policies: Cell<bool>,
}

impl Walk {
    unsafe fn query(&self, query: *mut pg_sys::Query) {
        // SAFETY: a rewritten query; the walkers hand on what it consists of, and this, which lives meanwhile.
        unsafe {
            pg_sys::check_stack_depth();
            let query = &mut *query;
            let tables = list::<pg_sys::RangeTblEntry>(query.rtable);
            let outer = (self.relation.get(), self.changed.get());
            // Views that were changed through stay among the tables, the outermost first, and their conditions become the
            // query's.
            let is_view = |rte: &&*mut pg_sys::RangeTblEntry| {
                (***rte).rtekind == pg_sys::RTEKind::RTE_RELATION && (***rte).relkind as u8 == pg_sys::RELKIND_VIEW
            };
            let views: Vec<pg_sys::Oid> = tables.iter().filter(is_view).map(|rte| (**rte).relid).collect();
            if let Some(view) = views.last() {
                self.relation.set(Some(*view));
                if views.iter().any(|other| owner_of(*other) != owner_of(*view)) {
                    self.conditions(query, &tables, &views);
                    // Whose the rest is can't be told.
                    self.relation.set(Some(pg_sys::InvalidOid));
                }
            }
            let changed = usize::try_from(query.resultRelation - 1).ok().and_then(|at| tables.get(at));
            self.changed.set(changed.map(|rte| (**rte).relid));
            let here = self.relation.get();
            let has_more = self.definer.is_some()
                || here.is_some()
                || query.hasSubLinks
                || !query.cteList.is_null()
                || !query.withCheckOptions.is_null();
            let context = (&raw const *self).cast_mut().cast::<c_void>();
            if has_more {
                let flags = pg_sys::QTW_IGNORE_RANGE_TABLE as i32;
                pg_sys::query_tree_walker(query, Some(visit), context, flags);
            }
            for rte in tables {
                let table = &*rte;
                let has_policy = !table.securityQuals.is_null();
                let is_subquery = table.rtekind == pg_sys::RTEKind::RTE_SUBQUERY;
                if has_policy {
                    self.has_policies.set(true);
                }
                let is_others = has_policy || is_subquery && table.relkind as u8 == pg_sys::RELKIND_VIEW;
                self.relation.set(if is_others && table.relid != pg_sys::InvalidOid {
                    Some(table.relid)
                } else {
                    here
                });
                if has_more || has_policy || is_subquery {
                    pg_sys::range_table_entry_walker(rte, Some(visit), context, 0);
                }
            }
            self.relation.set(outer.0);
            self.changed.set(outer.1);
        }
    }

    /// Marks the conditions of views of several owners that a query changes through. Those of the outermost view were added
    /// first: to what the query asks for itself, which is not marked, or, of a security barrier, to those of the table.
    unsafe fn conditions(&self, query: &pg_sys::Query, tables: &[*mut pg_sys::RangeTblEntry], views: &[pg_sys::Oid]) {
        // SAFETY: see query(); views are relations that it has locked.
        unsafe {
            let views: Vec<(pg_sys::Oid, View)> = views.iter().map(|view| (*view, View::of(*view))).collect();
            // A column that asks a model may stand in any condition further out.
            if views.iter().any(|(_, view)| view.has_asking_column) {
                return;
            }
            let mark = |view: pg_sys::Oid, condition: *mut pg_sys::Node| {
                self.relation.set(Some(view));
                visit(condition, (&raw const *self).cast_mut().cast::<c_void>());
            };
            let target = usize::try_from(query.resultRelation - 1).ok().and_then(|at| tables.get(at));
            let mut barriers = target.map(|rte| list::<pg_sys::Node>((**rte).securityQuals)).unwrap_or_default();
            for (view, _) in views.iter().filter(|(_, view)| view.has_condition && view.is_barrier) {
                mark(*view, barriers.pop().unwrap_or(null_mut()));
            }
            let mut plain: Vec<pg_sys::Oid> = Vec::new();
            plain.extend(views.iter().filter(|(_, v)| v.has_condition && !v.is_barrier).map(|(view, _)| view));
            let mut conditions = query.jointree.as_ref().map_or(null_mut(), |from| from.quals);
            while let Some(view) = plain.pop() {
                let both = cast::<pg_sys::BoolExpr>(conditions, T::T_BoolExpr).map(|both| list((*both).args));
                match both.as_deref() {
                    Some([others, its_own]) if !plain.is_empty() => {
                        mark(view, *its_own);
                        conditions = *others;
                    }
                    _ => mark(view, conditions),
                }
            }
        }
    }

    unsafe fn mark(&self, call: *mut pg_sys::FuncExpr) {
        // SAFETY: a part of the query. Its position is used for nothing else.
        unsafe {
            let relation = self.relation.get().filter(|_| (*call).location == STORED);
            if (relation.is_some() || self.definer.is_some()) && asks_default_model((*call).funcid) {
                let author = relation.map_or(self.definer, owner_of);
                let number = author.and_then(|author| i32::try_from(author.to_u32()).ok());
                // Numbers that don't fit stand for nobody.
                (*call).location = number.map_or(i32::MIN, |number| STORED - number);
            }
        }
    }
}

/// Properties of a view's definition.
struct View {
    has_condition: bool,
    is_barrier: bool,
    has_asking_column: bool,
}

impl View {
    /// # Safety
    /// `view` is a view.
    unsafe fn of(view: pg_sys::Oid) -> Self {
        // SAFETY: its definition is looked at while it is open.
        unsafe {
            let relation = pg_sys::relation_open(view, pg_sys::AccessShareLock as i32);
            let query = &*pg_sys::get_view_query(relation);
            let mut has_asking_column = false;
            asks(query.targetList.cast(), (&raw mut has_asking_column).cast());
            let view = Self {
                has_condition: query.jointree.as_ref().is_some_and(|from| !from.quals.is_null()),
                is_barrier: (*relation)
                    .rd_options
                    .cast::<pg_sys::ViewOptions>()
                    .as_ref()
                    .is_some_and(|options| options.security_barrier),
                has_asking_column,
            };
            pg_sys::relation_close(relation, pg_sys::NoLock as i32);
            view
        }
    }
}

/// Sets the bool if a call in a node, or below it, asks the default model.
#[pg_guard]
unsafe extern "C-unwind" fn asks(node: *mut pg_sys::Node, found: *mut c_void) -> bool {
    // SAFETY: a node of a view's definition, or NULL; View::of() hands on its bool.
    unsafe {
        if let Some(query) = cast::<pg_sys::Query>(node, T::T_Query) {
            return pg_sys::query_tree_walker(query, Some(asks), found, 0);
        }
        if cast::<pg_sys::FuncExpr>(node, T::T_FuncExpr).is_some_and(|call| asks_default_model((*call).funcid)) {
            *found.cast::<bool>() = true;
            return true;
        }
        !node.is_null() && pg_sys::expression_tree_walker(node, Some(asks), found)
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn visit(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: see Walk::query(); the tag says what a node is.
    unsafe {
        let walk = &*context.cast::<Walk>();
        match (*node).type_ {
            T::T_Query => walk.query(node.cast()),
            T::T_WithCheckOption => {
                let before = walk.relation.get();
                if (*node.cast::<pg_sys::WithCheckOption>()).kind != pg_sys::WCOKind::WCO_VIEW_CHECK {
                    walk.relation.set(walk.changed.get());
                }
                pg_sys::expression_tree_walker(node, Some(visit), context);
                walk.relation.set(before);
            }
            kind => {
                if kind == T::T_FuncExpr {
                    walk.mark(node.cast());
                }
                pg_sys::expression_tree_walker(node, Some(visit), context);
            }
        }
    }
    false
}

fn asks_default_model(function: pg_sys::Oid) -> bool {
    match verb(function) {
        Some(verb) => !verb.names_task(),
        None => {
            function.to_u32() >= pg_sys::FirstNormalObjectId
                && source(function).is_some_and(|source| source == "llm_classify_batch_labels_wrapper")
        }
    }
}

fn owner_of(relation: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: a catalog lookup on the main thread inside a transaction; the tuple is released when its owner was copied.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::RELOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(relation));
        if tuple.is_null() {
            return None;
        }
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relowner;
        pg_sys::ReleaseSysCache(tuple);
        Some(owner)
    }
}
