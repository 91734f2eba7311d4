//! Circuit breakers: endpoints and models that do not answer get no requests but probes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use llm_batch_core::breaker::{self, Breakers, Down, ProbeEnd};
use llm_batch_core::dialect::Service;
use llm_batch_core::trouble::Trouble;
use tokio::sync::Notify;

use super::probe;
use super::{Launch, State};
use crate::group::Group;
use crate::key::{GroupId, LaneKey};
use crate::protocol::{Stop, StopReason, Stream, Words};
use crate::request::Answered;
use crate::route::Member;

/// Least time (ms) that a probe is waited for.
const LEAST_PATIENCE: u64 = 5_000;

/// Account and URL. Models of an account may be at different ones.
pub type EndpointKey = (Rc<str>, String);

/// An endpoint in trouble.
#[derive(Debug, Default)]
pub struct Circuits {
    breakers: Breakers,
    /// The last error.
    words: Words,
}

/// A probe under way.
pub struct Probing {
    endpoint: EndpointKey,
    lane: LaneKey,
    service: Service,
    /// The name of its circuit.
    circuit: String,
    role: u32,
    abandoned: Rc<Notify>,
}

impl Probing {
    pub fn abandon(&self) {
        self.abandoned.notify_one();
    }
}

/// The endpoint of a stream of this lane.
fn endpoint(lane: &LaneKey, stream: &Stream) -> EndpointKey {
    (Rc::clone(&lane.account), stream.endpoint.base_url.clone())
}

/// The name of a stream's circuit at its endpoint: that of the model. The service for decisions has an address of its own,
/// and may be down or missing while the model's chats are answered.
fn circuit<'a>(lane: &'a LaneKey, stream: &Stream) -> Cow<'a, str> {
    match stream.task.service() {
        Service::Decisions => of_decisions(lane).into(),
        Service::Chat | Service::Embeddings => Cow::Borrowed(&*lane.model),
    }
}

fn of_decisions(lane: &LaneKey) -> String {
    format!("{} decisions", lane.model)
}

/// Returns true if requests of this stream may be sent.
pub fn is_closed(circuits: &BTreeMap<EndpointKey, Circuits>, lane: &LaneKey, stream: &Stream) -> bool {
    circuits
        .get(&endpoint(lane, stream))
        .is_none_or(|c| c.breakers.state(&circuit(lane, stream)) == breaker::State::Closed)
}

/// The state of a lane's circuits (the worst, if its streams lead to several endpoints), and until when it lasts.
pub fn of_lane(circuits: &BTreeMap<EndpointKey, Circuits>, lane: &LaneKey) -> (breaker::State, Option<u64>) {
    let names = [lane.model.to_string(), of_decisions(lane)];
    circuits
        .iter()
        .filter(|((account, _), _)| *account == lane.account)
        .flat_map(|(_, c)| names.iter().map(|name| (c.breakers.state(name), c.breakers.until(name))))
        .max()
        .unwrap_or((breaker::State::Closed, None))
}

fn is_down(now: u64, until: Option<u64>, message: &str) -> Stop {
    let retry_after_ms = until.map(|at| at.saturating_sub(now));
    Stop { reason: StopReason::ProviderDown, message: message.to_owned(), retry_after_ms }
}

impl State {
    /// Why nothing is sent to a member of a group, if a probe has found that out and the next one is not due; and whose
    /// request it was.
    pub(super) fn down(&self, now: u64, member: &Member) -> Option<(Stop, u32)> {
        if self.circuits.is_empty() {
            return None;
        }
        let (key, name) = (endpoint(&member.lane, &member.stream), circuit(&member.lane, &member.stream));
        let Circuits { breakers, words } = self.circuits.get(&key)?;
        breakers.is_down(now, &name).then(|| (is_down(now, breakers.until(&name), &words.message), words.role))
    }

    /// A request of a group was answered, be it with a refusal.
    pub(super) fn answers(&mut self, now: u64, lane: &LaneKey, (group, service): (GroupId, Service)) {
        if !self.circuits.is_empty()
            && let Some((_, member)) = self.groups.get(group).and_then(|g| g.member(lane))
        {
            let stream = member.stream(service);
            let (key, name) = (endpoint(lane, stream), circuit(lane, stream));
            self.endpoint_answers(now, &key, (lane, &name));
        }
    }

    fn endpoint_answers(&mut self, now: u64, key: &EndpointKey, (lane, circuit): (&LaneKey, &str)) {
        let Some(circuits) = self.circuits.get_mut(key) else { return };
        let was_down = circuits.breakers.answered(circuit);
        if circuits.breakers.is_well() {
            self.circuits.remove(key);
        }
        if was_down {
            self.notice(now, lane, "answers", "the provider answers again");
        }
    }

    /// A request of a group was not answered. Returns true if nothing more may be sent until a probe is answered.
    pub(super) fn fails(
        &mut self,
        now: u64,
        lane: &LaneKey,
        (group, service): (GroupId, Service),
        points: u32,
        message: &str,
    ) -> bool {
        let Some((_, member)) = self.groups.get(group).and_then(|g| g.member(lane)) else { return false };
        let stream = member.stream(service);
        let circuits = self.circuits.entry(endpoint(lane, stream)).or_default();
        let name = circuit(lane, stream);
        circuits.breakers.failed(now, &name, points);
        circuits.words = Words { role: stream.role, message: message.to_owned() };
        circuits.breakers.state(&name) != breaker::State::Closed
    }

