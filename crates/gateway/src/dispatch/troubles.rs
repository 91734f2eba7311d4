//! Everything else that comes back, by its class of trouble.

use std::collections::HashSet;
use std::rc::Rc;

use llm_batch_core::dialect::Service;
use llm_batch_core::forms::Form;
use llm_batch_core::headers::Reported;
use llm_batch_core::limiter::Tokens;
use llm_batch_core::remedy::{End, Known, Remedy};
use llm_batch_core::thought;
use llm_batch_core::trouble::{Parameter, Report, Trouble};

use super::answers::left;
use super::doubts::Said;
use super::{Asked, InFlight, State, too_long};
use crate::cache::TextKey;
use crate::key::{GroupId, LaneKey};
use crate::learned::Measured;
use crate::protocol::{Stop, StopReason, Verdict};
use crate::request::TIMED_OUT;
use crate::route::Member;
use crate::row::Row;

/// A row that has met this many points of trouble not its own is split off, as long as the provider is not down. Alone it is
/// given up after as many, or after as many as it may have attempts if these are more.
const MOST_TROUBLE: u32 = 5;
/// First wait after a request that was not answered, ms; doubled with each further one, with jitter.
const BACKOFF: u64 = 250;
/// Longest wait after requests that were not answered, ms.
const MOST_BACKOFF: u64 = 30_000;
/// Time (ms) for which a limit that is too small for any row is left alone: it is one of a minute.
const LIMIT_WAIT: u64 = 60_000;
/// Refusals of a row alone, as larger than a limit that does not contradict what was served, until it is skipped.
const MOST_OVER_LIMIT: u32 = 2;

/// A request that was not answered.
struct Failed {
    lane: LaneKey,
    group: GroupId,
    rows: Vec<Row>,
    /// The role it was for.
    role: Option<u32>,
    asked: Asked,
    /// The error in words; and in those of the provider alone, without what it quotes.
    message: String,
    words: String,
}

impl State {
    /// Takes a request that was not answered. It may have been charged; and a 2xx may have begun.
    pub(super) fn troubled(
        &mut self,
        now: u64,
        request: InFlight,
        report: &Report,
        said: &Reported,
        (is_unsure, has_begun): (bool, bool),
    ) {
        // A request that may have been charged counts as spent.
        if is_unsure {
            self.unsure(&request);
        }
        let InFlight { id, lane: lane_key, group, mut rows, grant, asked, .. } = request;
        let is_own = report.message == TIMED_OUT && self.is_impatient(&lane_key, group);
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        let role = self.groups.get(group).map(|g| g.stream.role);
        lane.fails(now, (grant, asked.sent), report, left(said), (role, is_own));
        if !is_unsure && let Some(purse) = self.groups.get_mut(group).and_then(|g| g.purse.as_mut()) {
            purse.give_back(asked.worst, Tokens::default());
        }
        let standing = lane.standings.of(now, asked.scope);
        if is_unsure || has_begun {
            standing.is_paid(&rows, true);
            rows.iter_mut().for_each(|row| row.paid += 1);
        }
        if self.falls_to_chat(now, (&lane_key, group), asked, report) {
            return self.put_back(group, rows);
        }
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        let standing = lane.standings.of(now, asked.scope);
        let is_wrong = matches!(report.trouble, Trouble::Rejected | Trouble::CutOff)
            && matches!(rows.as_slice(), [row] if standing.row_is_refused(row.refused_in.unwrap_or(id)));
        let is_accepted = standing.is_accepted;
        let remedy = Remedy::of(&report.trouble, Known { is_wrong, cap: asked.worst.output, can_grow: asked.can_grow });
        let (message, words) = (report.message.clone(), report.words.clone());
        let failed = Failed { lane: lane_key, group, rows, role, asked, message, words };
        match remedy {
            Remedy::Stop(end) => {
                if end.reason == StopReason::Quota && (is_unsure || has_begun) {
                    self.quota_within(now, &failed);
                }
                self.end(now, failed, end);
            }
            Remedy::Wait(wait) => self.throttled(now, failed, wait, is_unsure || has_begun),
            Remedy::NoCapacity(wait) => self.no_capacity(now, failed, wait),
            Remedy::LargerCap => self.cut_off(now, failed),
            Remedy::SmallerCap => self.cap_refused(now, failed),
            Remedy::SmallerRequest { is_limit } => self.larger(now, failed, is_limit),
            Remedy::Without(parameter) => self.unsupported(now, failed, parameter, (id, is_accepted)),
            Remedy::FindRow => {
                let Failed { lane, group, rows, message, .. } = failed;
                self.refused(now, (&lane, group), rows, (id, is_accepted), &message);
            }
            Remedy::Again(wait) => self.unanswered(now, failed, wait, (is_unsure, has_begun, is_own)),
        }
    }

