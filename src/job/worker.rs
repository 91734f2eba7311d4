//! A job's process: claims rows, hands them to the gateway, writes what comes back. Between its short transactions it
//! holds nothing: no transaction, no snapshot, no lock.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::{FromGateway, Item, Stop, StopReason, Stream, ToGateway, Verdict, most_text};
use pgrx::PgSqlErrorCode as Code;
use pgrx::prelude::*;

use crate::client::{Client, Received};
use crate::error::{Error, Result};
use crate::job::page::{self, Page};
use crate::job::plan::{self, Plan};
use crate::job::settle::{self, Answer};
use crate::job::store::{self, Delta, Failure, Job, Outcome};
use crate::shared::{self, End};
use crate::worker::{self, finder, handle_signals, my_database, my_pid, reload_if_asked, report};
use crate::{settings, sql, txn};

/// Rows claimed at first, and at most, at a time: as many as stay below `WINDOW_BYTES`.
const FIRST_PAGE: i64 = 200;
const LARGEST_PAGE: i64 = 500;
/// Rows handed over and not yet written, above which no more are claimed; a page may go beyond.
const WINDOW_ROWS: usize = 2_000;
/// Bytes of text handed over and not yet answered, above which no more is handed over.
const WINDOW_BYTES: usize = 4 << 20;
/// Bytes of text in one message.
const MESSAGE_BYTES: usize = 1 << 20;
/// Rows that others hold locked, above which no more are claimed.
const MOST_LOCKED: usize = 1_000;
/// How often locked rows are tried again, and transactions that failed in passing.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a job that is to stop tries to write rows that others hold locked.
const LAST_TRIES: Duration = Duration::from_secs(10);
/// How often its row is looked at without being told to.
const CONTROL: Duration = Duration::from_secs(10);
/// Transactions that fail in passing one after the other, until the job is given up.
const MOST_FAILURES: u32 = 60;
/// When a job goes on by itself where nobody says when, microseconds.
const LATER: i64 = 15_000_000;
/// The time over which rates are measured.
const RATES: Duration = Duration::from_secs(60);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn llm_batch_job_main(_arg: pg_sys::Datum) {
    handle_signals();
    let Some((database, id, owner)) = finder::orders() else { return };
    if shared::comes_up(database, id, my_pid()).is_none() {
        return;
    }
    // SAFETY: at the start of a background worker. Connecting fails, and ends the process, if the owner can't log in;
    // the launcher then has the finder look into it.
    unsafe {
        pg_sys::before_shmem_exit(Some(finder::on_exit), pg_sys::Datum::from(0));
        pg_sys::BackgroundWorkerInitializeConnectionByOid(pg_sys::Oid::from(database), pg_sys::Oid::from(owner), 0);
    }
    if let Ok(name) = std::ffi::CString::new(format!("llm_batch job {id}")) {
        // SAFETY: the name is copied.
        unsafe { pg_sys::pgstat_report_appname(name.as_ptr()) };
    }
    let end = run(id);
    shared::goes(database, id, my_pid(), end);
}

fn run(id: i64) -> End {
    let worker = match txn::run(|| Worker::begin(id)) {
        Ok(Begun::Worker(worker)) => worker,
        Ok(Begun::Nothing) => return End::Finished,
        // The extension, or the database's good order, is gone.
        Err(e) if e.code == Code::ERRCODE_UNDEFINED_OBJECT || e.code == Code::ERRCODE_UNDEFINED_TABLE => {
            return End::Finished;
        }
        Err(e) => {
            pgrx::log!("llm_batch job {id} could not begin: {}", e.one_line());
            return End::Died;
        }
    };
    worker.work()
}

enum Begun {
    Worker(Box<Worker>),
    /// There is nothing to do.
    Nothing,
}

/// A row that was handed over: its page and its position there, from 1.
type Place = (Rc<Page>, i32);

