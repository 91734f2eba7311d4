//! Expressions of users: whether a job may evaluate them, and what they read.

use std::ffi::{CStr, CString};

use pgrx::PgList;
use pgrx::prelude::*;

use crate::catalog::Target;
use crate::error::{Error, Result};

/// The use of an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Input,
    Filter,
    Isolation,
}

/// Checks that `text` is one scalar expression over the rows of a table, and that a job may evaluate it: on each claim,
/// and again when the answer has come.
pub fn check_expression(target: &Target, text: &str, usage: Use) -> Result<()> {
    let what = match usage {
        Use::Input => "input",
        Use::Filter => "filter",
        Use::Isolation => "isolation",
    };
    check_alone(text, what, "Write it as in a select list, such as 'body' or 'coalesce(title, '''') || body'.")?;
    // SAFETY: parser and analysis run on the main thread inside a transaction; they raise on errors, and what they
    // return lives in the current memory context.
    unsafe {
        let query = match usage {
            Use::Input | Use::Isolation => format!("SELECT ({text}\n)::pg_catalog.text FROM ONLY {}", target.name),
            Use::Filter => format!("SELECT 1 FROM ONLY {} WHERE ({text}\n)", target.name),
        };
        let query = CString::new(query).map_err(|_| Error::invalid("an expression contains a zero byte"))?;
        let analyzed = analyze(&query)?;
        let volatile = match usage {
            Use::Isolation => "a row's value must be the same each time.",
            _ => "when the answer comes, the input is computed again to see whether it has changed.",
        };
        let wrong = if (*analyzed).hasAggs || (*analyzed).hasWindowFuncs {
            "It has an aggregate or window function.".to_owned()
        } else if (*analyzed).hasTargetSRFs {
            "It has a set-returning function.".to_owned()
        } else if pg_sys::contain_volatile_functions(analyzed.cast()) {
            format!("It has a volatile function: {volatile}")
        } else if let Some(view) = volatile_view(analyzed) {
            format!("It reads the view {view}, which has a volatile function: {volatile}")
        } else if reads_system_column(analyzed) {
            "It reads a system column, such as ctid: what that holds changes without the row.".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::new(PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, format!("{what} can't be evaluated by a job"))
            .detail(wrong)
            .hint("Write it with the columns of the row, and with functions that are stable or immutable."))
    }
}

/// Checks that `text` is one scalar expression, by its form.
pub fn check_alone(text: &str, what: &str, hint: &str) -> Result<()> {
    let not_one = |detail: &str| {
        Error::new(PgSqlErrorCode::ERRCODE_SYNTAX_ERROR, format!("{what} must be one expression over the row"))
            .detail(detail)
            .hint(hint)
    };
    // As it stands it must be one column of a select list; and in parentheses too, so that a parenthesis too many can't
    // lead into other clauses, and no alias follows.
    for alone in [format!("SELECT {text}\n"), format!("SELECT ({text}\n)")] {
        let alone = CString::new(alone).map_err(|_| not_one("It contains a zero byte."))?;
        // SAFETY: raw_parser runs on the main thread; it raises on bad syntax.
        let is_one = unsafe { parse(&alone).is_some_and(|raw| is_one_expression(raw)) };
        if !is_one {
            return Err(not_one("It contains other clauses, or more than one expression."));
        }
    }
    Ok(())
}

/// The analysis of one statement without parameters.
///
/// # Safety
/// On the main thread inside a transaction; raises on errors.
pub unsafe fn analyze(query: &CStr) -> Result<*mut pg_sys::Query> {
    // SAFETY: as the caller says; what comes back lives in the current memory context.
    unsafe {
        let raw = parse(query).ok_or_else(|| Error::invalid("an expression contains more than one statement"))?;
        Ok(pg_sys::parse_analyze_fixedparams(raw, query.as_ptr(), std::ptr::null(), 0, std::ptr::null_mut()))
    }
}

