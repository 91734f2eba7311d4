//! JSON as an argument, and as what a function returns. What is valid jsonb may be more than can be read: numbers beyond all bounds, arrays in arrays
//! without end, bytes that are no text.

use std::ffi::{CStr, CString};

use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use pgrx::{FromDatum, direct_function_call, direct_function_call_as_datum};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::text::Text;

/// A jsonb that somebody has given.
#[derive(Debug)]
pub struct Json(pub Value);

fn read(text: &CStr) -> Result<Value> {
    let text = Text::new(text.to_bytes().to_vec()).checked()?;
    serde_json::from_str(&text).map_err(|e| {
        // The position in the text says nothing: the text is Postgres' own.
        let what = e.to_string();
        let what = what.split(" at line ").next().unwrap_or_default();
        Error::invalid(format!("a JSON argument can't be used: {what}"))
            .hint("In options, labels and parameters, numbers are in the range of double precision, and values nested less than 128 deep.")
    })
}

impl FromDatum for Json {
    unsafe fn from_polymorphic_datum(datum: pg_sys::Datum, is_null: bool, _oid: pg_sys::Oid) -> Option<Self> {
        if is_null {
            return None;
        }
        // SAFETY: the caller's datum is a jsonb, which is not NULL; on the main thread.
        let text = unsafe { direct_function_call::<&CStr>(pg_sys::jsonb_out, &[Some(datum)]) }?;
        match read(text) {
            Ok(value) => Some(Self(value)),
            Err(e) => {
                ErrorReport::from(e).report(PgLogLevel::ERROR);
                None
            }
        }
    }
}

// SAFETY: the declarations in sql/ say that the argument is a jsonb.
unsafe impl<'fcx> ArgAbi<'fcx> for Json {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: as of the trait: not NULL.
        unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or(Self(Value::Null))
    }
}

// SAFETY: says what SQL calls the type.
unsafe impl SqlTranslatable for Json {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Json);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: std::result::Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: std::result::Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}

/// The text of a jsonb that a function returns: numbers keep their digits.
#[derive(Debug)]
pub struct JsonText(pub String);

// SAFETY: the datum is a jsonb, as the declarations in sql/ say of functions that return it.
unsafe impl BoxRet for JsonText {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        let Ok(text) = CString::new(self.0) else { return fcinfo.return_null() };
        // SAFETY: a text that ends with a NUL, on the main thread; it may raise.
        let jsonb =
            unsafe { direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(pg_sys::Datum::from(text.as_ptr()))]) };
        match jsonb {
            // SAFETY: the datum was made just now in the memory context that the function was called in.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}

// SAFETY: says what SQL calls the type.
unsafe impl SqlTranslatable for JsonText {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(JsonText);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: std::result::Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: std::result::Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}
