//! Answers with a 2xx: what they say of rows, and rows to ask again.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::rc::Rc;

use llm_batch_core::answer::{self, Verdict as Read};
use llm_batch_core::dialect::{Finish, Reply, Service};
use llm_batch_core::headers::Reported;
use llm_batch_core::limiter::{Left, Tokens};
use llm_batch_core::options::StructuredOutput;
use llm_batch_core::pack;
use llm_batch_core::patience::Way;
use llm_batch_core::route::Used;
use llm_batch_core::task::Kind;
use llm_batch_core::trouble::{Report, Trouble};
use llm_batch_core::{thinking, thought};

use super::doubts::{ONLY_THOUGHT, Said, shown};
use super::{Asked, InFlight, State, cheaper};
use crate::cache::TextKey;
use crate::group::Group;
use crate::key::{GroupId, LaneKey};
use crate::lane::Lane;
use crate::protocol::{Endpoint, Verdict};
use crate::request::Answered;
use crate::row::Row;
use crate::tokens;

/// Part of its time after which an answer is called slow: then requests get smaller, before they run into it.
const SLOW: u64 = 2;
/// Answers that are cut off before they come to a row, until that is taken for the row's fault. Each time the cap grows by
/// as much as it may.
const MOST_CUT: u32 = 8;

/// The detail for a row for which an answer is refused.
const REFUSED: &str = "the model or its filter refused to answer";

/// The end of an answer, as far as its rows are concerned.
struct Ended {
    finish: Finish,
    /// No row is charged for what is missing.
    is_no_fault: bool,
    /// All of it was thought.
    is_thought: bool,
    /// Most attempts of a row.
    max_attempts: u32,
    /// The task.
    scope: TextKey,
    /// The cap at which it was cut off.
    cap: String,
}

/// An answer, seen without its rows.
struct Seen<'a> {
    reply: &'a Reply,
    /// The rows that were asked about; how many of them got a label, and how many are refused by themselves.
    size: usize,
    answers: usize,
    refused: usize,
    /// Tokens that were thought; and whether nothing else was said.
    thought: u64,
    is_thought: bool,
    is_cut: bool,
    /// It was cut off at our cap, and not at one of the server's own.
    is_at_cap: bool,
    /// So it was, and the cap can be larger: that is no row's fault.
    grows: bool,
}

impl<'a> Seen<'a> {
    fn new(reply: &'a Reply, read: &[Read], asked: Asked, kind: &dyn Kind) -> Self {
        let spoken = if kind.has_vectors() { Cow::Borrowed("") } else { thinking::spoken(&reply.text) };
        let answers = read.iter().filter(|v| matches!(v, Read::Answer(_))).count();
        let refused = read.iter().filter(|v| **v == Read::Refused).count();
        let is_cut = reply.finish == Finish::Length;
        // A model that writes more than it may gets no larger cap; one that only thinks does.
        let is_bounded = kind.most_tokens().is_some();
        let longest = kind.longest().map(|most| most * read.len());
        let runs_on =
            || longest.is_some_and(|most| spoken.trim_start().starts_with('{') && tokens::count(&spoken) > most);
        let is_too_long = is_cut && ((is_bounded && !spoken.trim().is_empty()) || runs_on());
        let fills_cap = reply.usage.output.is_none_or(|n| n >= asked.worst.output * 9 / 10);
        let is_at_cap = is_cut && (reply.text.is_empty() || fills_cap) && !is_too_long;
        let thought = match reply.usage.output {
            None => 0,
            Some(output) if is_cut && answers == 0 && !is_too_long => output,
            Some(output) => thought::thought(output, reply.thought, &spoken, tokens::count),
        };
        let is_thought = reply.finish == Finish::Complete
            && !kind.has_vectors()
            && spoken.trim().is_empty()
            && (reply.has_reasoning || !reply.text.trim().is_empty());
        Self {
            reply,
            size: read.len(),
            answers,
            refused,
            thought,
            is_thought,
            is_cut,
            is_at_cap,
            grows: is_at_cap && asked.can_grow,
        }
    }
}

