//! Pauses of a task whose requests are refused, broken off, or paid for in vain, with a simulated clock.

use llm_batch_core::dialect::Sent;
use llm_batch_core::options::AskBy;
use serde_json::{Value, json};

use super::tests::{Question, Sim, answer, body, said};
use super::*;
use crate::protocol::Prices;

const HOUR: u64 = 3_600_000;

/// A rate limit within a 200, as some say it.
fn refused() -> Value {
    json!({"error": {"message": "Rate limit exceeded", "code": 429}})
}

/// "Too many requests" within a 200 may be paid for like an answer.
#[test]
fn what_refusals_within_an_answer_cost_is_bounded() {
    let limited = refused()["error"].clone();
    let forms = [
        refused(),
        json!({"choices": [{"index": 0, "finish_reason": "error", "error": limited, "message": {"content": ""}}]}),
    ];
    for (form, is_proven) in forms.iter().flat_map(|form| [(form, true), (form, false)]) {
        let mut sim = Sim::new(|s| s.task.options.max_rows_per_request = 20);
        if is_proven {
            sim.ask(0..500, "", Question::right);
            assert!(sim.is_answered());
        }
        sim.asked.clear();
        let mut most_requests = 60;
        for pause in [30_000, 60_000, 120_000] {
            sim.ask(1_000..2_000, "", |_| said(200, form));
            assert!(sim.is_withdrawn(StopReason::Quota), "{is_proven} {form}: {:?}", sim.stop);
            assert!(sim.requests <= most_requests, "{is_proven} {form}: {} requests", sim.requests);
            assert_eq!(sim.stop.as_ref().unwrap().retry_after_ms, Some(pause), "{is_proven} {form}");
            sim.now += pause;
            sim.open(|s| s.task.options.max_rows_per_request = 20);
            // From now on one shows whether it goes on.
            most_requests = 1;
        }
        sim.ask(1_000..2_000, "", Question::right);
        assert!(sim.is_answered(), "{is_proven} {form}: {:?} {:?}", sim.stop, sim.outcomes);
    }
    // Some are refused, and others answered: most jobs never pause, and no row is paid for without end.
    for (refused, least) in [(0.1, 20), (0.8, 0)] {
        let (mut most, mut went_on) = (0, 0);
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut sim = Sim::new(|s| s.task.options.max_rows_per_request = 20);
            sim.ask(0..100, "", Question::right);
            sim.ask(1_000..1_400, "", |q| if random.f64() < refused { said(200, &forms[0]) } else { q.right() });
            most = sim.asked.values().copied().fold(most, u32::max);
            assert!(sim.is_answered() || sim.stop.as_ref().is_some_and(|stop| stop.reason == StopReason::Quota));
            went_on += usize::from(sim.stop.is_none());
        }
        println!("{refused}: a row is in up to {most} requests, {went_on} of 20 jobs never pause");
        assert!(most <= 9 && went_on >= least, "{refused}: {most}, {went_on}");
    }
}

/// The right answer to questions.
fn decided(q: &Question) -> Answered {
    let ids: Vec<u16> = q.rows.iter().map(|(id, _)| *id).collect();
    let one = |id: &u16| json!({"type": "choice", "name": id.to_string(), "choice": "a"});
    let answers: Vec<Value> = ids.iter().map(one).collect();
    let body = json!({"answers": answers, "usage": {"input_tokens": 20, "output_tokens": 0}}).to_string();
    answer(Sent { service: Service::Decisions, ids: &ids, ..Sent::default() }, 200, body.as_bytes())
}

