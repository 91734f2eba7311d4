//! The life of a chat request up to its admission.

use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::{Value, json};

use crate::amounts::{Amounts, Limit};
use crate::answer::{self, Answer};
use crate::date::{go_duration, unix_time};
use crate::decisions::Questions;
use crate::embeddings::{self, Texts};
use crate::headers::{Header, Standing, per_minute, rate_headers, retry_headers};
use crate::http::Request;
use crate::limits::Full;
use crate::prompt::Task;
use crate::reply::Reply;
use crate::request::{Chat, Format};
use crate::state::State;
use crate::wire::{self, Wire};
use crate::{Config, Fault, RateHeaders, Reserve};

/// The answers that a request asks for.
enum Wanted {
    Chat,
    Vectors(Texts),
    Decisions(Questions),
}

/// The decision about a request.
pub(crate) enum Verdict {
    /// Refused: send this at once.
    Refused(Reply),
    /// Refused by what this fault does to the connection.
    Broken(Fault),
    Admitted(Box<Admitted>),
}

/// A request that was let in and charged.
pub(crate) struct Admitted {
    pub(crate) reply: Reply,
    /// Time until the answer.
    pub(crate) delay: Duration,
    /// The fault that applies, if any.
    pub(crate) fault: Option<Fault>,
    pub(crate) rows: u64,
    pub(crate) prompt_tokens: u64,
    /// Of those, the ones that were cached, and those that were written into the cache.
    pub(crate) cached_tokens: [u64; 2],
    /// The admission's number in the limits, and the tokens charged there.
    pub(crate) charge: (u64, u64),
    pub(crate) answer: Answer,
}

impl State {
    /// Takes a chat request in: checks it, draws its fault, holds it against
    /// the limits, and bills it (unless it hangs).
    pub(crate) fn judge(&mut self, (wire, model): (&dyn Wire, Option<&str>), request: &Request) -> Verdict {
        let now = Instant::now();
        self.tally.arrived(now);
        self.limits.arrived(now);
        let (chat, wanted) = match self.read((wire, model), request) {
            Ok(checked) => checked,
            Err(reply) => return Verdict::Refused(reply),
        };

        if self.config.poison.as_ref().is_some_and(|poison| contains(&request.body, poison.as_bytes())) {
            return Verdict::Refused(Reply::error(500, "server_error", "", "", "The server had an error."));
        }
        let applies = |fault: &Fault| *fault != Fault::NoCapacity429 || chat.is_flex;
        let scripted = self.script.front().filter(|fault| fault.as_ref().is_none_or(applies)).cloned();
        let mut fault = scripted.clone().unwrap_or_else(|| self.draw_fault(&chat.model)).filter(applies);
        if let Some(fault) = fault.as_ref().filter(|fault| fault.refuses()) {
            self.script.pop_front();
            self.tally.fault(fault.name());
            return match refusal(fault, &chat.model) {
                Some(reply) => Verdict::Refused(reply),
                None => Verdict::Broken(fault.clone()),
            };
        }

        let task = Task::read(&chat);
        let enforced = match &chat.format {
            Format::JsonSchema { strict: true, codes } => Some(codes.as_slice()),
            _ => None,
        };
        let rng = &mut self.rng;
        let (answer, decisions) = match &wanted {
            Wanted::Vectors(_) => (embeddings::answer(&task), Vec::new()),
            Wanted::Decisions(questions) => questions.answer(&task, &mut fault, rng),
            Wanted::Chat => {
                let thinking = self.config.thinking_tokens;
                (answer::compose(&task, enforced, chat.max_tokens, thinking, &mut fault, rng), Vec::new())
            }
        };
        let charge = charge(self.config.reserve, &chat, &answer);
        let style = wire.headers(self.config.rate_headers).0;
        let number = match self.admit(now, charge, &chat.model, style) {
            Ok(number) => number,
            // The script's entry waits for a request that is let in.
            Err(reply) => return Verdict::Refused(reply),
        };
        if scripted.is_some() {
            self.script.pop_front();
        }

        self.tally.admitted(now, charge[Limit::Tokens as usize], &task);
        if let Some(fault) = &fault {
            self.tally.fault(fault.name());
        }
        let cached_tokens = match self.config.cache_prefix {
            true => self.prefixes.cached(&chat.system, chat.system_tokens),
            false => [0; 2],
        };
        if fault != Some(Fault::Hang) {
            self.tally.billed(chat.prompt_tokens, cached_tokens, &answer);
            if chat.is_flex {
                self.tally.billed_as_flex(chat.prompt_tokens, &answer);
            }
        }
        let mut reply = match &wanted {
            Wanted::Vectors(texts) => texts.reply(&chat, fault.as_ref(), &mut self.rng),
            Wanted::Decisions(questions) => questions.reply(&decisions, cached_tokens[0], fault.as_ref()),
            Wanted::Chat => self.completion(&chat, (cached_tokens, wire.tells_writes()), &answer, fault.as_ref()),
        };
        reply.headers.extend(self.rate_headers(now, charge, style));
        Verdict::Admitted(Box::new(Admitted {
            reply,
            delay: self.delay(answer.completion_tokens),
            fault,
            rows: task.rows.len() as u64,
            prompt_tokens: chat.prompt_tokens,
            cached_tokens,
            charge: (number, charge[Limit::Tokens as usize]),
            answer,
        }))
    }

