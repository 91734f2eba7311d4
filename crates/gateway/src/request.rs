//! One HTTP request: sends a body, reads a bounded answer, names what went wrong.

use std::cell::{Cell, OnceCell};
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, USER_AGENT};
use hyper::http::Extensions;
use hyper_util::client::legacy::connect::{CaptureConnection, Connected, capture_connection};
use llm_batch_core::dialect::{Reply, Sent, Service};
use llm_batch_core::headers::{self, Reported};
use llm_batch_core::trouble::{self, Report, Trouble};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};

use crate::connections::{Use, WAITS};
use crate::egress::{Answer, HttpClient};
use crate::protocol::Endpoint;
use crate::redact::presentable;

/// Largest answer that is read, bytes. An answer to 500 rows has some 30 kB.
pub const MAX_ANSWER: usize = 4 << 20;
/// Bytes that any answer may have: an error, or a short text in a large frame.
const LEAST_ANSWER: usize = 32 << 10;
/// Bytes of an answer for each of its tokens. A server that streams has an event for each.
const BYTES_PER_TOKEN: usize = 512;
/// Bytes of an answer's text for each of its tokens; prose has four or five.
const TEXT_PER_TOKEN: usize = 8;
/// Bytes of a body, with those of the texts that it may quote, that take some time to read.
const LARGE: usize = 64 << 10;
/// So many of them are read at once: read, they take several times their bytes.
static LARGE_AT_ONCE: Semaphore = Semaphore::const_new(2);
/// The header in which Gemini says at which tier a request was served (<https://ai.google.dev/gemini-api/docs/priority-inference>),
/// in small letters or in capitals.
const TIER: &str = "x-gemini-service-tier";
/// Most interim answers (1xx) to a request.
const MOST_INTERIM: u32 = 16;

/// Most bytes of an answer of so many tokens.
pub fn most_bytes(tokens: u64) -> usize {
    let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
    tokens.saturating_mul(BYTES_PER_TOKEN).saturating_add(LEAST_ANSWER).min(MAX_ANSWER)
}

/// Most bytes of the text of an answer of so many tokens. Some servers do not count what is thought.
fn most_text(tokens: u64) -> usize {
    usize::try_from(tokens).unwrap_or(usize::MAX).saturating_mul(TEXT_PER_TOKEN).saturating_add(LEAST_ANSWER)
}

/// A request to send.
#[derive(Debug)]
pub struct Question<'a> {
    pub endpoint: &'a Endpoint,
    /// The provider's name of the model.
    pub model: &'a str,
    pub body: &'a Value,
    pub timeout: Duration,
    /// The cap of its answer, tokens.
    pub most_tokens: u64,
    /// The service that is asked, and the numbers of the rows.
    pub service: Service,
    pub ids: &'a [u16],
}

/// The outcome of a request.
#[derive(Debug)]
pub struct Answered {
    pub result: Result<Reply, Report>,
    /// The provider's report of its limits.
    pub said: Reported,
    /// Bytes of its answer.
    pub bytes: usize,
    /// It broke off after it was sent: it may have been charged or not.
    pub is_unsure: bool,
    /// A 2xx has begun: the model was asked, and most likely paid for.
    pub has_begun: bool,
    /// Its time ran out before there was a place for a connection: the provider knows nothing of it.
    pub has_no_place: bool,
    /// The connection that it came on, if it came whole.
    connection: Option<CaptureConnection>,
}

impl Answered {
    /// The result of a request that broke off.
    pub fn broke_off(message: String, is_unsure: bool) -> Self {
        let report = Report::new(Trouble::Overload(None), trouble::one_line(&message));
        let result = Err(report);
        let said = Reported::default();
        Self { result, said, bytes: 0, is_unsure, has_begun: false, has_no_place: false, connection: None }
    }

