//! The common arguments of `backfill()` and `estimate()`, and their checks before anything is sent.

use std::ffi::CStr;

use pgrx::prelude::*;
use serde_json::{Value, json};

use crate::args::{from_name, required};
use crate::catalog::{self, Target};
use crate::client::check_usable;
use crate::error::{Error, Result};
use crate::expression::{self, Use};
use crate::job::target;
use crate::json::Json;
use crate::options::{OfJob, of_job};
use crate::process::current_user;
use crate::task::{self, Asked};
use crate::{asking, beside, deadline, isolation, sql, txn};

/// The arguments of a job: what to fill, from what, with what.
pub struct Given<'a> {
    relation: pg_sys::Oid,
    pub input: &'a str,
    /// Columns, and the field of each if it was named.
    columns: Vec<(String, Option<String>)>,
    pub task: &'a str,
    pub filter: Option<&'a str>,
    /// As they were given, with the deadline as a point in time.
    pub options: Value,
    task_options: Value,
    pub isolation: Option<String>,
    pub provenance: Option<String>,
    pub confidence: Option<String>,
    pub has_deadline: bool,
}

impl<'a> Given<'a> {
    pub fn new(
        relation: Option<pg_sys::Oid>,
        input: Option<&'a str>,
        columns: Vec<(String, Option<String>)>,
        task: Option<&'a str>,
        filter: Option<&'a str>,
        options: Option<Json>,
    ) -> Result<Self> {
        let mut options = options.map(|o| o.0).filter(|o| !o.is_null()).unwrap_or_else(|| json!({}));
        let OfJob { task: task_options, isolation, provenance, confidence, deadline } = of_job(options.clone())?;
        let has_deadline = deadline.is_some();
        if let Some(text) = deadline {
            options[deadline::OPTION] = deadline::resolve(&text)?.into();
        }
        Ok(Self {
            relation: required(relation, "relation")?,
            input: required(input, "input")?,
            columns,
            task: required(task, "task")?,
            filter,
            options,
            task_options,
            isolation,
            provenance,
            confidence,
            has_deadline,
        })
    }

    /// Checks all of it.
    pub fn check(&self, is_to_write: bool) -> Result<Checked> {
        asking::check()?;
        check_usable()?;
        let names: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let target = catalog::target(self.relation, &names).map_err(|e| self.in_place(e))?;
        for (kind, column) in [(beside::PROVENANCE, &self.provenance), (beside::CONFIDENCE, &self.confidence)] {
            column.iter().try_for_each(|column| kind.check(column, &beside::Of::new(&target)))?;
        }
        let owner = owner_of(&target)?;
        let asked = task::load(self.task, &self.task_options)?.stream(owner, false)?;
        self.check_rights(&target, owner, is_to_write)?;
        self.check_apart(&names)?;
        let spec = &asked.stream.task.spec;
        let fields = target::fields(&self.columns, &target.columns, spec)?;
        catalog::check_owners(target.relation, owner, &target.name)?;
        // A domain's CHECK and a table's expressions may call functions of their owners: never with more rights
        // than the job will have. To parse an expression is enough, since its literals are read then.
        let look = || {
            let expressions = [
                ("argument \"input\"", Some(self.input), Use::Input),
                ("argument \"filter\"", self.filter, Use::Filter),
                ("option \"isolation\"", self.isolation.as_deref(), Use::Isolation),
            ];
            for (what, text, usage) in expressions {
                let Some(text) = text else { continue };
                // An error of Postgres does not say where the expression came from.
                txn::sub(|| expression::check_expression(&target, text, usage))
                    .map_err(|e| e.hint_if_none(format!("The {what} is an SQL expression over a row of the table.")))?;
            }
            for (column, field) in target.columns.iter().zip(&fields) {
                target::check(column, field.as_deref(), spec)?;
            }
            sql::rows_once(
                &format!(
                    "SELECT ({}\n)::pg_catalog.text, {}, {} FROM ONLY {} WHERE ({}\n) LIMIT 0",
                    self.input,
                    isolation::digest_sql(self.isolation.as_deref()),
                    names.iter().chain(&self.provenance).map(|name| sql::name(name)).collect::<Vec<_>>().join(", "),
                    target.name,
                    self.filter.unwrap_or("true")
                ),
                &[],
                |_| Ok(()),
            )
        };
        asking::refused(|| txn::as_role(owner, look))?;
        Ok(Checked { target, fields, owner, asked })
    }

