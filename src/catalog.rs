//! Catalog lookups for a table that a job fills: its key, its targets, its owners.

use std::ffi::{CStr, CString};

use pgrx::prelude::*;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::sql;

/// A table and the columns to fill.
#[derive(Debug, Clone)]
pub struct Target {
    pub relation: pg_sys::Oid,
    /// The top of its partition tree, or itself.
    pub root: pg_sys::Oid,
    /// Schema and name, quoted.
    pub name: String,
    pub is_partitioned: bool,
    pub owner: pg_sys::Oid,
    pub columns: Vec<Column>,
    pub key_names: Vec<String>,
    pub key_attnums: Vec<i16>,
}

fn wrong_object(message: String) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, message)
}

/// Looks at a table and its columns.
pub fn target(relation: pg_sys::Oid, columns: &[String]) -> Result<Target> {
    let Table { name, short, root, owner, is_partitioned } = table(relation)?;
    check_partitions(relation, &short)?;
    check_rules(relation, &short)?;
    let columns = columns.iter().map(|c| column(relation, c, &name, &short)).collect::<Result<Vec<_>>>()?;
    let (key_names, key_attnums) = key(relation, columns.iter().map(|c| c.attnum).collect(), &short)?;
    Ok(Target { relation, root, name, is_partitioned, owner, columns, key_names, key_attnums })
}

/// A table that a job may fill, as of `Target`.
struct Table {
    name: String,
    /// The name alone, as it is.
    short: String,
    root: pg_sys::Oid,
    owner: pg_sys::Oid,
    is_partitioned: bool,
}

fn table(relation: pg_sys::Oid) -> Result<Table> {
    let found = sql::row(
        "SELECT c.relkind::pg_catalog.text AS kind, c.relpersistence::pg_catalog.text AS persistence,
                n.nspname::pg_catalog.text AS schema, c.relname::pg_catalog.text AS short, c.relowner AS owner,
                pg_catalog.concat(pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(c.relname)) AS name,
                COALESCE(pg_catalog.pg_partition_root(c.oid)::pg_catalog.oid, c.oid) AS root
           FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
          WHERE c.oid OPERATOR(pg_catalog.=) $1",
        &[relation.into()],
        |r| {
            let kind = (r.get::<String>("kind")?, r.get::<String>("persistence")?, r.get::<String>("schema")?);
            let table = Table {
                name: r.get("name")?,
                short: r.get("short")?,
                root: r.get("root")?,
                owner: r.get("owner")?,
                is_partitioned: kind.0 == "p",
            };
            Ok((table, kind))
        },
    )?;
    let Some((table, (kind, persistence, schema))) = found else {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            format!("relation with OID {} does not exist", relation.to_u32()),
        ));
    };
    let what = match kind.as_str() {
        "r" | "p" if persistence == "t" => "a temporary table, which other sessions can't see",
        "r" | "p" if ["pg_catalog", "information_schema", "pg_toast", "llm_batch"].contains(&schema.as_str()) => {
            "a system table"
        }
        "r" | "p" => return Ok(table),
        "v" => "a view",
        "m" => "a materialized view",
        "f" => "a foreign table",
        _ => "not a table",
    };
    Err(wrong_object(format!("cannot fill a column of \"{}\"", table.short))
        .detail(format!("It is {what}."))
        .hint("Name an ordinary or partitioned table."))
}

/// Refuses a table with a partition that is elsewhere.
fn check_partitions(relation: pg_sys::Oid, short: &str) -> Result<()> {
    let foreign = sql::one::<String>(
        "SELECT t.relid::pg_catalog.text FROM pg_catalog.pg_partition_tree($1) t
           JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) t.relid
          WHERE c.relkind OPERATOR(pg_catalog.=) 'f' LIMIT 1",
        &[relation.into()],
    )?;
    foreign.map_or(Ok(()), |partition| {
        Err(wrong_object(format!("cannot fill a column of \"{short}\""))
            .detail(format!("Its partition {partition} is a foreign table.")))
    })
}

/// Refuses a table whose rules make another statement of an UPDATE, or more of them: a job could not tell what it wrote.
fn check_rules(relation: pg_sys::Oid, short: &str) -> Result<()> {
    let rule = sql::one::<String>(
        "SELECT r.rulename::pg_catalog.text FROM pg_catalog.pg_rewrite r
          WHERE r.ev_class OPERATOR(pg_catalog.=) $1 AND r.ev_type OPERATOR(pg_catalog.=) '2'
            AND r.ev_enabled OPERATOR(pg_catalog.<>) 'D' AND r.ev_enabled OPERATOR(pg_catalog.<>) 'R' ORDER BY r.rulename LIMIT 1",
        &[relation.into()],
    )?;
    rule.map_or(Ok(()), |rule| {
        Err(wrong_object(format!("cannot fill a column of \"{short}\""))
            .detail(format!("It has the rule \"{rule}\" ON UPDATE."))
            .hint("Remove it with DROP RULE; a trigger may do the same."))
    })
}

