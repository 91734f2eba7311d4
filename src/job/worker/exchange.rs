//! Rows out, outcomes in: claims pages, hands them to the gateway, takes what comes back.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_core::vector;
use llm_batch_gateway::protocol::{
    self, FromGateway, Item, MAX_FRAME, MAX_OUTSTANDING_ITEMS, Spent, Stop, StopReason, Stream, ToGateway, Verdict,
};
use pgrx::{PgSqlErrorCode, pg_sys};

use super::rights::Rights;
use super::write::rates;
use super::{AGAIN, Asking, CONTROL, CRASH, HEAR, LATER, MOST_STARTS, Worker};
use crate::client::{MESSAGE_BYTES, Received, WINDOW_ROWS};
use crate::error::{Error, Result};
use crate::failure::failure_point;
use crate::job::ledger::{self, Failure};
use crate::job::page;
use crate::job::plan::Plan;
use crate::job::settle::{self, Answer, FEW};
use crate::job::store::{self, Job, Outcome};
use crate::job::table::{self, Table};
use crate::job::target;
use crate::process::{self, report};
use crate::provenance::By;
use crate::task::Asked;
use crate::{shared, sql, text, txn};

/// Rows claimed at first, and at most, at a time: as many as stay below `WINDOW_BYTES`.
pub const FIRST_PAGE: i64 = 200;
const LARGEST_PAGE: i64 = 500;
/// Bytes of text handed over and not yet answered, above which no more is handed over.
const WINDOW_BYTES: usize = 4 << 20;
/// Time that answers wait for others, with which they are written, once there are enough and before that: a transaction
/// costs as much as fifty rows. Enough is `ENOUGH`, or this part of the rows with the gateway if that is less: if the
/// server is killed, they are asked again.
const GATHER: Duration = Duration::from_millis(50);
const GATHER_ENOUGH: Duration = Duration::from_secs(1);
const ENOUGH: usize = 128;
const ENOUGH_OF: usize = 8;
/// Bytes of vectors that the gateway may have for this process: half of what it keeps for a client that does not read.
const MOST_UNREAD: usize = MAX_FRAME;
/// Rows that others hold locked, above which no more are claimed.
const MOST_LOCKED: usize = 1_000;

/// Rows of a page that are not to be asked about.
#[derive(Default)]
struct Found {
    /// The key of the row that every run before may have died of.
    suspect: Option<String>,
    /// The positions of those that have failed before, or had NULL as an answer.
    gone: Vec<i64>,
    damaged: BTreeMap<i32, Failure>,
}

impl Found {
    fn of(claimed: &page::Claimed, job: &Job, plan: &Plan, is_last_start: bool) -> Result<Self> {
        let mut found = Self { damaged: claimed.damaged(), ..Self::default() };
        let page = &claimed.page;
        let all = || (1..=page.len as i32).collect();
        // Those tables may have grown since the statements were planned: never all of what is in them.
        settle::by_key()?;
        if job.has_nulls {
            let rows = page::digest(&plan.digest, page, all())?;
            let gone = ledger::null_among(job.id, rows.iter().map(|(_, hash)| *hash).collect())?;
            found.gone = rows.into_iter().filter(|(_, hash)| gone.contains(hash)).map(|(at, _)| at.into()).collect();
        }
        if !is_last_start && !job.has_failures && found.damaged.is_empty() {
            return Ok(found);
        }
        let mut keys = page::describe(&plan.describe, page, all())?;
        found.suspect = keys.get(&1).filter(|_| is_last_start).cloned();
        for (position, failure) in &mut found.damaged {
            failure.key = keys.get(position).cloned().unwrap_or_default();
        }
        if job.has_failures {
            let keys: Vec<Option<String>> = (1..=page.len as i32).map(|i| keys.remove(&i)).collect();
            found.gone.extend(ledger::failed_among(job.id, keys)?);
        }
        Ok(found)
    }
}

/// The result of a claim.
struct Claim {
    /// The task, table and statements for the next page.
    ready: (Asked, Table, Plan),
    /// With the first page.
    rights: Option<Rights>,
    claimed: Option<page::Claimed>,
    found: Found,
}