/// A view that a query reads, itself or through other views, and that has a volatile function.
///
/// # Safety
/// `query` must come from parse analysis, in this transaction.
unsafe fn volatile_view(query: *mut pg_sys::Query) -> Option<String> {
    // SAFETY: what a query reads was locked by its analysis, and what a view reads is locked here; a view that is open
    // has a query, which is copied as it may go when the view is closed.
    unsafe {
        let mut todo = relations(query);
        let mut next = 0;
        while let Some(oid) = todo.get(next).copied() {
            next += 1;
            if pg_sys::get_rel_relkind(oid) as u8 != pg_sys::RELKIND_VIEW {
                continue;
            }
            let view = pg_sys::relation_open(oid, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
            let query = pg_sys::copyObjectImpl(pg_sys::get_view_query(view).cast()).cast::<pg_sys::Query>();
            pg_sys::relation_close(view, pg_sys::NoLock as pg_sys::LOCKMODE);
            if pg_sys::contain_volatile_functions(query.cast()) {
                let name = pg_sys::get_rel_name(oid);
                let name = if name.is_null() { c"" } else { CStr::from_ptr(name) };
                return Some(format!("\"{}\"", name.to_string_lossy()));
            }
            for more in relations(query) {
                if !todo.contains(&more) {
                    todo.push(more);
                }
            }
        }
    }
    None
}

/// The relations that stand in a query and its subqueries.
///
/// # Safety
/// `query` must be a query.
unsafe fn relations(query: *mut pg_sys::Query) -> Vec<pg_sys::Oid> {
    let (mut oids, mut items, mut has_policies) = (std::ptr::null_mut(), std::ptr::null_mut(), false);
    // SAFETY: as the caller says; what comes back is a list of OIDs, or NIL.
    unsafe {
        pg_sys::extract_query_dependencies(query.cast(), &mut oids, &mut items, &mut has_policies);
        PgList::<pg_sys::Oid>::from_pg(oids).iter_oid().collect()
    }
}

/// All relations that decide which rows a statement reads: its own, and those of views and of policies.
pub fn read_by(statement: &str, types: &[pg_sys::Oid]) -> Result<Vec<pg_sys::Oid>> {
    let text = CString::new(statement).map_err(|_| Error::invalid("a statement can't have a zero byte"))?;
    let mut all = Vec::new();
    // SAFETY: parser, analysis and rewriter run on the main thread inside a transaction with a snapshot; they raise on
    // errors, and what they return lives in the current memory context.
    unsafe {
        let raw = parse(&text).ok_or_else(|| Error::invalid("a text is not one statement"))?;
        let query = pg_sys::parse_analyze_fixedparams(
            raw,
            text.as_ptr(),
            types.as_ptr(),
            types.len() as i32,
            std::ptr::null_mut(),
        );
        let rewritten = PgList::<pg_sys::Query>::from_pg(pg_sys::QueryRewrite(query));
        for query in rewritten.iter_ptr() {
            all.extend(relations(query));
        }
    }
    all.sort_unstable_by_key(|oid| oid.to_u32());
    all.dedup();
    Ok(all)
}

/// Returns true if a query reads a system column of the table that stands first in it.
///
/// # Safety
/// `query` must come from parse analysis.
unsafe fn reads_system_column(query: *mut pg_sys::Query) -> bool {
    // SAFETY: the lists of a query hold what their names say; the analysis has noted the columns that are read of each
    // relation, wherever that is done, counted from the lowest system column.
    unsafe {
        let Some(entry) = PgList::<pg_sys::RangeTblEntry>::from_pg((*query).rtable).get_ptr(0) else {
            return false;
        };
        #[cfg(feature = "pg15")]
        let columns = (*entry).selectedCols;
        #[cfg(not(feature = "pg15"))]
        let columns = {
            let infos = PgList::<pg_sys::RTEPermissionInfo>::from_pg((*query).rteperminfos);
            match infos.get_ptr(((*entry).perminfoindex as usize).wrapping_sub(1)) {
                Some(info) => (*info).selectedCols,
                None => return false,
            }
        };
        let lowest = pg_sys::bms_next_member(columns, -1);
        lowest >= 0 && lowest + pg_sys::FirstLowInvalidHeapAttributeNumber < 0
    }
}

/// The statement of a text, if it has exactly one. Raises on bad syntax.
///
/// # Safety
/// On the main thread.
unsafe fn parse(text: &CStr) -> Option<*mut pg_sys::RawStmt> {
    // SAFETY: as the caller says; what the parser gives is a list of RawStmt, or NIL.
    unsafe {
        let statements = pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        let statements = PgList::<pg_sys::RawStmt>::from_pg(statements);
        statements.head().filter(|_| statements.len() == 1)
    }
}

/// Returns true if a statement is a bare `SELECT expression`.
///
/// # Safety
/// `raw` must come from `parse()`.
unsafe fn is_one_expression(raw: *mut pg_sys::RawStmt) -> bool {
    // SAFETY: as the caller says; node tags are checked before casts.
    unsafe {
        let node = (*raw).stmt;
        if (*node).type_ != pg_sys::NodeTag::T_SelectStmt {
            return false;
        }
        let s = &*node.cast::<pg_sys::SelectStmt>();
        s.distinctClause.is_null()
            && s.intoClause.is_null()
            && PgList::<pg_sys::ResTarget>::from_pg(s.targetList).len() == 1
            && s.fromClause.is_null()
            && s.whereClause.is_null()
            && s.groupClause.is_null()
            && s.havingClause.is_null()
            && s.windowClause.is_null()
            && s.valuesLists.is_null()
            && s.sortClause.is_null()
            && s.limitCount.is_null()
            && s.limitOffset.is_null()
            && s.lockingClause.is_null()
            && s.withClause.is_null()
            && s.op == pg_sys::SetOperation::SETOP_NONE
    }
}
