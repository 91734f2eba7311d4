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

/// Largest answer that is read, bytes. An answer to 500 rows has some 30 kB.
const MAX_ANSWER: usize = 4 << 20;
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
    let read = move || {
        let sent = Sent { service, ids: &ids, texts: &texts };
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
    let result = result.map_err(|report| {
        let mut message = presentable(&report.message, key);
        // Elsewhere most servers say no more than that there is nothing.
        if matches!(report.trouble, Trouble::NotFound | Trouble::Misplaced)
            && let Some(end) = usual_end(endpoint)
        {
            message.push_str(&format!(" (base_url does not end in {end}, as most do)"));
        }
        if report.trouble == Trouble::NotFound && question.service == Service::Decisions {
            message.push_str(" (not every server serves decisions; \"ask_by\": \"chat\" asks in a chat)");
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

const REDACTED: &str = "[redacted]";

/// Bytes of what a provider says that are looked at: far more than is shown.
const MOST_SAID: usize = 16 << 10;

/// A provider's words, without keys, on a line.
pub fn presentable(said: &str, key: &str) -> String {
    // On a line first: then what the cut leaves of a key, which may not be found, is too far behind to be shown.
    // Characters that are dropped later on would join the parts of a key around them.
    let said: String = said.chars().filter(|c| !trouble::is_format(*c)).collect();
    let words = said.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    let head = line.get(..line.floor_char_boundary(MOST_SAID)).unwrap_or_default();
    trouble::one_line(&redact(head, key))
}

/// A way in which a key may be written.
struct Writing {
    /// Each of its characters in all forms.
    characters: Vec<Vec<String>>,
    /// The bytes that it may begin with.
    begins: [bool; 256],
    /// So many of them are a part of a key.
    part: usize,
    /// The characters behind it belong to it too.
    goes_on: bool,
}

/// A shorter key is quoted where it stands as a whole alone.
const LONG_KEY: usize = 12;

/// The ways to write a key: as it is; in base64 by itself, or behind a name as in `Basic`; in hex.
fn writings(key: &str) -> Vec<Writing> {
    let of = |text: &str, part: usize, goes_on: bool| {
        let characters: Vec<Vec<String>> = text.chars().map(forms).collect();
        let mut begins = [false; 256];
        for byte in characters.iter().take(1).flatten().filter_map(|form| form.bytes().next()) {
            begins[usize::from(byte.to_ascii_lowercase())] = true;
            begins[usize::from(byte.to_ascii_uppercase())] = true;
        }
        Writing { characters, begins, part: if text.len() > LONG_KEY { part } else { usize::MAX }, goes_on }
    };
    let mut all = vec![of(key, 6, false)];
    // A shorter key may stand anywhere.
    let long = |text: &String| text.len() >= 8;
    all.extend((0..3).map(|before| base64(key, before)).filter(long).map(|text| of(&text, 8, true)));
    let hex: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    all.extend(Some(hex).filter(long).map(|text| of(&text, 16, true)));
    all
}

/// The characters of base64 that stand for a key where so many bytes (modulo 3) are before it.
fn base64(key: &str, before: usize) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = key.bytes().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    // Those of the first sign that are not shared with what is before.
    let first = (6 - before * 8 % 6) % 6;
    let signs = bits.get(first..).unwrap_or_default().chunks_exact(6);
    let sign = |bits: &[u8]| bits.iter().fold(0, |sum, bit| sum << 1 | usize::from(*bit));
    signs.filter_map(|bits| SIGNS.get(sign(bits))).map(|sign| char::from(*sign)).collect()
}

/// Takes a key, and what looks like a part of one, out of a text.
fn redact(text: &str, key: &str) -> String {
    let keys = if key.is_empty() { Vec::new() } else { writings(key) };
    let to_its_end =
        |rest: &str| rest.find(|c: char| c.is_whitespace() || "\"'`<>,;()".contains(c)).unwrap_or(rest.len());
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut is_in_a_word) = (text, false);
    while let Some(c) = rest.chars().next() {
        let first = usize::from(rest.bytes().next().unwrap_or_default());
        let found = keys.iter().filter(|key| key.begins[first]).find_map(|key| {
            let (found, length) = beginning(rest, &key.characters);
            let is_whole = found == key.characters.len();
            (is_whole || found >= key.part).then_some((length, !is_whole || key.goes_on))
        });
        let (mut length, goes_on) = match found {
            Some(found) => found,
            None if rest.starts_with("sk-") && !is_in_a_word => (3, true),
            None => (0, false),
        };
        if length == 0 {
            out.push(c);
            length = c.len_utf8();
            is_in_a_word = c.is_alphanumeric();
        } else {
            if goes_on {
                length += to_its_end(rest.get(length..).unwrap_or_default());
            }
            if !out.ends_with(REDACTED) {
                out.push_str(REDACTED);
            }
            is_in_a_word = false;
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    out
}

/// The forms of a key's character when it is quoted: as it is, or as JSON, URLs and HTML escape it.
fn forms(c: char) -> Vec<String> {
    let n = u32::from(c);
    let mut forms = vec![
        c.to_string(),
        format!("\\{c}"),
        format!("%{n:02x}"),
        format!("\\u{n:04x}"),
        format!("&#{n};"),
        format!("&#x{n:x};"),
    ];
    let name = match c {
        '&' => "&amp;",
        '<' => "&lt;",
        '>' => "&gt;",
        '"' => "&quot;",
        '\'' => "&apos;",
        // In URLs base64 has other signs.
        '+' => "-",
        '/' => "_",
        _ => return forms,
    };
    forms.push(name.to_owned());
    forms
}

/// Counts the characters of a key at the beginning of a text, and the bytes that they take.
fn beginning(text: &str, key: &[Vec<String>]) -> (usize, usize) {
    let is_here = |at: usize, form: &String| text.as_bytes().get(at..at + form.len()).is_some_and(|t| is_form(t, form));
    let mut found = (0, 0);
    // A key's backslash may be quoted or may quote what follows: all ways are tried.
    let (mut ends, mut longer) = (vec![0], Vec::new());
    for (n, forms) in key.iter().enumerate() {
        for at in ends.drain(..).flat_map(|at| [at, if n > 0 { behind_gap(text, at) } else { at }]) {
            longer.extend(forms.iter().filter(|form| is_here(at, form)).map(|form| at + form.len()));
        }
        longer.sort_unstable();
        longer.dedup();
        let Some(last) = longer.last() else { break };
        found = (n + 1, *last);
        std::mem::swap(&mut ends, &mut longer);
    }
    found
}

/// Most characters of white space that part a key.
const MOST_GAP: usize = 8;

/// The position at which a key goes on that is parted by white space, which may be escaped.
fn behind_gap(text: &str, mut at: usize) -> usize {
    for _ in 0..MOST_GAP {
        at += match text.as_bytes().get(at..).unwrap_or_default() {
            [b' ' | b'\t' | b'\n' | b'\r', ..] => 1,
            [b'\\', b't' | b'n' | b'r', ..] => 2,
            _ => break,
        };
    }
    at
}

/// Escapes, hex and whole messages are written in small or in capital letters.
fn is_form(bytes: &[u8], form: &str) -> bool {
    bytes.eq_ignore_ascii_case(form.as_bytes())
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

    #[test]
    fn keys_and_parts_of_them_are_redacted() {
        let key = "secret-0123456789";
        for text in [
            "key secret-0123456789 is",
            "key secret-0***6789 is",
            "key sk-abc***x is",
            "key secret-0123456789secret-0123 is",
        ] {
            assert_eq!(redact(text, key), "key [redacted] is", "{text}");
        }
        assert_eq!(redact("{\"a\":\"'secret-01234\"}", key), "{\"a\":\"'[redacted]\"}");
        assert_eq!(redact("is secret\\/0123\\/4567 wrong", "secret/0123/4567"), "is [redacted] wrong");
        // As escaped by JSON, URLs and HTML, in part or in whole.
        let key = "a/b+c\"d\\e=f0123456789";
        for text in [
            "a/b+c\"d\\e=f0123456789",
            "a\\/b+c\\\"d\\\\e=f0123456789",
            "a%2Fb%2bc%22d%5Ce%3Df0123456789",
            "a\\u002Fb+c\\u0022d\\u005ce=f0123456789",
            "a&#47;b&#x2B;c&#34;d&#92;e=f0123456789",
            "%61%2f%62+c\"d\\e=f0123456789",
            "a%2Fb%2bc%22d***",
            "a/b+c&quot;d\\e=f0123456789",
        ] {
            assert_eq!(redact(&format!("the key {text} is"), key), "the key [redacted] is", "{text}");
        }
        assert_eq!(redact("ä a/b é", key), "ä a/b é");
        assert_eq!(redact("a task-force", ""), "a task-force");
        assert_eq!(redact("short key", "key"), "short [redacted]");
        // With characters that end a part of a key elsewhere, at its beginning and further on.
        assert_eq!(redact("key \"secret*** is", "\"secret-0123456789\""), "key [redacted] is");
        assert_eq!(redact("key <a,b,c,d,e*** is", "<a,b,c,d,e,f,g,h>"), "key [redacted] is");
    }

    #[test]
    fn keys_in_base64_and_hex_and_in_parts_are_redacted() {
        let key = "secret-0123456789-abcdef";
        let hex: String = key.bytes().map(|byte| format!("{byte:02X}")).collect();
        for text in [
            "SECRET-0123456789-ABCDEF",
            "secret-0123\n456789-abcdef",
            "secret-01234\\n  56789-abcdef",
            "s e c r e t - 0 1 2 3 4 5 6 7 8 9 - a b c d e f",
            "secret-012 3456***",
            "c2VjcmV0LTAxMjM0NTY3ODktYWJjZGVm",
            "c2VjcmV0LTAxMjM0NTY3ODktYWJjZGVm==",
            "c2VjcmV0LTAxMjM0***",
            hex.as_str(),
            &hex.to_lowercase(),
        ] {
            assert_eq!(redact(&format!("the key {text} is"), key), "the key [redacted] is", "{text}");
            assert_eq!(presentable(&format!("the key {text} is"), key), "the key [redacted] is", "{text}");
        }
        // "a:", "ab:" and "abc:" before it, and something behind.
        for basic in [
            "YTpzZWNyZXQtMDEyMzQ1Njc4OS1hYmNkZWY=",
            "YWI6c2VjcmV0LTAxMjM0NTY3ODktYWJjZGVm",
            "YWJjOnNlY3JldC0wMTIzNDU2Nzg5LWFiY2RlZiE=",
        ] {
            let redacted = redact(&format!("Authorization: Basic {basic} is"), key);
            assert!(redacted.starts_with("Authorization: Basic YW") || redacted.contains("Basic YT"), "{redacted}");
            assert!(redacted.ends_with("[redacted] is") && redacted.len() < 50, "{redacted}");
        }
        assert_eq!(redact("c2Vj is no secret", key), "c2Vj is no [redacted]");
    }

    #[test]
    fn a_long_answer_is_redacted_in_one_pass() {
        let long = "sk- secret ".repeat(MAX_ANSWER / 11);
        let redacted = redact(&long, "secret-0123456789");
        assert!(!redacted.contains("sk-") && !redacted.contains("secret"));
    }
    #[test]
    fn nothing_of_a_key_is_shown_where_the_text_is_cut() {
        let key = "secret-0123456789";
        for (what, text) in [("spaces", " "), ("words", "x "), ("a word", "x"), ("keys", "secret-0123456789 ")] {
            for before in MOST_SAID - 40..MOST_SAID + 5 {
                let said = format!("{}{key} and {}", text.repeat(before / text.len()), "more ".repeat(100));
                let shown = presentable(&said, key);
                assert!(shown.chars().count() <= 301 && !shown.contains('s'), "{what}, {before}: {shown}");
                assert!(!shown.is_empty());
            }
        }
        let hidden: Vec<String> = key.chars().map(String::from).collect();
        assert_eq!(presentable(&format!("a {} b", hidden.join("\u{200b}")), key), "a [redacted] b");
        assert_eq!(presentable(&format!("HTTP status 500: {}", "[".repeat(MAX_ANSWER)), key).chars().count(), 301);
    }

    proptest::proptest! {
        #[test]
        fn no_text_gives_a_key_away(
            before in "\\PC{0,40}",
            key in "[!-~]{8,40}",
            picks in proptest::collection::vec(0_usize..8, 40),
            after in "\\PC{0,40}",
        ) {
            // Each character as somebody's quoting may write it.
            let quoted: String =
                key.chars().zip(&picks).map(|(c, pick)| forms(c).get(*pick).cloned().unwrap_or(c.to_string())).collect();
            let redacted = redact(&format!("{before}{quoted}{after}"), &key);
            proptest::prop_assert!(!redacted.contains(&key) && !redacted.contains(&quoted), "{redacted}");
            proptest::prop_assert!(redacted.contains(REDACTED));
            proptest::prop_assert_eq!(redact(&redacted, &key), redacted.clone());
            // Of a long key a part is enough.
            let (long, shown) = (format!("{key}{key}"), key.chars().take(7).collect::<String>());
            let redacted = redact(&format!("{before} {shown}*** {after}"), &long);
            proptest::prop_assert!(redacted.contains(REDACTED) && !redacted.contains(&shown), "{redacted}");
        }
    }
}
