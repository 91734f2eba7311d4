//! One call of a batch scan: what it asks, and the stream that it is asked on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use llm_batch_core::task::Subject;
use pgrx::prelude::*;
use serde_json::json;

use super::answers::{Answer, Asked};
use super::calls::Call;
use super::nodes::list;
use super::others;
use crate::ask::{Asker, Done};
use crate::asking;
use crate::client::check_usable;
use crate::error::{Error, Result};
use crate::json::Json;
use crate::process::current_user;
use crate::question::{Prepared, Question};
use crate::text::{self, Text};

/// A call, and the stream of its rows.
pub struct Site {
    pub call: Call,
    pub input: *mut pg_sys::ExprState,
    others: Vec<*mut pg_sys::ExprState>,
    /// Since the first row that comes to the call.
    pub asked: Option<Rc<Asked>>,
    pub asker: Option<Asker>,
    /// By the asker's number: the row, and its text.
    pub waiting: BTreeMap<u64, (u64, String)>,
    /// Why it can't go on: told when a row's turn comes that has no answer.
    pub failed: Option<Error>,
    /// The counts of former streams.
    done: Done,
    model: Option<Model>,
}

/// The model that was asked last.
pub struct Model {
    pub name: String,
    pub has_prices: bool,
    pub rows_per_request: u32,
}

impl Site {
    /// # Safety
    /// `ps` is the state of a batch scan that begins; the call is of its expressions.
    pub unsafe fn new(ps: *mut pg_sys::PlanState, call: Call) -> Self {
        pgrx::check_for_interrupts!();
        // SAFETY: as the caller says; compiled in the memory context of the query.
        unsafe {
            let mut args = list::<pg_sys::Expr>((*call.call).args).into_iter().map(|e| pg_sys::ExecInitExpr(e, ps));
            Self {
                input: args.next().unwrap_or(std::ptr::null_mut()),
                others: args.collect(),
                call,
                asked: None,
                asker: None,
                waiting: BTreeMap::new(),
                failed: None,
                done: Done::default(),
                model: None,
            }
        }
    }

    /// The stream of the call, opened if it is not; none if one of the arguments besides the text is NULL.
    ///
    /// # Safety
    /// As of `question()`, in a scan that has begun.
    pub unsafe fn open(&mut self, ps: *mut pg_sys::PlanState) -> Result<Option<&mut Asker>> {
        if let Some(asker) = &mut self.asker
            && self.waiting.is_empty()
            && !asker.is_fresh()?
        {
            self.close();
        }
        if self.asker.is_none() {
            // SAFETY: as of Ahead::next().
            let Some(question) = (unsafe { self.question(ps) }) else { return Ok(None) };
            asking::check()?;
            check_usable()?;
            let Prepared { asked, limit, conclude } = prepare(&question)?;
            self.model = Some(Model {
                name: asked.model.clone(),
                has_prices: asked.models.iter().all(|(_, price)| price.rates.is_some()),
                rows_per_request: asked.stream.task.options.max_rows_per_request,
            });
            self.asker = Some(Asker::open(asked, limit)?);
            let (role, default_model) = (current_user(), RefCell::new(question.default_model()));
            self.asked = Some(Rc::new(Asked { question, role, default_model, conclude }));
        }
        Ok(self.asker.as_mut())
    }

    /// The question, which is the same for all rows.
    ///
    /// # Safety
    /// The arguments besides the text do not depend on the row.
    pub unsafe fn question(&self, ps: *mut pg_sys::PlanState) -> Option<Question> {
        // SAFETY: the functions' declarations say what their arguments are.
        unsafe {
            let econtext = (*ps).ps_ExprContext;
            let author = others::author(self.call.call.cast());
            let verb = self.call.verb;
            let mut args = self.others.iter().copied();
            let subject = match verb.subject() {
                Subject::None => Vec::new(),
                Subject::Task | Subject::Text => vec![Some(string(args.next()?, econtext)?)],
                Subject::Texts => text::all(evaluate::<Vec<Option<Text>>>(args.next()?, econtext)?).ok()?,
            };
            let options = if verb.names_task() { json!({}) } else { evaluate::<Json>(args.next()?, econtext)?.0 };
            // A task has its own model, whoever wrote the call.
            let author = author.filter(|_| !verb.names_task());
            Some(Question { verb, subject, options, author })
        }
    }

    /// Returns true if the stream is the one that would be opened now: rights, key, model and task are looked at anew.
    pub fn is_current(&self) -> bool {
        let (Some(asker), Some(asked)) = (&self.asker, &self.asked) else { return false };
        prepare(&asked.question).is_ok_and(|new| asker.is_for(&new.asked) && new.conclude == asked.conclude)
    }

    /// Gives the stream up once its sent rows are answered. The others are withdrawn.
    pub fn recall(&mut self, answer: &mut dyn FnMut(u64, Answer)) -> Result<()> {
        let (Some(asker), Some(asked)) = (self.asker.take(), self.asked.take()) else { return Ok(()) };
        let waiting = &mut self.waiting;
        let done = asker.recall(&mut |o| {
            if let Some((row, input)) = waiting.remove(&o.n) {
                answer(row, Answer { asked: Rc::clone(&asked), input, verdict: o.verdict });
            }
        })?;
        self.done.add(&done);
        Ok(())
    }

    /// Gives the stream up. Its rows that were not sent are withdrawn.
    pub fn close(&mut self) {
        if let Some(asker) = self.asker.take() {
            self.done.add(&asker.done());
            asker.keep();
        }
        self.asked = None;
    }

    /// The counts of its streams so far.
    pub fn done(&self) -> Done {
        let mut done = self.done;
        if let Some(asker) = &self.asker {
            done.add(&asker.done());
        }
        done
    }

    /// The model that was asked.
    pub fn model(&self) -> Option<&Model> {
        self.model.as_ref()
    }
}

/// Looks up what is needed to ask as it is now, and not when the cursor was declared.
fn prepare(question: &Question) -> Result<Prepared> {
    // SAFETY: in a transaction, on the main thread; an error that does not come back as one aborts the (sub)transaction,
    // which pops the snapshot.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let prepared = question.prepare();
    // SAFETY: the snapshot pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    prepared
}

/// The string of an expression; none if it is NULL or damaged, which the call itself says when its row's turn comes.
///
/// # Safety
/// As of `evaluate()`; it is of type text.
pub unsafe fn string(state: *mut pg_sys::ExprState, econtext: *mut pg_sys::ExprContext) -> Option<String> {
    // SAFETY: as the caller says.
    unsafe { evaluate::<Text>(state, econtext) }?.checked().ok()
}

/// The value of an expression, if it is not NULL; copied, what it takes to do so is freed with the row's memory.
///
/// # Safety
/// The expression is of the type, and the context that of its node.
pub unsafe fn evaluate<V: FromDatum>(state: *mut pg_sys::ExprState, econtext: *mut pg_sys::ExprContext) -> Option<V> {
    // SAFETY: the caller says that the expression is of the type.
    unsafe {
        let before = pg_sys::MemoryContextSwitchTo((*econtext).ecxt_per_tuple_memory);
        let mut is_null = true;
        let datum = pg_sys::ExecEvalExpr(state, econtext, &mut is_null);
        let value = V::from_datum(datum, is_null);
        pg_sys::MemoryContextSwitchTo(before);
        value
    }
}