impl State {
    /// Takes a finished request; `None` if it was abandoned.
    pub fn finish(&mut self, now: u64, id: u64, answered: Option<Answered>) {
        if let Some(probing) = self.probing.remove(&id) {
            return self.end_probe(now, probing, answered);
        }
        let Some(request) = self.in_flight.remove(&id) else { return };
        let Some((request, mut answered)) = self.doubted(now, request, answered) else { return };
        let Some(lane) = self.lanes.get_mut(&request.lane) else { return };
        let in_flight = lane.in_flight;
        lane.in_flight = lane.in_flight.saturating_sub(1);
        lane.in_flight_rows = lane.in_flight_rows.saturating_sub(request.rows.len());
        let standing = lane.standings.of(now, request.asked.scope);
        standing.patience.ended();
        if let Some(Err(report)) = answered.as_mut().map(|answered| &mut answered.result)
            && standing.patience.has_answered()
        {
            report.trouble.may_pass();
        }
        if let Some(group) = self.groups.get_mut(request.group) {
            group.in_flight = group.in_flight.saturating_sub(1);
            if group.decided().is_some() {
                lane.standings.of(now, group.scope).cheaper.ended(request.asked.service);
            }
        }
        let (lane_key, group_id) = (request.lane.clone(), request.group);
        match answered {
            // The client disconnected or the gateway is stopping. Usage is unknown, so the reservation is kept. Another
            // client may have asked for the rows since.
            None => {
                if !request.is_accounted {
                    self.unsure(&request);
                }
                self.put_back(request.group, request.rows);
            }
            Some(answered) if answered.has_no_place => self.had_no_place(now, request, &answered),
            Some(mut answered) => {
                if let Ok(reply) = &mut answered.result {
                    reply.usage = reply.usage.believable(request.asked.worst);
                    // Half of what we count is sure. Cached tokens do not count everywhere.
                    let took = reply.usage.or(Tokens { input: request.asked.estimate.input / 2, output: 0 });
                    let took = Tokens { input: took.input.saturating_sub(reply.cached_input), ..took };
                    lane.serves(now, &answered.said, took);
                } else {
                    // Its vectors may have been more than an answer may have.
                    lane.record_mut(request.asked.service).measured.number = None;
                }
                let trouble = answered.result.as_ref().err().map(|report| &report.trouble);
                if !matches!(trouble, Some(Trouble::Overload(_))) {
                    lane.vouched = None;
                    // One that asks to wait, and may be paid for, tells nothing of the task.
                    if !(matches!(trouble, Some(Trouble::Rate(_))) && answered.has_begun) {
                        lane.standings.of(now, request.asked.scope).is_answered();
                    }
                    self.answers(now, &lane_key, (request.group, request.asked.service));
                }
                match &answered.result {
                    Ok(reply) => self.answered(now, request, reply, &answered, in_flight),
                    Err(report) => {
                        let charged = (answered.is_unsure, answered.has_begun);
                        self.troubled(now, request, report, &answered.said, charged);
                    }
                }
            }
        }
        self.release_last(group_id);
        self.note(now, &lane_key);
        self.flush();
        self.tidy(now, group_id);
    }

    /// A request waited for a connection in vain. Nothing of it was sent, so nobody is charged and no provider is in trouble.
    fn had_no_place(&mut self, now: u64, request: InFlight, answered: &Answered) {
        let InFlight { lane: lane_key, group, rows, grant, asked, .. } = request;
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        lane.limiter.settle(grant, Tokens::default(), left(&answered.said));
        if let Some(purse) = self.groups.get_mut(group).and_then(|g| g.purse.as_mut()) {
            purse.give_back(asked.worst, Tokens::default());
        }
        self.put_back(group, rows);
        if let Err(report) = &answered.result {
            self.notice(now, &lane_key, "no place", &format!("{}; its rows are queued again", report.message));
        }
    }