    /// An error about a column, with a hint if the argument is a field or a task that has a column's place.
    fn in_place(&self, e: Error) -> Error {
        if e.code != PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN {
            return e;
        }
        let fields = task::load(self.task, &Value::Null).map_or_else(|_| Vec::new(), |known| known.task.spec.columns());
        let is_field = |name: &str| fields.iter().any(|field| field.name == name);
        let swapped = |(column, field): &(String, Option<String>)| {
            let field = field.as_deref().filter(|field| is_field(column) && !is_field(field))?;
            Some(format!("The column comes first, then the field: targets => '{}'.", json!({field: column})))
        };
        let is_task =
            |(column, field): &(String, Option<String>)| field.is_none() && task::load(column, &Value::Null).is_ok();
        if let Some(hint) = self.columns.iter().find_map(swapped) {
            return e.hint(hint);
        }
        match self.columns.iter().find(|given| is_task(given)) {
            Some((task, _)) => e.hint(format!("\"{task}\" is a task: it comes behind the column to fill.")),
            None => e,
        }
    }

    /// Refuses a target that is the input: a row whose target is NULL would have no text.
    fn check_apart(&self, targets: &[String]) -> Result<()> {
        let input = self.input.trim();
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        match targets {
            [name] if input.to_lowercase() == *name || input == quoted(name) => {
                Err(Error::invalid(format!("column \"{name}\" is both the input and the target"))
                    .detail("A job fills rows whose target is NULL, and these would have no text.")
                    .hint("Add a column for the answers."))
            }
            _ => Ok(()),
        }
    }

    /// Columns that are filled beside the targets.
    pub fn beside(&self) -> Vec<&str> {
        self.provenance.iter().chain(&self.confidence).map(String::as_str).collect()
    }

    fn check_rights(&self, target: &Target, owner: pg_sys::Oid, is_to_write: bool) -> Result<()> {
        let reads = target.key_names.iter().chain(&self.provenance).map(|name| (name, "SELECT"));
        let columns = target.columns.iter().map(|column| &column.name).chain(&self.provenance).chain(&self.confidence);
        let writes = columns.filter(|_| is_to_write).map(|column| (column, "UPDATE"));
        for (column, right) in writes.chain(reads) {
            let may = sql::one::<bool>(
                "SELECT pg_catalog.has_column_privilege($1, $2, $3, $4)",
                &[owner.into(), target.relation.into(), column.as_str().into(), right.into()],
            )?;
            if may != Some(true) {
                return Err(Error::denied(format!("permission denied for column \"{column}\" of {}", target.name)).hint(
                    "The owner of the job needs SELECT on the key, the target and the input, and UPDATE on the target and on a \
                     confidence column; on a provenance column both.",
                ));
            }
        }
        Ok(())
    }
}

/// The result of the checks before a job is created.
pub struct Checked {
    pub target: Target,
    /// The field of each column; `None` is the whole answer.
    pub fields: Vec<Option<String>>,
    /// The role to run as.
    pub owner: pg_sys::Oid,
    pub asked: Asked,
}

/// One column, filled with the answer.
pub fn one_column(target: Option<&CStr>) -> Result<Vec<(String, Option<String>)>> {
    Ok(vec![(from_name(required(target, "target")?), None)])
}

/// Columns and the field of each.
pub fn several_columns(targets: Option<Json>) -> Result<Vec<(String, Option<String>)>> {
    let targets = required(targets, "targets")?.0;
    let column = |(column, field): (&String, &Value)| Some((column.clone(), Some(field.as_str()?.to_owned())));
    let columns = targets.as_object().filter(|map| !map.is_empty()).and_then(|map| map.iter().map(column).collect());
    columns.ok_or_else(|| {
        Error::invalid("\"targets\" must be a JSON object of columns and fields").hint(
            "Write '{\"topic\": \"category\", \"amount\": \"amount\"}': each column, and the field that fills it.",
        )
    })
}

/// A job runs as its caller. A superuser's job on another role's table runs as that table's owner, since triggers and
/// expressions of others must not run as a superuser.
fn owner_of(target: &Target) -> Result<pg_sys::Oid> {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    let is_superuser = unsafe { pg_sys::superuser_arg(current_user()) };
    let owner = if is_superuser { target.owner } else { current_user() };
    check_login(owner)?;
    Ok(owner)
}

/// Refuses a role that can't own a job.
pub fn check_login(owner: pg_sys::Oid) -> Result<()> {
    let role = sql::row(
        "SELECT r.rolname::pg_catalog.text, r.rolcanlogin FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) $1",
        &[owner.into()],
        |r| Ok((r.get::<String>(1)?, r.get::<bool>(2)?)),
    )?;
    match role {
        Some((_, true)) => Ok(()),
        Some((name, false)) => Err(Error::new(
            PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
            format!("role \"{name}\" cannot own a job because it is not permitted to log in"),
        )
        .hint(format!(
            "The worker of a job connects as the owner of the job. Use ALTER ROLE {} LOGIN, or start the job as another role.",
            sql::name(&name)
        ))),
        None => Err(Error::unknown("the owner of the job does not exist")),
    }
}
