//! A session's rows to the gateway, and what becomes of them. The same path as a job's.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::{
    Again, Allowance, FromGateway, Item, Outcome, Spent, Stream, ToGateway, Verdict, most_text,
};
use pgrx::{PgMemoryContexts, PgSqlErrorCode};

use crate::budget::UNLIMITED;
use crate::checks::{self, Checks, Judged};
use crate::client::{Client, LostInVain, MESSAGE_BYTES, Received, WINDOW_ROWS};
use crate::error::{Error, Result};
use crate::statement::Purse;
use crate::task::Asked;

/// Bytes of their text.
const WINDOW_BYTES: usize = 4 << 20;
/// Rows taken from their source at a time.
const FETCH: usize = 100;

/// Rows that are given up because their answers are refused, with none taken, until the statement is.
const MOST_REFUSED: u32 = 20;

fn never_taken(model: &str, class: &str, detail: &str) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_DATA_EXCEPTION, format!("no answer of model \"{model}\" to this task is taken"))
        .detail(format!("{class}: {detail}"))
        .hint("Change the task's checks, or its instruction, so that the model can pass them.")
}

/// A text, and what keeps it apart from others.
pub type Asking = (String, Option<String>);

/// The connection of the last call, with nothing under way, and what was opened on it.
struct Kept {
    client: Client,
    stream: Stream,
    purse: Purse,
}

thread_local! {
    /// A scalar function is called row by row.
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

/// A stream that is open, and its rows that have no answer yet.
pub struct Asker {
    client: Client,
    stream: Stream,
    model: String,
    checks: Option<Checks>,
    /// Rows whose last answer was refused; `None` once one was taken.
    refused: Option<u32>,
    /// Rows for which the checks took too long, since answers came together of which none did.
    late: Cell<u32>,
    purse: Purse,
    most_text: usize,
    pending: BTreeMap<u64, Pending>,
    /// Those of them that were not handed over yet.
    unsent: Vec<Item>,
    /// Bytes of the text of all pending rows.
    bytes: usize,
    next: u64,
    lost: LostInVain,
    done: Done,
    /// Most that the next request takes with one row, and in full, if the statement's budget did not have it.
    exhausted: Option<(Allowance, Allowance)>,
}

/// A row without an answer, and since when.
struct Pending {
    item: Item,
    since: Instant,
}

/// The work of a stream so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    /// Rows that have their answer.
    pub rows: u64,
    /// Those of them whose answer was paid for with another row.
    pub reused: u64,
    /// Time that they had none, summed over all of them.
    pub waited: Duration,
    pub spent: Spent,
    /// Picodollars, where prices are known.
    pub cost: u64,
}

impl Done {
    pub fn add(&mut self, more: &Self) {
        self.rows += more.rows;
        self.reused += more.reused;
        self.waited += more.waited;
        self.spent.add(&more.spent);
        self.cost += more.cost;
    }
}

impl Asker {
    /// Opens a stream, on the connection that was kept if it is the same. The statement spends no more than `limit`.
    pub fn open(mut asked: Asked, limit: Allowance) -> Result<Self> {
        if limit != (Allowance { cost: UNLIMITED, tokens: UNLIMITED }) {
            asked = asked.with_budget(limit.cost != UNLIMITED)?;
        }
        let Asked { stream, model, models, checks, .. } = asked;
        let prices = models.into_iter().map(|(_, price)| price).collect();
        let mut purse = Purse::new(limit, prices, stream.budget);
        let client = match KEPT.take() {
            // A stream's grants belong to one budget.
            Some(kept) if kept.stream == stream && (stream.budget.is_none() || kept.purse.is_same(&purse)) => {
                match if_fresh(kept)? {
                    Some(Kept { client, purse: kept, .. }) => {
                        if stream.budget.is_some() {
                            purse = kept;
                        }
                        client
                    }
                    None => Client::open(&stream)?,
                }
            }
            kept => {
                close(kept);
                Client::open(&stream)?
            }
        };
        Ok(Self {
            client,
            most_text: most_text(stream.model.max_request_tokens),
            stream,
            model,
            checks,
            refused: Some(0),
            late: Cell::new(0),
            purse,
            pending: BTreeMap::new(),
            unsent: Vec::new(),
            bytes: 0,
            next: 0,
            lost: LostInVain::default(),
            done: Done::default(),
            exhausted: None,
        })
    }

    /// Rows without an answer.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Returns true if there is room for another row.
    pub fn has_room(&self) -> bool {
        self.pending.len() < WINDOW_ROWS && self.bytes < WINDOW_BYTES
    }

    /// Returns true if there is room for this row: there always is for a first one.
    fn fits(&self, text: &str) -> bool {
        self.pending.len() < WINDOW_ROWS
            && (self.pending.is_empty() || self.bytes + text.len().min(self.most_text) <= WINDOW_BYTES)
    }

