//! Writes answers that have arrived into the table and the counters.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::ToGateway;
use pgrx::pg_sys;

use super::money::Decision;
use super::{CRASH, Worker, make_plan};
use crate::budget;
use crate::client::WINDOW_ROWS;
use crate::error::Result;
use crate::failure::failure_point;
use crate::job::cause::Cause;
use crate::job::ledger::{self, Delta, Failure};
use crate::job::settle::{self, Answer, FEW, Others, Settled};
use crate::job::store::Outcome;
use crate::job::table;
use crate::process::{my_database, report};
use crate::{changes, checks, shared, sql, txn};

/// The time over which rates are measured.
const RATES: Duration = Duration::from_secs(60);

/// The result of a settlement that was committed.
struct Written {
    settled: Settled,
    decision: Decision,
    is_progress: bool,
    /// The spending and the budget of the job after it, in words.
    account: Option<String>,
}

impl Worker {
    pub(super) fn settle(&mut self, with_locked: bool) -> Result<()> {
        let mut later = self.judge()?;
        let mut batch = std::mem::take(&mut self.answers);
        if with_locked {
            self.locked_tried = Instant::now();
            batch.append(&mut self.locked);
        }
        let mut rest = batch.split_off(self.most_at_once.min(batch.len()));
        rest.append(&mut later);
        self.sample(0, 0);
        let others = self.others(&batch, &rest);
        let written = self.write(&batch, others);
        report(pg_sys::BackendState::STATE_IDLE, "waiting for answers");
        if written.is_err() {
            // Nothing was written. All of it is tried again, other rows first.
            rest.append(&mut batch);
        }
        self.answers = rest;
        let written = written?;
        self.most_at_once = if self.most_at_once > WINDOW_ROWS { usize::MAX } else { self.most_at_once * 2 };
        failure_point!("committed");
        self.note(written)
    }

    /// Rows that are to be written besides these answers.
    fn others(&self, batch: &[Answer], rest: &[Answer]) -> Others {
        let is_last = self.pass_ended
            && self.outstanding.is_empty()
            && self.waiting.is_empty()
            && rest.is_empty()
            && self.locked.is_empty();
        match rest.iter().chain(&self.locked).any(|a| a.refused_since.is_some()) {
            true => Others::Refused,
            false if is_last && batch.len() <= FEW => Others::None,
            false => Others::Some,
        }
    }

    /// The transaction of a settlement.
    fn write(&mut self, batch: &[Answer], others: Others) -> Result<Written> {
        let (job, asked, money) = (&self.job, &self.asked, &self.money);
        let (plan, known, known_at) = (&mut self.plan, &mut self.table, &mut self.table_at);
        let (spent, too_late) = (&self.spent, &self.too_late);
        let (rows_per_second, tokens_per_minute) = rates(&self.samples);
        // A job that is about to stop sends nothing more.
        let may_grant = self.stopping.is_none() && !self.put_off;
        txn::run(|| {
            report(pg_sys::BackendState::STATE_RUNNING, "writing answers");
            failure_point!("settle");
            txn::check_writable()?;
            table::lock(job, pg_sys::RowExclusiveLock)?;
            // If nothing was changed since the last look, it would find the same.
            let at = changes::of_tables();
            if *known_at != Some(at) {
                let table = table::table(job)?;
                if table != *known {
                    *plan = make_plan(job, &table, asked)?;
                    *known = table;
                }
                *known_at = Some(at);
            }
            // Deferred constraints raise here, where the row they raise for can be found, not at the commit.
            sql::run("SET CONSTRAINTS ALL IMMEDIATE", &[])?;
            settle::by_key()?;
            let settled = settle::settle(plan, batch, others)?;
            let delta = Delta {
                done: settled.done,
                superseded: settled.superseded,
                reused: settled.reused,
                nulls: settled.nulls.clone(),
                spent: spent.clone(),
                rows_per_second,
                tokens_per_minute,
                is_progress: settled.done + settled.superseded + settled.failures.len() as i64 > 0,
            };
            let account = ledger::write(job.id, asked, &delta, settled.failures.iter().chain(too_late))?;
            let account = account.filter(|_| may_grant && asked.stream.budget.is_some());
            let decision = account.as_ref().map_or(Decision::Nothing, |a| money.decide(&a.funds));
            if let Decision::Grant(allowance) = decision {
                ledger::reserve(job.id, allowance)?;
            }
            if money.in_doubt {
                ledger::release(job.id, true)?;
            }
            failure_point!("written");
            let account = account.map(|a| a.spent);
            Ok(Written { settled, decision, is_progress: delta.is_progress, account })
        })
    }

