//! Tasks made, altered and dropped.

use llm_batch_core::dialect::Service;
use llm_batch_core::options::ServiceTier;
use llm_batch_core::task::{Spec, Task, Type, noun};
use pgrx::datum::{DatumWithOid, JsonB};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::{Value, json};

use super::check_api;
use crate::args::{a, exists, new_name, required, unknown, wrong_kind};
use crate::checks::Checks;
use crate::client::check_here;
use crate::error::{Error, Result};
use crate::json::Json;
use crate::options::check_of_task;
use crate::process::current_user;
use crate::{changes, model, names, owner, route, sql, txn};

fn kind_of(name: &str) -> Result<String> {
    let kind = sql::one::<String>(
        "SELECT t.kind FROM llm_batch.task t WHERE t.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
    )?;
    kind.ok_or_else(|| unknown("task", name))
}

/// The columns of a task's row.
struct Stored {
    spec: Value,
    options: Value,
}

impl Stored {
    /// Adds the members that a user gives and that are not NULL. Options that belong to the specification of the kind
    /// go there; options that are given replace all that there were.
    fn with(mut self, kind: &str, members: Value, options: Option<Json>) -> Result<Self> {
        let (Value::Object(spec), Value::Object(members)) = (&mut self.spec, members) else {
            return Err(Error::invalid("a task's specification must be an object"));
        };
        spec.extend(members.into_iter().filter(|(_, value)| !value.is_null()));
        if let Some(Json(mut options)) = options.filter(|options| !options.0.is_null()) {
            for key in Spec::options(kind)? {
                spec.remove(*key);
                if let Some(value) = options.as_object_mut().and_then(|options| options.remove(*key)) {
                    spec.insert((*key).to_owned(), value);
                }
            }
            self.options = options;
        }
        Ok(self)
    }

    /// As it is stored. Members may name one another, such as examples labels, so all of it is checked together.
    /// Expressions are looked at as the owner.
    fn checked(self, kind: &str, owner: Option<pg_sys::Oid>, search_path: &str) -> Result<Self> {
        let spec = Spec::from_json(kind, &self.spec)?;
        check_time_zones(&spec)?;
        let mut options = self.options.clone();
        let checks = Checks::take(&spec, &mut options)?;
        let own = Spec::options(kind)?.join(", ");
        let options = check_of_task(&options).map_err(|e| match &e.hint {
            // Options of the kind are valid too.
            Some(hint) if !own.is_empty() => {
                let hint = hint.replacen("options are: ", &format!("options are: {own}, "), 1);
                e.hint(hint)
            }
            _ => e,
        })?;
        let task = Task { spec, options };
        task.check()?;
        if let Some(checks) = checks {
            let owner = owner.ok_or_else(|| Error::unknown("the owner of the task does not exist"))?;
            checks.of(owner, search_path.to_owned()).look()?;
        }
        let mut spec = serde_json::to_value(task.spec).unwrap_or_default();
        if let Some(spec) = spec.as_object_mut() {
            spec.shift_remove("kind");
        }
        Ok(Self { spec, options: self.options })
    }
}

/// Postgres would refuse each time without an offset that is read in a zone it does not know.
fn check_time_zones(spec: &Spec) -> Result<()> {
    let zones: Vec<&str> = spec.time_zones();
    if zones.is_empty() {
        return Ok(());
    }
    let unknown = sql::one::<String>(
        "SELECT u.zone FROM pg_catalog.unnest($1::pg_catalog.text[]) u (zone)
          WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_timezone_names z
                             WHERE pg_catalog.lower(z.name) OPERATOR(pg_catalog.=) pg_catalog.lower(u.zone)) LIMIT 1",
        &[zones.into()],
    )?;
    unknown.map_or(Ok(()), |zone| {
        Err(Error::invalid(format!("time zone \"{zone}\" does not exist"))
            .hint("The view pg_timezone_names lists time zones, such as Europe/Berlin."))
    })
}

/// The provider's service that tasks of a kind with these options ask, and at which tier. Options that are none are refused
/// elsewhere.
pub fn service(kind: &str, options: &Value) -> (Service, ServiceTier) {
    let tier = serde_json::from_value(options["service_tier"].clone()).unwrap_or_default();
    (Task::service_of(kind, serde_json::from_value(options["ask_by"].clone()).unwrap_or_default()), tier)
}

