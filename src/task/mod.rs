//! Tasks: what to ask.

pub mod define;

use llm_batch_core::dialect::{Api, Service};
use llm_batch_core::options::{Options, ServiceTier};
use llm_batch_core::task::{Spec, Task};
use llm_batch_gateway::protocol::{Alternative, Policy, Prices, Stream};
use pgrx::datum::JsonB;
use pgrx::prelude::*;
use serde_json::Value;

use crate::args::unknown;
use crate::budget::Price;
use crate::checks::Checks;
use crate::error::{Error, Result};
use crate::process::my_database;
use crate::{price, route, sql};

/// A task and the name of the model it is asked of.
pub struct Known {
    pub task: Task,
    pub model: String,
    /// The task's version; 0 of what has no name.
    pub version: i32,
    pub checks: Option<Checks>,
}

/// Looks a task of any kind up; `options` override its own.
pub fn load(name: &str, options: &Value) -> Result<Known> {
    // Only a task with checks needs its owner: to look it up takes longer than all else of this query.
    let found = sql::row(
        "SELECT t.kind, t.model, t.spec, t.options, t.version, t.search_path,
                CASE WHEN t.options OPERATOR(pg_catalog.?|) ARRAY['check', 'check_hint', 'repair']
                     THEN llm_batch.owner_now(t.owner, t.owner_name, t.home) END AS owner
           FROM llm_batch.task t WHERE t.name OPERATOR(pg_catalog.=) $1",
        &[name.into()],
        |row| {
            let spec = Spec::from_json(&row.get::<String>("kind")?, &row.get::<JsonB>("spec")?.0)?;
            let mut own = row.get::<JsonB>("options")?.0;
            let checks = match Checks::take(&spec, &mut own)? {
                None => None,
                Some(checks) => {
                    let owner = row.maybe("owner")?.ok_or_else(|| ownerless(name))?;
                    Some(checks.of(owner, row.get("search_path")?))
                }
            };
            let options = Options::from_json([&spec.defaults(), &own, options])?;
            Ok(Known { model: row.get("model")?, version: row.get("version")?, task: Task { spec, options }, checks })
        },
    )?;
    found.ok_or_else(|| unknown("task", name))
}

/// Its expressions run with the rights of its owner.
fn ownerless(name: &str) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
        format!("the owner of task \"{name}\" does not exist"),
    )
    .detail("The task has checks, which run with the rights of its owner.")
    .hint("A superuser can give it another one with llm_batch.set_owner('task', …).")
}

/// A task as a stream, with what its model is called and costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub stream: Stream,
    /// The model's or the route's name.
    pub model: String,
    pub version: i32,
    /// The models that may answer, in the order of the stream: their names and prices.
    pub models: Vec<(String, Price)>,
    /// The checks and repairs of its answers.
    pub checks: Option<Checks>,
}

impl Asked {
    /// The same as a stream that spends only what it is allowed to.
    pub fn with_budget(mut self, is_in_dollars: bool) -> Result<Self> {
        let mut dearest = Prices::default();
        if is_in_dollars {
            for (model, price) in &self.models {
                price.check(model)?;
                let rates = price.rates.unwrap_or_default();
                dearest.input = dearest.input.max(rates.input);
                dearest.output = dearest.output.max(rates.output);
            }
        }
        self.stream.budget = Some(dearest);
        Ok(self)
    }

    /// The same for a job that has a deadline: of a route by costs dearer models too, while the cheaper have no room.
    pub fn with_deadline(mut self) -> Self {
        if let Policy::Cheapest { overflows } = &mut self.stream.policy {
            *overflows = true;
        }
        self
    }

    /// The name and the prices of the model at this place.
    pub fn model(&self, place: usize) -> (&str, Option<&Price>) {
        self.models.get(place).map_or((&self.model, None), |(name, price)| (name, Some(price)))
    }
}

impl Known {
    /// The task as a stream on behalf of a role, with the settings of this moment.
    pub fn stream(self, role: pg_sys::Oid, interactive: bool) -> Result<Asked> {
        self.task.check()?;
        self.checks.as_ref().map_or(Ok(()), |checks| checks.may_run_for(role, interactive))?;
        let (models, mut policy) = route::known(&self.model)?;
        let mut rates = Vec::new();
        if let Policy::Cheapest { overflows } = &mut policy {
            // Somebody waits.
            *overflows = interactive;
        }
        let (mut all, mut prices) = (Vec::new(), Vec::new());
        for (name, known) in models {
            let endpoint = crate::provider::endpoint(known.server, role)?;
            check_api(endpoint.api, &name, self.task.service(), self.task.options.service_tier)?;
            let mut price = known.price.through(endpoint.api, &known.model.model);
            if let Policy::Cheapest { .. } = policy {
                rates.push(price.by_kind());
            }
            if self.task.options.service_tier != ServiceTier::Default
                || known.model.parameters.values().any(|v| v == "flex")
            {
                price.flex_discount = price::flex_discount(&endpoint.base_url, &known.model.model)?;
            }
            prices.push((name, price));
            all.push(Alternative { endpoint, model: known.model });
        }
        if self.task.spec.embeds().is_some() {
            route::check_vectors(&self.model, all.iter().map(|one| one.model.model.as_str()))?;
        }
        let mut all = all.into_iter();
        let Some(Alternative { endpoint, model }) = all.next() else { return Err(unknown("model", &self.model)) };
        let stream = Stream {
            database: my_database(),
            role: role.to_u32(),
            interactive,
            endpoint,
            model,
            others: all.collect(),
            policy,
            rates,
            task: self.task,
            budget: None,
        };
        Ok(Asked { stream, model: self.model, version: self.version, models: prices, checks: self.checks })
    }
}

/// Refuses what a model's provider does not serve.
fn check_api(api: Api, model: &str, service: Service, tier: ServiceTier) -> Result<()> {
    let refuse = |what: &str| {
        let message = format!("the API \"{}\" of model \"{model}\" serves no {what}", api.name());
        Error::new(PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, message)
    };
    if !api.serves(service) {
        let hint = match service {
            Service::Chat if api.serves(Service::Decisions) => {
                "Classifiers, scorers and llm_filter() are asked there with the option \"ask_by\": \"decisions\"; for other tasks name a model of another server."
            }
            _ => "Name a model of another server.",
        };
        return Err(refuse(service.name()).hint(hint));
    }
    if tier != ServiceTier::Default && api.dialect().tier_parameter().is_none() {
        let with: Vec<&str> =
            Api::ALL.iter().filter(|api| api.dialect().tier_parameter().is_some()).map(|a| a.name()).collect();
        return Err(refuse("tier \"flex\"").hint(format!(
            "Leave out the option \"service_tier\", or name a model of a server with one of these APIs: {}.",
            with.join(", ")
        )));
    }
    Ok(())
}
