//! Trouble that keeps answers from being written: a lock on the table, a database that is read-only, a right that the
//! owner has lost, an error that every write meets (a full disk). Nothing more is claimed meanwhile, and answers at
//! hand are kept.

use std::time::{Duration, Instant};

use pgrx::PgSqlErrorCode as Code;

use super::write::rates;
use super::{AGAIN, LATER, Worker};
use crate::budget::Bill;
use crate::error::{Error, Result};
use crate::job::ledger::{self, Delta};
use crate::job::settle::{FEW, says_nothing};
use crate::job::store::{self, Outcome};
use crate::job::table;
use crate::{process, shared, sql, txn};

/// Failures in a row after which the job is shown as paused, and tried again with a single row.
const MOST_TRIES: u32 = 3;
/// The longest wait between two tries.
const MOST_WAIT: Duration = Duration::from_secs(60);
/// Interval at which a database that is read-only is looked at.
const FREEZE: Duration = Duration::from_secs(5);
/// Time for which a process that is told to end tries to write answers at hand, milliseconds: longer than it waits for
/// a lock.
const LAST_WRITE: i32 = 3_000;
/// Time for which it then tries to enter what it could not write.
const LAST_ENTRY: i32 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Locked,
    ReadOnly,
    Denied,
    WriteError,
}

impl Kind {
    /// The kind of an error of a settlement, if answers are to be kept because of it.
    pub(super) fn of(code: Code) -> Option<Self> {
        match code {
            Code::ERRCODE_LOCK_NOT_AVAILABLE => Some(Self::Locked),
            Code::ERRCODE_READ_ONLY_SQL_TRANSACTION => Some(Self::ReadOnly),
            Code::ERRCODE_INSUFFICIENT_PRIVILEGE | Code::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION => {
                Some(Self::Denied)
            }
            // Fewer rows may take less; a connection or a file is needed by what users have written.
            Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED | Code::ERRCODE_CONNECTION_FAILURE | Code::ERRCODE_UNDEFINED_FILE => {
                Some(Self::WriteError)
            }
            _ => says_nothing(code).then_some(Self::WriteError),
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Locked => "locked",
            Self::ReadOnly => "read_only",
            Self::Denied => "owner",
            Self::WriteError => "write_error",
        }
    }
}

#[derive(Debug)]
pub(super) struct Trouble {
    kind: Kind,
    /// As SQL writes it.
    since: String,
    failures: u32,
    /// Nothing is tried before.
    pub(super) next: Instant,
}

impl Trouble {
    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.next
    }

    /// When it is tried again.
    pub(super) fn left(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// The wait after so many failures.
    fn wait(&self) -> Duration {
        match self.kind {
            Kind::Locked => AGAIN,
            Kind::ReadOnly => FREEZE,
            _ if self.failures < MOST_TRIES => AGAIN,
            _ => (AGAIN * 2_u32.saturating_pow(self.failures - MOST_TRIES + 1)).min(MOST_WAIT),
        }
    }

    fn is_pause(&self) -> bool {
        match self.kind {
            Kind::Locked => false,
            Kind::ReadOnly | Kind::Denied => true,
            Kind::WriteError => self.failures >= MOST_TRIES,
        }
    }
}

impl Worker {
    /// The number of times that the trouble was met.
    pub(super) fn troubles(&self) -> u32 {
        self.trouble.as_ref().map_or(0, |t| t.failures)
    }

    /// Something is in the way of writing: it is shown, and tried again after a while.
    pub(super) fn hinder(&mut self, kind: Kind, e: &Error) {
        if kind == Kind::Denied && self.put_off {
            // A right that the old owner lacks says nothing about the new one: the error is not shown.
            self.give_up(&e.one_line());
            return;
        }
        if self.trouble.as_ref().is_none_or(|t| t.kind != kind) {
            let since = txn::run(|| {
                sql::one::<String>("SELECT pg_catalog.date_trunc('second', pg_catalog.now())::pg_catalog.text", &[])
            });
            let since = since.ok().flatten().unwrap_or_default();
            self.trouble = Some(Trouble { kind, since, failures: 0, next: Instant::now() });
        }
        let Some(trouble) = &mut self.trouble else { return };
        trouble.failures += 1;
        trouble.next = Instant::now() + trouble.wait();
        let (is_pause, failures) = (trouble.is_pause(), trouble.failures);
        if kind == Kind::WriteError && failures >= MOST_TRIES {
            self.most_at_once = FEW;
        }
        if kind == Kind::Denied && self.stopping.is_none() {
            // Answers are kept for resume().
            self.stop(Outcome::Paused("owner", Some(e.one_line()), None));
        }
        // A job that is to stop has tried once more.
        let is_to_stop = self.stopping.is_some() || self.put_off;
        let is_kept = kind == Kind::Denied && matches!(self.stopping, Some(Outcome::Paused("owner", ..)));
        if is_to_stop && is_pause && !is_kept && self.outstanding.is_empty() {
            self.give_up(&e.one_line());
            return;
        }
        if is_pause && self.reopen.is_none() && !is_to_stop && self.outstanding.len() > FEW {
            // Rows that have not been sent come back; they are claimed again when the stream has been opened anew.
            self.change(self.asked.clone());
        }
        self.show(is_pause, e);
        if kind == Kind::ReadOnly && !self.has_in_hand() && self.outstanding.is_empty() && !is_to_stop {
            self.stop(Outcome::Paused("read_only", Some(e.one_line()), Some(shared::now() + LATER)));
        }
    }

