//! The columns that a job fills: which field of an answer goes into each, and in which form.

use llm_batch_core::task::{Answer, Column as Field, Spec, array_literal};
use llm_batch_core::vector;
use pgrx::prelude::*;

use crate::catalog::{self, Column, is_json};
use crate::error::{Error, Result};
use crate::field::{sql_type, type_oid};
use crate::sql;

/// A column that a job fills.
#[derive(Debug, Clone)]
pub struct Target {
    pub name: String,
    pub attnum: i16,
    pub type_oid: pg_sys::Oid,
    /// `None`: the whole answer.
    pub field: Option<String>,
    form: Form,
}

/// The form in which a column takes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Text,
    Json,
    Array,
    ArrayOfText,
}

impl Form {
    fn of(type_oid: pg_sys::Oid) -> Self {
        // The type may be gone, or none that a restored table has: what then, is told where the table is looked at.
        // SAFETY: a catalog lookup on the main thread inside a transaction.
        if unsafe { pg_sys::get_typtype(type_oid) } == 0 {
            return Self::Plain;
        }
        if is_json(type_oid) {
            return Self::Json;
        }
        // SAFETY: as above.
        let is_text = |of| is_text(unsafe { pg_sys::getBaseType(of) });
        match element(type_oid) {
            Some(of) if is_text(of) => Self::ArrayOfText,
            Some(_) => Self::Array,
            None if is_text(type_oid) => Self::Text,
            None => Self::Plain,
        }
    }

    fn is_array(self) -> bool {
        matches!(self, Self::Array | Self::ArrayOfText)
    }
}

/// The conversion of values, which are texts, to what is assigned to a column.
#[derive(Debug, Clone)]
pub struct Cast {
    /// They are vectors in base64: no text of numbers is written and read for a row.
    pub is_of_vectors: bool,
    /// The types, one after the other.
    types: String,
}

impl Cast {
    /// The conversion of an expression.
    pub fn of(&self, value: &str) -> String {
        let Self { is_of_vectors, types } = self;
        if *is_of_vectors { format!("llm_batch.vector_numbers({value}){types}") } else { format!("({value}){types}") }
    }
}

impl Target {
    /// As the catalogs know it now, on the main thread inside a transaction.
    pub fn new(name: String, attnum: i16, type_oid: pg_sys::Oid, field: Option<String>) -> Self {
        Self { name, attnum, type_oid, field, form: Form::of(type_oid) }
    }

    /// The part of an answer that goes into the column, as its type reads it.
    pub fn value(&self, spec: &Spec, fields: &[Field], answer: &Answer) -> Option<String> {
        let Some(name) = &self.field else { return Some(spec.to_json(answer)) };
        let at = fields.iter().position(|f| f.name == *name)?;
        let (field, text) = (fields.get(at)?, answer.0.get(at)?.as_deref()?);
        match self.form {
            Form::Json => Some(field.json(Some(text))),
            // What a repair has made of it may be no vector: the column's type says so.
            _ if self.takes_vectors(spec) => Some(vector::from_json(text).unwrap_or_else(|| text.to_owned())),
            _ if spec.embeds().is_some() && self.form == Form::Text => Some(field.json(Some(text))),
            form if form.is_array() && field.is_array => array_literal(text),
            _ => Some(text.to_owned()),
        }
    }

    /// Returns true if its values are vectors that are converted from their bytes. In a text they are read as decimals.
    fn takes_vectors(&self, spec: &Spec) -> bool {
        spec.embeds().is_some() && matches!(self.form, Form::Plain | Form::Array)
    }

    /// The field of a task that fills the column; an error if the task has none of this name, or not any more.
    fn field<'a>(&self, fields: &'a [Field]) -> Result<Option<&'a Field>> {
        let Some(name) = &self.field else { return Ok(None) };
        fields.iter().find(|f| f.name == *name).map(Some).ok_or_else(|| unknown(name, fields))
    }
}

