//! Outside voices: the official Python clients of the providers ask the fake provider what our dialects ask, and the two
//! requests are compared field by field. The fake provider's answers are read by the clients' own types, strictly.
//!
//! `LLM_BATCH_TEST_SDKS` names a Python that has the clients (`scripts/setup sdks`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use llm_batch_core::dialect::decisions::Questions;
use llm_batch_core::dialect::embeddings::{Encoding, Texts};
use llm_batch_core::dialect::{Api, Ask, Format};
use llm_batch_core::forms::Form;
use llm_batch_core::options::{AnswerShape, AskBy, Options};
use llm_batch_core::task::Spec;
use llm_batch_core::{prompt, request};
use llm_fake_provider::{Config, FakeProvider, Fault};
use serde_json::{Map, Value, json};
use support::*;

/// The known differences, and their reasons.
const KNOWN: &[(&str, &str)] = &[
    ("gemini: /systemInstruction/role: \"user\" is theirs, null ours", "the API reads no role of this content"),
    ("mistral: /stream: false is theirs, null ours", "the default"),
    ("ollama: /tools: [] is theirs, null ours", "there are none"),
    ("ollama: /shift: null is theirs, false ours", "the client has no word for it; the server takes it"),
    ("ollama: /truncate: null is theirs, false ours", "the client has no word for it in chats; the server takes it"),
    (
        "azure: choices.0.content_filter_results: Extra inputs are not permitted",
        "Azure answers so; the client is OpenAI's, whose API has no such field",
    ),
    (
        "mistral: usage.prompt_tokens_details: Extra inputs are not permitted",
        "the API tells what was cached so; the client keeps it among the fields that its type does not name",
    ),
];

/// Most tokens of a request.
const CONTEXT: u64 = 4_096;

/// A provider that is asked in a dialect by its client, and what we ask.
struct Asked {
    api: Api,
    provider: FakeProvider,
    questions: Vec<Value>,
    ours: Vec<Value>,
}

