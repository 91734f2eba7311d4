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

/// Most plans that a process keeps. A job's worker has some forty statements, a session ten.
const MOST_PLANS: usize = 100;

/// A statement's text, the types of its arguments (a key's type may change while a job runs), and whether it may lock or
/// change rows.
type Statement = (String, Vec<pg_sys::Oid>, bool);

/// Plans that are kept until the process ends: a session asks the same few questions of our tables for each of its queries, a
/// worker for each request. Postgres plans anew what a change of tables or the search_path makes invalid, but not where a
/// policy holds for the user no longer, or anew, because roles were changed.
#[derive(Default)]
struct Plans {
    known: HashMap<Statement, Rc<OwnedPreparedStatement>>,
    /// The state of the roles for which they were made.
    roles: u32,
}

thread_local! {
    static PLANS: RefCell<Plans> = RefCell::default();
}

/// The plan of a statement.
fn plan(
    query: &str,
    args: &[DatumWithOid<'_>],
    may_change: bool,
    prepare: impl FnOnce(&[PgOid]) -> SpiResult<OwnedPreparedStatement>,
) -> Result<Rc<OwnedPreparedStatement>> {
    let roles = changes::of_roles();
    let statement = (query.to_owned(), args.iter().map(DatumWithOid::oid).collect::<Vec<_>>(), may_change);
    let known = PLANS.with_borrow_mut(|plans| {
        if plans.roles != roles {
            *plans = Plans { roles, ..Plans::default() };
        }
        plans.known.get(&statement).cloned()
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let types: Vec<PgOid> = statement.1.iter().map(|oid| PgOid::from(*oid)).collect();
    let plan = Rc::new(prepare(&types)?);
    PLANS.with_borrow_mut(|plans| {
        if plans.known.len() >= MOST_PLANS {
            plans.known.clear();
        }
        plans.known.insert(statement, Rc::clone(&plan));
    });
    Ok(plan)
}

/// Runs a query that changes nothing.
pub fn select<'c>(
    client: &SpiClient<'c>,
    query: &str,
    limit: Option<i64>,
    args: &[DatumWithOid<'_>],
) -> Result<SpiTupleTable<'c>> {
    let plan = plan(query, args, false, |types| Ok(client.prepare(query, types)?.keep()))?;
    Ok(client.select(&*plan, limit, args)?)
}

fn update<'c>(
    client: &mut SpiClient<'c>,
    query: &str,
    limit: Option<i64>,
    args: &[DatumWithOid<'_>],
) -> Result<SpiTupleTable<'c>> {
    let plan = plan(query, args, true, |types| Ok(client.prepare_mut(query, types)?.keep()))?;
    Ok(client.update(&*plan, limit, args)?)
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

/// Every row of a query whose text does not recur, read by `f`: no plan is kept, and parallel workers may run it.
pub fn rows_once<T>(query: &str, args: &[DatumWithOid<'_>], f: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect(|client| client.select(query, None, args)?.map(|row| f(&Row(row))).collect())
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