/// The fields of which there is no value.
pub fn nulls<'a>(targets: &'a [Target], values: &[Option<String>]) -> Vec<&'a str> {
    let is_null = targets.iter().zip(values).filter(|(_, value)| value.is_none());
    is_null.filter_map(|(target, _)| target.field.as_deref()).collect()
}

fn unknown(name: &str, fields: &[Field]) -> Error {
    let names: Vec<&str> = fields.iter().map(|f| f.name.as_str()).collect();
    Error::new(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, format!("field \"{name}\" does not exist"))
        .hint(format!("Valid fields are: {}.", names.join(", ")))
}

/// The field that each of these columns takes: that which is given for it, or the task's only one. A column alone takes
/// all fields, as an object; of json or jsonb also where there is one field with a name.
pub fn fields(given: &[(String, Option<String>)], columns: &[Column], spec: &Spec) -> Result<Vec<Option<String>>> {
    let fields = spec.columns();
    let only = |field: &Field| Some(field.name.clone());
    let takes_all = |name: &str| {
        let is_json = columns.iter().find(|c| c.name == name).is_some_and(|c| is_json(c.type_oid));
        fields.len() > 1 || (is_json && spec.has_names())
    };
    let field = |(column, name): &(String, Option<String>)| match name {
        Some(name) if fields.iter().any(|f| f.name == *name) => Ok(Some(name.clone())),
        Some(name) => Err(unknown(name, &fields)),
        None => Ok(fields.first().filter(|_| !takes_all(column)).and_then(only)),
    };
    let all: Vec<Option<String>> = given.iter().map(field).collect::<Result<_>>()?;
    for (i, name) in all.iter().enumerate() {
        if let Some(earlier) = all.iter().take(i).position(|other| other == name) {
            let column = |i: usize| given.get(i).map_or("", |(column, _)| column.as_str());
            let name = name.as_deref().unwrap_or_default();
            return Err(Error::invalid(format!(
                "columns \"{}\" and \"{}\" cannot both take field \"{name}\"",
                column(earlier),
                column(i)
            ))
            .hint("Give each column a field of its own."));
        }
    }
    Ok(all)
}

/// Checks that the values of a field go into a column.
pub fn check(column: &Column, field: Option<&str>, spec: &Spec) -> Result<()> {
    let fields = spec.columns();
    let target = Target::new(column.name.clone(), column.attnum, column.type_oid, field.map(str::to_owned));
    through(&target, spec)?;
    let Some(field) = target.field(&fields)? else { return Ok(()) };
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    let (base, typmod) = unsafe {
        let mut typmod = column.typmod;
        (pg_sys::getBaseTypeAndTypmod(column.type_oid, &raw mut typmod), typmod)
    };
    if let Some(embed) = spec.embeds().filter(|_| typmod >= 0 && is_vector(base))
        && i64::from(typmod) != i64::from(embed.dimensions)
    {
        let message = format!(
            "the embedder's vectors have {} dimensions but column \"{}\" has {typmod}",
            embed.dimensions, column.name
        );
        return Err(Error::new(PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH, message)
            .hint("Give the column, or the embedder, the dimensions of the other."));
    }
    let Some(labels) = &field.values else { return Ok(()) };
    if field.is_array && !target.form.is_array() {
        return Ok(());
    }
    let mut one = column.clone();
    if field.is_array {
        one.type_oid = element(column.type_oid).unwrap_or(column.type_oid);
    }
    catalog::check_labels(&one, labels.iter().map(String::as_str))
}

/// The casts of values: of each column the type of the task's field, if values are read as such first, and the column's,
/// as the statements may write them. Values that do not fit are refused.
pub fn casts(targets: &[Target], spec: &Spec) -> Result<Vec<Cast>> {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    let bases: Vec<pg_sys::Oid> = targets.iter().map(|t| unsafe { pg_sys::getBaseType(t.type_oid) }).collect();
    // With nothing but pg_catalog in the path every other type is written with its schema. Without a modifier an
    // explicit cast cuts nothing off; that of a column, or of a domain, is applied by the assignment.
    sql::set_local("search_path", "pg_catalog, pg_temp")?;
    let names = sql::rows(
        "SELECT pg_catalog.format_type(u.t, -1) FROM pg_catalog.unnest($1) WITH ORDINALITY u (t, n) ORDER BY u.n",
        &[bases.into()],
        |r| r.get::<String>(1),
    )?;
    let cast = |(target, name): (&Target, String)| {
        let types = through(target, spec)?.map_or_else(|| format!("::{name}"), |field| format!("::{field}::{name}"));
        Ok(Cast { is_of_vectors: target.takes_vectors(spec), types })
    };
    targets.iter().zip(names).map(cast).collect()
}

