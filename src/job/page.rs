//! A page of claimed rows. Their keys stay in the server's own form, as one array for each column of the key; a row is
//! named by its position.

use std::collections::BTreeMap;
use std::ffi::CStr;

use pgrx::FromDatum;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;

use crate::error::Result;
use crate::text::Text;
use crate::{sql, txn};

/// An array value that outlives the transaction it was read in.
#[derive(Debug)]
struct KeptArray {
    value: pg_sys::Datum,
    type_oid: pg_sys::Oid,
}

impl KeptArray {
    /// Copies an array.
    ///
    /// # Safety
    /// `value` must be a varlena value of the array type `type_oid`.
    unsafe fn copy(value: pg_sys::Datum, type_oid: pg_sys::Oid) -> Self {
        // SAFETY: a flat copy is made in a context that lives as long as the process; freed in drop.
        unsafe {
            let before = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
            let copy = pg_sys::pg_detoast_datum_copy(value.cast_mut_ptr());
            pg_sys::MemoryContextSwitchTo(before);
            Self { value: pg_sys::Datum::from(copy), type_oid }
        }
    }
}

impl Drop for KeptArray {
    fn drop(&mut self) {
        // While a Postgres error unwinds nothing of Postgres is called; the process ends soon, or leaks one page.
        if !std::thread::panicking() {
            // SAFETY: allocated in copy() and referred to nowhere else.
            unsafe { pg_sys::pfree(self.value.cast_mut_ptr()) };
        }
    }
}

/// Claimed rows.
#[derive(Debug)]
pub struct Page {
    keys: Vec<KeptArray>,
    /// The hash of each row's input.
    pub hashes: Vec<i64>,
    /// Number of rows.
    pub len: usize,
}

impl Page {
    /// The keys as arguments of a statement, one array a column.
    pub fn args(&self) -> Vec<DatumWithOid<'_>> {
        self.keys
            .iter()
            // SAFETY: the value is an array of this type and lives as long as the page.
            .map(|k| unsafe { DatumWithOid::new(k.value, k.type_oid) })
            .collect()
    }

    /// The hash of a row's input, by its position.
    pub fn hash(&self, position: i32) -> i64 {
        self.hashes.get(position as usize - 1).copied().unwrap_or_default()
    }
}

/// A page with what is needed of it only once.
pub struct Claimed {
    pub page: Page,
    /// The text of each row.
    pub texts: Vec<Result<String>>,
    /// The isolation of each row.
    pub isolations: Vec<Option<String>>,
}

/// Under these settings keys are written as text: in one form, whatever the owner's role or the database sets.
const PLAIN: [(&CStr, &CStr); 7] = [
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"DateStyle", c"ISO, MDY"),
    (c"TimeZone", c"UTC"),
    (c"IntervalStyle", c"postgres"),
    (c"bytea_output", c"hex"),
    (c"extra_float_digits", c"1"),
    (c"lc_monetary", c"C"),
];

/// The keys of rows of a page as JSON, by position. It is never read: numbers stay what they are, to the last digit.
pub fn describe(query: &str, page: &Page, positions: Vec<i32>) -> Result<BTreeMap<i32, String>> {
    let mut args = page.args();
    args.push(positions.into());
    let keys =
        txn::with_settings(&PLAIN, || sql::rows(query, &args, |r| Ok((r.get::<i32>(1)?, r.get::<Text>(2)?.lossy()))))?;
    Ok(keys.into_iter().collect())
}

/// A hash of the key and the input of each of these rows of a page, by position: the same as long as both are.
pub fn digest(query: &str, page: &Page, positions: Vec<i32>) -> Result<Vec<(i32, i64)>> {
    let hashes: Vec<i64> = positions.iter().map(|position| page.hash(*position)).collect();
    let mut args = page.args();
    args.push(positions.into());
    args.push(hashes.into());
    txn::with_settings(&PLAIN, || sql::rows(query, &args, |r| Ok((r.get::<i32>(1)?, r.get::<i64>(2)?))))
}

/// Runs a claim: a statement whose single row holds an array for each column of the key, then the texts, their hashes
/// and what keeps the rows apart. `None` if it found no rows.
pub fn claim(query: &str, args: &[DatumWithOid<'_>], key_columns: usize) -> Result<Option<Claimed>> {
    Spi::connect(|client| {
        let table = sql::select(client, query, None, args)?;
        if table.is_empty() {
            return Ok(None);
        }
        let table = table.first();
        let mut keys = Vec::new();
        for column in 1..=key_columns {
            let Some(value) = table.get_datum_by_ordinal(column)? else { return Ok(None) };
            let type_oid = table.column_type_oid(column)?.value();
            // SAFETY: array_agg returns an array, of the type that the column says.
            keys.push(unsafe { KeptArray::copy(value, type_oid) });
        }
        let texts = table.get_datum_by_ordinal(key_columns + 1)?;
        // SAFETY: array_agg returns an array, here of texts.
        let texts =
            texts.and_then(|texts| unsafe { Vec::<Option<Text>>::from_datum(texts, false) }).unwrap_or_default();
        let hashes = table.get::<Vec<Option<i64>>>(key_columns + 2)?.unwrap_or_default();
        let isolations = table.get::<Vec<Option<String>>>(key_columns + 3)?.unwrap_or_default();
        let hashes: Vec<i64> = hashes.into_iter().map(Option::unwrap_or_default).collect();
        Ok(Some(Claimed {
            page: Page { keys, len: hashes.len(), hashes },
            texts: texts.into_iter().map(|text| text.map_or(Ok(String::new()), Text::checked)).collect(),
            isolations,
        }))
    })
}
