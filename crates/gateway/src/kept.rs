//! The state that outlives the gateway: what its lanes sent within the last minute, and what they learnt of limits. The
//! network thread notes it after each request; the main thread puts it into shared memory as the process ends.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use llm_batch_core::limiter::{self, Limits};

use crate::key::LaneKey;

/// Most lanes that are kept; those that were used last.
pub const MOST_LANES: usize = 64;
/// Amounts sent longer ago (ms) count no more.
const COUNTS_FOR: u64 = 61_000;
/// Time 0 of the gateway lies this far (ms) before its start, so that windows before the start can be reckoned with.
pub(crate) const BEFORE_START: u64 = 3_600_000;

/// A lane, as plain data.
#[derive(Debug, Clone, Copy)]
pub struct KeptLane {
    key: u64,
    /// When (ms) this was so; outside of the gateway how long ago.
    at: u64,
    /// The limits that answers have reported.
    pub(crate) reported: Limits,
    limiter: limiter::Kept,
}

impl KeptLane {
    /// Its limiter, under these limits; it is `now` (ms).
    pub(crate) fn limiter(&self, limits: Limits, now: u64) -> limiter::Limiter {
        limiter::Limiter::restore(limits.min(self.reported), &self.limiter, now.saturating_sub(self.at), now)
    }
}

/// All that is kept.
#[derive(Debug, Clone, Default)]
pub struct Stock {
    /// For so long (ms) all that was sent is in it.
    pub known_for: u64,
    /// The lanes, at most `MOST_LANES`.
    pub lanes: Vec<KeptLane>,
}

impl Stock {
    /// The same so many ms later, when nothing was sent meanwhile.
    pub fn later(mut self, ms: u64) -> Self {
        self.known_for = self.known_for.saturating_add(ms);
        self.lanes.iter_mut().for_each(|lane| lane.at = lane.at.saturating_add(ms));
        self
    }
}

#[derive(Debug)]
struct Notes {
    /// Since when (ms) all that was sent is in it.
    known_since: u64,
    lanes: Vec<KeptLane>,
}

/// Notes of the network thread, read by the process' main thread.
#[derive(Debug, Clone)]
pub struct Kept {
    started: Instant,
    notes: Arc<Mutex<Notes>>,
}

impl Kept {
    pub(crate) fn new(before: Stock) -> Self {
        let at = |age: u64| BEFORE_START.saturating_sub(age);
        let lanes = before.lanes.into_iter().map(|lane| KeptLane { at: at(lane.at), ..lane }).collect();
        let notes = Notes { known_since: at(before.known_for), lanes };
        Self { started: Instant::now(), notes: Arc::new(Mutex::new(notes)) }
    }

    /// The gateway's time (ms).
    pub(crate) fn now(&self) -> u64 {
        BEFORE_START + self.started.elapsed().as_millis() as u64
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when (ms) it is known what was sent.
    pub(crate) fn known_since(&self) -> u64 {
        self.notes().known_since
    }

    /// The note on a lane.
    pub(crate) fn lane(&self, key: &LaneKey) -> Option<KeptLane> {
        let key = hash(key);
        self.notes().lanes.iter().find(|lane| lane.key == key).copied()
    }

    /// Notes how a lane stands at `now` (ms).
    pub(crate) fn note(&self, now: u64, key: &LaneKey, reported: Limits, limiter: limiter::Kept) {
        let lane = KeptLane { key: hash(key), at: now, reported, limiter };
        let mut notes = self.notes();
        if let Some(old) = notes.lanes.iter_mut().find(|old| old.key == lane.key) {
            *old = lane;
        } else {
            if notes.lanes.len() >= MOST_LANES
                && let Some(oldest) = (0..notes.lanes.len()).min_by_key(|i| notes.lanes.get(*i).map(|lane| lane.at))
            {
                // Its amounts may still count, and no note says so any more.
                if notes.lanes.swap_remove(oldest).at + COUNTS_FOR > now {
                    notes.known_since = now;
                }
            }
            notes.lanes.push(lane);
        }
    }

    /// All of it as it stands now.
    pub fn stock(&self) -> Stock {
        let (now, notes) = (self.now(), self.notes());
        let age = |at: u64| now.saturating_sub(at);
        Stock {
            known_for: age(notes.known_since),
            lanes: notes.lanes.iter().map(|lane| KeptLane { at: age(lane.at), ..*lane }).collect(),
        }
    }
}

/// Two lanes of one hash would count each other's requests too, no more.
fn hash(key: &LaneKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}
