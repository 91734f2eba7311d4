//! What a stream asks, where, and at what prices.

use std::fmt;
use std::rc::Rc;

use llm_batch_core::dialect::decisions::Decisions;
use llm_batch_core::dialect::embeddings::Embeddings;
use llm_batch_core::dialect::{Api, Counts, Service};
use llm_batch_core::limiter::Limits;
use llm_batch_core::options::ServiceTier;
use llm_batch_core::route::Rates;
use llm_batch_core::task::{Embed, Task};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Most bytes of a row's text that can matter to a model with this limit of a request: what is longer is too long for
/// certain (a token of prose has four bytes), and need not be carried around. With the limit at its most, a frame of
/// one such text fits even if every byte of it is escaped.
pub fn most_text(max_request_tokens: u64) -> usize {
    max_request_tokens.min(MAX_REQUEST_TOKENS) as usize * 16 + 1
}

/// Most that `max_request_tokens` may be.
pub const MAX_REQUEST_TOKENS: u64 = 131_072;

/// A key that is never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// The target of requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Which wire it speaks.
    #[serde(default)]
    pub api: Api,
    /// The version of it, where the wire has several and it is not the usual one.
    pub api_version: Option<String>,
    /// Such as `https://api.openai.com/v1`; the dialect adds what follows.
    pub base_url: String,
    /// A superuser owns the server, so that requests may go to any address. Otherwise names of this machine and of
    /// metadata services lead nowhere.
    pub is_trusted: bool,
    /// `http://` may lead to private addresses, not to this machine alone.
    pub allow_http: bool,
    /// A file with the certificates of those who may sign the endpoint's, in PEM form; by default those that the operating
    /// system knows.
    pub ca_file: Option<String>,
    /// Whose limits these are; by default the URL and the key.
    pub account: Option<String>,
    /// The key, if the endpoint wants one.
    pub api_key: Option<Secret>,
    /// The tokens that it counts against its limit.
    pub counts: Counts,
}

/// Which model, and how much may be asked of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// The provider's name of it.
    pub model: String,
    /// Requests a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens a minute, prompts and answers together.
    pub tokens_per_minute: Option<u64>,
    /// Tokens of prompts a minute.
    pub input_tokens_per_minute: Option<u64>,
    /// Tokens of answers a minute.
    pub output_tokens_per_minute: Option<u64>,
    /// Texts a minute, however many of them a request has.
    pub inputs_per_minute: Option<u64>,
    /// Most requests at the same time.
    pub max_concurrent_requests: Option<u32>,
    /// Time that one request may take, ms.
    pub request_timeout_ms: u64,
    /// Most tokens of one request, prompt and answer together.
    pub max_request_tokens: u64,
    /// Further parameters of each request, such as `temperature`.
    pub parameters: Map<String, Value>,
    /// Its prices, if they are known.
    #[serde(default)]
    pub prices: Option<Prices>,
}

/// A further model of a stream, and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// Its endpoint.
    pub endpoint: Endpoint,
    /// Which model.
    pub model: Model,
}

/// Which of a stream's models takes its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The first that is not down and has not stopped.
    #[default]
    Failover,
    /// Whichever has room in its limits first.
    Spread,
    /// The one whose rows cost least, of those that are not down and have not stopped.
    Cheapest {
        /// Dearer ones take rows while the cheaper have no room.
        overflows: bool,
    },
}

/// Most models of a stream.
pub const MOST_MODELS: usize = 16;

