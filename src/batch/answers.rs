//! The answers of the current row, which its calls find instead of sending a request. They exist while a batch scan
//! evaluates the row's expressions. A call that finds none sends its own request: it is slow, and never wrong.

use std::cell::RefCell;
use std::rc::Rc;

use pgrx::pg_sys;

use llm_batch_gateway::protocol::Verdict;

use crate::error::Result;
use crate::process::current_user;
use crate::question::{Conclude, Question};

/// A question, on whose behalf it is asked and of which model if that is the default one, and how its verdicts become
/// answers.
pub struct Asked {
    pub question: Question,
    pub role: pg_sys::Oid,
    /// Answers that were paid for hold on where the setting has changed since, between two FETCHes.
    pub default_model: RefCell<Option<String>>,
    pub conclude: Conclude,
}

/// The result for a text that was asked about.
pub struct Answer {
    pub asked: Rc<Asked>,
    pub input: String,
    pub verdict: Verdict,
}

/// The answers that calls find.
#[derive(Default)]
struct Row {
    answers: Vec<Rc<Answer>>,
    /// It is not the row's turn yet: whether it has a label is told then.
    is_ahead: bool,
}

thread_local! {
    static CURRENT: RefCell<Row> = const { RefCell::new(Row { answers: Vec::new(), is_ahead: false }) };
}

/// While it lives, calls find these answers; afterwards the previous ones.
pub struct Shown(Row);

impl Shown {
    pub fn new(answers: Vec<Rc<Answer>>, is_ahead: bool) -> Self {
        Self(CURRENT.replace(Row { answers, is_ahead }))
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        CURRENT.set(std::mem::take(&mut self.0));
    }
}

/// The answer of a call for the row at hand, if it is known.
pub fn answered(input: &str, question: &Question) -> Option<Result<Option<String>>> {
    let (found, is_ahead) = CURRENT.with_borrow(|row| {
        let is_it = |a: &&Rc<Answer>| a.input == input && a.asked.question == *question;
        row.answers.iter().find(is_it).map(|a| (Rc::clone(a), row.is_ahead))
    })?;
    // A function that the row's expressions call may have another role, and a setting of its own.
    if found.asked.role != current_user() || *found.asked.default_model.borrow() != question.default_model() {
        return None;
    }
    if is_ahead && !matches!(found.verdict, Verdict::Answer(_)) {
        return Some(Ok(None));
    }
    Some(found.asked.conclude.answer(&found.verdict))
}
