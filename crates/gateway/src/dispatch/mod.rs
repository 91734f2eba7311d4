//! Takes rows from queues to requests and from answers to outcomes.
//!
//! queue → pack → reserve → send → check → settle → outcomes. Everything here is synchronous and happens on one
//! thread; only sending is not. This file has the state and the clients, `send` what goes out, `answers` and `troubles`
//! what comes back, `probes` what is asked about the state.

mod answers;
mod probes;
mod send;
mod troubles;

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use llm_batch_core::limiter::{Grant, Limiter, Limits, Tokens};
use llm_batch_core::options::StructuredOutput;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use crate::Settings;
use crate::lane::{Lane, Queued};
use crate::notice::Notices;
use crate::protocol::{
    Endpoint, FromGateway, Item, MAX_OUTSTANDING_BYTES, MAX_OUTSTANDING_ITEMS, Outcome, Spent, Stop, StopReason,
    Stream, Verdict, encode,
};

/// When a job may try a provider again that is down, ms.
const DOWN_FOR: u64 = 15_000;
/// Lanes without streams beyond this number are forgotten.
const MOST_IDLE_LANES: usize = 256;

/// Account and model.
pub type LaneKey = (String, String);

/// A client.
struct Conn {
    frames: UnboundedSender<Vec<u8>>,
    stream: Option<(LaneKey, String, Rc<Stream>)>,
    outstanding: usize,
    outstanding_bytes: usize,
    outcomes: Vec<Outcome>,
    spent: Spent,
    /// It was told to stop: nothing more is sent for it until it opens a stream again.
    stopped: bool,
    /// Woken when it leaves.
    left: Rc<Notify>,
}

/// A request under way.
pub struct InFlight {
    lane: LaneKey,
    group: String,
    rows: Vec<Queued>,
    ids: Vec<u16>,
    grant: Grant,
    /// By our count.
    estimate: Tokens,
    /// When (ms) it was sent.
    sent: u64,
    /// What was asked for.
    format: StructuredOutput,
    max_completion_tokens: bool,
    /// Woken when all clients that wait for it have gone.
    abandoned: Rc<Notify>,
}

/// A request to send.
pub struct Launch {
    pub id: u64,
    pub stream: Rc<Stream>,
    pub body: Value,
    pub timeout: Duration,
    pub abandoned: Rc<Notify>,
}

/// What a probe is to do.
pub enum Probe {
    /// The model answered a moment ago.
    Alive,
    /// Nothing may be sent at all.
    Disabled,
    /// Not before this time (ms).
    Until(u64),
    /// To whom, what, how long it may take; and what is woken if nobody waits for it any more.
    Send(Endpoint, Value, Duration, Rc<Notify>),
}

/// All of the gateway's state.
pub struct State {
    pub settings: Settings,
    /// When (ms) the gateway started.
    started: u64,
    conns: HashMap<u64, Conn>,
    lanes: BTreeMap<LaneKey, Lane>,
    in_flight: HashMap<u64, InFlight>,
    next_id: u64,
    /// Bytes of text that wait or are under way.
    bytes: usize,
    notices: Notices,
    log: mpsc::Sender<String>,
}

