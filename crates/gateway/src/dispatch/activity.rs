//! The gateway's present state, lane by lane.

use std::collections::HashMap;

use super::{State, circuits};
use crate::key::LaneKey;
use crate::protocol::Activity;

impl State {
    pub fn activity(&mut self, now: u64) -> Vec<Activity> {
        let groups = &self.groups;
        let mut roles: HashMap<&LaneKey, Vec<u32>> = HashMap::new();
        for (group, stream) in self.conns.values().filter_map(|c| c.stream.as_ref()) {
            for member in groups.get(*group).map_or(&[][..], |group| &group.members) {
                roles.entry(&member.lane).or_default().push(stream.role);
            }
        }
        self.lanes
            .iter_mut()
            .map(|(key, lane)| {
                let usage = lane.limiter.usage(now);
                let (breaker, until) = circuits::of_lane(&self.circuits, key);
                let blocked = until.unwrap_or(0).max(lane.limiter.blocked_until());
                Activity {
                    account: key.account.to_string(),
                    model: key.model.to_string(),
                    roles: roles.get(key).cloned().unwrap_or_default(),
                    queued: groups.of(lane).map(|(_, g)| g.queued() as u64).sum(),
                    in_flight_requests: lane.in_flight as u64,
                    in_flight_rows: lane.in_flight_rows as u64,
                    tokens_in_window: usage.tokens,
                    tokens_limit: usage.tokens_limit,
                    requests_in_window: usage.requests,
                    requests_limit: usage.requests_limit,
                    used: usage.used,
                    requests_allowed: lane.allowed(false) as u64,
                    rows_allowed: groups.of(lane).filter_map(|(_, g)| Some(g.member(key)?.1.size.rows() as u64)).min(),
                    share: usage.share,
                    reported_left: usage.reported_left,
                    token_ratio: lane.chats.measured.prompt.apply(1000) as f64 / 1000.0,
                    answer_ratio: lane.chats.measured.sizes.ratio(),
                    latency_ms: lane.concurrency.latency(),
                    thinking_tokens: lane.chats.measured.thinking.usual(),
                    rows_reused: lane.rows_reused,
                    breaker,
                    waiting_ms: blocked.checked_sub(now).filter(|ms| *ms > 0),
                    requests_total: lane.requests_total,
                    rows_total: lane.rows_total,
                    throttled: lane.throttled,
                    errors: lane.errors,
                    last_error: lane.last_error.clone(),
                    asked_by: lane.last_service.map(|service| service.name().to_owned()),
                }
            })
            .collect()
    }
}
