//! Vectors: each text gets its own, whatever goes wrong on the way, and nothing that is no vector.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;

use llm_batch_core::task::Spec;
use llm_batch_core::vector;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, embedding};
use serde_json::json;
use support::*;

const ROWS: u64 = 600;
const DIMENSIONS: usize = 48;

fn embedder(stream: &mut Stream) {
    stream.task.spec = Spec::from_json("embed", &json!({"dimensions": DIMENSIONS})).unwrap();
    stream.task.options.max_rows_per_request = 100;
    stream.task.options.max_attempts = 10;
}

fn ask(provider: &FakeProvider, change: impl Fn(&mut Stream)) -> (BTreeMap<u64, Verdict>, Spent) {
    let setup = Setup::with_cache(0);
    let mut client = setup.client(provider, |s| {
        embedder(s);
        change(s);
    });
    client.rows(0..ROWS);
    client.outcomes(ROWS as usize)
}

#[track_caller]
fn check(got: &BTreeMap<u64, Verdict>) {
    assert_eq!(got.len() as u64, ROWS);
    for (n, verdict) in got {
        assert_eq!(*verdict, label(&vector::encode(&embedding(&text(*n), DIMENSIONS))), "row {n}");
    }
}

#[test]
fn each_text_gets_its_own_vector_in_every_encoding() {
    for (base64, dimensions) in [(true, true), (false, true)] {
        let provider = provider(Config { base64, dimensions, ..Config::default() });
        let (got, spent) = ask(&provider, |_| {});
        check(&got);
        let stats = provider.stats();
        // The refusal was learnt once, by the requests that were under way.
        assert!(stats.admitted <= 8 && stats.requests <= 8 + 4, "{stats:?}");
        assert_eq!((spent.input_tokens, spent.output_tokens), (stats.prompt_tokens, 0));
        let encoding = if base64 { "base64" } else { "float" };
        let last = provider.bodies().pop().unwrap();
        assert_eq!((&last["encoding_format"], &last["dimensions"]), (&json!(encoding), &json!(DIMENSIONS)));
        assert!(asked(&provider).values().all(|asked| *asked == 1));
    }
}

#[test]
fn a_model_that_takes_no_dimensions_is_asked_without() {
    let provider = provider(Config { dimensions: false, ..Config::default() });
    let (got, _) = ask(&provider, |s| s.task.spec = Spec::from_json("embed", &json!({"dimensions": 384})).unwrap());
    assert!(got.values().all(|v| matches!(v, Verdict::Answer(_))), "{got:?}");
}

#[test]
fn vectors_are_right_whatever_goes_wrong() {
    let faults: Vec<Fault> = Fault::OF_VECTORS
        .into_iter()
        .chain([Fault::Http500, Fault::Http503, Fault::RateLimit429, Fault::ResetBefore, Fault::ResetAfter])
        .collect();
    for base64 in [true, false] {
        let faults = faults.iter().map(|fault| (fault.clone(), 0.02)).collect();
        let (got, _) = ask(&provider(Config { faults, base64, ..Config::default() }), |s| {
            s.task.options.max_rows_per_request = 20;
        });
        check(&got);
    }
}

#[test]
fn each_fault_of_vectors_is_found() {
    for fault in Fault::OF_VECTORS {
        let provider = provider(Config::default());
        provider.script([Some(fault.clone())]);
        let (got, _) = ask(&provider, |_| {});
        check(&got);
        assert_eq!(provider.stats().faults.get(fault.name()), Some(&1), "{fault}");
    }
}

#[test]
fn a_model_whose_vectors_have_another_length_stops_the_task() {
    let provider = provider(Config { dimensions: false, ..Config::default() });
    let setup = Setup::with_cache(0);
    let mut client = setup.client(&provider, embedder);
    client.rows(0..50);
    // Before it is what the requests took.
    loop {
        match client.hear("a stop") {
            Some(FromGateway::Stopped(stop)) => {
                assert_eq!(stop.reason, StopReason::NoAnswers, "{stop:?}");
                return;
            }
            Some(FromGateway::Outcomes { outcomes, .. }) if outcomes.is_empty() => {}
            other => panic!("{other:?}"),
        }
    }
}