struct Worker {
    job: Job,
    model: String,
    stream: Stream,
    labels: Vec<String>,
    table: plan::Table,
    plan: Plan,
    client: Option<Client>,
    /// Rows without an outcome, by the number they were handed over under.
    outstanding: HashMap<u64, (Place, usize)>,
    /// Bytes of their text.
    outstanding_bytes: usize,
    /// Rows of the next page.
    page_size: i64,
    /// Texts claimed and not yet handed over.
    waiting: VecDeque<(Place, String)>,
    next_n: u64,
    /// Outcomes to write.
    answers: Vec<Answer>,
    /// Outcomes of rows that others hold locked.
    locked: Vec<Answer>,
    /// When they were last tried.
    locked_tried: Instant,
    /// Where the pass over the key has come to.
    last: Option<Place>,
    pass_ended: bool,
    claimed_in_pass: usize,
    /// Rows whose input changed while they were asked about, and how often that has happened.
    late: HashMap<String, u32>,
    /// Failures that come from `late`.
    too_late: Vec<Failure>,
    delta: Delta,
    samples: VecDeque<(Instant, i64, i64)>,
    /// Why no more is claimed.
    stopping: Option<Outcome>,
    /// The model or the task was changed: what is open is finished, then the stream is opened anew.
    reopen: Option<(Stream, String)>,
    failures_in_a_row: u32,
    looked: Instant,
    look_now: bool,
    /// `llm_batch.enabled` was found to be off.
    disabled: bool,
}

impl Worker {
    fn begin(id: i64) -> Result<Begun> {
        if !store::is_installed()? {
            return Ok(Begun::Nothing);
        }
        let Some(mut job) = store::load(id)? else { return Ok(Begun::Nothing) };
        // A start for nothing, such as one whose cause was rolled back to a savepoint, changes nothing.
        if !job.is_due {
            return Ok(Begun::Nothing);
        }
        if job.cluster != store::cluster() {
            let text = "the job was made in another cluster".to_owned();
            store::end(id, job.epoch, &Outcome::Paused("restored", Some(text), None))?;
            return Ok(Begun::Nothing);
        }
        store::begin(&job)?;
        job.has_failures &= job.retry_epoch <= job.retried_epoch;
        let ready = txn::sub(|| Self::ready(&job));
        let (stream, model, table, plan) = match ready {
            Ok(ready) => ready,
            Err(e) => {
                store::end(id, job.epoch, &outcome_of(&e))?;
                return Ok(Begun::Nothing);
            }
        };
        job.max_attempts = stream.task.options.max_attempts;
        Ok(Begun::Worker(Box::new(Self {
            labels: labels(&stream),
            page_size: whole_packs(FIRST_PAGE, &stream),
            job,
            model,
            stream,
            table,
            plan,
            client: None,
            outstanding: HashMap::new(),
            outstanding_bytes: 0,
            waiting: VecDeque::new(),
            next_n: 0,
            answers: Vec::new(),
            locked: Vec::new(),
            locked_tried: Instant::now(),
            last: None,
            pass_ended: false,
            claimed_in_pass: 0,
            late: HashMap::new(),
            too_late: Vec::new(),
            delta: Delta::default(),
            samples: VecDeque::new(),
            stopping: None,
            reopen: None,
            failures_in_a_row: 0,
            looked: Instant::now(),
            look_now: false,
            disabled: false,
        })))
    }

    /// What is needed before the first row.
    fn ready(job: &Job) -> Result<(Stream, String, plan::Table, Plan)> {
        let (stream, model) = super::stream(&job.task, &job.options, me())?;
        let table = plan::table(job)?;
        let plan = make_plan(job, &table, &stream)?;
        Ok((stream, model, table, plan))
    }

    fn work(mut self) -> End {
        loop {
            reload_if_asked();
            self.disabled |= !settings::enabled();
            if let Err(e) = self.turn() {
                self.fail(&e);
            }
            if let Some(end) = self.try_end() {
                return end;
            }
        }
    }

    /// One turn: look at what is wanted, claim, hand over, wait, write.
    fn turn(&mut self) -> Result<()> {
        if shared::was_poked(my_database(), self.job.id) || self.look_now || self.looked.elapsed() > CONTROL {
            self.look()?;
        }
        if self.client.is_none() && self.stopping.is_none() {
            report(pg_sys::BackendState::STATE_IDLE, "connecting to the gateway");
            let mut client = Client::connect()?;
            client.send(&ToGateway::Open(Box::new(self.stream.clone())))?;
            self.client = Some(client);
        }
        if self.may_claim() {
            self.claim()?;
        }
        self.hand_over()?;
        self.receive()?;
        let try_locked = !self.locked.is_empty() && self.locked_tried.elapsed() >= AGAIN;
        if !self.answers.is_empty() || try_locked || self.delta.requests > 0 || !self.too_late.is_empty() {
            self.settle(try_locked)?;
        }
        self.next_pass();
        if let Some((stream, model)) = self.reopen.take_if(|_| self.outstanding.is_empty() && self.waiting.is_empty()) {
            self.labels = labels(&stream);
            self.job.max_attempts = stream.task.options.max_attempts;
            (self.stream, self.model) = (stream, model);
            self.client = None;
        }
        self.failures_in_a_row = 0;
        Ok(())
    }

