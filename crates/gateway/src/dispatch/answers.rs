//! What comes back with a 2xx: labels, and rows to ask again.

use std::collections::BTreeMap;
use std::rc::Rc;

use llm_batch_core::answer::{self, Verdict as Read};
use llm_batch_core::dialect::{Finish, Reply};
use llm_batch_core::headers::Reported;
use llm_batch_core::limiter::{Left, Tokens};
use llm_batch_core::options::StructuredOutput;
use llm_batch_core::pack;
use llm_batch_core::thinking;
use llm_batch_core::trouble::Trouble;

use super::{InFlight, State};
use crate::protocol::Verdict;
use crate::request::Answered;

/// Part of its time after which an answer is called slow: then requests get smaller, before they run into it.
const SLOW: u64 = 2;
/// What is said of a row where all of the answer was thought.
const ONLY_THOUGHT: &str = "the model wrote its reasoning and no answer, and nothing is taken from reasoning; thinking is turned off \
    by llm_batch.alter_model(…, parameters => …) with {\"chat_template_kwargs\": {\"enable_thinking\": false}} for vLLM, \
    SGLang and llama.cpp, {\"think\": false} or {\"reasoning_effort\": \"none\"} for Ollama, {\"reasoning_effort\": \"none\"} or \
    \"minimal\" for OpenAI";

impl State {
    /// Takes a finished request; `None` if it was abandoned.
    pub fn finish(&mut self, now: u64, id: u64, answered: Option<Answered>) {
        if let Some(probing) = self.probing.remove(&id) {
            return self.end_probe(now, probing, answered);
        }
        let Some(request) = self.in_flight.remove(&id) else { return };
        let Some(lane) = self.lanes.get_mut(&request.lane) else { return };
        let in_flight = lane.in_flight;
        lane.in_flight = lane.in_flight.saturating_sub(1);
        lane.in_flight_rows = lane.in_flight_rows.saturating_sub(request.rows.len());
        if let Some(group) = lane.group(&request.group) {
            group.in_flight = group.in_flight.saturating_sub(1);
        }
        let lane_key = request.lane.clone();
        match answered {
            // Whoever asked has gone, or all is to stop; what it took is not known and stays reserved. Somebody else may
            // have come for its rows since.
            None => {
                self.unsure(&request);
                self.put_back(&lane_key, &request.group, request.rows);
            }
            Some(answered) => {
                let taken = answered.result.as_ref().ok().and_then(|reply| reply.usage).unwrap_or_default();
                lane.heed(now, &answered.said, taken);
                if !matches!(&answered.result, Err(report) if matches!(report.trouble, Trouble::Overload(_))) {
                    self.answers(now, &lane_key, &request.group);
                }
                match answered.result {
                    Ok(reply) => self.answered(now, request, &reply, &answered.said, in_flight),
                    Err(report) => self.troubled(now, request, &report, &answered.said, answered.is_unsure),
                }
            }
        }
        self.note(now, &lane_key);
        self.flush();
        self.tidy(now, &lane_key);
    }

    fn answered(&mut self, now: u64, request: InFlight, reply: &Reply, said: &Reported, in_flight: usize) {
        let InFlight {
            lane: lane_key,
            group: group_key,
            rows,
            ids,
            grant,
            estimate,
            reserved,
            sent,
            worst,
            spared,
            learned,
            ..
        } = request;
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        lane.answers(now);
        lane.learned.observe_end(reply.finish == Finish::Length, spared);
        let Some((_, group)) = lane.groups.iter_mut().find(|(k, _)| *k == group_key) else { return };
        // Of a budget, who does not say what it took may have taken the most.
        let usage = reply.usage.unwrap_or(if group.purse.is_some() { worst } else { estimate });
        lane.concurrency.answered(sent, now, usage, in_flight);
        let mean = group.mean_answer(rows.len());
        lane.measured.observe(estimate, mean, usage, reply.finish == Finish::Length);
        let counts = group.stream.endpoint.counts;
        lane.limiter.settle(grant, counts.settle(reserved, usage), left(said));
        group.succeeded = true;
        if let Some(purse) = &mut group.purse {
            purse.give_back(worst, usage);
        }
        let legend = Rc::clone(&group.legend);
        let options = group.stream.task.options.clone();
        // What has ended by itself goes no further.
        let whole = if reply.finish == Finish::Complete { format!("{}\n", reply.text) } else { reply.text.clone() };
        let read = answer::read(&whole, &ids, &legend);
        let is_thought = reply.finish == Finish::Complete
            && thinking::spoken(&reply.text).trim().is_empty()
            && (reply.has_reasoning || !reply.text.trim().is_empty());
        let unanswered = read.iter().filter(|v| !matches!(v, Read::Label(_))).count();
        let payers = group.payers(&rows);
        let form = learned.form(&options);
        if unanswered < rows.len() {
            lane.learned.forms.works(form);
        } else if options.structured_output == StructuredOutput::Auto
            && reply.finish == Finish::Complete
            && answer::is_prose(&reply.text)
            && lane.learned.forms.answered_in_prose(form)
        {
            self.spend(&payers, usage, reply.cached_input, now.saturating_sub(sent));
            self.put_back(&lane_key, &group_key, rows);
            self.notice(now, &lane_key, "prose", "the model answers in prose although JSON was asked for");
            return;
        }
        let is_slow = now.saturating_sub(sent) > group.stream.model.request_timeout_ms / SLOW;
        group.size.observe(rows.len(), unanswered, is_slow);
        self.spend(&payers, usage, reply.cached_input, now.saturating_sub(sent));

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
                (Read::Missing, _) if last && is_thought => Some(given_up("no_answer", ONLY_THOUGHT)),
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
                Some(verdict) => self.done(&lane_key, &group_key, row, verdict),
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

    /// A request may have been charged or not.
    pub(super) fn unsure(&mut self, request: &InFlight) {
        let group = self.lanes.get_mut(&request.lane).and_then(|l| l.group(&request.group));
        let payer = group.and_then(|g| g.payers(&request.rows).first().copied());
        if let Some(c) = payer.and_then(|conn| self.conns.get_mut(&conn)) {
            c.spent.unconfirmed_input_tokens += request.worst.input;
            c.spent.unconfirmed_output_tokens += request.worst.output;
        }
    }

    /// Shares the tokens of a request, and the time (ms) that it took, among the clients whose rows were in it; nothing is
    /// lost by rounding.
    fn spend(&mut self, payers: &[u64], usage: Tokens, cached: u64, took: u64) {
        let mut by_conn: BTreeMap<u64, u64> = BTreeMap::new();
        for conn in payers {
            *by_conn.entry(*conn).or_default() += 1;
        }
        let all = payers.len().max(1) as u64;
        let (mut before, mut first) = (0, true);
        for (conn, n) in by_conn {
            let share = |total: u64| total * (before + n) / all - total * before / all;
            if let Some(c) = self.conns.get_mut(&conn) {
                c.spent.requests += u64::from(first);
                c.spent.input_tokens += share(usage.input);
                c.spent.cached_input_tokens += share(cached);
                c.spent.output_tokens += share(usage.output);
                c.spent.row_ms += n * took;
            }
            before += n;
            first = false;
        }
    }
}

/// What the provider says is left of its limits.
pub(super) fn left(said: &Reported) -> Left {
    Left {
        requests: said.requests.remaining,
        tokens: said.tokens.remaining,
        input_tokens: said.input_tokens.remaining,
        output_tokens: said.output_tokens.remaining,
    }
}
