//! What goes out: packs within the limits.

use std::rc::Rc;
use std::time::Duration;

use llm_batch_core::dialect;
use llm_batch_core::limiter::{Refusal, Tokens};
use llm_batch_core::prompt;
use tokio::sync::Notify;

use super::{InFlight, LaneKey, Launch, State, too_long};
use crate::lane::Next;

impl State {
    /// A request is sent now (ms): since it was granted, other work may have gone before it.
    pub fn sent(&mut self, now: u64, id: u64) {
        let Some(mut request) = self.in_flight.remove(&id) else { return };
        if let Some(lane) = self.lanes.get_mut(&request.lane) {
            request.grant = lane.limiter.sent(request.grant, now);
            request.sent = now;
        }
        self.in_flight.insert(id, request);
    }

    /// What can be sent at `now` (ms), and when to look again.
    pub fn pump(&mut self, now: u64) -> (Vec<Launch>, Option<u64>) {
        let mut launches = Vec::new();
        let mut wake: Option<u64> = None;
        let keys: Vec<LaneKey> =
            self.lanes.iter().filter(|(_, l)| !l.groups.is_empty()).map(|(k, _)| k.clone()).collect();
        for key in keys {
            match self.pump_lane(now, &key, &mut launches) {
                Some(at) => wake = Some(wake.map_or(at, |w| w.min(at))),
                None => continue,
            }
        }
        self.flush();
        (launches, wake)
    }

    fn pump_lane(&mut self, now: u64, key: &LaneKey, launches: &mut Vec<Launch>) -> Option<u64> {
        let mut wake: Option<u64> = None;
        loop {
            let lane = self.lanes.get_mut(key)?;
            if lane.in_flight >= lane.may_be_in_flight() {
                return wake;
            }
            lane.order();
            let largest = lane.limiter.largest_request();
            let mut found = None;
            for (i, (_, group)) in lane.groups.iter_mut().enumerate() {
                let most = largest.unwrap_or(u64::MAX).min(group.stream.model.max_request_tokens);
                let most = (most as f64 / lane.prompt_ratio.apply(1000) as f64 * 1000.0) as usize;
                match group.next(now, most) {
                    Next::Rows(rows) => {
                        found = Some((i, rows, most));
                        break;
                    }
                    Next::Until(at) => wake = Some(wake.map_or(at, |w| w.min(at))),
                    Next::Empty => {}
                }
            }
            let Some((i, rows, most)) = found else { return wake };
            let learned = lane.learned;
            let (prompt_ratio, answer_ratio) = (lane.prompt_ratio, lane.answer_ratio);
            let (group_key, group) = lane.groups.get_mut(i)?;
            let group_key = group_key.clone();
            let options = &group.stream.task.options;
            let ids = random_ids(rows.len());
            let format = learned.format(options.structured_output);
            let response_format = prompt::response_format(options.answer_shape, format, &group.legend, &ids);
            let estimate = group.tokens(&rows, response_format.as_ref());
            let reserve =
                Tokens { input: prompt_ratio.apply(estimate.input), output: answer_ratio.apply(estimate.output) };
            if rows.len() == 1 && (estimate.input + estimate.output) as usize > most {
                for row in rows {
                    self.outcome(row.conn, row.n, row.bytes, row.attempts, too_long());
                }
                continue;
            }
            let grant = match lane.limiter.reserve(now, reserve) {
                Ok(grant) => grant,
                Err(Refusal::Until(at)) => {
                    let (_, group) = lane.groups.get_mut(i)?;
                    group.put_back(rows);
                    return Some(wake.map_or(at, |w| w.min(at)));
                }
                Err(Refusal::TooLarge) => {
                    self.too_large(now, key, &group_key, rows);
                    continue;
                }
            };
            let (_, group) = lane.groups.get_mut(i)?;
            let (system, user) = group.messages(&rows, &ids);
            let body = dialect::body(&dialect::Request {
                model: &group.stream.model.model,
                system,
                user: &user,
                max_tokens: answer_ratio.apply(estimate.output) * 2 + learned.spare_answer_tokens,
                max_completion_tokens: learned.max_completion_tokens,
                response_format,
                parameters: &group.stream.model.parameters,
            });
            let stream = Rc::clone(&group.stream);
            let timeout = Duration::from_millis(stream.model.request_timeout_ms);
            group.in_flight += 1;
            group.count_served(rows.len());
            lane.in_flight += 1;
            lane.in_flight_rows += rows.len();
            lane.requests_total += 1;
            lane.rows_total += rows.len() as u64;
            let abandoned = Rc::new(Notify::new());
            let id = self.id();
            launches.push(Launch { id, stream, body, timeout, abandoned: Rc::clone(&abandoned) });
            self.in_flight.insert(
                id,
                InFlight {
                    lane: key.clone(),
                    group: group_key,
                    rows,
                    ids,
                    grant,
                    estimate,
                    sent: now,
                    format,
                    max_completion_tokens: learned.max_completion_tokens,
                    abandoned,
                },
            );
        }
    }
}

/// Distinct numbers of three digits, each one token, in random order.
fn random_ids(n: usize) -> Vec<u16> {
    let mut ids = fastrand::choose_multiple(100..1000, n);
    fastrand::shuffle(&mut ids);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_distinct_three_digits() {
        for n in [1, 50, 500] {
            let mut ids = random_ids(n);
            assert_eq!(ids.len(), n);
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), n);
            assert!(ids.iter().all(|i| (100..1000).contains(i)));
        }
    }
}