    /// Reads the answer to the rows of a request. `None` if it answers another request.
    fn read(&self, request: &InFlight, reply: &Reply) -> Option<Vec<Read>> {
        let group = self.groups.get(request.group)?;
        // A complete answer cannot go on: its last line has an end.
        let whole = if reply.finish == Finish::Complete { format!("{}\n", reply.text) } else { reply.text.clone() };
        let mut read = answer::read(&whole, &request.ids, &*group.asking(request.asked.service).kind)?;
        for (_, verdict) in request.ids.iter().zip(&mut read).filter(|(id, _)| reply.refused.contains(id)) {
            *verdict = if *verdict == Read::Missing { Read::Refused } else { Read::Contradicted };
        }
        Some(read)
    }

    fn answered(&mut self, now: u64, request: InFlight, reply: &Reply, came: &Answered, in_flight: usize) {
        let read = self.read(&request, reply);
        let is_of_another = read.is_none();
        if is_of_another {
            came.distrust();
            let Some(lane) = self.lanes.get_mut(&request.lane) else { return };
            // Unless the model has yet to show that it can answer at all.
            if lane.standings.of(now, request.asked.scope).patience.is_proven(now) {
                let message = "the answer belongs to another request: most of its row numbers were not in this request"
                    .to_owned();
                let report = Report::new(Trouble::Overload(None), message);
                return self.troubled(now, request, &report, &came.said, (true, true));
            }
        }
        let read = read.unwrap_or_else(|| vec![Read::Missing; request.rows.len()]);
        let InFlight { lane: lane_key, group: group_id, mut rows, ids, asked, grant, .. } = request;
        let Some((lane, group)) = self.lanes.get_mut(&lane_key).zip(self.groups.get_mut(group_id)) else { return };
        // Of a chat that of a label alone says anything.
        let says = asked.service == Service::Decisions || group.asking(asked.service).kind.legend().is_some();
        for (row, id) in rows.iter_mut().zip(ids) {
            row.confidence = reply.confidence(id).filter(|_| says);
        }
        let seen = Seen::new(reply, &read, asked, &*group.asking(asked.service).kind);
        lane.answers(now, asked.service);
        if asked.is_flex {
            lane.flex.answered();
        }
        let standing = lane.standings.of(now, asked.scope);
        standing.accepts();
        standing.is_paid(&rows, seen.answers == 0);
        let (is_well, is_proven) = (standing.is_well(), standing.patience.has_answered());
        let Some(stream) = group.member(&lane_key).map(|(_, member)| Rc::clone(&member.stream)) else { return };
        // Decisions that have yet to give a valid answer may be of no use, and there is a chat.
        let is_in_vain = seen.answers + seen.refused == 0 && reply.finish != Finish::Refused;
        let is_decided = asked.service == Service::Decisions && group.decided().is_some();
        let is_to_fall = is_decided && is_in_vain && !is_proven;
        if is_to_fall {
            lane.standings.of(now, group.scope).cheaper.failed(now, false);
        } else if let Some((_, member)) = group.member(&lane_key) {
            cheaper::observe(now, lane, (group, member), &rows, asked, reply);
        }
        let is_prose = learn(now, &lane_key, (lane, group), &rows, asked, &seen, in_flight);
        if let Some(embed) = stream.task.spec.embeds().filter(|_| seen.answers > 0) {
            lane.record_mut(asked.service).measured.number = Some(embed.number(came.bytes, seen.answers));
        }
        let Endpoint { api, counts, .. } = &stream.endpoint;
        let reserved = counts.settle(asked.reserved, reply.counted(*api, asked.estimate));
        lane.limiter.settle(grant, reserved, left(&came.said));
        self.rank(now, group_id);
        self.pay(now, (&lane_key, group_id), &rows, asked, reply);
        let weight = match seen.answers {
            0 if seen.grows => Said::Cut,
            0 => Said::Barren,
            _ => Said::Valid(seen.size),
        };
        let is_given_up = !is_to_fall && self.weigh(now, &lane_key, group_id, asked, weight);
        let ended = Ended {
            finish: reply.finish,
            is_no_fault: seen.grows
                || is_prose
                || is_of_another
                || !is_well
                || is_to_fall
                || (seen.answers == 0 && asked.way != Way::AsEver),
            is_thought: seen.is_thought,
            max_attempts: stream.task.options.max_attempts,
            scope: asked.scope,
            cap: format!("{} tokens, {} of which went into thinking", asked.worst.output, seen.thought),
        };
        let is_spent = self.verdicts(now, (&lane_key, group_id), rows.into_iter().zip(read).collect(), &ended);
        if is_prose {
            self.notice(now, &lane_key, "prose", "the model answers in prose although JSON was requested");
        }
        if is_given_up {
            let key = stream.endpoint.api_key.as_ref().map_or("", |k| &k.0);
            let last = if seen.answers == 0 { shown(reply, key, seen.thought, seen.is_thought) } else { String::new() };
            self.give_up(now, &lane_key, asked.scope, &last);
        } else if is_spent && is_proven {
            self.stop_paying(now, &lane_key, asked, "most answers have no valid row");
        }
    }