    /// Reads a request: as a chat, and the form of the wanted answer.
    fn read(&mut self, (wire, model): (&dyn Wire, Option<&str>), request: &Request) -> Result<(Chat, Wanted), Reply> {
        let body: Value =
            serde_json::from_slice(&request.body).map_err(|_| Reply::invalid("", "", "the body is not JSON"))?;
        let asked =
            authorized(&self.config, wire::key(wire, request)).and_then(|()| asked(wire, request, model, &body));
        let chat = asked.and_then(|asked| {
            if wire.embeds(&request.path).is_some() {
                Texts::read(&asked, &self.config).map(|texts| (texts.as_chat(), Wanted::Vectors(texts)))
            } else if wire.decides(&request.path) {
                Questions::read(&asked, &self.config).map(|all| (all.as_chat(), Wanted::Decisions(all)))
            } else {
                Chat::read(&asked, &mut self.counts).map(|chat| (chat, Wanted::Chat))
            }
        });
        self.keep_body(body);
        let (chat, wanted) = chat?;
        check(&self.config, &chat).map(|()| (chat, wanted))
    }

    /// One draw, so that the configured probabilities are those of the outcome.
    fn draw_fault(&mut self, model: &str) -> Option<Fault> {
        if self.config.faulty.as_ref().is_some_and(|faulty| !model.starts_with(faulty)) {
            return None;
        }
        let mut left = self.rng.f64();
        for (fault, probability) in &self.config.faults {
            if left < *probability {
                return Some(fault.clone());
            }
            left -= probability;
        }
        None
    }

    fn admit(&mut self, now: Instant, charge: Amounts, model: &str, style: RateHeaders) -> Result<u64, Reply> {
        let config = &self.config;
        let full = match self.limits.admit(now, config, charge) {
            Ok(number) => return Ok(number),
            Err(full) => full,
        };
        let (Full::TooLarge(limit) | Full::For(limit, _)) = full;
        let cap = config.caps()[limit as usize].unwrap_or_default();
        let asked = charge[limit as usize];
        let kind = if limit == Limit::Requests { "requests" } else { "tokens" };
        let (wait, message) = match full {
            Full::TooLarge(_) => (None, too_large(model, limit, cap, asked)),
            Full::For(_, wait) => {
                let used = self.limits.used(config, limit);
                (Some(wait), rate_limited(model, limit, cap, used, asked, wait))
            }
        };
        let mut reply = Reply::error(429, kind, "", "rate_limit_exceeded", &message);
        reply.headers.extend(wait.map(|wait| retry_headers(config.retry_after, wait)).unwrap_or_default());
        reply.headers.extend(self.rate_headers(now, charge, style));
        Err(reply)
    }

    /// The state of the limits, as of the last admission or refusal.
    fn rate_headers(&self, now: Instant, charge: Amounts, style: RateHeaders) -> Vec<Header> {
        let config = &self.config;
        let caps = config.caps();
        rate_headers(style, charge[Limit::Tokens as usize], |limit| {
            let cap = caps[limit as usize]?;
            Some(Standing {
                per_minute: per_minute(cap, config.window),
                left: signed(cap).saturating_sub(signed(self.limits.used(config, limit))),
                full_in: self.limits.full_in(now, config, limit),
            })
        })
    }

