//! What went wrong with a request, and so what to do: the classes of trouble.
//!
//! The classes follow the providers' documents (late 2026); the wording of messages is matched loosely, since servers
//! that speak the same dialect word them as they like.

use serde_json::Value;

/// A class of trouble. Only `Rejected` and what comes with a 2xx is held against the rows of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Too much at once: wait. The wait in milliseconds, if the provider said.
    Rate(Option<u64>),
    /// The request is larger than it may be: send less in one.
    TooLarge,
    /// The endpoint refuses this parameter of the request: do without.
    Unsupported(Parameter),
    /// The key is wrong or lacks the right (401, 403).
    Auth,
    /// The account's money is gone.
    Spend,
    /// The quota of a day or month is used up. Milliseconds until it is renewed, if the provider said.
    Quota(Option<u64>),
    /// The model or the path is not known (404).
    NotFound,
    /// The provider's filter refuses the content.
    Filtered,
    /// The request is refused for another reason (400, 422, a redirect, …).
    Rejected,
    /// The provider is overloaded or broken (5xx, 408), or not reached: try later. The wait in milliseconds, if it
    /// said.
    Overload(Option<u64>),
}

/// A parameter of a request that a server may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parameter {
    /// `response_format` with a schema, or at all.
    ResponseFormat,
    /// `max_tokens`, where `max_completion_tokens` is wanted.
    MaxTokens,
}

/// A trouble with the provider's own words about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The class.
    pub trouble: Trouble,
    /// What the provider said, as it said it. It may quote the key: redact it, then take `one_line` of it.
    pub message: String,
}

/// Longest message that is kept, in characters.
const MOST_MESSAGE: usize = 300;

/// One line of at most 300 characters.
pub fn one_line(text: &str) -> String {
    let mut out: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = out.char_indices().nth(MOST_MESSAGE) {
        out.truncate(end);
        out.push('…');
    }
    out
}

/// Classes an answer with a status other than 2xx. `retry_after`: the wait in milliseconds from its headers.
pub fn classify(status: u16, body: &str, retry_after: Option<u64>) -> Report {
    let json: Value = serde_json::from_str(body).unwrap_or(Value::Null);
    // Some servers wrap the object in an array, some leave out "error".
    let error = match &json {
        Value::Array(items) => items.first().map_or(&Value::Null, |i| &i["error"]),
        _ if json["error"].is_object() || json["error"].is_string() => &json["error"],
        _ => &json,
    };
    let text = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        _ => String::new(),
    };
    let message = if error.is_string() { text(error) } else { text(&error["message"]) };
    let code = format!("{} {} {}", text(&error["code"]), text(&error["type"]), text(&error["param"])).to_lowercase();
    let words = message.to_lowercase();
    let says = |needle: &str| words.contains(needle) || code.contains(needle);

    let spend = || {
        [
            "insufficient_quota",
            "credit_balance",
            "spend_limit",
            "usage_limit_exceeded",
            "billing_hard_limit",
            "billing_error",
            "insufficient credits",
        ]
        .iter()
        .any(|n| says(n))
            || words.contains("specified api usage limits")
    };
    let too_long = || {
        [
            "context_length_exceeded",
            "exceed_context_size",
            "context length",
            "context size",
            "context window",
            "maximum context",
            "request too large",
        ]
        .iter()
        .any(|n| says(n))
    };
    let trouble = match status {
        401 | 403 => Trouble::Auth,
        402 => Trouble::Spend,
        404 => Trouble::NotFound,
        413 => Trouble::TooLarge,
        429 if spend() => Trouble::Spend,
        429 if too_long() => Trouble::TooLarge,
        429 if says("perday") || says("per day") || says("rpd") || says("tokens-month") => Trouble::Quota(retry_after),
        429 => Trouble::Rate(retry_after),
        408 | 500..=599 => Trouble::Overload(retry_after),
        400 | 422 if spend() => Trouble::Spend,
        400 | 422 if too_long() || says("too many tokens") => Trouble::TooLarge,
        400 if says("content_filter") || says("content management policy") => Trouble::Filtered,
        400 | 422 if says("max_completion_tokens") => Trouble::Unsupported(Parameter::MaxTokens),
        400 | 422 if says("response_format") || says("json_schema") || says("json_object") || says("json mode") => {
            Trouble::Unsupported(Parameter::ResponseFormat)
        }
        _ => Trouble::Rejected,
    };
    let said = if message.is_empty() { body.trim() } else { &message };
    let message =
        if said.is_empty() { format!("HTTP status {status}") } else { format!("HTTP status {status}: {said}") };
    Report { trouble, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Trouble::*;
    use proptest::prelude::*;

    #[test]
    fn statuses_and_bodies_are_classed() {
        for (status, body, want) in [
            (401, r#"{"error":{"message":"Incorrect API key provided"}}"#, Auth),
            (404, r#"{"error":{"code":"model_not_found"}}"#, NotFound),
            (429, r#"{"error":{"code":"rate_limit_exceeded","type":"tokens"}}"#, Rate(Some(7))),
            (429, r#"{"error":{"code":"insufficient_quota"}}"#, Spend),
            (
                429,
                r#"{"error":{"message":"Request too large for m on tokens per min (TPM): Limit 30000, Requested 34472.","type":"tokens","code":"rate_limit_exceeded"}}"#,
                TooLarge,
            ),
            (
                429,
                r#"[{"error":{"status":"RESOURCE_EXHAUSTED","message":"GenerateRequestsPerDayPerProject"}}]"#,
                Quota(Some(7)),
            ),
            (400, r#"{"error":{"message":"You have reached your specified API usage limits."}}"#, Spend),
            (400, r#"{"error":{"code":"context_length_exceeded"}}"#, TooLarge),
            (
                400,
                r#"{"error":{"message":"'response_format' of type 'json_schema' is not supported"}}"#,
                Unsupported(Parameter::ResponseFormat),
            ),
            (
                400,
                r#"{"error":{"message":"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.","param":"max_tokens"}}"#,
                Unsupported(Parameter::MaxTokens),
            ),
            (400, r#"{"error":{"code":"content_filter"}}"#, Filtered),
            (400, "nonsense", Rejected),
            (302, "", Rejected),
            (503, "<html>", Overload(Some(7))),
            (529, "", Overload(Some(7))),
            (413, "", TooLarge),
        ] {
            assert_eq!(classify(status, body, Some(7)).trouble, want, "{status} {body}");
        }
        assert_eq!(classify(500, "", None).message, "HTTP status 500");
        assert_eq!(one_line(&classify(500, r#"{"error":"a\n b"}"#, None).message), "HTTP status 500: a b");
    }

    proptest! {
        #[test]
        fn never_panics(status in 0u16..1000, body in ".{0,600}", json in r#"[{}\[\]":,a-z ]{0,80}"#) {
            prop_assert!(one_line(&classify(status, &body, None).message).chars().count() <= MOST_MESSAGE + 1);
            classify(status, &json, None);
        }
    }
}