/// A stream: all that rows need to have in common to share a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// The database's oid.
    pub database: u32,
    /// The oid of the role on whose behalf is asked.
    pub role: u32,
    /// Someone waits for the answer: goes before all jobs.
    pub interactive: bool,
    /// The first model's endpoint.
    pub endpoint: Endpoint,
    /// Which model.
    pub model: Model,
    /// Further models that may answer in its place, at most [`MOST_MODELS`] with it. One of the same account and model as
    /// another before it is left out: it has the same limits.
    #[serde(default)]
    pub others: Vec<Alternative>,
    /// Which of them takes rows.
    #[serde(default)]
    pub policy: Policy,
    /// The prices of its models, in their order, where the policy compares them.
    #[serde(default)]
    pub rates: Vec<Rates>,
    /// The task to ask.
    pub task: Task,
    /// With prices, nothing is sent beyond what `Allow` has granted since the stream was opened, and its rows share
    /// requests with nobody's; without, the stream spends what it takes.
    pub budget: Option<Prices>,
}

impl Stream {
    /// For each of its models, a stream of that one alone.
    pub(crate) fn alone(self: &Rc<Self>) -> Vec<Rc<Self>> {
        if self.others.is_empty() {
            return vec![Rc::clone(self)];
        }
        let first = Alternative { endpoint: self.endpoint.clone(), model: self.model.clone() };
        let alone = |Alternative { endpoint, model }: Alternative| {
            let (others, policy, rates) = Default::default();
            Rc::new(Self { endpoint, model, others, policy, rates, task: self.task.clone(), ..**self })
        };
        std::iter::once(first).chain(self.others.iter().cloned()).map(alone).collect()
    }

    /// The same stream by decisions, if it may ask its model so or in a chat.
    pub(crate) fn decided(&self) -> Option<Rc<Self>> {
        self.endpoint.api.dialect().decisions()?;
        let task = self.task.decided()?;
        Some(Rc::new(Self { task, ..self.clone() }))
    }

    /// The tier at which its chats are asked. A model whose parameters say "flex" has it for all tasks.
    pub fn tier(&self) -> ServiceTier {
        let Some(parameter) = self.endpoint.api.dialect().tier_parameter() else { return ServiceTier::Default };
        match self.task.options.service_tier {
            _ if self.task.service() != Service::Chat => ServiceTier::Default,
            ServiceTier::Default if self.model.parameters.get(parameter).is_some_and(|tier| tier == "flex") => {
                ServiceTier::Flex
            }
            tier => tier,
        }
    }

    /// The limits of its model.
    pub fn limits(&self) -> Limits {
        let model = &self.model;
        let of_provider = || self.embeddings()?.1.inputs_per_minute(model.requests_per_minute);
        Limits {
            requests_per_minute: model.requests_per_minute,
            tokens_per_minute: model.tokens_per_minute,
            input_tokens_per_minute: model.input_tokens_per_minute,
            output_tokens_per_minute: model.output_tokens_per_minute,
            inputs_per_minute: model.inputs_per_minute.or_else(of_provider),
        }
    }

    /// The embedder and the dialect's embeddings, if vectors are asked for.
    pub(crate) fn embeddings(&self) -> Option<(&Embed, &'static dyn Embeddings)> {
        Some((self.task.spec.embeds()?, self.endpoint.api.dialect().embeddings()?))
    }

    /// The decisions that it asks for, if it does.
    pub(crate) fn decisions(&self) -> Option<&'static dyn Decisions> {
        self.endpoint.api.dialect().decisions().filter(|_| self.task.service() == Service::Decisions)
    }

    /// Most tokens of a request, prompt and answer. For vectors that is the provider's; what is set for the model bounds a
    /// text.
    pub(crate) fn most_tokens(&self) -> u64 {
        self.embeddings()
            .map_or(self.model.max_request_tokens, |(_, embeddings)| embeddings.most_tokens(&self.model.model))
    }
}

/// The price of a token, in picodollars (10^-12 $; a price of $1 per million tokens is 1,000,000 of them).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Prices {
    /// A token of a prompt that the provider had not cached; one that it writes into its cache, if that costs more.
    pub input: u64,
    /// A token of an answer.
    pub output: u64,
}

impl Prices {
    /// The price of so many tokens, or of what is expected in the mean, in picodollars.
    pub(crate) fn cost(self, input: f64, output: f64) -> f64 {
        input * self.input as f64 + output * self.output as f64
    }
}