    /// The outcome of a request that was refused in words that may be its rows', by that of one without rows.
    pub fn confirmed(self, bare: Self) -> Self {
        use Trouble::{Auth, Misplaced, NotFound, Overload, Quota, Rate, Spend};
        match (&bare.result, self.result) {
            (Err(report), _)
                if matches!(report.trouble, Auth | Misplaced | NotFound | Overload(_) | Quota(_) | Rate(_) | Spend) =>
            {
                Self { is_unsure: false, ..bare }
            }
            (_, Err(report)) if report.trouble == Trouble::OverLimit => Self { result: Err(report), ..self },
            (_, Err(report)) => Self { result: Err(Report { trouble: Trouble::Rejected, ..report }), ..self },
            (_, result) => Self { result, ..self },
        }
    }

    /// The connection has not the right answer to its request: its server is not asked twice on a connection any more.
    pub fn distrust(&self) {
        let connected = self.connection.as_ref().map(CaptureConnection::connection_metadata);
        if let Some(usage) = connected.and_then(|connected| usage(connected.as_ref())) {
            usage.distrust();
        }
    }
}

/// Sends a request by a client and reads its answer. Without a client it fails for the reason that there is none.
pub async fn send(way: Result<(HttpClient, Answer), String>, question: &Question<'_>) -> Answered {
    let (client, answer) = match way {
        Ok(way) => way,
        Err(e) => return Answered::broke_off(e, false),
    };
    let (progress, waits) = (Progress::default(), Arc::<AtomicBool>::default());
    let exchange = WAITS.scope(Arc::clone(&waits), exchange(&client, answer, question, &progress));
    let has_begun = || progress.has_begun.get();
    match tokio::time::timeout(question.timeout, exchange).await {
        Ok(answered) => Answered { has_begun: has_begun(), ..answered },
        Err(_) if progress.is_sent() => {
            Answered { has_begun: has_begun(), ..Answered::broke_off(TIMED_OUT.to_owned(), true) }
        }
        Err(_) if waits.load(Ordering::Relaxed) => {
            Answered { has_no_place: true, ..Answered::broke_off(NO_PLACE.to_owned(), false) }
        }
        Err(_) => Answered::broke_off(TIMED_OUT.to_owned(), false),
    }
}

fn usage(connected: Option<&Connected>) -> Option<Arc<Use>> {
    let mut extras = Extensions::new();
    connected?.get_extras(&mut extras);
    extras.get().cloned()
}

/// Tells the connection, once there is one, how large an answer is expected. Has no end.
async fn expect(mut connection: CaptureConnection, bytes: usize) {
    let found = usage(connection.wait_for_connection_metadata().await.as_ref());
    found.inspect(|usage| usage.expects(bytes));
    std::future::pending().await
}

/// Reads an answer, a large one on another thread. What is longer than its tokens can be is none.
async fn outcome(status: u16, answer: Answer, wait: Option<u64>, question: &Question<'_>) -> Result<Reply, Report> {
    let texts = texts(question.body);
    let is_large = answer.bytes.len() + texts.iter().map(String::len).sum::<usize>() > LARGE;
    let (api, service, ids) = (question.endpoint.api, question.service, question.ids.to_vec());
    let is_flex = api.dialect().tier_parameter().is_some_and(|parameter| question.body[parameter] == "flex");
    let read = move || {
        let sent = Sent { service, ids: &ids, texts: &texts, is_flex };
        trouble::outcome(api, sent, status, &answer.bytes, wait)
    };
    let reply = if !is_large {
        read()?
    } else {
        let internal = |e: &dyn Error| Report::new(Trouble::Overload(None), format!("internal error: {e}"));
        let _turn = LARGE_AT_ONCE.acquire().await.map_err(|e| internal(&e))?;
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(internal(&e)))?
    };
    if reply.text.len() > most_text(question.most_tokens) {
        let message = "the provider's answer is longer than its tokens can be".to_owned();
        return Err(Report::new(Trouble::Overload(None), message));
    }
    Ok(reply)
}