impl page::Claimed {
    /// The rows whose text is none, by position; without their keys.
    fn damaged(&self) -> BTreeMap<i32, Failure> {
        let failure = |e| Failure {
            key: "null".to_owned(),
            is_skip: false,
            class: text::INVALID.to_owned(),
            attempts: 0,
            detail: text::detail(e),
        };
        self.texts.iter().zip(1..).filter_map(|(t, at)| Some((at, failure(t.as_ref().err()?)))).collect()
    }
}

impl Worker {
    /// Returns true if the next page may be claimed now. A pass begins only when nothing of the one before is open: an
    /// open row is still NULL, and would be claimed and paid for again.
    pub(super) fn may_claim(&self) -> bool {
        let is_free = self.stopping.is_none() && self.reopen.is_none() && !self.put_off && self.client.is_some();
        let is_new_pass = self.last.is_none();
        is_free
            && !self.pass_ended
            && self.too_late.is_empty()
            && self.waiting.is_empty()
            // Answers are there only where they could not be written.
            && (self.answers.is_empty() || self.lacks_others())
            && self.outstanding.len() < self.enough()
            && self.locked.len() < MOST_LOCKED
            && (!is_new_pass || (self.outstanding.is_empty() && self.answers.is_empty() && self.locked.is_empty()))
    }

    /// Rows that may be with the gateway. After runs that died without having done a row fewer and fewer, so that what
    /// may have killed them is found.
    fn window(&self) -> usize {
        let window = match self.job.starts {
            // Enough to tell whether it is a row's fault.
            _ if self.job.was_unwritable || self.lacks_others() => FEW,
            ..=2 => window_of(&self.asked.stream),
            3 => 200,
            4 => 20,
            5 => 3,
            _ => 1,
        };
        window.min(self.doubted_window())
    }

    /// Rows with the gateway for which no page is claimed. A page is claimed as soon as there is room for it: several keys
    /// together may answer half of the window while this process gathers answers.
    fn enough(&self) -> usize {
        let window = self.window();
        window.div_ceil(2).max(window.saturating_sub(self.page_size as usize))
    }

    /// Returns true if a row may be handed over now.
    fn may_hand_over(&self) -> bool {
        self.outstanding.is_empty() || (self.outstanding.len() < self.window() && self.outstanding_bytes < WINDOW_BYTES)
    }

    pub(super) fn claim(&mut self) -> Result<()> {
        // A pass begins: what was noted of NULLs in the one before is looked up from now on.
        if self.last.is_none() {
            self.job.has_nulls |= std::mem::take(&mut self.has_noted);
        }
        let size = self.page_size.min(self.window() as i64);
        let Claim { ready, rights, claimed, found } = self.read_page(size)?;
        if rights.is_some() {
            self.rights = rights;
        }
        report(pg_sys::BackendState::STATE_IDLE, "waiting for answers");
        self.job.is_counted = true;
        let (asked, table, plan) = ready;
        (self.table, self.plan) = (table, plan);
        if asked != self.asked {
            // The page is read again when the stream has been opened anew.
            self.change(asked);
            return Ok(());
        }
        match claimed {
            None => self.pass_ended = true,
            Some(claimed) => self.take_page(size, claimed, found),
        }
        Ok(())
    }

