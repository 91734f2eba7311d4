//! One circuit at a time, then whole servers under a virtual clock.

use super::*;
use proptest::prelude::*;

const FAILED: ProbeEnd = ProbeEnd::Failed { asked: None };

/// Opened at time 0, and time is up.
fn open(model: &str) -> Breakers {
    let mut b = Breakers::default();
    b.failed(0, model, MOST_FAILURES);
    assert_eq!((b.state(model), b.until(model)), (State::Open, Some(PATIENCE)));
    b
}

#[test]
fn waits_double_up_to_a_bound_and_begin_anew_after_an_answer() {
    let mut b = open("a");
    let mut now = 10_000;
    for wait in [2, 4, 8, 16, 30, 30, 30] {
        assert!(b.next_probe(&["a"]).is_some_and(|(at, _)| at <= now));
        b.begin_probe("a");
        assert_eq!((b.state("a"), b.next_probe(&["a"])), (State::HalfOpen, None));
        assert_eq!(b.end_probe(now, "a", FAILED), Some(Down::Endpoint));
        assert_eq!(b.until("a"), Some(now + wait * 1000));
        assert!(b.is_down(now + wait * 1000 - 1, "a") && !b.is_down(now + wait * 1000, "a"));
        assert_eq!(b.next_probe(&["a"]), Some((now + wait * 1000, "a")));
        now += wait * 1000;
    }
    b.begin_probe("a");
    assert!(b.answered("a"));
    assert_eq!((b.state("a"), b.is_well()), (State::Closed, true));
    b = open("a");
    b.begin_probe("a");
    b.end_probe(now, "a", ProbeEnd::Failed { asked: Some(7_000) });
    assert_eq!(b.until("a"), Some(now + 7_000));
}

#[test]
fn failures_count_only_in_a_row_and_a_moment_is_waited() {
    let mut b = Breakers::default();
    for now in 0..1000 {
        b.failed(now, "a", MOST_FAILURES - 1);
        assert!(!b.answered("a"));
    }
    b.failed(5_000, "a", 4);
    b.failed(5_500, "b", 1);
    // Five in a row at the endpoint, not at either model.
    assert_eq!((b.state("a"), b.state("c"), b.until("a")), (State::Open, State::Open, Some(8_000)));
    b.answered("c");
    assert_eq!((b.state("a"), b.state("b")), (State::Closed, State::Closed));
    // An endpoint that takes long to fail is not waited for again.
    b = Breakers::default();
    b.failed(0, "a", 1);
    b.failed(60_000, "a", 4);
    assert_eq!(b.until("a"), Some(60_000));
}

#[test]
fn a_model_that_is_broken_is_left_alone_and_the_others_go_on() {
    let mut b = open("a");
    // Both wait; the one that answers gets its turn at the second probe at the latest.
    let mut now = PATIENCE;
    assert_eq!(b.next_probe(&["a", "b"]), Some((now, "a")));
    b.begin_probe("a");
    assert_eq!(b.end_probe(now, "a", FAILED), Some(Down::Endpoint));
    assert!(b.is_down(now, "b"));
    now += FIRST_WAIT;
    assert_eq!(b.next_probe(&["a", "b"]), Some((now, "b")));
    b.begin_probe("b");
    assert!(b.answered("b"));
    assert_eq!((b.state("a"), b.state("b")), (State::Open, State::Closed));
    // Its own probes do not open the endpoint's circuit again, however many fail.
    for _ in 0..20 {
        now += LONGEST_WAIT;
        assert!(b.next_probe(&["a", "b"]).is_some_and(|(at, model)| at <= now && model == "a"));
        b.begin_probe("a");
        assert_eq!(b.end_probe(now, "a", FAILED), Some(Down::Model));
        b.failed(now, "a", 9);
        assert_eq!(b.state("b"), State::Closed);
    }
    // A probe that came to no end decides nothing.
    now += LONGEST_WAIT;
    b.begin_probe("a");
    assert_eq!(b.end_probe(now, "a", ProbeEnd::Lost), None);
    assert_eq!(b.next_probe(&["a"]), Some((now, "a")));
}

