//! Anthropic's Messages.
//!
//! Source: Anthropic's published API reference (`/v1/messages`, errors, structured outputs, prompt caching), late 2026.
//! Prompts that are written to the cache cost a quarter more there than their price; they are counted like others.

use serde_json::{Value, json};

use super::{Ask, Dialect, Finish, Format, Reply, Unread, Usage, parsed, tokens};
use crate::class::{Parameter, Trouble};
use crate::forms::{Form, Forms};

pub(super) struct Anthropic;

const RESERVED: [&str; 5] = ["model", "messages", "system", "max_tokens", "stream"];

/// Bytes of a prefix from which on it may be long enough to be cached: the models begin at 512 to 4,096 tokens, and a
/// mark on a shorter one does nothing.
const LEAST_CACHED: usize = 2_048;

impl Dialect for Anthropic {
    fn base_url(&self) -> Option<&'static str> {
        Some("https://api.anthropic.com/v1")
    }

    fn has_version(&self) -> bool {
        true
    }

    fn counts_cached(&self) -> bool {
        false
    }

    /// Those for five minutes, which is how long they are asked for.
    fn cache_write_surcharge(&self, _model: &str) -> u64 {
        25
    }

    fn reserved(&self) -> &'static [&'static str] {
        &RESERVED
    }

    /// There is no JSON without a schema.
    fn forms(&self) -> Forms {
        let mut forms = Forms::default();
        forms.give_up(Form::Object);
        forms
    }

    /// Keys that a schema does not name are refused.
    fn has_open_schemas(&self) -> bool {
        false
    }

    fn url(&self, base: &str, _model: &str, _version: Option<&str>) -> String {
        format!("{base}/messages")
    }

    fn key_header(&self) -> (&'static str, &'static str) {
        ("x-api-key", "")
    }

    fn version_header(&self, version: Option<&str>) -> Option<(&'static str, String)> {
        Some(("anthropic-version", version.unwrap_or("2023-06-01").to_owned()))
    }

    fn body(&self, ask: &Ask) -> Value {
        let mut body = json!({"model": ask.model, "max_tokens": ask.max_tokens});
        if !ask.no_system_role {
            let mut system = json!({"type": "text", "text": ask.system});
            // A schema that names the rows differs with each request, and no prefix is read from the cache then.
            let names_rows = matches!(ask.format, Some(Format::Schema { strict: true, .. }));
            if ask.system.len() >= LEAST_CACHED && !names_rows {
                system["cache_control"] = json!({"type": "ephemeral"});
            }
            body["system"] = json!([system]);
        }
        body["messages"] = json!([{"role": "user", "content": ask.user()}]);
        if let Value::Object(map) = &mut body {
            map.extend(ask.others(&RESERVED));
        }
        if let Some(Format::Schema { strict: true, schema }) = ask.format {
            if !body["output_config"].is_object() {
                body["output_config"] = json!({});
            }
            body["output_config"]["format"] = json!({"type": "json_schema", "schema": schema});
        }
        body
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        let said = parsed(body)?;
        let blocks = said["content"].as_array().map(Vec::as_slice).unwrap_or_default();
        let text: String = blocks.iter().filter(|b| b["type"] == "text").filter_map(|b| b["text"].as_str()).collect();
        let finish = match said["stop_reason"].as_str() {
            Some("max_tokens" | "model_context_window_exceeded") => Finish::Length,
            Some("refusal") => Finish::Refused,
            _ => Finish::Complete,
        };
        let usage = &said["usage"];
        let part = |name: &str| tokens(&usage[name]).unwrap_or(0);
        let cached_input = part("cache_read_input_tokens");
        let written_input = part("cache_creation_input_tokens");
        let others = cached_input + written_input;
        Ok(Reply {
            finish,
            has_reasoning: blocks.iter().any(|b| b["type"].as_str().is_some_and(|kind| kind.contains("thinking"))),
            usage: Usage {
                input: tokens(&usage["input_tokens"]).map(|rest| rest + others).filter(|n| *n > 0 && *n < 1 << 32),
                output: tokens(&usage["output_tokens"]).filter(|n| *n > 0 || text.is_empty()),
            },
            thought: tokens(&usage["output_tokens_details"]["thinking_tokens"]),
            cached_input,
            written_input,
            text,
            ..Reply::default()
        }
        .consistent())
    }

    fn trouble(&self, status: u16, _error: &Value, words: &str) -> Option<Trouble> {
        let of_schema = ["output_config.format", "output_format", "too complex for compilation"];
        (status == 400 && of_schema.iter().any(|word| words.contains(word)))
            .then_some(Trouble::Unsupported(Parameter::ResponseFormat))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Api;
    use crate::dialect::tests::{ask, schema};
    use crate::limiter::Tokens;

    #[test]
    fn a_request_is_written_as_documented() {
        let parameters = json!({"output_config": {"effort": "low"}, "max_tokens": 1, "metadata": {"user_id": "x"}});
        let format = schema(true);
        let body = Anthropic.body(&Ask { format: Some(&format), ..ask(&parameters) });
        let want = json!({
            "model": "m",
            "max_tokens": 9,
            "system": [{"type": "text", "text": "s"}],
            "messages": [{"role": "user", "content": "u"}],
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
            "metadata": {"user_id": "x"},
        });
        assert_eq!(body, want);
        let long = "s".repeat(LEAST_CACHED);
        let parameters = json!({});
        let body = Anthropic.body(&Ask { system: &long, format: Some(&schema(false)), ..ask(&parameters) });
        assert_eq!(body["system"][0]["cache_control"], json!({"type": "ephemeral"}));
        assert_eq!(body.get("output_config"), None);
        let body = Anthropic.body(&Ask { no_system_role: true, ..ask(&parameters) });
        assert_eq!((body.get("system"), &body["messages"][0]["content"]), (None, &json!("s\n\nu")));
        assert_eq!(Anthropic.url("https://api.anthropic.com/v1", "m", None), "https://api.anthropic.com/v1/messages");
        assert_eq!(Anthropic.version_header(Some("2026-10-21")).unwrap().1, "2026-10-21");
    }

    #[test]
    fn answers_are_read() {
        let mut said = json!({
            "id": "msg_01", "type": "message", "role": "assistant", "model": "claude-haiku-5-5",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "{\"1\":"},
                        {"type": "text", "text": "\"a\"}"}],
            "stop_reason": "end_turn", "stop_sequence": null, "stop_details": null,
            "usage": {"input_tokens": 14, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 2000,
                      "output_tokens": 9, "output_tokens_details": {"thinking_tokens": 4}, "service_tier": "standard"},
        });
        let of = |said: &Value| Anthropic.reply(said.to_string().as_bytes()).unwrap();
        let reply = of(&said);
        assert_eq!((reply.text.as_str(), reply.finish, reply.has_reasoning), ("{\"1\":\"a\"}", Finish::Complete, true));
        assert_eq!(reply.usage.whole(), Some(Tokens { input: 2114, output: 9 }));
        assert_eq!((reply.thought, reply.cached_input, reply.written_input), (Some(4), 2000, 100));
        // Cached tokens count against no limit here.
        let counted = |api| reply.counted(api, Tokens::default()).input;
        assert_eq!((counted(Api::Anthropic), counted(Api::Openai)), (114, 2114));
        for (reason, finish) in [
            ("max_tokens", Finish::Length),
            ("model_context_window_exceeded", Finish::Length),
            ("refusal", Finish::Refused),
            ("stop_sequence", Finish::Complete),
        ] {
            said["stop_reason"] = reason.into();
            assert_eq!(of(&said).finish, finish, "{reason}");
        }
        let error = json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}});
        assert!(matches!(Anthropic.reply(error.to_string().as_bytes()), Err(Unread::Said(_))));
    }
}
