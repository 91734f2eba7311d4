//! Questions about the state: whether a model answers at all, what rows would take, and the current activity.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use llm_batch_core::dialect::{self, Reply};
use llm_batch_core::limiter::{Class, Left, Refusal, Tokens};
use llm_batch_core::options::{Options, StructuredOutput};
use llm_batch_core::patience::Way;
use llm_batch_core::trouble::{Report, Trouble};
use serde_json::Value;

use super::send::{Draft, rows_of};
use super::{Probe, State, circuits, say};
use crate::group::{Group, Next};
use crate::key::LaneKey;
use crate::lane::Lane;
use crate::protocol::{Activity, Estimate, FromGateway, Item, Stop, StopReason, Stream};
use crate::request::TIMED_OUT;

/// The cap of a probe's answer, tokens.
const PROBE_ANSWER_TOKENS: u64 = 16;
/// What of it is read, tokens: some servers do not count what is thought.
pub const PROBE_READ_TOKENS: u64 = 8_192;
/// Tokens a probe reserves.
const PROBE_TOKENS: Tokens = Tokens { input: 30, output: 10 };

/// A probe's body and how long it may take; or when (ms) the limits let it go.
pub(super) fn request(now: u64, lane: &mut Lane, stream: &Stream) -> Result<(Value, Duration), u64> {
    match lane.limiter.reserve(now, PROBE_TOKENS, Class::Interactive, 1.0) {
        Ok(grant) => lane.limiter.settle(grant, PROBE_TOKENS, Left::default()),
        Err(Refusal::Until { at, .. }) => return Err(at),
        Err(Refusal::TooLarge) => {}
    }
    let body = dialect::body(&dialect::Request {
        model: &stream.model.model,
        system: "Answer with one word.",
        no_system_role: lane.learned.no_system_role,
        user: "Say ok.",
        max_tokens: PROBE_ANSWER_TOKENS,
        max_completion_tokens: lane.learned.max_completion_tokens,
        response_format: None,
        parameters: &stream.model.parameters,
    });
    Ok((body, Duration::from_millis(stream.model.request_timeout_ms.min(60_000))))
}

impl State {
    /// Prepares a probe of a client's model.
    pub fn probe(&mut self, now: u64, conn: u64) -> Option<Probe> {
        let left = Rc::clone(&self.conns.get(&conn)?.left);
        let (lane_key, _, stream) = self.conns.get(&conn)?.stream.clone()?;
        if !self.settings.enabled {
            return Some(Probe::Disabled);
        }
        let lane = self.lanes.get_mut(&lane_key)?;
        if lane.last_success.is_some_and(|at| at + 60_000 > now) {
            return Some(Probe::Alive);
        }
        Some(match request(now, lane, &stream) {
            Ok((body, timeout)) => Probe::Send(stream.endpoint.clone(), body, timeout, left),
            Err(at) => Probe::Until(at),
        })
    }

    /// What a probe's end means: `None` if it is to be sent again, else the answer to give.
    pub fn probed(&mut self, now: u64, conn: u64, tries: u32, result: Result<Reply, Report>) -> Option<Option<Stop>> {
        let (lane_key, group_key, _) = self.conns.get(&conn)?.stream.clone()?;
        let is_answered = !matches!(&result, Err(report) if matches!(report.trouble, Trouble::Overload(_)));
        if is_answered {
            self.answers(now, &lane_key, &group_key);
        }
        let Err(report) = result else {
            if let Some(lane) = self.lanes.get_mut(&lane_key) {
                lane.answers(now);
            }
            return Some(None);
        };
        let message = report.message;
        let is_open = !is_answered && self.fails(now, &lane_key, &group_key, 1, &message);
        let lane = self.lanes.get_mut(&lane_key)?;
        // Nothing but the words of it is asked for.
        let plain = Options { structured_output: StructuredOutput::None, ..Options::default() };
        let stop = |reason, retry_after_ms| Some(Some(Stop { reason, message: message.clone(), retry_after_ms }));
        match report.trouble {
            // The cap of a probe does not suffice for what some think before they answer: it is a sign of life.
            Trouble::Rate(_)
            | Trouble::TooLarge
            | Trouble::OverLimit
            | Trouble::Filtered
            | Trouble::CutOff
            | Trouble::AnswerCap => Some(None),
            Trouble::Unsupported(parameter) if lane.learned.refused(parameter, lane.learned, &plain) => None,
            Trouble::Overload(_) if tries < 3 && message != TIMED_OUT && !is_open => None,
            Trouble::Overload(_) => stop(StopReason::ProviderDown, None),
            Trouble::Auth => stop(StopReason::Auth, None),
            Trouble::Spend => stop(StopReason::Spend, None),
            Trouble::Quota(wait) => stop(StopReason::Quota, wait),
            Trouble::NotFound => stop(StopReason::NotFound, None),
            Trouble::Unsupported(_) | Trouble::Rejected | Trouble::Misplaced => stop(StopReason::Rejected, None),
        }
    }

    /// What rows would take if they were sent, by what is known of the client's model.
    pub fn estimate(&mut self, conn: u64, items: Vec<Item>) -> Estimate {
        let mut sum = Estimate::default();
        let Some((lane_key, group_key, stream)) = self.conns.get(&conn).and_then(|c| c.stream.clone()) else {
            return sum;
        };
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return sum };
        let (learned, measured) = (lane.learned, lane.measured);
        let largest = lane.limiter.largest_request().unwrap_or(u64::MAX).min(stream.model.max_request_tokens);
        let mut group = Group::new(stream, &self.keys);
        if let Some(known) = lane.group(&group_key) {
            group.size = known.size;
        }
        let reuse = group.stream.task.options.reuse;
        for (i, item) in items.into_iter().enumerate() {
            let compartment = group.compartment(&self.keys, &item);
            let key = if reuse { self.keys.of(compartment, &item.text) } else { i as u128 };
            group.push(0, conn, item, compartment, key);
        }
        while let Next::Rows(rows) = group.next(u64::MAX / 2, rows_of(learned, measured, largest) as usize, Way::AsEver)
        {
            let draft = Draft::new(&self.numbers, (learned, measured), &group, &rows, largest);
            sum.rows += rows.len() as u64;
            sum.requests += 1;
            sum.input_tokens += measured.prompt.apply(draft.estimate.input);
            sum.output_tokens += measured.usual_answer(group.mean_answer(rows.len()));
            sum.example.get_or_insert_with(|| draft.body(learned, &group, &rows).to_string());
        }
        sum
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
                let (breaker, until) = circuits::of_lane(&self.circuits, key);
                let blocked = until.unwrap_or(0).max(lane.limiter.blocked_until());
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
                    requests_allowed: lane.allowed(false) as u64,
                    rows_allowed: lane.groups.iter().map(|(_, g)| g.size.rows() as u64).min(),
                    share: usage.share,
                    reported_left: usage.reported_left,
                    token_ratio: lane.measured.prompt.apply(1000) as f64 / 1000.0,
                    answer_ratio: lane.measured.answer.apply(1000) as f64 / 1000.0,
                    latency_ms: lane.concurrency.latency(),
                    thinking_tokens: lane.measured.thinking.usual(),
                    rows_reused: lane.rows_reused,
                    breaker,
                    waiting_ms: blocked.checked_sub(now).filter(|ms| *ms > 0),
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
