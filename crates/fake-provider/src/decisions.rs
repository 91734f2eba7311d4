//! Requests for decisions, in OpenAI's shape: a question for each row of the input, answered by one of its choices.

use std::collections::HashSet;

use fastrand::Rng;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::prompt::{RowId, Task};
use crate::reply::Reply;
use crate::request::{Chat, Format};
use crate::tokens::tokens;
use crate::{Config, Fault};

/// Most levels of a score.
const MOST_LEVELS: usize = 10;

/// A question: its labels, or the levels of its score.
struct Question {
    name: Option<String>,
    choices: Vec<String>,
    are_levels: bool,
}

impl Question {
    /// The answer with a label. With levels: with the place of a score.
    fn choice(&self, label: &str) -> Value {
        if self.are_levels {
            return self.score(label);
        }
        let part = 0.1 / self.choices.len().max(2) as f64;
        let probability = |value: &String| {
            let is_it = value == label;
            json!({"value": value, "probability": if is_it { 0.9 + part } else { part }})
        };
        let probabilities: Vec<Value> = self.choices.iter().map(probability).collect();
        json!({
            "type": "choice", "name": self.name, "choice": label, "confidence": 0.9, "probabilities": probabilities,
        })
    }

    /// The answer with a score: its place between two levels, each as likely as it is near.
    fn score(&self, score: &str) -> Value {
        let number = |text: Option<&String>| text.and_then(|text| text.parse::<f64>().ok());
        let (low, high) = (number(self.choices.first()).unwrap_or(0.0), number(self.choices.last()).unwrap_or(1.0));
        let last = self.choices.len() as f64 - 1.0;
        // Beyond the scale, if it is none.
        let place = score.parse::<f64>().map_or(last + 1.0, |score| (score - low) / (high - low) * last);
        let level = |(at, label): (usize, &String)| {
            let probability = (1.0 - (place - at as f64).abs()).max(0.0);
            json!({"value": at, "label": label, "probability": probability})
        };
        let probabilities: Vec<Value> = self.choices.iter().enumerate().map(level).collect();
        json!({
            "type": "score", "name": self.name, "score": place, "confidence": 0.9, "probabilities": probabilities,
        })
    }
}

/// A request for decisions.
pub(crate) struct Questions {
    model: String,
    input: String,
    all: Vec<Question>,
    tokens: u64,
}

impl Questions {
    /// Reads a body; the error is the status to answer.
    pub(crate) fn read(body: &Value, config: &Config) -> Result<Self, Reply> {
        let invalid = |param: &str, message: &str| Err(Reply::invalid(param, "", message));
        if !config.decisions {
            return Err(Reply::error(404, "invalid_request_error", "", "unknown_url", "Unknown request URL."));
        }
        let known = ["model", "input", "questions", "prompt_cache_key", "prompt_cache_options", "safety_identifier"];
        if let Some(key) = body.as_object().and_then(|map| map.keys().find(|key| !known.contains(&key.as_str()))) {
            return invalid(key, &format!("Unknown parameter: '{key}'."));
        }
        let (Some(model), Some(input)) = (body["model"].as_str(), body["input"].as_str()) else {
            return invalid("input", "'model' and 'input' must be texts");
        };
        let given = body["questions"].as_array().map(Vec::as_slice).unwrap_or_default();
        if given.is_empty() || given.len() > config.max_questions {
            return invalid("questions", &format!("'questions' must have 1 to {} items", config.max_questions));
        }
        let mut all = Vec::with_capacity(given.len());
        for question in given {
            let are_levels = question["type"] == "score";
            let (members, member) = if are_levels { ("levels", "label") } else { ("choices", "value") };
            let values = question[members].as_array().into_iter().flatten().map(|choice| choice[member].as_str());
            let choices: Option<Vec<String>> = values.map(|value| value.map(str::to_owned)).collect();
            let most = if are_levels { config.max_choices.min(MOST_LEVELS) } else { config.max_choices };
            let is_one = |all: &Vec<String>| {
                (2..=most).contains(&all.len()) && all.iter().collect::<HashSet<_>>().len() == all.len()
            };
            let Some(choices) = choices.filter(is_one) else {
                return invalid("questions", &format!("'{members}' must have 2 to {most} different values"));
            };
            if !(are_levels || question["type"] == "choice") || !question["instructions"].is_string() {
                return invalid("questions", "a question must have a type and instructions");
            }
            all.push(Question { name: question["name"].as_str().map(str::to_owned), choices, are_levels });
        }
        let count = tokens(input) + given.iter().map(|question| tokens(&question.to_string())).sum::<u64>();
        Ok(Self { model: model.to_owned(), input: input.to_owned(), all, tokens: count })
    }

