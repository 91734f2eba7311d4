//! One HTTP request: sends a body, reads a bounded answer, names what went wrong.

use std::time::Duration;

use llm_batch_core::dialect::Reply;
use llm_batch_core::headers::{self, Reported};
use llm_batch_core::trouble::{self, Report, Trouble};
use serde_json::Value;

use crate::protocol::Endpoint;

/// Largest answer that is read, bytes. An answer to 500 rows has some 30 kB.
const MAX_ANSWER: usize = 4 << 20;

/// The client of all requests: keeps connections, follows no redirects, uses no proxy.
pub fn client() -> Result<reqwest::Client, String> {
    // Fails only if a provider of cryptography is installed already, which is then used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(Duration::from_secs(10))
        .pool_idle_timeout(Duration::from_secs(60))
        .user_agent(concat!("pg_llm_batch/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|e| format!("could not set up HTTP: {}", causes(&e)))
}

/// What came of a request.
#[derive(Debug)]
pub struct Answered {
    pub result: Result<Reply, Report>,
    /// What the provider says about its limits.
    pub said: Reported,
    /// It broke off after it was sent: it may have been charged or not.
    pub is_unsure: bool,
}

impl Answered {
    /// Of a request that broke off.
    pub fn broke_off(message: String, is_unsure: bool) -> Self {
        let report = Report { trouble: Trouble::Overload(None), message: trouble::one_line(&message) };
        Self { result: Err(report), said: Reported::default(), is_unsure }
    }
}

/// Sends a request and reads its answer.
pub async fn send(client: &reqwest::Client, endpoint: &Endpoint, body: &Value, timeout: Duration) -> Answered {
    let broke_off = |e: &reqwest::Error| Answered::broke_off(causes(e), !e.is_connect());
    let url = format!("{}/chat/completions", endpoint.base_url.trim_end_matches('/'));
    let bytes = match serde_json::to_vec(body) {
        Ok(bytes) => bytes,
        Err(e) => return Answered::broke_off(e.to_string(), false),
    };
    let mut request = client.post(url).timeout(timeout).header("content-type", "application/json").body(bytes);
    if let Some(key) = &endpoint.api_key {
        request = request.bearer_auth(&key.0);
    }
    let mut response = match request.send().await {
        Ok(response) => response,
        Err(e) => return broke_off(&e),
    };
    let status = response.status();
    let said = headers::read(|name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()));
    let encoding = response.headers().get("content-encoding").filter(|v| *v != "identity");
    let encoding = encoding.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    let mut answer = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if answer.len() + chunk.len() > MAX_ANSWER => {
                let message = format!("the provider's answer is larger than {MAX_ANSWER} bytes");
                return Answered::broke_off(message, true);
            }
            Ok(Some(chunk)) => answer.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(e) => return broke_off(&e),
        }
    }
    // Providers quote keys in what they say. What they say is read first (JSON may hide a key behind escapes) and cut
    // to size last (a key cut in two is not found).
    let key = endpoint.api_key.as_ref().map_or("", |k| &k.0);
    let presentable = |said: &str| trouble::one_line(&redact(said, key));
    let result = match encoding {
        // Nothing was asked for that needs to be unpacked, and what is small may unpack to anything.
        Some(encoding) if status.is_success() => {
            let message = format!("the provider's answer is encoded as \"{encoding}\", which was not asked for");
            Err(Report { trouble: Trouble::Overload(None), message })
        }
        Some(_) => trouble::outcome(status.as_u16(), b"", said.wait),
        None => trouble::outcome(status.as_u16(), &answer, said.wait),
    };
    let result = result.map_err(|report| Report { message: presentable(&report.message), ..report });
    // Whoever answers 200 with what is no answer may have charged for it; so may have one whose proxy gave up waiting,
    // or whose filter read it all.
    let may_be_charged = |report: &Report| {
        status.is_success() || matches!(status.as_u16(), 408 | 502 | 504) || report.trouble == Trouble::Filtered
    };
    Answered { is_unsure: result.as_ref().is_err_and(may_be_charged), result, said }
}

/// Takes a key, and what looks like a part of one, out of a text.
fn redact(text: &str, key: &str) -> String {
    let mut out = if key.is_empty() { text.to_owned() } else { text.replace(key, "[redacted]") };
    let beginning: String = key.chars().take(6).collect();
    let mut beginnings = vec!["sk-"];
    if key.chars().count() > 12 {
        beginnings.push(&beginning);
    }
    for beginning in beginnings {
        let mut rest = std::mem::take(&mut out);
        while let Some(at) = rest.find(beginning) {
            let before = rest[..at].chars().next_back();
            let end =
                rest[at..].find(|c: char| c.is_whitespace() || "\"'`<>,;()".contains(c)).map_or(rest.len(), |n| at + n);
            let inside_a_word = before.is_some_and(char::is_alphanumeric) && beginning == "sk-";
            out.push_str(&rest[..at]);
            out.push_str(if inside_a_word { &rest[at..end] } else { "[redacted]" });
            rest = rest[end..].to_owned();
        }
        out.push_str(&rest);
    }
    out.replace("[redacted][redacted]", "[redacted]")
}

/// An error with its causes, without the URL (it is in the server's options).
fn causes(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return TIMED_OUT.to_owned();
    }
    let mut text = if error.is_connect() { "could not connect".to_owned() } else { "the connection failed".to_owned() };
    let mut source = std::error::Error::source(error);
    while let Some(e) = source {
        text = format!("{text}: {e}");
        source = e.source();
    }
    text
}

/// How a request that took too long is reported.
pub const TIMED_OUT: &str = "the request timed out";

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(redact("a task-force", ""), "a task-force");
        assert_eq!(redact("short key", "key"), "short [redacted]");
    }
}
