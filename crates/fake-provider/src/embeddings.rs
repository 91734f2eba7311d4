//! Requests for embeddings. A vector follows from its text, so that a test can tell whose it is.

use fastrand::Rng;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::prompt::Task;
use crate::reply::Reply;
use crate::request::{Chat, Format};
use crate::tokens::tokens;
use crate::{Config, Fault};

/// Numbers of a vector, if the request does not say.
const DIMENSIONS: usize = 384;
/// Most texts of a request.
const MOST_TEXTS: usize = 2_048;
/// Most tokens of a text, and of a request.
const MOST_TOKENS: [u64; 2] = [8_192, 300_000];

/// The vector of a text.
pub fn embedding(text: &str, dimensions: usize) -> Vec<f32> {
    let seed = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut rng = Rng::with_seed(seed);
    (0..dimensions).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

/// A request for embeddings.
pub(crate) struct Texts {
    model: String,
    texts: Vec<String>,
    dimensions: usize,
    is_base64: bool,
    tokens: u64,
}

impl Texts {
    /// Reads a body; the error is the 400 to answer.
    pub(crate) fn read(body: &Value, config: &Config) -> Result<Self, Reply> {
        let invalid = |param: &str, message: &str| Err(Reply::invalid(param, "", message));
        let Some(model) = body["model"].as_str() else {
            return invalid("model", "you must provide a model parameter");
        };
        let texts: Option<Vec<String>> = match &body["input"] {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(all) => all.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        let Some(texts) = texts.filter(|all| !all.is_empty() && all.len() <= MOST_TEXTS) else {
            return invalid("input", "'input' must be a text or an array of at most 2048 texts");
        };
        if texts.iter().any(String::is_empty) {
            return invalid("input", "'input' cannot be an empty string");
        }
        let is_base64 = match body["encoding_format"].as_str() {
            Some("base64") if config.base64 => true,
            None | Some("float") => false,
            _ => return invalid("encoding_format", "Unsupported value of 'encoding_format'"),
        };
        if !body["dimensions"].is_null() && !config.dimensions {
            return invalid("dimensions", "This model does not support specifying dimensions.");
        }
        let each: Vec<u64> = texts.iter().map(|text| tokens(text)).collect();
        let sum = each.iter().sum();
        if each.iter().any(|n| *n > MOST_TOKENS[0]) || sum > MOST_TOKENS[1] {
            return invalid("input", "This model's maximum context length is 8192 tokens");
        }
        let dimensions = body["dimensions"].as_u64().map_or(DIMENSIONS, |n| n as usize);
        Ok(Self { model: model.to_owned(), texts, dimensions, is_base64, tokens: sum })
    }

    /// As what the checks, the limits and the counts of rows take.
    pub(crate) fn as_chat(&self) -> Chat {
        let line = |(i, text): (usize, &String)| format!("{i}: {}\n", Value::from(text.as_str()));
        Chat {
            model: self.model.clone(),
            system: String::new(),
            user: self.texts.iter().enumerate().map(line).collect(),
            max_tokens: None,
            old_max_tokens: false,
            format: Format::Text,
            system_tokens: 0,
            is_flex: false,
            logprobs: false,
            prompt_tokens: self.tokens,
        }
    }

    pub(crate) fn reply(&self, chat: &Chat, fault: Option<&Fault>, rng: &mut Rng) -> Reply {
        let mut all: Vec<(usize, Vec<f32>)> =
            self.texts.iter().map(|text| embedding(text, self.dimensions)).enumerate().collect();
        let one = rng.usize(..all.len());
        match fault {
            Some(Fault::DropId) => drop(all.remove(one)),
            Some(Fault::InventId) => all[one].0 = self.texts.len() + 1,
            Some(Fault::DoubleId) => all.push((one, embedding("another", self.dimensions))),
            Some(Fault::EmptyAnswer) => all.clear(),
            Some(Fault::ShortVector) => drop(all[one].1.pop()),
            Some(Fault::NanVector) => all[one].1.iter_mut().take(1).for_each(|n| *n = f32::NAN),
            Some(Fault::ZeroVector) => all[one].1.fill(0.0),
            Some(Fault::ShuffledVectors) => rng.shuffle(&mut all),
            _ => {}
        }
        let data: Vec<Value> = all
            .into_iter()
            .map(|(index, vector)| {
                let vector = if self.is_base64 { json!(base64(&vector)) } else { json!(vector) };
                json!({ "object": "embedding", "index": index, "embedding": vector })
            })
            .collect();
        let mut reply = Reply::json(
            200,
            &json!({
                "object": "list",
                "data": data,
                "model": self.model,
                "usage": { "prompt_tokens": chat.prompt_tokens, "total_tokens": chat.prompt_tokens },
            }),
        );
        if fault == Some(&Fault::MalformedJson) {
            reply.body.truncate(reply.body.len() / 2);
        }
        reply
    }
}

/// Answers with vectors. The texts alone are billed.
pub(crate) fn answer(task: &Task) -> Answer {
    Answer {
        content: None,
        refusal: None,
        finish_reason: "stop",
        completion_tokens: 0,
        thinking_tokens: 0,
        answered: task.rows.iter().filter_map(|row| row.id).collect(),
    }
}

fn base64(vector: &[f32]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len() * 4 / 3 + 4);
    for three in bytes.chunks(3) {
        let bits = (0..3).fold(0u32, |bits, i| bits << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        for i in 0..4u32 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i as usize <= three.len() { char::from(digit) } else { '=' });
        }
    }
    text
}