fn check_model(name: &str, (service, tier): (Service, ServiceTier)) -> Result<()> {
    let mut models = Vec::new();
    for (model, known) in route::known(name)?.0 {
        check_api(crate::provider::endpoint(known.server, current_user())?.api, &model, service, tier)?;
        models.push(known.model.model);
    }
    if service == Service::Embeddings { route::check_vectors(name, models.iter().map(String::as_str)) } else { Ok(()) }
}

/// Creates a task. `members`: those of its specification, NULL for what is not given.
pub fn create(
    kind: &str,
    name: Option<&str>,
    members: Value,
    model: Option<&str>,
    options: Option<Json>,
) -> Result<()> {
    let search_path = txn::search_path()?;
    txn::with_settings(txn::OWN_PATH, || create_under(kind, name, members, model, options, &search_path))
}

fn create_under(
    kind: &str,
    name: Option<&str>,
    members: Value,
    model: Option<&str>,
    options: Option<Json>,
    search_path: &str,
) -> Result<()> {
    check_here()?;
    let name = new_name(name)?;
    let model = match model {
        Some(model) => model.to_owned(),
        None => model::default(None)?,
    };
    let none = Stored { spec: json!({}), options: json!({}) };
    let stored = none.with(kind, members, options)?.checked(kind, Some(current_user()), search_path)?;
    check_model(&model, service(kind, &stored.options))?;
    if let Ok(kind) = kind_of(name) {
        return Err(exists("task", name, noun(&kind)));
    }
    let args: Vec<DatumWithOid> = vec![
        name.into(),
        current_user().into(),
        kind.into(),
        model.as_str().into(),
        JsonB(stored.spec).into(),
        JsonB(stored.options).into(),
        search_path.into(),
    ];
    let before = txn::as_extension_owner(|| {
        names::hold(&model)?;
        let made = sql::run(
            "INSERT INTO llm_batch.task (name, owner, owner_name, home, kind, model, spec, options, search_path)
             VALUES ($1, $2, pg_get_userbyid($2), llm_batch.home(), $3, $4, $5, $6, $7) ON CONFLICT (name) DO NOTHING RETURNING 1",
            &args,
        )?;
        if made == 0 {
            return Err(exists("task", name, noun(kind)));
        }
        // A statement of its own: the one above may have waited for who dropped the last one of this name.
        sql::rows_mut(
            "UPDATE llm_batch.task SET version = h.version + 1
               FROM (SELECT * FROM llm_batch.task_history WHERE name = $1 ORDER BY version DESC LIMIT 1) h
              WHERE task.name = $1 RETURNING llm_batch.owner_now(h.owner, h.owner_name, h.home)",
            &[name.into()],
            |row| row.maybe::<pg_sys::Oid>(1),
        )
    })?;
    if before.into_iter().all(owner::is_mine) {
        return Ok(());
    }
    Err(Error::denied(format!("task \"{name}\" was another role's before it was dropped"))
        .detail("Jobs of other roles may name it, and would ask the new one.")
        .hint("Choose another name, or let the owner of the dropped task or a superuser create it."))
}

/// Keeps a task's version before another one takes its place.
fn keep(name: &str) -> Result<()> {
    sql::run(
        "INSERT INTO llm_batch.task_history (name, version, owner, owner_name, home, kind, model, spec, options, search_path)
         SELECT name, version, owner, owner_name, home, kind, model, spec, options, search_path FROM llm_batch.task WHERE name = $1",
        &[name.into()],
    )
    .map(|_| ())
}

/// The model and the options of a task.
fn asked_before(name: &str) -> Result<(String, Value)> {
    let found = sql::row(
        "SELECT t.model, t.options FROM llm_batch.task t WHERE t.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
        |row| Ok((row.get::<String>("model")?, row.get::<JsonB>("options")?.0)),
    )?;
    found.ok_or_else(|| unknown("task", name))
}

