//! The tier "flex" with a simulated clock: waiting for capacity, falling back, and what is counted at which tier.

use llm_batch_core::dialect::Sent;
use llm_batch_core::options::ServiceTier;
use serde_json::json;

use super::tests::{Question, Sim, answer, said};
use super::*;
use crate::protocol;

fn is_flex(question: &Question) -> bool {
    question.body["service_tier"] == "flex"
}

/// "Resource Unavailable", as to a request at that tier.
fn no_capacity() -> Answered {
    let body = json!({"error": {"message": "Resource Unavailable", "type": "requests"}}).to_string();
    answer(Sent { is_flex: true, ..Sent::default() }, 429, body.as_bytes())
}

fn sim(tier: ServiceTier) -> Sim {
    Sim::new(move |stream| {
        stream.task.options.service_tier = tier;
        stream.task.options.max_rows_per_request = 10;
    })
}

#[test]
fn without_capacity_rows_wait_and_neither_limits_nor_breaker_take_notice() {
    let mut sim = sim(ServiceTier::Flex);
    let (begin, mut refused) = (sim.now, 0);
    sim.ask(0..200, "", |question| {
        assert!(is_flex(question));
        if refused < 40 {
            refused += 1;
            return no_capacity();
        }
        question.right()
    });
    assert!(sim.is_answered(), "{:?}", sim.stop);
    // The first ones went together; after that one went at a time, each after a longer wait.
    assert!(sim.now - begin > 20 * 60_000, "{} ms", sim.now - begin);
    let lane = sim.state().lanes.values().next().unwrap();
    assert_eq!((lane.throttled, lane.errors, lane.refusals), (0, 0, 0));
    assert!(lane.last_error.is_some() && sim.state().circuits.is_empty());
}

#[test]
fn a_task_that_may_pays_the_normal_price_until_there_is_capacity() {
    let mut sim = sim(ServiceTier::FlexOrDefault);
    let begin = sim.now;
    let mut asked = (0, 0);
    sim.ask(0..1_000, "", |question| match is_flex(question) {
        true => {
            asked.0 += 1;
            no_capacity()
        }
        false => {
            asked.1 += 1;
            question.right()
        }
    });
    assert!(sim.is_answered() && sim.now - begin < 30_000, "{} ms", sim.now - begin);
    assert!(asked.0 <= 16 && asked.1 == 100, "{asked:?}");
    sim.now += 120_000;
    sim.ask(2_000..3_000, "", Question::right);
    assert!(sim.is_answered());
    let mut normal = 0;
    sim.ask(4_000..5_000, "", |question| {
        normal += usize::from(!is_flex(question));
        question.right()
    });
    assert_eq!(normal, 0);
}

#[test]
fn a_server_that_knows_no_tier_is_asked_without_it_by_tasks_that_may() {
    let refusal = || {
        let body = json!({"error": {"message": "Unsupported service_tier: flex", "type": "invalid_request_error"}});
        answer(Sent { is_flex: true, ..Sent::default() }, 400, body.to_string().as_bytes())
    };
    let mut sim = sim(ServiceTier::FlexOrDefault);
    let mut refused = 0;
    let mut ask = |sim: &mut Sim, rows| {
        sim.ask(rows, "", |question| {
            if is_flex(question) {
                refused += 1;
                return refusal();
            }
            question.right()
        });
        refused
    };
    let first = ask(&mut sim, 0..500);
    assert!(sim.is_answered() && first > 0);
    assert_eq!(ask(&mut sim, 1_000..1_500), first, "it is learnt once");
    // One that may not pay more stops, and says why.
    sim.open(|stream| stream.task.options.service_tier = ServiceTier::Flex);
    ask(&mut sim, 2_000..2_010);
    assert!(sim.is_withdrawn(StopReason::Rejected), "{:?}", sim.stop);
    assert!(sim.stop.as_ref().is_some_and(|stop| stop.message.contains("service_tier")));
}

#[test]
fn what_an_answer_says_of_its_tier_is_what_is_counted() {
    for tier in ["flex", "default"] {
        let (mut state, now, conn, mut heard) = super::tests::connect();
        let mut stream = protocol::tests::stream();
        stream.model.parameters.insert("service_tier".into(), "flex".into());
        state.open(now, conn, stream).unwrap();
        state
            .items(now, conn, vec![(Item { n: 1, text: "row 1".into(), isolation: None, again: None }, None)])
            .unwrap();
        let (launches, _) = state.pump(now);
        let [launch] = launches.as_slice() else { panic!() };
        // The model's parameter is the tier of all tasks.
        assert_eq!((&launch.body["service_tier"], launch.timeout.as_secs()), (&json!("flex"), 900));
        let choice =
            json!({"message": {"content": format!("{{\"{}\":\"a\"}}", launch.ids[0])}, "finish_reason": "stop"});
        let usage = json!({
            "prompt_tokens": 20, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8},
        });
        let body = json!({"choices": [choice], "usage": usage, "service_tier": tier});
        state.finish(now + 1, launch.id, Some(said(200, &body)));
        let spent = std::iter::from_fn(|| heard.next()).find_map(|message| match message {
            FromGateway::Outcomes { spent, .. } => Some(spent),
            _ => None,
        });
        let spent = spent.unwrap();
        assert_eq!((spent.input_tokens, spent.cached_input_tokens, spent.output_tokens), (20, 8, 5));
        assert_eq!(spent.flex, if tier == "flex" { [20, 8, 0, 5] } else { [0; 4] });
        let [normal, flex] = spent.by_tier();
        assert_eq!((normal.input_tokens, flex.input_tokens), if tier == "flex" { (0, 20) } else { (20, 0) });
        assert_eq!(normal.requests, 1);
    }
}