    /// Queues a row and says which number its answer will have: they go up from 0.
    pub fn put(&mut self, (mut text, isolation): Asking) -> u64 {
        text.truncate(text.floor_char_boundary(self.most_text));
        self.bytes += text.len();
        let n = self.next;
        self.next += 1;
        let item = Item { n, text, isolation, again: None };
        self.pending.insert(n, Pending { item: item.clone(), since: Instant::now() });
        self.unsent.push(item);
        n
    }

    /// The number of rows that are queued and not handed over.
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Hands over what is queued.
    pub fn flush(&mut self) -> Result<()> {
        let items = std::mem::take(&mut self.unsent);
        send(&mut self.client, items)
    }

    /// Waits for answers, at most for so long, and hands each to `sink`. Returns true if anything came.
    pub fn receive(&mut self, timeout: Duration, sink: &mut dyn FnMut(Outcome)) -> Result<bool> {
        match self.client.receive(timeout)? {
            Received::Message(FromGateway::Outcomes { model, outcomes, spent }) => {
                self.take(model, outcomes, &spent, sink)?;
                // Rows that are asked again.
                self.flush()?;
                if let Some(more) = self.purse.top_up() {
                    self.client.send(&ToGateway::Allow(more))?;
                }
            }
            Received::Message(FromGateway::Stopped(stop)) => {
                return Err(Error::from_stop(&stop, &self.model, &self.stream));
            }
            Received::Message(FromGateway::Exhausted { least, full }) => {
                self.exhausted = Some((least, full));
                self.grant()?;
            }
            Received::Message(_) => {}
            Received::Nothing => return Ok(false),
            Received::Lost => {
                self.lost.another()?;
                self.purse.release(true);
                self.client = Client::open(&self.stream)?;
                self.unsent.clear();
                send(&mut self.client, self.pending.values().map(|p| p.item.clone()).collect())?;
            }
        }
        Ok(true)
    }

    fn take(
        &mut self,
        model: usize,
        outcomes: Vec<Outcome>,
        spent: &Spent,
        sink: &mut dyn FnMut(Outcome),
    ) -> Result<()> {
        self.lost.answered();
        self.done.spent.add(spent);
        // The reason follows withdrawn rows: the stream is stopped.
        let outcomes: Vec<_> = outcomes.into_iter().filter(|o| o.verdict != Verdict::Withdrawn).collect();
        self.done.cost += self.purse.spend(model, spent, outcomes.len() as u64);
        // Memory that is used for a row is not kept until the statement ends.
        let mut memory = PgMemoryContexts::new("llm_batch answers");
        // SAFETY: on the main thread; what is returned is Rust's own.
        let judged = unsafe { memory.switch_to(|_| self.judge(&outcomes)) }?;
        for (mut o, judged) in outcomes.into_iter().zip(judged) {
            let Some(pending) = self.pending.get_mut(&o.n) else { continue };
            match judged {
                None if matches!(o.verdict, Verdict::Answer(_)) => self.refused = None,
                None => {}
                Some(Ok(answer)) => {
                    self.refused = None;
                    o.verdict = Verdict::Answer(answer);
                }
                Some(Err(refused)) => {
                    let before = pending.item.again.as_ref().map_or(0, |again| again.attempts);
                    let attempts = o.attempts.max(before + 1);
                    let is_last = attempts >= self.stream.task.options.max_attempts;
                    if let Some(hint) = refused.hint.filter(|_| !is_last) {
                        pending.item.again = Some(Again { attempts, hint });
                        self.unsent.push(pending.item.clone());
                        continue;
                    }
                    self.refused = self.refused.map(|n| n + 1);
                    if self.refused.is_some_and(|n| n >= MOST_REFUSED) {
                        return Err(never_taken(&self.model, refused.class, &refused.detail));
                    }
                    o.verdict = Verdict::Fail { class: refused.class.to_owned(), detail: refused.detail };
                }
            }
            if let Some(Pending { item, since }) = self.pending.remove(&o.n) {
                self.bytes -= item.text.len();
                self.done.rows += 1;
                self.done.waited += since.elapsed();
                self.done.reused += u64::from(o.reused);
                sink(o);
            }
        }
        Ok(())
    }

    /// Judges answers by the types of the fields and by the task's checks.
    fn judge(&self, outcomes: &[Outcome]) -> Result<Vec<Option<Judged>>> {
        let spec = &self.stream.task.spec;
        let columns = spec.columns();
        let mut judged: Vec<Option<Judged>> = Vec::with_capacity(outcomes.len());
        let mut rows = Vec::new();
        for o in outcomes {
            judged.push(match (&o.verdict, self.pending.get(&o.n)) {
                (Verdict::Answer(answer), Some(pending)) => match checks::unfit(&columns, spec.has_names(), answer)? {
                    Some(refused) => Some(Err(refused)),
                    // It stays as it came.
                    None if self.checks.is_none() => None,
                    None => {
                        rows.push((pending.item.text.as_str(), answer));
                        Some(Ok(answer.clone()))
                    }
                },
                _ => None,
            });
        }
        if let Some(checks) = &self.checks {
            let before = self.late.get();
            let mut all = Vec::with_capacity(rows.len());
            while let Some(rest) = rows.get(all.len()..).filter(|rest| !rest.is_empty()) {
                if self.late.get() >= checks::MOST_LATE {
                    return Err(checks::take_too_long());
                }
                let (more, late) = checks.judge(rest, self.late.get())?;
                self.late.set(late);
                all.extend(more);
            }
            if !rows.is_empty() && self.late.get() == before {
                self.late.set(0);
            }
            let taken = judged.iter_mut().filter(|judged| matches!(judged, Some(Ok(_))));
            for (place, new) in taken.zip(all) {
                *place = Some(new);
            }
        }
        Ok(judged)
    }