/// Makes the next version of a task. `members` as of [`create`].
pub fn alter(kind: &str, name: Option<&str>, members: Value, model: Option<&str>, options: Option<Json>) -> Result<()> {
    let search_path = txn::search_path()?;
    txn::with_settings(txn::OWN_PATH, || alter_under(kind, name, members, model, options, search_path))
}

fn alter_under(
    kind: &str,
    name: Option<&str>,
    members: Value,
    model: Option<&str>,
    options: Option<Json>,
    search_path: String,
) -> Result<()> {
    let name = required(name, "name")?;
    owner::check("task", name)?;
    let is = kind_of(name)?;
    if is != kind {
        let is = noun(&is);
        return Err(wrong_kind(name, kind).hint(format!("It is {}: change it with llm_batch.alter_{is}().", a(is))));
    }
    let (model_before, options_before) = asked_before(name)?;
    let service = service(kind, options.as_ref().map(|o| &o.0).filter(|o| !o.is_null()).unwrap_or(&options_before));
    if model.is_some() || (options.is_some() && service != (Service::Chat, ServiceTier::Default)) {
        check_model(model.unwrap_or(&model_before), service)?;
    }
    txn::as_extension_owner(|| {
        let now = sql::rows_mut(
            "SELECT spec, options, search_path, llm_batch.owner_now(owner, owner_name, home) AS owner
               FROM llm_batch.task WHERE name = $1 AND kind = $2 FOR UPDATE",
            &[name.into(), kind.into()],
            |row| {
                let stored = Stored { spec: row.get::<JsonB>("spec")?.0, options: row.get::<JsonB>("options")?.0 };
                Ok((stored, row.get::<String>("search_path")?, row.maybe::<pg_sys::Oid>("owner")?))
            },
        )?;
        let (now, path_before, owner) = now.into_iter().next().ok_or_else(|| unknown("task", name))?;
        // Expressions are read as where they were written.
        let search_path = if options.is_some() { search_path } else { path_before };
        let before = shape(kind, &now.spec)?;
        let new = now.with(kind, members, options)?.checked(kind, owner, &search_path)?;
        if shape(kind, &new.spec)? != before {
            // Answers by the old fields may still be on their way.
            refuse_in_use(name, "change the fields of")?;
        }
        keep(name)?;
        model.map_or(Ok(()), names::hold)?;
        sql::run(
            "UPDATE llm_batch.task SET model = coalesce($2, model), spec = $3, options = $4, search_path = $5, version = version + 1
              WHERE name = $1",
            &[name.into(), model.into(), JsonB(new.spec).into(), JsonB(new.options).into(), search_path.into()],
        )?;
        changes::tell();
        Ok(())
    })
}

/// The values of an answer: their names and types.
fn shape(kind: &str, spec: &Value) -> Result<Vec<(String, Type, bool)>> {
    let spec = Spec::from_json(kind, spec)?;
    // Vectors of another length are of another type.
    let length = spec.embeds().map_or(String::new(), |embed| format!(" {}", embed.dimensions));
    Ok(spec.columns().into_iter().map(|c| (c.name + &length, c.of, c.is_array)).collect())
}

/// Refuses to do something with a task that an unfinished job uses.
fn refuse_in_use(name: &str, what: &str) -> Result<()> {
    let job = sql::one::<i64>(
        "SELECT job_id FROM llm_batch.progress WHERE task = $1 AND status IN ('running', 'paused') ORDER BY 1",
        &[name.into()],
    )?;
    job.map_or(Ok(()), |job| {
        Err(Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            format!("cannot {what} task \"{name}\" because job {job} uses it"),
        )
        .hint(format!("Wait for the job, or end it with llm_batch.cancel({job}).")))
    })
}

/// The result of a function that makes or changes a task.
pub type Made = std::result::Result<(), ErrorReport>;

#[pg_extern(sql = false)]
fn drop_task(name: Option<&str>) -> Made {
    let name = required(name, "name")?;
    owner::check("task", name)?;
    txn::as_extension_owner(|| {
        refuse_in_use(name, "drop")?;
        keep(name)?;
        sql::run("DELETE FROM llm_batch.task WHERE name = $1", &[name.into()])
    })?;
    Ok(())
}