    fn delay(&mut self, completion_tokens: u64) -> Duration {
        let latency = self.config.latency;
        let plain = latency.base.as_secs_f64() + latency.per_output_token.as_secs_f64() * completion_tokens as f64;
        let seconds = plain * lognormal(&mut self.rng, latency.spread);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO)
    }

    fn completion(
        &mut self,
        chat: &Chat,
        ([cached, written], tells_writes): ([u64; 2], bool),
        answer: &Answer,
        fault: Option<&Fault>,
    ) -> Reply {
        let mut body = json!({
            "id": format!("chatcmpl-{:016x}", self.rng.u64(..)),
            "object": "chat.completion",
            "created": unix_time().as_secs(),
            "model": chat.model,
            "choices": [{
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": answer.content,
                    "refusal": answer.refusal,
                },
                "logprobs": answer.content.as_deref().filter(|_| chat.logprobs).map(logprobs),
                "finish_reason": answer.finish_reason,
            }],
            "usage": {
                "prompt_tokens": chat.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "total_tokens": chat.prompt_tokens + answer.completion_tokens,
                "prompt_tokens_details": { "cached_tokens": cached },
            },
        });
        if tells_writes {
            body["usage"]["prompt_tokens_details"]["written_tokens"] = written.into();
        }
        if chat.is_flex {
            body["service_tier"] = "flex".into();
        }
        if self.config.tells_thinking {
            body["usage"]["completion_tokens_details"] = json!({ "reasoning_tokens": answer.thinking_tokens });
        }
        match fault {
            Some(Fault::NoUsage) => body["usage"] = Value::Null,
            Some(Fault::PromptUsage) => body["usage"] = json!({ "prompt_tokens": chat.prompt_tokens }),
            _ => {}
        }
        Reply::json(200, &body)
    }
}

/// A request in OpenAI's shape.
fn asked(wire: &dyn Wire, request: &Request, model: Option<&str>, body: &Value) -> Result<Value, Reply> {
    let asked = match wire.embeds(&request.path) {
        Some(_) => wire.texts(body),
        None if wire.decides(&request.path) => wire.questions(body),
        None => wire.request(request, body),
    };
    let mut asked = asked.map_err(|message| Reply::invalid("", "", &message))?;
    if let Some(model) = model {
        asked["model"] = model.into();
    }
    Ok(asked)
}

/// Checks that the key is the one asked for.
pub(crate) fn authorized(config: &Config, given: Option<&str>) -> Result<(), Reply> {
    match &config.api_key {
        Some(key) if given != Some(key) => {
            Err(Reply::error(401, "invalid_request_error", "", "invalid_api_key", "Incorrect API key provided."))
        }
        _ => Ok(()),
    }
}

/// Checks that the configured model would take the request.
fn check(config: &Config, chat: &Chat) -> Result<(), Reply> {
    if let Some(models) = &config.models
        && !models.contains(&chat.model)
    {
        return Err(Reply::error(
            404,
            "invalid_request_error",
            "",
            "model_not_found",
            &format!("The model `{}` does not exist or you do not have access to it.", chat.model),
        ));
    }
    let unsupported_format = match chat.format {
        Format::JsonSchema { .. } if !config.json_schema => Some("json_schema"),
        Format::JsonObject if !config.json_object => Some("json_object"),
        _ => None,
    };
    if let Some(format) = unsupported_format {
        let message =
            format!("Invalid parameter: 'response_format' of type '{format}' is not supported with this model.");
        return Err(Reply::invalid("response_format", "", &message));
    }
    if chat.system_tokens > 0 && !config.system_role {
        return Err(Reply::invalid("messages", "", "System role not supported"));
    }
    if chat.old_max_tokens && !config.max_tokens_param {
        return Err(Reply::invalid(
            "max_tokens",
            "unsupported_parameter",
            "Unsupported parameter: 'max_tokens' is not supported with this model. \
             Use 'max_completion_tokens' instead.",
        ));
    }
    if let Some(most) = config.max_answer_tokens.filter(|most| chat.max_tokens.is_some_and(|max| max > *most)) {
        let message = format!(
            "max_tokens is too large: {asked}. This model supports at most {most} completion tokens, whereas you \
             provided {asked}.",
            asked = chat.max_tokens.unwrap_or(0),
        );
        return Err(Reply::invalid("max_tokens", "invalid_value", &message));
    }
    if let Some(most) = config.max_row_bytes.filter(|most| chat.user.lines().any(|line| line.len() > *most)) {
        return Err(Reply::invalid("messages", "", &format!("text exceeds {most} bytes")));
    }
    let needed = chat.prompt_tokens.saturating_add(chat.max_tokens.unwrap_or(0));
    if let Some(context) = config.context_tokens.filter(|context| needed > *context) {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, you requested \
             {needed} tokens ({} in the messages, {} in the completion). Please reduce the \
             length of the messages or completion.",
            chat.prompt_tokens,
            chat.max_tokens.unwrap_or(0),
        );
        return Err(Reply::invalid("messages", "context_length_exceeded", &message));
    }
    Ok(())
}