    /// The transaction of a claim, of so many rows.
    fn read_page(&self, size: i64) -> Result<Claim> {
        let (job, plan) = (&self.job, &self.plan);
        let is_last_start = job.starts >= MOST_STARTS;
        txn::run(|| {
            report(pg_sys::BackendState::STATE_RUNNING, "claiming rows");
            failure_point!("claim");
            table::lock(job, pg_sys::AccessShareLock)?;
            // Rights, key, model and task may have changed: what holds now holds for the next request.
            let ready = Self::ready(job)?;
            let rights = if self.rights.is_none() { Some(Rights::of(&ready.2)?) } else { None };
            sql::set_local("search_path", &plan.search_path)?;
            let count = match job.is_counted {
                true => None,
                false => sql::row(&plan.count, &[], |r| Ok((r.get::<i64>(1)?, r.get::<i64>(2)?)))?,
            };
            if let Some((total, empty)) = count {
                store::count(job.id, total, empty)?;
            }
            // With an index on the target, and for statistics that have not caught up, the planner would sort or scan
            // what is left for every page. The key's index is the way.
            for path in ["enable_sort", "enable_incremental_sort", "enable_seqscan", "enable_bitmapscan"] {
                sql::set_local(path, "off")?;
            }
            let claimed = match &self.last {
                None => page::claim(&plan.claim_first, &[size.into()], job.key_names.len())?,
                Some((page, position)) => {
                    let mut args = page.args();
                    args.push((*position).into());
                    args.push(size.into());
                    page::claim(&plan.claim_next, &args, job.key_names.len())?
                }
            };
            let found =
                claimed.as_ref().map_or_else(|| Ok(Found::default()), |c| Found::of(c, job, plan, is_last_start))?;
            Ok(Claim { ready, rights, claimed, found })
        })
    }

    /// The rows of a page, of which there could have been `size`, that are to be asked about.
    fn take_page(&mut self, size: i64, claimed: page::Claimed, found: Found) {
        let page::Claimed { page, mut texts, isolations, .. } = claimed;
        let Found { suspect, gone, mut damaged } = found;
        let page = Rc::new(page);
        self.pass_ended = page.len < size as usize;
        for text in texts.iter_mut().flatten() {
            text.truncate(text.floor_char_boundary(self.plan.most_text));
        }
        let bytes: usize = texts.iter().flatten().map(String::len).sum();
        let rows = ((WINDOW_BYTES * page.len / bytes.max(1)) as i64).clamp(1, LARGEST_PAGE);
        self.page_size = whole_packs(rows, &self.asked.stream);
        self.last = Some((Rc::clone(&page), page.len as i32));
        if let Some(key) = suspect.filter(|_| gone.is_empty()) {
            // The row that every run before may have died of. If the next one dies too it was not the row.
            self.job.starts = MOST_STARTS - 1;
            self.claimed_in_pass += 1;
            self.too_late.push(Failure {
                key,
                is_skip: false,
                class: CRASH.to_owned(),
                attempts: 0,
                detail: "processes of llm_batch died each time this row was under way; see the server log".to_owned(),
            });
            return;
        }
        for (i, (text, isolation)) in texts.into_iter().zip(isolations).enumerate() {
            if gone.contains(&(i as i64 + 1)) {
                continue;
            }
            self.claimed_in_pass += 1;
            match text {
                Ok(text) => {
                    let place = (Rc::clone(&page), i as i32 + 1);
                    self.waiting.push_back(Asking { place, text, isolation, again: None });
                }
                Err(_) => self.too_late.extend(damaged.remove(&(i as i32 + 1))),
            }
        }
    }

    pub(super) fn hand_over(&mut self) -> Result<()> {
        while self.client.is_some() && !self.waiting.is_empty() && self.may_hand_over() {
            let (mut items, mut bytes) = (Vec::new(), 0);
            while self.may_hand_over()
                && let Some(row) =
                    self.waiting.pop_front_if(|row| bytes == 0 || bytes + row.text.len() <= MESSAGE_BYTES)
            {
                failure_point!("poison-worker", &row.text);
                bytes += row.text.len();
                self.outstanding_bytes += row.text.len();
                let Asking { text, isolation, again, .. } = &row;
                let (text, isolation, again) = (text.clone(), isolation.clone(), again.clone());
                items.push(Item { n: self.next_n, text, isolation, again });
                self.outstanding.insert(self.next_n, row);
                self.next_n += 1;
            }
            failure_point!("hand-over");
            let sent = self.client.as_mut().map_or(Ok(()), |client| client.send(&ToGateway::Items(items)));
            // A row that was not sent is never answered.
            sent.inspect_err(|_| self.lose_gateway())?;
            failure_point!("handed-over");
        }
        Ok(())
    }

