//! The types of a task's fields in SQL.

use llm_batch_core::task::Type;
use pgrx::prelude::*;

/// Labels have no type of their own.
pub fn type_oid(of: Type) -> Option<pg_sys::Oid> {
    Some(match of {
        Type::Labels => return None,
        Type::Text => pg_sys::TEXTOID,
        Type::Integer => pg_sys::INT4OID,
        Type::Bigint => pg_sys::INT8OID,
        Type::Numeric => pg_sys::NUMERICOID,
        Type::Real => pg_sys::FLOAT4OID,
        Type::Boolean => pg_sys::BOOLOID,
        Type::Date => pg_sys::DATEOID,
        Type::Timestamptz => pg_sys::TIMESTAMPTZOID,
        Type::Jsonb => pg_sys::JSONBOID,
    })
}

/// The type of a field's values as SQL writes it; labels are texts.
pub fn sql_type(of: Type, is_array: bool) -> String {
    let name = match of {
        Type::Labels => "text",
        Type::Integer => "int4",
        Type::Bigint => "int8",
        Type::Real => "float4",
        Type::Boolean => "bool",
        of => of.name(),
    };
    format!("pg_catalog.{name}{}", if is_array { "[]" } else { "" })
}