    /// Shows what is in the way, and enters what was spent: a crash loses the answers, and not their accounts.
    fn show(&mut self, is_pause: bool, e: &Error) {
        let Some(trouble) = &self.trouble else { return };
        let (job, asked, spent) = (&self.job, &self.asked, &self.spent);
        let (rows_per_second, tokens_per_minute) = rates(&self.samples);
        let resume_at =
            (is_pause && trouble.kind != Kind::Denied).then(|| shared::now() + trouble.left().as_micros() as i64);
        let status = if is_pause { "paused" } else { "running" };
        let is_shown = is_pause || trouble.kind == Kind::Locked;
        let shown = txn::run(|| {
            if !spent.is_empty() {
                let delta = Delta { spent: spent.clone(), rows_per_second, tokens_per_minute, ..Delta::default() };
                ledger::write(job.id, asked, &delta, [])?;
            }
            let text = if trouble.kind == Kind::Locked {
                format!("waiting for a lock since {}: {}", trouble.since, table::lockers(job)?)
            } else {
                format!("{}, since {}", e.one_line(), trouble.since)
            };
            if is_shown {
                store::show(job.id, job.epoch, status, Some((trouble.kind.reason(), &text)), resume_at)?;
            }
            Ok(text)
        });
        match shown {
            Ok(text) => {
                self.spent = Bill::default();
                if trouble.failures == 1 || (is_pause && trouble.failures == MOST_TRIES) {
                    pgrx::log!("llm_batch job {} cannot write answers: {text}", job.id);
                }
            }
            Err(e) => pgrx::log!("llm_batch job {} cannot write: {}", job.id, e.one_line()),
        }
    }

    /// Nothing is in the way any more.
    pub(super) fn free(&mut self) -> Result<()> {
        // A job that is to stop says itself how it ends.
        if self.trouble.is_some() && self.stopping.is_none() {
            let (id, epoch) = (self.job.id, self.job.epoch);
            txn::run(|| store::show(id, epoch, "running", None, None))?;
        }
        self.trouble = None;
        Ok(())
    }

    /// So few rows can't be written that others beside them have to tell whether it is their own fault.
    pub(super) fn lacks_others(&self) -> bool {
        self.answers.len() < FEW && self.trouble.as_ref().is_some_and(|t| t.kind == Kind::WriteError && t.is_pause())
    }

    /// Returns true if there are answers that are not written.
    pub(super) fn has_in_hand(&self) -> bool {
        !self.answers.is_empty() || !self.locked.is_empty()
    }

    /// Lets go of answers that were paid for. Their rows are NULL still, and are asked again by a later run.
    pub(super) fn give_up(&mut self, why: &str) {
        let rows = self.answers.len() + self.locked.len();
        self.answers.clear();
        self.locked.clear();
        self.trouble = None;
        if rows == 0 {
            return;
        }
        let text = format!("{rows} answers could not be written before the job's worker ended: {why}");
        pgrx::log!("llm_batch job {}: {text}", self.job.id);
        let (id, asked, rest) = (self.job.id, &self.asked, Delta { spent: self.spent.clone(), ..Delta::default() });
        // If that can't be written, it is in the log.
        let entered = txn::run(|| {
            ledger::write(id, asked, &rest, [])?;
            store::interrupted(id, Some(&text))
        });
        if entered.is_ok() {
            self.spent = Bill::default();
        }
    }

    /// Told to end, while answers were kept: they are written if they can be, now that those are ended too who held locks.
    pub(super) fn farewell(&mut self) {
        process::write_last();
        if self.has_in_hand() {
            self.most_at_once = usize::MAX;
            process::cancel_after(LAST_WRITE);
            let why = loop {
                match self.settle(true) {
                    Err(e) => break e.one_line(),
                    Ok(()) if self.answers.is_empty() => break "their rows were locked".to_owned(),
                    // Checks have not come to these: each time some are judged, and written.
                    Ok(()) => {}
                }
            };
            // A commit may wait for a synchronous standby that is gone.
            process::cancel_after(LAST_ENTRY);
            self.give_up(&why);
        }
        process::end_now();
    }
}
