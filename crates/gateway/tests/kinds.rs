//! Tasks of every kind: right values in their own columns, whatever goes wrong on the way; packs by the length of answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;

use llm_batch_core::task::Spec;
use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, kinds};
use serde_json::{Value, json};
use support::*;

const ROWS: u64 = 600;

/// The tasks that are tried: their names, kinds and specifications.
fn tasks() -> Vec<(String, String, Value)> {
    let all = kinds::<(String, Value)>("tasks").unwrap();
    all.into_iter().map(|(kind, (name, spec))| (name, kind, spec)).collect()
}

fn ask(provider: &FakeProvider, kind: &str, spec: &Value) -> (BTreeMap<u64, Verdict>, Spent) {
    let setup = Setup::with_cache(0);
    let mut client = setup.client(provider, |s| {
        s.task.spec = Spec::from_json(kind, spec).unwrap();
        s.task.options.max_attempts = 10;
    });
    client.rows(0..ROWS);
    client.outcomes(ROWS as usize)
}

#[test]
fn values_are_right_whatever_goes_wrong() {
    for (name, kind, spec) in tasks() {
        let (right, _) = ask(&provider(Config::default()), &kind, &spec);
        assert!(right.values().all(|v| matches!(v, Verdict::Answer(_))), "{name}: {right:?}");
        let faults = Fault::PASSING.into_iter().chain(Fault::OF_VALUES).map(|fault| (fault, 0.01)).collect();
        let troubled = provider(Config { faults, ..Config::default() });
        let (got, _) = ask(&troubled, &kind, &spec);
        for (n, verdict) in &got {
            assert_eq!(Some(verdict), right.get(n), "{name}: row {n}");
        }
    }
}

#[test]
fn each_fault_of_values_is_found() {
    for (name, kind, spec) in tasks() {
        let (right, _) = ask(&provider(Config::default()), &kind, &spec);
        for fault in Fault::OF_VALUES {
            let troubled = provider(Config { faults: vec![(fault.clone(), 0.3)], ..Config::default() });
            let (got, _) = ask(&troubled, &kind, &spec);
            assert!(got.iter().all(|(n, verdict)| right.get(n) == Some(verdict)), "{name}: {fault}");
        }
    }
}

#[test]
fn a_row_is_told_what_was_wrong_and_nothing_of_what_was_written() {
    let setup = Setup::with_cache(0);
    let provider = provider(Config::default());
    provider.script([Some(Fault::DatesInWords)]);
    let mut client = setup.client(&provider, |s| {
        s.task.spec = Spec::from_json("extract", &json!({"fields": {"due": "date"}})).unwrap();
    });
    client.rows(0..1);
    let (got, _) = client.answers(1);
    assert!(matches!(got[&0].verdict, Verdict::Answer(_)) && got[&0].attempts == 2, "{got:?}");
    let body = provider.bodies().pop().unwrap();
    let user = body["messages"][1]["content"].as_str().unwrap();
    assert!(user.contains("(asked again: the field \"due\" must be a date as YYYY-MM-DD)"), "{user}");
    assert!(!user.contains("March"), "{user}");
}

#[test]
fn packs_of_texts_are_full_and_not_cut() {
    let setup = Setup::with_cache(0);
    let provider = provider(Config::default());
    let mut client = setup.client(&provider, |s| {
        s.task.spec = Spec::from_json("generate", &json!({"instruction": "Explain.", "max_words": 100})).unwrap();
        s.model.max_concurrent_requests = Some(1);
    });
    client.rows(0..2_000);
    let (got, _) = client.answers(2_000);
    assert!(got.values().all(|o| matches!(o.verdict, Verdict::Answer(_)) && o.attempts == 1), "a row was asked twice");
    // Once their length is known, packs are full.
    let requests = provider.stats().admitted;
    assert!(requests <= 2_000 / 50 + 4, "{requests} requests");
}

#[test]
fn a_row_whose_answer_was_refused_is_asked_again_and_told_why() {
    let setup = Setup::with_cache(1 << 20);
    let provider = provider(Config::default());
    let mut client = setup.client(&provider, |s| {
        s.task.spec = Spec::from_json("extract", &json!({"fields": {"note": "text"}})).unwrap();
    });
    let item = |n, again: Option<(u32, &str)>| {
        let again = again.map(|(attempts, hint)| Again { attempts, hint: hint.into() });
        ToGateway::Items(vec![Item { n, text: text(1), isolation: None, again }])
    };
    let requests = |provider: &FakeProvider| provider.stats().admitted;
    client.say(&item(1, None));
    assert_eq!(client.answers(1).0[&1].attempts, 1);
    // The answer kept for the text is the one that was refused.
    client.say(&item(2, Some((1, "write in German"))));
    let (got, _) = client.answers(1);
    assert!(matches!(got[&2].verdict, Verdict::Answer(_)) && got[&2].attempts == 2 && !got[&2].reused, "{got:?}");
    assert_eq!(requests(&provider), 2);
    let user = provider.bodies().pop().unwrap()["messages"][1]["content"].as_str().unwrap().to_owned();
    assert!(user.ends_with(" (asked again: write in German)\n"), "{user}");
    // The same text that is told the same after as many answers shares the answer, and no other.
    client.say(&item(3, Some((1, "write in German"))));
    assert!(client.answers(1).0[&3].reused && requests(&provider) == 2);
    client.say(&item(4, Some((2, "write in German"))));
    client.say(&item(5, Some((1, "write in Greek"))));
    assert!(client.answers(2).0.values().all(|o| !o.reused) && requests(&provider) == 4);
    // A row asked as before still has its answer.
    client.say(&item(6, None));
    assert!(client.answers(1).0[&6].reused && requests(&provider) == 4);
}