    /// The streams end: rows go back to the clients.
    fn end(&mut self, now: u64, failed: Failed, end: End) {
        let Failed { lane: lane_key, group, rows, role, asked, message, .. } = failed;
        if end.reason == StopReason::Rejected
            && let Some(lane) = self.lanes.get_mut(&lane_key)
        {
            lane.standings.of(now, asked.scope).begin_anew();
        }
        self.notice(now, &lane_key, "stopped", &message);
        let stop = Stop { reason: end.reason, message, retry_after_ms: end.retry_after };
        match end.is_for_all {
            true => self.stop_lane(now, &lane_key, &stop, role),
            false => self.strike(now, &lane_key, group, &stop, role),
        }
        // To another model, or to the clients that were told to stop.
        self.put_back(group, rows);
    }

    /// Too much at once: the lane waits, for as long as the provider said if it did. Said within a 2xx it may be paid for
    /// like an answer, and is bounded like one.
    fn throttled(&mut self, now: u64, failed: Failed, said: Option<u64>, is_paid: bool) {
        let Failed { lane: lane_key, group, rows, role, asked, message, .. } = failed;
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        // Without a word from the provider, the more refusals in a row the longer.
        lane.refusals += 1;
        // The first time the provider is believed; after a wait that was in vain, ours is the least.
        if asked.sent >= lane.refused_at {
            (lane.refused_in_vain, lane.refused_at) = (lane.refused_in_vain + 1, now);
        }
        let least = if lane.refused_in_vain > 1 { backoff(lane.refused_in_vain) } else { 0 };
        let wait = said.map_or_else(|| backoff(lane.refusals), |said| said.max(least));
        lane.limiter.penalize(now + wait + fastrand::u64(0..=wait / 8 + 1));
        self.notice(now, &lane_key, "throttled", &format!("{message}; waiting for {wait} ms"));
        let is_enough = is_paid && self.is_refused_enough(now, (&lane_key, group), &rows, asked);
        self.put_back(group, rows);
        if is_enough {
            let message = format!("requests are refused within answers that may be paid for: {message}");
            self.hold(now, &lane_key, asked, StopReason::Quota, message, role);
        }
    }

    /// There is no capacity at the tier "flex": requests at that tier wait, and no others.
    fn no_capacity(&mut self, now: u64, failed: Failed, said: Option<u64>) {
        let Failed { lane: lane_key, group, rows, asked, message, .. } = failed;
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        let wait = lane.flex.refused(now, asked.sent, said);
        self.notice(now, &lane_key, "no capacity", &format!("{message}; the tier \"flex\" waits for {wait} ms"));
        self.put_back(group, rows);
    }

    /// A quota that is used up was said within a 2xx, which may be paid for: from now on the task has one request at a time.
    fn quota_within(&mut self, now: u64, failed: &Failed) {
        self.weigh(now, &failed.lane, failed.group, failed.asked, Said::Cut);
        if let Some(lane) = self.lanes.get_mut(&failed.lane) {
            // For how long, the provider says.
            lane.standings.of(now, failed.asked.scope).hold(now, failed.asked.sent);
        }
    }

    /// Returns true if nothing more is sent for a while, as requests are refused within answers: some of these rows
    /// were paid for as often as they may be, the task was without a valid row, or none of its requests was answered in
    /// between.
    fn is_refused_enough(&mut self, now: u64, (lane, group): (&LaneKey, GroupId), rows: &[Row], asked: Asked) -> bool {
        let most = self.max_attempts(now, lane, (group, asked.scope));
        let is_paid = self.weigh(now, lane, group, asked, Said::Cut);
        let Some(lane) = self.lanes.get_mut(lane) else { return false };
        let is_unanswered = lane.standings.of(now, asked.scope).is_unanswered(asked.sent);
        is_unanswered || is_paid || rows.iter().any(|row| row.is_spent(most))
    }

