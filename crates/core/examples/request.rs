//! The messages of a request and the reading of its answer, for scripts: bench/injection measures the shipped code with
//! it. Reads one JSON object a line and writes one value: `{"task", "ids", "texts"}` → the messages and the
//! `response_format`; with an `"answer"` instead of texts → the value of each id, or null.

use std::io::BufRead;

use llm_batch_core::answer::{self, Verdict};
use llm_batch_core::dialect::{Api, Ask};
use llm_batch_core::forms::Forms;
use llm_batch_core::options::Options;
use llm_batch_core::task::Spec;
use llm_batch_core::{prompt, request};
use serde_json::{Map, Value, json};

fn reply(line: &str) -> Result<Value, Box<dyn std::error::Error>> {
    let mut said: Value = serde_json::from_str(line)?;
    let options = said["task"].as_object_mut().and_then(|task| task.remove("options")).unwrap_or_default();
    let options = Options::from_json([&options]).map_err(|e| e.message)?;
    let kind = said["task"]["kind"].as_str().unwrap_or("classify");
    let spec = Spec::from_json(kind, &said["task"]).map_err(|e| e.message)?;
    let ids: Vec<u16> = serde_json::from_value(said["ids"].clone())?;
    // Tokens are the gateway's to count; `codes` is to be given.
    let kind = spec.prepare(&options, &str::len);
    if let Some(text) = said["answer"].as_str() {
        let value = |v: &Verdict| match v {
            Verdict::Answer(answer) => serde_json::from_str(&spec.to_json(answer)).unwrap_or_default(),
            _ => Value::Null,
        };
        return Ok(answer::read(text, &ids, &*kind).unwrap_or_default().iter().map(value).collect());
    }
    let texts: Vec<String> = serde_json::from_value(said["texts"].clone())?;
    let user: String = ids.iter().zip(&texts).map(|(id, text)| prompt::row(*id, &prompt::quote(text), None)).collect();
    let Options { answer_shape, structured_output, .. } = options;
    let form = Forms::default().next(answer_shape, structured_output);
    let (system, format) = (request::system(&*kind), request::format(answer_shape, form, &*kind, &ids));
    let body = Api::Openai.dialect().body(&Ask {
        model: "",
        system: &system,
        no_system_role: false,
        user: &user,
        max_tokens: 0,
        max_completion_tokens: false,
        context: 0,
        format: format.as_ref(),
        parameters: &Map::new(),
        no_sampling: false,
        tier: Default::default(),
    });
    Ok(json!({"system": system, "user": user, "response_format": body["response_format"]}))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for line in std::io::stdin().lock().lines() {
        println!("{}", reply(&line?)?);
    }
    Ok(())
}
