//! Sending: takes packs from the queues within the limits.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use llm_batch_core::dialect::{self, Counts};
use llm_batch_core::limiter::{Refusal, Tokens};
use llm_batch_core::prompt;
use serde_json::Value;
use tokio::sync::Notify;

use super::{Asked, InFlight, Launch, State, circuits, say};
use crate::group::{Group, Next};
use crate::key::{GroupId, LaneKey};
use crate::lane::{Lane, Learned, MOST_SPARE_ANSWER_TOKENS, Measured};
use crate::numbers::Numbers;
use crate::protocol::FromGateway;
use crate::purse::Pays;
use crate::row::Row;

/// A request that is cut to fit keeps at least one of so many rows.
const LEAST_PART: usize = 4;

/// A request as it would be sent.
pub(super) struct Draft {
    ids: Vec<u16>,
    response_format: Option<Value>,
    /// By our count.
    pub estimate: Tokens,
    /// What it may take at the worst: of its prompt; and the cap of its answer.
    pub worst: Tokens,
    /// What is reserved for it.
    reserve: Tokens,
    /// The cap of its answer might be larger.
    can_grow: bool,
    /// What is expected of its answer by itself, without what is thought before it.
    expected: u64,
}

impl Draft {
    /// `largest`: most tokens of a request, prompt and answer.
    pub fn new(
        numbers: &Numbers,
        (learned, measured): (Learned, Measured),
        group: &Group,
        rows: &[Row],
        largest: u64,
    ) -> Self {
        let options = &group.stream.task.options;
        let ids = numbers.draw(rows.len());
        let form = learned.form(options);
        let response_format = prompt::response_format(options.answer_shape, form, &*group.kind, &ids);
        let estimate = group.tokens(rows, response_format.as_ref());
        let prompt = measured.prompt.apply(estimate.input);
        let expected = measured.expected_answer(estimate.output);
        // What is spared must not make a request too large that would not be without.
        let most = largest.saturating_sub(prompt).max(expected).min(learned.most_answer_tokens);
        let most_answer = measured.most_answer(estimate.output, learned.spare_answer_tokens).min(most);
        let reserved = expected + measured.thinking.reserved();
        Self {
            ids,
            response_format,
            estimate,
            worst: Tokens { input: measured.most_prompt(estimate.input), output: most_answer },
            reserve: group.stream.endpoint.counts.reserve(prompt, reserved.min(most_answer), most_answer),
            can_grow: most_answer < most && most_answer < MOST_SPARE_ANSWER_TOKENS,
            expected,
        }
    }

    /// What is thought before an answer makes no request too large for the limit of answers (`most`): that would be so for
    /// every row.
    fn within(mut self, most: Option<u64>, counts: Counts) -> Self {
        let Some(most) = most.map(|most| most.max(self.expected)) else { return self };
        if counts != Counts::Used && self.worst.output > most {
            (self.worst.output, self.can_grow) = (most, false);
        }
        self.reserve.output = self.reserve.output.min(most);
        self
    }

    pub fn body(&self, learned: Learned, group: &Group, rows: &[Row]) -> Value {
        let (system, user) = group.messages(rows, &self.ids);
        dialect::body(&dialect::Request {
            model: &group.stream.model.model,
            system,
            no_system_role: learned.no_system_role,
            user: &user,
            max_tokens: self.worst.output,
            max_completion_tokens: learned.max_completion_tokens,
            response_format: self.response_format.clone(),
            parameters: &group.stream.model.parameters,
        })
    }
}

/// Tokens of a request (of `largest`) that may be rows and their answers: what is thought before an answer has its part.
pub(super) fn rows_of(learned: Learned, measured: Measured, largest: u64) -> u64 {
    let thinking = if measured.thinking.usual() > 0 { measured.spared(learned.spare_answer_tokens) } else { 0 };
    largest - thinking.min(largest / 4 * 3)
}

/// What a look at a lane's queues came to.
enum Look {
    Sent,
    /// These rows of a group are larger than a request may be; and why.
    TooLarge(GroupId, Vec<Row>, String),
    /// Nothing can be sent now.
    Nothing,
}

impl State {
    /// A request is sent now (ms): since it was granted, other work may have gone before it.
    pub fn sent(&mut self, now: u64, id: u64) {
        let Some(mut request) = self.in_flight.remove(&id) else { return };
        if let Some(lane) = self.lanes.get_mut(&request.lane) {
            request.grant = lane.limiter.sent(request.grant, now);
            request.asked.sent = now;
        }
        self.in_flight.insert(id, request);
    }