    /// Takes note of what was committed.
    fn note(&mut self, written: Written) -> Result<()> {
        let Written { settled, decision, is_progress, account } = written;
        if is_progress {
            self.job.was_unwritable = false;
            self.job.starts = (self.job.starts - 1).max(0);
            shared::progressed(my_database(), self.job.id);
        }
        let spent = std::mem::take(&mut self.spent).total();
        self.money.settled(decision);
        self.carry_out(decision, account.unwrap_or_default())?;
        let listed = std::mem::take(&mut self.too_late);
        if listed.iter().any(|failure| failure.class == CRASH) {
            // The next row may be such a one too.
            shared::listed_a_crash(my_database(), self.job.id);
        }
        if !settled.failures.is_empty() || !listed.is_empty() {
            self.job.has_failures = true;
        }
        self.has_noted |= !settled.nulls.is_empty();
        if settled.done > 0 {
            self.doubt.write();
        }
        for (_, failure) in &settled.raised {
            self.doubt.refuse(&failure.class, &failure.detail);
        }
        let verdicts = self.suspects.judge(&settled.written, settled.raised, &self.doubt);
        self.too_late.extend(verdicts.rows);
        if let Some((Cause::Refused(class), says)) = &verdicts.guilty {
            self.stop_untaken(class, says);
        } else if let Some((cause, says)) = verdicts.guilty {
            let id = self.job.id;
            let text = format!(
                "rows with {cause} cannot be written: {says}; change what raises this, then call llm_batch.resume({id})"
            );
            self.stop(Outcome::Paused("label", Some(text), None));
        }
        self.sample(settled.done + settled.failures.len() as i64, (spent.input_tokens + spent.output_tokens) as i64);
        for (answer, hint, why) in settled.unfit {
            self.doubt.refuse(checks::BAD_VALUE, &why);
            self.ask_again(answer, hint);
        }
        self.weigh();
        for (key, attempts) in settled.changed {
            self.came_too_late(key, attempts);
        }
        for mut answer in settled.locked {
            answer.locked_since.get_or_insert_with(Instant::now);
            self.locked.push(answer);
        }
        Ok(())
    }

    /// Grants what has been reserved, or stops.
    fn carry_out(&mut self, decision: Decision, spent: String) -> Result<()> {
        match decision {
            Decision::Nothing => {}
            Decision::Grant(allowance) => {
                if let Some(client) = &mut self.client {
                    client.send(&ToGateway::Allow(allowance))?;
                }
            }
            Decision::UsedUp(least) => {
                let text = format!("the budget is exhausted: spent {spent}; {}", budget::next_request(least));
                self.stop(Outcome::Paused("budget", Some(text), None));
            }
        }
        Ok(())
    }

    /// A row whose input changed while it was asked about is claimed again by the next pass, with its new text; but not
    /// for ever.
    fn came_too_late(&mut self, key: String, attempts: u32) {
        let times = self.late.entry(key.to_string()).or_default();
        *times += attempts.max(1);
        self.claimed_in_pass = self.claimed_in_pass.max(1);
        if *times >= self.job.max_attempts {
            self.too_late.push(Failure {
                key,
                is_skip: false,
                class: "input_changed".to_owned(),
                attempts: *times,
                detail: "the input changed each time before the answer arrived".to_owned(),
            });
        }
    }

    fn sample(&mut self, rows: i64, tokens: i64) {
        let now = Instant::now();
        self.samples.push_back((now, rows, tokens));
        while self.samples.front().is_some_and(|s| now - s.0 > RATES) {
            self.samples.pop_front();
        }
    }
}

/// Rows a second and tokens a minute over the samples.
pub(super) fn rates(samples: &VecDeque<(Instant, i64, i64)>) -> (f64, f64) {
    let (Some(first), Some(last)) = (samples.front(), samples.back()) else { return (0.0, 0.0) };
    let seconds = (last.0 - first.0).as_secs_f64().max(0.001);
    let rows: i64 = samples.iter().map(|s| s.1).sum();
    let tokens: i64 = samples.iter().map(|s| s.2).sum();
    (rows as f64 / seconds, tokens as f64 / seconds * 60.0)
}
