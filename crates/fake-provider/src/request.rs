//! The body of a chat completions request, as far as the provider looks at it.

use serde_json::Value;

use crate::reply::Reply;
use crate::tokens::{Counts, tokens};

/// A larger maximum means this one; sums of charges must not overflow.
const MAX_MAX_TOKENS: u64 = 1 << 32;

/// A chat completions request.
#[derive(Debug)]
pub(crate) struct Chat {
    pub(crate) model: String,
    /// The system (or developer) messages, joined by line ends.
    pub(crate) system: String,
    /// The user messages, joined by line ends.
    pub(crate) user: String,
    /// `max_completion_tokens`, else `max_tokens`.
    pub(crate) max_tokens: Option<u64>,
    /// The older name, `max_tokens`, is used.
    pub(crate) old_max_tokens: bool,
    pub(crate) format: Format,
    /// It is to be served at the tier "flex".
    pub(crate) is_flex: bool,
    /// The tokens of the answer are to have their probabilities.
    pub(crate) logprobs: bool,
    /// Tokens of the system messages.
    pub(crate) system_tokens: u64,
    /// Tokens of the messages and of the schema.
    pub(crate) prompt_tokens: u64,
}

/// `response_format`.
#[derive(Debug)]
pub(crate) enum Format {
    Text,
    JsonObject,
    JsonSchema {
        strict: bool,
        /// Every string in an `enum` of the schema.
        codes: Vec<String>,
    },
}

impl Chat {
    /// Reads a body; the error is the 400 to answer.
    pub(crate) fn read(body: &Value, counts: &mut Counts) -> Result<Self, Reply> {
        let Some(model) = body["model"].as_str() else {
            return Err(Reply::invalid("", "", "you must provide a model parameter"));
        };
        let Some(messages) = body["messages"].as_array().filter(|all| !all.is_empty()) else {
            return Err(Reply::invalid("messages", "", "'messages' must be a non-empty array"));
        };
        if body["stream"] == true {
            return Err(Reply::invalid("stream", "", "streams are not supported"));
        }
        let mut chat = Self {
            model: model.to_owned(),
            system: String::new(),
            user: String::new(),
            max_tokens: body["max_completion_tokens"]
                .as_u64()
                .or(body["max_tokens"].as_u64())
                .map(|max| max.min(MAX_MAX_TOKENS)),
            old_max_tokens: !body["max_tokens"].is_null(),
            format: Format::Text,
            is_flex: body["service_tier"] == "flex",
            logprobs: body["logprobs"] == true,
            // As OpenAI counts: 3 tokens open the answer, 3 frame each message.
            system_tokens: 0,
            prompt_tokens: 3,
        };
        for message in messages {
            let content = content(&message["content"]);
            let role = message["role"].as_str();
            let is_system = matches!(role, Some("system" | "developer"));
            let count = if is_system { counts.tokens(&content) } else { tokens(&content) };
            chat.prompt_tokens += 3 + count;
            let part = match role {
                _ if is_system => {
                    chat.system_tokens += count;
                    &mut chat.system
                }
                Some("user") => &mut chat.user,
                _ => continue,
            };
            part.push_str(&content);
            part.push('\n');
        }
        // Instructions may stand at the head of the user's message.
        if chat.system.is_empty() {
            chat.system.clone_from(&chat.user);
        }
        let format = &body["response_format"];
        chat.format = match format["type"].as_str() {
            None if format.is_null() => Format::Text,
            Some("text") => Format::Text,
            Some("json_object") => Format::JsonObject,
            Some("json_schema") if format["json_schema"]["schema"].is_object() => {
                let schema = &format["json_schema"];
                chat.prompt_tokens += counts.tokens(&schema.to_string());
                let mut codes = Vec::new();
                collect_enums(&schema["schema"], &mut codes);
                Format::JsonSchema { strict: schema["strict"] == true, codes }
            }
            _ => {
                return Err(Reply::invalid(
                    "response_format",
                    "",
                    "'response_format' is of no known type, or lacks its schema",
                ));
            }
        };
        Ok(chat)
    }
}

/// A message's content: a string, or text parts.
fn content(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|p| p["text"].as_str()).collect(),
        _ => String::new(),
    }
}

fn collect_enums(schema: &Value, codes: &mut Vec<String>) {
    match schema {
        Value::Object(members) => {
            if let Some(Value::Array(values)) = members.get("enum") {
                codes.extend(values.iter().filter_map(Value::as_str).map(str::to_owned));
            }
            members.values().for_each(|v| collect_enums(v, codes));
        }
        Value::Array(items) => items.iter().for_each(|v| collect_enums(v, codes)),
        _ => {}
    }
}
