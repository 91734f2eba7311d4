//! No row is charged for what is not its fault: models that think, that give no valid answer, and servers that refuse a
//! row.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::io::Write;

use llm_batch_gateway::protocol::*;
use llm_fake_provider::{Config, FakeProvider, Fault, Latency};
use support::*;

/// The outcomes of rows, and the stop if there was one.
#[track_caller]
fn end(client: &mut Client, n: usize, what: &str) -> (BTreeMap<u64, Outcome>, Option<Stop>) {
    let (mut got, mut stop) = (BTreeMap::new(), None);
    while got.len() < n {
        match client.hear(&format!("{n} outcomes of {what}, have {}", got.len())) {
            Some(FromGateway::Outcomes { outcomes, .. }) => got.extend(outcomes.into_iter().map(|o| (o.n, o))),
            Some(FromGateway::Stopped(said)) => stop = Some(said),
            other => panic!("{what}: {other:?}"),
        }
    }
    (got, stop)
}

#[track_caller]
fn all_right(got: &BTreeMap<u64, Outcome>) {
    for (n, o) in got {
        assert!(is_right(*n, &o.verdict) && o.attempts == 1, "{o:?}");
    }
}

/// All rows came back, none of them charged, and why.
#[track_caller]
fn given_up(got: &BTreeMap<u64, Outcome>, stop: Option<Stop>, reason: StopReason) -> String {
    let stop = stop.expect("a stop");
    assert_eq!(stop.reason, reason, "{stop:?}");
    assert!(got.values().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0), "{got:?}");
    stop.message
}

/// Requests that were answered.
fn paid(provider: &FakeProvider) -> u64 {
    provider.stats().admitted
}

fn thinks(tokens: u64) -> Config {
    Config { thinking_tokens: tokens, ..Config::default() }
}

#[test]
fn a_model_that_thinks_is_given_the_room_and_it_is_remembered() {
    for tells in [false, true] {
        let setup = Setup::new(64 << 20);
        let provider = provider(Config { tells_thinking: tells, ..thinks(3_500) });
        let mut client = setup.client(&provider, |s| s.interactive = true);
        client.rows(0..40);
        all_right(&client.answers(40).0);
        assert!((2..=5).contains(&paid(&provider)), "{}", paid(&provider));
        drop(client);
        // Another stream knows it at once, and nothing is cut off any more.
        let mut client = setup.client(&provider, |_| {});
        provider.reset_stats();
        client.rows(1_000..3_000);
        all_right(&client.answers(2_000).0);
        assert!((40..=42).contains(&paid(&provider)), "{}", paid(&provider));
        let caps: Vec<u64> = provider.bodies().iter().skip(5).filter_map(|b| b["max_tokens"].as_u64()).collect();
        assert!(caps.iter().all(|cap| (3_700..16_000).contains(cap)), "{caps:?}");
        let activity = client.only_activity();
        assert!((3_300..=3_700).contains(&activity.thinking_tokens), "{activity:?}");
        assert!(activity.answer_ratio < 1.5 && activity.rows_allowed == Some(50), "{activity:?}");
    }
}

/// Thinking is reserved for, so that a limit is kept.
#[test]
fn what_is_thought_counts_against_the_limit_before_it_is_sent() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config {
        tokens_per_window: Some(60_000),
        window: std::time::Duration::from_secs(6),
        ..thinks(3_500)
    });
    let limit = |s: &mut Stream| s.model.tokens_per_minute = Some(600_000);
    let mut client = setup.client(&provider, limit);
    client.rows(0..50);
    all_right(&client.answers(50).0);
    provider.reset_stats();
    client.rows(100..1_500);
    all_right(&client.answers(1_400).0);
    assert_eq!(provider.stats().by_status.get(&429), None);
}

#[test]
fn a_cap_grows_no_further_than_a_model_allows_and_rows_say_so() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config { max_answer_tokens: Some(2_048), ..thinks(1_500) });
    let mut client = setup.client(&provider, |_| {});
    client.rows(0..50);
    all_right(&client.answers(50).0);
    let caps: Vec<u64> = provider.bodies().iter().filter_map(|b| b["max_tokens"].as_u64()).collect();
    assert_eq!(caps.last(), Some(&2_048), "{caps:?}");
    // It has answered this task; now it thinks longer than it may.
    provider.configure(|c| c.thinking_tokens = 5_000);
    client.rows(100..101);
    let (got, stop) = end(&mut client, 1, "one row");
    let Verdict::Skip { class, detail } = &got[&100].verdict else { panic!("{got:?} {stop:?}") };
    assert!(class == "no_answer" && detail.contains("2048 tokens") && detail.contains("thinking"), "{class} {detail}");
    // Nothing but thinking, of a task that was never answered.
    let mut client = setup.client(&provider, |s| s.task.spec = tickets("Other tickets."));
    provider.reset_stats();
    client.rows(0..500);
    let (got, stop) = end(&mut client, 500, "a model that only thinks");
    let message = given_up(&got, stop, StopReason::NoAnswers);
    assert!(message.contains("2048 tokens went into thinking"), "{message}");
    assert!(paid(&provider) <= 20, "{}", paid(&provider));
}

