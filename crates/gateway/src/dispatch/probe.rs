//! Probes: whether a model answers at all.

use std::rc::Rc;
use std::time::Duration;

use llm_batch_core::choices::Choices;
use llm_batch_core::dialect::decisions::Questions;
use llm_batch_core::dialect::embeddings::{FIRST_NUMBER, Texts};
use llm_batch_core::dialect::{Ask, Reply};
use llm_batch_core::limiter::{Class, Left, Refusal, Tokens};
use llm_batch_core::options::{Options, ServiceTier, StructuredOutput};
use llm_batch_core::trouble::{Report, Trouble};
use serde_json::Value;
use tokio::sync::Notify;

use super::{InFlight, Launch, State};
use crate::key::LaneKey;
use crate::lane::Lane;
use crate::protocol::{Stop, StopReason, Stream};
use crate::request::{Answered, TIMED_OUT};
use crate::route::Member;

/// The cap of a probe's answer, tokens.
const PROBE_ANSWER_TOKENS: u64 = 16;
/// Tokens of it that are read: some servers do not count what is thought.
pub const PROBE_READ_TOKENS: u64 = 8_192;
/// The number of the only text or question of one that needs it.
pub const PROBE_IDS: [u16; 1] = [FIRST_NUMBER];
/// Tokens a probe reserves.
const PROBE_TOKENS: Tokens = Tokens { input: 30, output: 10 };

/// Time that it may take, ms: its result also serves streams with more patience.
const LEAST_TIMEOUT: u64 = 10_000;
const MOST_TIMEOUT: u64 = 60_000;

/// The next step of a probe.
pub enum Probe {
    /// The model answered a moment ago.
    Alive,
    /// Nothing may be sent at all.
    Disabled,
    /// Not before this time (ms).
    Until(u64),
    /// To whom, what, how long it may take; and what is woken if nobody waits for it any more.
    Send(Rc<Stream>, Value, Duration, Rc<Notify>),
}

/// A probe's body and how long it may take; or when (ms) the limits let it go.
pub(super) fn request(now: u64, lane: &mut Lane, stream: &Stream) -> Result<(Value, Duration), u64> {
    match lane.limiter.reserve(now, PROBE_TOKENS, Class::Interactive, 1.0) {
        Ok(grant) => lane.limiter.settle(grant, PROBE_TOKENS, Left::default()),
        Err(Refusal::Until { at, .. }) => return Err(at),
        Err(Refusal::TooLarge) => {}
    }
    Ok(bare(lane, stream))
}

/// A request without rows, and how long it may take.
fn bare(lane: &Lane, stream: &Stream) -> (Value, Duration) {
    let timeout = Duration::from_millis(stream.model.request_timeout_ms.clamp(LEAST_TIMEOUT, MOST_TIMEOUT));
    let dialect = stream.endpoint.api.dialect();
    if let (Some(embed), Some(embeddings)) = (stream.task.spec.embeds(), dialect.embeddings()) {
        let texts = Texts {
            model: &stream.model.model,
            texts: &["ok".to_owned()],
            dimensions: embed.dimensions,
            input_type: embed.input_type.as_deref(),
            encoding: None,
            parameters: &stream.model.parameters,
        };
        return (embeddings.body(&texts), timeout);
    }
    if let Some(decisions) = stream.decisions() {
        let questions = Questions {
            model: &stream.model.model,
            input: "Say ok.",
            ids: &PROBE_IDS,
            choices: Choices { names: &["ok".to_owned(), "other".to_owned()], are_levels: false },
            parameters: &stream.model.parameters,
        };
        return (decisions.body(&questions), timeout);
    }
    let body = dialect.body(&Ask {
        model: &stream.model.model,
        system: "Answer with one word.",
        no_system_role: lane.learned.no_system_role,
        user: "Say ok.",
        max_tokens: PROBE_ANSWER_TOKENS,
        max_completion_tokens: lane.learned.max_completion_tokens,
        context: stream.model.max_request_tokens,
        format: None,
        parameters: &stream.model.parameters,
        no_sampling: lane.learned.no_sampling,
        tier: if stream.tier() == ServiceTier::Default { ServiceTier::Default } else { ServiceTier::FlexOrDefault },
    });
    (body, timeout)
}

