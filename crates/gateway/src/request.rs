//! One HTTP request: sends a body, reads a bounded answer, names what went wrong.

use std::time::Duration;

use llm_batch_core::dialect::{self, Reply};
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

/// Sends a request and reads its answer.
pub async fn send(
    client: &reqwest::Client,
    endpoint: &Endpoint,
    body: &Value,
    timeout: Duration,
) -> Result<Reply, Report> {
    let overload = |message: String| Report { trouble: Trouble::Overload(None), message: trouble::one_line(&message) };
    let url = format!("{}/chat/completions", endpoint.base_url.trim_end_matches('/'));
    let bytes = serde_json::to_vec(body).map_err(|e| overload(e.to_string()))?;
    let mut request = client.post(url).timeout(timeout).header("content-type", "application/json").body(bytes);
    if let Some(key) = &endpoint.api_key {
        request = request.bearer_auth(&key.0);
    }
    let mut response = request.send().await.map_err(|e| overload(causes(&e)))?;
    let status = response.status();
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let wait = trouble::retry_after(header("retry-after-ms").as_deref(), header("retry-after").as_deref());
    let mut answer = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if answer.len() + chunk.len() > MAX_ANSWER => {
                return Err(overload(format!("the provider's answer is larger than {MAX_ANSWER} bytes")));
            }
            Ok(Some(chunk)) => answer.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(e) => return Err(overload(causes(&e))),
        }
    }
    if status.is_success() {
        dialect::reply(&answer).map_err(overload)
    } else if status.is_redirection() {
        Err(Report {
            trouble: Trouble::Rejected,
            message: format!(
                "HTTP status {}: redirects are not followed; base_url must name the final address",
                status.as_u16()
            ),
        })
    } else {
        Err(trouble::classify(status.as_u16(), &String::from_utf8_lossy(&answer), wait))
    }
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
