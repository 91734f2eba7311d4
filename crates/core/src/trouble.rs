//! Classes of trouble with a request.
//!
//! The classes follow the providers' documents (late 2026); the wording of messages is matched loosely, since servers
//! that speak the same dialect word them as they like.

use serde_json::Value;

pub use crate::class::{Parameter, Trouble};
use crate::dialect::{self, Api, Dialect, Reply, Sent, Service};
use crate::headers;
use crate::parts;
use crate::quoted::own_words;

/// A trouble with the provider's own words about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The class.
    pub trouble: Trouble,
    /// The provider's message, unchanged. It may quote the key: redact it, then take `one_line` of it.
    pub message: String,
    /// The beginning of it, without what it quotes of the request.
    pub words: String,
    /// The class rests on words of the message alone, and ends streams: whether it is so, a request without rows can tell.
    pub is_in_doubt: bool,
}

impl Report {
    /// One in words of ours.
    pub fn new(trouble: Trouble, message: String) -> Self {
        Self { trouble, message, words: String::new(), is_in_doubt: false }
    }
}

/// Longest message that is kept, in characters.
const MOST_MESSAGE: usize = 300;

/// Returns true if a character is invisible and changes how others look: it turns the direction of a text, or hides in
/// it. These are Unicode's format characters (Cf), and those of its plane of tags.
pub fn is_format(c: char) -> bool {
    matches!(
        u32::from(c),
        0xad | 0x600..=0x605
            | 0x61c
            | 0x6dd
            | 0x70f
            | 0x890..=0x891
            | 0x8e2
            | 0x180e
            | 0x200b..=0x200f
            | 0x202a..=0x202e
            | 0x2060..=0x206f
            | 0xfeff
            | 0xfff9..=0xfffb
            | 0x110bd
            | 0x110cd
            | 0x1_3430..=0x1_343f
            | 0x1_bca0..=0x1_bca3
            | 0x1_d173..=0x1_d17a
            | 0xe_0000..=0xe_0fff
    )
}

/// One line of at most 300 characters. Nothing in it moves a terminal's cursor or changes how the rest looks, and Postgres
/// takes it for text.
pub fn one_line(text: &str) -> String {
    let text: String = text.chars().filter(|c| !is_format(*c)).collect();
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let mut out: String = words.collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = out.char_indices().nth(MOST_MESSAGE) {
        out.truncate(end);
        out.push('…');
    }
    out
}

/// The part of a message for users whose rows the trouble did not come from: without the provider's words, which stand
/// behind a colon and may quote a row.
pub fn without_words(message: &str) -> &str {
    message.split_once(": ").map_or(message, |(class, _)| class)
}

/// The size of a model's context, where a message says it of a request that is too large.
pub fn context_in(message: &str) -> Option<u64> {
    let words = message.to_lowercase();
    let at =
        ["context length", "context window", "context size"].iter().find_map(|n| Some(words.find(n)? + n.len()))?;
    let mut numbers = words.get(at..)?.split(|c: char| !c.is_ascii_digit() && c != ',');
    numbers.find_map(|n| n.trim_matches(',').replace(',', "").parse().ok())
}

/// Reads an answer with this status and body in this dialect. `retry_after`: the wait in milliseconds from its headers.
///
/// # Errors
/// The trouble that the answer reports, or that it cannot be read.
pub fn outcome(api: Api, sent: Sent, status: u16, body: &[u8], retry_after: Option<u64>) -> Result<Reply, Report> {
    if !api.serves(sent.service) {
        let message = format!("the API \"{}\" serves no {}", api.name(), sent.service.name());
        return Err(Report::new(Trouble::Misplaced, message));
    }
    let result = outcome_by(api, sent, status, body, retry_after);
    match sent.service {
        Service::Chat => result,
        Service::Embeddings => result.map_err(of_vectors),
        Service::Decisions => result.map_err(of_decisions),
    }
}

