//! Takes rows from queues to requests and from answers to outcomes.
//!
//! queue → pack → reserve → send → check → settle → outcomes. Everything here is synchronous and happens on one
//! thread; only sending is not. This file has the state, `clients` who asks, `send` what goes out, `answers` and `troubles`
//! what comes back, `doubts` what may not be the rows' fault, `circuits` what is left alone because nothing comes back,
//! `probe` whether a model answers at all, `routes` which of several models is asked, `cheaper` which of two services,
//! `estimate` what rows would take, `memory` whose texts it is full of, `activity` what goes on.

mod activity;
mod answers;
mod cheaper;
mod circuits;
mod clients;
mod doubts;
mod estimate;
#[cfg(test)]
mod even_tests;
#[cfg(test)]
mod flex_tests;
mod memory;
#[cfg(test)]
mod pause_tests;
mod probe;
#[cfg(test)]
mod route_tests;
mod routes;
mod send;
#[cfg(test)]
mod service_tests;
#[cfg(test)]
mod tests;
mod troubles;
#[cfg(test)]
mod vector_tests;

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use llm_batch_core::dialect::Service;
use llm_batch_core::limiter::{Grant, Limits, Tokens};
use llm_batch_core::patience::Way;
use llm_batch_core::trouble;
use serde_json::Value;
use tokio::sync::Notify;

use self::circuits::{Circuits, EndpointKey, Probing};
use self::clients::{Conn, Report};
use self::memory::Shares;
pub use self::probe::{PROBE_IDS, PROBE_READ_TOKENS, Probe};
use crate::Settings;
use crate::cache::{Cache, Keys, TextKey};
use crate::group::Pushed;
use crate::groups::Groups;
use crate::kept::Kept;
use crate::key::{GroupId, LaneKey};
use crate::lane::Lane;
use crate::learned::Learned;
use crate::notice::Notices;
use crate::numbers::Numbers;
use crate::places::Places;
use crate::protocol::{
    Allowance, FromGateway, Item, MAX_FRAME, MAX_OUTSTANDING_BYTES, MAX_OUTSTANDING_ITEMS, Outcome, Spent, Stop,
    StopReason, Stream, Verdict, encode,
};
use crate::request::Answered;
use crate::row::{Row, Waiter};
use crate::ruler::{Line, Ruler};

/// Lanes without streams beyond this number are forgotten.
const MOST_IDLE_LANES: usize = 256;

/// A request under way.
pub struct InFlight {
    id: u64,
    lane: LaneKey,
    group: GroupId,
    asked: Asked,
    rows: Vec<Row>,
    ids: Vec<u16>,
    grant: Grant,
    /// Woken when all clients that wait for it have gone.
    abandoned: Rc<Notify>,
    /// The last of its clients was told what it may have taken.
    is_accounted: bool,
    /// Its refusal, while a request without rows finds out whether that is refused too.
    in_doubt: Option<Answered>,
}

/// The terms under which a request was sent.
#[derive(Clone, Copy)]
struct Asked {
    /// Which task, and what of the provider.
    scope: TextKey,
    service: Service,
    /// The way, and its number.
    way: Way,
    turn: u32,
    /// The knowledge of the server by which it was written.
    learned: Learned,
    /// By our count, and what was reserved.
    estimate: Tokens,
    reserved: Tokens,
    /// Most tokens that it may take: its prompt and the cap of its answer.
    worst: Tokens,
    /// The cap of its answer might be larger.
    can_grow: bool,
    /// It is asked at the tier "flex".
    is_flex: bool,
    /// When (ms) it was sent.
    sent: u64,
}

/// A request to send.
pub struct Launch {
    pub id: u64,
    pub stream: Rc<Stream>,
    /// The numbers of its rows.
    pub ids: Vec<u16>,
    pub body: Value,
    pub timeout: Duration,
    /// The cap of its answer, tokens.
    pub most_tokens: u64,
    pub abandoned: Rc<Notify>,
}

/// All of the gateway's state.
pub struct State {
    pub settings: Settings,
    places: Places,
    /// State that outlives the gateway.
    kept: Kept,
    conns: HashMap<u64, Conn>,
    lanes: BTreeMap<LaneKey, Lane>,
    groups: Groups,
    /// Endpoints that are in trouble, by account and URL.
    circuits: BTreeMap<EndpointKey, Circuits>,
    in_flight: HashMap<u64, InFlight>,
    /// Probes of endpoints that are under way.
    probing: HashMap<u64, Probing>,
    /// Requests without rows that are to be sent, in place of those that were refused.
    doubts: Vec<Launch>,
    keys: Keys,
    numbers: Numbers,
    cache: Cache,
    next_id: u64,
    /// Bytes of text that wait or are under way.
    bytes: usize,
    /// Their owners, until they change.
    shares: Option<Shares>,
    notices: Notices,
    log: mpsc::Sender<String>,
}