    /// Charges a request that was answered to the clients whose rows were in it.
    fn pay(
        &mut self,
        now: u64,
        (lane_key, group_id): (&LaneKey, GroupId),
        rows: &[Row],
        Asked { estimate, worst, sent, .. }: Asked,
        reply: &Reply,
    ) {
        let Some(group) = self.groups.get_mut(group_id) else { return };
        let (payers, model) = (group.payers(rows), group.place(lane_key));
        let is_bounded = group.purse.is_some();
        if let Some(purse) = &mut group.purse {
            purse.give_back(worst, reply.usage.or(worst));
        }
        // A request with a budget whose usage is not reported may have taken the most.
        let is_unconfirmed = is_bounded && reply.usage.whole().is_none();
        if is_unconfirmed {
            self.unconfirmed(model, &payers, reply.usage.missing(worst));
        }
        let sure = reply.usage.or(if is_unconfirmed { Tokens::default() } else { estimate });
        let took = [sure.input, reply.cached_input, reply.written_input, sure.output];
        self.spend(model, &payers, took, reply.is_flex, now.saturating_sub(sent));
    }

    /// Decides about the rows of an answer. Returns true if nothing more is paid for some of them, though it is not
    /// their fault.
    fn verdicts(
        &mut self,
        now: u64,
        (lane_key, group_id): (&LaneKey, GroupId),
        rows: Vec<(Row, Read)>,
        ended: &Ended,
    ) -> bool {
        let Ended { finish, is_no_fault, max_attempts, .. } = *ended;
        let size = rows.len();
        let (mut missing, mut uncharged) = (0, Vec::new());
        for (mut row, verdict) in rows {
            row.paid += 1;
            if is_no_fault && row.cut < MOST_CUT && !matches!(verdict, Read::Answer(_) | Read::Refused) {
                row.cut += u32::from(finish == Finish::Length);
                uncharged.push(row);
                continue;
            }
            row.attempts += 1;
            let has_spare = self.has_spare(now, (lane_key, &row), (&verdict, size), ended);
            let last = row.attempts >= max_attempts && !has_spare;
            match conclusion(verdict, size, last, ended) {
                Ok(verdict) => self.conclude(now, lane_key, group_id, row, verdict),
                Err(wanted) => {
                    missing += 1;
                    row.wanted = wanted.or(row.wanted.take());
                    row.most_rows = pack::rows_after(row.attempts, max_attempts, size);
                    self.again(group_id, row);
                }
            }
        }
        missing += uncharged.len();
        let is_spent = uncharged.iter().any(|row| row.is_spent(max_attempts));
        self.put_back(group_id, uncharged);
        if missing > 0 {
            let what = match finish {
                Finish::Length => "an answer was cut off",
                Finish::Refused => "the model or its filter refused to answer",
                Finish::Complete => "an answer was incomplete",
            };
            let message = format!("{what}: {missing} of {size} rows are asked again");
            self.notice(now, lane_key, "incomplete", &message);
        }
        is_spent
    }