/// A request for decisions has nothing that could be written in another way.
fn of_decisions(report: Report) -> Report {
    let is_of_chats = matches!(report.trouble, Trouble::Unsupported(_) | Trouble::AnswerCap | Trouble::CutOff);
    let trouble = if is_of_chats { Trouble::Rejected } else { report.trouble };
    Report { trouble, ..report }
}

/// A refusal of the way in which vectors are written takes the place of that of a form of a chat's answer.
fn of_vectors(report: Report) -> Report {
    let words = report.words.to_lowercase();
    let is_of_form =
        ["encoding_format", "embedding_types", "base64", "dimension", "matryoshka"].iter().any(|w| words.contains(w));
    let is_refused = report.trouble == Trouble::Rejected && is_of_form;
    let trouble = if is_refused { Trouble::Unsupported(Parameter::ResponseFormat) } else { report.trouble };
    Report { trouble, ..report }
}

fn outcome_by(api: Api, sent: Sent, status: u16, body: &[u8], retry_after: Option<u64>) -> Result<Reply, Report> {
    let dialect = api.dialect();
    if body.len() > parts::MOST && parts::count(body) > parts::MOST {
        let message = format!("HTTP status {status}: the provider's answer has more parts than an answer can have");
        return Err(Report::new(Trouble::Overload(retry_after), message));
    }
    match status {
        200..=299 => api.reply(sent, body).map_err(|error| match error {
            dialect::Unread::Said(error) => classify(dialect, None, &error, "", (retry_after, sent)),
            dialect::Unread::Other(message) => Report::new(Trouble::Overload(retry_after), message.to_owned()),
        }),
        // No address gives these to such a request: the server is in trouble.
        100..=199 | 304 => {
            Err(Report::new(Trouble::Overload(retry_after), format!("HTTP status {status}: no answer to a request")))
        }
        300..=399 => Err(Report::new(
            Trouble::Misplaced,
            format!("HTTP status {status}: redirects are not followed; base_url must name the final address"),
        )),
        _ => {
            let json: Value = serde_json::from_slice(dialect::without_mark(body)).unwrap_or(Value::Null);
            // Some servers wrap the object in an array, some leave out "error".
            let error = match &json {
                Value::Array(items) => items.first().map_or(&Value::Null, |i| &i["error"]),
                _ if json["error"].is_object() || json["error"].is_string() => &json["error"],
                _ => &json,
            };
            Err(classify(dialect, Some(status), error, &String::from_utf8_lossy(body), (retry_after, sent)))
        }
    }
}

/// An error's words, in lower case.
struct Said {
    /// Its message, without what it quotes.
    message: String,
    /// Its code and what stands beside the message.
    code: String,
    /// The message says which limit it is, and how large the request.
    names_limit: bool,
}

