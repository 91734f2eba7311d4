//! Columns of the user's table that a job fills beside its targets, in the same UPDATE.

use pgrx::prelude::*;
use serde_json::Value;

use crate::catalog::{self, Target};
use crate::error::{Error, Result};
use crate::sql::{self, name};

/// A kind of such a column, named by an option of a job.
pub struct Beside {
    pub option: &'static str,
    /// What it is called.
    called: &'static str,
    /// Its types: the first is proposed.
    types: &'static [(pg_sys::Oid, &'static str)],
}

/// Says of each row which task answered it.
pub const PROVENANCE: Beside =
    Beside { option: "provenance_column", called: "provenance column", types: &[(pg_sys::JSONBOID, "jsonb")] };

/// The probability of the answer.
pub const CONFIDENCE: Beside = Beside {
    option: "confidence_column",
    called: "confidence column",
    types: &[(pg_sys::FLOAT4OID, "real"), (pg_sys::FLOAT8OID, "double precision"), (pg_sys::NUMERICOID, "numeric")],
};

/// A table, and what else a job uses of it.
pub struct Of<'a> {
    pub relation: pg_sys::Oid,
    /// Schema and name, quoted.
    pub name: &'a str,
    pub keys: &'a [String],
    pub targets: Vec<&'a str>,
}

impl<'a> Of<'a> {
    pub fn new(target: &'a Target) -> Self {
        let targets = target.columns.iter().map(|column| column.name.as_str()).collect();
        Self { relation: target.relation, name: &target.name, keys: &target.key_names, targets }
    }
}

impl Beside {
    fn of_types(&self) -> String {
        let names: Vec<&str> = self.types.iter().map(|(_, name)| *name).collect();
        names.join(" or ")
    }

    /// Takes the column's name out of a job's options.
    pub fn take(&self, options: &mut Value) -> Result<Option<String>> {
        match options.as_object_mut().and_then(|map| map.remove(self.option)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(column)) => Ok(Some(column)),
            Some(other) => {
                Err(Error::invalid(format!("invalid value for option \"{}\": {other}", self.option)).hint(format!(
                    "It must be the name of a column of type {}, such as '{{\"{}\": \"topic_by\"}}'.",
                    self.of_types(),
                    self.option
                )))
            }
        }
    }

    /// Checks that a column of a table can be one.
    pub fn check(&self, column: &str, target: &Of) -> Result<()> {
        let Self { called, types, .. } = self;
        let of_its_own = || format!("Name a column of its own, of type {}.", self.of_types());
        if target.targets.contains(&column) {
            return Err(Error::invalid(format!("column \"{column}\" cannot be both a target and the {called}"))
                .hint(of_its_own()));
        }
        let found = sql::row(
            "SELECT a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod),
                    a.attgenerated OPERATOR(pg_catalog.<>) '', a.attnotnull, a.atttypmod
               FROM pg_catalog.pg_attribute a
              WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND a.attname OPERATOR(pg_catalog.=) $2::pg_catalog.name
                AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped",
            &[target.relation.into(), column.into()],
            |r| {
                let type_oid = r.get::<pg_sys::Oid>(1)?;
                Ok((type_oid, r.get::<String>(2)?, r.get::<bool>(3)?, r.get::<bool>(4)?, r.get::<i32>(5)?))
            },
        )?;
        let Some((type_oid, type_name, is_generated, is_not_null, typmod)) = found else {
            let first = types.first().map_or("", |(_, name)| *name);
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("{called} \"{column}\" of {} does not exist", target.name),
            )
            .hint(format!("Add it with ALTER TABLE {} ADD COLUMN {} {first}.", target.name, name(column))));
        };
        if !types.iter().any(|(oid, _)| *oid == type_oid) {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                format!("{called} \"{column}\" of {} is of type {type_name}", target.name),
            )
            .hint(format!("Name a column of type {}.", self.of_types())));
        }
        let is_probability = self.option == CONFIDENCE.option;
        let what = if is_generated {
            Some("is generated")
        } else if target.keys.iter().any(|key| key == column) {
            Some("belongs to the key")
        } else if is_probability && is_not_null {
            Some("is NOT NULL, and not every answer has a probability")
        } else if is_probability && catalog::read_value(c"1", type_oid, typmod).is_err() {
            Some("cannot hold 1")
        } else {
            None
        };
        if let Some(what) = what {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
                format!("column \"{column}\" of {} cannot be the {called}", target.name),
            )
            .detail(format!("The column {what}."))
            .hint(of_its_own()));
        }
        Ok(())
    }
}
