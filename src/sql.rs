//! Statements through SPI.

use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::SpiHeapTupleData;
use pgrx::{FromDatum, IntoDatum};

use crate::error::{Error, Result};

/// Runs a statement; the number of rows it returned or changed.
pub fn run(query: &str, args: &[DatumWithOid<'_>]) -> Result<usize> {
    Spi::connect_mut(|client| Ok(client.update(query, None, args)?.len()))
}

/// The first column of the first row of a query that changes nothing; `None` if there is no row or it is NULL. Takes no
/// transaction id, so that it may run beside parallel workers.
pub fn one<T: FromDatum + IntoDatum>(query: &str, args: &[DatumWithOid<'_>]) -> Result<Option<T>> {
    Spi::connect(|client| {
        let rows = client.select(query, Some(1), args)?;
        if rows.is_empty() { Ok(None) } else { Ok(rows.first().get_one()?) }
    })
}

/// The same for a statement that locks or changes something.
pub fn one_mut<T: FromDatum + IntoDatum>(query: &str, args: &[DatumWithOid<'_>]) -> Result<Option<T>> {
    Spi::connect_mut(|client| {
        let rows = client.update(query, Some(1), args)?;
        if rows.is_empty() { Ok(None) } else { Ok(rows.first().get_one()?) }
    })
}

/// Sets a parameter until the end of the transaction.
pub fn set_local(name: &str, value: &str) -> Result<()> {
    one::<String>("SELECT pg_catalog.set_config($1, $2, true)", &[name.into(), value.into()]).map(|_| ())
}

/// Every row of a query that changes nothing, read by `f`.
pub fn rows<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect(|client| client.select(query, None, args)?.map(|row| f(&Row(row))).collect())
}

/// The same for a statement that locks or changes something.
pub fn rows_mut<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect_mut(|client| client.update(query, None, args)?.map(|row| f(&Row(row))).collect())
}

/// The first row, read by `f`.
pub fn row<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Option<T>> {
    Ok(rows(query, args, f)?.into_iter().next())
}

/// A row of a result; columns are numbered from 1.
pub struct Row<'a>(SpiHeapTupleData<'a>);

impl Row<'_> {
    /// A column that may be NULL.
    pub fn maybe<T: FromDatum + IntoDatum>(&self, column: usize) -> Result<Option<T>> {
        Ok(self.0.get(column)?)
    }

    /// A column that is not NULL.
    pub fn get<T: FromDatum + IntoDatum>(&self, column: usize) -> Result<T> {
        self.maybe(column)?.ok_or_else(|| {
            Error::new(
                PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
                format!("column {column} of a catalog query is NULL"),
            )
        })
    }
}

/// Quotes a name.
pub fn name(name: &str) -> String {
    pgrx::spi::quote_identifier(name)
}

/// The element of a list of pointers.
///
/// # Safety
/// `list` must be a list of pointers with more than `n` elements.
pub unsafe fn list_nth(list: *mut pg_sys::List, n: usize) -> *mut std::ffi::c_void {
    // SAFETY: as the caller promises.
    unsafe { (*(*list).elements.add(n)).ptr_value }
}
