//! The table of a job as it is now: locked, looked at, and who else holds it.

use pgrx::pg_sys;

use crate::catalog::NOT_NULL;
use crate::error::{Error, Result};
use crate::job::store::Job;
use crate::process::{current_user, my_database};
use crate::{beside, catalog, sql};

/// A table as it is named now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Schema and name, quoted.
    pub full: String,
    /// The name alone, quoted: how its columns are qualified.
    pub bare: String,
    pub is_partitioned: bool,
    /// It, or a partition, may have triggers.
    pub has_triggers: bool,
}

/// Locks the table, and then takes a snapshot: a transaction that changes it has committed before we look, or waits until
/// we are done. A lock that is taken later and step by step can deadlock with a REINDEX, and can come after a column was
/// replaced.
pub fn lock(job: &Job, mode: u32) -> Result<()> {
    // SAFETY: inside a transaction at READ COMMITTED, on the main thread; locks end with it. A lock on a table that is
    // gone does no harm. The snapshot is exchanged for a later one, with no statement running.
    unsafe {
        pg_sys::LockRelationOid(job.relation, mode as pg_sys::LOCKMODE);
        renew_snapshot();
        if pg_sys::get_rel_relkind(job.relation) as u8 != pg_sys::RELKIND_PARTITIONED_TABLE {
            return Ok(());
        }
    }
    let partitions = sql::rows(
        "SELECT p.relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree($1) p WHERE p.level OPERATOR(pg_catalog.>) 0",
        &[job.relation.into()],
        |r| r.get::<pg_sys::Oid>(1),
    )?;
    // SAFETY: as above.
    unsafe {
        for partition in &partitions {
            pg_sys::LockRelationOid(*partition, mode as pg_sys::LOCKMODE);
        }
        if !partitions.is_empty() {
            renew_snapshot();
        }
    }
    Ok(())
}

/// # Safety
/// No statement may be running under the active snapshot.
unsafe fn renew_snapshot() {
    // SAFETY: as the caller promises.
    unsafe {
        pg_sys::PopActiveSnapshot();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
}

/// The processes that hold or await a lock on the table that lets nobody write.
pub fn lockers(job: &Job) -> Result<String> {
    let found = sql::one::<String>(
        "SELECT pg_catalog.string_agg(DISTINCT pg_catalog.format('%s on %s %s %s', l.mode, l.relation::pg_catalog.regclass,
                    CASE WHEN l.granted THEN 'held by' ELSE 'waited for by' END,
                    CASE WHEN l.pid IS NULL THEN 'a prepared transaction' ELSE pg_catalog.concat('process ', l.pid) END), ', ')
           FROM pg_catalog.pg_locks l
          WHERE l.locktype OPERATOR(pg_catalog.=) 'relation' AND l.database OPERATOR(pg_catalog.=) $2
            AND (l.relation OPERATOR(pg_catalog.=) $1
                 OR l.relation OPERATOR(pg_catalog.=) ANY (SELECT p.relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree($1) p))
            AND l.mode OPERATOR(pg_catalog.=) ANY (ARRAY['ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'])",
        &[job.relation.into(), pg_sys::Oid::from(my_database()).into()],
    )?;
    Ok(found.unwrap_or_else(|| {
        "the lock is not on the table, but on something that a trigger, a constraint or the input needs".to_owned()
    }))
}

