//! The models of a group: which of them take its rows.

use std::rc::Rc;

use crate::key::LaneKey;
use crate::protocol::{MOST_MODELS, Policy, Stop, Stream};
use llm_batch_core::dialect::Service;
use llm_batch_core::pack::Size;

/// A group as one model serves it.
#[derive(Debug)]
pub struct Member {
    pub lane: LaneKey,
    /// The group's stream, of this model alone.
    pub stream: Rc<Stream>,
    /// The same by decisions, if it may be asked so or in a chat.
    pub decided: Option<Rc<Stream>>,
    /// Its place among the stream's models.
    pub place: usize,
    /// The number of rows that go into a request.
    pub size: Size,
    /// The members that stand before it: a bit each.
    pub before: u32,
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
        let (mut all, policy): (Vec<Self>, Policy) = (Vec::new(), stream.policy);
        for (place, stream) in stream.alone().into_iter().take(MOST_MODELS).enumerate() {
            let lane = LaneKey::of(&stream);
            if all.iter().all(|member| member.lane != lane) {
                let size = Size::new(stream.task.options.max_rows_per_request as usize);
                let before = if policy == Policy::Spread { 0 } else { (1 << all.len()) - 1 };
                all.push(Self { lane, decided: stream.decided(), stream, place, size, before, stopped: None });
            }
        }
        all
    }

    /// Its stream to a service.
    pub fn stream(&self, service: Service) -> &Rc<Stream> {
        self.decided.as_ref().filter(|_| service == Service::Decisions).unwrap_or(&self.stream)
    }

    pub fn is_stopped(&self, now: u64) -> bool {
        self.stopped.as_ref().is_some_and(|stopped| now < stopped.until)
    }
}
