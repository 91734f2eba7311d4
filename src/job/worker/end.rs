//! The end of a run: by an error, or because nothing is left to do.

use pgrx::PgSqlErrorCode as Code;

use super::trouble::Kind;
use super::{AGAIN, LAST_TRIES, LATER, MOST_FAILURES, MOST_INTERNAL, Worker, me};
use crate::budget::Bill;
use crate::error::{Error, is_passing};
use crate::job::ledger::{self, Delta};
use crate::job::settle::{Answer, says_nothing};
use crate::job::store::{self, Outcome};
use crate::process::{self, my_database};
use crate::shared::{self, End};
use crate::{owner, txn};

impl Worker {
    /// Reacts to an error in a transaction: some pass, some are the job's end.
    pub(super) fn fail(&mut self, e: &Error) {
        self.failures_in_a_row += 1;
        let id = self.job.id;
        if e.code == Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED && self.page_size > 1 {
            // A page of very large texts.
            self.page_size = (self.page_size / 2).max(1);
            return;
        }
        // A lock is held as long as someone pleases; a VACUUM FULL may take hours.
        if let Some(kind @ (Kind::Locked | Kind::ReadOnly)) = Kind::of(e.code) {
            // With the next try it is looked again.
            self.look_now = false;
            self.hinder(kind, e);
            return;
        }
        if says_nothing(e.code) {
            let most = if is_passing(e.code) { MOST_FAILURES } else { MOST_INTERNAL };
            if self.failures_in_a_row < most {
                process::wait(None, Some(AGAIN));
                return;
            }
            // It says nothing about the job: another worker tries it, after a while.
            let text = e.one_line();
            pgrx::log!("llm_batch job {id} cannot continue: {text}");
            // As with the rest: if that can't be written, it is in the log.
            let _ = txn::run(|| store::interrupted(id, Some(&text)));
            self.dies = true;
            return;
        }
        let job = txn::run(|| store::load(id)).ok().flatten();
        if job.as_ref().is_some_and(|job| job.owner.is_some_and(|owner| owner != me())) {
            // A right that the old owner lacks says nothing about the new one, as whom another process goes on.
            self.put_off = true;
            self.withdraw();
            return;
        }
        pgrx::log!("llm_batch job {id} stops: {}", e.one_line());
        // A role that was dropped has no rights: that it has none is not what is wrong.
        let is_gone = job.is_some_and(|job| job.owner.is_none());
        self.stop(if is_gone { Outcome::Paused("owner", Some(owner::GONE.to_owned()), None) } else { outcome_of(e) });
    }

    /// Ends the run once it is stopping and nothing is open any more.
    pub(super) fn try_end(&mut self) -> Option<End> {
        // Answers to what was sent are still awaited and written, locked rows for a moment.
        let is_young = |a: &Answer| a.locked_since.is_none_or(|t| t.elapsed() < LAST_TRIES);
        if !self.outstanding.is_empty() || !self.answers.is_empty() || self.locked.iter().any(is_young) {
            return None;
        }
        if (self.stopping.is_some() || self.put_off) && !self.suspects.is_empty() {
            let rows = self.suspects.take();
            if !matches!(self.stopping, Some(Outcome::Paused("label" | "no_answers", ..))) {
                self.too_late.extend(rows);
            }
        }
        let outcome = if self.put_off { None } else { Some(self.stopping.clone()?) };
        let (id, epoch, asked, in_doubt) = (self.job.id, self.job.epoch, &self.asked, self.money.in_doubt);
        let rest = Delta { spent: self.spent.clone(), ..Delta::default() };
        let entered = txn::run(|| {
            if store::load(id)?.is_none_or(|job| job.home != self.job.home) {
                return Ok(None);
            }
            if !self.spent.is_empty() || !self.too_late.is_empty() {
                ledger::write(id, asked, &rest, &self.too_late)?;
            }
            match &outcome {
                Some(outcome) => store::end(id, epoch, outcome, in_doubt).map(Some),
                None => ledger::release(id, in_doubt).and_then(|()| store::interrupted(id, None)).map(|()| Some(true)),
            }
        });
        if self.put_off {
            // If nothing could be entered, what is reserved stays so, and counts as spent.
            return Some(End::Again(shared::now() + 1_000_000));
        }
        match entered {
            Ok(Some(true)) => {}
            // Not this run's job any more: whether there is something to do instead, the next worker finds out.
            Ok(None) => return Some(End::Again(shared::now())),
            // There is more to do.
            Ok(Some(false)) => {
                self.spent = Bill::default();
                self.too_late.clear();
                self.stopping = None;
                self.look_now = true;
                self.restart_pass();
                return None;
            }
            Err(e) if e.code == Code::ERRCODE_UNDEFINED_TABLE || e.code == Code::ERRCODE_UNDEFINED_OBJECT => {}
            Err(e) => {
                pgrx::log!("llm_batch job {id} could not record its end: {}", e.one_line());
                return Some(End::Died);
            }
        }
        let outcome = outcome?;
        if let Outcome::Paused(_, _, Some(at)) = outcome {
            shared::want(my_database(), 0, 0, at);
        }
        Some(End::Finished)
    }
}

/// The state in which an error leaves a job.
pub(super) fn outcome_of(e: &Error) -> Outcome {
    let text = e.one_line();
    match e.code {
        Code::ERRCODE_INSUFFICIENT_PRIVILEGE | Code::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION => {
            Outcome::Paused("owner", Some(text), None)
        }
        // The file of the key: mended, the job can go on.
        Code::ERRCODE_UNDEFINED_FILE => Outcome::Paused("auth", Some(text), None),
        Code::ERRCODE_READ_ONLY_SQL_TRANSACTION => {
            Outcome::Paused("read_only", Some(text), Some(shared::now() + LATER))
        }
        Code::ERRCODE_CONNECTION_FAILURE => Outcome::Paused("provider_down", Some(text), Some(shared::now() + LATER)),
        _ => Outcome::Failed(text),
    }
}
