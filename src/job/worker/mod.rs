//! A job's process: claims rows, hands them to the gateway, writes what comes back. Between its short transactions it
//! holds nothing: no transaction, no snapshot, no lock.

mod doubt;
mod end;
mod exchange;
mod money;
mod rights;
mod suspects;
mod trouble;
mod write;

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::{Again, ToGateway};
use pgrx::PgSqlErrorCode as Code;
use pgrx::prelude::*;

use self::doubt::Doubt;
use self::end::outcome_of;
use self::money::Money;
use self::rights::Rights;
use self::suspects::Suspects;
use self::trouble::{Kind, Trouble};
use crate::budget::Bill;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::failure::failure_point;
use crate::job::ledger::{self, Failure};
use crate::job::page::Page;
use crate::job::plan::Plan;
use crate::job::settle::{Answer, says_nothing};
use crate::job::store::{self, Job, Outcome};
use crate::job::table::{self, Table};
use crate::job::target;
use crate::process::{self, handle_signals, my_database, my_pid, reload_if_asked, report};
use crate::shared::{self, End};
use crate::task::{self, Asked};
use crate::{asking, changes, owner, settings, txn, worker};

/// Interval at which locked rows are tried again, and transactions that failed in passing.
const AGAIN: Duration = Duration::from_secs(1);
/// Time for which a job that is to stop tries to write rows that others hold locked.
const LAST_TRIES: Duration = Duration::from_secs(10);
/// Interval at which its row is looked at without being told to.
const CONTROL: Duration = Duration::from_secs(10);
/// Interval at which changes are heard while rows are with the gateway.
const HEAR: Duration = Duration::from_secs(1);
/// Transactions that fail in passing one after the other, until the worker is given up.
const MOST_FAILURES: u32 = 60;
/// The same for errors of unknown kind.
const MOST_INTERNAL: u32 = 5;
/// Runs that begin one after the other without a row being done: the last one lists the row that it would begin with,
/// and then the job is given up, unless so many such rows follow each other.
const MOST_STARTS: i32 = 7;
const MORE_STARTS: i64 = 4;
/// The class of such a row.
const CRASH: &str = "crash";
/// Time that answers to rows that were sent are awaited after a cancel; and that the gateway may take then to give up.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
const ABANDON: Duration = Duration::from_millis(1_000);
/// When a job goes on by itself where nobody says when, microseconds.
const LATER: i64 = 15_000_000;

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn llm_batch_job_main(_arg: pg_sys::Datum) {
    handle_signals();
    asking::refuse();
    let Some((database, id, owner)) = worker::orders() else { return };
    let Some(entry) = shared::comes_up(database, id, my_pid()) else { return };
    // SAFETY: at the start of a background worker. Connecting fails, and ends the process, if the owner can't log in;
    // the launcher then has the finder look into it.
    unsafe {
        pg_sys::before_shmem_exit(Some(worker::on_exit), pg_sys::Datum::from(0));
        pg_sys::BackgroundWorkerInitializeConnectionByOid(pg_sys::Oid::from(database), pg_sys::Oid::from(owner), 0);
    }
    if let Ok(name) = std::ffi::CString::new(format!("llm_batch job {id}")) {
        // SAFETY: the name is copied.
        unsafe { pg_sys::pgstat_report_appname(name.as_ptr()) };
    }
    failure_point!("begin");
    let end = run(id, entry.told);
    shared::goes(database, id, my_pid(), end);
}