/// The probability of a label in a chat, by which labels are told apart: from a half on.
pub fn probability(label: &str) -> f64 {
    0.5 + f64::from(label.bytes().map(u32::from).sum::<u32>() % 40) / 100.0
}

/// The tokens of a content: quotation marks, which are certain, and what is between them.
fn logprobs(content: &str) -> Value {
    let token = |text: &str| {
        let is_label = text.bytes().any(|b| b.is_ascii_alphabetic());
        json!({"token": text, "logprob": if is_label { probability(text).ln() } else { 0.0 }, "bytes": text.as_bytes(), "top_logprobs": []})
    };
    let mut tokens: Vec<Value> = Vec::new();
    for (n, part) in content.split('"').enumerate() {
        tokens.extend((n > 0).then(|| token("\"")));
        tokens.extend(Some(part).filter(|part| !part.is_empty()).map(token));
    }
    json!({ "content": tokens, "refusal": null })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A lognormal factor of median 1 whose logarithm deviates by `sigma`.
fn lognormal(rng: &mut Rng, sigma: f64) -> f64 {
    // Box-Muller. 1 - f64() is never 0.
    let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    let normal = radius * (std::f64::consts::TAU * rng.f64()).cos();
    (sigma * normal).exp()
}

/// The amount that a request takes of each limit.
fn charge(reserve: Reserve, chat: &Chat, answer: &Answer) -> Amounts {
    let prompt = chat.prompt_tokens;
    let tokens = match (reserve, chat.max_tokens) {
        (Reserve::PromptPlusMax, Some(max)) => prompt.saturating_add(max),
        (Reserve::Max, max) => prompt.max(max.unwrap_or(0)),
        _ => prompt + answer.completion_tokens,
    };
    [tokens, prompt, answer.completion_tokens, 1]
}

/// The response of a fault that refuses; `None` is a reset.
fn refusal(fault: &Fault, model: &str) -> Option<Reply> {
    let server_error = |status, message: &str| Some(Reply::error(status, "server_error", "", "", message));
    match fault {
        Fault::Http500 => server_error(500, "The server had an error while processing your request."),
        Fault::Http503 => server_error(503, "The engine is currently overloaded."),
        Fault::RateLimit429 => {
            Some(Reply::error(429, "requests", "", "rate_limit_exceeded", &format!("Rate limit reached for {model}.")))
        }
        Fault::SpendLimit429 => Some(Reply::error(
            429,
            "insufficient_quota",
            "",
            "insufficient_quota",
            "You exceeded your current quota, please check your plan and billing details.",
        )),
        Fault::NoCapacity429 => Some(Reply::error(
            429,
            "requests",
            "",
            "resource_unavailable",
            "Resource Unavailable. You are not charged.",
        )),
        Fault::TooLarge429 => Some(Reply::error(
            429,
            "tokens",
            "",
            "rate_limit_exceeded",
            &too_large(model, Limit::Tokens, 30_000, 34_472),
        )),
        Fault::Status(status, body) => {
            Some(Reply { status: *status, headers: Vec::new(), body: body.clone(), extra_head: Vec::new() })
        }
        Fault::Redirect(location) => {
            let headers = vec![("location", location.clone())];
            Some(Reply { status: 302, headers, body: String::new(), extra_head: Vec::new() })
        }
        _ => None,
    }
}

fn contains(body: &[u8], text: &[u8]) -> bool {
    !text.is_empty() && body.windows(text.len()).any(|part| part == text)
}

fn too_large(model: &str, limit: Limit, cap: u64, requested: u64) -> String {
    format!(
        "Request too large for {model} on {}: Limit {cap}, Requested {requested}. \
         The input or output tokens must be reduced in order to run successfully.",
        spelled(limit),
    )
}

fn rate_limited(model: &str, limit: Limit, cap: u64, used: u64, requested: u64, wait: Duration) -> String {
    format!(
        "Rate limit reached for {model} on {}: Limit {cap}, Used {used}, Requested {requested}. \
         Please try again in {}.",
        spelled(limit),
        go_duration(wait),
    )
}

/// A limit's name in messages.
fn spelled(limit: Limit) -> &'static str {
    match limit {
        Limit::Tokens => "tokens per min (TPM)",
        Limit::Input => "input tokens per min",
        Limit::Output => "output tokens per min",
        Limit::Requests => "requests per min (RPM)",
    }
}