/// A column that a job may fill.
#[derive(Debug, Clone)]
pub struct Column {
    pub name: String,
    pub attnum: i16,
    pub type_oid: pg_sys::Oid,
    pub typmod: i32,
}

fn column(relation: pg_sys::Oid, column: &str, table: &str, short: &str) -> Result<Column> {
    let found = sql::row(
        "SELECT a.attnum, a.atttypid, a.atttypmod,
                CASE WHEN a.attgenerated OPERATOR(pg_catalog.<>) '' OR a.attidentity OPERATOR(pg_catalog.<>) '' THEN 'is generated'
                     WHEN a.attnotnull OR t.typnotnull THEN 'is NOT NULL, but a job fills rows whose target is NULL' END AS unfit
           FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) a.atttypid
          WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND a.attname OPERATOR(pg_catalog.=) $2::pg_catalog.name
            AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped",
        &[relation.into(), column.into()],
        |r| {
            let (attnum, type_oid, typmod) = (r.get("attnum")?, r.get("atttypid")?, r.get("atttypmod")?);
            Ok((Column { name: column.to_owned(), attnum, type_oid, typmod }, r.maybe::<String>("unfit")?))
        },
    )?;
    match found {
        Some((column, None)) => Ok(column),
        Some((_, Some(unfit))) => Err(wrong_object(format!("cannot fill column \"{column}\" of relation \"{short}\""))
            .detail(format!("The column {unfit}."))),
        None => Err(Error::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("column \"{column}\" of relation \"{short}\" does not exist"),
        )
        .hint(match (column.trim_start().starts_with('{'), alike(relation, column)?) {
            (true, _) => {
                "A text names one column. To fill several, write targets => '{\"column\": \"field\"}'.".to_owned()
            }
            (_, Some(other)) => {
                format!("Perhaps you meant column \"{other}\": its name is written as it is, without quotes.")
            }
            (_, None) => format!(
                "Add it with ALTER TABLE {table} ADD COLUMN {} text; take another type if the answers are no texts.",
                sql::name(column)
            ),
        })),
    }
}

/// A column whose name differs in its case, in quotes or in spaces around it alone.
fn alike(relation: pg_sys::Oid, column: &str) -> Result<Option<String>> {
    sql::one(
        "SELECT pg_catalog.min(a.attname::pg_catalog.text) FROM pg_catalog.pg_attribute a
          WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped
            AND pg_catalog.lower(a.attname::pg_catalog.text) OPERATOR(pg_catalog.=) pg_catalog.lower($2)",
        &[relation.into(), column.trim_matches(['"', ' ']).into()],
    )
}

/// Says in SQL that column `a` of `pg_attribute` is NULL in no row. From Postgres 18 on NOT NULL may be NOT VALID.
pub const NOT_NULL: &str = "(a.attnotnull AND NOT EXISTS
    (SELECT FROM pg_catalog.pg_constraint n
      WHERE n.conrelid OPERATOR(pg_catalog.=) a.attrelid AND n.contype OPERATOR(pg_catalog.=) 'n' AND NOT n.convalidated
        AND n.conkey[1] OPERATOR(pg_catalog.=) a.attnum))";