    /// What can be sent at `now` (ms), and when to look again.
    pub fn pump(&mut self, now: u64) -> (Vec<Launch>, Option<u64>) {
        let mut launches = Vec::new();
        let mut wake: Option<u64> = None;
        self.probe_circuits(now, &mut launches, &mut wake);
        // The next place is the lane's that has the fewest requests under way; of several, whose last one is the oldest.
        let turn = |lane: &Lane, key: &LaneKey| (lane.in_flight, lane.last_request, key.clone());
        let lanes = self.lanes.iter().filter(|(_, lane)| !lane.groups.is_empty());
        let mut turns: BTreeSet<(usize, u64, LaneKey)> = lanes.map(|(key, lane)| turn(lane, key)).collect();
        let mut changed = BTreeSet::new();
        while let Some((.., key)) = turns.pop_first() {
            match self.look(now, &key, &mut launches, &mut wake) {
                Look::Sent => {}
                Look::TooLarge(group, rows, why) => {
                    let size = rows.len();
                    self.too_large(now, (&key, group), rows, size, &why);
                    self.release_last(&key, group);
                }
                Look::Nothing => continue,
            }
            turns.extend(self.lanes.get(&key).map(|lane| turn(lane, &key)));
            changed.insert(key);
        }
        for key in changed {
            self.note(now, &key);
        }
        self.flush();
        (launches, wake)
    }

    /// Most requests that a lane may have under way for what others have. Requests to a server that has stopped answering give
    /// their places back only when their time is up, so some are left for the next lane: a lane may have as many
    /// as are free, of half of all those of its account, and no more than an eighth of all.
    fn room(&self, key: &LaneKey) -> usize {
        let all = self.places.requests;
        let first = LaneKey { account: Rc::clone(&key.account), model: "".into() };
        let lanes = self.lanes.range(first..).take_while(|(lane, _)| lane.account == key.account);
        let of_account: usize = lanes.map(|(_, lane)| lane.in_flight).sum();
        let free = all.saturating_sub(self.in_flight.len() + self.probing.len());
        free.min(all.div_ceil(2).saturating_sub(of_account)).min(all.div_ceil(8))
    }