    /// Ends the stream: what was not sent comes back, and the answers to what was are awaited.
    pub fn recall(mut self, sink: &mut dyn FnMut(Outcome)) -> Result<Done> {
        let mut under_way = self.pending.len() - self.unsent.len();
        self.client.send(&ToGateway::Withdraw)?;
        while under_way > 0 {
            match self.client.receive(Duration::from_secs(60))? {
                Received::Message(FromGateway::Outcomes { model, outcomes, spent }) => {
                    under_way = under_way.saturating_sub(outcomes.len());
                    self.take(model, outcomes, &spent, sink)?;
                }
                Received::Message(_) | Received::Nothing => {}
                Received::Lost => return Ok(self.done),
            }
        }
        self.purse.release(false);
        Ok(self.done)
    }

    /// Returns true if it is open for what is asked now.
    pub fn is_for(&self, asked: &Asked) -> bool {
        let stream = Stream { budget: asked.stream.budget, ..self.stream.clone() };
        stream == asked.stream && self.checks == asked.checks
    }

    /// Allows more to a stream that has asked for it. A connection that is only kept holds on to nothing meanwhile.
    pub fn grant(&mut self) -> Result<()> {
        let Some((least, full)) = self.exhausted else { return Ok(()) };
        let more = self.purse.grant(least, full, &self.stream).or_else(|_| {
            close(KEPT.take());
            self.purse.grant(least, full, &self.stream)
        })?;
        self.exhausted = None;
        self.client.send(&ToGateway::Allow(more))
    }

    /// Returns true if it waits for more than the statement's budget has.
    pub fn is_exhausted(&self) -> bool {
        self.exhausted.is_some()
    }

    /// Keeps the connection for the next call, if nothing is under way on it.
    pub fn keep(self) {
        if self.pending.is_empty() {
            close(KEPT.replace(Some(Kept { client: self.client, stream: self.stream, purse: self.purse })));
        }
    }

    /// Counts its further spending to the statement that runs.
    pub fn move_on(&mut self) {
        self.purse.move_on();
    }

    /// Returns true if nothing is under way, and the gateway has said nothing since. Otherwise it may have been
    /// stopped, which says nothing about today.
    pub fn is_fresh(&mut self) -> Result<bool> {
        Ok(self.pending.is_empty() && self.client.is_quiet()?)
    }

    pub fn done(&self) -> Done {
        self.done
    }
}

/// Asks about rows as `source` yields them (at most so many at a call; none: the end), and hands what became of each to
/// `sink`: its number is its position. The statement spends no more than `limit`.
pub fn ask(
    asked: Asked,
    limit: Allowance,
    source: &mut dyn FnMut(usize) -> Result<Vec<Asking>>,
    sink: &mut dyn FnMut(Outcome),
) -> Result<()> {
    let mut asker = Asker::open(asked, limit)?;
    let mut fetched: VecDeque<Asking> = VecDeque::new();
    let mut ended = false;
    loop {
        loop {
            if fetched.is_empty() && !ended && asker.pending() < WINDOW_ROWS {
                fetched.extend(source(FETCH)?);
                ended = fetched.is_empty();
            }
            let Some(asking) = fetched.pop_front_if(|asking| asker.fits(&asking.0)) else { break };
            asker.put(asking);
        }
        asker.flush()?;
        if asker.pending() == 0 {
            asker.keep();
            return Ok(());
        }
        asker.receive(Duration::from_secs(60), sink)?;
    }
}

/// A connection, if nothing has come on it since it was last used: a stop of back then says nothing about today.
fn if_fresh(mut kept: Kept) -> Result<Option<Kept>> {
    if kept.client.is_quiet()? {
        return Ok(Some(kept));
    }
    close(Some(kept));
    Ok(None)
}

/// Nothing is under way on a connection that was kept: what it was allowed was not spent.
fn close(kept: Option<Kept>) {
    if let Some(mut kept) = kept {
        kept.purse.release(false);
    }
}

/// Sends rows in frames that are small enough.
fn send(client: &mut Client, items: Vec<Item>) -> Result<()> {
    let mut frame = Vec::new();
    let mut bytes = 0;
    for item in items {
        bytes += item.text.len();
        frame.push(item);
        if bytes >= MESSAGE_BYTES {
            client.send(&ToGateway::Items(std::mem::take(&mut frame)))?;
            bytes = 0;
        }
    }
    if frame.is_empty() { Ok(()) } else { client.send(&ToGateway::Items(frame)) }
}
