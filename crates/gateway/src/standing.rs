//! The gateway's knowledge of a task with a model. It outlives the streams that ask.

use std::collections::HashMap;

use llm_batch_core::cheaper::Cheaper;
use llm_batch_core::forms::{Form, Forms};
use llm_batch_core::options::Options;
use llm_batch_core::patience::Patience;
use llm_batch_core::route::Taken;

use crate::cache::TextKey;
use crate::row::Row;
use crate::sizes::Sizes;

/// Tasks that are remembered for a model.
const MOST: usize = 1024;
/// Requests of which single rows were refused, while none was ever accepted: then it is the request that is wrong.
const MOST_REFUSED: usize = 3;

/// Requests in a row that are not answered, while those without rows are, until nothing is sent for a while.
const MOST_UNANSWERED: u32 = 20;
/// Attempts that rows which were answered when they were asked again leave to others: a retry budget.
const MOST_SPARE: u32 = 20;
/// The number of new requests over which the part is taken that was paid for in vain.
const RECENT: f64 = 4.0;
/// Rows that may all be such that there is no answer.
const FEW_ROWS: usize = 4;
/// Time (ms) for which nothing is sent at first, doubled each time, and at most.
const FIRST_PAUSE: u64 = 30_000;
const LONGEST_PAUSE: u64 = 900_000;

/// A task's standing with a model.
#[derive(Debug, Default)]
pub struct Standing {
    pub patience: Patience,
    /// The cheaper way of asking it, where there are two.
    pub cheaper: Cheaper,
    /// The record of answers in each form of `response_format`.
    pub forms: Forms,
    /// The sizes of its answers.
    pub sizes: Sizes,
    /// The tokens that its rows took.
    pub taken: Taken,
    /// The part of its new requests of late that may have been paid for, and of which no row was answered.
    in_vain: f64,
    /// A request was answered with a 2xx.
    pub is_accepted: bool,
    /// Numbers of the requests of which a single row was refused, until one is accepted.
    refused: Vec<u64>,
    /// Attempts beyond those of a row: one for each row that was answered when it was asked again, less those taken.
    spare: u32,
    /// Requests in a row that were not answered although one without rows was; and how often nothing was sent for a while
    /// for that, or since as many as are risked may have been paid for.
    unanswered: u32,
    held: u32,
    /// When (ms) that began last.
    held_at: u64,
    /// When (ms) it was last looked for.
    used: u64,
}

impl Standing {
    /// A form is of no use. Returns true if there is another one to try, where the server refuses some.
    pub fn has_other(&self, refused: Forms, form: Form, options: &Options) -> bool {
        let forms = self.forms.without(refused);
        forms.left(options.answer_shape, options.structured_output).any(|other| other != form)
    }

    /// A form is refused. Returns true if there is another one to try.
    pub fn refuses(&mut self, form: Form, options: &Options) -> bool {
        if form == Form::Plain {
            return false;
        }
        self.forms.give_up(form);
        self.forms.left(options.answer_shape, options.structured_output).next().is_some()
    }

    /// A single row was refused that had been in the request of this number. Returns true if it is the request that is
    /// wrong.
    pub fn row_is_refused(&mut self, request: u64) -> bool {
        if !self.is_accepted && !self.refused.contains(&request) {
            self.refused.push(request);
        }
        self.refused.len() >= MOST_REFUSED
    }

    /// A request of these rows was paid for, or may have been. Whether that was in vain says something of others only if they
    /// are new, and several: some rows are never answered.
    pub fn is_paid(&mut self, rows: &[Row], is_in_vain: bool) {
        if rows.len() > FEW_ROWS && rows.iter().all(Row::is_new) {
            self.in_vain += (f64::from(u8::from(is_in_vain)) - self.in_vain) / RECENT;
        }
    }

    /// A row that had no valid answer has one now that it was asked again: so the fault was not the row's.
    pub fn recovers(&mut self) {
        self.spare = (self.spare + 1).min(MOST_SPARE);
    }

