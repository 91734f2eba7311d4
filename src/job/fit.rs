//! Checks whether values fit their columns: some are refused by the types, as opposed to the table.

use std::ffi::{CStr, CString};

use llm_batch_core::vector;
use pgrx::pg_sys;

use crate::catalog;
use crate::checks::Refused;
use crate::error::{Result, is_passing};
use crate::job::target::{Cast, Target};
use crate::{sql, txn};

/// A column as values are converted for it.
#[derive(Debug, Clone)]
pub struct Column {
    /// The field that it takes, if that has a name.
    field: Option<String>,
    type_oid: pg_sys::Oid,
    typmod: i32,
    /// Its type, in words.
    of: String,
    /// The statement that makes of a text what is assigned to it.
    convert: String,
    is_of_vectors: bool,
}

impl Column {
    /// As it is now, on the main thread inside a transaction.
    pub fn new(relation: pg_sys::Oid, target: &Target, has_names: bool, cast: &Cast) -> Self {
        // SAFETY: catalog lookups on the main thread inside a transaction; the name is a C string, which is copied.
        let (typmod, of) = unsafe {
            let (mut of, mut typmod, mut collation) = (pg_sys::InvalidOid, -1, pg_sys::InvalidOid);
            pg_sys::get_atttypetypmodcoll(relation, target.attnum, &mut of, &mut typmod, &mut collation);
            let name = pg_sys::format_type_with_typemod(target.type_oid, typmod);
            (typmod, CStr::from_ptr(name).to_string_lossy().into_owned())
        };
        let field = target.field.clone().filter(|_| has_names);
        let convert = format!("SELECT ({})::pg_catalog.text", cast.of("$1"));
        Self { field, type_oid: target.type_oid, typmod, of, convert, is_of_vectors: cast.is_of_vectors }
    }

    /// Converts a value as its assignment does; raises what that raises.
    fn take(&self, value: &str) -> Result<()> {
        let converted = txn::sub(|| sql::one::<String>(&self.convert, &[value.into()]))?;
        match converted.and_then(|text| CString::new(text).ok()) {
            Some(text) => catalog::read_value(&text, self.type_oid, self.typmod),
            None => Ok(()),
        }
    }
}

/// The first of a row's values that its column's type does not take.
pub fn unfit(columns: &[Column], values: &[Option<String>]) -> Result<Option<Refused>> {
    for (column, value) in columns.iter().zip(values) {
        let Some(value) = value else { continue };
        match column.take(value) {
            Ok(()) => {}
            Err(e) if is_passing(e.code) => return Err(e),
            Err(e) => {
                let decimals = column.is_of_vectors.then(|| vector::to_json(value)).flatten();
                let value = decimals.as_deref().unwrap_or(value);
                return Ok(Some(Refused::bad_value(column.field.as_deref(), value, &column.of, &e)));
            }
        }
    }
    Ok(None)
}
