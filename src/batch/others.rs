//! The parts of a query that other roles wrote. A call in a policy or a view runs with the rights of the querying role, and
//! one in a cursor with those of the fetching role. So the `llm_batch.default_model` of that role would decide where texts of
//! the others go.
//! Before a query is planned, each such call is marked with its author: the owner of the view or of the policy's table, or
//! the SECURITY DEFINER function's whose cursor it is.

use std::cell::Cell;
use std::ffi::c_void;

use pgrx::prelude::*;

use super::calls::{source, verb};
use super::nodes::{cast, list};
use crate::process::current_user;
use pg_sys::NodeTag as T;

/// What is written in a query has its position there; what comes out of the catalogs has none.
const STORED: i32 = -1;

/// Marks the calls of others. Whether policies hold for the query.
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
    /// What the query at hand changes.
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
            let is_view = |rte: &*mut pg_sys::RangeTblEntry| {
                (**rte).rtekind == pg_sys::RTEKind::RTE_RELATION && (**rte).relkind as u8 == pg_sys::RELKIND_VIEW
            };
            // A view that was changed through stays among the tables, and its conditions become the query's.
            if let Some(view) = tables.iter().rev().find(|rte| is_view(rte)) {
                self.relation.set(Some((**view).relid));
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
