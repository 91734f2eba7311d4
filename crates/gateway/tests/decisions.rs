//! Decisions, in every dialect that has them: each row gets the label of its own question, whatever goes wrong on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use llm_batch_core::dialect::Api;
use llm_batch_core::options::{AskBy, Codes, Options};
use llm_batch_core::task::Spec;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, probability};
use serde_json::json;
use support::*;

const ROWS: u64 = 600;

fn deciders() -> impl Iterator<Item = Api> {
    Api::ALL.iter().copied().filter(|api| api.dialect().decisions().is_some())
}

/// Those that answer chats too.
fn talkers() -> impl Iterator<Item = Api> {
    deciders().filter(|api| api.dialect().asks())
}

/// A client whose rows are decided.
fn decides(setup: &Setup, provider: &FakeProvider, api: Api, change: impl FnOnce(&mut Stream)) -> Client {
    speaks(setup, provider, api, |s| {
        s.task.options = Options { ask_by: AskBy::Decisions, max_attempts: 10, ..Options::default() };
        change(s);
    })
}

/// Rows, all of which get their labels; what was spent for them.
#[track_caller]
fn all_right(client: &mut Client, rows: u64, what: &str) -> Spent {
    client.rows(0..rows);
    let (got, spent) = client.answers(rows as usize);
    for (n, outcome) in &got {
        assert!(is_right(*n, &outcome.verdict), "{what}: row {n}: {outcome:?}");
    }
    spent
}

