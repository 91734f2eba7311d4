//! Large requests, of which few fit into a limit, with a simulated clock.

use llm_batch_core::options::{AnswerShape, StructuredOutput};
use llm_batch_core::task::Spec;
use serde_json::json;

use super::tests::{Question, Sim};
use super::*;
use crate::tokens;

fn tokens_of(question: &Question) -> usize {
    tokens::count(&question.body["messages"].to_string())
}

/// Asks for rows with a text of so many words, under a limit, after so many words of instructions; the rows and tokens of each
/// request.
fn requests(limit: u64, instruction: usize, rows: u64, words: usize) -> Vec<(usize, usize)> {
    requests_of(limit, instruction, rows, words, |_| {})
}

fn requests_of(
    limit: u64,
    instruction: usize,
    rows: u64,
    words: usize,
    change: impl FnOnce(&mut Stream),
) -> Vec<(usize, usize)> {
    let mut sim = Sim::new(|stream| {
        let spec = json!({"instruction": "word ".repeat(instruction), "labels": ["a", "b"]});
        stream.task.spec = Spec::from_json("classify", &spec).unwrap();
        stream.model.tokens_per_minute = Some(limit);
        change(stream);
    });
    let mut all = Vec::new();
    sim.ask(0..rows, &"word ".repeat(words), |question| {
        all.push((question.rows.len(), tokens_of(question)));
        question.answered(tokens_of(question), 4 * question.rows.len())
    });
    assert!(sim.is_answered(), "{:?}", sim.stop);
    all
}

#[test]
fn a_whole_number_of_large_requests_fills_the_limit() {
    // A window of 6 s holds 50,000 tokens: four requests of 50 rows, and nearly a fifth one.
    let forms: [fn(&mut Stream); 2] = [
        |_| {},
        // The schema has a part for each row.
        |stream| {
            stream.task.options.answer_shape = AnswerShape::Properties;
            stream.task.options.structured_output = StructuredOutput::JsonSchema;
        },
    ];
    for change in forms {
        let all = requests_of(500_000, 200, 2_000, 215, change);
        let steady = all.get(5..all.len() - 1).unwrap();
        assert!(steady.iter().all(|(_, tokens)| (8_500..=10_000).contains(tokens)), "{all:?}");
        assert!(steady.iter().all(|(rows, _)| *rows < 50), "{all:?}");
    }
}

#[test]
fn instructions_are_not_paid_for_more_often_to_use_a_limit_evenly() {
    // The instructions take more than half of a minute's limit: one request fits, however few its rows are.
    for instruction in [5_500, 4_500, 3_000] {
        let all = requests(10_000, instruction, 200, 55);
        let full = all.iter().filter(|(rows, _)| *rows >= 40).count();
        assert!(all.len() <= 8 && full >= 3, "{instruction}: {all:?}");
    }
    // What is all there is goes at once.
    assert_eq!(requests(10_000, 200, 50, 100).iter().map(|(rows, _)| *rows).collect::<Vec<_>>(), [50]);
}