/// The messages of a request.
fn texts(body: &Value) -> Vec<String> {
    match body {
        Value::Object(map) => {
            let text = |(key, value): (&String, &Value)| match (key.as_str(), value) {
                ("content" | "text" | "system" | "input", Value::String(text)) => vec![text.clone()],
                ("input" | "texts", Value::Array(all)) => {
                    all.iter().filter_map(Value::as_str).map(str::to_owned).collect()
                }
                (_, value) => texts(value),
            };
            map.iter().flat_map(text).collect()
        }
        Value::Array(items) => items.iter().flat_map(texts).collect(),
        _ => Vec::new(),
    }
}

/// The progress of a request.
#[derive(Default)]
struct Progress {
    connection: OnceCell<CaptureConnection>,
    has_begun: Cell<bool>,
}

impl Progress {
    /// It has a connection, so something of it may have been sent.
    fn is_sent(&self) -> bool {
        self.connection.get().is_some_and(|c| c.connection_metadata().is_some())
    }
}

/// The request of a question. What is notified if the answer never begins, for all the interim ones.
fn request(question: &Question) -> Result<(hyper::Request<Full<Bytes>>, Arc<Notify>), String> {
    let Question { endpoint, model, .. } = question;
    let (dialect, version) = (endpoint.api.dialect(), endpoint.api_version.as_deref());
    let base = endpoint.base_url.trim_end_matches('/');
    let url = endpoint.api.url(question.service, base, model, version);
    let url = url::Url::parse(&url).map_err(|e| e.to_string())?;
    let bytes = serde_json::to_vec(question.body).map_err(|e| e.to_string())?;
    let mut request = hyper::Request::post(url.as_str())
        .header(CONTENT_TYPE, "application/json")
        .header(USER_AGENT, concat!("pg_llm_batch/", env!("CARGO_PKG_VERSION")));
    if let Some((name, value)) = dialect.version_header(version) {
        request = request.header(name, value);
    }
    if let Some(key) = &endpoint.api_key {
        let (name, before) = dialect.key_header();
        let mut value = HeaderValue::from_str(&format!("{before}{}", key.0)).map_err(|_| "the key is no header")?;
        value.set_sensitive(true);
        request = request.header(name, value);
    }
    let mut request = request.body(Full::new(Bytes::from(bytes))).map_err(|e| e.to_string())?;
    let (never_begins, interim) = (Arc::new(Notify::new()), AtomicU32::new(0));
    let notify = Arc::clone(&never_begins);
    hyper::ext::on_informational(&mut request, move |_| {
        if interim.fetch_add(1, Ordering::Relaxed) >= MOST_INTERIM {
            notify.notify_one();
        }
    });
    Ok((request, never_begins))
}