    /// Whether the next page may be claimed now. A pass begins only when nothing of the one before is open: what is
    /// open is NULL still, and would be claimed and paid for again.
    fn may_claim(&self) -> bool {
        let is_free = self.stopping.is_none() && self.reopen.is_none() && !self.disabled && self.client.is_some();
        let is_new_pass = self.last.is_none();
        is_free
            && !self.pass_ended
            && self.too_late.is_empty()
            && self.waiting.is_empty()
            && self.outstanding.len() < WINDOW_ROWS / 2
            && self.locked.len() < MOST_LOCKED
            && (!is_new_pass || (self.outstanding.is_empty() && self.answers.is_empty() && self.locked.is_empty()))
    }

    /// Whether a row may be handed over now.
    fn may_hand_over(&self) -> bool {
        self.outstanding.is_empty() || (self.outstanding.len() < WINDOW_ROWS && self.outstanding_bytes < WINDOW_BYTES)
    }

    /// Looks at what the owner wants.
    fn look(&mut self) -> Result<()> {
        (self.looked, self.look_now) = (Instant::now(), false);
        let id = self.job.id;
        let job = txn::run(|| if store::is_installed()? { store::load(id) } else { Ok(None) })?;
        let Some(job) = job else {
            // Dropped: nobody is left to be told anything.
            self.stop(Outcome::Cancelled);
            return Ok(());
        };
        match job.wanted.as_str() {
            "paused" => self.stop(Outcome::Paused("user", None, None)),
            "cancelled" => self.stop(Outcome::Cancelled),
            _ => {}
        }
        if job.epoch != self.job.epoch {
            // Resumed or to be retried while this process was still at it.
            self.job.epoch = job.epoch;
            if job.wanted == "running" && self.stopping.take().is_some() {
                // The gateway sends nothing more on the old stream.
                self.reopen = Some((self.stream.clone(), self.model.clone()));
            }
            txn::run(|| store::begin(&job))?;
            self.job.has_failures = job.has_failures && job.retry_epoch <= job.retried_epoch;
            // There may be rows behind that are to be asked again: not before the end of this pass, since what is open
            // is NULL still.
            self.claimed_in_pass = self.claimed_in_pass.max(1);
        }
        Ok(())
    }

    /// Claims no more; what has not been sent comes back, what was sent is awaited.
    fn stop(&mut self, outcome: Outcome) {
        if self.stopping.is_none() {
            self.waiting.clear();
            if let Some(client) = &mut self.client {
                // A connection that is lost is noticed by receive().
                let _ = client.send(&ToGateway::Withdraw);
            }
        }
        self.stopping = Some(outcome);
    }

    fn restart_pass(&mut self) {
        self.last = None;
        self.pass_ended = false;
        self.claimed_in_pass = 0;
    }