/// Where a task may be asked in a chat too, what pauses decisions is answered there.
#[test]
fn a_pause_of_decisions_leads_to_the_chat() {
    for is_proven in [false, true] {
        let (mut is_paused, mut decisions, mut in_vain) = (!is_proven, 0, 0);
        let mut sim = Sim::new(|s| {
            s.task.options.ask_by = AskBy::Auto;
            // What is written is dear.
            s.model.prices = Some(Prices { input: 1, output: 1_000 });
        });
        for rows in [0..500, 1_000..2_000] {
            sim.ask(rows, "", |q| {
                let is_chat = !q.body["messages"].is_null();
                decisions += u32::from(!is_chat);
                in_vain += u32::from(!is_chat && is_paused);
                match (is_chat, is_paused) {
                    (true, _) => q.right(),
                    (false, true) => said(200, &refused()),
                    (false, false) => decided(q),
                }
            });
            assert!(sim.is_answered(), "{is_proven}: {:?} {:?}", sim.stop, sim.outcomes.len());
            is_paused = true;
        }
        assert!(decisions > 0 && in_vain <= 60, "{is_proven}: {in_vain} of {decisions}");
    }
}

/// Requests that are under way as a pause begins neither make it longer nor take the place of the one that is to follow it,
/// though the task counts as unproven by then: its last answer is an hour old.
#[test]
fn requests_under_way_at_a_pause_do_not_prolong_it() {
    type Answer = fn() -> Answered;
    let troubles: [(StopReason, Answer); 2] = [
        (StopReason::Quota, || said(200, &refused())),
        (StopReason::ProviderDown, || Answered::broke_off("the connection failed".into(), true)),
    ];
    let change = |s: &mut Stream| {
        s.task.options.max_rows_per_request = 20;
        // So many may be under way at once.
        s.model.requests_per_minute = Some(100_000);
    };
    for (reason, answer) in troubles {
        let mut sim = Sim::new(change);
        sim.ask(0..100, "", Question::right);
        assert!(sim.is_answered());
        sim.now += HOUR - 50;
        sim.open(change);
        sim.ask(1_000..2_000, "", |_| answer());
        assert!(sim.is_withdrawn(reason), "{reason:?}: {:?}", sim.stop);
        assert!(sim.requests > 40, "{reason:?}: {}", sim.requests);
        assert_eq!(sim.stop.as_ref().unwrap().retry_after_ms, Some(30_000), "{reason:?}");
        // Where nothing comes back, probes are what follows.
        for pause in [60_000, 120_000].into_iter().filter(|_| reason == StopReason::Quota) {
            sim.now += pause / 2;
            sim.open(change);
            sim.ask(1_000..2_000, "", |_| answer());
            assert!(sim.is_withdrawn(reason), "{reason:?}: {:?}", sim.stop);
            assert_eq!((sim.requests, sim.stop.as_ref().unwrap().retry_after_ms), (1, Some(pause)), "{reason:?}");
        }
        sim.now += 120_000;
        sim.open(change);
        sim.ask(1_000..2_000, "", Question::right);
        assert!(sim.is_answered(), "{reason:?}: {:?} {:?}", sim.stop, sim.outcomes);
    }
}

/// Waits above two minutes stop the streams, for as long as the provider says. Said within a 200, each may be paid for: from
/// the first on a single request shows whether it goes on, however often.
#[test]
fn long_waits_within_an_answer_cost_a_request_each() {
    const WAIT: u64 = 300_000;
    let waits = |_: &Question| body(200, refused().to_string().as_bytes(), Some(WAIT));
    let change = |s: &mut Stream| s.task.options.max_rows_per_request = 20;
    for is_proven in [true, false] {
        let mut sim = Sim::new(change);
        if is_proven {
            sim.ask(0..500, "", Question::right);
            assert!(sim.is_answered());
        }
        for round in 0..30 {
            sim.ask(1_000..2_000, "", waits);
            assert!(sim.is_withdrawn(StopReason::Quota), "{is_proven}, {round}: {:?}", sim.stop);
            assert_eq!(sim.stop.as_ref().unwrap().retry_after_ms, Some(WAIT), "{is_proven}, {round}");
            assert!(sim.requests == 1 || round == 0, "{is_proven}, {round}: {} requests", sim.requests);
            sim.now += WAIT;
            sim.open(change);
        }
        sim.ask(1_000..2_000, "", Question::right);
        assert!(sim.is_answered(), "{is_proven}: {:?} {:?}", sim.stop, sim.outcomes);
    }
}
