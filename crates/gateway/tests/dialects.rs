//! Promises that hold in every dialect, against the fake provider that speaks it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use llm_batch_core::dialect::{Api, Counts};
use llm_batch_core::options::{AnswerShape, StructuredOutput};
use llm_batch_core::task::Spec;
use llm_batch_core::vector;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, Fault, Latency, Reserve, embedding, kinds};
use serde_json::{Value, json};
use support::*;

/// The dialects that answer chats.
fn chats() -> impl Iterator<Item = &'static Api> {
    Api::ALL.iter().filter(|api| api.dialect().asks())
}

/// Returns true if the headers of a dialect's answers tell the limits.
fn tells_limits(api: Api) -> bool {
    !["gemini", "cohere", "ollama"].contains(&api.name())
}

#[test]
fn every_kind_is_answered_in_every_form_and_the_accounts_are_the_providers() {
    let labels = json!({"instruction": "Tickets.".repeat(600), "labels": LABELS});
    let mut tasks = vec![("classify".to_owned(), labels)];
    for (kind, (_, spec)) in kinds::<(String, Value)>("tasks").unwrap() {
        if tasks.iter().all(|(known, _)| *known != kind) {
            tasks.push((kind, spec));
        }
    }
    for api in chats() {
        let config = Config { cache_prefix: true, thinking_tokens: 7, tells_thinking: true, ..Config::default() };
        let (setup, provider) = (Setup::new(64 << 20), keyed(config));
        let mut sum = Spent::default();
        for (kind, spec) in &tasks {
            for (shape, form) in [
                (AnswerShape::Map, StructuredOutput::Auto),
                (AnswerShape::Properties, StructuredOutput::Auto),
                (AnswerShape::Map, StructuredOutput::None),
            ] {
                let mut client = speaks(&setup, &provider, *api, |s| {
                    s.task.spec = Spec::from_json(kind, spec).unwrap();
                    (s.task.options.answer_shape, s.task.options.structured_output) = (shape, form);
                });
                client.rows(0..30);
                let (got, spent) = client.answers(30);
                for (n, o) in &got {
                    let is_fine =
                        matches!(o.verdict, Verdict::Answer(_)) && (kind != "classify" || is_right(*n, &o.verdict));
                    assert!(is_fine && o.attempts == 1, "{api:?}, {kind}, {shape:?}, {form:?}: {o:?}");
                }
                add(&mut sum, &spent);
            }
        }
        let stats = provider.stats();
        assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{api:?}: {:?}", stats.by_status);
        assert_eq!((sum.input_tokens, sum.output_tokens), (stats.prompt_tokens, stats.completion_tokens), "{api:?}");
        // Ollama has no word for it.
        let cached = if api.name() == "ollama" { 0 } else { stats.cached_tokens };
        assert_eq!(sum.cached_input_tokens, cached, "{api:?}");
        assert!(stats.cached_tokens > 0 && stats.written_tokens > 0, "{api:?}");
        let written = if api.dialect().cache_write_surcharge("gpt-4o") > 0 { stats.written_tokens } else { 0 };
        assert_eq!(sum.written_input_tokens, written, "{api:?}");
        assert!(provider.bodies().iter().all(|body| !body.to_string().contains(KEY)), "{api:?}");
    }
}

/// The vectors of this many rows, each its own text's; what was spent for them.
#[track_caller]
fn vectors_are_right(client: &mut Client, rows: u64, api: Api, what: &str) -> Spent {
    client.rows(0..rows);
    let (got, spent) = client.answers(rows as usize);
    for (n, outcome) in &got {
        let Verdict::Answer(answer) = &outcome.verdict else { panic!("{what}: row {n}: {outcome:?}") };
        let found = vector::decode(answer.0[0].as_deref().unwrap()).unwrap();
        let mut wanted = embedding(&text(*n), DIMENSIONS);
        // Gemini's are made as long as those of whole vectors.
        if api.name() == "gemini" {
            let length = wanted.iter().map(|n| f64::from(*n).powi(2)).sum::<f64>().sqrt();
            wanted.iter_mut().for_each(|n| *n = (f64::from(*n) / length) as f32);
        }
        assert_eq!(found, wanted, "{what}: row {n}");
    }
    spent
}

const DIMENSIONS: usize = 16;

/// The dialects that embed, and a client of each.
fn embedders() -> impl Iterator<Item = Api> {
    Api::ALL.iter().copied().filter(|api| api.dialect().embeddings().is_some())
}