    /// The cap of the answer did not suffice for what is thought before it, and it can be larger.
    fn cut_off(&mut self, now: u64, failed: Failed) {
        let Failed { lane: lane_key, group, rows, asked, message, .. } = failed;
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        lane.learned.observe_end(true, asked.worst.output);
        self.put_back(group, rows);
        if self.weigh(now, &lane_key, group, asked, Said::Cut) {
            self.give_up(now, &lane_key, asked.scope, &format!("an error: {message}"));
        }
    }

    /// The cap of the answer is larger than the model allows. Requests of others are capped by that only as far as
    /// their rows allow it.
    fn cap_refused(&mut self, now: u64, failed: Failed) {
        let Failed { lane: lane_key, group, mut rows, asked, message, words, .. } = failed;
        let Some(lane) = self.lanes.get_mut(&lane_key) else { return };
        let cap = thought::cap_in(&words, asked.worst.output).max(1);
        let sizes = lane.standings.of(now, asked.scope).sizes;
        let measured = Measured { sizes, ..lane.record(asked.service).measured };
        let is_least = asked.worst.output <= measured.least_cap(asked.estimate.output);
        lane.answer_cap(now, cap);
        match rows.as_mut_slice() {
            [row] if is_least => row.most_answer = cap,
            rows if is_least => {
                let most_rows = rows.len().div_ceil(2);
                rows.iter_mut().for_each(|row| row.most_rows = most_rows);
                if let Some(size) = self.groups.get_mut(group).and_then(|g| g.size(&lane_key)) {
                    size.observe(rows.len(), rows.len() / 2, false);
                }
            }
            _ => {}
        }
        self.put_back(group, rows);
        self.notice(now, &lane_key, "cap", &format!("{message}; continuing with a smaller cap"));
    }

    /// The request is larger than a limit of the account, or else than the model's context.
    fn larger(&mut self, now: u64, failed: Failed, is_limit: bool) {
        let Some(lane) = self.lanes.get_mut(&failed.lane) else { return };
        let Failed { asked, ref words, .. } = failed;
        if is_limit && failed.rows.len() == 1 {
            return self.row_over_limit(now, failed);
        }
        let sizes = lane.standings.of(now, asked.scope).sizes;
        let least = Measured { sizes, ..lane.record(asked.service).measured }.least_cap(asked.estimate.output);
        let caps = (asked.worst.output, least);
        if !is_limit
            && asked.service == Service::Chat
            && lane.takes_less_answer(now, words, asked.learned, asked.estimate.input, caps)
        {
            return self.put_back(failed.group, failed.rows);
        }
        let alone = is_limit && lane.refuses_as_over_limit(now, words);
        let Failed { lane: lane_key, group, mut rows, message, .. } = failed;
        let size = rows.len();
        self.notice_smaller(now, &lane_key, "too large", &message, size);
        if alone {
            self.first_goes_alone(group, &mut rows);
        }
        self.too_large(now, (&lane_key, group), rows, size, &message);
    }

    /// A row is refused alone as larger than a limit of the account.
    fn row_over_limit(&mut self, now: u64, failed: Failed) {
        let Failed { lane: ref lane_key, group, asked, ref message, ref words, .. } = failed;
        let Some(lane) = self.lanes.get_mut(lane_key) else { return };
        let prompt = lane.record(asked.service).measured.prompt.apply(asked.estimate.input);
        let is_so = lane.is_over_limit(words, prompt + asked.worst.output);
        let key = failed.rows.first().map_or(0, |row| row.key);
        if is_so || !lane.refuses_all_as_over_limit(key) {
            self.notice(now, lane_key, "over limit", message);
            for row in failed.rows {
                self.over_limit(now, (lane_key, group), (row, is_so), asked, message);
            }
            return;
        }
        let message = format!("rows are refused alone as larger than a limit, and none is answered: {message}");
        self.end(now, Failed { message, ..failed }, End::of_all(StopReason::Quota, Some(LIMIT_WAIT)));
    }