    fn claim(&mut self) -> Result<()> {
        let job = self.job.clone();
        let (plan, last, size) = (self.plan.clone(), self.last.clone(), self.page_size);
        let counted = self.job.is_counted;
        let (ready, claimed, gone) = txn::run(|| {
            report(pg_sys::BackendState::STATE_RUNNING, "claiming rows");
            // Rights, key, model and task may have changed: what holds now holds for the next request.
            let ready = Self::ready(&job)?;
            sql::set_local("search_path", &plan.search_path)?;
            let count =
                if counted { None } else { sql::row(&plan.count, &[], |r| Ok((r.get::<i64>(1)?, r.get::<i64>(2)?)))? };
            if let Some((total, empty)) = count {
                store::count(job.id, total, empty)?;
            }
            // With an index on the target, and for statistics that have not caught up, the planner would sort or scan
            // what is left for every page. The key's index is the way.
            for path in ["enable_sort", "enable_incremental_sort", "enable_seqscan", "enable_bitmapscan"] {
                sql::set_local(path, "off")?;
            }
            let mut claimed = match &last {
                None => page::claim(&plan.claim_first, &[size.into()], job.key_names.len())?,
                Some((page, position)) => {
                    let mut args = page.args();
                    args.push((*position).into());
                    args.push(size.into());
                    page::claim(&plan.claim_next, &args, job.key_names.len())?
                }
            };
            let gone = match &mut claimed {
                Some(claimed) if job.has_failures => store::failed_among(job.id, std::mem::take(&mut claimed.keys))?,
                _ => Vec::new(),
            };
            Ok((ready, claimed, gone))
        })?;
        report(pg_sys::BackendState::STATE_IDLE, "waiting for answers");
        self.job.is_counted = true;
        let (stream, model, table, plan) = ready;
        (self.table, self.plan) = (table, plan);
        if stream != self.stream || model != self.model {
            // The page is read again when the stream has been opened anew.
            self.reopen = Some((stream, model));
            return Ok(());
        }
        let Some(page::Claimed { page, texts, .. }) = claimed else {
            self.pass_ended = true;
            return Ok(());
        };
        let page = Rc::new(page);
        self.pass_ended = page.len < size as usize;
        let bytes: usize = texts.iter().map(String::len).sum();
        let rows = ((WINDOW_BYTES * page.len / bytes.max(1)) as i64).clamp(1, LARGEST_PAGE);
        self.page_size = whole_packs(rows, &self.stream);
        self.last = Some((Rc::clone(&page), page.len as i32));
        for (i, text) in texts.into_iter().enumerate() {
            if !gone.contains(&(i as i64 + 1)) {
                self.claimed_in_pass += 1;
                self.waiting.push_back(((Rc::clone(&page), i as i32 + 1), text));
            }
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<()> {
        while self.client.is_some() && !self.waiting.is_empty() && self.may_hand_over() {
            let (mut items, mut bytes) = (Vec::new(), 0);
            while bytes < MESSAGE_BYTES && self.may_hand_over() {
                let Some((place, text)) = self.waiting.pop_front() else { break };
                bytes += text.len();
                self.outstanding_bytes += text.len();
                self.outstanding.insert(self.next_n, (place, text.len()));
                items.push(Item { n: self.next_n, text });
                self.next_n += 1;
            }
            if let Some(client) = &mut self.client {
                client.send(&ToGateway::Items(items))?;
            }
        }
        Ok(())
    }

    /// Waits for outcomes, and takes all that have come.
    fn receive(&mut self) -> Result<()> {
        let is_idle = self.outstanding.is_empty() && self.waiting.is_empty() && self.locked.is_empty();
        let mut timeout = if self.may_claim() || is_idle {
            Duration::ZERO
        } else if !self.locked.is_empty() {
            AGAIN
        } else {
            CONTROL
        };
        let Some(client) = &mut self.client else {
            if !timeout.is_zero() {
                worker::wait(None, Some(timeout));
            }
            return Ok(());
        };
        loop {
            match client.receive(timeout)? {
                Received::Message(FromGateway::Outcomes { outcomes, spent }) => {
                    self.delta.requests += spent.requests as i64;
                    self.delta.input_tokens += spent.input_tokens as i64;
                    self.delta.output_tokens += spent.output_tokens as i64;
                    for o in outcomes {
                        let Some(((page, position), bytes)) = self.outstanding.remove(&o.n) else { continue };
                        self.outstanding_bytes -= bytes;
                        if o.verdict != Verdict::Withdrawn {
                            self.answers.push(Answer {
                                page,
                                position,
                                verdict: o.verdict,
                                attempts: o.attempts,
                                locked_since: None,
                            });
                        }
                    }
                }
                Received::Message(FromGateway::Stopped(stop)) => {
                    self.waiting.clear();
                    if stop.reason == StopReason::Disabled {
                        self.disabled = true;
                    } else {
                        let outcome = self.outcome_of_stop(&stop);
                        self.stopping.get_or_insert(outcome);
                    }
                    return Ok(());
                }
                Received::Message(_) => {}
                Received::Nothing => return Ok(()),
                Received::Lost => {
                    // The gateway ended. What it had not answered is claimed again from the table.
                    self.client = None;
                    self.outstanding.clear();
                    self.outstanding_bytes = 0;
                    self.waiting.clear();
                    self.restart_pass();
                    return Ok(());
                }
            }
            // More may have come; it is taken along, and then written together.
            timeout = Duration::ZERO;
        }
    }

    fn outcome_of_stop(&self, stop: &Stop) -> Outcome {
        let text = Error::from_stop(stop, &self.model).one_line();
        let at = shared::now() + stop.retry_after_ms.map_or(LATER, |ms| ms as i64 * 1000);
        match stop.reason {
            StopReason::Auth => Outcome::Paused("auth", Some(text), None),
            StopReason::Spend => Outcome::Paused("spend", Some(text), None),
            StopReason::Quota => Outcome::Paused("quota", Some(text), Some(at)),
            StopReason::ProviderDown | StopReason::Disabled => Outcome::Paused("provider_down", Some(text), Some(at)),
            StopReason::NotFound | StopReason::Rejected => Outcome::Failed(text),
        }
    }

    fn settle(&mut self, with_locked: bool) -> Result<()> {
        let mut batch = std::mem::take(&mut self.answers);
        if with_locked {
            self.locked_tried = Instant::now();
            batch.append(&mut self.locked);
        }
        self.sample(0, 0);
        let job = &self.job;
        let (plan, labels, model, stream) = (&mut self.plan, &self.labels, &self.model, &self.stream);
        let (delta, too_late, known) = (&self.delta, &self.too_late, &mut self.table);
        let (rows_per_second, tokens_per_minute) = rates(&self.samples);
        let batch_ref = &batch;
        let result = txn::run(|| {
            report(pg_sys::BackendState::STATE_RUNNING, "writing answers");
            let table = plan::table(job)?;
            if table != *known {
                *plan = make_plan(job, &table, stream)?;
                *known = table;
            }
            // Deferred constraints raise here, where the row they raise for can be found, not at the commit.
            sql::run("SET CONSTRAINTS ALL IMMEDIATE", &[])?;
            for path in ["enable_hashjoin", "enable_mergejoin", "enable_seqscan"] {
                sql::set_local(path, "off")?;
            }
            let settled = settle::settle(plan, labels, batch_ref)?;
            let delta = Delta {
                done: settled.done,
                superseded: settled.superseded,
                requests: delta.requests,
                input_tokens: delta.input_tokens,
                output_tokens: delta.output_tokens,
                rows_per_second,
                tokens_per_minute,
            };
            store::write(job.id, model, &delta, &settled.failures)?;
            store::write(job.id, model, &Delta { rows_per_second, tokens_per_minute, ..Delta::default() }, too_late)?;
            Ok(settled)
        });
        report(pg_sys::BackendState::STATE_IDLE, "waiting for answers");
        let settled = match result {
            Ok(settled) => settled,
            Err(e) => {
                // Nothing was written; all of it is tried again.
                self.answers = batch;
                return Err(e);
            }
        };
        let tokens = self.delta.input_tokens + self.delta.output_tokens;
        self.delta = Delta::default();
        let listed_late = !std::mem::take(&mut self.too_late).is_empty();
        if !settled.failures.is_empty() || listed_late {
            self.job.has_failures = true;
        }
        self.sample(settled.done + settled.failures.len() as i64, tokens);
        for (key, attempts) in settled.changed {
            self.came_too_late(key, attempts);
        }
        for mut answer in settled.locked {
            answer.locked_since.get_or_insert_with(Instant::now);
            self.locked.push(answer);
        }
        Ok(())
    }

    /// A row whose input changed while it was asked about is claimed again by the next pass, with its new text; but not
    /// for ever.
    fn came_too_late(&mut self, key: serde_json::Value, attempts: u32) {
        let times = self.late.entry(key.to_string()).or_default();
        *times += attempts.max(1);
        self.claimed_in_pass = self.claimed_in_pass.max(1);
        if *times >= self.job.max_attempts {
            self.too_late.push(Failure {
                key,
                is_skip: false,
                class: "input_changed".to_owned(),
                attempts: *times,
                detail: "the input changed each time before the answer came".to_owned(),
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

    /// At the end of the key's range another pass begins for what is still NULL, until one finds nothing.
    fn next_pass(&mut self) {
        let is_idle =
            self.outstanding.is_empty() && self.waiting.is_empty() && self.answers.is_empty() && self.locked.is_empty();
        if self.pass_ended && is_idle && self.stopping.is_none() {
            if self.claimed_in_pass == 0 && self.too_late.is_empty() {
                self.stopping = Some(Outcome::Done);
            } else {
                self.restart_pass();
            }
        }
    }

    /// What an error in a transaction means: some pass, some are the job's end.
    fn fail(&mut self, e: &Error) {
        self.failures_in_a_row += 1;
        let id = self.job.id;
        if e.code == Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED && self.page_size > 1 {
            // A page of very large texts.
            self.page_size = (self.page_size / 2).max(1);
            return;
        }
        if settle::is_passing(e.code) && self.failures_in_a_row < MOST_FAILURES {
            worker::wait(None, Some(AGAIN));
            return;
        }
        pgrx::log!("llm_batch job {id} stops: {}", e.one_line());
        self.answers.clear();
        self.locked.clear();
        self.stop(outcome_of(e));
    }

    /// Ends the run once it is stopping and nothing is open any more.
    fn try_end(&mut self) -> Option<End> {
        // Answers to what was sent are still awaited and written, locked rows for a moment.
        let is_young = |a: &Answer| a.locked_since.is_none_or(|t| t.elapsed() < LAST_TRIES);
        if !self.outstanding.is_empty() || !self.answers.is_empty() || self.locked.iter().any(is_young) {
            return None;
        }
        if self.disabled {
            return Some(End::Again(shared::now() + 1_000_000));
        }
        let outcome = self.stopping.clone()?;
        let (id, epoch) = (self.job.id, self.job.epoch);
        let entered = txn::run(|| if store::is_installed()? { store::end(id, epoch, &outcome) } else { Ok(true) });
        match entered {
            Ok(true) => {}
            // There is more to do.
            Ok(false) => {
                self.stopping = None;
                self.look_now = true;
                self.restart_pass();
                return None;
            }
            Err(e) if e.code == Code::ERRCODE_UNDEFINED_TABLE || e.code == Code::ERRCODE_UNDEFINED_OBJECT => {}
            Err(e) => {
                pgrx::log!("llm_batch job {id} could not note its end: {}", e.one_line());
                return Some(End::Died);
            }
        }
        if let Outcome::Paused(_, _, Some(at)) = outcome {
            shared::want(my_database(), 0, 0, at);
        }
        Some(End::Finished)
    }
}

/// The role this process runs as.
fn me() -> pg_sys::Oid {
    crate::model::current_user()
}

fn labels(stream: &Stream) -> Vec<String> {
    stream.task.labels.iter().map(|l| l.label.clone()).collect()
}

fn make_plan(job: &Job, table: &plan::Table, stream: &Stream) -> Result<Plan> {
    // With nothing but pg_catalog in the path every other type is written with its schema.
    sql::set_local("search_path", "pg_catalog, pg_temp")?;
    let target_type = sql::one::<String>(
        "SELECT pg_catalog.format_type(a.atttypid, a.atttypmod) FROM pg_catalog.pg_attribute a
          WHERE a.attrelid OPERATOR(pg_catalog.=) $1 AND a.attnum OPERATOR(pg_catalog.=) $2",
        &[job.relation.into(), job.target_attnum.into()],
    )?;
    Ok(Plan::new(job, table, &target_type.unwrap_or_default(), most_text(stream.model.max_request_tokens)))
}

/// A page of so many rows, less what would not fill a request.
fn whole_packs(rows: i64, stream: &Stream) -> i64 {
    let pack = i64::from(stream.task.options.max_rows_per_request.max(1));
    if rows > pack { rows - rows % pack } else { rows }
}

/// Rows a second and tokens a minute over the samples.
fn rates(samples: &VecDeque<(Instant, i64, i64)>) -> (f64, f64) {
    let (Some(first), Some(last)) = (samples.front(), samples.back()) else { return (0.0, 0.0) };
    let seconds = (last.0 - first.0).as_secs_f64().max(0.001);
    let rows: i64 = samples.iter().map(|s| s.1).sum();
    let tokens: i64 = samples.iter().map(|s| s.2).sum();
    (rows as f64 / seconds, tokens as f64 / seconds * 60.0)
}

/// The state in which an error leaves a job.
fn outcome_of(e: &Error) -> Outcome {
    let text = e.one_line();
    match e.code {
        Code::ERRCODE_INSUFFICIENT_PRIVILEGE | Code::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION => {
            Outcome::Paused("owner", Some(text), None)
        }
        Code::ERRCODE_CONNECTION_FAILURE => Outcome::Paused("provider_down", Some(text), Some(shared::now() + LATER)),
        _ => Outcome::Failed(text),
    }
}