fn embeds(stream: &mut Stream) {
    stream.task.spec = Spec::from_json("embed", &json!({"dimensions": DIMENSIONS})).unwrap();
    (stream.task.options.max_rows_per_request, stream.task.options.max_attempts) = (500, 10);
    // Some providers take few texts a minute.
    stream.model.inputs_per_minute = Some(10_000_000);
}

/// Each text gets its own vector, in requests as large as the provider takes, and the accounts are the provider's.
#[test]
fn each_text_gets_its_own_vector_in_every_dialect() {
    for api in embedders() {
        let (setup, provider) = (Setup::with_cache(0), keyed(Config::default()));
        let mut client = speaks(&setup, &provider, api, embeds);
        let spent = vectors_are_right(&mut client, 600, api, api.name());
        let stats = provider.stats();
        assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{api:?}: {:?}", stats.by_status);
        assert_eq!((spent.input_tokens, spent.output_tokens), (stats.prompt_tokens, 0), "{api:?}");
        let most = api.dialect().embeddings().unwrap().most_texts().min(500);
        assert!(stats.requests >= 600_u64.div_ceil(most as u64), "{api:?}: {}", stats.requests);
        assert!(provider.bodies().iter().all(|body| !body.to_string().contains(KEY)), "{api:?}");

        let models = keyed(Config { models: Some(vec!["x".into()]), ..Config::default() });
        let mut client = speaks(&setup, &models, api, embeds);
        assert_eq!(stopped(&mut client, "unknown").reason, StopReason::NotFound, "{api:?}");
    }
}

/// Whatever goes wrong, no text gets another's vector.
#[test]
fn vectors_are_asked_again_in_every_dialect() {
    // An answer without indices cannot be shuffled.
    let faults = Fault::OF_VECTORS.into_iter().filter(|f| !matches!(f, Fault::InventId | Fault::ShuffledVectors));
    let faults: Vec<Fault> =
        faults.chain([Fault::Http500, Fault::Http503, Fault::RateLimit429, Fault::ResetAfter]).collect();
    for api in embedders() {
        let setup = Setup::with_cache(0);
        let provider = keyed(Config::default());
        provider.script(faults.iter().cloned().map(Some));
        let mut client = speaks(&setup, &provider, api, embeds);
        vectors_are_right(&mut client, 1_500, api, api.name());
        let config = Config { dimensions: false, base64: false, ..Config::default() };
        let provider = keyed(config);
        let mut client = speaks(&setup, &provider, api, |s| {
            s.task.spec = Spec::from_json("embed", &json!({"dimensions": 384})).unwrap();
            s.model.model = "another".into();
        });
        client.rows(0..30);
        let (got, _) = client.answers(30);
        assert!(got.values().all(|o| matches!(o.verdict, Verdict::Answer(_))), "{api:?}: {got:?}");
    }
}

#[test]
fn troubles_are_of_their_classes_and_no_key_is_shown() {
    for api in chats() {
        let setup = Setup::new(64 << 20);
        // The provider is the same, but for what stands in its way; and so is the lane, but for the model.
        let of = |config: Config, fault: Option<Fault>, what: &str| {
            let provider = keyed(config);
            provider.script([fault]);
            stopped(&mut speaks(&setup, &provider, *api, |s| s.model.model = what.to_owned()), what)
        };
        let wrong = Config { api_key: Some("another".into()), ..Config::default() };
        let provider = provider(wrong);
        let stop = stopped(&mut speaks(&setup, &provider, *api, |_| {}), "a wrong key");
        assert_eq!(stop.reason, StopReason::Auth, "{api:?}: {stop:?}");
        let models = Config { models: Some(vec!["x".into()]), ..Config::default() };
        let stop = of(models, None, "unknown");
        assert_eq!(stop.reason, StopReason::NotFound, "{api:?}: {stop:?}");
        // Ollama has no money, and Gemini says of it what it says of a quota.
        let reason = match api.name() {
            "ollama" => None,
            "gemini" => Some(StopReason::Quota),
            _ => Some(StopReason::Spend),
        };
        if let Some(reason) = reason {
            let stop = of(Config::default(), Some(Fault::SpendLimit429), "spent");
            assert_eq!(stop.reason, reason, "{api:?}: {stop:?}");
        }
        let quotes =
            json!({"error": {"message": format!("{KEY} may not"), "type": "x"}, "message": format!("{KEY} may not")});
        let stop = of(Config::default(), Some(Fault::Status(403, quotes.to_string())), "quoted");
        assert_eq!(stop.reason, StopReason::Auth, "{api:?}: {stop:?}");
        assert!(stop.message.contains("[redacted]") && !stop.message.contains(KEY), "{api:?}: {stop:?}");
        for line in setup.log.try_iter() {
            assert!(!line.contains(KEY), "{api:?}: {line}");
        }
    }
}

