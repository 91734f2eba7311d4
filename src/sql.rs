//! Statements through SPI.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::PgOid;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, Result as SpiResult, SpiClient, SpiHeapTupleData, SpiTupleTable};
use pgrx::{FromDatum, IntoDatum};

use crate::changes;
use crate::error::{Error, Result};

/// Plans by the text of their statement and the types of its arguments: a key's type may change while a job runs.
#[derive(Default)]
struct Plans {
    known: HashMap<(String, Vec<pg_sys::Oid>), Rc<OwnedPreparedStatement>>,
    /// Of which state of the roles they are.
    roles: u32,
}

thread_local! {
    static PLANS: RefCell<Option<Plans>> = const { RefCell::new(None) };
}

/// From now on plans are kept until the process ends: for a job's worker, which runs the same few statements for every
/// request. Postgres plans anew what a change of tables or the search_path makes invalid, but not where a policy holds for
/// the user no longer, or anew, because roles were changed.
pub fn keep_plans() {
    PLANS.set(Some(Plans { roles: changes::of_roles(), ..Plans::default() }));
}

/// The plan of a statement, if plans are kept.
fn plan(client: &SpiClient<'_>, query: &str, args: &[DatumWithOid<'_>]) -> Result<Option<Rc<OwnedPreparedStatement>>> {
    if PLANS.with_borrow(Option::is_none) {
        return Ok(None);
    }
    if PLANS.with_borrow(|plans| plans.as_ref().is_some_and(|p| p.roles != changes::of_roles())) {
        keep_plans();
    }
    let key = (query.to_owned(), args.iter().map(DatumWithOid::oid).collect::<Vec<_>>());
    let known = PLANS.with_borrow(|plans| plans.as_ref().and_then(|p| p.known.get(&key).cloned()));
    if known.is_some() {
        return Ok(known);
    }
    let types: Vec<PgOid> = key.1.iter().map(|oid| PgOid::from(*oid)).collect();
    let plan = Rc::new(client.prepare_mut(query, &types)?.keep());
    PLANS.with_borrow_mut(|plans| plans.as_mut().map(|p| p.known.insert(key, Rc::clone(&plan))));
    Ok(Some(plan))
}

/// Runs a query that changes nothing.
pub fn select<'c>(
    client: &SpiClient<'c>,
    query: &str,
    limit: Option<i64>,
    args: &[DatumWithOid<'_>],
) -> Result<SpiTupleTable<'c>> {
    match plan(client, query, args)? {
        Some(plan) => Ok(client.select(&*plan, limit, args)?),
        None => Ok(client.select(query, limit, args)?),
    }
}

fn update<'c>(
    client: &mut SpiClient<'c>,
    query: &str,
    limit: Option<i64>,
    args: &[DatumWithOid<'_>],
) -> Result<SpiTupleTable<'c>> {
    match plan(client, query, args)? {
        Some(plan) => Ok(client.update(&*plan, limit, args)?),
        None => Ok(client.update(query, limit, args)?),
    }
}

/// Runs a statement; the number of rows it returned or changed.
pub fn run(query: &str, args: &[DatumWithOid<'_>]) -> Result<usize> {
    Spi::connect_mut(|client| Ok(update(client, query, None, args)?.len()))
}

/// The first column of the first row of a query that changes nothing; `None` if there is no row or it is NULL. Takes no
/// transaction id, so that it may run beside parallel workers.
pub fn one<T: FromDatum + IntoDatum>(query: &str, args: &[DatumWithOid<'_>]) -> Result<Option<T>> {
    Spi::connect(|client| {
        let rows = select(client, query, Some(1), args)?;
        if rows.is_empty() { Ok(None) } else { Ok(rows.first().get_one()?) }
    })
}

/// The same for a statement that locks or changes something.
pub fn one_mut<T: FromDatum + IntoDatum>(query: &str, args: &[DatumWithOid<'_>]) -> Result<Option<T>> {
    Spi::connect_mut(|client| {
        let rows = update(client, query, Some(1), args)?;
        if rows.is_empty() { Ok(None) } else { Ok(rows.first().get_one()?) }
    })
}

/// Sets a parameter until the end of the transaction.
pub fn set_local(name: &str, value: &str) -> Result<()> {
    let c_string = |text: &str| {
        std::ffi::CString::new(text).map_err(|_| Error::invalid("the value of a parameter cannot contain a zero byte"))
    };
    let (name, value) = (c_string(name)?, c_string(value)?);
    // SAFETY: on the main thread inside a transaction; both strings are copied.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
    Ok(())
}

/// Every row of a query that changes nothing, read by `f`.
pub fn rows<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect(|client| select(client, query, None, args)?.map(|row| f(&Row(row))).collect())
}

/// The same for a statement that locks or changes something.
pub fn rows_mut<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect_mut(|client| update(client, query, None, args)?.map(|row| f(&Row(row))).collect())
}

/// The first row, read by `f`.
pub fn row<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Option<T>> {
    Ok(rows(query, args, f)?.into_iter().next())
}

/// A column of a result: by its name or, where there are but a few, by its number from 1.
pub trait Column: Copy + std::fmt::Display {
    fn read<T: FromDatum + IntoDatum>(self, row: &SpiHeapTupleData<'_>) -> SpiResult<Option<T>>;
}

impl Column for usize {
    fn read<T: FromDatum + IntoDatum>(self, row: &SpiHeapTupleData<'_>) -> SpiResult<Option<T>> {
        row.get(self)
    }
}

impl Column for &str {
    fn read<T: FromDatum + IntoDatum>(self, row: &SpiHeapTupleData<'_>) -> SpiResult<Option<T>> {
        row.get_by_name(self)
    }
}

/// A row of a result.
pub struct Row<'a>(SpiHeapTupleData<'a>);

impl Row<'_> {
    /// A column that may be NULL.
    pub fn maybe<T: FromDatum + IntoDatum>(&self, column: impl Column) -> Result<Option<T>> {
        Ok(column.read(&self.0)?)
    }

    /// A column that is not NULL.
    pub fn get<T: FromDatum + IntoDatum>(&self, column: impl Column) -> Result<T> {
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