/// The type by which values of a field become those of a column, if the column's input function does not read them as
/// they are.
fn through(target: &Target, spec: &Spec) -> Result<Option<String>> {
    let fields = spec.columns();
    let mismatch = |what: String| {
        let column = format!("column \"{}\" is of type {}", target.name, type_name(target.type_oid));
        Error::new(PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH, format!("{what} but {column}"))
    };
    let Some(field) = target.field(&fields)? else {
        if target.form == Form::Json {
            return Ok(None);
        }
        return Err(mismatch(format!("an answer has {} fields", fields.len())).hint(
            "A column of type jsonb takes all fields. To fill one column a field, write targets => '{\"column\": \"field\"}'.",
        ));
    };
    let misfit = |of: &str| {
        let what = if spec.has_names() { format!("field \"{}\"", field.name) } else { "the answer".to_owned() };
        let fits = if of == "text" { of.to_owned() } else { format!("{of}, text") };
        mismatch(format!("{what} is of type {of}")).hint(format!("Fill a column of type {fits} or jsonb."))
    };
    // SAFETY: catalog lookups on the main thread inside a transaction.
    let base = unsafe { pg_sys::getBaseType(target.type_oid) };
    let of = format!("{}{}", field.of.name(), if field.is_array { "[]" } else { "" });
    if target.form == Form::Json || is_text(base) {
        return Ok(None);
    }
    if spec.embeds().is_some() && is_vector(base) {
        return Ok(None);
    }
    let to = match (field.is_array, target.form.is_array()) {
        (true, true) => element(base).unwrap_or(base),
        (false, is_array) if !is_array || field.values.is_some() => base,
        _ => return Err(misfit(&of)),
    };
    if spec.embeds().is_some() && matches!(to, pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID) {
        // They would round its numbers.
        return Err(misfit(&of));
    }
    let Some(from) = type_oid(field.of) else { return Ok(None) };
    // SAFETY: as above.
    let is_cast = unsafe {
        let to = pg_sys::getBaseType(to);
        if from == to || is_text(to) {
            return Ok(None);
        }
        let mut function = pg_sys::InvalidOid;
        pg_sys::find_coercion_pathway(to, from, pg_sys::CoercionContext::COERCION_ASSIGNMENT, &mut function)
            != pg_sys::CoercionPathType::COERCION_PATH_NONE
    };
    if !is_cast {
        return Err(misfit(&of));
    }
    Ok(Some(sql_type(field.of, field.is_array)))
}

/// Returns true if a type takes any text.
fn is_text(base: pg_sys::Oid) -> bool {
    matches!(base, pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::NAMEOID)
}

/// Returns true if a type is one of pgvector's, which read vectors as JSON writes them.
fn is_vector(base: pg_sys::Oid) -> bool {
    let name = type_name(base);
    let name = name.rsplit('.').next().unwrap_or_default();
    matches!(name, "vector" | "halfvec")
}

/// The type of an array's elements.
fn element(type_oid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: catalog lookups on the main thread inside a transaction.
    let element = unsafe { pg_sys::get_base_element_type(type_oid) };
    (element != pg_sys::InvalidOid).then_some(element)
}

/// A type's name, for messages.
fn type_name(type_oid: pg_sys::Oid) -> String {
    // SAFETY: a catalog lookup on the main thread inside a transaction; what comes back is a C string.
    let name = unsafe { std::ffi::CStr::from_ptr(pg_sys::format_type_be(type_oid)) };
    name.to_string_lossy().into_owned()
}