/// Models with rows that always wait, four requests at a time each; a server that answers, or not, after
/// `latency`, and is broken in all or for some models at times. Returns the times of requests and probes, and of
/// answers, by model.
fn run(models: usize, latency: u64, end: u64, is_up: impl Fn(u64, usize) -> bool) -> [Vec<(u64, usize)>; 3] {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    let names = &NAMES[..models];
    let mut b = Breakers::default();
    let [mut requests, mut probes, mut answers] = [const { Vec::new() }; 3];
    // When each ends, of which model, whether it is a probe.
    let mut under_way: Vec<(u64, usize, bool)> = Vec::new();
    let mut now = 0;
    while now < end {
        for (_, m, is_probe) in under_way.extract_if(.., |(at, ..)| *at <= now) {
            match (is_up(now, m), is_probe) {
                (true, _) => {
                    b.answered(names[m]);
                    answers.push((now, m));
                }
                (false, true) => {
                    b.end_probe(now, names[m], FAILED);
                }
                (false, false) => b.failed(now, names[m], 1),
            }
        }
        while let Some((_, model)) = b.next_probe(names).filter(|(at, _)| *at <= now) {
            b.begin_probe(model);
            let m = names.iter().position(|n| *n == model).unwrap();
            under_way.push((now + latency, m, true));
            probes.push((now, m));
        }
        for (m, name) in names.iter().enumerate() {
            while b.state(name) == State::Closed && under_way.iter().filter(|u| u.1 == m).count() < 4 {
                under_way.push((now + latency, m, false));
                requests.push((now, m));
            }
        }
        now += 50;
    }
    [requests, probes, answers]
}

proptest! {
    #[test]
    fn a_server_that_is_down_is_left_alone_and_found_again(
        models in 1usize..4, latency in 10u64..5_000, down in 20_000u64..400_000, broken in proptest::option::of(0usize..4),
    ) {
        let up = 20_000 + down;
        // One model may stay broken for good.
        let broken = broken.filter(|b| *b > 0 && *b < models);
        let [requests, probes, answers] =
            run(models, latency, up + 100_000, |now, m| !(20_000..up).contains(&now) && broken != Some(m));
        let within = |all: &[(u64, usize)]| all.iter().filter(|(at, _)| (20_000..up).contains(at)).count() as u64;
        // The requests under way, and those sent until five have failed.
        prop_assert!(within(&requests) <= models as u64 * 8, "{} requests", within(&requests));
        // One after the other: 2, 4, 8, 16, 30, 30, … s; a model that is broken by itself has its own.
        let most = (5 + down / LONGEST_WAIT) * (1 + u64::from(broken.is_some()));
        prop_assert!(within(&probes) <= most, "{} probes", within(&probes));
        for m in (0..models).filter(|m| broken != Some(*m)) {
            // Each goes on when it is its turn to be probed, or another one was.
            let again = answers.iter().find(|(at, model)| *model == m && *at >= up).map(|a| a.0 - up);
            let most = LONGEST_WAIT * (1 + u64::from(broken.is_some())) + 4 * latency + 100;
            prop_assert!(again.is_some_and(|after| after <= most), "{m}: {again:?}");
        }
        if let Some(broken) = broken {
            let asked = requests.iter().filter(|r| r.1 == broken).count();
            prop_assert!(asked <= 8, "{asked} requests of the broken model");
        }
    }

    #[test]
    fn any_order_of_events_keeps_the_rules(events in proptest::collection::vec((0u8..5, 0usize..3, 0u64..40_000), 0..200)) {
        let names = ["a", "b", "c"];
        let mut b = Breakers::default();
        let mut now = 0;
        for (what, m, pause) in events {
            now += pause;
            let model = names[m];
            match what {
                0 => {
                    b.answered(model);
                    prop_assert_eq!(b.endpoint, Breaker::default());
                    prop_assert_eq!(b.state(model), State::Closed);
                }
                1 => b.failed(now, model, 1 + m as u32),
                2 => {
                    if let Some((_, probed)) = b.next_probe(&[model]).filter(|(at, _)| *at <= now) {
                        prop_assert_eq!(probed, model);
                        prop_assert!(b.state(model) == State::Open && b.until(model).is_some());
                        b.begin_probe(probed);
                    }
                }
                3 => drop(b.end_probe(now, model, FAILED)),
                _ => drop(b.end_probe(now, model, ProbeEnd::Lost)),
            }
            for model in names {
                // Whatever is open says until when, and not for long.
                let until = b.until(model);
                prop_assert_eq!(b.state(model) == State::Open, until.is_some());
                prop_assert!(until.is_none_or(|at| at <= now + LONGEST_WAIT));
                prop_assert!(!b.is_down(now, model) || b.state(model) == State::Open);
            }
        }
    }
}