    /// The endpoint refuses a parameter of the request: that is written in another way, if there is one.
    fn unsupported(&mut self, now: u64, failed: Failed, parameter: Parameter, (id, is_accepted): (u64, bool)) {
        let Failed { lane: ref lane_key, group, asked, ref message, .. } = failed;
        let Some(lane) = self.lanes.get_mut(lane_key) else { return };
        let member = self.groups.get(group).and_then(|g| g.member(lane_key));
        let stream = member.map(|(_, member)| Rc::clone(&member.stream));
        let options = stream.as_ref().map(|s| s.task.options.clone()).unwrap_or_default();
        let is_form = parameter == Parameter::ResponseFormat;
        // With further parameters of the user's, the refusal may be about one of these.
        let is_own = is_form && stream.is_some_and(|s| !s.model.parameters.is_empty());
        let has_other = if is_own {
            lane.standings.of(now, asked.scope).refuses(asked.learned.form(&options), &options)
        } else {
            lane.learned.refused(parameter, asked.learned, &options)
        };
        if has_other || (is_form && self.form_is_refused(now, lane_key, group, asked)) {
            self.put_back(group, failed.rows);
            self.notice(now, lane_key, "unsupported", &format!("{message}; continuing without it"));
        } else if matches!(parameter, Parameter::SystemRole | Parameter::Sampling)
            || is_form && asked.learned.form(&options) == Form::Plain
        {
            // There is none in the request: these are words of a row that is quoted, unless single rows are refused alike.
            if let [row] = failed.rows.as_slice()
                && let Some(lane) = self.lanes.get_mut(lane_key)
                && lane.standings.of(now, asked.scope).row_is_refused(row.refused_in.unwrap_or(id))
            {
                return self.end(now, failed, End::of_group(StopReason::Rejected));
            }
            self.refused(now, (lane_key, group), failed.rows, (id, is_accepted), message);
        } else {
            self.end(now, failed, End::of_group(StopReason::Rejected));
        }
    }

    /// Returns true if others wait longer for an answer of the same endpoint: a request of this group that took too
    /// long may have been served to them.
    fn is_impatient(&self, lane: &LaneKey, group: GroupId) -> bool {
        let Some((_, own)) = self.groups.get(group).and_then(|g| g.member(lane)) else { return false };
        let members = self.groups.iter().flat_map(|(_, g)| &g.members);
        members.filter(|other| other.lane.account == lane.account).any(|Member { stream, .. }| {
            let is_longer = stream.model.request_timeout_ms > own.stream.model.request_timeout_ms;
            is_longer && stream.endpoint.base_url == own.stream.endpoint.base_url
        })
    }

    /// The provider is overloaded or broken, or not reached.
    fn unanswered(
        &mut self,
        now: u64,
        failed: Failed,
        wait: Option<u64>,
        (is_unsure, has_begun, is_own): (bool, bool, bool),
    ) {
        let Failed { lane: lane_key, group, mut rows, role, asked, message, .. } = failed;
        let size = rows.len();
        let most = self.max_attempts(now, &lane_key, (group, asked.scope));
        if is_unsure || has_begun {
            rows.iter_mut().for_each(|row| row.is_unanswered(size, most));
        }
        // Another model was asked after a time that may have been too short for this task: it gets more from now on.
        if let Some(lane) = self.lanes.get_mut(&lane_key).filter(|_| message == TIMED_OUT) {
            lane.record_mut(asked.service).took(now.saturating_sub(asked.sent));
        }
        // If another model takes the rows, less is enough to leave this one alone until a probe is answered.
        let has_other = self.has_other(now, &lane_key, group);
        let points = if message == TIMED_OUT { 2 } else { 1 } * if has_other { 2 } else { 1 };
        if let (Some(wait), Some(lane)) = (wait, self.lanes.get_mut(&lane_key)) {
            lane.limiter.penalize(now + wait.min(MOST_BACKOFF));
        }
        let said = format!("a request failed and is sent again: {message}");
        self.notice(now, &lane_key, "unanswered", &said);
        // Paid for like an answer, or it may have been.
        let is_enough = (has_begun || is_unsure) && self.weigh(now, &lane_key, group, asked, Said::Cut);
        if is_enough && has_begun {
            self.put_back(group, rows);
            self.give_up(now, &lane_key, asked.scope, &format!("an error: {message}"));
            return;
        }
        if is_enough || self.is_left_alone(now, &lane_key, asked) {
            self.put_back(group, rows);
            let message = format!("no request with rows is answered: {message}");
            self.hold(now, &lane_key, asked, StopReason::ProviderDown, message, role);
            return;
        }
        let is_open = !is_own && self.fails(now, &lane_key, (group, asked.service), points, &message);
        if rows.iter().any(|row| row.is_spent(most)) {
            self.spent(now, (&lane_key, group), rows, asked, &message);
            return;
        }
        if is_open {
            // A probe finds out whether it is these rows or the provider.
            self.put_back(group, rows);
            if let Some(group) = self.groups.get_mut(group).filter(|_| has_other) {
                group.hurry();
            }
            return;
        }
        // One wait for all rows, so that they stay together.
        let worst = rows.iter().map(|r| r.trouble).max().unwrap_or(0) + points;
        let not_before = now + backoff(worst);
        for mut row in rows {
            row.trouble += points;
            row.not_before = not_before;
            self.row_in_trouble(now, (&lane_key, group), (row, size), asked, &message);
        }
    }

