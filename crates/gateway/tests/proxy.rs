//! A real proxy between us and a provider: LiteLLM's, asked in each dialect that it serves. It says what its provider says in
//! words, shapes and headers of its own. The fake provider is behind it, and the local model, if `LLM_BATCH_TEST_MODEL_URL`
//! names one.
//!
//! `LLM_BATCH_TEST_PROXY` names a Python that has the proxy (`scripts/setup proxy`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use llm_batch_core::dialect::{Api, Counts};
use llm_batch_core::task::Spec;
use llm_batch_core::vector;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, embedding};
use serde_json::{Value, json};
use support::*;

/// The proxy's key, which is not its provider's.
const MASTER: &str = "sk-proxy-0123456789";

/// A proxy; its process ends when this does, as its stdin is closed.
struct Proxy {
    process: Child,
    config: PathBuf,
    url: String,
}

impl Proxy {
    /// Serves these models: a name, what stands behind it, and further members of that.
    fn start(python: &str, models: &[(&str, &str, Value)]) -> Self {
        let served = |(name, model, more): &(&str, &str, Value)| {
            let mut behind = json!({"model": format!("openai/{model}"), "api_key": KEY});
            behind.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"model_name": name, "litellm_params": behind})
        };
        // It neither asks again nor leaves a provider out for a while: what it hears is what we hear.
        let config = json!({
            "model_list": models.iter().map(served).collect::<Vec<_>>(),
            "litellm_settings": {"num_retries": 0},
            "router_settings": {"num_retries": 0, "disable_cooldowns": true},
            "general_settings": {"master_key": MASTER},
        });
        let path = std::env::temp_dir().join(format!("llm_batch-proxy-{}.yaml", std::process::id()));
        std::fs::write(&path, config.to_string()).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/python/serve_proxy.py");
        let mut process = Command::new(python)
            .args([script, path.to_str().unwrap()])
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a Python");
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let port = lines.find_map(|line| Some(line.strip_prefix("listening on ")?.to_owned()));
        let port = port.expect("the proxy listens; what it said is above");
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, config: path, url: format!("http://127.0.0.1:{port}") }
    }

    /// A client that asks it for a model in a dialect.
    fn client(&self, setup: &Setup, api: Api, model: &str, change: impl FnOnce(&mut Stream)) -> Client {
        let mut client = setup.connect();
        let version = if api.name() == "gemini" { "v1beta" } else { "v1" };
        let mut stream = stream_to(&format!("{}/{version}", self.url));
        (stream.endpoint.api, stream.endpoint.counts) = (api, Counts::default());
        stream.endpoint.api_key = Some(Secret(MASTER.into()));
        stream.model.model = model.to_owned();
        change(&mut stream);
        client.say(&ToGateway::Open(Box::new(stream)));
        client
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.config);
    }
}

fn api(name: &str) -> Api {
    *Api::ALL.iter().find(|api| api.name() == name).unwrap()
}

