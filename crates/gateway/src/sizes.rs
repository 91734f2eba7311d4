//! How long the answers to a task are.

use llm_batch_core::pack::Ratio;

/// What a sum keeps with each further answer.
const RECENT: f64 = 0.99;
/// Answers after which we know how long they are.
pub const ENOUGH_ANSWERS: u32 = 3;

/// How the answers to a task relate to what is planned for them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sizes {
    /// Tokens of an answer for each that is planned.
    pub answer: Ratio,
    /// Tokens of recent answers: as the mean over all answers has it, and in truth.
    pub means: (f64, f64),
    /// Answers that were seen, up to enough.
    pub seen: u32,
}

impl Sizes {
    /// Takes an answer into account: tokens planned, in the mean, and actual.
    pub fn observe(&mut self, planned: u64, mean: f64, actual: u64) {
        // What is planned is a guess, and takes a hundred answers to be forgotten: the first one takes its place.
        let mut answer = if self.answer == Ratio::default() { Ratio::LOWEST } else { self.answer };
        answer.observe(planned, actual);
        if answer != Ratio::LOWEST {
            self.answer = answer;
        }
        self.means = (self.means.0 * RECENT + mean, self.means.1 * RECENT + actual as f64);
        self.seen = (self.seen + 1).min(ENOUGH_ANSWERS);
    }

    /// Tokens of an answer for each that is planned.
    pub fn ratio(&self) -> f64 {
        self.answer.apply(1000) as f64 / 1000.0
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
    }
}
