//! A model that chats and decides, where time is simulated: one service says nothing of the other.

use std::collections::BTreeMap;

use llm_batch_core::dialect::Sent;
use llm_batch_core::options::AskBy;

use super::tests::{Heard, answer, client, connect, right, rows};
use super::*;
use crate::protocol::{self, Prices};

/// A job that asks for one of the services, and begins anew when it may after a stop.
struct Job {
    conn: u64,
    heard: Heard,
    stream: Stream,
    next: u64,
    outstanding: usize,
    /// When (ms) rows were answered, and requests with rows were sent.
    answered: Vec<u64>,
    sent: Vec<u64>,
    stops: Vec<Stop>,
    paused_until: Option<u64>,
}

impl Job {
    fn new(conn: u64, heard: Heard, ask_by: AskBy) -> Self {
        let mut stream = protocol::tests::stream();
        (stream.task.options.ask_by, stream.task.options.max_rows_per_request) = (ask_by, 2);
        let (answered, sent, stops) = Default::default();
        Self { conn, heard, stream, next: 0, outstanding: 0, answered, sent, stops, paused_until: Some(0) }
    }

    fn hear(&mut self, now: u64) {
        while let Some(message) = self.heard.next() {
            match message {
                FromGateway::Outcomes { outcomes, .. } => {
                    self.outstanding -= outcomes.len();
                    let answers = outcomes.iter().filter(|o| matches!(o.verdict, Verdict::Answer(_))).count();
                    self.answered.extend((0..answers).map(|_| now));
                    assert!(outcomes.iter().all(|o| matches!(o.verdict, Verdict::Answer(_) | Verdict::Withdrawn)));
                }
                FromGateway::Stopped(stop) => {
                    self.paused_until = Some(now + stop.retry_after_ms.unwrap_or(u64::MAX / 2));
                    self.stops.push(stop);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A gateway with a job for chats and one for decisions of the same model.
struct Sim {
    state: State,
    now: u64,
    jobs: [Job; 2],
}

impl Sim {
    fn new() -> Self {
        // Waits have jitter.
        fastrand::seed(7);
        let (mut state, now, conn, heard) = connect();
        let (other, other_heard) = client(&mut state);
        let jobs = [Job::new(conn, heard, AskBy::Chat), Job::new(other, other_heard, AskBy::Decisions)];
        Self { state, now, jobs }
    }

    /// Lets so much time (ms) pass; `does` says with which status a service answers.
    fn run(&mut self, ms: u64, mut does: impl FnMut(Service) -> u16) {
        let (end, mut under_way) = (self.now + ms, BTreeMap::new());
        while self.now < end || !under_way.is_empty() {
            for job in self.jobs.iter_mut().filter(|_| self.now < end) {
                job.hear(self.now);
                if job.paused_until.is_some_and(|at| at <= self.now) && job.outstanding == 0 {
                    self.state.open(self.now, job.conn, job.stream.clone()).unwrap();
                    job.paused_until = None;
                }
                if job.paused_until.is_none() && job.outstanding < 4 {
                    let item = |n| (Item { n, text: format!("row {n}"), isolation: None, again: None }, None);
                    self.state.items(self.now, job.conn, (job.next..job.next + 2).map(item).collect()).unwrap();
                    (job.next, job.outstanding) = (job.next + 2, job.outstanding + 2);
                }
            }
            let (launches, wake) = if self.now < end { self.state.pump(self.now) } else { Default::default() };
            for launch in launches {
                self.state.sent(self.now, launch.id);
                let service = launch.stream.task.service();
                if !rows(&launch.body).is_empty() {
                    self.jobs[usize::from(service == Service::Decisions)].sent.push(self.now);
                }
                let sent = Sent { service, ids: &launch.ids, ..Sent::default() };
                let status = does(service);
                // Those that fail do so one after the other, and others are answered meanwhile.
                let (after, answered) = match status {
                    200 => (50, right(&launch, 100, 0)),
                    _ => (120 + launch.id % 7 * 53, answer(sent, status, b"{\"error\": {\"message\": \"not now\"}}")),
                };
                under_way.insert((self.now + after, launch.id), answered);
            }
            let next = under_way.keys().next().map(|(at, _): &(u64, u64)| *at);
            let paused = self.jobs.iter().filter_map(|job| job.paused_until);
            self.now = next.into_iter().chain(wake).chain(paused).filter(|at| *at > self.now).min().unwrap_or(end);
            while let Some(entry) = under_way.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let ((_, id), answered) = entry.remove_entry();
                self.state.finish(self.now, id, Some(answered));
            }
        }
        self.jobs.iter_mut().for_each(|job| job.hear(self.now));
    }
}

#[test]
fn a_service_that_is_down_leaves_the_other_alone() {
    for down in [Service::Decisions, Service::Chat] {
        let mut sim = Sim::new();
        let (ill, well) = if down == Service::Decisions { (1, 0) } else { (0, 1) };
        sim.run(3_000, |_| 200);
        assert!(sim.jobs.iter().all(|job| job.stops.is_empty() && job.answered.len() > 80), "{down:?}");
        let begin = sim.now;
        sim.run(15_000, |service| if service == down { 503 } else { 200 });
        let job = &sim.jobs[ill];
        let is_down = |stop: &Stop| stop.reason == StopReason::ProviderDown;
        assert!(!job.stops.is_empty() && job.stops.iter().all(is_down), "{down:?}: {:?}", job.stops);
        // Nothing but probes is sent, soon after it has gone down.
        let late = job.sent.iter().filter(|at| **at > begin + 5_000).count();
        assert_eq!(late, 0, "{down:?}: requests with rows");
        let job = &sim.jobs[well];
        assert!(job.stops.is_empty(), "{down:?}: {:?}", job.stops);
        let times = job.answered.iter().filter(|at| **at > begin).copied().collect::<Vec<_>>();
        let gap = times.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert!(gap.is_some_and(|gap| gap < 1_000), "{down:?}: {gap:?} ms without an answer");
        // It is found again.
        let (before, stops) = (sim.jobs[ill].answered.len(), sim.jobs[ill].stops.len());
        sim.run(25_000, |_| 200);
        assert!(sim.jobs[ill].answered.len() > before + 80 && sim.jobs[ill].stops.len() <= stops + 1, "{down:?}");
    }
}

/// That a model answers chats does not make an address for decisions of it that is not there one that is gone for a while.
#[test]
fn a_service_that_never_was_there_is_not_waited_for() {
    let (mut sim, mut asked) = (Sim::new(), 0);
    sim.run(20_000, |service| {
        asked += u32::from(service == Service::Decisions);
        match service {
            Service::Decisions if asked <= 8 => 503,
            Service::Decisions => 404,
            _ => 200,
        }
    });
    let [chats, decisions] = &sim.jobs;
    assert!(chats.stops.is_empty() && chats.answered.len() > 80);
    let reasons: Vec<StopReason> = decisions.stops.iter().map(|stop| stop.reason).collect();
    assert_eq!(reasons.last(), Some(&StopReason::NotFound), "{:?}", decisions.stops);
}

/// Nobody is known to count tokens of an answer for decisions. A server that does is believed, and a budget reserves as much
/// from then on.
#[test]
fn what_decisions_are_said_to_take_is_reserved() {
    let (mut state, mut now, conn, mut heard) = connect();
    let mut stream = protocol::tests::stream();
    (stream.task.options.ask_by, stream.task.options.max_rows_per_request) = (AskBy::Decisions, 10);
    stream.budget = Some(Prices { input: 0, output: 1 });
    state.open(now, conn, stream).unwrap();
    let (mut spent, mut allowed, mut answered) = (0, 0, 0);
    for n in 0..20 {
        let item = |n| (Item { n, text: format!("row {n}"), isolation: None, again: None }, None);
        state.items(now, conn, (n * 10..n * 10 + 10).map(item).collect()).unwrap();
        while answered < 10 * (n + 1) {
            let (launches, _) = state.pump(now);
            now += 100;
            for launch in launches {
                state.sent(now, launch.id);
                state.finish(now, launch.id, Some(right(&launch, 100, 300)));
            }
            while let Some(message) = heard.next() {
                match message {
                    FromGateway::Outcomes { outcomes, spent: more, .. } => {
                        spent += more.output_tokens;
                        answered += outcomes.len() as u64;
                    }
                    // The first answer says it.
                    FromGateway::Exhausted { full, .. } => {
                        assert!(n == 0 || full.cost >= 300, "request {n}: {full:?}");
                        allowed += full.cost;
                        state.allow(conn, full);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(n == 0 || spent <= allowed + 300, "request {n}: {spent} of {allowed}");
    }
    assert_eq!(spent, 20 * 300);
}
