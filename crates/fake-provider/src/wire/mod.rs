//! Dialects, by the path of a request: each turns a request into OpenAI's shape and a reply out of it. So there is one
//! provider behind all of them.

mod anthropic;
mod azure;
mod cohere;
mod gemini;
mod mistral;
mod ollama;
mod openai;
mod systemone;
mod voyage;

use serde_json::{Map, Value, json};

use crate::RateHeaders;
use crate::http::Request;
use crate::reply::Reply;

/// A dialect.
pub(crate) trait Wire: Sync {
    /// Its name in the option `api`.
    fn name(&self) -> &'static str;

    /// The path of its base URL.
    fn base(&self) -> &'static str;

    /// Matches the path of its chats. The inner value is the model, if it is in the path.
    fn chat<'a>(&self, path: &'a str) -> Option<Option<&'a str>>;

    /// Matches the path of its embeddings. The inner value is the model, if it is in the path.
    fn embeds<'a>(&self, _path: &'a str) -> Option<Option<&'a str>> {
        None
    }

    /// Tells if a path is that of its decisions.
    fn decides(&self, _path: &str) -> bool {
        false
    }

    /// A request for decisions in OpenAI's shape; the error is the message of a 400.
    fn questions(&self, body: &Value) -> Result<Value, String> {
        Ok(body.clone())
    }

    /// The body of an answer with decisions.
    fn decisions(&self, said: &Value) -> Value {
        said.clone()
    }

    /// The header with the key.
    fn key_header(&self) -> &'static str {
        "authorization"
    }

    /// A request in OpenAI's shape; the error is the message of a 400.
    fn request(&self, request: &Request, body: &Value) -> Result<Value, String>;

    /// A request for embeddings in OpenAI's shape; the error is the message of a 400.
    fn texts(&self, body: &Value) -> Result<Value, String> {
        Ok(body.clone())
    }

    /// The body of an answer with vectors.
    fn vectors(&self, said: &Value) -> Value {
        said.clone()
    }

    /// Returns true if its bills tell which tokens were written into the cache.
    fn tells_writes(&self) -> bool {
        false
    }

    /// The body of a completion.
    fn completion(&self, said: &Value) -> Value;

    /// The status and body of an error; `wait`: how long (ms) to wait.
    fn error(&self, status: u16, error: &Value, wait: Option<u64>) -> (u16, Value);

    /// The headers about limits, where they are not as configured; and whether a refusal says how long to wait.
    fn headers(&self, configured: RateHeaders) -> (RateHeaders, bool) {
        (configured, true)
    }
}

/// The wire of the routes that are no chats.
pub(crate) const HOME: &dyn Wire = &openai::Openai;

/// All of them, a line each.
#[rustfmt::skip]
pub(crate) const WIRES: &[&dyn Wire] = &[
    HOME,
    &azure::Azure,
    &anthropic::Anthropic,
    &gemini::Gemini,
    &mistral::Mistral,
    &cohere::Cohere,
    &ollama::Ollama,
    &voyage::Voyage,
    &systemone::SystemOne,
];

/// The dialect of a path, and the model in it.
pub(crate) fn find(path: &str) -> Option<(&'static dyn Wire, Option<&str>)> {
    let decides = |wire: &dyn Wire| wire.decides(path).then_some(None);
    let model = |wire: &dyn Wire| wire.chat(path).or_else(|| wire.embeds(path)).or_else(|| decides(wire));
    WIRES.iter().find_map(|wire| model(*wire).map(|model| (*wire, model)))
}

/// The key of a request.
pub(crate) fn key<'a>(wire: &dyn Wire, request: &'a Request) -> Option<&'a str> {
    let value = request.header(wire.key_header())?;
    if wire.key_header() == "authorization" { value.strip_prefix("Bearer ") } else { Some(value) }
}

/// A reply in a dialect. A body that is not in OpenAI's shape (a fault's own) stays as it is.
pub(crate) fn translate(wire: &dyn Wire, mut reply: Reply) -> Reply {
    if wire.name() == "openai" {
        return reply;
    }
    let (_, tells_wait) = wire.headers(RateHeaders::None);
    let wait = reply.headers.iter().find(|(name, _)| *name == "retry-after-ms").and_then(|(_, ms)| ms.parse().ok());
    let Ok(said) = serde_json::from_str::<Value>(&reply.body) else { return reply };
    let is_ours = said["error"].as_object().is_some_and(|error| error.contains_key("param"));
    if wire.name() == "gemini" && said["service_tier"] == "flex" {
        reply.headers.push(("x-gemini-service-tier", "FLEX".to_owned()));
    }
    let body = if said["choices"].is_array() {
        wire.completion(&said)
    } else if said["data"].is_array() {
        wire.vectors(&said)
    } else if said["answers"].is_array() {
        wire.decisions(&said)
    } else if is_ours {
        if !tells_wait {
            reply.headers.retain(|(name, _)| !name.starts_with("retry-after"));
        }
        let (status, body) = wire.error(reply.status, &said["error"], wait);
        reply.status = status;
        body
    } else {
        return reply;
    };
    reply.body = body.to_string();
    reply
}

/// Refuses members that are not known.
fn only(of: &Value, what: &str, known: &[&str]) -> Result<(), String> {
    let unknown = |map: &Map<String, Value>| map.keys().find(|key| !known.contains(&key.as_str())).cloned();
    match of.as_object().and_then(unknown) {
        Some(key) => Err(format!("{what}{key}: extra inputs are not permitted")),
        None => Ok(()),
    }
}

/// The vectors of an answer in OpenAI's shape, in the order of their texts; and the tokens they took.
fn in_order(said: &Value) -> (Vec<&Value>, &Value) {
    let mut all: Vec<&Value> = said["data"].as_array().into_iter().flatten().collect();
    all.sort_by_key(|one| one["index"].as_u64());
    (all.into_iter().map(|one| &one["embedding"]).collect(), &said["usage"]["prompt_tokens"])
}

/// At most so many texts.
fn at_most(most: usize, texts: &Value, message: &str) -> Result<(), String> {
    let n = texts.as_array().map_or(0, Vec::len);
    if n > most { Err(message.to_owned()) } else { Ok(()) }
}

/// A message in OpenAI's shape.
fn message(role: &str, content: &Value) -> Value {
    json!({"role": role, "content": content})
}

/// The text of a completion, if there is one; how it ended; tokens of the prompt, of those cached, of the answer, and of
/// those thought.
fn parts(said: &Value) -> (Option<&str>, &str, [u64; 4]) {
    let (choice, usage) = (&said["choices"][0], &said["usage"]);
    let refused = choice["message"]["refusal"].is_string();
    let finish = if refused { "refusal" } else { choice["finish_reason"].as_str().unwrap_or("stop") };
    let counts = [
        &usage["prompt_tokens"],
        &usage["prompt_tokens_details"]["cached_tokens"],
        &usage["completion_tokens"],
        &usage["completion_tokens_details"]["reasoning_tokens"],
    ];
    (choice["message"]["content"].as_str(), finish, counts.map(|count| count.as_u64().unwrap_or(0)))
}
