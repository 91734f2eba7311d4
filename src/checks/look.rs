//! A look at an expression before anything is asked.

use std::ffi::{CString, c_void};

use pgrx::PgList;
use pgrx::pg_sys::NodeTag as T;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::expression;
use crate::function::verb;

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
        let mut found = false;
        if pg_sys::query_tree_walker(query, Some(asks), (&raw mut found).cast(), 0) || found {
            return wrong("It asks a model.");
        }
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

/// Sets the bool if a function of ours that asks a model stands in a node, or below it.
#[pg_guard]
unsafe extern "C-unwind" fn asks(node: *mut pg_sys::Node, found: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: a node of a query; expression() hands on its bool.
    unsafe {
        if (*node).type_ == T::T_Query {
            return pg_sys::query_tree_walker(node.cast(), Some(asks), found, 0);
        }
        if (*node).type_ == T::T_FuncExpr && verb((*node.cast::<pg_sys::FuncExpr>()).funcid).is_some() {
            *found.cast::<bool>() = true;
            return true;
        }
        pg_sys::expression_tree_walker(node, Some(asks), found)
    }
}