/// The columns by which rows are told apart and read in order: the primary key, or else a unique index that is as good.
/// Each column must compare by operators of pg_catalog and have an array type, since pages of keys are arrays.
fn key(relation: pg_sys::Oid, targets: Vec<i16>, short: &str) -> Result<(Vec<String>, Vec<i16>)> {
    let key = sql::row(
        &format!(
            "SELECT k.names, k.attnums
           FROM pg_catalog.pg_index i
           JOIN pg_catalog.pg_class x ON x.oid OPERATOR(pg_catalog.=) i.indexrelid
           JOIN pg_catalog.pg_am am ON am.oid OPERATOR(pg_catalog.=) x.relam
          CROSS JOIN LATERAL (
            SELECT pg_catalog.array_agg(a.attname::pg_catalog.text ORDER BY u.n) AS names,
                   pg_catalog.array_agg(a.attnum ORDER BY u.n) AS attnums,
                   pg_catalog.bool_and(
                     {NOT_NULL} AND a.attnum OPERATOR(pg_catalog.>) 0 AND a.attnum OPERATOR(pg_catalog.<>) ALL ($2)
                     AND i.indoption[u.n] OPERATOR(pg_catalog.=) 0
                     AND i.indcollation[u.n] OPERATOR(pg_catalog.=) a.attcollation
                     AND t.typarray OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
                     AND EXISTS (SELECT FROM pg_catalog.pg_opclass oc
                                   JOIN pg_catalog.pg_amop o ON o.amopfamily OPERATOR(pg_catalog.=) oc.opcfamily
                                    AND o.amoplefttype OPERATOR(pg_catalog.=) oc.opcintype
                                    AND o.amoprighttype OPERATOR(pg_catalog.=) oc.opcintype
                                    AND o.amopstrategy OPERATOR(pg_catalog.=) 3
                                   JOIN pg_catalog.pg_operator p ON p.oid OPERATOR(pg_catalog.=) o.amopopr
                                  WHERE oc.oid OPERATOR(pg_catalog.=) i.indclass[u.n] AND oc.opcdefault
                                    AND p.oprname OPERATOR(pg_catalog.=) '='
                                    AND p.oprnamespace OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace::pg_catalog.oid)
                   ) AS fits
              FROM pg_catalog.generate_series(0, i.indnkeyatts OPERATOR(pg_catalog.-) 1) u (n)
              LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) i.indrelid AND a.attnum OPERATOR(pg_catalog.=) i.indkey[u.n]
              LEFT JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) a.atttypid
          ) k
          WHERE i.indrelid OPERATOR(pg_catalog.=) $1 AND i.indisunique AND i.indisvalid AND i.indimmediate
            AND i.indpred IS NULL AND i.indexprs IS NULL AND am.amname OPERATOR(pg_catalog.=) 'btree' AND k.fits
          ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1"
        ),
        &[relation.into(), targets.into()],
        |r| Ok((r.get::<Vec<Option<String>>>(1)?, r.get::<Vec<Option<i16>>>(2)?)),
    )?;
    let Some((names, attnums)) = key else {
        return Err(Error::state(format!("relation \"{short}\" has no key that a job can use"))
            .detail(
                "A job needs a primary key, or a valid, immediate, non-partial unique index on NOT NULL columns, that does \
                 not contain the target.",
            )
            .hint("Add a primary key, such as ALTER TABLE … ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY."));
    };
    Ok((names.into_iter().flatten().collect(), attnums.into_iter().flatten().collect()))
}

/// Returns true if a type is json, jsonb or a domain over one: a label goes there as a JSON string.
pub fn is_json(type_oid: pg_sys::Oid) -> bool {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    let base = unsafe { pg_sys::getBaseType(type_oid) };
    base == pg_sys::JSONOID || base == pg_sys::JSONBOID
}

/// Checks that every label casts to the target's type by assignment. Raises what the type's input function raises.
pub fn check_labels<'a>(column: &Column, labels: impl Iterator<Item = &'a str>) -> Result<()> {
    let is_json = is_json(column.type_oid);
    for label in labels {
        let text = if is_json { Value::from(label).to_string() } else { label.to_owned() };
        let text = CString::new(text).map_err(|_| Error::invalid("a label contains a zero byte"))?;
        if let Err(e) = read_value(&text, column.type_oid, column.typmod) {
            return Err(Error {
                code: e.code,
                message: format!("label \"{label}\" does not fit column \"{}\"", column.name),
                detail: Some(e.one_line()),
                hint: Some("Every label must be a value of the column's type.".to_owned()),
            });
        }
    }
    Ok(())
}

/// Reads a text as a value of a type, as its input function does; raises what that raises.
pub fn read_value(text: &CStr, type_oid: pg_sys::Oid, typmod: i32) -> Result<()> {
    crate::txn::sub(|| {
        // SAFETY: the input function of an existing type, on the main thread inside a subtransaction; it may raise.
        unsafe {
            let (mut function, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
            pg_sys::getTypeInputInfo(type_oid, &mut function, &mut parameter);
            pg_sys::OidInputFunctionCall(function, text.as_ptr().cast_mut(), parameter, typmod);
        }
        Ok(())
    })
}

/// Refuses a superuser's job on a table that another role owns, or one of its partitions: what the owner has put on it
/// (triggers, defaults, policies, domains) would run as the superuser.
pub fn check_owners(relation: pg_sys::Oid, role: pg_sys::Oid, name: &str) -> Result<()> {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    if !unsafe { pg_sys::superuser_arg(role) } {
        return Ok(());
    }
    let other = sql::one::<String>(
        "SELECT pg_catalog.format('\"%s\" of role \"%s\"', c.relname, r.rolname)
           FROM pg_catalog.pg_class c JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) c.relowner
          WHERE NOT r.rolsuper AND (c.oid OPERATOR(pg_catalog.=) $1
                OR c.oid OPERATOR(pg_catalog.=) ANY (SELECT p.relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree($1) p))
          LIMIT 1",
        &[relation.into()],
    )?;
    match other {
        None => Ok(()),
        Some(other) => Err(Error::denied(format!("a superuser's job cannot fill {name}"))
            .detail(format!("It would write table {other}, whose triggers would run with the rights of a superuser."))
            .hint("Let one role own the table and all of its partitions, and start the job as that role.")),
    }
}