async fn exchange(client: &HttpClient, mut answer: Answer, question: &Question<'_>, progress: &Progress) -> Answered {
    let endpoint = question.endpoint;
    let (mut request, never_begins) = match request(question) {
        Ok(request) => request,
        Err(e) => return Answered::broke_off(e, false),
    };
    let connection = capture_connection(&mut request);
    let _ = progress.connection.set(connection.clone());
    let response = tokio::select! {
        biased;
        () = never_begins.notified() => {
            return Answered::broke_off("the provider sends too many interim responses".to_owned(), true);
        }
        response = client.request(request) => response,
        // Set before anything can be read: what is sent on a connection is so only after this.
        () = expect(connection.clone(), answer.most) => return Answered::broke_off(TIMED_OUT.to_owned(), true),
    };
    let response = match response {
        Ok(response) => response,
        Err(e) => return Answered::broke_off(causes(&e, e.is_connect()), !e.is_connect()),
    };
    let status = response.status();
    progress.has_begun.set(status.is_success());
    let said = headers::read(|name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()));
    let is_flex = response.headers().get(TIER).is_some_and(|tier| tier.as_bytes().eq_ignore_ascii_case(b"flex"));
    let encoding = response.headers().get(CONTENT_ENCODING).filter(|v| *v != "identity");
    let encoding = encoding.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let part = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(e) => return Answered::broke_off(causes(&e, false), true),
        };
        if let Err(e) = answer.push(&part) {
            return Answered::broke_off(e, true);
        }
    }
    if let Some(usage) = usage(connection.connection_metadata().as_ref()) {
        usage.is_free();
    }
    // Providers quote keys in what they say. What they say is read first (JSON may hide a key behind escapes) and cut
    // to size last (a key cut in two is not found).
    let key = endpoint.api_key.as_ref().map_or("", |k| &k.0);
    let bytes = answer.bytes.len();
    let result = match encoding {
        // Nothing was asked for that needs to be unpacked, and what is small may unpack to anything.
        Some(encoding) if status.is_success() => {
            let message = format!("the provider's answer has an encoding that was not requested: \"{encoding}\"");
            Err(Report::new(Trouble::Overload(None), message))
        }
        Some(_) => {
            let sent = Sent { service: question.service, ..Sent::default() };
            trouble::outcome(endpoint.api, sent, status.as_u16(), b"", said.wait)
        }
        None => outcome(status.as_u16(), answer, said.wait, question).await,
    };
    let result = result.map(|reply| Reply { is_flex: reply.is_flex || is_flex, ..reply });
    let result = result.map_err(|report| {
        let mut message = presentable(&report.message, key);
        // Elsewhere most servers say no more than that there is nothing.
        if matches!(report.trouble, Trouble::NotFound | Trouble::Misplaced)
            && let Some(end) = usual_end(endpoint)
        {
            message.push_str(&format!(" (base_url does not end in {end}, as most do)"));
        }
        if report.trouble == Trouble::NotFound && question.service == Service::Decisions {
            message.push_str(match endpoint.api.dialect().asks() {
                true => " (not every server serves decisions; \"ask_by\": \"chat\" asks in a chat)",
                false => " (the server, or the model, serves no decisions)",
            });
        }
        Report { message, ..report }
    });
    // A provider may have charged for a 200 without a usable answer. So it may if its proxy gave up waiting, or its filter
    // read everything.
    let may_be_charged = |report: &Report| {
        status.is_success() || matches!(status.as_u16(), 408 | 502 | 504) || report.trouble == Trouble::Filtered
    };
    let is_unsure = result.as_ref().is_err_and(may_be_charged);
    Answered { is_unsure, result, said, bytes, has_begun: false, has_no_place: false, connection: Some(connection) }
}

/// The usual end of a base URL's path, if the endpoint's has another.
fn usual_end(endpoint: &Endpoint) -> Option<&'static str> {
    let usual = endpoint.api.dialect().base_url()?;
    let end = usual.get(usual.rfind("/v")?..)?;
    (!endpoint.base_url.trim_end_matches('/').ends_with(end)).then_some(end)
}

/// An error of the client's with its causes, without the URL (it is in the server's options).
fn causes(error: &dyn Error, is_connect: bool) -> String {
    let mut text = if is_connect { "could not connect".to_owned() } else { "the connection failed".to_owned() };
    let mut source = error.source();
    while let Some(e) = source {
        if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::TimedOut) {
            return TIMED_OUT.to_owned();
        }
        text = format!("{text}: {e}");
        source = e.source();
    }
    text
}

/// The message for a request that took too long.
pub const TIMED_OUT: &str = "the request timed out";

/// The message for one that was never sent.
const NO_PLACE: &str = "no connection to the provider was free in time";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_of_a_request_are_found_whatever_it_asks_for() {
        let rows = "417: \"x\"\n";
        for body in [
            serde_json::json!({"model": "m", "messages": [{"role": "user", "content": rows}]}),
            serde_json::json!({"model": "m", "contents": [{"parts": [{"text": rows}]}]}),
            serde_json::json!({"model": "m", "input": [rows], "dimensions": 3}),
            serde_json::json!({"model": "m", "input": rows, "questions": [{"name": "417", "instructions": "Which?"}]}),
        ] {
            assert_eq!(texts(&body), [rows], "{body}");
        }
    }
}