#[test]
fn a_probe_that_is_cut_off_is_a_sign_of_life() {
    let setup = Setup::new(64 << 20);
    let provider = provider(thinks(3_500));
    let mut client = setup.client(&provider, |_| {});
    client.say(&ToGateway::Probe);
    assert_eq!(client.hear("the probe"), Some(FromGateway::Probed(None)));
    let cut = r#"{"error": {"message": "Could not finish the message because max_tokens or model output limit was reached. Please try again with higher max_tokens."}}"#;
    let mut client = setup.client(&provider, |s| s.model.model = "n".into());
    provider.script([Some(Fault::Status(400, cut.to_owned()))]);
    client.say(&ToGateway::Probe);
    assert_eq!(client.hear("the probe"), Some(FromGateway::Probed(None)));
    // And what rows get instead of an answer is none of their fault.
    provider.configure(|c| c.thinking_tokens = 0);
    provider.script([Some(Fault::Status(400, cut.to_owned()))]);
    provider.reset_stats();
    client.rows(0..50);
    all_right(&client.answers(50).0);
    assert_eq!(provider.stats().requests, 2);
}

#[test]
fn a_model_without_a_valid_answer_is_given_up_soon_and_asked_again_on_demand() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    for (i, fault) in [Fault::OnlyProse, Fault::EmptyAnswer, Fault::Refusal].into_iter().enumerate() {
        for (rows, interactive) in [(2_000, false), (40, true)] {
            provider.configure(|c| c.faults = vec![(fault.clone(), 1.0)]);
            let mut client = setup.client(&provider, |s| {
                s.model.model = format!("m{i}{rows}");
                s.model.max_concurrent_requests = Some(64);
                s.interactive = interactive;
            });
            provider.reset_stats();
            client.rows(0..rows);
            let (got, stop) = end(&mut client, rows as usize, fault.name());
            let message = given_up(&got, stop, StopReason::NoAnswers);
            assert!((5..=20).contains(&paid(&provider)), "{fault}: {}", paid(&provider));
            assert_eq!(message.contains("These tickets are about many things"), fault == Fault::OnlyProse, "{message}");
            let formats: std::collections::BTreeSet<String> =
                provider.bodies().iter().map(|b| b["response_format"]["type"].to_string()).collect();
            assert_eq!(formats.len(), 3, "{formats:?}");
            assert_eq!(packs(&provider).iter().map(Vec::len).min(), Some(1));
            // It is mended, and whoever comes again is answered.
            provider.configure(|c| c.faults.clear());
            let mut client = setup.client(&provider, |s| s.model.model = format!("m{i}{rows}"));
            client.rows(0..rows);
            all_right(&client.answers(rows as usize).0);
        }
    }
}

/// JSON mode is accepted and answered in prose; what works stays.
#[test]
fn a_form_that_works_is_found_and_kept() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    provider.script([const { Some(Fault::EmptyAnswer) }; 5]);
    let mut client = setup.client(&provider, |_| {});
    client.rows(0..1_000);
    let got = client.answers(1_000).0;
    assert!(got.iter().all(|(n, o)| is_right(*n, &o.verdict)), "{got:?}");
    let formats: Vec<String> = provider.bodies().iter().map(|b| b["response_format"]["type"].to_string()).collect();
    assert!(formats.iter().rev().take(10).all(|f| f == "\"json_schema\""), "{formats:?}");
    assert!(paid(&provider) <= 5 + 22, "{}", paid(&provider));
}

/// Eight requests go ahead as long as nobody knows whether there will be a valid row.
#[test]
fn eight_requests_go_ahead() {
    let setup = Setup::new(64 << 20);
    let latency = Latency { base: std::time::Duration::from_millis(100), ..Latency::default() };
    let provider = provider(Config { latency, ..Config::default() });
    provider.hold();
    let open = |s: &mut Stream| {
        s.model.max_concurrent_requests = Some(64);
        s.interactive = true;
        s.task.options.max_rows_per_request = 10;
    };
    let mut client = setup.client(&provider, open);
    client.rows(0..1_000);
    wait("some are under way", || client.only_activity(), |a| a.in_flight_requests >= 4);
    assert!(client.only_activity().in_flight_requests <= 8);
    provider.release();
    all_right(&client.answers(1_000).0);
    assert!(provider.stats().peak_in_flight > 8, "{}", provider.stats().peak_in_flight);
}

/// A job that has had good answers is not given up for some rows without one.
#[test]
fn good_answers_earn_patience() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let mut client = setup.client(&provider, |_| {});
    client.rows(0..500);
    all_right(&client.answers(500).0);
    // A pack of rows without an answer, each on its own account.
    provider.configure(|c| c.faults = vec![(Fault::EmptyAnswer, 1.0)]);
    client.rows(500..550);
    let (got, stop) = end(&mut client, 50, "a bad pack");
    assert!(stop.is_none(), "{stop:?}");
    let is_skip = |o: &Outcome| matches!(&o.verdict, Verdict::Skip { class, .. } if class == "no_answer");
    assert!(got.values().all(|o| is_skip(o) && o.attempts == 3), "{got:?}");
    // And then nothing at all.
    provider.reset_stats();
    client.rows(1_000..3_000);
    let (got, stop) = end(&mut client, 2_000, "nothing any more");
    given_up(&got, stop, StopReason::NoAnswers);
    assert!((10..100).contains(&paid(&provider)), "{}", paid(&provider));
}