    /// The same as a chat, which the checks, the limits and the counts of rows take.
    pub(crate) fn as_chat(&self) -> Chat {
        Chat {
            model: self.model.clone(),
            system: self.input.clone(),
            user: self.input.clone(),
            max_tokens: None,
            old_max_tokens: false,
            format: Format::Text,
            system_tokens: 0,
            is_flex: false,
            logprobs: false,
            prompt_tokens: self.tokens,
        }
    }

    /// The bill, and the answers to the questions. A fault that makes no difference here is taken out.
    pub(crate) fn answer(&self, task: &Task, fault: &mut Option<Fault>, rng: &mut Rng) -> (Answer, Vec<Value>) {
        let right = |question: &Question| {
            let row = task.rows.iter().find(|row| Some(&row.index) == question.name.as_ref());
            let label = row.map(|row| &row.code).filter(|code| question.are_levels || question.choices.contains(code));
            let label = label.or(question.choices.first()).map_or("", String::as_str);
            (question.choice(label), row.and_then(|row| row.id))
        };
        let mut all: Vec<(Value, Option<RowId>)> = self.all.iter().map(right).collect();
        let one = rng.usize(..all.len());
        let without_names = |all: &mut Vec<(Value, Option<RowId>)>| {
            all.iter_mut().for_each(|(answer, _)| answer["name"] = Value::Null);
        };
        match fault {
            None | Some(Fault::Hang | Fault::ResetAfter | Fault::MalformedJson) => {}
            Some(Fault::DropId) => drop(all.remove(one)),
            Some(Fault::InventId) => {
                let is_asked = |name: &String| self.all.iter().any(|question| question.name.as_ref() == Some(name));
                let name = (100..1_000).map(|n: u16| n.to_string()).find(|name| !is_asked(name));
                all[one] = (self.all[one].choice(&self.all[one].choices[0]), None);
                all[one].0["name"] = name.into();
            }
            Some(Fault::DoubleId) => {
                let (question, given) = (&self.all[one], all[one].0.clone());
                let other =
                    question.choices.iter().find(|label| question.choice(label) != given).map_or("zz", String::as_str);
                all.push((question.choice(other), None));
                all[one].1 = None;
            }
            Some(Fault::UnknownCode) => all[one] = (self.all[one].choice("zz"), None),
            Some(Fault::EmptyAnswer) => all.clear(),
            Some(Fault::Refusal) => all[one] = (json!({"type": "refusal", "name": self.all[one].name}), None),
            Some(Fault::ContentFilter) => {
                for (question, answer) in self.all.iter().zip(&mut all) {
                    *answer = (json!({"type": "refusal", "name": question.name}), None);
                }
            }
            Some(Fault::ShuffledVectors) => rng.shuffle(&mut all),
            Some(Fault::Nameless) => without_names(&mut all),
            Some(Fault::NamelessDropped) => {
                all.remove(one);
                without_names(&mut all);
                all.iter_mut().for_each(|(_, answered)| *answered = None);
            }
            Some(_) => *fault = None,
        }
        let is_whole = *fault != Some(Fault::MalformedJson);
        let answer = Answer {
            content: None,
            refusal: None,
            finish_reason: "stop",
            completion_tokens: 0,
            thinking_tokens: 0,
            answered: all.iter().filter_map(|(_, id)| *id).filter(|_| is_whole).collect(),
        };
        (answer, all.into_iter().map(|(answer, _)| answer).collect())
    }

    pub(crate) fn reply(&self, answers: &[Value], cached: u64, fault: Option<&Fault>) -> Reply {
        let mut reply = Reply::json(
            200,
            &json!({
                "model": self.model,
                "answers": answers,
                "usage": {
                    "input_tokens": self.tokens,
                    "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                    "output_tokens": 0,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": self.tokens,
                },
            }),
        );
        if fault == Some(&Fault::MalformedJson) {
            reply.body.truncate(reply.body.floor_char_boundary(reply.body.len() / 2));
        }
        reply
    }
}
