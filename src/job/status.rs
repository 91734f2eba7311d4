//! A job as its owner sees it, and how it is forgotten.

use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::{owner, sql, txn};

/// A job as its owner sees it.
#[derive(Debug, Clone)]
pub struct Status {
    pub id: i64,
    /// `None`: it was dropped, or is not a role here.
    pub owner: Option<pg_sys::Oid>,
    /// `None`: it is not here.
    pub relation: Option<pg_sys::Oid>,
    table_owner: Option<pg_sys::Oid>,
    pub table: String,
    pub targets: Vec<String>,
    /// Columns that are filled beside the targets.
    pub beside: Vec<String>,
    pub task: String,
    pub status: String,
    /// It is paused, and yet goes on by itself, or has a worker that keeps answers.
    pub has_hope: bool,
}

impl Status {
    /// Checks that the caller is its owner.
    pub fn by_owner(self) -> Result<Self> {
        if owner::is_mine(self.owner) { Ok(self) } else { Err(owner::denied(self.owner, &format!("job {}", self.id))) }
    }

    /// Checks that the caller is its owner or the table's.
    pub fn by_owner_or_tables(self) -> Result<Self> {
        if self.table_owner.is_some() && owner::is_mine(self.table_owner) { Ok(self) } else { self.by_owner() }
    }

    /// Returns true if a role owns its table.
    pub fn is_of_table(&self, role: pg_sys::Oid) -> bool {
        self.table_owner == Some(role)
    }

    /// Its owner and its table, without which it can't go on.
    pub fn check_complete(&self) -> Result<(pg_sys::Oid, pg_sys::Oid)> {
        let Some(owner) = self.owner else {
            return Err(Error::new(PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION, owner::GONE)
                .hint(format!("Set another owner with llm_batch.set_owner({}, …).", self.id)));
        };
        let Some(relation) = self.relation else {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                format!("table {} of job {} does not exist", self.table, self.id),
            )
            .hint(format!("Restore it under this name, or end the job with llm_batch.cancel({}).", self.id)));
        };
        Ok((owner, relation))
    }
}

/// Looks a job up.
pub fn status(id: i64) -> Result<Status> {
    let found = txn::as_extension_owner(|| {
        sql::row(
            "SELECT n.owner, t.oid, t.relowner, p.relation, j.targets::text[], p.task, p.status,
                    llm_batch.goes_on(p.reason) OR coalesce(p.reason = 'owner', false),
                    ARRAY[j.options->>'provenance_column', j.options->>'confidence_column']
               FROM llm_batch.progress p JOIN llm_batch.job j ON j.id = p.job_id
              CROSS JOIN LATERAL (SELECT llm_batch.owner_now(j.owner, j.owner_name, j.home),
                                         llm_batch.relation_now(j.relation, j.relation_name, j.home)) n (owner, relation)
               LEFT JOIN pg_class t ON t.oid = n.relation WHERE p.job_id = $1",
            &[id.into()],
            |r| {
                Ok(Status {
                    id,
                    owner: r.maybe(1)?,
                    relation: r.maybe(2)?,
                    table_owner: r.maybe(3)?,
                    table: r.get(4)?,
                    targets: r.get::<Vec<Option<String>>>(5)?.into_iter().flatten().collect(),
                    task: r.get(6)?,
                    status: r.get(7)?,
                    has_hope: r.get(8)?,
                    beside: r.get::<Vec<Option<String>>>(9)?.into_iter().flatten().collect(),
                })
            },
        )
    })?;
    found.ok_or_else(|| {
        Error::unknown(format!("job {id} does not exist")).hint("The view llm_batch.progress lists your jobs.")
    })
}

/// A job's account, as the log keeps it.
pub fn account(id: i64) -> Result<String> {
    let text = txn::as_extension_owner(|| {
        sql::one::<String>(
            "SELECT format('column %s of %s, task %s, by %s: %s rows done, %s skipped, %s failed, %s superseded, %s requests, %s input and %s output tokens, cost %s',
                           p.target, p.relation, p.task, p.owner, p.rows_done, p.rows_skipped, p.rows_failed, p.rows_superseded,
                           p.requests, p.input_tokens, p.output_tokens, p.cost)
               FROM llm_batch.progress p WHERE p.job_id = $1",
            &[id.into()],
        )
    })?;
    Ok(text.unwrap_or_default())
}

/// Deletes a job, with all that belongs to it; the log keeps its account.
pub fn forget(id: i64, why: &str) -> Result<()> {
    let account = account(id)?;
    let gone = txn::as_extension_owner(|| {
        let gone = sql::run("DELETE FROM llm_batch.job WHERE id = $1", &[id.into()])?;
        sql::run("DELETE FROM llm_batch.row_null WHERE job_id = $1", &[id.into()])?;
        Ok(gone)
    })?;
    if gone > 0 {
        pgrx::log!("llm_batch job {id} is forgotten{why}: {account}");
    }
    Ok(())
}