    /// Sends one request of a lane, if that can be done now; else notes when to look again.
    fn look(&mut self, now: u64, key: &LaneKey, launches: &mut Vec<Launch>, wake: &mut Option<u64>) -> Look {
        let mut later = |at: u64| *wake = Some(wake.map_or(at, |w| w.min(at)));
        let most = self.room(key);
        let Some(lane) = self.lanes.get_mut(key) else { return Look::Nothing };
        lane.order();
        let (allowed, allowed_interactive) = (lane.allowed(false).min(most), lane.allowed(true).min(most));
        let (configured, by_word) = (lane.configured, lane.largest_by_word(now));
        let largest_answer = lane.limiter.largest_answer();
        let Lane { groups, level, limiter, learned, measured, standings, in_flight, in_flight_rows, .. } = lane;
        for (group_id, group) in groups {
            let interactive = group.stream.interactive;
            if *in_flight >= if interactive { allowed_interactive } else { allowed } {
                return Look::Nothing;
            }
            if !self.circuits.is_empty() && !circuits::is_closed(&self.circuits, key, &group.stream) {
                continue;
            }
            // No pack is made of rows that can't go yet.
            if group.queued() > 0
                && let Some(at) = limiter.closed_until(now, group.class())
            {
                later(at);
                return Look::Nothing;
            }
            let standing = standings.of(now, group.scope);
            if !standing.patience.may_send(now) {
                continue;
            }
            let (way, turn) = standing.patience.way();
            let learned = Learned { forms: standing.forms.without(learned.forms), ..*learned };
            // What the user has set is what makes a row too long. What a provider says is tried with the row alone.
            let most_set = group.stream.model.max_request_tokens;
            let allowed = configured.largest_request().unwrap_or(u64::MAX).min(most_set);
            let largest = allowed.min(by_word);
            let counted = |tokens: u64| (tokens as f64 / measured.prompt.apply(1000) as f64 * 1000.0) as usize;
            let mut rows = match group.next(now, counted(rows_of(learned, *measured, largest)), way) {
                Next::Rows(rows) => rows,
                Next::Until(at) => {
                    later(at);
                    continue;
                }
                Next::Empty => continue,
            };
            let (numbers, measured) = (&self.numbers, *measured);
            let draft_of = |group: &Group, rows: &[Row]| {
                let counts = group.stream.endpoint.counts;
                Draft::new(numbers, (learned, measured), group, rows, largest).within(largest_answer, counts)
            };
            let mut draft = draft_of(group, &rows);
            if rows.len() == 1 && (draft.estimate.input + draft.estimate.output) as usize > counted(allowed) {
                let what = if allowed == most_set { "max_request_tokens" } else { "the limit a minute" };
                let why = format!("{what} of the model leaves {allowed} tokens for one");
                return Look::TooLarge(*group_id, rows, why);
            }
            if let Some(mut purse) = group.purse.take() {
                let least = draft_of(group, rows.get(..1).unwrap_or_default()).worst;
                let is_idle = group.in_flight == 0;
                let pays = purse.pays(draft.worst, least, is_idle);
                while pays == Pays::Less && rows.len() > 1 && !purse.covers(draft.worst) {
                    group.put_back(rows.split_off(rows.len() - rows.len().div_ceil(8)));
                    draft = draft_of(group, &rows);
                }
                if pays == Pays::Ask {
                    // What was answered so far goes first: the client reckons with it.
                    let (conn, least, full) = (purse.conn, purse.worth(least), purse.worth(draft.worst));
                    if let Some(c) = self.conns.get_mut(&conn) {
                        super::flush(c);
                        say(c, &FromGateway::Exhausted { least, full });
                    }
                }
                group.purse = Some(purse);
                if matches!(pays, Pays::Ask | Pays::Later) {
                    group.put_back(rows);
                    continue;
                }
            }
            let mut tried = limiter.reserve(now, draft.reserve, group.class(), 1.0);
            if tried == Err(Refusal::TooLarge) && rows.len() == 1 && configured.admit(draft.reserve) {
                tried = limiter.reserve(now, limiter.trial(draft.reserve), group.class(), 1.0);
            }
            if let Err(Refusal::Until { part, .. }) = tried
                && part > 0.0
            {
                let fits = ((draft.estimate.input + draft.estimate.output) as f64 * part) as usize;
                let n = group.fit(&rows, fits);
                if n * LEAST_PART >= rows.len().max(LEAST_PART) {
                    let part = n as f64 / rows.len() as f64;
                    let rest = rows.split_off(n);
                    draft = draft_of(group, &rows);
                    group.put_back(rest);
                    tried = limiter.reserve(now, draft.reserve, group.class(), part).or(tried);
                }
            }
            let grant = match tried {
                Ok(grant) => grant,
                Err(Refusal::Until { at, .. }) => {
                    group.put_back(rows);
                    later(at);
                    return Look::Nothing;
                }
                Err(Refusal::TooLarge) => {
                    let why = "a limit a minute of the model is smaller".to_owned();
                    return Look::TooLarge(*group_id, rows, why);
                }
            };
            if let Some(purse) = &mut group.purse {
                purse.take(draft.worst);
            }
            let level = &mut level[usize::from(interactive)];
            *level = level.max(group.served);
            group.count_served(now, &rows);
            standing.patience.sent(now);
            *in_flight += 1;
            *in_flight_rows += rows.len();
            let abandoned = Rc::new(Notify::new());
            self.next_id += 1;
            launches.push(Launch {
                id: self.next_id,
                body: draft.body(learned, group, &rows),
                stream: Rc::clone(&group.stream),
                timeout: Duration::from_millis(group.stream.model.request_timeout_ms),
                most_tokens: draft.worst.output,
                abandoned: Rc::clone(&abandoned),
            });
            let request = InFlight {
                lane: key.clone(),
                group: *group_id,
                id: self.next_id,
                asked: Asked {
                    scope: group.scope,
                    way,
                    turn,
                    learned,
                    estimate: draft.estimate,
                    reserved: draft.reserve,
                    worst: draft.worst,
                    can_grow: draft.can_grow,
                    sent: now,
                },
                ids: draft.ids,
                grant,
                abandoned,
                is_accounted: false,
                rows,
            };
            self.numbers.used(&request.ids);
            lane.last_request = request.id;
            lane.requests_total += 1;
            lane.rows_total += request.rows.len() as u64;
            self.in_flight.insert(self.next_id, request);
            return Look::Sent;
        }
        Look::Nothing
    }
}
