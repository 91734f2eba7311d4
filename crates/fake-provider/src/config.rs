//! The configuration: limits, latency, faults.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;

use crate::Fault;
use crate::amounts::Caps;

/// Everything that can be set. All but `listen` may change at run time through
/// [`FakeProvider::configure`](crate::FakeProvider::configure).
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to listen on; port 0 picks a free one. Default `127.0.0.1:0`.
    pub listen: SocketAddr,
    /// The bearer token asked for; any other, or none, gets 401. `None` asks for nothing.
    pub api_key: Option<String>,
    /// The models served; any other gets 404 `model_not_found`. `None` serves every name.
    pub models: Option<Vec<String>>,
    /// The kind of limiter.
    pub limiter: Limiter,
    /// The time all limits are given for. Default 60 s.
    pub window: Duration,
    /// Most tokens charged in a window; `None` is no limit.
    pub tokens_per_window: Option<u64>,
    /// Most prompt tokens in a window; `None` is no limit.
    pub input_tokens_per_window: Option<u64>,
    /// Most completion tokens in a window, charged at admission as the answer
    /// will have them; `None` is no limit.
    pub output_tokens_per_window: Option<u64>,
    /// Most requests admitted in a window; `None` is no limit.
    pub requests_per_window: Option<u64>,
    /// Another client that uses the same limits. Default none.
    pub other_client: Option<OtherClient>,
    /// The tokens that a request is charged against `tokens_per_window`.
    pub reserve: Reserve,
    /// Once a request has its answer, lower its charge to what it used. Matters
    /// where `reserve` charges more than that. Default false.
    pub release: bool,
    /// The form in which the 429 of a full limit gives the wait.
    pub retry_after: RetryAfter,
    /// Which headers tell of the limits that are set.
    pub rate_headers: RateHeaders,
    /// Time that an answer takes.
    pub latency: Latency,
    /// Accept `response_format` of type `json_schema`; otherwise 400. Default true.
    pub json_schema: bool,
    /// Accept `response_format` of type `json_object`; otherwise 400. Default true.
    pub json_object: bool,
    /// Accept `encoding_format` of base64 for embeddings; otherwise 400. Default true.
    pub base64: bool,
    /// Accept `dimensions` for embeddings; otherwise 400. Default true.
    pub dimensions: bool,
    /// Serve decisions; otherwise 404. Default true.
    pub decisions: bool,
    /// Most questions of a request, and most choices of one; above them, 400. Default 200 and 255.
    pub max_questions: usize,
    /// See `max_questions`.
    pub max_choices: usize,
    /// Accept messages of the system; otherwise 400. Default true.
    pub system_role: bool,
    /// Accept `max_tokens`; otherwise 400 asking for `max_completion_tokens`. Default true.
    pub max_tokens_param: bool,
    /// Bills tell of cached prompts: requests whose system message, of 1,024
    /// tokens or more, was in an admitted request before. Charges and latency
    /// stay the same. Default false.
    pub cache_prefix: bool,
    /// Tokens that the model spends before it answers; they count against the maximum asked for. Default 0.
    pub thinking_tokens: u64,
    /// Bills tell of those tokens. Default false.
    pub tells_thinking: bool,
    /// Most tokens of an answer that may be asked for; above it, 400. `None` is no limit.
    pub max_answer_tokens: Option<u64>,
    /// Most bytes of a row's line; with a longer one the request gets a 400. `None` is no limit.
    pub max_row_bytes: Option<usize>,
    /// Most tokens of the prompt plus the maximum asked for (when one is); above it,
    /// 400 `context_length_exceeded`. `None` is no limit.
    pub context_tokens: Option<u64>,
    /// Probability (0 to 1) of each fault per request. At most one applies to a
    /// request, so the probabilities should add up to 1 or less.
    pub faults: Vec<(Fault, f64)>,
    /// These befall requests for models whose names begin so; `None` is all.
    pub faulty: Option<String>,
    /// Lines at the beginning of every head of a chat answer, each ended by CRLF: whatever a server might say there.
    pub extra_head: Vec<u8>,
    /// A text that breaks the server: requests whose body has it get a 500.
    pub poison: Option<String>,
    /// Seed of every random choice. A new seed given at run time has no effect.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            api_key: None,
            models: None,
            limiter: Limiter::Rolling,
            window: Duration::from_secs(60),
            tokens_per_window: None,
            input_tokens_per_window: None,
            output_tokens_per_window: None,
            requests_per_window: None,
            other_client: None,
            reserve: Reserve::Actual,
            release: false,
            retry_after: RetryAfter::Both,
            rate_headers: RateHeaders::OpenAi,
            latency: Latency::default(),
            json_schema: true,
            json_object: true,
            base64: true,
            dimensions: true,
            decisions: true,
            max_questions: 200,
            max_choices: 255,
            system_role: true,
            max_tokens_param: true,
            cache_prefix: false,
            thinking_tokens: 0,
            tells_thinking: false,
            max_answer_tokens: None,
            max_row_bytes: None,
            context_tokens: None,
            faults: Vec::new(),
            faulty: None,
            extra_head: Vec::new(),
            poison: None,
            seed: 1,
        }
    }
}

