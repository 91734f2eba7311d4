//! The state that the connections and the owner of a provider share.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fastrand::Rng;
use serde_json::Value;
use tokio::sync::watch;

use crate::limits::Limits;
use crate::prefix::Prefixes;
use crate::stats::Tally;
use crate::tokens::Counts;
use crate::{Config, Fault, Stats};

const BODIES_KEPT: usize = 100;

/// The state and the gate, shared by the connections and the owner.
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) gate: watch::Sender<Gate>,
}

/// All but the gate.
pub(crate) struct State {
    pub(crate) config: Config,
    pub(crate) limits: Limits,
    pub(crate) prefixes: Prefixes,
    pub(crate) counts: Counts,
    pub(crate) tally: Tally,
    pub(crate) rng: Rng,
    pub(crate) script: VecDeque<Option<Fault>>,
    pub(crate) bodies: VecDeque<Value>,
}

#[derive(Clone, Copy)]
pub(crate) struct Gate {
    /// Number of answers that it still lets through; no number is all.
    open_for: Option<u64>,
    /// Calls of `release`: each lets go of all requests that came before it.
    pub(crate) releases: u64,
}

impl State {
    pub(crate) fn configure(&mut self, change: impl FnOnce(&mut Config)) {
        // The time up to now passed under the old configuration.
        self.limits.advance(Instant::now(), &self.config);
        let other = self.config.other_client;
        change(&mut self.config);
        if self.config.other_client != other {
            self.limits.restart_other();
        }
    }

    pub(crate) fn reset_stats(&mut self) {
        self.limits.advance(Instant::now(), &self.config);
        self.limits.reset_meter();
        self.tally.reset();
    }

    fn stats(&mut self) -> Stats {
        Stats { rows: self.tally.rows(), ..self.totals() }
    }

    /// The stats without the rows.
    pub(crate) fn totals(&mut self) -> Stats {
        self.limits.advance(Instant::now(), &self.config);
        self.tally.totals(self.limits.meter(), &self.config.caps())
    }

    pub(crate) fn keep_body(&mut self, body: Value) {
        if self.bodies.len() == BODIES_KEPT {
            self.bodies.pop_front();
        }
        self.bodies.push_back(body);
    }
}

impl Shared {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            state: Mutex::new(State {
                rng: Rng::with_seed(config.seed),
                config,
                limits: Limits::default(),
                prefixes: Prefixes::default(),
                counts: Counts::default(),
                tally: Tally::new(Instant::now()),
                script: VecDeque::new(),
                bodies: VecDeque::new(),
            }),
            gate: watch::Sender::new(Gate { open_for: None, releases: 0 }),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A closure given to `configure` may have panicked; its test tells.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn hold(&self) {
        self.hold_after(0);
    }

    pub(crate) fn hold_after(&self, answers: u64) {
        self.gate.send_modify(|gate| gate.open_for = Some(answers));
    }

    /// Returns true if answers are held back by now.
    pub(crate) fn holds(&self) -> bool {
        self.gate.borrow().open_for == Some(0)
    }

    pub(crate) fn release(&self) {
        self.gate.send_modify(|gate| {
            gate.open_for = None;
            gate.releases += 1;
        });
    }

    /// Waits until the gate lets an answer through: it is open (which does not help a request that hangs), or was
    /// released since the request came, whatever was held since.
    pub(crate) async fn pass(&self, gate: &mut watch::Receiver<Gate>, releases_before: u64, hangs: bool) {
        let may_pass = |gate: &Gate| gate.releases > releases_before || (!hangs && gate.open_for != Some(0));
        let mut passed = false;
        while !passed {
            // Fails only without a sender, and `self` holds it.
            let _ = gate.wait_for(may_pass).await;
            // Only as many of the waiting requests go as it is open for.
            self.gate.send_if_modified(|gate| {
                passed = may_pass(gate);
                match &mut gate.open_for {
                    Some(answers) if passed && gate.releases == releases_before => *answers -= 1,
                    _ => (),
                }
                false
            });
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        self.lock().stats()
    }
}