#[test]
fn a_proxy_is_asked_in_each_dialect_that_it_serves() {
    let Ok(python) = std::env::var("LLM_BATCH_TEST_PROXY") else {
        eprintln!("SKIPPED a_proxy_is_asked_in_each_dialect_that_it_serves: LLM_BATCH_TEST_PROXY is not set");
        return;
    };
    let provider = keyed(Config { models: Some(vec!["behind".into(), "m".into()]), ..Config::default() });
    let here = json!({"api_base": provider.base_url()});
    let with = |more: Value| {
        let mut all = here.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let mut models = vec![
        ("served", "behind", here.clone()),
        ("limited", "behind", with(json!({"tpm": 50_000, "rpm": 1_000}))),
        ("revoked", "behind", with(json!({"api_key": "sk-revoked"}))),
        ("gone", "nobody", here.clone()),
    ];
    let local = std::env::var("LLM_BATCH_TEST_MODEL_URL");
    if let Ok(url) = &local {
        models.push(("local", "local", json!({"api_base": url})));
    }
    let proxy = Proxy::start(&python, &models);
    for name in ["openai", "anthropic", "gemini"] {
        is_answered(&proxy, &provider, api(name));
        is_refused(&proxy, api(name));
        if local.is_ok() {
            the_local_model_is_asked(&proxy, api(name));
        }
    }
    limits_are_read(&proxy);
    vectors_come_back(&proxy);
}

/// Each row has its label, whatever the provider behind answers at first, and the accounts are the provider's.
fn is_answered(proxy: &Proxy, provider: &FakeProvider, api: Api) {
    let (setup, before) = (Setup::new(64 << 20), provider.stats());
    let mut client = proxy.client(&setup, api, "served", |_| {});
    let spent = all_right(&mut client, 0..60, api.name());
    let stats = provider.stats();
    assert!(spent.requests > 0 && stats.requests > before.requests, "{api:?}: {spent:?}");
    assert_eq!(
        (spent.input_tokens, spent.output_tokens),
        (stats.prompt_tokens - before.prompt_tokens, stats.completion_tokens - before.completion_tokens),
        "{api:?}"
    );
    for fault in [Fault::RateLimit429, Fault::Http503, Fault::CutByLength] {
        let what = format!("{api:?}, {fault}");
        provider.script([Some(fault)]);
        let before = provider.stats().requests;
        all_right(&mut client, 100..110, &what);
        assert!(provider.stats().requests > before + 1, "{what}");
    }
}

/// What cannot be answered stops at once and says why; the keys are in none of it.
fn is_refused(proxy: &Proxy, api: Api) {
    let setup = Setup::new(64 << 20);
    let stop = |model: &str, key: &str| {
        let key = Some(Secret(key.to_owned()));
        let mut client = proxy.client(&setup, api, model, |s| s.endpoint.api_key = key);
        let stop = stopped(&mut client, &format!("{api:?}, {model}"));
        for key in [MASTER, KEY, "sk-wrong", "sk-revoked"] {
            assert!(!stop.message.contains(key), "{api:?}, {model}: {stop:?}");
        }
        stop
    };
    let refusals = [
        ("served", "sk-wrong", StopReason::Auth),
        ("revoked", MASTER, StopReason::Auth),
        ("gone", MASTER, StopReason::NotFound),
        ("unknown", MASTER, StopReason::NotFound),
    ];
    // In Gemini's dialect the proxy makes a 500 without words of all but its own refusal of a key.
    let told = if api.name() == "gemini" { 1 } else { refusals.len() };
    for (model, key, reason) in refusals.into_iter().take(told) {
        let stop = stop(model, key);
        assert_eq!(stop.reason, reason, "{api:?}, {model}: {stop:?}");
    }
}

/// The row has some end, and the model's own counts are read. A small model may say anything.
fn the_local_model_is_asked(proxy: &Proxy, api: Api) {
    let setup = Setup::new(64 << 20);
    let mut client = proxy.client(&setup, api, "local", |s| {
        (s.model.request_timeout_ms, s.model.max_request_tokens) = (120_000, 2_000);
        s.task.options.max_attempts = 1;
    });
    client.rows(0..1);
    let (_, spent) = client.answers(1);
    assert!(spent.input_tokens > 0 && spent.output_tokens > 0, "{api:?}: {spent:?}");
}

fn limits_are_read(proxy: &Proxy) {
    let setup = Setup::new(64 << 20);
    let mut client = proxy.client(&setup, Api::default(), "limited", |_| {});
    all_right(&mut client, 0..5, "limits");
    assert_eq!(client.only_activity().tokens_limit, Some(50_000));
}

/// The proxy knows of few models that their vectors can be shortened, and says no for the others.
fn vectors_come_back(proxy: &Proxy) {
    let setup = Setup::new(64 << 20);
    let mut client = proxy.client(&setup, Api::default(), "served", |s| {
        s.task.spec = Spec::from_json("embed", &json!({"dimensions": 384})).unwrap();
    });
    client.rows(0..30);
    let (got, spent) = client.answers(30);
    for (n, outcome) in &got {
        let Verdict::Answer(answer) = &outcome.verdict else { panic!("row {n}: {outcome:?}") };
        assert_eq!(vector::decode(answer.0[0].as_deref().unwrap()).unwrap(), embedding(&text(*n), 384), "row {n}");
    }
    assert!(spent.input_tokens > 0, "{spent:?}");
}
