//! What the calls of the row at hand find instead of asking. It is there while a batch scan evaluates that row's
//! expressions; a call that is not among it asks for itself, so that a row which was not foreseen is slow, never wrong.

use std::cell::RefCell;
use std::rc::Rc;

use llm_batch_gateway::protocol::Verdict;

use crate::error::Result;
use crate::question::{Conclude, Question};

/// A question, and how its verdicts become answers.
pub struct Asked {
    pub question: Question,
    pub conclude: Conclude,
}

/// What became of a text that was asked about.
pub struct Answer {
    pub asked: Rc<Asked>,
    pub input: String,
    pub verdict: Verdict,
}

thread_local! {
    static CURRENT: RefCell<Vec<Rc<Answer>>> = const { RefCell::new(Vec::new()) };
}

/// While it lives, calls find these answers; then those of before.
pub struct Shown(Vec<Rc<Answer>>);

impl Shown {
    pub fn new(answers: Vec<Rc<Answer>>) -> Self {
        Self(CURRENT.replace(answers))
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        CURRENT.set(std::mem::take(&mut self.0));
    }
}

/// The answer of a call for the row at hand, if it is known.
pub fn answered(input: &str, question: &Question) -> Option<Result<Option<String>>> {
    let found = CURRENT.with_borrow(|answers| {
        answers.iter().find(|a| a.input == input && a.asked.question == *question).map(Rc::clone)
    })?;
    Some(found.asked.conclude.label(&found.verdict))
}