/// A short text is asked as often as the task allows, and no more is made of it.
#[test]
fn a_single_row_has_its_attempts_and_no_more() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config { faults: vec![(Fault::EmptyAnswer, 1.0)], ..Config::default() });
    for attempts in [1, 3] {
        let mut client = setup.client(&provider, |s| {
            s.model.model = format!("m{attempts}");
            s.task.options.max_attempts = attempts;
        });
        provider.reset_stats();
        client.rows(0..1);
        let (got, stop) = end(&mut client, 1, "one row");
        assert!(stop.is_none() && got[&0].attempts == attempts, "{got:?}");
        assert_eq!(paid(&provider), u64::from(attempts));
    }
}

/// A row of 2,500 bytes among the others.
fn rows_with_a_long_one(client: &mut Client, n: std::ops::Range<u64>, long: &[u64]) {
    let item = |n: u64| Item {
        n,
        text: if long.contains(&n) { format!("{} {}", text(n), "x".repeat(2_500)) } else { text(n) },
        isolation: None,
        again: None,
    };
    client.say(&ToGateway::Items(n.map(item).collect()));
}

#[test]
fn a_row_that_a_server_refuses_is_found_and_the_others_are_answered() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config { max_row_bytes: Some(2_000), ..Config::default() });
    for interactive in [false, true] {
        for (n, long) in [(40, vec![0]), (40, vec![17]), (200, vec![0, 1, 130]), (1, vec![0])] {
            let mut client = setup.client(&provider, |s| {
                s.interactive = interactive;
                s.model.model = format!("m{n}{interactive}{}", long.len() as u64 + long[0]);
            });
            rows_with_a_long_one(&mut client, 0..n, &long);
            let (got, stop) = end(&mut client, n as usize, "a long row");
            assert!(stop.is_none(), "{stop:?}");
            for (n, o) in &got {
                match &o.verdict {
                    Verdict::Fail { class, detail } if long.contains(n) => {
                        assert!(class == "rejected" && detail.contains("text exceeds 2000 bytes"), "{o:?}");
                    }
                    verdict => assert!(is_right(*n, verdict), "{o:?}"),
                }
            }
        }
    }
}

#[test]
fn a_request_that_is_wrong_is_told_from_its_rows_by_three() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let wrong = Fault::Status(400, r#"{"error": {"message": "temperature is odd"}}"#.into());
    provider.configure(|c| c.faults = vec![(wrong.clone(), 1.0)]);
    for (i, n) in [40, 2_000].into_iter().enumerate() {
        let mut client = setup.client(&provider, |s| s.model.model = format!("m{i}"));
        provider.reset_stats();
        client.rows(0..n);
        let (got, stop) = end(&mut client, n as usize, "a wrong request");
        let message = given_up(&got, stop, StopReason::Rejected);
        assert!(message.contains("temperature is odd"), "{message}");
        assert!(provider.stats().requests <= 16, "{}", provider.stats().requests);
    }
    // A request that was accepted once is never wrong.
    provider.configure(|c| c.faults.clear());
    let mut client = setup.client(&provider, |_| {});
    client.rows(0..50);
    all_right(&client.answers(50).0);
    let filter = Fault::Status(400, r#"{"error": {"code": "content_filter", "message": "violence is high"}}"#.into());
    for (first, fault, says) in [(100, wrong, "temperature is odd"), (200, filter, "violence is high")] {
        provider.configure(|c| c.faults = vec![(fault, 1.0)]);
        client.rows(first..first + 4);
        let (got, stop) = end(&mut client, 4, "rows that are refused");
        assert!(stop.is_none(), "{stop:?}");
        for o in got.values() {
            assert!(
                matches!(&o.verdict, Verdict::Fail { class, detail } if class == "rejected" && detail.contains(says)),
                "{o:?}"
            );
        }
    }
}

/// Bounds the frames that wait for a client that does not read.
#[test]
fn who_never_reads_is_let_go() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let mut client = setup.client(&provider, |s| s.model.model = "x".repeat(10_000));
    let ask = encode(&ToGateway::Activity).unwrap();
    let asks = ask.repeat(1_000);
    client.stream.set_write_timeout(Some(std::time::Duration::from_secs(120))).unwrap();
    // Some 10 kB are said to each, 1 GB in all.
    let said = (0..100).take_while(|_| client.stream.write_all(&asks).is_ok()).count();
    assert!(said < 100, "all was taken");
    // Others are served meanwhile.
    let mut client = setup.client(&provider, |_| {});
    client.rows(0..50);
    all_right(&client.answers(50).0);
}