impl State {
    pub fn new(settings: Settings, started: u64, log: mpsc::Sender<String>) -> Self {
        Self {
            settings,
            started,
            conns: HashMap::new(),
            lanes: BTreeMap::new(),
            in_flight: HashMap::new(),
            next_id: 0,
            bytes: 0,
            notices: Notices::default(),
            log,
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn connect(&mut self, frames: UnboundedSender<Vec<u8>>) -> u64 {
        let id = self.id();
        self.conns.insert(
            id,
            Conn {
                frames,
                stream: None,
                outstanding: 0,
                outstanding_bytes: 0,
                outcomes: Vec::new(),
                spent: Spent::default(),
                stopped: false,
                left: Rc::new(Notify::new()),
            },
        );
        id
    }

    pub fn disconnect(&mut self, conn: u64) {
        self.withdraw(conn);
        let stream = self.conns.remove(&conn).and_then(|c| {
            c.left.notify_one();
            c.stream
        });
        for request in self.in_flight.values() {
            if !request.rows.iter().any(|r| self.conns.contains_key(&r.conn)) {
                request.abandoned.notify_one();
            }
        }
        if let Some((lane, _, _)) = stream {
            self.tidy(&lane);
        }
    }

    /// Memory is full: no more is read from clients for now.
    pub fn is_full(&self) -> bool {
        self.bytes >= self.settings.memory
    }

    pub fn open(&mut self, conn: u64, stream: Stream) -> Result<(), String> {
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        if c.outstanding > 0 {
            return Err("a stream was opened while rows of another one wait".to_owned());
        }
        let lane_key = (account(&stream.endpoint), stream.model.model.clone());
        let group_key = serde_json::to_string(&stream).map_err(|e| e.to_string())?;
        c.stopped = false;
        let before = c.stream.replace((lane_key.clone(), group_key.clone(), Rc::new(stream.clone())));
        let started = self.started;
        let limits = stream.model.limits();
        let lane = self.lanes.entry(lane_key.clone()).or_insert_with(|| Lane::new(Limiter::new(limits, started)));
        lane.group_or_new(&group_key, &stream);
        self.tidy(&lane_key);
        if let Some((old, _, _)) = before {
            self.tidy(&old);
        }
        Ok(())
    }

    /// Brings a lane in line with the streams that are open on it: the smallest limits, groups that are used.
    fn tidy(&mut self, key: &LaneKey) {
        let on_lane = |c: &&Conn| c.stream.as_ref().is_some_and(|(lane, _, _)| lane == key);
        let open: Vec<&Conn> = self.conns.values().filter(on_lane).collect();
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.groups.retain(|(k, g)| {
                g.in_flight > 0
                    || g.queued() > 0
                    || open.iter().filter_map(|c| c.stream.as_ref()).any(|(_, group, _)| group == k)
            });
            // Sessions keep their streams open; only those with rows under way have a say. Without any the limits
            // stay: what was sent under them still counts.
            let busy: Vec<&Stream> = open
                .iter()
                .filter(|c| c.outstanding > 0)
                .filter_map(|c| c.stream.as_ref())
                .map(|(_, _, s)| &**s)
                .collect();
            if let Some(limits) = busy.iter().map(|s| s.model.limits()).reduce(Limits::min) {
                lane.limiter.set_limits(limits);
                lane.set_max_concurrent(busy.iter().filter_map(|s| s.model.max_concurrent_requests).min());
            }
        }
        if self.lanes.len() > MOST_IDLE_LANES {
            self.lanes.retain(|_, lane| !lane.is_idle());
        }
    }

    pub fn items(&mut self, now: u64, conn: u64, items: Vec<Item>) -> Result<(), String> {
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        let Some((lane, group, _)) = c.stream.clone() else {
            return Err("rows came before a stream was opened".to_owned());
        };
        let was_idle = c.outstanding == 0;
        for item in items {
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
            if c.stopped {
                self.outcome(conn, item.n, bytes, 0, Verdict::Withdrawn);
                continue;
            }
            if let Some(g) = self.lanes.get_mut(&lane).and_then(|l| l.group(&group))
                && let Err(n) = g.push(now, conn, item)
            {
                self.outcome(conn, n, bytes, 0, too_long());
            }
        }
        if was_idle {
            self.tidy(&lane);
        }
        if !self.settings.enabled {
            self.stop(&lane, Some(&group), &disabled());
        }
        self.flush();
        Ok(())
    }

    pub fn withdraw(&mut self, conn: u64) {
        let Some(c) = self.conns.get_mut(&conn) else { return };
        c.stopped = true;
        let Some((lane, group, _)) = c.stream.clone() else { return };
        let rows = self.lanes.get_mut(&lane).and_then(|l| l.group(&group)).map(|g| g.withdraw(Some(conn)));
        self.give_back(rows.unwrap_or_default());
        self.flush();
    }

    fn give_back(&mut self, rows: Vec<Queued>) {
        for row in rows {
            self.outcome(row.conn, row.n, row.bytes, row.attempts, Verdict::Withdrawn);
        }
    }

    fn outcome(&mut self, conn: u64, n: u64, bytes: usize, attempts: u32, verdict: Verdict) {
        self.bytes = self.bytes.saturating_sub(bytes);
        if let Some(c) = self.conns.get_mut(&conn) {
            c.outstanding = c.outstanding.saturating_sub(1);
            c.outstanding_bytes = c.outstanding_bytes.saturating_sub(bytes);
            c.outcomes.push(Outcome { n, verdict, attempts, reused: false });
        }
    }

    /// Sends what has gathered for each client.
    fn flush(&mut self) {
        for c in self.conns.values_mut() {
            if !c.outcomes.is_empty() || c.spent != Spent::default() {
                let outcomes = std::mem::take(&mut c.outcomes);
                let spent = std::mem::take(&mut c.spent);
                say(c, &FromGateway::Outcomes { outcomes, spent });
            }
        }
    }

    /// Stops the streams of a lane, or of one group of it: their waiting rows go back.
    fn stop(&mut self, lane_key: &LaneKey, group: Option<&str>, stop: &Stop) {
        let Some(lane) = self.lanes.get_mut(lane_key) else { return };
        let mut rows = Vec::new();
        for (key, g) in &mut lane.groups {
            if group.is_none_or(|wanted| wanted == key) {
                rows.append(&mut g.withdraw(None));
            }
        }
        self.give_back(rows);
        // The reason goes first: a client that saw only rows come back would send them again.
        for c in self.conns.values_mut() {
            if c.stream.as_ref().is_some_and(|(l, g, _)| l == lane_key && group.is_none_or(|wanted| wanted == g)) {
                c.stopped = true;
                say(c, &FromGateway::Stopped(stop.clone()));
            }
        }
        self.flush();
    }

    pub fn configure(&mut self, settings: Settings) {
        let off = self.settings.enabled && !settings.enabled;
        self.settings = settings;
        if off {
            let keys: Vec<LaneKey> = self.lanes.keys().cloned().collect();
            for key in keys {
                self.stop(&key, None, &disabled());
            }
            for request in self.in_flight.values() {
                request.abandoned.notify_one();
            }
        }
    }
}

fn say(conn: &Conn, message: &FromGateway) {
    // Of a client that has gone the reading side takes notice.
    if let Ok(frame) = encode(message) {
        let _ = conn.frames.send(frame);
    }
}

fn too_long() -> Verdict {
    Verdict::Skip { class: "too_long".into(), detail: "the text is larger than a request may be".into() }
}

/// Why nothing is sent while `llm_batch.enabled` is off.
pub fn disabled() -> Stop {
    Stop { reason: StopReason::Disabled, message: "llm_batch.enabled is off".into(), retry_after_ms: None }
}

/// Whose limits an endpoint is under: as the user named it, else the URL, and a mark of the key.
fn account(endpoint: &Endpoint) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    if let Some(account) = &endpoint.account {
        return account.clone();
    }
    match &endpoint.api_key {
        None => endpoint.base_url.clone(),
        Some(key) => {
            let mut hasher = DefaultHasher::new();
            key.0.hash(&mut hasher);
            format!("{} (key {:08x})", endpoint.base_url, hasher.finish() as u32)
        }
    }
}
