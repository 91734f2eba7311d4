//! An answer that comes as a stream of events although none was requested: read as if it had come whole.

use serde_json::{Value, json};

use super::{Unread, is_first, is_thought};

/// Fields of a delta whose texts add up.
const FIELDS: [&str; 5] = ["content", "refusal", "reasoning_content", "reasoning", "thinking"];

/// The answer that the events of a stream add up to.
///
/// A stream without its end (a reason to finish, or `[DONE]`) broke off. That is treated as any connection that breaks
/// off is: the server is in trouble, no row is charged an attempt, and the cap of answers was not too small.
pub(super) fn whole(body: &[u8]) -> Result<Value, Unread> {
    let not_json = Unread::Other("the provider's answer is not JSON");
    let text = String::from_utf8_lossy(body);
    let mut lines = text.split(['\n', '\r']).filter(|line| !line.is_empty()).peekable();
    let is_stream =
        lines.peek().is_some_and(|l| ["data:", ":", "event:", "id:", "retry:"].iter().any(|f| l.starts_with(f)));
    if !is_stream {
        return Err(not_json);
    }
    let mut texts = FIELDS.map(|_| String::new());
    let (mut finish, mut usage, mut details) = (Value::Null, Value::Null, Value::Null);
    let mut is_done = false;
    for data in lines.filter_map(|line| line.strip_prefix("data:")).map(str::trim) {
        if data == "[DONE]" {
            is_done = true;
            break;
        }
        // The last one may be cut.
        let Ok(mut event) = serde_json::from_str::<Value>(data) else { break };
        if !event.is_object() {
            continue;
        }
        if !event["error"].is_null() {
            return Err(Unread::Said(event["error"].take()));
        }
        if event["usage"].is_object() {
            usage = event["usage"].take();
        }
        let choices = event.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten();
        let Some(choice) = choices.filter(|c| c.is_object()).find(|c| is_first(c)) else { continue };
        if !choice["error"].is_null() {
            return Err(Unread::Said(choice["error"].take()));
        }
        if choice["finish_reason"].as_str().is_some_and(|reason| !reason.is_empty()) {
            finish = choice["finish_reason"].take();
        }
        let part = if choice["delta"].is_object() { "delta" } else { "message" };
        for (sum, field) in texts.iter_mut().zip(FIELDS) {
            match choice.pointer(&format!("/{part}/{field}")) {
                Some(Value::String(text)) => sum.push_str(text),
                Some(Value::Array(parts)) => {
                    let (thoughts, said): (Vec<&Value>, Vec<&Value>) = parts.iter().partition(|p| is_thought(p));
                    said.iter().filter_map(|p| p["text"].as_str()).for_each(|t| sum.push_str(t));
                    if !thoughts.is_empty() {
                        details = json!([true]);
                    }
                }
                _ => {}
            }
        }
        if choice.pointer(&format!("/{part}/reasoning_details/0")).is_some() {
            details = json!([true]);
        }
    }
    if finish.is_null() && !is_done {
        return Err(Unread::Other("the provider's answer is a stream that broke off"));
    }
    let mut message: serde_json::Map<String, Value> =
        FIELDS.iter().zip(texts).map(|(field, text)| ((*field).to_owned(), Value::from(text))).collect();
    message.insert("reasoning_details".to_owned(), details);
    Ok(json!({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}))
}
