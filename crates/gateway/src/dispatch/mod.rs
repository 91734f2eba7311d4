//! Takes rows from queues to requests and from answers to outcomes.
//!
//! queue → pack → reserve → send → check → settle → outcomes. Everything here is synchronous and happens on one
//! thread; only sending is not. This file has the state and the clients, `send` what goes out, `answers` and `troubles`
//! what comes back, `doubts` what may not be the rows' fault, `circuits` what is left alone because nothing comes back,
//! `probe` whether a model answers at all, `routes` which of several models is asked, `cheaper` which of two services,
//! `estimate` what rows would take, `memory` whose texts it is full of, `activity` what goes on.

mod activity;
mod answers;
mod cheaper;
mod circuits;
mod doubts;
mod estimate;
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
use self::memory::Shares;
pub use self::probe::{PROBE_IDS, PROBE_READ_TOKENS, Probe};
use crate::Settings;
use crate::cache::{Cache, Keys, TextKey};
use crate::frames::Frames;
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
    Allowance, FromGateway, Full, Item, MAX_FRAME, MAX_OUTSTANDING_BYTES, MAX_OUTSTANDING_ITEMS, Outcome, Spent, Stop,
    StopReason, Stream, Verdict, encode,
};
use crate::request::Answered;
use crate::route::Member;
use crate::row::{Row, Waiter};
use crate::ruler::{Line, Ruler};

/// Lanes without streams beyond this number are forgotten.
const MOST_IDLE_LANES: usize = 256;
/// A session that has asked nothing for so long (ms), and waits for nothing, gives its place to another one.
const IDLE: u64 = 1_000;

/// A client.
struct Conn {
    frames: Frames,
    /// When (ms) it last opened a stream or sent rows.
    came: u64,
    stream: Option<(GroupId, Rc<Stream>)>,
    /// Messages with rows that are being taken in.
    coming: usize,
    outstanding: usize,
    outstanding_bytes: usize,
    /// Bytes of a message of which a part has come.
    coming_bytes: usize,
    /// It has something to say that is not read for want of memory.
    is_held_back: bool,
    /// Reports to it, by the place of the model in its stream.
    reports: BTreeMap<usize, Report>,
    /// It was told to stop: nothing more is sent for it until it opens a stream again.
    stopped: bool,
    /// Woken when it leaves.
    left: Rc<Notify>,
}

/// Outcomes and spending that a client is to be told of a model.
#[derive(Default)]
struct Report {
    outcomes: Vec<Outcome>,
    spent: Spent,
}

impl Conn {
    /// The report on the model at this place.
    fn report(&mut self, model: usize) -> &mut Report {
        self.reports.entry(model).or_default()
    }

    /// The stream of a session.
    fn session(&self) -> Option<&Stream> {
        self.stream.as_ref().map(|(_, stream)| &**stream).filter(|stream| stream.interactive)
    }

    /// Nothing is lost with it: it has got all answers, and what it may spend need not be taken for spent.
    fn is_idle(&self) -> bool {
        let has_budget = self.stream.as_ref().is_some_and(|(_, stream)| stream.budget.is_some());
        let is_silent = self.coming == 0 && self.coming_bytes == 0 && !self.is_held_back;
        self.outstanding == 0 && is_silent && self.frames.is_empty() && !has_budget
    }