/// Rows, all of which come back or are given up until the stream stops; why it does.
#[track_caller]
fn stopped(client: &mut Client, rows: u64, what: &str) -> Stop {
    client.rows(0..rows);
    let (mut stop, mut back) = (None, 0);
    while back < rows as usize || stop.is_none() {
        match client.hear(what) {
            Some(FromGateway::Stopped(why)) => stop = Some(why),
            Some(FromGateway::Outcomes { outcomes, .. }) => {
                let is_answer = |o: &Outcome| matches!(o.verdict, Verdict::Answer(_));
                assert!(!outcomes.iter().any(is_answer), "{what}: {outcomes:?}");
                back += outcomes.len();
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    stop.unwrap()
}

#[test]
fn each_row_gets_its_label_and_nothing_but_prompts_is_paid_for() {
    for api in deciders() {
        let (setup, provider) = (Setup::with_cache(0), keyed(Config::default()));
        let mut client =
            decides(&setup, &provider, api, |s| {
                // Parameters of the model's chats are not sent.
                s.model.parameters.insert("reasoning_effort".into(), "none".into());
                s.endpoint.counts = llm_batch_core::dialect::Counts::Reserved;
                s.task.spec = Spec::from_json("classify", &json!({
                "instruction": "Tickets.", "examples": [{"input": "x", "label": "bug"}],
                "labels": {"billing": "invoices, refunds", "bug": "", "shipping": "late \"or\" lost", "other": ""},
            }))
            .unwrap();
            });
        client.say(&ToGateway::Estimate(
            (0..ROWS).map(|n| Item { n, text: text(n), isolation: None, again: None }).collect(),
        ));
        let Some(FromGateway::Estimated(estimate)) = client.hear("an estimate") else { panic!() };
        let spent = all_right(&mut client, ROWS, api.name());
        let stats = provider.stats();
        assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{api:?}: {:?}", stats.by_status);
        assert_eq!((spent.input_tokens, spent.output_tokens), (stats.prompt_tokens, 0), "{api:?}");
        assert_eq!((stats.requests, estimate.requests), (12, 12), "{api:?}");
        assert!(asked(&provider).values().all(|asked| *asked == 1), "{api:?}");
        // Our count is the fake's, but for the frame of a chat and what each provider has around a question.
        let off = estimate.input_tokens as f64 / stats.prompt_tokens as f64;
        assert!((0.95..1.05).contains(&off) && estimate.output_tokens == 0, "{api:?}: {off}");
        for body in provider.bodies() {
            assert!(body["questions"].as_array().map_or(50, Vec::len) == 50, "{api:?}");
            let input = body["input"].as_str().or(body["state"].as_str()).unwrap();
            assert_eq!(input.matches("invoices, refunds").count(), 1, "{api:?}");
            assert!(!body.to_string().contains(KEY) && body.get("reasoning_effort").is_none(), "{api:?}: {body}");
        }
    }
}

/// The fake is sure of each label by nine tenths and its share of the rest.
#[test]
fn answers_have_their_probabilities_and_those_of_chats_none() {
    for api in deciders() {
        let (setup, provider) = (Setup::with_cache(1 << 20), keyed(Config::default()));
        let confidences = |client: &mut Client| -> Vec<Option<f64>> {
            client.rows(0..20);
            client.answers(20).0.values().map(|outcome| outcome.confidence).collect()
        };
        let mut client = decides(&setup, &provider, api, |_| {});
        let sure = Some(0.9 + 0.1 / LABELS.len() as f64);
        assert_eq!(confidences(&mut client), [sure; 20], "{api:?}");
        // Those of answers that were kept.
        let requests = provider.stats().requests;
        assert_eq!(confidences(&mut client), [sure; 20], "{api:?}");
        assert_eq!(provider.stats().requests, requests, "{api:?}");
        if talkers().any(|talker| talker == api) {
            let mut chat = decides(&setup, &provider, api, |s| s.task.options.ask_by = AskBy::Chat);
            assert_eq!(confidences(&mut chat), [None; 20], "{api:?}");
        }
        // A row that is asked again has the probability of its last answer, one without a label none.
        provider.script([Some(Fault::UnknownCode)]);
        client.rows(20..40);
        assert!(client.answers(20).0.values().all(|outcome| outcome.confidence == sure), "{api:?}");
        provider.script([Some(Fault::EmptyAnswer), Some(Fault::EmptyAnswer)]);
        let mut client = decides(&setup, &provider, api, |s| s.task.options.max_attempts = 1);
        client.rows(40..41);
        let outcome = client.answers(1).0.remove(&40).unwrap();
        assert!(
            matches!(outcome, Outcome { verdict: Verdict::Skip { .. }, confidence: None, .. }),
            "{api:?}: {outcome:?}"
        );
    }
}

/// A chat's answers have those of their tokens, where it is asked for them. A text has none.
#[test]
fn labels_of_a_chat_have_the_probabilities_of_their_tokens() {
    let (setup, provider) = (Setup::with_cache(1 << 20), keyed(Config::default()));
    let asks = |change: fn(&mut Stream)| {
        decides(&setup, &provider, Api::default(), |s| {
            s.task.options.ask_by = AskBy::Chat;
            s.model.parameters.insert("logprobs".into(), true.into());
            change(s);
        })
    };
    // The second time they are those of answers that were kept. Letters are the codes of the labels in their order.
    let letters = |n: u64| ["A", "B", "C", "D"][(n % 4) as usize];
    let labels = |n: u64| LABELS[(n % 4) as usize];
    let by_letters: fn(&mut Stream) = |s| s.task.options.codes = Codes::Letters;
    for (change, code) in [
        ((|_| {}) as fn(&mut Stream), &labels as &dyn Fn(u64) -> &'static str),
        (by_letters, &letters),
        (|_| {}, &labels),
    ] {
        let mut client = asks(change);
        client.rows(0..60);
        for (n, outcome) in client.answers(60).0 {
            assert!(is_right(n, &outcome.verdict), "{outcome:?}");
            let sure = probability(code(n));
            assert!(outcome.confidence.is_some_and(|c| (c - sure).abs() < 1e-9), "{sure} {outcome:?}");
        }
    }
    let mut client = asks(|s| s.task.spec = Spec::from_json("generate", &json!({"instruction": "x"})).unwrap());
    client.rows(0..20);
    assert!(client.answers(20).0.values().all(|outcome| outcome.confidence.is_none()));
}

/// A score is a place on a scale, whatever goes wrong on the way; 101 of them are told apart.
#[test]
fn each_row_gets_its_score() {
    for (api, (low, high)) in deciders().flat_map(|api| [(0, 1), (1, 5), (-10, 90)].map(|range| (api, range))) {
        let what = format!("{api:?}, {low} to {high}");
        let faults = [Fault::DropId, Fault::DoubleId, Fault::UnknownCode, Fault::Nameless, Fault::NamelessDropped];
        let faults = faults.into_iter().map(|fault| (fault, 0.03)).collect();
        let (setup, provider) = (Setup::with_cache(0), keyed(Config { faults, ..Config::default() }));
        let mut client = decides(&setup, &provider, api, |s| {
            let spec = json!({"instruction": "How glad?", "low": low, "high": high});
            s.task.spec = Spec::from_json("score", &spec).unwrap();
            s.task.options.max_rows_per_request = 10;
        });
        client.rows(0..ROWS);
        let (got, spent) = client.answers(ROWS as usize);
        assert_eq!(spent.output_tokens, 0, "{what}");
        for (n, outcome) in &got {
            let Verdict::Answer(answer) = &outcome.verdict else { panic!("{what}: row {n}: {outcome:?}") };
            let score: f64 = answer.0[0].as_deref().unwrap().parse().unwrap();
            let right = f64::from(low) + f64::from(high - low) * (n % 101) as f64 / 100.0;
            assert!((score - right).abs() < f64::from(high - low) * 1e-4, "{what}: row {n}: {score} for {right}");
            assert!(outcome.confidence.is_some_and(|c| (0.5..=1.0).contains(&c)), "{what}: row {n}: {outcome:?}");
        }
    }
}

/// Each fault once, in the first request: all rows are right in the end, and none is another's.
#[test]
fn each_fault_costs_its_rows_and_no_others() {
    for (api, fault) in deciders().flat_map(|api| Fault::OF_DECISIONS.map(|fault| (api, fault))) {
        let what = format!("{api:?}, {fault}");
        let (setup, provider) = (Setup::with_cache(0), keyed(Config::default()));
        provider.script([Some(fault.clone())]);
        let mut client = decides(&setup, &provider, api, |_| {});
        client.rows(0..100);
        let (got, _) = client.answers(100);
        let is_refused = |o: &Outcome| matches!(&o.verdict, Verdict::Skip { class, .. } if class == "refused");
        let wrong: Vec<_> = got.iter().filter(|(n, o)| !is_right(**n, &o.verdict)).collect();
        // Others know no refusal of a question: its answer is not there, and is asked for again.
        if fault == Fault::Refusal && api.name() == "openai" {
            assert!(matches!(wrong[..], [(_, o)] if is_refused(o) && o.attempts == 1), "{what}: {wrong:?}");
            assert_eq!(provider.stats().requests, 2, "{what}");
        } else {
            assert!(wrong.is_empty(), "{what}: {wrong:?}");
        }
        let stats = provider.stats();
        assert_eq!(stats.faults.get(fault.name()), Some(&1), "{what}");
        // In a map keyed by names there is no order and no doubled name.
        let is_none = match fault {
            Fault::Refusal | Fault::ShuffledVectors => true,
            Fault::Nameless => api.name() == "openai",
            Fault::DoubleId => api.name() != "openai",
            _ => false,
        };
        let again = asked(&provider).values().filter(|asked| **asked > 1).count();
        let is_lost_refusal = fault == Fault::Refusal && api.name() != "openai";
        assert_eq!(again == 0, is_none && !is_lost_refusal, "{what}: {again} asked again");
    }
}

#[test]
fn labels_are_right_whatever_goes_wrong() {
    // A refusal ends a row without a label; a request that fails counts as one of the endpoint's, which is told elsewhere.
    let is_of_answers = |fault: &Fault| !matches!(fault, Fault::Refusal | Fault::MalformedJson);
    for api in deciders() {
        let faults = Fault::OF_DECISIONS.into_iter().filter(is_of_answers).map(|fault| (fault, 0.03)).collect();
        let (setup, provider) = (Setup::with_cache(0), keyed(Config { faults, ..Config::default() }));
        let mut client = decides(&setup, &provider, api, |s| s.task.options.max_rows_per_request = 10);
        all_right(&mut client, ROWS, api.name());
    }
}

#[test]
fn what_is_refused_as_a_whole_is_asked_in_smaller_requests() {
    for api in deciders() {
        let (setup, provider) = (Setup::with_cache(0), keyed(Config { max_questions: 7, ..Config::default() }));
        all_right(&mut decides(&setup, &provider, api, |_| {}), 60, "too many questions");
        assert!(provider.stats().by_status[&400] > 0);
        // A request with as many questions as the provider takes is not refused.
        let most = api.dialect().decisions().unwrap().most_questions();
        let provider = keyed(Config { max_questions: most, ..Config::default() });
        let mut client = decides(&setup, &provider, api, |s| {
            s.model.model = "as many".into();
            (s.task.options.max_rows_per_request, s.model.max_request_tokens) = (500, 100_000);
        });
        all_right(&mut client, ROWS, "as many");
        let stats = provider.stats();
        let largest = ROWS.div_ceil(most.min(500) as u64);
        assert_eq!(stats.by_status.keys().collect::<Vec<_>>(), [&200], "{api:?}: {:?}", stats.by_status);
        assert!((largest..=2 * largest).contains(&stats.requests), "{api:?}: {}", stats.requests);
        // The filter of an input, or of each question in it.
        let provider = keyed(Config::default());
        provider.script([Some(Fault::ContentFilter)]);
        let mut client = decides(&setup, &provider, api, |s| s.model.model = "filtered".into());
        client.rows(0..20);
        let (got, _) = client.answers(20);
        let refused = got.values().filter(|o| matches!(&o.verdict, Verdict::Skip { class, .. } if class == "refused"));
        assert_eq!(refused.count(), if api.name() == "openai" { 20 } else { 0 }, "{api:?}: {got:?}");
    }
}

#[test]
fn what_is_not_served_stops_the_stream() {
    for api in deciders() {
        let setup = Setup::with_cache(0);
        let of = |config: Config, what: &str| {
            let provider = keyed(config);
            let stop = stopped(&mut decides(&setup, &provider, api, |s| s.model.model = what.into()), 30, what);
            let stats = provider.stats();
            assert!(stats.requests < 20 && stats.prompt_tokens == 0, "{api:?}, {what}: {stats:?}");
            stop
        };
        let stop = of(Config { decisions: false, ..Config::default() }, "none");
        let is_told = stop.message.contains("ask_by") == api.dialect().asks();
        // By System One it is not implemented; elsewhere it is not there.
        let missing = if api.dialect().asks() { StopReason::NotFound } else { StopReason::Rejected };
        assert!(stop.reason == missing && is_told, "{api:?}: {stop:?}");
        let models = Some(vec!["x".to_owned()]);
        assert_eq!(of(Config { models, ..Config::default() }, "unknown").reason, StopReason::NotFound, "{api:?}");
        let stop = of(Config { max_choices: 3, ..Config::default() }, "choices");
        assert!(stop.reason == StopReason::Rejected && stop.message.contains("choices"), "{api:?}: {stop:?}");
        let provider = provider(Config { api_key: Some("another".into()), ..Config::default() });
        let stop = stopped(&mut decides(&setup, &provider, api, |_| {}), 30, "a wrong key");
        assert_eq!(stop.reason, StopReason::Auth, "{api:?}: {stop:?}");
        let probed = |provider: &FakeProvider, model: &str| {
            let mut client = decides(&setup, provider, api, |s| s.model.model = model.into());
            client.say(&ToGateway::Probe);
            client.hear("a probe")
        };
        assert_eq!(probed(&keyed(Config::default()), "there"), Some(FromGateway::Probed(None)), "{api:?}");
        let gone = probed(&keyed(Config { decisions: false, ..Config::default() }), "gone");
        assert!(matches!(&gone, Some(FromGateway::Probed(Some(stop))) if stop.reason == missing), "{api:?}");
    }
}

/// A model that answers chats too: the counts of one say nothing of the other, and the limits are those of both.
#[test]
fn a_model_that_is_asked_both_ways_keeps_its_counts_apart() {
    let (setup, provider) = (Setup::with_cache(0), keyed(Config { thinking_tokens: 300, ..Config::default() }));
    let api = Api::default();
    let (mut decided, mut chat) = (
        decides(&setup, &provider, api, |_| {}),
        decides(&setup, &provider, api, |s| s.task.options.ask_by = AskBy::Chat),
    );
    for _ in 0..3 {
        all_right(&mut chat, 60, "chat");
        let spent = all_right(&mut decided, 60, "decisions");
        assert_eq!(spent.output_tokens, 0);
    }
    assert_eq!(setup.connect().only_activity().requests_total, provider.stats().requests);
    decided.say(&ToGateway::Estimate(vec![Item { n: 1, text: text(1), isolation: None, again: None }]));
    let Some(FromGateway::Estimated(estimate)) = decided.hear("an estimate") else { panic!() };
    assert_eq!(estimate.output_tokens, 0);
}

/// A client whose rows are asked in the cheaper way, of a model whose answers cost five times as much as its prompts.
fn either(setup: &Setup, provider: &FakeProvider, api: Api, change: impl FnOnce(&mut Stream)) -> Client {
    decides(setup, provider, api, |s| {
        s.task.options.ask_by = AskBy::Auto;
        s.model.prices = Some(Prices { input: 100_000, output: 500_000 });
        change(s);
    })
}

/// The rows that were decided, and those that were asked in a chat, in requests behind the first so many.
fn by_way(provider: &FakeProvider, after: usize, rows: u64) -> (u64, u64) {
    let bodies = provider.bodies();
    let questions = |body: &serde_json::Value| {
        let all = &body["questions"];
        all.as_array().map(Vec::len).or(all.as_object().map(serde_json::Map::len)).unwrap_or(0) as u64
    };
    let decided = bodies[after..].iter().map(questions).sum();
    (decided, rows - decided)
}

/// A chat is cheaper, unless the model thinks long before it answers, which nobody knows beforehand. 200 rows are enough to
/// find out; a trial of the other way has ten.
#[test]
fn what_measures_cheaper_is_asked() {
    for (api, thinking_tokens) in talkers().flat_map(|api| [(api, 0), (api, 2_000)]) {
        let what = format!("{api:?}, {thinking_tokens}");
        let (setup, provider) = (Setup::with_cache(0), keyed(Config { thinking_tokens, ..Config::default() }));
        let mut client = either(&setup, &provider, api, |_| {});
        all_right(&mut client, 200, &what);
        let before = provider.bodies().len();
        if thinking_tokens == 0 {
            assert!((1..=20).contains(&by_way(&provider, 0, 200).0), "{what}: {:?}", by_way(&provider, 0, 200));
        }
        client.rows(200..600);
        let (got, _) = client.answers(400);
        assert!(got.iter().all(|(n, outcome)| is_right(*n, &outcome.verdict)), "{what}: {got:?}");
        let (decided, in_chat) = by_way(&provider, before, 400);
        let (usual, other) = if thinking_tokens > 0 { (decided, in_chat) } else { (in_chat, decided) };
        assert!(usual >= 390 && other <= 10, "{what}: {decided} decided, {in_chat} in a chat");
        let activity = setup.connect().only_activity();
        let want = if thinking_tokens > 0 { "decisions" } else { "chats" };
        assert_eq!(activity.asked_by.as_deref().filter(|_| other == 0), Some(want).filter(|_| other == 0), "{what}");
    }
}

/// What cannot be decided is asked in a chat: that is found once for a model, and costs no row an attempt.
#[test]
fn what_is_not_decided_falls_to_a_chat() {
    for api in talkers() {
        for config in [
            Config { decisions: false, ..Config::default() },
            Config { max_choices: 3, ..Config::default() },
            Config { max_questions: 0, ..Config::default() },
        ] {
            let what = format!("{api:?}, {} {} {}", config.decisions, config.max_choices, config.max_questions);
            let (is_of_task, is_of_choices) = (config.max_questions == 0, config.max_choices == 3);
            let (setup, provider) = (Setup::with_cache(0), keyed(config));
            let mut client = either(&setup, &provider, api, |s| s.task.options.max_attempts = 1);
            all_right(&mut client, 200, &what);
            let refused = |provider: &FakeProvider| {
                let stats = provider.stats();
                stats.by_status.iter().filter(|(status, _)| **status != 200).map(|(_, n)| *n).sum::<u64>()
            };
            let before = refused(&provider);
            assert!(before > 0, "{what}");
            // Another task of that model.
            let mut other = either(&setup, &provider, api, |s| s.task.spec = tickets("Others."));
            all_right(&mut other, 60, &what);
            assert!(refused(&provider) == before || is_of_task, "{what}: {} {before}", refused(&provider));
            // One with fewer labels is tried.
            let fewer = || Spec::from_json("classify", &json!({"labels": [LABELS[0], LABELS[1]]})).unwrap();
            let mut fewer = either(&setup, &provider, api, |s| s.task.spec = fewer());
            let (before, bodies) = (refused(&provider), provider.bodies().len());
            fewer.texts((0..80).filter(|n| n % 4 < 2).map(|n| (n, n)));
            let (got, _) = fewer.answers(40);
            assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict)), "{what}: {got:?}");
            if is_of_choices {
                assert!(by_way(&provider, bodies, 40).0 > 0 && refused(&provider) == before, "{what}");
            }
        }
    }
}

/// A budget is reserved for the prompt at the worst, and for no tokens of an answer.
#[test]
fn a_budget_is_reserved_for_prompts_alone() {
    let (setup, provider) = (Setup::with_cache(0), keyed(Config::default()));
    let mut client = decides(&setup, &provider, Api::default(), |s| {
        s.budget = Some(Prices { input: 1, output: 1_000_000_000 });
    });
    client.say(&ToGateway::Allow(Allowance { cost: 1_000_000, tokens: 1_000_000 }));
    let spent = all_right(&mut client, ROWS, "a budget");
    assert!(spent.input_tokens <= 1_000_000 && spent.output_tokens == 0, "{spent:?}");
    assert_eq!(provider.stats().prompt_tokens, spent.input_tokens);
}