    /// Most attempts of a row of this group, as far as they bound what is paid for it: a task that was never answered
    /// has a bound of its own.
    fn max_attempts(&mut self, now: u64, lane: &LaneKey, (group, scope): (GroupId, TextKey)) -> u32 {
        let Some(lane) = self.lanes.get_mut(lane) else { return u32::MAX };
        let Some(group) = self.groups.get(group) else { return u32::MAX };
        let most = group.stream.task.options.max_attempts;
        if lane.standings.of(now, scope).patience.has_answered() { most } else { u32::MAX }
    }

    /// Nothing more is paid for some of these rows, whose request was not answered. If it was about a row alone, and others
    /// are answered, that has failed; else it is no row's fault, and all who ask the task stop.
    fn spent(&mut self, now: u64, (lane, group): (&LaneKey, GroupId), rows: Vec<Row>, asked: Asked, message: &str) {
        let Some(l) = self.lanes.get_mut(lane) else { return };
        let is_row = l.standings.of(now, asked.scope).is_well() || l.vouched.is_some_and(|at| asked.sent >= at);
        if is_row && rows.len() == 1 {
            let verdict = Verdict::Fail { class: "provider_error".into(), detail: message.to_owned() };
            rows.into_iter().for_each(|row| self.conclude(now, lane, group, row, verdict.clone()));
            return;
        }
        self.put_back(group, rows);
        self.stop_paying(now, lane, asked, message);
    }

    /// Stops all who ask a task: rows were paid for as often as they may be, and not answered.
    pub(super) fn stop_paying(&mut self, now: u64, lane: &LaneKey, asked: Asked, last: &str) {
        let message = format!("rows were paid for again and again and are not answered: {last}");
        self.notice(now, lane, "stopped", &message);
        let stop = Stop { reason: StopReason::NoAnswers, message, retry_after_ms: None };
        self.stop_task(now, lane, asked.scope, &stop, None);
    }

    /// Returns true if probes are answered, but so few requests of a task that it is left alone for a while.
    fn is_left_alone(&mut self, now: u64, lane: &LaneKey, asked: Asked) -> bool {
        let Some(lane) = self.lanes.get_mut(lane) else { return false };
        lane.vouched.is_some_and(|at| asked.sent >= at) && lane.standings.of(now, asked.scope).is_unanswered(asked.sent)
    }

    /// Something in these rows is refused: they go into smaller requests, until the row is found. As long as nothing was
    /// ever accepted the first one goes alone at once, since it may be the request that is wrong.
    fn refused(
        &mut self,
        now: u64,
        (lane, group): (&LaneKey, GroupId),
        mut rows: Vec<Row>,
        (request, is_accepted): (u64, bool),
        message: &str,
    ) {
        let size = rows.len();
        if size == 1 {
            let verdict = Verdict::Fail { class: "rejected".to_owned(), detail: message.to_owned() };
            for mut row in rows {
                row.attempts += 1;
                self.conclude(now, lane, group, row, verdict.clone());
            }
            return;
        }
        self.notice_smaller(now, lane, "rejected", message, size);
        for row in &mut rows {
            row.most_rows = size.div_ceil(2);
            row.refused_in = Some(request);
        }
        if !is_accepted {
            self.first_goes_alone(group, &mut rows);
        }
        rows.into_iter().for_each(|row| self.again(group, row));
    }

    /// The first of these rows is the next to be sent, alone.
    fn first_goes_alone(&mut self, group: GroupId, rows: &mut Vec<Row>) {
        let mut first = self.wanted(group, vec![rows.remove(0)]);
        if let Some((g, mut row)) = self.groups.get_mut(group).zip(first.pop()) {
            row.most_rows = 1;
            g.push_next(row);
        }
    }