    /// Returns true if a row that was asked alone, and as often as it may be by itself, is asked once more: as often as others
    /// had an answer when they were asked again. One that has, now says so.
    fn has_spare(
        &mut self,
        now: u64,
        (lane_key, row): (&LaneKey, &Row),
        (verdict, size): (&Read, usize),
        ended: &Ended,
    ) -> bool {
        let Some(lane) = self.lanes.get_mut(lane_key) else { return false };
        let standing = lane.standings.of(now, ended.scope);
        let is_refused = *verdict == Read::Refused || ended.finish == Finish::Refused;
        if matches!(verdict, Read::Answer(_)) {
            // What a job refused of its answers says nothing here: such a row comes anew.
            if row.attempts > 1 && row.paid > 1 {
                standing.recovers();
            }
            return false;
        }
        let is_last = row.attempts >= ended.max_attempts && ended.max_attempts > 1;
        is_last && size == 1 && !is_refused && !row.is_spent(ended.max_attempts) && standing.takes_spare()
    }

    /// A request may have been charged or not.
    pub(super) fn unsure(&mut self, request: &InFlight) {
        let Some(group) = self.groups.get(request.group) else { return };
        let (payers, model) = (group.payers(&request.rows), group.place(&request.lane));
        self.unconfirmed(model, &payers, request.asked.worst);
    }

    fn unconfirmed(&mut self, model: usize, payers: &[u64], worst: Tokens) {
        if let Some(c) = payers.first().and_then(|conn| self.conns.get_mut(conn)) {
            let spent = &mut c.report(model).spent;
            spent.unconfirmed_input_tokens += worst.input;
            spent.unconfirmed_output_tokens += worst.output;
        }
    }

    /// Shares the tokens of a request, and the time (ms) that it took, among the clients whose rows were in it; nothing is
    /// lost by rounding. `tokens`: of its prompt, those cached, those written into the cache, of its answer.
    fn spend(&mut self, model: usize, payers: &[u64], tokens: [u64; 4], is_flex: bool, took: u64) {
        let mut by_conn: BTreeMap<u64, u64> = BTreeMap::new();
        for conn in payers {
            *by_conn.entry(*conn).or_default() += 1;
        }
        let all = payers.len().max(1) as u64;
        let (mut before, mut first) = (0, true);
        for (conn, n) in by_conn {
            let share = |total: u64| total * (before + n) / all - total * before / all;
            if let Some(c) = self.conns.get_mut(&conn) {
                let spent = &mut c.report(model).spent;
                spent.requests += u64::from(first);
                let [input, cached, written, output] = tokens.map(share);
                spent.input_tokens += input;
                spent.cached_input_tokens += cached;
                spent.written_input_tokens += written;
                spent.output_tokens += output;
                if is_flex {
                    let of_flex = spent.flex.iter_mut().zip([input, cached, written, output]);
                    of_flex.for_each(|(all, share)| *all += share);
                }
                spent.row_ms += n * took;
            }
            before += n;
            first = false;
        }
    }
}

