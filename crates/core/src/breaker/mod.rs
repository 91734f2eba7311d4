//! Circuit breakers: whether an endpoint answers at all, so that one that does not is left alone.
//!
//! ```text
//!  closed ──(several failures in a row)──> open ──(time is up, and somebody waits)──> half-open: one probe
//!    ^                                      ^                                            │         │
//!    │                                      └───────────(fails: twice the time)──────────┘         │
//!    └────────────────────────────────────────────(it, or anything else, is answered)──────────────┘
//! ```
//!
//! An endpoint has a circuit, and so has each of its models: one that is broken among others that answer is left alone by
//! itself. An open circuit is only a suspicion (the rows that were asked may be what breaks the server); a probe
//! that holds no row tells. From when it has failed the endpoint is called down.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Points of failures in a row that open a circuit.
pub const MOST_FAILURES: u32 = 5;
/// But it is not probed before so much time (ms) has passed since the first of them: many requests that are under way
/// may fail at the same instant, and a server that is started again takes a moment.
const PATIENCE: u64 = 3_000;
/// Time (ms) from a probe that failed to the next, doubled with each further one.
const FIRST_WAIT: u64 = 2_000;
/// The longest it gets, ms.
const LONGEST_WAIT: u64 = 30_000;

/// The requests that may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Everything.
    Closed,
    /// Nothing but the probe that is under way.
    HalfOpen,
    /// Nothing.
    Open,
}

/// One circuit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breaker {
    /// Points of failures in a row, and when (ms) the first of them failed.
    Closed {
        failures: u32,
        since: u64,
    },
    /// No probe before this time (ms); so many have failed in a row.
    Open {
        until: u64,
        failed: u32,
    },
    HalfOpen {
        failed: u32,
    },
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failures: 0, since: 0 }
    }
}

impl Breaker {
    fn state(self) -> State {
        match self {
            Self::Closed { .. } => State::Closed,
            Self::Open { .. } => State::Open,
            Self::HalfOpen { .. } => State::HalfOpen,
        }
    }

    fn until(self) -> Option<u64> {
        if let Self::Open { until, .. } = self { Some(until) } else { None }
    }

    /// A probe has failed, and the next one is not due.
    fn is_down(self, now: u64) -> bool {
        matches!(self, Self::Open { until, failed } if failed > 0 && until > now)
    }

    fn failed(&mut self, now: u64, points: u32) {
        if let Self::Closed { failures, since } = *self {
            let since = if failures == 0 { now } else { since };
            let failures = failures.saturating_add(points);
            *self = if failures < MOST_FAILURES {
                Self::Closed { failures, since }
            } else {
                Self::Open { until: now.max(since.saturating_add(PATIENCE)), failed: 0 }
            };
        }
    }

    fn begin_probe(&mut self) {
        if let Self::Open { failed, .. } = *self {
            *self = Self::HalfOpen { failed };
        }
    }

    /// The probe under way failed, or came to no end. True if it failed.
    fn end_probe(&mut self, now: u64, end: ProbeEnd) -> bool {
        let Self::HalfOpen { failed } = *self else { return false };
        *self = match end {
            ProbeEnd::Lost => Self::Open { until: now, failed },
            ProbeEnd::Failed { asked } => {
                let wait = (FIRST_WAIT << failed.min(10)).max(asked.unwrap_or(0)).min(LONGEST_WAIT);
                Self::Open { until: now.saturating_add(wait), failed: failed.saturating_add(1) }
            }
        };
        end != ProbeEnd::Lost
    }
}

/// The end of a probe that was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeEnd {
    /// It was given up.
    Lost,
    /// It failed.
    Failed {
        /// The wait in ms that the server asked for.
        asked: Option<u64>,
    },
}

/// The part that is down by a failed probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// All of the endpoint.
    Endpoint,
    /// The model that was probed.
    Model,
}

/// The circuits of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Breakers {
    endpoint: Breaker,
    /// Those of models that are in trouble.
    models: BTreeMap<String, Breaker>,
    /// The model that was probed last for the endpoint: others get their turn.
    probed: String,
}

impl Breakers {
    /// Both circuits that a request for this model goes through.
    fn of(&self, model: &str) -> [Breaker; 2] {
        [self.endpoint, self.models.get(model).copied().unwrap_or_default()]
    }

    /// The state of the breaker that stands before this model.
    pub fn state(&self, model: &str) -> State {
        self.of(model).map(Breaker::state).into_iter().max().unwrap_or(State::Closed)
    }

    /// When (ms) this model, or its endpoint, may be probed.
    pub fn until(&self, model: &str) -> Option<u64> {
        self.of(model).into_iter().filter_map(Breaker::until).max()
    }

    /// A probe has failed, and there is no other one before some time has passed: nobody needs to wait.
    pub fn is_down(&self, now: u64, model: &str) -> bool {
        self.of(model).into_iter().any(|b| b.is_down(now))
    }

    /// Nothing to remember.
    pub fn is_well(&self) -> bool {
        self.endpoint == Breaker::default() && self.models.is_empty()
    }

    /// A request for this model was answered, be it with a refusal; `true` if it had been called down.
    pub fn answered(&mut self, model: &str) -> bool {
        let was_down = self.of(model).into_iter().any(|b| match b {
            Breaker::Open { failed, .. } | Breaker::HalfOpen { failed } => failed > 0,
            Breaker::Closed { .. } => false,
        });
        self.endpoint = Breaker::default();
        self.models.remove(model);
        was_down
    }

    /// A request for this model was not answered, or with a 5xx.
    pub fn failed(&mut self, now: u64, model: &str, points: u32) {
        let own = self.models.entry(model.to_owned()).or_default();
        // A model that is known to fail says nothing new about its endpoint.
        if own.state() == State::Closed {
            self.endpoint.failed(now, points);
        }
        own.failed(now, points);
    }

    /// When (ms) to send the next probe, and of which of the models that somebody waits for.
    pub fn next_probe<'a>(&self, waiting: &[&'a str]) -> Option<(u64, &'a str)> {
        if self.endpoint.state() != State::Closed {
            let next = waiting.iter().filter(|m| **m > self.probed.as_str()).min().or(waiting.iter().min());
            return self.endpoint.until().zip(next.copied());
        }
        waiting.iter().filter_map(|m| self.models.get(*m)?.until().zip(Some(*m))).min()
    }

    /// A probe of this model is sent.
    pub fn begin_probe(&mut self, model: &str) {
        if self.endpoint.state() == State::Open {
            model.clone_into(&mut self.probed);
        }
        self.endpoint.begin_probe();
        if let Some(own) = self.models.get_mut(model) {
            own.begin_probe();
        }
    }

    /// The probe of this model ended otherwise than with an answer: what is down now, if it failed and nothing else was
    /// answered meanwhile.
    pub fn end_probe(&mut self, now: u64, model: &str, end: ProbeEnd) -> Option<Down> {
        let own = self.models.get_mut(model).is_some_and(|b| b.end_probe(now, end));
        if self.endpoint.end_probe(now, end) { Some(Down::Endpoint) } else { own.then_some(Down::Model) }
    }
}

#[cfg(test)]
mod tests;