impl Asked {
    /// In all forms, two of them answered otherwise; and by decisions, if it has them.
    fn new(api: Api) -> Self {
        // Anthropic's client sends its key as `Authorization: Bearer`. The API takes that and `x-api-key`, which is ours.
        let api_key = (api.name() != "anthropic").then(|| KEY.to_owned());
        let provider = provider(Config { api_key, thinking_tokens: 7, tells_thinking: true, ..Config::default() });
        provider.script([None, None, None, Some(Fault::CutByLength), Some(Fault::Refusal)]);
        let spec = Spec::from_json("classify", &json!({"instruction": "Tickets.", "labels": LABELS})).unwrap();
        let kind = spec.prepare(&Options::default(), &str::len);
        let system = request::system(&*kind);
        let row = |n: u16| prompt::row(417 + n, &prompt::quote(&format!("#r{n:06}:bug#")), None);
        let user: String = (0..3).map(row).collect();
        let schema = request::format(AnswerShape::Properties, Form::Schema, &*kind, &[417, 418, 419]).unwrap();
        // Anthropic has no JSON without a schema.
        let json = (api.name() != "anthropic").then_some(Format::Json);
        let (mut questions, mut ours) = (Vec::new(), Vec::new());
        let formats = [None, json, Some(schema.clone()), Some(schema.clone()), Some(schema.clone())];
        for format in formats.into_iter().filter(|_| api.dialect().asks()) {
            let schema = match &format {
                Some(Format::Schema { schema, .. }) => Some(schema),
                _ => None,
            };
            questions.push(json!({
                "api": api.name(), "base": provider.base_of(api.name()), "key": KEY, "model": "m", "system": system,
                "user": user, "max_tokens": 300, "context": CONTEXT, "schema": schema, "json": format.is_some(),
            }));
            ours.push(api.dialect().body(&Ask {
                model: "m",
                system: &system,
                no_system_role: false,
                user: &user,
                max_tokens: 300,
                max_completion_tokens: false,
                context: CONTEXT,
                format: format.as_ref(),
                parameters: &Map::new(),
                no_sampling: false,
                tier: Default::default(),
            }));
        }
        if let Some(decisions) = api.dialect().decisions() {
            let kind = spec.prepare(&Options { ask_by: AskBy::Decisions, ..Options::default() }, &str::len);
            let (ids, choices) = ([417, 418, 419], kind.choices().unwrap());
            let input = request::decided(&*kind) + &user;
            questions.push(json!({
                "api": api.name(), "base": provider.base_of(api.name()), "key": KEY, "model": "m", "input": input,
                "ids": ids, "labels": LABELS, "asks": "Which label is right for text {}?",
            }));
            let parameters = &Map::new();
            ours.push(decisions.body(&Questions { model: "m", input: &input, ids: &ids, choices, parameters }));
        }
        // Of the clients these are asked for vectors.
        let is_asked = api.name() == "ollama" || !api.dialect().asks();
        if let Some(embeddings) = api.dialect().embeddings().filter(|_| is_asked) {
            let texts = ["#r1:bug#".to_owned(), "ü".to_owned()];
            questions.push(json!({
                "api": api.name(), "base": provider.base_of(api.name()), "key": KEY, "model": "m", "texts": texts,
                "dimensions": 3,
            }));
            ours.push(embeddings.body(&Texts {
                model: "m",
                texts: &texts,
                dimensions: 3,
                input_type: (api.name() == "voyage").then_some("document"),
                encoding: Some(Encoding::Base64),
                parameters: &Map::new(),
            }));
        }
        Self { api, provider, questions, ours }
    }
}
/// The fields in which two requests differ.
fn differences(path: &str, theirs: &Value, ours: &Value, found: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                let of = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                differences(&format!("{path}/{key}"), &of(a), &of(b), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}/{n}"), a, b, found);
            }
        }
        _ if theirs == ours => {}
        _ => found.push(format!("{path}: {theirs} is theirs, {ours} ours")),
    }
}

/// Asks through the clients; what is wrong with each answer by their types.
fn ask(python: &str, questions: &[Value]) -> Vec<Option<Vec<String>>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/python/ask_sdks.py");
    let mut child =
        Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a Python");
    child.stdin.take().unwrap().write_all(json!(questions).to_string().as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "what it said is above");
    serde_json::from_slice(&done.stdout).unwrap()
}

#[test]
fn the_official_clients_ask_as_we_do_and_can_read_the_answers() {
    let Ok(python) = std::env::var("LLM_BATCH_TEST_SDKS") else {
        eprintln!("SKIPPED the_official_clients_ask_as_we_do_and_can_read_the_answers: LLM_BATCH_TEST_SDKS is not set");
        return;
    };
    // System One has no client.
    let clients = Api::ALL.iter().filter(|api| api.name() != "systemone");
    let asked: Vec<Asked> = clients.map(|api| Asked::new(*api)).collect();
    let questions: Vec<Value> = asked.iter().flat_map(|one| one.questions.clone()).collect();
    let mut unfit = ask(&python, &questions).into_iter();
    let mut found = BTreeSet::new();
    for Asked { api, provider, ours, .. } in asked {
        let (theirs, stats) = (provider.bodies(), provider.stats());
        assert_eq!((theirs.len(), stats.by_status.keys().collect::<Vec<_>>()), (ours.len(), vec![&200]), "{api:?}");
        for (theirs, ours) in theirs.iter().zip(&ours) {
            let mut differing = unfit.next().unwrap().unwrap_or_default();
            differences("", theirs, ours, &mut differing);
            found.extend(differing.iter().map(|what| format!("{}: {what}", api.name())));
        }
    }
    // A difference that is gone must not be listed.
    assert_eq!(found, KNOWN.iter().map(|(what, _)| (*what).to_owned()).collect());
}