impl State {
    pub fn new(settings: Settings, places: Places, kept: Kept, log: mpsc::Sender<String>) -> Self {
        Self {
            settings,
            places,
            kept,
            conns: HashMap::new(),
            lanes: BTreeMap::new(),
            groups: Groups::default(),
            circuits: BTreeMap::new(),
            in_flight: HashMap::new(),
            probing: HashMap::new(),
            doubts: Vec::new(),
            keys: Keys::default(),
            numbers: Numbers::default(),
            cache: Cache::default(),
            next_id: 0,
            bytes: 0,
            shares: None,
            notices: Notices::default(),
            log,
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Forgets a group that is not used, and brings its lanes in line with the streams that are open on them: the smallest
    /// limits hold.
    fn tidy(&mut self, now: u64, id: GroupId) {
        let Some(group) = self.groups.get(id) else { return };
        let lanes: Vec<LaneKey> = group.members.iter().map(|member| member.lane.clone()).collect();
        let is_open = || self.conns.values().filter_map(|c| c.stream.as_ref()).any(|(open, _)| *open == id);
        if group.in_flight == 0 && group.queued() == 0 && !is_open() {
            self.groups.remove(id);
            for key in &lanes {
                if let Some(lane) = self.lanes.get_mut(key) {
                    lane.groups.retain(|other| *other != id);
                }
            }
        }
        lanes.iter().for_each(|key| self.keep_to_limits(now, key));
        if self.lanes.len() > MOST_IDLE_LANES {
            self.lanes.retain(|_, lane| !lane.is_idle());
            self.circuits.retain(|(account, _), _| self.lanes.keys().any(|lane| lane.account == *account));
        }
    }

    /// Sets the limits of a lane by the streams that are open on it.
    fn keep_to_limits(&mut self, now: u64, key: &LaneKey) {
        // Sessions keep their streams open; only those with rows under way have a say. Without any the limits stay: what
        // was sent under them still counts.
        let busy = self.conns.values().filter(|c| c.outstanding > 0).filter_map(|c| c.stream.as_ref());
        let on_lane = busy.filter_map(|(id, _)| self.groups.get(*id)?.member(key));
        let streams: Vec<&Stream> = on_lane.map(|(_, member)| &*member.stream).collect();
        if let Some(lane) = self.lanes.get_mut(key)
            && let Some(limits) = streams.iter().map(|stream| stream.limits()).reduce(Limits::min)
        {
            lane.configure(now, limits, streams.iter().filter_map(|stream| stream.model.max_concurrent_requests).min());
        }
    }

    /// Rows of a client begin to come, perhaps in parts: for which group.
    pub fn rows_come(&mut self, conn: u64) -> Option<GroupId> {
        self.conns.get_mut(&conn)?.coming += 1;
        let group = self.group_of(conn)?;
        self.groups.get_mut(group)?.coming += 1;
        Some(group)
    }

    /// All of them have come.
    pub fn rows_came(&mut self, conn: u64, group: Option<GroupId>) {
        if let Some(c) = self.conns.get_mut(&conn) {
            c.coming = c.coming.saturating_sub(1);
        }
        if let Some(group) = group.and_then(|group| self.groups.get_mut(group)) {
            group.coming = group.coming.saturating_sub(1);
        }
    }

    /// The ruler that turns texts of a client into lines.
    pub fn ruler(&self, conn: u64) -> Option<Ruler> {
        Some(self.groups.get(self.group_of(conn)?)?.ruler())
    }

    /// The group of a client's stream.
    fn group_of(&self, conn: u64) -> Option<GroupId> {
        self.conns.get(&conn)?.stream.as_ref().map(|(group, _)| *group)
    }

    pub fn items(&mut self, now: u64, conn: u64, items: Vec<(Item, Option<Line>)>) -> Result<(), String> {
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        c.came = now;
        let was_idle = c.outstanding == 0;
        let Some(group) = self.group_of(conn) else {
            return Err("rows came before a stream was opened".to_owned());
        };
        if let Some(g) = self.groups.get_mut(group)
            && let Some(lane) = g.first_lane().and_then(|lane| self.lanes.get(lane))
        {
            lane.wake(g);
        }
        for (item, line) in items {
            let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
            if c.outstanding >= MAX_OUTSTANDING_ITEMS
                || (c.outstanding > 0 && c.outstanding_bytes + item.text.len() > MAX_OUTSTANDING_BYTES)
            {
                return Err("more rows were sent than may be outstanding".to_owned());
            }
            let bytes = item.text.len();
            c.outstanding += 1;
            c.outstanding_bytes += bytes;
            self.bytes += bytes;
            self.shares = None;
            let waiter = Waiter { conn, n: item.n, bytes };
            if c.stopped {
                self.outcome(waiter, 0, 0, Verdict::Withdrawn, (false, None));
                continue;
            }
            let unique: TextKey = self.id().into();
            let Some(g) = self.groups.get_mut(group) else { continue };
            let reuse = g.stream.task.options.reuse;
            let compartment = g.compartment(&self.keys, &item);
            let before = item.again.as_ref().map_or(0, |again| again.attempts);
            // A refused answer is not given again. Rows with the same text and the same hint may share an answer.
            let scope = item
                .again
                .as_ref()
                .map_or(compartment, |again| self.keys.of(compartment, &format!("{} {}", again.attempts, again.hint)));
            let key = if reuse { self.keys.of(scope, &item.text) } else { unique };
            let models = 0..if reuse { g.stream.others.len() + 1 } else { 0 };
            let mut kept = models.filter_map(|at| Some((at, self.cache.get(of_model(key, at), self.settings.cache)?)));
            if let Some((model, (answer, confidence))) = kept.next() {
                if let Some(lane) = g.first_lane().and_then(|lane| self.lanes.get_mut(lane)) {
                    lane.rows_reused += 1;
                }
                self.outcome(waiter, model, before, Verdict::Answer(answer), (true, confidence));
                continue;
            }
            if g.push(now, conn, (item, line), compartment, key) == Pushed::TooLong {
                let most = g.most_of_a_row();
                let verdict = too_long(&format!("max_request_tokens of the model is {most}"));
                self.outcome(waiter, 0, 0, verdict, (false, None));
            }
        }
        if was_idle {
            self.tidy(now, group);
        }
        self.rank(now, group);
        let stop = if self.settings.enabled { self.out(now, group) } else { Some((disabled(), None)) };
        if let Some((stop, role)) = stop {
            self.stop(group, &stop, role);
        }
        self.flush();
        Ok(())
    }

    /// Notes how a lane stands, for the gateway after this one.
    fn note(&mut self, now: u64, key: &LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key).filter(|lane| lane.limiter.is_limited()) {
            self.kept.note(now, key, lane.stated.limits(), lane.limiter.keep(now));
        }
    }

    pub fn allow(&mut self, conn: u64, more: Allowance) {
        let Some(group) = self.group_of(conn) else { return };
        if let Some(purse) = self.groups.get_mut(group).and_then(|g| g.purse.as_mut()) {
            purse.allow(more);
        }
    }

    pub fn withdraw(&mut self, conn: u64) {
        let Some(c) = self.conns.get_mut(&conn) else { return };
        c.stopped = true;
        let Some(group) = self.group_of(conn) else { return };
        let rows = self.groups.get_mut(group).map(|g| g.withdraw(&|c| c == conn));
        self.give_back(rows.unwrap_or_default());
        self.release_last(group);
        self.flush();
    }

    fn give_back(&mut self, waiters: Vec<Waiter>) {
        for waiter in waiters {
            self.outcome(waiter, 0, 0, Verdict::Withdrawn, (false, None));
        }
    }

    /// A row is done with, by the model at this place: all who wait for it get this outcome, and only the first has paid.
    fn done(&mut self, group: GroupId, model: usize, row: Row, verdict: Verdict) {
        let Some(group) = self.groups.get_mut(group) else { return };
        let waiters = group.take_waiters(&row);
        if let Verdict::Answer(answer) = &verdict
            && group.stream.task.options.reuse
        {
            self.cache.put(of_model(row.key, model), (answer.clone(), row.confidence), self.settings.cache);
        }
        let is_answer = matches!(verdict, Verdict::Answer(_));
        let confidence = row.confidence.filter(|_| is_answer);
        if is_answer && let Some(lane) = group.first_lane().and_then(|lane| self.lanes.get_mut(lane)) {
            lane.rows_reused += waiters.len().saturating_sub(1) as u64;
        }
        for (i, waiter) in waiters.into_iter().enumerate() {
            let reused = i > 0 && is_answer;
            self.outcome(waiter, model, row.attempts, verdict.clone(), (reused, confidence));
        }
    }

    fn outcome(
        &mut self,
        waiter: Waiter,
        model: usize,
        attempts: u32,
        verdict: Verdict,
        (reused, confidence): (bool, Option<f64>),
    ) {
        self.bytes = self.bytes.saturating_sub(waiter.bytes);
        self.shares = None;
        if let Some(c) = self.conns.get_mut(&waiter.conn) {
            c.outstanding = c.outstanding.saturating_sub(1);
            c.outstanding_bytes = c.outstanding_bytes.saturating_sub(waiter.bytes);
            c.report(model).outcomes.push(Outcome { n: waiter.n, verdict, attempts, reused, confidence });
        }
    }

    /// Sends a message to a client.
    pub fn say(&mut self, conn: u64, message: &FromGateway) {
        if let Some(c) = self.conns.get(&conn) {
            say(c, message);
        }
    }

    /// Sends what has gathered for each client.
    fn flush(&mut self) {
        for c in self.conns.values_mut() {
            flush(c);
        }
    }

    /// A lane stops for all of its groups.
    fn stop_lane(&mut self, now: u64, lane: &LaneKey, stop: &Stop, role: Option<u32>) {
        let groups = self.lanes.get(lane).map(|lane| lane.groups.clone()).unwrap_or_default();
        groups.into_iter().for_each(|group| self.strike(now, lane, group, stop, role));
    }

    /// Stops the streams of a group: their waiting rows go back. If a provider's words are about a request of a role, other
    /// roles are not told them.
    fn stop(&mut self, id: GroupId, stop: &Stop, role: Option<u32>) {
        let Some(group) = self.groups.get_mut(id) else { return };
        let rows = group.withdraw(&|_| true);
        self.give_back(rows);
        // The reason goes first: a client that saw only rows come back would send them again.
        for c in self.conns.values_mut() {
            let Some((_, stream)) = c.stream.as_ref().filter(|(group, _)| *group == id) else { continue };
            let mut stop = stop.clone();
            if role.is_some_and(|role| role != stream.role) {
                stop.message = trouble::without_words(&stop.message).to_owned();
            }
            c.stopped = true;
            say(c, &FromGateway::Stopped(stop));
        }
        self.flush();
    }

    pub fn configure(&mut self, settings: Settings) {
        let off = self.settings.enabled && !settings.enabled;
        if settings.cache < self.settings.cache {
            self.cache = Cache::default();
        }
        self.settings = settings;
        if off {
            let groups: Vec<GroupId> = self.groups.iter().map(|(id, _)| id).collect();
            groups.into_iter().for_each(|group| self.stop(group, &disabled(), None));
            for request in self.in_flight.values() {
                request.abandoned.notify_one();
            }
            self.probing.values().for_each(Probing::abandon);
        }
    }
}

/// Sends what has gathered for a client.
fn flush(c: &mut Conn) {
    for (model, report) in std::mem::take(&mut c.reports) {
        tell(c, model, report);
    }
}

/// Tells a client what became of its rows by the model at this place.
fn tell(c: &Conn, model: usize, report: Report) {
    let Report { outcomes: all, mut spent } = report;
    // Vectors of many rows are more than a frame holds.
    let (mut outcomes, mut bytes) = (Vec::new(), 0);
    for outcome in all {
        if let Verdict::Answer(answer) = &outcome.verdict {
            bytes += answer.0.iter().flatten().map(String::len).sum::<usize>();
        }
        outcomes.push(outcome);
        if bytes > MAX_FRAME / 8 {
            let outcomes = std::mem::take(&mut outcomes);
            say(c, &FromGateway::Outcomes { model, outcomes, spent: std::mem::take(&mut spent) });
            bytes = 0;
        }
    }
    if !outcomes.is_empty() || spent != Spent::default() {
        say(c, &FromGateway::Outcomes { model, outcomes, spent });
    }
}

fn say(conn: &Conn, message: &FromGateway) {
    if let Ok(frame) = encode(message) {
        conn.frames.send(frame);
    }
}

/// The key under which the cache keeps an answer of the model at this place.
fn of_model(key: TextKey, place: usize) -> TextKey {
    key ^ place as TextKey
}

fn too_long(why: &str) -> Verdict {
    Verdict::Skip { class: "too_long".into(), detail: format!("the text is larger than a request may be: {why}") }
}

/// Why nothing is sent while `llm_batch.enabled` is off.
pub fn disabled() -> Stop {
    Stop { reason: StopReason::Disabled, message: "llm_batch.enabled is off".into(), retry_after_ms: None }
}