    /// It has been idle for long enough.
    fn gives_way(&self, now: u64) -> bool {
        self.is_idle() && self.came + IDLE <= now
    }
}

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

    pub fn connect(&mut self, frames: Frames) -> u64 {
        let id = self.id();
        self.conns.insert(
            id,
            Conn {
                frames,
                came: 0,
                stream: None,
                coming: 0,
                outstanding: 0,
                outstanding_bytes: 0,
                coming_bytes: 0,
                is_held_back: false,
                reports: BTreeMap::new(),
                stopped: false,
                left: Rc::new(Notify::new()),
            },
        );
        id
    }

    /// Closes a connection, once what was said to it is written.
    fn hang_up(&mut self, now: u64, conn: u64) {
        if let Some(c) = self.conns.get(&conn) {
            c.frames.hang_up();
        }
        self.disconnect(now, conn);
    }

    pub fn is_connected(&self, conn: u64) -> bool {
        self.conns.contains_key(&conn)
    }

    pub fn disconnect(&mut self, now: u64, conn: u64) {
        self.comes(conn, 0);
        self.shares = None;
        self.withdraw(conn);
        let stream = self.conns.remove(&conn).and_then(|c| {
            c.left.notify_one();
            c.stream
        });
        let Some((group, _)) = stream else { return };
        let (gone, _) = self.leave(conn, group);
        self.bytes = gone.iter().fold(self.bytes, |bytes, waiter| bytes.saturating_sub(waiter.bytes));
        self.tidy(now, group);
    }

    /// A client waits for nothing any more: all of its rows come back.
    pub fn abandon(&mut self, conn: u64) {
        self.withdraw(conn);
        let Some(group) = self.group_of(conn) else { return };
        let (gone, worst) = self.leave(conn, group);
        for (model, worst) in worst {
            if let Some(c) = self.conns.get_mut(&conn) {
                let spent = &mut c.report(model).spent;
                spent.unconfirmed_input_tokens += worst.input;
                spent.unconfirmed_output_tokens += worst.output;
            }
        }
        self.give_back(gone);
        self.flush();
    }

    /// Lets go of a client's rows that are under way. Requests that nobody else waits for are given up: what each of these may
    /// take at the worst, and by which model.
    fn leave(&mut self, conn: u64, group_id: GroupId) -> (Vec<Waiter>, Vec<(usize, Tokens)>) {
        let (mut gone, mut worst) = (Vec::new(), Vec::new());
        let Some(group) = self.groups.get_mut(group_id) else { return (gone, worst) };
        for request in self.in_flight.values_mut().filter(|r| r.group == group_id) {
            let (before, mut is_wanted) = (gone.len(), false);
            for row in &request.rows {
                gone.append(&mut group.let_go(row.key, &|c| c == conn));
                is_wanted |= !group.waiters(row).is_empty();
            }
            if !is_wanted {
                request.abandoned.notify_one();
            }
            if !is_wanted && gone.len() > before {
                // Clients that ask for its rows from now on have no part in it.
                request.is_accounted = true;
                worst.push((group.place(&request.lane), request.asked.worst));
            }
        }
        (gone, worst)
    }

    pub fn open(&mut self, now: u64, conn: u64, mut stream: Stream) -> Result<(), String> {
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        if c.outstanding > 0 {
            return Err("a stream was opened while rows of another one wait".to_owned());
        }
        if stream.interactive
            && let Some(full) = self.full(now, conn, stream.role)
        {
            self.say(conn, &FromGateway::Full(full));
            self.hang_up(now, conn);
            return Ok(());
        }
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        c.came = now;
        c.stopped = false;
        stream.task.options = stream.task.options.in_effect();
        let stream = Rc::new(stream);
        self.next_id += 1;
        let lane = self.lanes.get(&LaneKey::of(&stream));
        let (group_id, group) = self.groups.open(lane, GroupId(self.next_id), conn, &stream, &self.keys);
        let kept = &self.kept;
        for Member { lane: key, stream, .. } in &group.members {
            let new = || {
                let mut lane = Lane::new(stream.limits(), kept.lane(key), kept.known_since(), now);
                lane.learned.forms = stream.endpoint.api.dialect().forms();
                lane
            };
            let lane = self.lanes.entry(key.clone()).or_insert_with(new);
            if !lane.groups.contains(&group_id) {
                lane.groups.push(group_id);
            }
        }
        // Clients that ask the same keep it once.
        let before = c.stream.replace((group_id, Rc::clone(&group.stream)));
        self.shares = None;
        // A client that asks again after all models have stopped may have mended the cause.
        if self.out(now, group_id).is_some()
            && let Some(group) = self.groups.get_mut(group_id)
        {
            group.members.iter_mut().for_each(|member| member.stopped = None);
        }
        self.tidy(now, group_id);
        if let Some((old, _)) = before {
            self.tidy(now, old);
        }
        Ok(())
    }

    /// No client has a place any more.
    pub fn is_crowded(&self) -> Option<Full> {
        let most = self.places.sessions + self.places.others;
        (self.conns.len() >= most).then_some(Full::Gateway(most))
    }

    /// Why there is no place for the stream of a session. Those that are idle give way.
    fn full(&mut self, now: u64, conn: u64, role: u32) -> Option<Full> {
        while let Some((most, is_role)) = self.too_large_tasks(role) {
            let is_other = |stream: &Stream| !is_role || stream.role == role;
            let sessions = self.conns.iter().filter(|(id, c)| **id != conn && c.session().is_some_and(is_other));
            let Some(idlest) =
                sessions.filter(|(_, c)| c.gives_way(now)).min_by_key(|(_, c)| c.came).map(|(id, _)| *id)
            else {
                return Some(Full::Memory(most));
            };
            self.hang_up(now, idlest);
        }
        let Places { of_a_role, sessions, .. } = self.places;
        for (full, most) in [(Full::Role(of_a_role), of_a_role), (Full::Gateway(sessions), sessions)] {
            let counts = |stream: &Stream| full == Full::Gateway(sessions) || stream.role == role;
            let others = self.conns.iter().filter(|(id, c)| **id != conn && c.session().is_some_and(counts));
            let (mut count, mut idlest) = (0, None);
            for (id, c) in others {
                count += 1;
                if c.gives_way(now) && idlest.is_none_or(|(came, _)| c.came < came) {
                    idlest = Some((c.came, *id));
                }
            }
            if count < most {
                continue;
            }
            let Some((_, idlest)) = idlest else { return Some(full) };
            // It opens its stream anew when it has something to ask.
            self.hang_up(now, idlest);
        }
        None
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
