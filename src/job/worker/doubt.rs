//! Answers that are refused: by the task's checks, because their values do not fit, or by the table. As long as nothing was
//! written, few rows are asked about, since none may ever be.

use llm_batch_core::dialect::decisions;
use llm_batch_gateway::protocol::{Again, Verdict};
use pgrx::pg_sys;

use super::{Asking, Worker};
use crate::checks::{self, BAD_VALUE, Judged};
use crate::error::Result;
use crate::job::settle::{Answer, FEW};
use crate::job::store::Outcome;
use crate::job::target;
use crate::process::{self, report};
use crate::task::Asked;
use crate::{provenance, txn};

/// Requests whose rows may be with the gateway at first.
const AHEAD: usize = 8;
/// Requests with answers that are paid for, and three refusals, until the job stops.
const MOST_REQUESTS: u64 = 15;

/// Evidence that answers are taken, or are not.
#[derive(Debug)]
pub(super) struct Doubt {
    /// Tokens of the answer to a row, at the worst, and of its question if it has one of its own.
    tokens: usize,
    is_taken: bool,
    is_written: bool,
    /// Requests that had answers.
    requests: u64,
    /// Answers that were refused, and the last one's class and why.
    refusals: usize,
    refused: Option<(String, String)>,
}

impl Doubt {
    /// Nothing is known of what is asked.
    pub(super) fn new(asked: &Asked) -> Self {
        let task = &asked.stream.task;
        let kind = task.spec.prepare(&task.options, &str::len);
        let question = kind.choices().map_or(0, |choices| decisions::tokens(choices, &str::len));
        let tokens = kind.tokens(0).planned + question;
        Self { tokens, is_taken: false, is_written: false, requests: 0, refusals: 0, refused: None }
    }

    /// Requests were paid for that had answers.
    pub(super) fn paid(&mut self, requests: u64) {
        self.requests += requests;
    }

    pub(super) fn take(&mut self) {
        self.is_taken = true;
    }

    pub(super) fn write(&mut self) {
        (self.is_taken, self.is_written) = (true, true);
    }

    pub(super) fn refuse(&mut self, class: &str, why: &str) {
        self.refusals += 1;
        self.refused = Some((class.to_owned(), why.to_owned()));
    }

    /// Returns true if an answer has shown that the source of this class takes some: the task's checks one that they took,
    /// the table one that was written.
    pub(super) fn is_refuted(&self, class: &str) -> bool {
        if is_of_checks(class) { self.is_taken } else { self.is_written }
    }

    /// The last refusal, if as much was paid for as is risked.
    fn in_vain(&self) -> Option<(String, String)> {
        let is_enough = self.refusals >= FEW && self.requests >= MOST_REQUESTS;
        self.refused.clone().filter(|(class, _)| is_enough && !self.is_refuted(class))
    }
}

fn is_of_checks(class: &str) -> bool {
    [checks::FAILED, checks::RAISED].contains(&class)
}

impl Worker {
    /// Rows that may be with the gateway: those of some requests at first, and few once an answer was refused.
    pub(super) fn doubted_window(&self) -> usize {
        let Doubt { tokens, is_written, refused, .. } = &self.doubt;
        if *is_written {
            return usize::MAX;
        }
        if refused.is_some() {
            return FEW;
        }
        let stream = &self.asked.stream;
        let takes = self.outstanding_bytes + self.outstanding.len() * tokens;
        // Two requests that follow each other are as large as one may be, and a token has two bytes at least.
        let is_too_much = takes > AHEAD * stream.model.max_request_tokens as usize;
        if is_too_much || self.job.isolation.is_some() {
            return AHEAD;
        }
        AHEAD * stream.task.options.max_rows_per_request as usize
    }

    /// Stops if as much was paid for in vain as is risked.
    pub(super) fn weigh(&mut self) {
        // Answers that the checks have yet to see may pass them.
        let are_judged = |a: &Answer| a.is_judged || !matches!(a.verdict, Verdict::Answer(_));
        if self.stopping.is_none()
            && (self.asked.checks.is_none() || self.answers.iter().all(are_judged))
            && let Some((class, why)) = self.doubt.in_vain()
        {
            self.stop_untaken(&class, &why);
        }
    }

    /// Repairs and checks answers that have come, as the task's owner says, before anything is locked to write them. Which
    /// are left for later: where that takes long, it is told of the first ones first.
    pub(super) fn judge(&mut self) -> Result<Vec<Answer>> {
        let mut later = Vec::new();
        let Some(checks) = &self.asked.checks else { return Ok(later) };
        let is_new = |a: &Answer| !a.is_judged && matches!(a.verdict, Verdict::Answer(_));
        let rows: Vec<_> = self.answers.iter().filter(|a| is_new(a)).collect();
        let rows: Vec<_> = rows
            .into_iter()
            .filter_map(
                |a| if let Verdict::Answer(answer) = &a.verdict { Some((a.text.as_str(), answer)) } else { None },
            )
            .collect();
        if rows.is_empty() {
            return Ok(later);
        }
        let (judged, _) = txn::run(|| {
            report(pg_sys::BackendState::STATE_RUNNING, "checking answers");
            checks.judge(&rows, 0)
        })?;
        let mut judged = judged.into_iter();
        for answer in std::mem::take(&mut self.answers) {
            match is_new(&answer).then(|| judged.next()) {
                Some(Some(said)) => self.take_judged(answer, said),
                Some(None) => later.push(answer),
                None => self.answers.push(answer),
            }
        }
        Ok(later)
    }

    fn take_judged(&mut self, mut answer: Answer, judged: Judged) {
        answer.is_judged = true;
        match judged {
            Ok(new) => {
                self.doubt.take();
                let spec = &self.asked.stream.task.spec;
                let fields = spec.columns();
                let values: Vec<_> = self.job.targets.iter().map(|t| t.value(spec, &fields, &new)).collect();
                let (nulls, hash) = (target::nulls(&self.job.targets, &values), answer.page.hash(answer.position));
                answer.by = answer.by.take().map(|by| provenance::repaired(&by, &nulls, hash));
                answer.values = Some(values);
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
        let (id, task) = (self.job.id, &self.job.task);
        let (reason, what, change) = match class {
            BAD_VALUE => ("label", "no answer fits the columns".to_owned(), "the type of the column, or the task"),
            _ if is_of_checks(class) => {
                let what = format!("no answer passes the checks of task \"{task}\": {class}");
                ("no_answers", what, "the check or the instruction of the task")
            }
            _ => ("label", "no answer can be written".to_owned(), "what raises this, or the task"),
        };
        // Answers that the checks have not seen are asked again.
        self.answers.retain(|a| a.is_judged || !matches!(a.verdict, Verdict::Answer(_)));
        let text = format!("{what}: {why}; change {change}, then call llm_batch.resume({id})");
        self.stop(Outcome::Paused(reason, Some(text), None));
    }
}