impl Said {
    /// Returns true if the message or the code has one of these words.
    fn any(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.message.contains(word) || self.code.contains(word))
    }

    /// Returns true if the message has one of these words.
    fn message_any(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.message.contains(word))
    }

    fn is_of_spend(&self) -> bool {
        let spend = [
            "insufficient_quota",
            "credit_balance",
            "credit balance is too low",
            "credits are depleted",
            "spend_limit",
            "usage_limit_exceeded",
            "billing_hard_limit",
            "billing_error",
            "insufficient credits",
        ];
        self.any(&spend) || self.message.contains("specified api usage limits")
    }

    fn is_too_long(&self) -> bool {
        self.any(&[
            "context_length_exceeded",
            "exceed_context_size",
            "context length",
            "context size",
            "context window",
            "maximum context",
            "maximum number of tokens",
            "prompt is too long",
            "input is too long",
            "request too large",
        ])
    }

    /// Templates of chats raise these; some servers make a 500 of that.
    fn refuses_system_role(&self) -> bool {
        let is_named =
            ["system role", "system message", "system prompt", "'system'", "\"system\"", "developer instruction"];
        let is_refused = ["not support", "unsupported", "not enabled", "not allowed"];
        self.message.contains("roles must alternate") || self.message_any(&is_named) && self.message_any(&is_refused)
    }

    fn refuses_response_format(&self) -> bool {
        self.any(&[
            "response_format",
            "response format",
            "json_schema",
            "json_object",
            "json mode",
            "json_validate_failed",
            "structured output",
            "structured_output",
        ])
    }

    /// Many models draw their words in one way alone.
    fn refuses_sampling(&self) -> bool {
        let is_named = ["temperature", "top_p", "top_k", "topp", "topk", "seed"];
        let is_refused =
            ["not support", "unsupported", "deprecated", "not permitted", "not allowed", "only the default"];
        self.any(&is_named) && self.any(&is_refused)
    }

    fn refuses_answer_cap(&self) -> bool {
        let is_named =
            ["max_tokens", "max_completion_tokens", "max_new_tokens", "maxoutputtokens", "max_output_tokens"];
        let is_bounded =
            ["too large", "at most", "less than or equal", "valid range", "supported range", "maximum", "exceed"];
        self.message_any(&is_named) && self.message_any(&is_bounded) && !self.is_too_long()
    }

    fn is_of_limit(&self) -> bool {
        self.names_limit || self.any(&["rate_limit", "per min"])
    }

    /// The status of an error that stands in a 2xx: the one it names, or that of what it is about; else it is the provider's
    /// own trouble.
    fn status(&self, code: &Value) -> u16 {
        match code.as_u64().and_then(|n| u16::try_from(n).ok()) {
            Some(status @ 400..=599) => status,
            _ if self.any(&["rate_limit"]) || self.is_of_spend() => 429,
            _ if self.is_too_long() => 400,
            _ => 502,
        }
    }

    /// The class of what is said of the tier "flex" alone. Gemini says in a 503 that there is no capacity.
    fn of_flex(&self, status: u16, error: &Value, retry_after: Option<u64>) -> Option<Trouble> {
        match status {
            429 if self.any(&["resource unavailable", "resource_unavailable"]) => {
                Some(Trouble::NoCapacity(retry_after))
            }
            503 if error["status"] == "UNAVAILABLE" => Some(Trouble::NoCapacity(retry_after)),
            // Groq's, of this tier alone.
            498 => Some(Trouble::NoCapacity(retry_after)),
            400 | 422 if self.any(&["service_tier", "servicetier", "service tier"]) => {
                Some(Trouble::Unsupported(Parameter::Tier))
            }
            _ => None,
        }
    }

    /// The class, with this status of the answer.
    fn trouble(&self, status: u16, retry_after: Option<u64>) -> Trouble {
        match status {
            403 if self.is_of_spend() => Trouble::Spend,
            401 | 403 => Trouble::Auth,
            402 => Trouble::Spend,
            404 => Trouble::NotFound,
            400 | 413 | 422 if self.is_too_long() && self.is_of_limit() => Trouble::OverLimit,
            413 if self.is_too_long() => Trouble::TooLarge,
            429 if self.is_of_spend() => Trouble::Spend,
            429 if self.is_too_long() => Trouble::OverLimit,
            429 if self.any(&["perday", "per day", "rpd", "tokens-month"]) => Trouble::Quota(retry_after),
            429 => Trouble::Rate(retry_after),
            400 | 422 | 500 if self.refuses_system_role() => Trouble::Unsupported(Parameter::SystemRole),
            // "Not implemented" does not pass: such as embeddings of a server that was started for chats.
            501 => Trouble::Misplaced,
            // HTTP has what is above 599 treated as a 5xx.
            408 | 409 | 421 | 424 | 425 | 499.. => Trouble::Overload(retry_after),
            400 | 422 if self.is_of_spend() => Trouble::Spend,
            400 if self.any(&["could not finish the message"]) => Trouble::CutOff,
            400 | 422 if self.refuses_answer_cap() => Trouble::AnswerCap,
            400 | 422 if self.is_too_long() || self.any(&["too many tokens"]) => Trouble::TooLarge,
            // LiteLLM: a model that it does not serve; a key that is not its own, which it would look up in a database.
            400 if self.any(&["model_not_found", "invalid model name passed"]) => Trouble::NotFound,
            400 if self.code.contains("no_db_connection") => Trouble::Auth,
            400 if self.any(&["content_filter", "content management policy"]) => Trouble::Filtered,
            400 | 422 if self.any(&["max_completion_tokens"]) => Trouble::Unsupported(Parameter::MaxTokens),
            400 | 422 if self.refuses_sampling() => Trouble::Unsupported(Parameter::Sampling),
            400 | 422 if self.refuses_response_format() => Trouble::Unsupported(Parameter::ResponseFormat),
            400 | 413 | 422 => Trouble::Rejected,
            _ => Trouble::Misplaced,
        }
    }
}