/// The table, if it and all columns are still what they were when the job was made; else what is wrong.
pub fn table(job: &Job) -> Result<Table> {
    let targets = job.targets.iter().map(|t| (&t.name, t.attnum, Some(t.type_oid)));
    let keys = job.key_names.iter().zip(&job.key_attnums).map(|(name, attnum)| (name, *attnum, None));
    // A column beside the targets may be another one of this name: nothing else is known of it.
    let provenance = job.provenance.iter().map(|name| (name, 0, None));
    let confidence = job.confidence.iter().map(|name| (name, 0, None));
    let columns: Vec<_> = keys.chain(targets).chain(provenance).chain(confidence).collect();
    // One statement: it runs with each transaction that writes.
    let found = sql::row(
        &format!(
            "SELECT pg_catalog.concat(pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(c.relname)) AS full_name,
                pg_catalog.quote_ident(c.relname) AS bare_name, c.relkind OPERATOR(pg_catalog.=) 'p' AS is_partitioned,
                c.relhastriggers OR c.relkind OPERATOR(pg_catalog.=) 'p' AS has_triggers,
                (SELECT u.name
                   FROM ROWS FROM (pg_catalog.unnest($2::pg_catalog.text[]), pg_catalog.unnest($3::pg_catalog.int2[]), pg_catalog.unnest($4::pg_catalog.oid[])) u (name, num, type)
                  WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                                     WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND (u.num OPERATOR(pg_catalog.=) 0::pg_catalog.int2 OR a.attnum OPERATOR(pg_catalog.=) u.num)
                                       AND a.attname OPERATOR(pg_catalog.=) u.name::pg_catalog.name AND NOT a.attisdropped
                                       AND (u.type IS NULL OR a.atttypid OPERATOR(pg_catalog.=) u.type))
                  LIMIT 1) AS other_column,
                EXISTS (SELECT FROM pg_catalog.pg_index i
                         WHERE i.indrelid OPERATOR(pg_catalog.=) $1 AND i.indisunique AND i.indisvalid AND i.indimmediate
                           AND i.indpred IS NULL AND i.indexprs IS NULL
                           AND pg_catalog.array_to_string((i.indkey::pg_catalog.int2[])[0:i.indnkeyatts OPERATOR(pg_catalog.-) 1], ' ')
                               OPERATOR(pg_catalog.=) pg_catalog.array_to_string($5::pg_catalog.int2[], ' '))
                AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                                 WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND a.attnum OPERATOR(pg_catalog.=) ANY ($5::pg_catalog.int2[])
                                   AND NOT {NOT_NULL}) AS has_key
           FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
          WHERE c.oid OPERATOR(pg_catalog.=) $1"
        ),
        &[
            job.relation.into(),
            columns.iter().map(|c| c.0.clone()).collect::<Vec<String>>().into(),
            columns.iter().map(|c| c.1).collect::<Vec<i16>>().into(),
            columns.iter().map(|c| c.2).collect::<Vec<Option<pg_sys::Oid>>>().into(),
            job.key_attnums.clone().into(),
        ],
        |r| {
            let table = Table {
                full: r.get("full_name")?,
                bare: r.get("bare_name")?,
                is_partitioned: r.get("is_partitioned")?,
                has_triggers: r.get("has_triggers")?,
            };
            Ok((table, r.maybe::<String>("other_column")?, r.get::<bool>("has_key")?))
        },
    )?;
    let Some((table, other_column, has_key)) = found else {
        return Err(Error::new(pgrx::PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, "the table of the job was dropped"));
    };
    catalog::check_owners(job.relation, current_user(), &table.full)?;
    if let Some(column) = other_column {
        return Err(Error::new(
            pgrx::PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("column \"{column}\" of {} was dropped, renamed or replaced while the job ran", table.full),
        ));
    }
    // Of a column beside the targets only the name is known: it must be one that a job could be made with.
    let targets = job.targets.iter().map(|t| t.name.as_str()).collect();
    let of = beside::Of { relation: job.relation, name: &table.full, keys: &job.key_names, targets };
    for (kind, column) in [(beside::PROVENANCE, &job.provenance), (beside::CONFIDENCE, &job.confidence)] {
        column.iter().try_for_each(|column| kind.check(column, &of))?;
    }
    if !has_key {
        return Err(Error::new(
            pgrx::PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("the key of {} was dropped or made nullable while the job ran", table.full),
        ));
    }
    Ok(table)
}
