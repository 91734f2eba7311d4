//! The lengths of the answers to a task.

use llm_batch_core::pack::Ratio;

/// The part of a sum that stays with each further answer.
const RECENT: f64 = 0.99;
/// Answers after which we know how long they are.
pub const ENOUGH_ANSWERS: u32 = 3;

/// The relation of a task's answers to what is planned for them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sizes {
    /// Tokens of an answer for each that is planned, once one was seen that tells.
    answer: Option<Ratio>,
    /// Tokens of recent answers: as the mean over all answers has it, and in truth.
    pub means: (f64, f64),
    /// Answers that were seen, up to enough.
    pub seen: u32,
}

impl Sizes {
    /// Takes an answer into account: tokens planned, in the mean, and actual.
    pub fn observe(&mut self, planned: u64, mean: f64, actual: u64) {
        // The plan is a guess, which would take a hundred answers to be forgotten: the first one takes its place.
        match &mut self.answer {
            Some(answer) => answer.observe(planned, actual),
            None => self.answer = Ratio::first(planned, actual),
        }
        self.means = (self.means.0 * RECENT + mean, self.means.1 * RECENT + actual as f64);
        self.seen = (self.seen + 1).min(ENOUGH_ANSWERS);
    }

    /// Tokens of an answer for each that is planned.
    pub fn ratio(&self) -> f64 {
        self.answer().apply(1000) as f64 / 1000.0
    }

    /// The relation of answers to what is planned for them.
    pub fn answer(&self) -> Ratio {
        self.answer.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_takes_the_place_of_the_guess() {
        let mut sizes = Sizes::default();
        // Too short to tell.
        sizes.observe(10, 10.0, 5);
        assert!((sizes.ratio() - 1.0).abs() < 0.01);
        sizes.observe(4_000, 4_000.0, 2_000);
        assert!((sizes.ratio() - 0.5).abs() < 0.01);
        sizes.observe(4_000, 4_000.0, 3_000);
        sizes.observe(4_000, 4_000.0, 2_000);
        assert!((sizes.ratio() - 0.745).abs() < 0.01);
        // The lowest relation that is believed, and one of exactly what was planned, are learnt as any other.
        for (actual, ratio) in [(100, 0.2), (4_000, 1.0)] {
            let mut sizes = Sizes::default();
            sizes.observe(4_000, 4_000.0, actual);
            assert!((sizes.ratio() - ratio).abs() < 0.01);
            sizes.observe(4_000, 4_000.0, actual / 2);
            assert!((sizes.ratio() - ratio).abs() < 0.02);
        }
    }
}