#[test]
fn what_passes_is_asked_again_and_what_is_refused_is_done_without() {
    for api in chats() {
        let setup = Setup::new(64 << 20);
        let passing = [
            Fault::Http500,
            Fault::Http503,
            Fault::RateLimit429,
            Fault::TooLarge429,
            Fault::CutByLength,
            Fault::Refusal,
            Fault::ContentFilter,
            Fault::EmptyAnswer,
            Fault::ResetAfter,
        ];
        for fault in passing {
            let (provider, what) = (keyed(Config::default()), format!("{api:?}, {fault}"));
            provider.script([Some(fault)]);
            let mut client = speaks(&setup, &provider, *api, |s| s.model.model = what.replace(' ', ""));
            all_right(&mut client, 0..30, &what);
            assert!(provider.stats().requests > 1, "{what}");
        }
        for (n, refusing) in [
            Config { json_schema: false, json_object: false, ..Config::default() },
            Config { system_role: false, ..Config::default() },
            Config { max_answer_tokens: Some(300), ..Config::default() },
            Config { context_tokens: Some(900), ..Config::default() },
        ]
        .into_iter()
        .enumerate()
        {
            let provider = keyed(refusing);
            let mut client = speaks(&setup, &provider, *api, |s| s.model.model = format!("refuses{n}"));
            all_right(&mut client, 0..60, &format!("{api:?}, {n}"));
        }
    }
}

/// A limit is kept and used, as the provider counts it; and what the headers say of it is read.
#[test]
fn limits_are_kept_in_every_dialect() {
    let keeps = |api: Api| {
        let (latency, window) =
            (Latency { base: Duration::from_millis(100), ..Latency::default() }, Duration::from_secs(5));
        let reserve = if api.dialect().counts() == Counts::Reserved { Reserve::PromptPlusMax } else { Reserve::Actual };
        let config = Config { tokens_per_window: Some(50_000), reserve, window, latency, ..Config::default() };
        let (setup, provider) = (Setup::with_cache(0), keyed(config));
        // The gateway keeps in 6 s what this one keeps in 5: on a busy machine a request may get there late.
        let mut client = speaks(&setup, &provider, api, |s| s.model.tokens_per_minute = Some(500_000));
        all_right(&mut client, 0..2_000, api.name());
        let stats = provider.stats();
        let of = |status: u16| stats.by_status.get(&status).copied().unwrap_or(0);
        assert_eq!(of(200) + of(429), stats.requests, "{api:?}: {:?}", stats.by_status);
        assert!(of(429) * 20 <= stats.requests, "{api:?}: {:?}", stats.by_status);
        assert!(stats.peak_window_tokens <= 50_000, "{api:?}: {}", stats.peak_window_tokens);
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = chats().map(|api| scope.spawn(move || keeps(*api))).collect();
        running.into_iter().for_each(|thread| thread.join().unwrap());
    });
    for api in chats() {
        let (setup, provider) =
            (Setup::new(64 << 20), keyed(Config { tokens_per_window: Some(6_000), ..Config::default() }));
        let mut client = speaks(&setup, &provider, *api, |_| {});
        all_right(&mut client, 0..5, api.name());
        let limit = client.only_activity().tokens_limit;
        assert_eq!(limit, tells_limits(*api).then_some(6_000), "{api:?}");
    }
}

#[test]
fn the_limit_of_input_that_anthropic_tells_is_read() {
    let api = *Api::ALL.iter().find(|api| api.name() == "anthropic").unwrap();
    let (setup, provider) =
        (Setup::new(64 << 20), keyed(Config { input_tokens_per_window: Some(90_000), ..Config::default() }));
    let mut client = speaks(&setup, &provider, api, |_| {});
    all_right(&mut client, 0..5, "told");
    let activity = client.only_activity();
    assert!(activity.used.is_some() && activity.tokens_limit.is_none(), "{activity:?}");
}