impl Config {
    /// The limits, by `Limit as usize`.
    pub(crate) fn caps(&self) -> Caps {
        [self.tokens_per_window, self.input_tokens_per_window, self.output_tokens_per_window, self.requests_per_window]
    }
}

/// A kind of limiter. Names on the command line and in `/control` are those of the variants, in lower case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Limiter {
    /// No window, wherever it begins, has more than the limit.
    #[default]
    Rolling,
    /// A token bucket: it holds a window's worth, starts full and refills
    /// evenly, a window's worth in a window's time.
    Bucket,
}

/// Another client on the same account. Its requests are evenly spaced, are
/// charged like ours, and are not in the counts of ours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OtherClient {
    /// The part (0 to 1, or more) it takes of the token limit, and likewise of
    /// those of input and output tokens. Default 0.
    pub share: f64,
    /// Tokens of each of its requests. Default 1,000.
    pub request_tokens: u64,
    /// When it begins, counted from our first chat request after it was set.
    /// Default 0.
    pub after: Duration,
    /// Its requests are always charged, even where there is no room for them.
    /// Otherwise it is refused like us and tries again every 100 ms. Default true.
    pub insists: bool,
}

impl Default for OtherClient {
    fn default() -> Self {
        Self { share: 0.0, request_tokens: 1_000, after: Duration::ZERO, insists: true }
    }
}

/// Tokens charged at admission. [`Config::release`] corrects the charge afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reserve {
    /// The prompt and the completion the request will get.
    #[default]
    Actual,
    /// The prompt and the maximum asked for (the completion if none is).
    PromptPlusMax,
    /// The larger of the prompt and the maximum asked for.
    Max,
}

/// The headers about limits, sent with every admission and every refusal of a
/// full limit. The limit told is that of a minute; what remains is what is really
/// left after the request's charge. Names on the command line and in `/control`
/// are those of the variants, in lower case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RateHeaders {
    /// None at all.
    None,
    /// `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; the reset is the
    /// time until all is there again: `6m0s`.
    #[default]
    OpenAi,
    /// `anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,
    /// remaining,reset}`; remaining tokens are rounded to thousands, the reset is
    /// the time (RFC 3339) when all is there again.
    Anthropic,
    /// `x-ratelimit-{limit,remaining}-{req,tokens}-minute` and
    /// `x-ratelimit-tokens-query-cost`, the tokens charged.
    Mistral,
    /// `x-ratelimit-{limit,remaining}-{requests,tokens}`; what remains may be
    /// less than nothing.
    Azure,
}

/// The form in which the 429 of a full limit gives the wait, rounded up. Names on the command line and in `/control`
/// are `none`, `seconds`, `both` and `date`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RetryAfter {
    /// Not at all.
    None,
    /// `retry-after` in seconds.
    Seconds,
    /// `retry-after` in seconds, and `retry-after-ms`.
    #[default]
    Both,
    /// `retry-after` as a date, to be compared with the header `date`.
    #[serde(rename = "date")]
    HttpDate,
}

/// Time that an admitted request takes: `(base + per_output_token * completion tokens) * factor`. Refusals (4xx, 5xx)
/// are immediate. Default: no delay.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    /// Delay of every answer.
    pub base: Duration,
    /// Further delay for each completion token.
    pub per_output_token: Duration,
    /// Sigma of the lognormal factor, whose median is 1. 0 is no spread.
    pub spread: f64,
}