/// The outcome of a row by an answer to `size` rows; else the value that the model is told when the row is asked again.
fn conclusion(verdict: Read, size: usize, last: bool, ended: &Ended) -> Result<Verdict, Option<String>> {
    let given_up = |class: &str, detail: &str| Ok(Verdict::Skip { class: class.into(), detail: detail.into() });
    let failed = |class: &str, detail: &str| Ok(Verdict::Fail { class: class.into(), detail: detail.into() });
    match (verdict, ended.finish) {
        (Read::Answer(answer), _) => Ok(Verdict::Answer(answer)),
        (Read::Refused, _) => given_up("refused", REFUSED),
        (_, Finish::Refused) if size == 1 => given_up("refused", REFUSED),
        (Read::Missing, Finish::Length) if last => {
            let detail = format!(
                "the answer was cut off at {}, before it came to this row, and the model or max_request_tokens allows no more",
                ended.cap
            );
            given_up("no_answer", &detail)
        }
        (Read::Missing, _) if last && ended.is_thought => given_up("no_answer", ONLY_THOUGHT),
        (Read::Missing, _) if last => given_up("no_answer", "the model gave no answer for this row"),
        (Read::Unfit(unfit), _) if last => failed(unfit.class, &unfit.detail),
        (Read::Unfit(unfit), _) => Err(Some(unfit.wanted)),
        (Read::Contradicted, _) if last => failed("contradicted", "the model gave two different answers for this row"),
        _ => Err(None),
    }
}

/// Learns from an answer about the model. Returns true if it is prose although JSON was requested.
fn learn(
    now: u64,
    lane_key: &LaneKey,
    (lane, group): (&mut Lane, &mut Group),
    rows: &[Row],
    asked: Asked,
    seen: &Seen,
    in_flight: usize,
) -> bool {
    let Seen { reply, size, answers, refused, thought, is_cut, is_at_cap, grows, .. } = *seen;
    if asked.service == Service::Chat {
        lane.learned.observe_end(is_at_cap, asked.worst.output);
    }
    if reply.usage.output.is_some() && (answers > 0 || is_cut) {
        lane.record_mut(asked.service).measured.thinking.observe(thought, is_cut && answers == 0);
    }
    // Without reported usage there is nothing to learn.
    if let Some(usage) = reply.usage.whole() {
        lane.record_mut(asked.service).measured.observe(asked.estimate.input, usage.input);
        if !is_cut {
            let sizes = &mut lane.standings.of(now, asked.scope).sizes;
            sizes.observe(
                asked.estimate.output,
                group.mean_answer(rows, asked.service),
                usage.output.saturating_sub(thought),
            );
            let sizes = *sizes;
            lane.record_mut(asked.service).measured.sizes = sizes;
        }
    }
    // In whichever way it was asked, the costs of a model are those of what all models count alike.
    let ours = if group.decided().is_some() { group.tokens(rows, None, Service::Chat) } else { asked.estimate };
    let counted = (ours.input + ours.output) as f64 * answers as f64 / size.max(1) as f64;
    let Reply { cached_input, written_input, .. } = *reply;
    let used = Used { all: reply.usage.or(asked.estimate), cached_input, written_input };
    lane.standings.of(now, group.scope).taken.observe(now, counted, used);
    lane.concurrency.answered(asked.sent, now, reply.usage.or(asked.estimate), in_flight);
    let options = &group.stream.task.options;
    let form = asked.learned.form(options);
    let forms = &mut lane.standings.of(now, asked.scope).forms;
    let is_prose = answers == 0
        && options.structured_output == StructuredOutput::Auto
        && reply.finish == Finish::Complete
        && answer::is_prose(&reply.text)
        && forms.answered_in_prose(form);
    if answers > 0 {
        forms.works(form);
    }
    let took = now.saturating_sub(asked.sent);
    lane.record_mut(asked.service).took(took);
    let is_slow =
        !asked.is_flex && group.member(lane_key).is_some_and(|(_, m)| took > m.stream.model.request_timeout_ms / SLOW);
    if answers > 0 || (!grows && !is_prose && asked.way == Way::AsEver) {
        let missing = if grows { 0 } else { size - answers - refused };
        group.size(lane_key).into_iter().for_each(|rows| rows.observe(size, missing, is_slow));
    }
    is_prose
}

/// The rest of the limits, as the provider reports it.
pub(super) fn left(said: &Reported) -> Left {
    Left {
        requests: said.requests.remaining,
        tokens: said.tokens.remaining,
        input_tokens: said.input_tokens.remaining,
        output_tokens: said.output_tokens.remaining,
    }
}
