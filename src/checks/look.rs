//! A look at an expression before anything is asked.

use std::ffi::{CString, c_void};

use pgrx::PgList;
use pgrx::pg_sys::NodeTag as T;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::expression;
use crate::function::verb;
use crate::sql;

/// Checks that `text` is one expression over a row of `source`, whose value is of the type or goes into it.
pub fn expression(key: &str, text: &str, source: &str, wanted: pg_sys::Oid) -> Result<()> {
    expression::check_alone(text, key, "Write it as in a select list, such as 'length(answer) < 400'.")?;
    let query = CString::new(format!("SELECT ({text}\n) FROM {source}"))
        .map_err(|_| Error::invalid(format!("option \"{key}\" contains a zero byte")))?;
    // SAFETY: parser and analysis run on the main thread inside a transaction; they raise on errors, and what they return
    // lives in the current memory context. A SELECT of one expression has one target.
    unsafe {
        let query = expression::analyze(&query)?;
        let wrong = |detail: &str| {
            Err(Error::new(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "the expression can't be evaluated for a row",
            )
            .detail(detail))
        };
        if (*query).hasAggs || (*query).hasWindowFuncs {
            return wrong("It has an aggregate or window function.");
        }
        if (*query).hasTargetSRFs {
            return wrong("It has a set-returning function.");
        }
        let mut calls = Vec::new();
        pg_sys::query_tree_walker(query, Some(collect), (&raw mut calls).cast(), 0);
        if calls.iter().any(|function| verb(*function).is_some()) {
            return wrong("It asks a model.");
        }
        check_paths(calls)?;
        let Some(target) = PgList::<pg_sys::TargetEntry>::from_pg((*query).targetList).get_ptr(0) else {
            return wrong("It has no value.");
        };
        let is = pg_sys::exprType((*target).expr.cast());
        let fits = is == wanted
            || (wanted != pg_sys::BOOLOID
                && pg_sys::can_coerce_type(1, &is, &wanted, pg_sys::CoercionContext::COERCION_ASSIGNMENT));
        if fits {
            return Ok(());
        }
        let name = |of| std::ffi::CStr::from_ptr(pg_sys::format_type_be(of)).to_string_lossy().into_owned();
        Err(Error::new(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            format!("the expression must be of type {}, not {}", name(wanted), name(is)),
        ))
    }
}

/// Refuses a function that means what its first caller in a session makes of it: PL/pgSQL resolves the names of types once,
/// by the search_path and the temporary types of the moment.
fn check_paths(calls: Vec<pg_sys::Oid>) -> Result<()> {
    let open = sql::one::<String>(
        "SELECT p.oid::pg_catalog.regprocedure::pg_catalog.text
           FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang
          WHERE p.oid OPERATOR(pg_catalog.=) ANY ($1) AND l.lanname OPERATOR(pg_catalog.<>) ALL ('{internal,c,sql}')
            AND pg_catalog.has_function_privilege('public', p.oid, 'EXECUTE')
            AND NOT EXISTS (SELECT FROM pg_catalog.unnest(p.proconfig) s (setting)
                             WHERE s.setting OPERATOR(pg_catalog.~) '^search_path=(([^\",]+|\"[^\",$]*\"), *)*\"?pg_temp\"?$'
                               AND s.setting OPERATOR(pg_catalog.!~) 'pg_temp.*pg_temp') LIMIT 1",
        &[calls.into()],
    )?;
    open.map_or(Ok(()), |function| {
        Err(Error::new(
            PgSqlErrorCode::ERRCODE_INVALID_FUNCTION_DEFINITION,
            format!("function {function} has no search_path of its own that ends in pg_temp"),
        )
        .detail("Whoever calls it first in a session decides what the names in it mean; later it runs with the rights of the task's owner.")
        .hint(format!(
            "Use ALTER FUNCTION {function} SET search_path = \u{2026}, pg_temp, without \"$user\", or REVOKE EXECUTE ON FUNCTION \
             {function} FROM PUBLIC."
        )))
    })
}

/// Collects the functions that are called in a node, or below it.
#[pg_guard]
unsafe extern "C-unwind" fn collect(node: *mut pg_sys::Node, calls: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: a node of a query; expression() hands on its list.
    unsafe {
        if (*node).type_ == T::T_Query {
            return pg_sys::query_tree_walker(node.cast(), Some(collect), calls, 0);
        }
        pg_sys::check_functions_in_node(node, Some(note), calls);
        pg_sys::expression_tree_walker(node, Some(collect), calls)
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn note(function: pg_sys::Oid, calls: *mut c_void) -> bool {
    // SAFETY: expression()'s list.
    unsafe { (*calls.cast::<Vec<pg_sys::Oid>>()).push(function) };
    false
}