/// Returns true if a field may be trusted to name something: it is not prose.
fn is_name(field: &str) -> bool {
    field.len() <= 64 && field.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:/[]".contains(&b))
}

/// Classes an error: with the status of its answer, or one that stands in a 2xx.
fn classify(
    dialect: &dyn Dialect,
    status: Option<u16>,
    error: &Value,
    body: &str,
    (retry_after, sent): (Option<u64>, Sent),
) -> Report {
    let text = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        Value::Null | Value::Bool(_) => String::new(),
        Value::Array(_) | Value::Object(_) => v.to_string(),
    };
    // Servers that are made with FastAPI say it as a detail.
    let message = match error {
        Value::String(said) => said.clone(),
        _ if error["message"].is_null() => text(&error["detail"]),
        _ => text(&error["message"]),
    };
    let field = |name: &str| Some(text(&error[name])).filter(|field| is_name(field)).unwrap_or_default();
    let code = format!("{} {} {}", field("code"), field("type"), field("param"));
    let asked = || error["details"].as_array()?.iter().find_map(|d| headers::duration(d["retryDelay"].as_str()?));
    let retry_after = retry_after.or_else(asked).map(|ms| ms.min(headers::DAY));
    let mut words = own_words(&message, sent.texts);
    let names_limit = headers::limit_in(&words).is_some();
    // The other places say no less, and are trusted no more.
    let others = ["code", "type", "param"].map(|name| text(&error[name])).into_iter().filter(|other| !is_name(other));
    let others = others.chain((!error["details"].is_null()).then(|| error["details"].to_string()));
    others.for_each(|other| words = format!("{words} {}", own_words(&other, sent.texts)));
    let of = |message: String| Said { message: message.to_lowercase(), code: code.to_lowercase(), names_limit };
    let class = |said: &Said| {
        // What a 2xx says of it is paid for, and is not waited for without end.
        let of_flex = status.filter(|_| sent.is_flex).and_then(|status| said.of_flex(status, error, retry_after));
        let status = status.unwrap_or_else(|| said.status(&error["code"]));
        of_flex
            .or_else(|| dialect.trouble(status, error, &said.message))
            .unwrap_or_else(|| said.trouble(status, retry_after))
    };
    let said = of(words.clone());
    let trouble = class(&said);
    let is_in_doubt = matches!(trouble, Trouble::Spend | Trouble::NotFound) && class(&of(String::new())) != trouble;
    let said = if message.is_empty() { body.trim() } else { &message };
    let message = match (status, said.is_empty()) {
        (None, true) => "the provider's answer contains an error".to_owned(),
        (None, false) => format!("the provider's answer contains an error: {said}"),
        (Some(status), true) => format!("HTTP status {status}"),
        (Some(status), false) => format!("HTTP status {status}: {said}"),
    };
    Report { trouble, message, words, is_in_doubt }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn report(status: u16, body: &str) -> Report {
        outcome(Api::Openai, Sent::default(), status, body.as_bytes(), None).unwrap_err()
    }

    // Whole answers are in fixtures/, see tests/fixtures.rs.
    #[test]
    fn messages_are_one_line_of_text() {
        assert_eq!(report(500, "").message, "HTTP status 500");
        assert_eq!(
            one_line(&report(500, r#"{"error":"a\n b\u0000c\u001b[2Jd"}"#).message),
            "HTTP status 500: a b c [2Jd"
        );
        let hidden = "a\u{202e}b\u{2066}c\u{e0041}\u{200b} \u{feff}d\u{ad}";
        assert_eq!(one_line(hidden), "abc d");
        assert_eq!(one_line(&report(200, r#"{"error":{}}"#).message), "the provider's answer contains an error");
        assert!(one_line(&"ä".repeat(1000)).chars().count() == MOST_MESSAGE + 1);
    }

    #[test]
    fn a_context_is_read_from_what_is_said_of_it() {
        let vllm = "This model's maximum context length is 8,192 tokens. However, you requested 9000 tokens (1000 in";
        assert_eq!(context_in(vllm), Some(8_192));
        assert_eq!(context_in("the request exceeds the available context size, try increasing it"), None);
        assert_eq!(context_in("text exceeds 2000 bytes"), None);
    }

    #[test]
    fn caps_of_answers_are_no_other_trouble() {
        let of = |message: &str| report(400, &serde_json::json!({"error": {"message": message}}).to_string()).trouble;
        assert_eq!(
            of("max_tokens is too large: 9. This model supports at most 8 completion tokens"),
            Trouble::AnswerCap
        );
        assert_eq!(of("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"), Trouble::AnswerCap);
        let cut = "Could not finish the message because max_tokens or model output limit was reached.";
        assert_eq!(of(cut), Trouble::CutOff);
        let renamed =
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'";
        assert_eq!(of(renamed), Trouble::Unsupported(Parameter::MaxTokens));
        assert_eq!(of("text exceeds 2000 bytes"), Trouble::Rejected);
        assert_eq!(report(413, "").trouble, Trouble::Rejected);
        assert_eq!(report(405, "").trouble, Trouble::Misplaced);
    }

    #[test]
    fn what_is_quoted_of_a_row_is_of_no_class_of_its_own() {
        let quotes = |text: &str, status: u16, error: &dyn Fn(&str) -> Value| {
            let texts = [format!("417: {}\n", crate::prompt::quote(text))];
            let body = serde_json::json!({"error": error(text)}).to_string();
            outcome(Api::Openai, Sent { texts: &texts, ..Sent::default() }, status, body.as_bytes(), None)
                .unwrap_err()
                .trouble
        };
        let ways: [&dyn Fn(&str) -> Value; 4] = [
            &|text| serde_json::json!({"message": format!("invalid input: {text}"), "type": "invalid_request_error"}),
            &|text| serde_json::json!({"message": format!("{text:?} is refused")}),
            &|text| serde_json::json!({"message": "no", "code": text, "type": text, "param": text}),
            &|text| serde_json::json!({"message": "no", "details": [{"input": text}]}),
        ];
        for words in [
            "You have reached your specified API usage limits",
            "insufficient_quota",
            "max_tokens at most 16",
            "model_not_found",
            "response_format json_schema",
            "system role not supported",
            "maximum context length is 20 tokens",
            "Request too large on tokens per min: Limit 20, Requested 30",
            "content_filter",
            "could not finish the message",
        ] {
            // A field that is no more than a name is the provider's.
            let fields = if is_name(words) { 2 } else { 4 };
            for (n, way) in ways.iter().take(fields).enumerate() {
                for text in [words.to_owned(), format!("and \"{words}\"\n, or")] {
                    assert_eq!(quotes(&text, 400, way), Trouble::Rejected, "{n} {text}");
                    assert_eq!(quotes(&text, 429, way), Trouble::Rate(None), "{n} {text}");
                }
            }
        }
    }

    #[test]
    fn no_capacity_is_no_limit_and_is_said_of_flex_alone() {
        let of = |api, is_flex, status, error: Value| {
            let body = serde_json::json!({ "error": error }).to_string();
            let is_quoted = body.contains("in the text");
            let texts =
                [if is_quoted { "417: \"Resource Unavailable in the text\"\n".to_owned() } else { String::new() }];
            let sent = Sent { is_flex, texts: &texts, ..Sent::default() };
            outcome(api, sent, status, body.as_bytes(), Some(7)).unwrap_err().trouble
        };
        let openai = |message: &str| serde_json::json!({"message": message, "type": "requests"});
        let none = "Resource Unavailable: try again later";
        let coded = serde_json::json!({"message": "Try later.", "code": "resource_unavailable"});
        assert_eq!(of(Api::Openai, true, 429, openai(none)), Trouble::NoCapacity(Some(7)));
        assert_eq!(of(Api::Openai, true, 429, coded.clone()), Trouble::NoCapacity(Some(7)));
        assert_eq!(of(Api::Openai, false, 429, coded), Trouble::Rate(Some(7)));
        assert_eq!(of(Api::Openai, true, 429, openai("Rate limit reached")), Trouble::Rate(Some(7)));
        assert_eq!(of(Api::Openai, true, 503, openai("overloaded")), Trouble::Overload(Some(7)));
        let quoted = "Rate limit reached: Resource Unavailable in the text";
        assert_eq!(of(Api::Openai, true, 429, openai(quoted)), Trouble::Rate(Some(7)));
        let gemini = serde_json::json!({"code": 503, "message": "high demand", "status": "UNAVAILABLE"});
        assert_eq!(of(Api::Gemini, true, 503, gemini.clone()), Trouble::NoCapacity(Some(7)));
        assert_eq!(of(Api::Gemini, false, 503, gemini), Trouble::Overload(Some(7)));
        let unknown = "Unsupported service_tier: flex";
        assert_eq!(of(Api::Openai, true, 400, openai(unknown)), Trouble::Unsupported(Parameter::Tier));
        assert_eq!(of(Api::Openai, false, 400, openai(unknown)), Trouble::Rejected);
    }

    #[test]
    fn ends_by_words_alone_are_in_doubt() {
        let of = |body: &str| {
            let report = report(400, body);
            (report.trouble, report.is_in_doubt)
        };
        assert_eq!(of(r#"{"error":{"message":"specified API usage limits"}}"#), (Trouble::Spend, true));
        assert_eq!(of(r#"{"error":{"message":"x","code":"model_not_found"}}"#), (Trouble::NotFound, false));
        assert!(
            !report(404, "{}").is_in_doubt
                && !report(402, "{}").is_in_doubt
                && report(429, "insufficient_quota").words.is_empty()
        );
    }

    #[test]
    fn waits_are_taken_from_where_they_are() {
        let body = r#"{"error":{"details":[{"x":1},{"retryDelay":"1.5s"}]}}"#;
        assert_eq!(report(429, body).trouble, Trouble::Rate(Some(1_500)));
        assert_eq!(
            outcome(Api::Openai, Sent::default(), 429, body.as_bytes(), Some(7)).unwrap_err().trouble,
            Trouble::Rate(Some(7))
        );
        let long = report(429, r#"{"error":{"details":[{"retryDelay":"1e300"}]}}"#);
        assert_eq!(long.trouble, Trouble::Rate(Some(headers::DAY)));
    }

    proptest! {
        #[test]
        fn never_panics(status in 0u16..1000, body in ".{0,600}", json in r#"[{}\[\]":,a-z ]{0,80}"#) {
            for body in [&body, &json] {
                for api in Api::ALL {
                    let Err(report) = outcome(*api, Sent::default(), status, body.as_bytes(), None) else { continue };
                    let line = one_line(&report.message);
                    prop_assert!(line.chars().count() <= MOST_MESSAGE + 1 && !line.contains(char::is_control));
                }
            }
        }
    }
}