    /// Time that outcomes are waited for.
    fn wait_for_outcomes(&self) -> Duration {
        let is_idle = self.outstanding.is_empty() && self.waiting.is_empty() && self.locked.is_empty();
        let most = if self.outstanding.is_empty() { CONTROL } else { HEAR };
        let timeout = if let Some(trouble) = &self.trouble {
            trouble.left().min(most)
        } else if self.may_claim() || is_idle || !self.answers.is_empty() {
            Duration::ZERO
        } else if !self.locked.is_empty() {
            AGAIN
        } else {
            most
        };
        if self.outstanding.is_empty() { timeout } else { timeout.min(self.patience()) }
    }

    /// Waits for outcomes, and takes all that have come.
    pub(super) fn receive(&mut self) -> Result<()> {
        let mut timeout = self.wait_for_outcomes();
        let (mut since, mut pause) = (None, Duration::ZERO);
        loop {
            let Some(client) = &mut self.client else {
                if !timeout.is_zero() {
                    process::wait(None, Some(timeout));
                }
                return Ok(());
            };
            let received = match client.receive(timeout) {
                // The gateway has no place for this job. Another run finds one, perhaps.
                Err(e) if e.code == PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES => {
                    self.lose_gateway();
                    self.put_off = true;
                    return Ok(());
                }
                received => received?,
            };
            match received {
                Received::Message(FromGateway::Outcomes { model, outcomes, spent }) => {
                    since.get_or_insert_with(Instant::now);
                    self.take(model, outcomes, &spent);
                }
                Received::Message(FromGateway::Stopped(stop)) => {
                    self.waiting.clear();
                    if stop.reason == StopReason::Disabled {
                        self.put_off = true;
                    } else {
                        let outcome = self.outcome_of_stop(&stop);
                        self.stopping.get_or_insert(outcome);
                    }
                    return Ok(());
                }
                Received::Message(FromGateway::Exhausted { least, full }) => {
                    self.money.exhausted(least, full, &self.asked.stream);
                }
                Received::Message(_) => {}
                Received::Nothing if !pause.is_zero() => process::wait(None, Some(pause)),
                Received::Nothing if timeout.is_zero() || since.is_none() => return Ok(()),
                Received::Nothing => {}
                Received::Lost => {
                    self.lose_gateway();
                    // Perhaps it died of one of these rows. A new run begins with fewer of them, and not at once.
                    self.dies = !self.has_answered && self.stopping.is_none() && !shared::was_gateway_told();
                    return Ok(());
                }
            }
            // An outcome that comes soon after is written together with it. Nobody waits for that at the end of a job,
            // or for money.
            let is_last = self.outstanding.is_empty() || self.money.waits() || self.answers.len() >= WINDOW_ROWS / 4;
            let enough = ENOUGH.min(self.outstanding.len() / ENOUGH_OF);
            let gather = if self.answers.len() < enough { GATHER_ENOUGH } else { GATHER };
            timeout = since
                .filter(|_| !is_last && !process::is_told_to_end())
                .map_or(Duration::ZERO, |since: Instant| gather.saturating_sub(since.elapsed()));
            pause = Duration::ZERO;
            if let Some(until_enough) = self.until_enough(enough) {
                (timeout, pause) = (Duration::ZERO, until_enough.min(timeout));
            }
        }
    }

    /// Time until so many answers are there, at the pace of the last minute. `None` at the end of a job, and where the gateway
    /// may ask for more to spend: each message is heard at once then. A process that wakes up for the answers of each request
    /// takes more time to wake up than to read them.
    fn until_enough(&self, enough: usize) -> Option<Duration> {
        let missing = enough.checked_sub(self.answers.len()).filter(|missing| *missing > 0)?;
        let is_near_end = self.outstanding.len() < 2 * ENOUGH || self.stopping.is_some();
        if is_near_end || self.asked.stream.budget.is_some() {
            return None;
        }
        let (rows_per_second, _) = rates(&self.samples);
        (rows_per_second > 1.0).then(|| Duration::from_secs_f64(missing as f64 / rows_per_second))
    }