    /// A row whose request was not answered, while others are: it waits, then its requests get smaller, then it is
    /// given up.
    fn row_in_trouble(
        &mut self,
        now: u64,
        (lane, group): (&LaneKey, GroupId),
        (mut row, size): (Row, usize),
        asked: Asked,
        message: &str,
    ) {
        let most = self.groups.get(group).map_or(0, |g| g.stream.task.options.max_attempts).max(MOST_TROUBLE);
        if size == 1 && row.trouble >= most {
            return self.spent(now, (lane, group), vec![row], asked, message);
        }
        if size > 1 && row.trouble >= MOST_TROUBLE {
            row.most_rows = size.div_ceil(2);
            row.trouble = MOST_TROUBLE - 2;
        }
        self.again(group, row);
    }

    /// A row was refused alone as larger than a limit of the account. That is not taken for the row's fault at once, and only
    /// if all that was served says so too.
    fn over_limit(
        &mut self,
        now: u64,
        (lane, group): (&LaneKey, GroupId),
        (mut row, is_so): (Row, bool),
        asked: Asked,
        message: &str,
    ) {
        row.over_limit += 1;
        row.trouble += 1;
        row.not_before = now + backoff(row.trouble);
        if is_so && row.over_limit >= MOST_OVER_LIMIT {
            self.too_large(now, (lane, group), vec![row], 1, message);
        } else {
            self.row_in_trouble(now, (lane, group), (row, 1), asked, message);
        }
    }

    /// These are rows of a request of `size` rows that was too large. One that is so alone may go to another model.
    pub(super) fn too_large(
        &mut self,
        now: u64,
        (lane, group): (&LaneKey, GroupId),
        rows: Vec<Row>,
        size: usize,
        why: &str,
    ) {
        for mut row in rows {
            if size == 1 {
                let verdict = too_long(why);
                if let Some(row) = self.fails_over(now, lane, group, row, &verdict) {
                    self.done(group, 0, row, verdict);
                }
            } else {
                row.most_rows = size.div_ceil(2);
                row.not_before = now;
                self.again(group, row);
            }
        }
    }

    /// Those among who wait for these rows that were told to stop get them back; what others still want remains.
    pub(super) fn wanted(&mut self, group: GroupId, rows: Vec<Row>) -> Vec<Row> {
        let stopped: HashSet<u64> = self.conns.iter().filter(|(_, c)| c.stopped).map(|(id, _)| *id).collect();
        let Some(g) = self.groups.get_mut(group) else { return Vec::new() };
        let mut gone = Vec::new();
        let mut wanted = Vec::new();
        for row in rows {
            gone.append(&mut g.let_go(row.key, &|conn| stopped.contains(&conn)));
            if g.waiters(&row).is_empty() {
                g.take_waiters(&row);
            } else {
                wanted.push(row);
            }
        }
        self.give_back(gone);
        wanted
    }

    /// Queues rows again that were refused through no trouble of theirs.
    pub(super) fn put_back(&mut self, group: GroupId, rows: Vec<Row>) {
        let rows = self.wanted(group, rows);
        if let Some(g) = self.groups.get_mut(group) {
            g.put_back(rows);
        }
    }

    /// Queues a row again for another request.
    pub(super) fn again(&mut self, group: GroupId, row: Row) {
        let rows = self.wanted(group, vec![row]);
        if let Some(g) = self.groups.get_mut(group) {
            rows.into_iter().for_each(|row| g.push_again(row));
        }
    }

    /// Rows are sent in smaller requests.
    fn notice_smaller(&mut self, now: u64, lane: &LaneKey, class: &str, message: &str, size: usize) {
        self.notice(now, lane, class, &format!("{message}; {size} rows are sent in smaller requests"));
    }

    pub(super) fn notice(&mut self, now: u64, lane: &LaneKey, class: &str, message: &str) {
        if let Some(line) = self.notices.line(now, &format!("{} {} {class}", lane.account, lane.model), message) {
            // The receiver lives as long as the gateway.
            let _ = self.log.send(format!("llm_batch: model \"{}\": {line}", lane.model));
        }
    }
}

/// A wait (ms) after so many failures: doubled with each, with jitter.
fn backoff(failures: u32) -> u64 {
    let wait = (BACKOFF << failures.saturating_sub(1).min(10)).min(MOST_BACKOFF);
    wait * 3 / 4 + fastrand::u64(0..=wait / 2)
}
