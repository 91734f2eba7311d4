//! Answers that are refused: by the task's checks, or because their values do not fit. Their rows are asked again; and as
//! long as no answer has been taken, few are, since none may ever be.

use llm_batch_gateway::protocol::{Again, Spent, Verdict};
use pgrx::pg_sys;

use super::{Asking, Worker};
use crate::checks::{BAD_VALUE, Judged};
use crate::error::Result;
use crate::job::settle::{Answer, FEW};
use crate::job::store::Outcome;
use crate::process::{self, report};
use crate::txn;

/// Requests that are paid for, with no answer that the checks take, until the job stops.
const MOST_REQUESTS: u64 = 15;

/// Evidence that answers are taken, or are not.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    is_taken: bool,
    is_written: bool,
    /// Requests that were answered before one was.
    requests: u64,
    /// Why the last answer was refused.
    refused: Option<(&'static str, String)>,
}

impl Doubt {
    pub(super) fn spent(&mut self, spent: &Spent) {
        self.requests += spent.requests;
    }

    pub(super) fn take(&mut self) {
        self.is_taken = true;
    }

    pub(super) fn write(&mut self) {
        (self.is_taken, self.is_written) = (true, true);
    }

    pub(super) fn refuse(&mut self, class: &'static str, why: &str) {
        self.refused = Some((class, why.to_owned()));
    }

    /// Returns true if an answer has shown that the source of this class takes some: the columns one that was written,
    /// the task's checks one that they took.
    pub(super) fn is_refuted(&self, class: &str) -> bool {
        if class == BAD_VALUE { self.is_written } else { self.is_taken }
    }
}

impl Worker {
    /// Rows that may be with the gateway: those of a request at first, and few once an answer was refused.
    pub(super) fn doubted_window(&self) -> usize {
        match (&self.doubt, &self.asked.checks) {
            (Doubt { is_taken: true, .. }, _) => usize::MAX,
            (Doubt { refused: Some(_), .. }, _) => FEW,
            (_, Some(_)) => self.asked.stream.task.options.max_rows_per_request as usize,
            (_, None) => usize::MAX,
        }
    }

    /// Repairs and checks answers that have come, as the task's owner says, before anything is locked to write them.
    pub(super) fn judge(&mut self) -> Result<()> {
        let Some(checks) = &self.asked.checks else { return Ok(()) };
        let is_new = |a: &Answer| !a.is_judged && matches!(a.verdict, Verdict::Answer(_));
        let rows: Vec<_> = self.answers.iter().filter(|a| is_new(a)).collect();
        let rows: Vec<_> = rows
            .into_iter()
            .filter_map(
                |a| if let Verdict::Answer(answer) = &a.verdict { Some((a.text.as_str(), answer)) } else { None },
            )
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        let judged = txn::run(|| {
            report(pg_sys::BackendState::STATE_RUNNING, "checking answers");
            checks.judge(&rows)
        })?;
        let mut judged = judged.into_iter();
        for answer in std::mem::take(&mut self.answers) {
            match if is_new(&answer) { judged.next() } else { None } {
                Some(said) => self.take_judged(answer, said),
                None => self.answers.push(answer),
            }
        }
        let Doubt { is_taken, requests, refused, .. } = &self.doubt;
        if let Some((class, why)) = refused.clone().filter(|_| !is_taken && *requests >= MOST_REQUESTS) {
            self.stop_untaken(class, &why);
        }
        Ok(())
    }

    fn take_judged(&mut self, mut answer: Answer, judged: Judged) {
        answer.is_judged = true;
        match judged {
            Ok(new) => {
                self.doubt.take();
                let spec = &self.asked.stream.task.spec;
                let fields = spec.columns();
                answer.values = Some(self.job.targets.iter().map(|t| t.value(spec, &fields, &new)).collect());
                answer.verdict = Verdict::Answer(new);
            }
            Err(refused) => {
                self.doubt.refuse(refused.class, &refused.detail);
                answer.attempts = answer.attempts.max(1);
                if let Some(hint) = refused.hint.filter(|_| answer.attempts < self.job.max_attempts) {
                    self.ask_again(answer, hint);
                    return;
                }
                answer.values = None;
                answer.verdict = Verdict::Fail { class: refused.class.to_owned(), detail: refused.detail };
            }
        }
        self.answers.push(answer);
    }

    /// Asks a row again, before others.
    pub(super) fn ask_again(&mut self, answer: Answer, hint: String) {
        let goes_on = self.stopping.is_none() && self.reopen.is_none() && !self.put_off && self.client.is_some();
        if !goes_on || process::is_told_to_end() {
            // It is NULL still, and is claimed by a later pass.
            self.claimed_in_pass = self.claimed_in_pass.max(1);
            return;
        }
        let Answer { page, position, text, isolation, attempts, .. } = answer;
        let again = Some(Again { attempts: attempts.max(1), hint });
        self.waiting.push_front(Asking { place: (page, position), text, isolation, again });
    }

    /// No answer is taken, and none may ever be.
    pub(super) fn stop_untaken(&mut self, class: &str, why: &str) {
        let outcome = match class {
            BAD_VALUE => Outcome::Paused("label", Some(format!("no answer fits the columns: {why}")), None),
            _ => {
                let text = format!("no answer passes the checks of task \"{}\": {class}: {why}", self.job.task);
                Outcome::Paused("no_answers", Some(text), None)
            }
        };
        self.stop(outcome);
    }
}