fn run(id: i64, told: bool) -> End {
    // Two transactions: what kills the second is counted by the first.
    let begun = txn::run(|| begin(id, told)).and_then(|job| job.map_or(Ok(None), |job| txn::run(|| Worker::new(job))));
    let worker = match begun {
        Ok(Some(worker)) => worker,
        Ok(None) => {
            // A search finds out whether it is to run later.
            shared::want(my_database(), 0, 0, shared::now());
            return End::Finished;
        }
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

/// The job, if there is anything to do. `told`: the worker before was told to end.
fn begin(id: i64, told: bool) -> Result<Option<Job>> {
    // A start for nothing, such as one whose cause was rolled back to a savepoint, changes nothing.
    let Some(mut job) = store::load(id)?.filter(|job| job.is_due) else { return Ok(None) };
    if job.owner != Some(me()) {
        if worker::orders().is_some_and(|(.., owner)| job.owner.is_some_and(|o| o.to_u32() == owner)) {
            // As by a setting of the role: the next worker would be the same.
            return Err(Error::state("the worker of the job does not run as the job's owner"));
        }
        // It was given another owner while this process was on its way.
        shared::want(my_database(), id, job.owner.unwrap_or_else(me).to_u32(), shared::now());
        return Ok(None);
    }
    let end = |outcome| store::end(id, job.epoch, &outcome, true);
    let (starts, error) = store::count_start(id, told)?;
    if starts > MOST_STARTS && i64::from(starts - MOST_STARTS) > ledger::crashes(id)?.min(MORE_STARTS) {
        let error = error.map_or(String::new(), |e| format!("; the last error was: {e}"));
        end(Outcome::Failed(format!(
            "the worker of the job died {} times without finishing a row{error}",
            starts - 1
        )))?;
        return Ok(None);
    }
    job.starts = starts;
    job.was_unwritable = store::reason(id)?.as_deref() == Some("write_error");
    changes::listen();
    store::begin(&job)?;
    // A reservation that is left is of a worker that died; nobody knows how much of it was spent.
    ledger::release(id, true)?;
    job.has_failures &= job.retry_epoch <= job.retried_epoch;
    Ok(Some(job))
}

/// A row that was handed over: its page and its position there, from 1.
type Place = (Rc<Page>, i32);

/// A row to ask about: its text, and what keeps it apart.
struct Asking {
    place: Place,
    text: String,
    isolation: Option<String>,
    /// Its answer before was refused.
    again: Option<Again>,
}

struct Worker {
    job: Job,
    asked: Asked,
    table: Table,
    /// The `changes::of_tables()` at which a settlement looked at it.
    table_at: Option<u32>,
    plan: Plan,
    /// The rights of its owner, from the first page on.
    rights: Option<Rights>,
    client: Option<Client>,
    /// The gateway has answered a row of this connection.
    has_answered: bool,
    /// The run ends as if it had been killed.
    dies: bool,
    /// Rows without an outcome, by the number they were handed over under.
    outstanding: HashMap<u64, Asking>,
    /// Bytes of their text.
    outstanding_bytes: usize,
    /// Rows of the next page.
    page_size: i64,
    /// Rows claimed, or to be asked again, and not yet handed over.
    waiting: VecDeque<Asking>,
    next_n: u64,
    /// Outcomes to write.
    answers: Vec<Answer>,
    /// The number of answers that are written at once: one after a write that failed for all of them, and then more and
    /// more.
    most_at_once: usize,
    /// The trouble that is in the way of writing.
    trouble: Option<Trouble>,
    /// Rows whose UPDATE raised, or that checks refused: perhaps not their own fault.
    suspects: Suspects,
    /// Evidence that answers are taken.
    doubt: Doubt,
    /// Outcomes of rows that others hold locked.
    locked: Vec<Answer>,
    /// When they were last tried.
    locked_tried: Instant,
    /// The place in the key that the pass has come to.
    last: Option<Place>,
    pass_ended: bool,
    claimed_in_pass: usize,
    /// This pass has noted NULLs, of rows that it has behind it.
    has_noted: bool,
    /// Rows whose input changed while they were asked about, and how often that has happened.
    late: HashMap<String, u32>,
    /// Failures that come from `late`.
    too_late: Vec<Failure>,
    /// Spending that is not yet in the counters.
    spent: Bill,
    money: Money,
    samples: VecDeque<(Instant, i64, i64)>,
    /// Why no more is claimed.
    stopping: Option<Outcome>,
    /// Since when the job is known to be cancelled; and whether the gateway was told that nobody waits any more.
    cancelled: Option<(Instant, bool)>,
    /// The model or the task was changed: what is open is finished, then the stream is opened anew.
    reopen: Option<Asked>,
    failures_in_a_row: u32,
    looked: Instant,
    look_now: bool,
    /// The run ends without an outcome, and another one goes on later: `llm_batch.enabled` is off, the job has another
    /// owner, the gateway has no place for it, or its worker makes room for another role's job.
    put_off: bool,
}

impl Worker {
    fn new(mut job: Job) -> Result<Option<Box<Self>>> {
        failure_point!("ready");
        let ready = txn::sub(|| Self::ready(&job));
        let (asked, table, plan) = match ready {
            Ok(ready) => ready,
            Err(e) if says_nothing(e.code) => return Err(e),
            Err(e) => {
                store::end(job.id, job.epoch, &outcome_of(&e), true)?;
                return Ok(None);
            }
        };
        job.max_attempts = asked.stream.task.options.max_attempts;
        let doubt = Doubt::new(&asked);
        Ok(Some(Box::new(Self {
            page_size: exchange::whole_packs(exchange::FIRST_PAGE, &asked.stream),
            job,
            asked,
            table,
            table_at: None,
            plan,
            rights: None,
            client: None,
            has_answered: false,
            dies: false,
            outstanding: HashMap::new(),
            outstanding_bytes: 0,
            waiting: VecDeque::new(),
            next_n: 0,
            answers: Vec::new(),
            most_at_once: usize::MAX,
            trouble: None,
            suspects: Suspects::default(),
            doubt,
            locked: Vec::new(),
            locked_tried: Instant::now(),
            last: None,
            pass_ended: false,
            claimed_in_pass: 0,
            has_noted: false,
            late: HashMap::new(),
            too_late: Vec::new(),
            spent: Bill::default(),
            money: Money::default(),
            samples: VecDeque::new(),
            stopping: None,
            cancelled: None,
            reopen: None,
            failures_in_a_row: 0,
            looked: Instant::now(),
            look_now: false,
            put_off: false,
        })))
    }

    /// Prepares for the first row.
    fn ready(job: &Job) -> Result<(Asked, Table, Plan)> {
        txn::check_writable()?;
        owner::check_login()?;
        let mut asked = task::load(&job.task, &job.options)?.stream(me(), false)?;
        if job.has_deadline {
            asked = asked.with_deadline();
        }
        if job.budget != (None, None) {
            asked = asked.with_budget(job.budget.0.is_some())?;
        }
        let table = table::table(job)?;
        let plan = make_plan(job, &table, &asked)?;
        Ok((asked, table, plan))
    }

    fn work(mut self) -> End {
        loop {
            if process::is_told_to_end() {
                self.farewell();
            }
            reload_if_asked();
            let gives_way = || self.stopping.is_none() && shared::gives_way(my_database(), self.job.id);
            if !self.put_off && (!settings::enabled() || gives_way()) {
                self.put_off = true;
                self.withdraw();
            }
            if let Err(e) = self.turn() {
                self.fail(&e);
            }
            if process::is_told_to_end() {
                self.farewell();
            }
            process::hold_on(self.has_in_hand());
            if self.dies {
                self.give_up("it ended as if it had been killed");
                return End::Died;
            }
            if let Some(end) = self.try_end() {
                return end;
            }
        }
    }

    /// One turn: look at what is wanted, claim, hand over, wait, write.
    fn turn(&mut self) -> Result<()> {
        let told = shared::was_poked(my_database(), self.job.id) | changes::heard() | self.look_now;
        let is_due = self.trouble.as_ref().is_some_and(Trouble::is_due);
        let may_try = is_due || self.trouble.is_none();
        let troubles = self.troubles();
        if changes::heard_of_rights() {
            self.look_at_rights()?;
        }
        if told || is_due || self.looked.elapsed() > CONTROL {
            // If the look fails in passing, the change is not forgotten.
            self.look().inspect_err(|_| self.look_now = true)?;
        }
        if self.client.is_none() && self.stopping.is_none() && !self.money.in_doubt {
            report(pg_sys::BackendState::STATE_IDLE, "connecting to the gateway");
            self.client = Some(Client::open(&self.asked.stream)?);
            self.has_answered = false;
        }
        // Outcomes are written also when no more rows can be claimed.
        let claimed = if may_try && self.may_claim() { self.claim() } else { Ok(()) };
        if claimed.is_ok() && (self.trouble.is_none() || self.lacks_others()) {
            self.hand_over()?;
        }
        self.receive()?;
        self.abandon();
        let try_locked = !self.locked.is_empty() && self.locked_tried.elapsed() >= AGAIN;
        let has_news = !self.answers.is_empty()
            || try_locked
            || !self.spent.is_empty()
            || !self.too_late.is_empty()
            || self.money.waits();
        if has_news && may_try {
            process::hold_on(self.has_in_hand());
            if let Err(e) = self.settle(try_locked) {
                let Some(kind) = Kind::of(e.code) else {
                    self.give_up(&e.one_line());
                    return Err(e);
                };
                let is_denied = kind == Kind::Denied;
                if is_denied && self.trouble.is_none() {
                    // It may be another one's job by now, or nobody's.
                    self.look()?;
                }
                if !process::is_told_to_end() && (!is_denied || self.has_in_hand()) {
                    self.hinder(kind, &e);
                }
            }
            if process::is_told_to_end() {
                // Nothing but the farewell may wait for a commit now: no other SIGTERM comes.
                return Ok(());
            }
        } else if !self.outstanding.is_empty() {
            // Changes by others are heard at the start of a transaction.
            txn::run(|| Ok(()))?;
        }
        claimed?;
        if is_due && self.troubles() == troubles {
            self.free()?;
        }
        self.next_pass();
        self.open_anew()?;
        self.failures_in_a_row = 0;
        Ok(())
    }

    /// Opens the stream anew once nothing of it is open.
    fn open_anew(&mut self) -> Result<()> {
        // Spending is entered by the models that it was spent for.
        if !self.outstanding.is_empty() || !self.waiting.is_empty() || !self.spent.is_empty() {
            return Ok(());
        }
        if self.reopen.is_some() && self.asked.stream.budget.is_some() {
            let id = self.job.id;
            txn::run(|| ledger::release(id, false))?;
        }
        if let Some(asked) = self.reopen.take() {
            self.job.max_attempts = asked.stream.task.options.max_attempts;
            self.asked = asked;
            (self.client, self.money, self.doubt) = (None, Money::default(), Doubt::new(&self.asked));
        }
        Ok(())
    }

    /// Looks at what the owner wants.
    fn look(&mut self) -> Result<()> {
        (self.looked, self.look_now) = (Instant::now(), false);
        let id = self.job.id;
        let (may_go_on, own) = (self.stopping.is_none(), &self.job);
        let found = txn::run(|| {
            let job = store::load(id)?.filter(|job| job.home == own.home);
            if job.as_ref().is_some_and(|job| job.epoch != own.epoch) {
                store::hear_all(id)?;
            }
            // While all that may be with the gateway is there no page is claimed, perhaps for long.
            let goes_on =
                may_go_on && job.as_ref().is_some_and(|job| job.wanted == "running" && job.owner == Some(me()));
            let ready = if goes_on { Some(Self::ready(own)?) } else { None };
            Ok((job, ready))
        })?;
        let (Some(job), ready) = found else {
            // Dropped, or a dump brings another one in its place: nothing of this run is to be told there.
            self.put_off = true;
            self.stop(Outcome::Cancelled);
            return Ok(());
        };
        if job.owner.is_none() {
            // Nobody will ever write it.
            self.give_up(owner::GONE);
            self.stop(Outcome::Paused("owner", Some(owner::GONE.to_owned()), None));
        } else if job.owner != Some(me()) {
            // Another process goes on, as its new owner.
            self.put_off = true;
            self.withdraw();
        }
        match job.wanted.as_str() {
            "paused" => self.stop(Outcome::Paused("user", None, None)),
            "cancelled" => self.stop(Outcome::Cancelled),
            _ => {}
        }
        if let Some((asked, ..)) = ready.filter(|(asked, ..)| *asked != self.asked && self.reopen.is_none()) {
            self.change(asked);
        }
        if job.budget != self.job.budget {
            // The gateway may have more than that already: nothing more is sent until the stream has been opened anew.
            self.job.budget = job.budget.clone();
            self.change(self.reopen.clone().unwrap_or_else(|| self.asked.clone()));
        }
        if job.has_deadline != self.job.has_deadline {
            // It is asked for in another way.
            (self.job.has_deadline, self.look_now) = (job.has_deadline, true);
        }
        if job.epoch != self.job.epoch {
            // Resumed or to be retried while this process was still at it.
            self.job.epoch = job.epoch;
            if job.wanted == "running" && self.stopping.take().is_some() {
                self.cancelled = None;
                // The gateway sends nothing more on the old stream.
                self.reopen = Some(self.asked.clone());
            }
            txn::run(|| store::begin(&job))?;
            if let Some(trouble) = &mut self.trouble {
                trouble.next = Instant::now();
            }
            // A cause that was at fault may be mended. Its rows are asked again.
            self.suspects = Suspects::default();
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
            self.withdraw();
        }
        // Answers at hand are tried once more.
        if let Some(trouble) = self.trouble.as_mut().filter(|_| self.stopping.as_ref() != Some(&outcome)) {
            trouble.next = Instant::now();
        }
        if matches!(outcome, Outcome::Cancelled) {
            self.cancelled.get_or_insert((Instant::now(), false));
        }
        // Its owner's word stays the last one.
        if !matches!(self.stopping, Some(Outcome::Cancelled)) {
            self.stopping = Some(outcome);
        }
    }

    /// Nobody waits long for a job that is cancelled: what is under way is given up, and may have cost what it can.
    fn abandon(&mut self) {
        let Some((since, is_told)) = &mut self.cancelled else { return };
        if self.outstanding.is_empty() || since.elapsed() < LAST_ANSWERS {
            return;
        }
        match &mut self.client {
            Some(client) if !*is_told => {
                *is_told = true;
                // A connection that is lost is noticed by receive().
                let _ = client.send(&ToGateway::Abandon);
            }
            // It reads nothing while its memory is full.
            Some(_) if since.elapsed() >= LAST_ANSWERS + ABANDON => self.lose_gateway(),
            _ => {}
        }
    }

    /// Most time that the gateway is waited for.
    fn patience(&self) -> Duration {
        let end = |(since, is_told): (Instant, bool)| {
            let whole = if is_told { LAST_ANSWERS + ABANDON } else { LAST_ANSWERS };
            whole.saturating_sub(since.elapsed())
        };
        self.cancelled.map_or(CONTROL, end)
    }

    /// Takes back the rows that have not been sent.
    fn withdraw(&mut self) {
        self.waiting.clear();
        if let Some(client) = &mut self.client {
            // A connection that is lost is noticed by receive().
            let _ = client.send(&ToGateway::Withdraw);
        }
    }

    /// Asks by a changed task, model, endpoint or budget from the next request on. Rows that have not been sent are
    /// claimed again by a further pass.
    fn change(&mut self, asked: Asked) {
        self.withdraw();
        self.reopen = Some(asked);
        self.claimed_in_pass = self.claimed_in_pass.max(1);
    }

    fn restart_pass(&mut self) {
        self.last = None;
        self.pass_ended = false;
        self.claimed_in_pass = 0;
    }

    /// At the end of the key's range another pass begins for what is still NULL, until one finds nothing.
    fn next_pass(&mut self) {
        let is_idle =
            self.outstanding.is_empty() && self.waiting.is_empty() && self.answers.is_empty() && self.locked.is_empty();
        if self.pass_ended && is_idle && self.stopping.is_none() {
            // Too few to say that it is not their own fault.
            self.too_late.append(&mut self.suspects.take());
            if self.claimed_in_pass == 0 && self.too_late.is_empty() {
                self.stopping = Some(Outcome::Done);
            } else {
                self.restart_pass();
            }
        }
    }
}

/// The role this process runs as.
fn me() -> pg_sys::Oid {
    process::current_user()
}

fn make_plan(job: &Job, table: &Table, asked: &Asked) -> Result<Plan> {
    let casts = target::casts(&job.targets, &asked.stream.task.spec)?;
    Ok(Plan::new(job, table, &casts, asked))
}
