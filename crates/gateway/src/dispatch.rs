//! Takes rows from queues to requests and from answers to outcomes.
//!
//! queue → pack → reserve → send → check → settle → outcomes. Everything here is synchronous and happens on one
//! thread; only sending is not.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use llm_batch_core::answer::{self, Verdict as Read};
use llm_batch_core::dialect::{self, Finish, Reply};
use llm_batch_core::limiter::{Grant, Limiter, Limits, Refusal, Tokens};
use llm_batch_core::options::{AnswerShape, StructuredOutput};
use llm_batch_core::pack;
use llm_batch_core::prompt;
use llm_batch_core::trouble::{Parameter, Report, Trouble};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use crate::Settings;
use crate::lane::{Lane, Next, Queued};
use crate::notice::Notices;
use crate::protocol::{
    Activity, Endpoint, FromGateway, Item, MAX_OUTSTANDING_BYTES, MAX_OUTSTANDING_ITEMS, Outcome, Spent, Stop,
    StopReason, Stream, Verdict, encode,
};
use crate::request::TIMED_OUT;

/// A row that has met this many points of trouble not its own is split off, and given up when alone, if other
/// requests go through; if that many requests in a row were not answered, the provider is down.
const MOST_TROUBLE: u32 = 5;
/// But not before this much time (ms): many requests under way may fail at the same instant.
const DOWN_AFTER: u64 = 3_000;
/// First wait after a request that was not answered, ms; doubled with each further one, with jitter.
const BACKOFF: u64 = 250;
/// Longest wait after requests that were not answered, ms.
const MOST_BACKOFF: u64 = 30_000;
/// When a job may try a provider again that is down, ms.
const DOWN_FOR: u64 = 15_000;
/// Waits (ms) that are longer park the model; shorter ones are sat out.
const LONGEST_RATE_WAIT: u64 = 120_000;
/// Lanes without streams beyond this number are forgotten.
const MOST_IDLE_LANES: usize = 256;
/// Tokens a probe reserves.
const PROBE_TOKENS: Tokens = Tokens { input: 30, output: 10 };

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
    Send(Endpoint, Value, Duration),
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

    // --- clients ---------------------------------------------------------------------------------------------------

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
            },
        );
        id
    }

    pub fn disconnect(&mut self, conn: u64) {
        self.withdraw(conn);
        let stream = self.conns.remove(&conn).and_then(|c| c.stream);
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
            c.outcomes.push(Outcome { n, verdict, attempts });
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

    // --- sending ---------------------------------------------------------------------------------------------------

    /// What can be sent at `now` (ms), and when to look again.
    pub fn pump(&mut self, now: u64) -> (Vec<Launch>, Option<u64>) {
        let mut launches = Vec::new();
        let mut wake: Option<u64> = None;
        let keys: Vec<LaneKey> =
            self.lanes.iter().filter(|(_, l)| !l.groups.is_empty()).map(|(k, _)| k.clone()).collect();
        for key in keys {
            match self.pump_lane(now, &key, &mut launches) {
                Some(at) => wake = Some(wake.map_or(at, |w| w.min(at))),
                None => continue,
            }
        }
        self.flush();
        (launches, wake)
    }

    fn pump_lane(&mut self, now: u64, key: &LaneKey, launches: &mut Vec<Launch>) -> Option<u64> {
        let mut wake: Option<u64> = None;
        loop {
            let lane = self.lanes.get_mut(key)?;
            if lane.in_flight >= lane.max_concurrent {
                return wake;
            }
            lane.order();
            let largest = lane.limiter.largest_request();
            let mut found = None;
            for (i, (_, group)) in lane.groups.iter_mut().enumerate() {
                let most = largest.unwrap_or(u64::MAX).min(group.stream.model.max_request_tokens);
                let most = (most as f64 / lane.prompt_ratio.apply(1000) as f64 * 1000.0) as usize;
                match group.next(now, most) {
                    Next::Rows(rows) => {
                        found = Some((i, rows, most));
                        break;
                    }
                    Next::Until(at) => wake = Some(wake.map_or(at, |w| w.min(at))),
                    Next::Empty => {}
                }
            }
            let Some((i, rows, most)) = found else { return wake };
            let learned = lane.learned;
            let (prompt_ratio, answer_ratio) = (lane.prompt_ratio, lane.answer_ratio);
            let (group_key, group) = lane.groups.get_mut(i)?;
            let group_key = group_key.clone();
            let options = &group.stream.task.options;
            let ids = random_ids(rows.len());
            let format = learned.format(options.structured_output);
            let response_format = prompt::response_format(options.answer_shape, format, &group.legend, &ids);
            let estimate = group.tokens(&rows, response_format.as_ref());
            let reserve =
                Tokens { input: prompt_ratio.apply(estimate.input), output: answer_ratio.apply(estimate.output) };
            if rows.len() == 1 && (estimate.input + estimate.output) as usize > most {
                for row in rows {
                    self.outcome(row.conn, row.n, row.bytes, row.attempts, too_long());
                }
                continue;
            }
            let grant = match lane.limiter.reserve(now, reserve) {
                Ok(grant) => grant,
                Err(Refusal::Until(at)) => {
                    let (_, group) = lane.groups.get_mut(i)?;
                    group.put_back(rows);
                    return Some(wake.map_or(at, |w| w.min(at)));
                }
                Err(Refusal::TooLarge) => {
                    self.too_large(now, key, &group_key, rows);
                    continue;
                }
            };
            let (_, group) = lane.groups.get_mut(i)?;
            let (system, user) = group.messages(&rows, &ids);
            let body = dialect::body(&dialect::Request {
                model: &group.stream.model.model,
                system,
                user: &user,
                max_tokens: answer_ratio.apply(estimate.output) * 2 + learned.spare_answer_tokens,
                max_completion_tokens: learned.max_completion_tokens,
                response_format,
                parameters: &group.stream.model.parameters,
            });
            let stream = Rc::clone(&group.stream);
            let timeout = Duration::from_millis(stream.model.request_timeout_ms);
            group.in_flight += 1;
            group.count_served(rows.len());
            lane.in_flight += 1;
            lane.in_flight_rows += rows.len();
            lane.requests_total += 1;
            lane.rows_total += rows.len() as u64;
            let abandoned = Rc::new(Notify::new());
            let id = self.id();
            launches.push(Launch { id, stream, body, timeout, abandoned: Rc::clone(&abandoned) });
            self.in_flight.insert(
                id,
                InFlight {
                    lane: key.clone(),
                    group: group_key,
                    rows,
                    ids,
                    grant,
                    estimate,
                    format,
                    max_completion_tokens: learned.max_completion_tokens,
                    abandoned,
                },
            );
        }
    }

    // --- answers ---------------------------------------------------------------------------------------------------

    /// Takes a finished request; `None` if it was abandoned.
    pub fn finish(&mut self, now: u64, id: u64, result: Option<Result<Reply, Report>>) {
        let Some(request) = self.in_flight.remove(&id) else { return };
        let Some(lane) = self.lanes.get_mut(&request.lane) else { return };
        lane.in_flight = lane.in_flight.saturating_sub(1);
        lane.in_flight_rows = lane.in_flight_rows.saturating_sub(request.rows.len());
        if let Some(group) = lane.group(&request.group) {
            group.in_flight = group.in_flight.saturating_sub(1);
        }
        let lane_key = request.lane.clone();
        match result {
            // Whoever asked has gone; what it took is not known and stays reserved.
            None => self.give_back(request.rows),
            Some(Ok(reply)) => self.answered(now, request, &reply),
            Some(Err(report)) => self.troubled(now, request, &report),
        }
        self.flush();
        self.tidy(&lane_key);
    }

    fn answered(&mut self, now: u64, request: InFlight, reply: &Reply) {
        let InFlight { lane: lane_key, group: group_key, rows, ids, grant, estimate, .. } = request;
        let usage = reply.usage.unwrap_or(estimate);
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        lane.limiter.settle(grant, usage);
        lane.prompt_ratio.observe(estimate.input, usage.input);
        lane.answers(now);
        if reply.finish == Finish::Length {
            lane.learned.answers_are_cut();
        } else {
            lane.answer_ratio.observe(estimate.output, usage.output);
        }
        let Some(group) = lane.group(&group_key) else { return };
        group.succeeded = true;
        let legend = Rc::clone(&group.legend);
        let options = group.stream.task.options.clone();
        let read = answer::read(&reply.text, &ids, &legend);
        self.spend(&rows, usage);

        let size = rows.len();
        let mut missing = 0;
        for (mut row, verdict) in rows.into_iter().zip(read) {
            row.attempts += 1;
            let last = row.attempts >= options.max_attempts;
            let given_up = |class: &str, detail: &str| Verdict::Skip { class: class.into(), detail: detail.into() };
            let failed = |class: &str, detail: &str| Verdict::Fail { class: class.into(), detail: detail.into() };
            let done = match (verdict, reply.finish) {
                (Read::Label(i), _) => Some(Verdict::Label(i as u32)),
                (_, Finish::Refused) if size == 1 => {
                    Some(given_up("refused", "the model or its filter refused to answer"))
                }
                (Read::Missing, Finish::Length) if last => {
                    Some(given_up("no_answer", "the answer was cut off before it came to this row"))
                }
                (Read::Missing, _) if last => Some(given_up("no_answer", "the model gave no answer for this row")),
                (Read::UnknownCode, _) if last => {
                    Some(failed("unknown_code", "the model answered with something that is not among the labels"))
                }
                (Read::Contradicted, _) if last => {
                    Some(failed("contradicted", "the model gave two different answers for this row"))
                }
                _ => None,
            };
            match done {
                Some(verdict) => self.outcome(row.conn, row.n, row.bytes, row.attempts, verdict),
                None => {
                    missing += 1;
                    row.most_rows = pack::rows_after(row.attempts, options.max_attempts, size);
                    self.again(&lane_key, &group_key, row);
                }
            }
        }
        if missing > 0 {
            let what = match reply.finish {
                Finish::Length => "an answer was cut off",
                Finish::Refused => "the model or its filter refused to answer",
                Finish::Complete => "an answer was incomplete",
            };
            let message = format!("{what}: {missing} of {size} rows are asked again");
            self.notice(now, &lane_key, "incomplete", &message);
        }
    }

    fn troubled(&mut self, now: u64, request: InFlight, report: &Report) {
        let InFlight { lane: lane_key, group: group_key, mut rows, grant, format, max_completion_tokens, .. } = request;
        let message = report.message.clone();
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        match report.trouble {
            Trouble::Rate(_) => lane.throttled += 1,
            Trouble::Unsupported(_) | Trouble::TooLarge => {}
            _ => {
                lane.errors += 1;
                lane.last_error = Some(message.clone());
            }
        }
        // Refused requests took nothing. Of requests that broke off it is not known, so what was reserved stays.
        if !matches!(report.trouble, Trouble::Overload(_)) {
            lane.limiter.settle(grant, Tokens::default());
        }
        let size = rows.len();
        let succeeded = lane.group(&group_key).is_some_and(|g| g.succeeded);
        match &report.trouble {
            Trouble::Rate(wait) if wait.is_some_and(|w| w > LONGEST_RATE_WAIT) => {
                self.stop_with(now, &lane_key, None, rows, StopReason::Quota, message, *wait);
            }
            Trouble::Rate(wait) => {
                // Without a word from the provider, the more refusals in a row the longer.
                lane.failures += 1;
                let wait = wait.unwrap_or_else(|| backoff(lane.failures));
                lane.limiter.penalize(now + wait + fastrand::u64(0..=wait / 8 + 1));
                self.put_back(&lane_key, &group_key, rows);
                self.notice(now, &lane_key, "throttled", &format!("{message}; waiting for {wait} ms"));
            }
            Trouble::TooLarge => {
                self.notice(
                    now,
                    &lane_key,
                    "too large",
                    &format!("{message}; {size} rows are sent in smaller requests"),
                );
                self.too_large(now, &lane_key, &group_key, rows);
            }
            Trouble::Unsupported(parameter) => {
                let learned = match parameter {
                    Parameter::MaxTokens if !max_completion_tokens => {
                        lane.learned.max_completion_tokens = true;
                        true
                    }
                    Parameter::MaxTokens => false,
                    Parameter::ResponseFormat => weaker(lane, &group_key, format),
                };
                if learned {
                    self.put_back(&lane_key, &group_key, rows);
                    self.notice(now, &lane_key, "unsupported", &format!("{message}; going on without it"));
                } else {
                    self.stop_with(now, &lane_key, Some(&group_key), rows, StopReason::Rejected, message, None);
                }
            }
            Trouble::Auth => self.stop_with(now, &lane_key, Some(&group_key), rows, StopReason::Auth, message, None),
            Trouble::Spend => self.stop_with(now, &lane_key, None, rows, StopReason::Spend, message, None),
            Trouble::Quota(wait) => self.stop_with(now, &lane_key, None, rows, StopReason::Quota, message, *wait),
            Trouble::NotFound => {
                self.stop_with(now, &lane_key, Some(&group_key), rows, StopReason::NotFound, message, None)
            }
            Trouble::Rejected if !succeeded => {
                self.stop_with(now, &lane_key, Some(&group_key), rows, StopReason::Rejected, message, None);
            }
            Trouble::Filtered | Trouble::Rejected if size == 1 => {
                let verdict = if report.trouble == Trouble::Filtered {
                    Verdict::Skip { class: "refused".into(), detail: message }
                } else {
                    Verdict::Fail { class: "rejected".into(), detail: message }
                };
                for row in rows {
                    self.outcome(row.conn, row.n, row.bytes, row.attempts + 1, verdict.clone());
                }
            }
            Trouble::Filtered | Trouble::Rejected => {
                self.notice(
                    now,
                    &lane_key,
                    "rejected",
                    &format!("{message}; {size} rows are sent in smaller requests"),
                );
                for mut row in rows {
                    row.most_rows = size.div_ceil(2);
                    self.again(&lane_key, &group_key, row);
                }
            }
            Trouble::Overload(wait) => {
                let points = if message == TIMED_OUT { 2 } else { 1 };
                lane.failures += points;
                let failing_since = *lane.failing_since.get_or_insert(now);
                if lane.failures >= MOST_TROUBLE && now >= failing_since + DOWN_AFTER {
                    self.stop_with(now, &lane_key, None, rows, StopReason::ProviderDown, message, Some(DOWN_FOR));
                    return;
                }
                if let Some(wait) = wait {
                    lane.limiter.penalize(now + wait.min(&MOST_BACKOFF));
                }
                // One wait for all rows, so that they stay together.
                let worst = rows.iter().map(|r| r.trouble).max().unwrap_or(0) + points;
                let not_before = now + backoff(worst);
                for row in &mut rows {
                    row.trouble += points;
                    row.not_before = not_before;
                }
                self.notice(
                    now,
                    &lane_key,
                    "unanswered",
                    &format!("a request was not answered and is sent again: {message}"),
                );
                for row in rows {
                    self.row_in_trouble(&lane_key, &group_key, row, size, &message);
                }
            }
        }
    }

    /// A row whose request was not answered, while others are: it waits, then its requests get smaller, then it is
    /// given up.
    fn row_in_trouble(&mut self, lane: &LaneKey, group: &str, mut row: Queued, size: usize, message: &str) {
        if row.trouble >= MOST_TROUBLE {
            if size == 1 {
                let verdict = Verdict::Fail { class: "provider_error".into(), detail: message.to_owned() };
                self.outcome(row.conn, row.n, row.bytes, row.attempts, verdict);
                return;
            }
            row.most_rows = size.div_ceil(2);
            row.trouble = MOST_TROUBLE - 2;
        }
        self.again(lane, group, row);
    }

    fn too_large(&mut self, now: u64, lane: &LaneKey, group: &str, rows: Vec<Queued>) {
        let size = rows.len();
        for mut row in rows {
            if size == 1 {
                self.outcome(row.conn, row.n, row.bytes, row.attempts, too_long());
            } else {
                row.most_rows = size.div_ceil(2);
                row.not_before = now;
                self.again(lane, group, row);
            }
        }
    }

    /// Whether anybody still wants a row to be sent.
    fn is_wanted(&self, row: &Queued) -> bool {
        self.conns.get(&row.conn).is_some_and(|c| !c.stopped)
    }

    /// Queues rows again that were refused through no trouble of theirs.
    fn put_back(&mut self, lane: &LaneKey, group: &str, rows: Vec<Queued>) {
        let (wanted, rest) = rows.into_iter().partition(|row| self.is_wanted(row));
        self.give_back(rest);
        match self.lanes.get_mut(lane).and_then(|l| l.group(group)) {
            Some(g) => g.put_back(wanted),
            None => self.give_back(wanted),
        }
    }

    /// Queues a row again for another request.
    fn again(&mut self, lane: &LaneKey, group: &str, row: Queued) {
        let wanted = self.is_wanted(&row);
        match self.lanes.get_mut(lane).and_then(|l| l.group(group)) {
            Some(g) if wanted => g.push_again(row),
            _ => self.outcome(row.conn, row.n, row.bytes, row.attempts, Verdict::Withdrawn),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn stop_with(
        &mut self,
        now: u64,
        lane: &LaneKey,
        group: Option<&str>,
        rows: Vec<Queued>,
        reason: StopReason,
        message: String,
        retry_after_ms: Option<u64>,
    ) {
        self.notice(now, lane, "stopped", &message);
        self.give_back(rows);
        self.stop(lane, group, &Stop { reason, message, retry_after_ms });
    }

    /// Shares the tokens of a request among the clients whose rows were in it; nothing is lost by rounding.
    fn spend(&mut self, rows: &[Queued], usage: Tokens) {
        let mut by_conn: BTreeMap<u64, u64> = BTreeMap::new();
        for row in rows {
            *by_conn.entry(row.conn).or_default() += 1;
        }
        let all = rows.len().max(1) as u64;
        let (mut before, mut first) = (0, true);
        for (conn, n) in by_conn {
            let share = |total: u64| total * (before + n) / all - total * before / all;
            if let Some(c) = self.conns.get_mut(&conn) {
                c.spent.requests += u64::from(first);
                c.spent.input_tokens += share(usage.input);
                c.spent.output_tokens += share(usage.output);
            }
            before += n;
            first = false;
        }
    }

    fn notice(&mut self, now: u64, lane: &LaneKey, class: &str, message: &str) {
        if let Some(line) = self.notices.line(now, &format!("{} {} {class}", lane.0, lane.1), message) {
            // The receiver lives as long as the gateway.
            let _ = self.log.send(format!("llm_batch: model \"{}\": {line}", lane.1));
        }
    }

    // --- probes and views ------------------------------------------------------------------------------------------

    /// Prepares a probe of a client's model.
    pub fn probe(&mut self, now: u64, conn: u64) -> Option<Probe> {
        let (lane_key, _, stream) = self.conns.get(&conn)?.stream.clone()?;
        if !self.settings.enabled {
            return Some(Probe::Disabled);
        }
        let lane = self.lanes.get_mut(&lane_key)?;
        if lane.last_success.is_some_and(|at| at + 60_000 > now) {
            return Some(Probe::Alive);
        }
        match lane.limiter.reserve(now, PROBE_TOKENS) {
            Ok(grant) => lane.limiter.settle(grant, PROBE_TOKENS),
            Err(Refusal::Until(at)) => return Some(Probe::Until(at)),
            Err(Refusal::TooLarge) => {}
        }
        let body = dialect::body(&dialect::Request {
            model: &stream.model.model,
            system: "Answer with one word.",
            user: "Say ok.",
            max_tokens: 16,
            max_completion_tokens: lane.learned.max_completion_tokens,
            response_format: None,
            parameters: &stream.model.parameters,
        });
        let timeout = Duration::from_millis(stream.model.request_timeout_ms.min(60_000));
        Some(Probe::Send(stream.endpoint.clone(), body, timeout))
    }

    /// What a probe's end means: `None` if it is to be sent again, else the answer to give.
    pub fn probed(&mut self, now: u64, conn: u64, tries: u32, result: Result<Reply, Report>) -> Option<Option<Stop>> {
        let (lane_key, _, _) = self.conns.get(&conn)?.stream.clone()?;
        let Err(report) = result else {
            if let Some(lane) = self.lanes.get_mut(&lane_key) {
                lane.answers(now);
            }
            return Some(None);
        };
        let message = report.message;
        let lane = self.lanes.get_mut(&lane_key)?;
        let stop = |reason, retry_after_ms| Some(Some(Stop { reason, message: message.clone(), retry_after_ms }));
        match report.trouble {
            Trouble::Rate(_) | Trouble::TooLarge | Trouble::Filtered => Some(None),
            Trouble::Unsupported(Parameter::MaxTokens) if !lane.learned.max_completion_tokens => {
                lane.learned.max_completion_tokens = true;
                None
            }
            Trouble::Overload(_) if tries < 3 && message != TIMED_OUT => None,
            Trouble::Overload(_) => stop(StopReason::ProviderDown, Some(DOWN_FOR)),
            Trouble::Auth => stop(StopReason::Auth, None),
            Trouble::Spend => stop(StopReason::Spend, None),
            Trouble::Quota(wait) => stop(StopReason::Quota, wait),
            Trouble::NotFound => stop(StopReason::NotFound, None),
            Trouble::Unsupported(_) | Trouble::Rejected => stop(StopReason::Rejected, None),
        }
    }

    pub fn say(&mut self, conn: u64, message: &FromGateway) {
        if let Some(c) = self.conns.get(&conn) {
            say(c, message);
        }
    }

    pub fn activity(&mut self, now: u64) -> Vec<Activity> {
        let mut roles: HashMap<&LaneKey, Vec<u32>> = HashMap::new();
        for (lane, _, stream) in self.conns.values().filter_map(|c| c.stream.as_ref()) {
            roles.entry(lane).or_default().push(stream.role);
        }
        self.lanes
            .iter_mut()
            .map(|(key, lane)| {
                let usage = lane.limiter.usage(now);
                Activity {
                    account: key.0.clone(),
                    model: key.1.clone(),
                    roles: roles.get(key).cloned().unwrap_or_default(),
                    queued: lane.groups.iter().map(|(_, g)| g.queued() as u64).sum(),
                    in_flight_requests: lane.in_flight as u64,
                    in_flight_rows: lane.in_flight_rows as u64,
                    tokens_in_window: usage.tokens,
                    tokens_limit: usage.tokens_limit,
                    requests_in_window: usage.requests,
                    requests_limit: usage.requests_limit,
                    used: usage.used,
                    waiting_ms: lane.limiter.blocked_until().checked_sub(now).filter(|ms| *ms > 0),
                    requests_total: lane.requests_total,
                    rows_total: lane.rows_total,
                    throttled: lane.throttled,
                    errors: lane.errors,
                    last_error: lane.last_error.clone(),
                }
            })
            .collect()
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

/// Falls back to the next weaker form of `response_format` than the one that was refused. False if there is none, or
/// if the task insists on the form.
fn weaker(lane: &mut Lane, group: &str, refused: StructuredOutput) -> bool {
    let Some(group) = lane.group(group) else { return false };
    let options = &group.stream.task.options;
    if options.structured_output != StructuredOutput::Auto {
        return false;
    }
    let next = match (refused, options.answer_shape) {
        (StructuredOutput::Auto, AnswerShape::Map) | (StructuredOutput::JsonObject, _) => StructuredOutput::None,
        (StructuredOutput::Auto | StructuredOutput::JsonSchema, _) => StructuredOutput::JsonObject,
        (StructuredOutput::None, _) => return false,
    };
    // Requests that were under way together are refused together; only the first changes anything.
    if lane.learned.format == refused {
        lane.learned.format = next;
    }
    true
}

/// A wait (ms) after so many failures: doubled with each, with jitter.
fn backoff(failures: u32) -> u64 {
    let wait = (BACKOFF << failures.saturating_sub(1).min(10)).min(MOST_BACKOFF);
    wait * 3 / 4 + fastrand::u64(0..=wait / 2)
}

/// Distinct numbers of three digits, each one token, in random order.
fn random_ids(n: usize) -> Vec<u16> {
    let mut ids = fastrand::choose_multiple(100..1000, n);
    fastrand::shuffle(&mut ids);
    ids
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_distinct_three_digits() {
        for n in [1, 50, 500] {
            let mut ids = random_ids(n);
            assert_eq!(ids.len(), n);
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), n);
            assert!(ids.iter().all(|i| (100..1000).contains(i)));
        }
    }
}
