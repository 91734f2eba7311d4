//! The models of a group: which of them take its rows.

use std::rc::Rc;

use crate::key::LaneKey;
use crate::protocol::{MOST_MODELS, Policy, Stop, Stream};
use llm_batch_core::pack::Size;

/// A group as one model serves it.
#[derive(Debug)]
pub struct Member {
    pub lane: LaneKey,
    /// The group's stream, of this model alone.
    pub stream: Rc<Stream>,
    /// Its place among the stream's models.
    pub place: usize,
    /// The number of rows that go into a request.
    pub size: Size,
    /// It has stopped, and other members take the rows.
    pub stopped: Option<Stopped>,
}

/// Why a member has stopped.
#[derive(Debug)]
pub struct Stopped {
    /// Until when (ms).
    pub until: u64,
    pub stop: Stop,
    /// Whose request it was.
    pub role: Option<u32>,
}

impl Member {
    /// Those of a stream, in order.
    pub fn all(stream: &Rc<Stream>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for (place, stream) in stream.alone().into_iter().take(MOST_MODELS).enumerate() {
            let lane = LaneKey::of(&stream);
            if all.iter().all(|member| member.lane != lane) {
                let size = Size::new(stream.task.options.max_rows_per_request as usize);
                all.push(Self { lane, stream, place, size, stopped: None });
            }
        }
        all
    }

    pub fn is_stopped(&self, now: u64) -> bool {
        self.stopped.as_ref().is_some_and(|stopped| now < stopped.until)
    }
}

/// A member's turn to take rows.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// The member, and those that can take rows: a bit each.
    pub own: u32,
    pub open: u32,
    pub policy: Policy,
}

impl Turn {
    /// The only member's.
    pub const ALONE: Self = Self { own: 1, open: 1, policy: Policy::Failover };

    /// Returns true if it takes a row that these members could not answer. Once nobody else is left it may try again.
    pub fn takes(self, failed: u32) -> bool {
        let fresh = self.open & !failed;
        let left = if fresh == 0 { self.open } else { fresh };
        match self.policy {
            Policy::Spread => left & self.own != 0,
            // The lowest bit.
            Policy::Failover => left & left.wrapping_neg() == self.own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_a_member_that_takes_it_as_long_as_one_is_open() {
        for (open, failed) in (1..16).flat_map(|open| (0..16).map(move |failed| (open, failed))) {
            for policy in [Policy::Failover, Policy::Spread] {
                let takes = |own: &u32| Turn { own: *own, open, policy }.takes(failed);
                let takers: Vec<u32> = [1, 2, 4, 8].into_iter().filter(takes).collect();
                assert!(!takers.is_empty() && takers.iter().all(|own| own & open != 0), "{open:b} {failed:b}");
                let is_fresh = open & !failed != 0;
                assert!(takers.iter().all(|own| !is_fresh || own & failed == 0), "{open:b} {failed:b}");
                assert!(policy == Policy::Spread || takers.len() == 1, "{open:b} {failed:b}");
            }
        }
    }
}
