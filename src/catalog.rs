//! Catalog lookups for a table that a job fills: its key, its target, and whether a job may evaluate an expression.

use std::ffi::{CStr, CString};

use pgrx::PgList;
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
        .hint(match column.trim_start().starts_with('{') {
            true => "A text names one column. To fill several, write targets => '{\"column\": \"field\"}'.".to_owned(),
            false => format!("Add it with ALTER TABLE {table} ADD COLUMN {} text.", sql::name(column)),
        })),
    }
}

/// The columns by which rows are told apart and read in order: the primary key, or else a unique index that is as good.
/// Each column must compare by operators of pg_catalog and have an array type, since pages of keys are arrays.
fn key(relation: pg_sys::Oid, targets: Vec<i16>, short: &str) -> Result<(Vec<String>, Vec<i16>)> {
    let key = sql::row(
        "SELECT k.names, k.attnums
           FROM pg_catalog.pg_index i
           JOIN pg_catalog.pg_class x ON x.oid OPERATOR(pg_catalog.=) i.indexrelid
           JOIN pg_catalog.pg_am am ON am.oid OPERATOR(pg_catalog.=) x.relam
          CROSS JOIN LATERAL (
            SELECT pg_catalog.array_agg(a.attname::pg_catalog.text ORDER BY u.n) AS names,
                   pg_catalog.array_agg(a.attnum ORDER BY u.n) AS attnums,
                   pg_catalog.bool_and(
                     a.attnotnull AND a.attnum OPERATOR(pg_catalog.>) 0 AND a.attnum OPERATOR(pg_catalog.<>) ALL ($2)
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
          ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1",
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

/// The use of an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Input,
    Filter,
    Isolation,
}

/// Checks that `text` is one scalar expression over the rows of a table, and that a job may evaluate it: on each claim,
/// and again when the answer has come.
pub fn check_expression(target: &Target, text: &str, usage: Use) -> Result<()> {
    let what = match usage {
        Use::Input => "input",
        Use::Filter => "filter",
        Use::Isolation => "isolation",
    };
    check_alone(text, what, "Write it as in a select list, such as 'body' or 'coalesce(title, '''') || body'.")?;
    // SAFETY: parser and analysis run on the main thread inside a transaction; they raise on errors, and what they
    // return lives in the current memory context.
    unsafe {
        let query = match usage {
            Use::Input | Use::Isolation => format!("SELECT ({text}\n)::pg_catalog.text FROM ONLY {}", target.name),
            Use::Filter => format!("SELECT 1 FROM ONLY {} WHERE ({text}\n)", target.name),
        };
        let query = CString::new(query).map_err(|_| Error::invalid("an expression contains a zero byte"))?;
        let analyzed = analyze(&query)?;
        let volatile = match usage {
            Use::Isolation => "a row's value must be the same each time.",
            _ => "when the answer comes, the input is computed again to see whether it has changed.",
        };
        let wrong = if (*analyzed).hasAggs || (*analyzed).hasWindowFuncs {
            "It has an aggregate or window function.".to_owned()
        } else if (*analyzed).hasTargetSRFs {
            "It has a set-returning function.".to_owned()
        } else if pg_sys::contain_volatile_functions(analyzed.cast()) {
            format!("It has a volatile function: {volatile}")
        } else if let Some(view) = volatile_view(analyzed) {
            format!("It reads the view {view}, which has a volatile function: {volatile}")
        } else if reads_system_column(analyzed) {
            "It reads a system column, such as ctid: what that holds changes without the row.".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::new(PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, format!("{what} can't be evaluated by a job"))
            .detail(wrong)
            .hint("Write it with the columns of the row, and with functions that are stable or immutable."))
    }
}

/// Checks that `text` is one scalar expression, by its form.
pub fn check_alone(text: &str, what: &str, hint: &str) -> Result<()> {
    let not_one = |detail: &str| {
        Error::new(PgSqlErrorCode::ERRCODE_SYNTAX_ERROR, format!("{what} must be one expression over the row"))
            .detail(detail)
            .hint(hint)
    };
    // As it stands it must be one column of a select list; and in parentheses too, so that a parenthesis too many can't
    // lead into other clauses, and no alias follows.
    for alone in [format!("SELECT {text}\n"), format!("SELECT ({text}\n)")] {
        let alone = CString::new(alone).map_err(|_| not_one("It contains a zero byte."))?;
        // SAFETY: raw_parser runs on the main thread; it raises on bad syntax.
        let is_one = unsafe { parse(&alone).is_some_and(|raw| is_one_expression(raw)) };
        if !is_one {
            return Err(not_one("It contains other clauses, or more than one expression."));
        }
    }
    Ok(())
}

/// The analysis of one statement without parameters.
///
/// # Safety
/// On the main thread inside a transaction; raises on errors.
pub unsafe fn analyze(query: &CStr) -> Result<*mut pg_sys::Query> {
    // SAFETY: as the caller says; what comes back lives in the current memory context.
    unsafe {
        let raw = parse(query).ok_or_else(|| Error::invalid("an expression contains more than one statement"))?;
        Ok(pg_sys::parse_analyze_fixedparams(raw, query.as_ptr(), std::ptr::null(), 0, std::ptr::null_mut()))
    }
}

/// A view that a query reads, itself or through other views, and that has a volatile function.
///
/// # Safety
/// `query` must come from parse analysis, in this transaction.
unsafe fn volatile_view(query: *mut pg_sys::Query) -> Option<String> {
    // SAFETY: what a query reads was locked by its analysis, and what a view reads is locked here; a view that is open
    // has a query, which is copied as it may go when the view is closed.
    unsafe {
        let mut todo = relations(query);
        let mut next = 0;
        while let Some(oid) = todo.get(next).copied() {
            next += 1;
            if pg_sys::get_rel_relkind(oid) as u8 != pg_sys::RELKIND_VIEW {
                continue;
            }
            let view = pg_sys::relation_open(oid, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
            let query = pg_sys::copyObjectImpl(pg_sys::get_view_query(view).cast()).cast::<pg_sys::Query>();
            pg_sys::relation_close(view, pg_sys::NoLock as pg_sys::LOCKMODE);
            if pg_sys::contain_volatile_functions(query.cast()) {
                let name = pg_sys::get_rel_name(oid);
                let name = if name.is_null() { c"" } else { CStr::from_ptr(name) };
                return Some(format!("\"{}\"", name.to_string_lossy()));
            }
            for more in relations(query) {
                if !todo.contains(&more) {
                    todo.push(more);
                }
            }
        }
    }
    None
}

/// The relations that stand in a query and its subqueries.
///
/// # Safety
/// `query` must be a query.
unsafe fn relations(query: *mut pg_sys::Query) -> Vec<pg_sys::Oid> {
    let (mut oids, mut items, mut has_policies) = (std::ptr::null_mut(), std::ptr::null_mut(), false);
    // SAFETY: as the caller says; what comes back is a list of OIDs, or NIL.
    unsafe {
        pg_sys::extract_query_dependencies(query.cast(), &mut oids, &mut items, &mut has_policies);
        PgList::<pg_sys::Oid>::from_pg(oids).iter_oid().collect()
    }
}

/// All relations that decide which rows a statement reads: its own, and those of views and of policies.
pub fn read_by(statement: &str, types: &[pg_sys::Oid]) -> Result<Vec<pg_sys::Oid>> {
    let text = CString::new(statement).map_err(|_| Error::invalid("a statement can't have a zero byte"))?;
    let mut all = Vec::new();
    // SAFETY: parser, analysis and rewriter run on the main thread inside a transaction with a snapshot; they raise on
    // errors, and what they return lives in the current memory context.
    unsafe {
        let raw = parse(&text).ok_or_else(|| Error::invalid("a text is not one statement"))?;
        let query = pg_sys::parse_analyze_fixedparams(
            raw,
            text.as_ptr(),
            types.as_ptr(),
            types.len() as i32,
            std::ptr::null_mut(),
        );
        let rewritten = PgList::<pg_sys::Query>::from_pg(pg_sys::QueryRewrite(query));
        for query in rewritten.iter_ptr() {
            all.extend(relations(query));
        }
    }
    all.sort_unstable_by_key(|oid| oid.to_u32());
    all.dedup();
    Ok(all)
}

/// Returns true if a query reads a system column of the table that stands first in it.
///
/// # Safety
/// `query` must come from parse analysis.
unsafe fn reads_system_column(query: *mut pg_sys::Query) -> bool {
    // SAFETY: the lists of a query hold what their names say; the analysis has noted the columns that are read of each
    // relation, wherever that is done, counted from the lowest system column.
    unsafe {
        let Some(entry) = PgList::<pg_sys::RangeTblEntry>::from_pg((*query).rtable).get_ptr(0) else {
            return false;
        };
        #[cfg(feature = "pg15")]
        let columns = (*entry).selectedCols;
        #[cfg(not(feature = "pg15"))]
        let columns = {
            let infos = PgList::<pg_sys::RTEPermissionInfo>::from_pg((*query).rteperminfos);
            match infos.get_ptr(((*entry).perminfoindex as usize).wrapping_sub(1)) {
                Some(info) => (*info).selectedCols,
                None => return false,
            }
        };
        let lowest = pg_sys::bms_next_member(columns, -1);
        lowest >= 0 && lowest + pg_sys::FirstLowInvalidHeapAttributeNumber < 0
    }
}

/// The statement of a text, if it has exactly one. Raises on bad syntax.
///
/// # Safety
/// On the main thread.
unsafe fn parse(text: &CStr) -> Option<*mut pg_sys::RawStmt> {
    // SAFETY: as the caller says; what the parser gives is a list of RawStmt, or NIL.
    unsafe {
        let statements = pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        let statements = PgList::<pg_sys::RawStmt>::from_pg(statements);
        statements.head().filter(|_| statements.len() == 1)
    }
}

/// Returns true if a statement is a bare `SELECT expression`.
///
/// # Safety
/// `raw` must come from `parse()`.
unsafe fn is_one_expression(raw: *mut pg_sys::RawStmt) -> bool {
    // SAFETY: as the caller says; node tags are checked before casts.
    unsafe {
        let node = (*raw).stmt;
        if (*node).type_ != pg_sys::NodeTag::T_SelectStmt {
            return false;
        }
        let s = &*node.cast::<pg_sys::SelectStmt>();
        s.distinctClause.is_null()
            && s.intoClause.is_null()
            && PgList::<pg_sys::ResTarget>::from_pg(s.targetList).len() == 1
            && s.fromClause.is_null()
            && s.whereClause.is_null()
            && s.groupClause.is_null()
            && s.havingClause.is_null()
            && s.windowClause.is_null()
            && s.valuesLists.is_null()
            && s.sortClause.is_null()
            && s.limitCount.is_null()
            && s.limitOffset.is_null()
            && s.lockingClause.is_null()
            && s.withClause.is_null()
            && s.op == pg_sys::SetOperation::SETOP_NONE
    }
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