    /// Sends a probe to each endpoint for which it is time and somebody waits; else notes when to look again.
    pub(super) fn probe_circuits(&mut self, now: u64, launches: &mut Vec<Launch>, wake: &mut Option<u64>) {
        let mut later = |at: u64| *wake = Some(wake.map_or(at, |w| w.min(at)));
        for (key, Circuits { breakers, .. }) in &mut self.circuits {
            let mut waiting: BTreeMap<Cow<'_, str>, (&LaneKey, Rc<Stream>, bool)> = BTreeMap::new();
            for (lane, l) in self.lanes.iter().filter(|(lane, _)| lane.account == key.0) {
                // Others may take the rows meanwhile.
                let waits = |g: &Group| g.queued() > 0 || (g.members.len() > 1 && g.in_flight > 0);
                let groups = self.groups.of(l).filter(|(_, g)| waits(g));
                let streams = groups.filter_map(|(_, g)| Some((&g.member(lane)?.1.stream, g.members.len() > 1)));
                for (stream, is_route) in streams.filter(|(s, _)| s.endpoint.base_url == key.1) {
                    waiting.entry(circuit(lane, stream)).or_insert_with(|| (lane, Rc::clone(stream), is_route));
                }
            }
            let names: Vec<&str> = waiting.keys().map(|name| &**name).collect();
            let Some((at, name)) = breakers.next_probe(&names).map(|(at, name)| (at, name.to_owned())) else {
                continue;
            };
            if at > now {
                later(at);
                continue;
            }
            let Some((lane, stream, is_route)) = waiting.remove(name.as_str()) else { continue };
            let lane_key = lane.clone();
            let Some(lane) = self.lanes.get_mut(&lane_key) else { continue };
            let (body, timeout) = match probe::request(now, lane, &stream) {
                Ok(request) => request,
                Err(at) => {
                    later(at);
                    continue;
                }
            };
            // If other models take the rows, a silent one is not waited for longer than they are: it may be back
            // meanwhile.
            let service = stream.task.service();
            let timeout = lane
                .record(service)
                .patience()
                .filter(|_| is_route)
                .map_or(timeout, |ms| timeout.min(Duration::from_millis(ms.max(LEAST_PATIENCE))));
            breakers.begin_probe(&name);
            let (abandoned, role) = (Rc::new(Notify::new()), stream.role);
            self.next_id += 1;
            let most_tokens = probe::PROBE_READ_TOKENS;
            let (id, ids) = (self.next_id, probe::PROBE_IDS.to_vec());
            launches.push(Launch { id, stream, ids, body, timeout, most_tokens, abandoned: Rc::clone(&abandoned) });
            let (endpoint, lane) = (key.clone(), lane_key);
            let probing = Probing { endpoint, lane, service, circuit: name, role, abandoned };
            self.probing.insert(self.next_id, probing);
        }
    }

    pub(super) fn end_probe(&mut self, now: u64, probing: Probing, answered: Option<Answered>) {
        let Probing { endpoint: key, lane, service, circuit: name, role, .. } = probing;
        let mut result = answered.filter(|a| !a.has_no_place).map(|a| a.result);
        if let Some(Err(report)) = &mut result
            && self.lanes.get(&lane).is_some_and(|lane| lane.record(service).last_success.is_some())
        {
            report.trouble.may_pass();
        }
        let end = match result {
            None => ProbeEnd::Lost,
            Some(Err(report)) if let Trouble::Overload(asked) = report.trouble => {
                let words = Words { role, message: report.message };
                if let Some(lane) = self.lanes.get_mut(&lane) {
                    lane.errors += 1;
                    lane.last_error = Some(words.clone());
                    lane.vouched = None;
                }
                if let Some(circuits) = self.circuits.get_mut(&key) {
                    circuits.words = words;
                }
                ProbeEnd::Failed { asked }
            }
            Some(_) => {
                if let Some(lane) = self.lanes.get_mut(&lane) {
                    lane.vouched.get_or_insert(now);
                }
                return self.endpoint_answers(now, &key, (&lane, &name));
            }
        };
        let Some(Circuits { breakers, words }) = self.circuits.get_mut(&key) else { return };
        let Some(down) = breakers.end_probe(now, &name, end) else { return };
        let (stop, role) = (is_down(now, breakers.until(&name), &words.message), words.role);
        self.notice(now, &lane, "stopped", &stop.message);
        let is_it = |Member { lane, stream, .. }: &Member| {
            lane.account == key.0
                && stream.endpoint.base_url == key.1
                && (down == Down::Endpoint || circuit(lane, stream) == *name)
        };
        let groups = self.groups.iter().filter(|(_, g)| g.members.iter().any(is_it));
        let groups: Vec<GroupId> = groups.map(|(id, _)| id).collect();
        groups.into_iter().for_each(|group| self.lost(now, group, &stop, Some(role)));
    }
}
