//! `POST /control`: changes to a provider that runs in another process.

use std::time::Duration;

use serde::Deserialize;

use crate::state::Shared;
use crate::{Fault, Limiter, OtherClient, RateHeaders, Reserve, RetryAfter};

/// The body of `POST /control`. Fields left out change nothing.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Control {
    /// Probability of each fault, replacing all; names as `Fault` displays them.
    faults: Option<serde_json::Map<String, serde_json::Value>>,
    /// Null removes it.
    #[serde(default, deserialize_with = "present")]
    faulty: Option<Option<String>>,
    /// Faults of the next requests, null for none.
    script: Option<Vec<Option<String>>>,
    /// Null removes it.
    #[serde(default, deserialize_with = "present")]
    other_client: Option<Option<OtherChange>>,
    reserve: Option<Reserve>,
    release: Option<bool>,
    latency: Option<LatencyChange>,
    limiter: Option<Limiter>,
    window_seconds: Option<f64>,
    /// Null removes the limit, hence two layers.
    #[serde(default, deserialize_with = "present")]
    tokens_per_window: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    input_tokens_per_window: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    output_tokens_per_window: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    requests_per_window: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    context_tokens: Option<Option<u64>>,
    /// Null removes it.
    #[serde(default, deserialize_with = "present")]
    poison: Option<Option<String>>,
    thinking_tokens: Option<u64>,
    tells_thinking: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    max_answer_tokens: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    max_row_bytes: Option<Option<usize>>,
    cache_prefix: Option<bool>,
    json_schema: Option<bool>,
    json_object: Option<bool>,
    system_role: Option<bool>,
    max_tokens_param: Option<bool>,
    retry_after: Option<RetryAfter>,
    rate_headers: Option<RateHeaders>,
    /// True holds all answers, false releases them.
    hold: Option<bool>,
    #[serde(default)]
    reset_stats: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LatencyChange {
    base_ms: Option<f64>,
    per_token_ms: Option<f64>,
    spread: Option<f64>,
}

/// Fields left out have their defaults. The client begins anew.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OtherChange {
    share: f64,
    request_tokens: Option<u64>,
    after_seconds: Option<f64>,
    insists: Option<bool>,
}

/// Applies a change, all of it or none.
pub(crate) fn apply(shared: &Shared, body: &[u8]) -> Result<(), String> {
    let control: Control = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let script = match control.script {
        Some(names) => names
            .into_iter()
            .map(|name| name.map(|name| name.parse()).transpose())
            .collect::<Result<Vec<Option<Fault>>, _>>()?,
        None => Vec::new(),
    };
    let mut state = shared.lock();
    let mut config = state.config.clone();
    if let Some(faults) = control.faults {
        config.faults = faults
            .iter()
            .map(|(name, rate)| {
                let rate = rate.as_f64().ok_or("a fault's probability is a number");
                Ok((name.parse()?, rate?))
            })
            .collect::<Result<_, String>>()?;
    }
    if let Some(latency) = control.latency {
        if let Some(ms) = latency.base_ms {
            config.latency.base = seconds(ms / 1000.0)?;
        }
        if let Some(ms) = latency.per_token_ms {
            config.latency.per_output_token = seconds(ms / 1000.0)?;
        }
        set(&mut config.latency.spread, latency.spread);
    }
    set(&mut config.limiter, control.limiter);
    if let Some(window) = control.window_seconds {
        config.window = seconds(window)?;
    }
    set(&mut config.tokens_per_window, control.tokens_per_window);
    set(&mut config.input_tokens_per_window, control.input_tokens_per_window);
    set(&mut config.output_tokens_per_window, control.output_tokens_per_window);
    set(&mut config.requests_per_window, control.requests_per_window);
    set(&mut config.reserve, control.reserve);
    set(&mut config.release, control.release);
    set(&mut config.context_tokens, control.context_tokens);
    set(&mut config.poison, control.poison);
    set(&mut config.faulty, control.faulty);
    set(&mut config.thinking_tokens, control.thinking_tokens);
    set(&mut config.tells_thinking, control.tells_thinking);
    set(&mut config.max_answer_tokens, control.max_answer_tokens);
    set(&mut config.max_row_bytes, control.max_row_bytes);
    set(&mut config.cache_prefix, control.cache_prefix);
    set(&mut config.json_schema, control.json_schema);
    set(&mut config.json_object, control.json_object);
    set(&mut config.system_role, control.system_role);
    set(&mut config.max_tokens_param, control.max_tokens_param);
    set(&mut config.retry_after, control.retry_after);
    set(&mut config.rate_headers, control.rate_headers);
    if let Some(other) = control.other_client {
        config.other_client = other.map(other_client).transpose()?;
        state.limits.restart_other();
    }
    state.configure(|current| *current = config);
    state.script.extend(script);
    if control.reset_stats {
        state.reset_stats();
    }
    drop(state);
    match control.hold {
        Some(true) => shared.hold(),
        Some(false) => shared.release(),
        None => {}
    }
    Ok(())
}

fn other_client(change: OtherChange) -> Result<OtherClient, String> {
    let mut other = OtherClient { share: change.share, ..OtherClient::default() };
    set(&mut other.request_tokens, change.request_tokens);
    set(&mut other.insists, change.insists);
    if let Some(after) = change.after_seconds {
        other.after = seconds(after)?;
    }
    Ok(other)
}

fn set<T>(field: &mut T, change: Option<T>) {
    if let Some(value) = change {
        *field = value;
    }
}

fn seconds(seconds: f64) -> Result<Duration, String> {
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}