    /// Returns true if a row may be asked once more than it may be by itself.
    pub fn takes_spare(&mut self) -> bool {
        let has_spare = self.spare > 0;
        self.spare = self.spare.saturating_sub(1);
        has_spare
    }

    /// Most of its new requests are not in vain: if a row is, it is its fault. A task that was never answered has its
    /// own bound.
    pub fn is_well(&self) -> bool {
        self.in_vain < 0.5 || !self.patience.has_answered()
    }

    pub fn accepts(&mut self) {
        self.is_accepted = true;
        self.refused.clear();
    }

    /// A request is to be sent. After a pause it is one at a time.
    pub fn may_send(&self, now: u64) -> bool {
        self.patience.may_send(now) && (self.held == 0 || self.patience.in_flight() == 0)
    }

    /// A request that was sent at `sent` (ms) was not answered although one without rows was, or was refused within an
    /// answer. Returns true if they are enough.
    pub fn is_unanswered(&mut self, sent: u64) -> bool {
        let is_new = !self.is_before_pause(sent);
        self.unanswered += u32::from(is_new);
        is_new && self.unanswered >= MOST_UNANSWERED
    }

    /// Returns true if a request that was sent at `sent` (ms) was under way when the last pause began.
    fn is_before_pause(&self, sent: u64) -> bool {
        self.held > 0 && sent <= self.held_at
    }

    /// Sends nothing from now (ms) on, for a request that was sent at `sent`, and a single request after that. Returns for how
    /// long (ms). `None`: it was under way when the last pause began, and does not make that longer.
    pub fn hold(&mut self, now: u64, sent: u64) -> Option<u64> {
        self.patience.holds();
        if self.is_before_pause(sent) {
            return None;
        }
        self.held_at = now;
        self.unanswered = MOST_UNANSWERED - 1;
        let wait = (FIRST_PAUSE << self.held.min(10)).min(LONGEST_PAUSE);
        self.held += 1;
        Some(wait)
    }

    /// A request was answered, be it with a refusal.
    pub fn is_answered(&mut self) {
        (self.unanswered, self.held) = (0, 0);
    }

    /// The next stream after a stop begins anew.
    pub fn begin_anew(&mut self) {
        self.patience.begin_anew();
        self.forms = Forms::default();
        self.refused.clear();
    }
}

/// The standing of each task with a model, by the scope of its groups.
#[derive(Debug, Default)]
pub struct Standings(HashMap<TextKey, Standing>);

impl Standings {
    /// The sizes of a task's answers, if it was ever asked.
    pub fn sizes(&self, scope: TextKey) -> Option<Sizes> {
        self.0.get(&scope).map(|standing| standing.sizes)
    }

    /// The tokens that the rows of a task took, if it was ever asked.
    pub fn taken(&self, scope: TextKey) -> Option<Taken> {
        self.0.get(&scope).map(|standing| standing.taken)
    }

    pub fn of(&mut self, now: u64, scope: TextKey) -> &mut Standing {
        if self.0.len() >= MOST && !self.0.contains_key(&scope) {
            let idle = self.0.iter().filter(|(_, s)| s.patience.in_flight() == 0);
            if let Some(oldest) = idle.min_by_key(|(_, s)| s.used).map(|(scope, _)| *scope) {
                self.0.remove(&oldest);
            }
        }
        let standing = self.0.entry(scope).or_default();
        standing.used = now;
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_looked_for_longest_is_forgotten() {
        let mut all = Standings::default();
        all.of(1, 1).is_accepted = true;
        all.of(2, 2).patience.sent(2);
        (3..2_000).for_each(|n| all.of(n, n.into()).accepts());
        assert_eq!(all.0.len(), MOST);
        assert!(!all.0.contains_key(&1) && all.0.contains_key(&2) && all.0.contains_key(&1_999));
    }

    #[test]
    fn rows_of_three_requests_make_the_request_wrong() {
        let mut s = Standing::default();
        assert!(!s.row_is_refused(1) && !s.row_is_refused(1) && !s.row_is_refused(2) && s.row_is_refused(3));
        s.accepts();
        assert!((4..9).all(|n| !s.row_is_refused(n)));
    }
}