    fn take(&mut self, model: usize, outcomes: Vec<protocol::Outcome>, spent: &Spent) {
        let answered = outcomes.iter().filter(|o| matches!(o.verdict, Verdict::Answer(_))).count() as u64;
        self.spent.add(model, spent, answered);
        self.money.spent(spent);
        if answered > 0 {
            self.doubt.paid(spent.requests);
        }
        let spec = &self.asked.stream.task.spec;
        let fields = spec.columns();
        for o in outcomes {
            let Some(Asking { place: (page, position), text, isolation, again }) = self.outstanding.remove(&o.n) else {
                continue;
            };
            self.outstanding_bytes -= text.len();
            if o.verdict == Verdict::Withdrawn {
                continue;
            }
            self.has_answered = true;
            let values: Option<Vec<_>> = match &o.verdict {
                Verdict::Answer(answer) => {
                    Some(self.job.targets.iter().map(|target| target.value(spec, &fields, answer)).collect())
                }
                _ => None,
            };
            // The stream is that of this version until all that it was asked is answered.
            let by = values.as_ref().filter(|_| self.job.provenance.is_some()).map(|values| {
                let nulls = target::nulls(&self.job.targets, values);
                let hash = page.hash(position);
                By {
                    job: self.job.id,
                    task: &self.job.task,
                    version: self.asked.version,
                    model: self.asked.model(model).0,
                }
                .of_row(o.reused, &nulls, hash)
            });
            self.answers.push(Answer {
                page,
                position,
                values,
                by,
                // What a column of type real calls too small is none.
                confidence: o.confidence.map(|c| if c < 1e-30 { 0.0 } else { c }),
                verdict: o.verdict,
                // An answer that was paid for with another row is one too.
                attempts: again.map_or(o.attempts, |again| o.attempts.max(again.attempts + 1)),
                text,
                isolation,
                is_judged: self.asked.checks.is_none(),
                reused: o.reused,
                locked_since: None,
                refused_since: None,
            });
        }
        // A SIGTERM in the meantime must not end the process with them.
        process::hold_on(!self.answers.is_empty() || !self.locked.is_empty());
    }

    /// The gateway ended. Rows without an answer are claimed again from the table.
    pub(super) fn lose_gateway(&mut self) {
        self.client = None;
        if self.asked.stream.budget.is_some() {
            self.money.lost();
        }
        self.outstanding.clear();
        self.outstanding_bytes = 0;
        self.waiting.clear();
        self.too_late.append(&mut self.suspects.take());
        self.restart_pass();
    }

    fn outcome_of_stop(&self, stop: &Stop) -> Outcome {
        let text = Error::from_stop(stop, &self.asked.model, &self.asked.stream).one_line();
        let at = shared::now() + stop.retry_after_ms.map_or(LATER, |ms| ms as i64 * 1000);
        match stop.reason {
            StopReason::Auth => Outcome::Paused("auth", Some(text), None),
            StopReason::Spend => Outcome::Paused("spend", Some(text), None),
            StopReason::NoAnswers => Outcome::Paused("no_answers", Some(text), None),
            StopReason::Quota => Outcome::Paused("quota", Some(text), Some(at)),
            StopReason::ProviderDown | StopReason::Disabled => Outcome::Paused("provider_down", Some(text), Some(at)),
            StopReason::NotFound | StopReason::Rejected => Outcome::Failed(text),
        }
    }
}

/// Rows that may be with the gateway. Of an embedder's these are two full requests, but no more than whose vectors may
/// wait for this process to read them.
fn window_of(stream: &Stream) -> usize {
    let Some(embed) = stream.task.spec.embeds() else { return WINDOW_ROWS };
    let two = 2 * stream.task.options.max_rows_per_request as usize;
    let unread = MOST_UNREAD / vector::bytes(embed.dimensions as usize).max(1);
    two.clamp(WINDOW_ROWS, MAX_OUTSTANDING_ITEMS).min(unread)
}

/// A page of so many rows, less what would not fill a request.
pub fn whole_packs(rows: i64, stream: &Stream) -> i64 {
    let pack = i64::from(stream.task.options.max_rows_per_request.max(1));
    if rows > pack { rows - rows % pack } else { rows }
}