impl State {
    /// A request that was refused in words that may be those of its rows is held, and one without rows goes in its place.
    /// With the end of that one it has an end; `None` until then.
    pub(super) fn doubted(
        &mut self,
        now: u64,
        mut request: InFlight,
        answered: Option<Answered>,
    ) -> Option<(InFlight, Option<Answered>)> {
        if let Some(refused) = request.in_doubt.take() {
            if let Some((Answered { result: Ok(reply), said, .. }, lane)) =
                answered.as_ref().zip(self.lanes.get_mut(&request.lane))
            {
                lane.serves(now, said, reply.usage.or(PROBE_TOKENS));
            }
            return Some((request, answered.map(|probe| refused.confirmed(probe))));
        }
        // As long as nothing was served, a limit is not believed to be one.
        let is_over = |lane: &Lane, report: &Report| {
            report.trouble == Trouble::OverLimit && request.rows.len() == 1 && lane.has_served_nothing()
        };
        let report = answered.as_ref().and_then(|a| a.result.as_ref().err());
        let found = self.lanes.get_mut(&request.lane);
        let found = found.filter(|lane| report.is_some_and(|report| report.is_in_doubt || is_over(lane, report)));
        let Some((lane, group)) = found.zip(self.groups.get(request.group)) else { return Some((request, answered)) };
        let service = request.asked.service;
        let stream = group.member(&request.lane).map_or(&group.stream, |(_, member)| member.stream(service));
        let stream = Rc::clone(stream);
        let (body, timeout) = bare(lane, &stream);
        let (id, abandoned) = (request.id, Rc::clone(&request.abandoned));
        let (ids, most_tokens) = (PROBE_IDS.to_vec(), PROBE_READ_TOKENS);
        self.doubts.push(Launch { id, stream, ids, body, timeout, most_tokens, abandoned });
        request.in_doubt = answered;
        self.in_flight.insert(id, request);
        None
    }

    /// The number of models in the stream of a client.
    pub fn models(&self, conn: u64) -> usize {
        self.group_of(conn).and_then(|id| self.groups.get(id)).map_or(0, |group| group.members.len())
    }

    /// Prepares a probe of a client's model, of several of the one at this place.
    pub fn probe(&mut self, now: u64, conn: u64, at: usize) -> Option<Probe> {
        let left = Rc::clone(&self.conns.get(&conn)?.left);
        let group = self.groups.get(self.group_of(conn)?)?;
        let Member { lane, stream, .. } = group.members.get(at)?;
        let stream = Rc::clone(stream);
        if !self.settings.enabled {
            return Some(Probe::Disabled);
        }
        let lane = self.lanes.get_mut(lane)?;
        if lane.record(stream.task.service()).last_success.is_some_and(|at| at + 60_000 > now) {
            return Some(Probe::Alive);
        }
        Some(match request(now, lane, &stream) {
            Ok((body, timeout)) => Probe::Send(stream, body, timeout, left),
            Err(at) => Probe::Until(at),
        })
    }

    /// Interprets the end of a probe: `None` if it is to be sent again, else the answer to give.
    pub fn probed(
        &mut self,
        now: u64,
        (conn, stream): (u64, &Stream),
        tries: u32,
        result: Result<Reply, Report>,
    ) -> Option<Option<Stop>> {
        let group = self.group_of(conn)?;
        let lane_key = LaneKey::of(stream);
        let is_answered = !matches!(&result, Err(report) if matches!(report.trouble, Trouble::Overload(_)));
        if is_answered {
            self.answers(now, &lane_key, (group, stream.task.service()));
        }
        let Err(report) = result else {
            if let Some(lane) = self.lanes.get_mut(&lane_key) {
                lane.answers(now, stream.task.service());
            }
            return Some(None);
        };
        let message = report.message;
        let is_open = !is_answered && self.fails(now, &lane_key, (group, stream.task.service()), 1, &message);
        let lane = self.lanes.get_mut(&lane_key)?;
        // Nothing but the words of it is asked for.
        let plain = Options { structured_output: StructuredOutput::None, ..Options::default() };
        let stop = |reason, retry_after_ms| Some(Some(Stop { reason, message: message.clone(), retry_after_ms }));
        match report.trouble {
            // The cap of a probe does not suffice for what some think before they answer: it is a sign of life.
            Trouble::Rate(_)
            | Trouble::NoCapacity(_)
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
}
