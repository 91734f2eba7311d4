//! What comes back with a 2xx: labels, and rows to ask again.

use std::collections::BTreeMap;
use std::rc::Rc;

use llm_batch_core::answer::{self, Verdict as Read};
use llm_batch_core::dialect::{Finish, Reply};
use llm_batch_core::limiter::Tokens;
use llm_batch_core::pack;
use llm_batch_core::trouble::Report;

use super::{InFlight, State};
use crate::lane::Queued;
use crate::protocol::Verdict;

impl State {
    /// Takes a finished request; `None` if it was abandoned.
    pub fn finish(&mut self, now: u64, id: u64, result: Option<Result<Reply, Report>>) {
        let Some(request) = self.in_flight.remove(&id) else { return };
        let Some(lane) = self.lanes.get_mut(&request.lane) else { return };
        lane.in_flight = lane.in_flight.saturating_sub(1);
        lane.in_flight_rows = lane.in_flight_rows.saturating_sub(request.rows.len());
        if let Some(group) = lane.group(&request.group) {
            group.in_flight = group.in_flight.saturating_sub(1);
        }
        let lane_key = request.lane.clone();
        match result {
            // Whoever asked has gone; what it took is not known and stays reserved.
            None => self.give_back(request.rows),
            Some(Ok(reply)) => self.answered(now, request, &reply),
            Some(Err(report)) => self.troubled(now, request, &report),
        }
        self.flush();
        self.tidy(&lane_key);
    }

    fn answered(&mut self, now: u64, request: InFlight, reply: &Reply) {
        let InFlight { lane: lane_key, group: group_key, rows, ids, grant, estimate, sent, .. } = request;
        let usage = reply.usage.unwrap_or(estimate);
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        lane.limiter.settle(grant, usage);
        lane.prompt_ratio.observe(estimate.input, usage.input);
        lane.answers(now, sent);
        if reply.finish == Finish::Length {
            lane.learned.answers_are_cut();
        } else {
            lane.answer_ratio.observe(estimate.output, usage.output);
        }
        let Some(group) = lane.group(&group_key) else { return };
        group.succeeded = true;
        let legend = Rc::clone(&group.legend);
        let options = group.stream.task.options.clone();
        let read = answer::read(&reply.text, &ids, &legend);
        self.spend(&rows, usage);

        let size = rows.len();
        let mut missing = 0;
        for (mut row, verdict) in rows.into_iter().zip(read) {
            row.attempts += 1;
            let last = row.attempts >= options.max_attempts;
            let given_up = |class: &str, detail: &str| Verdict::Skip { class: class.into(), detail: detail.into() };
            let failed = |class: &str, detail: &str| Verdict::Fail { class: class.into(), detail: detail.into() };
            let done = match (verdict, reply.finish) {
                (Read::Label(i), _) => Some(Verdict::Label(i as u32)),
                (_, Finish::Refused) if size == 1 => {
                    Some(given_up("refused", "the model or its filter refused to answer"))
                }
                (Read::Missing, Finish::Length) if last => {
                    Some(given_up("no_answer", "the answer was cut off before it came to this row"))
                }
                (Read::Missing, _) if last => Some(given_up("no_answer", "the model gave no answer for this row")),
                (Read::UnknownCode, _) if last => {
                    Some(failed("unknown_code", "the model answered with something that is not among the labels"))
                }
                (Read::Contradicted, _) if last => {
                    Some(failed("contradicted", "the model gave two different answers for this row"))
                }
                _ => None,
            };
            match done {
                Some(verdict) => self.outcome(row.conn, row.n, row.bytes, row.attempts, verdict),
                None => {
                    missing += 1;
                    row.most_rows = pack::rows_after(row.attempts, options.max_attempts, size);
                    self.again(&lane_key, &group_key, row);
                }
            }
        }
        if missing > 0 {
            let what = match reply.finish {
                Finish::Length => "an answer was cut off",
                Finish::Refused => "the model or its filter refused to answer",
                Finish::Complete => "an answer was incomplete",
            };
            let message = format!("{what}: {missing} of {size} rows are asked again");
            self.notice(now, &lane_key, "incomplete", &message);
        }
    }

    /// Shares the tokens of a request among the clients whose rows were in it; nothing is lost by rounding.
    fn spend(&mut self, rows: &[Queued], usage: Tokens) {
        let mut by_conn: BTreeMap<u64, u64> = BTreeMap::new();
        for row in rows {
            *by_conn.entry(row.conn).or_default() += 1;
        }
        let all = rows.len().max(1) as u64;
        let (mut before, mut first) = (0, true);
        for (conn, n) in by_conn {
            let share = |total: u64| total * (before + n) / all - total * before / all;
            if let Some(c) = self.conns.get_mut(&conn) {
                c.spent.requests += u64::from(first);
                c.spent.input_tokens += share(usage.input);
                c.spent.output_tokens += share(usage.output);
            }
            before += n;
            first = false;
        }
    }
}
