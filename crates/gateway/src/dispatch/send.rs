//! Sending: takes packs from the queues within the limits.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use llm_batch_core::dialect::decisions::{self, Questions};
use llm_batch_core::dialect::embeddings::{FIRST_NUMBER, Texts};
use llm_batch_core::dialect::{Ask, Counts, Format, Service};
use llm_batch_core::flex;
use llm_batch_core::limiter::{Class, Grant, Limiter, Limits, Refusal, Size, Tokens};
use llm_batch_core::options::ServiceTier;
use llm_batch_core::patience::Way;
use llm_batch_core::request;
use llm_batch_core::route::Turn;
use llm_batch_core::task::Embed;
use serde_json::Value;
use tokio::sync::Notify;

use super::{Asked, Conn, InFlight, Launch, State, cheaper, routes, say};
use crate::asking::Asking;
use crate::group::{Group, Next, Refused};
use crate::key::{GroupId, LaneKey};
use crate::lane::Lane;
use crate::learned::{Learned, MOST_SPARE_ANSWER_TOKENS, Measured};
use crate::numbers::Numbers;
use crate::protocol::{FromGateway, Policy, Stream};
use crate::purse::{Pays, Purse};
use crate::row::Row;

/// A request that is cut to fit keeps at least one of so many rows.
const LEAST_PART: usize = 4;
/// Requests are made smaller to use a limit evenly if as many of them as fit have this part of the rows that the limit would
/// have room for.
const LEAST_EVEN: f64 = 0.95;

/// A request as it would be sent.
pub(super) struct Draft {
    ids: Vec<u16>,
    format: Option<Format>,
    /// By our count.
    pub estimate: Tokens,
    /// Most tokens that it may take: its prompt, and the cap of its answer.
    pub worst: Tokens,
    /// Tokens that are reserved for it.
    reserve: Tokens,
    /// The cap of its answer might be larger.
    can_grow: bool,
    /// Tokens that are expected of its answer, without what is thought before it.
    expected: u64,
    /// It is asked at the tier "flex".
    is_flex: bool,
}

impl Draft {
    /// `largest`: most tokens of a request, prompt and answer.
    pub fn new(
        numbers: &Numbers,
        (learned, measured): (Learned, Measured),
        (group, stream): (&Group, &Stream),
        rows: &[Row],
        largest: u64,
    ) -> Self {
        let options = &stream.task.options;
        let service = stream.task.service();
        let kind = &group.asking(service).kind;
        let ids = match service {
            Service::Embeddings => (FIRST_NUMBER..).take(rows.len()).collect(),
            Service::Chat if kind.legend().is_none() => {
                numbers.draw_apart(&rows.iter().map(|row| row.quoted.as_str()).collect::<Vec<_>>())
            }
            Service::Chat | Service::Decisions => numbers.draw(rows.len()),
        };
        let form = learned.form(options);
        let is_sent = |format: &Format| match format {
            Format::Schema { strict: false, .. } => stream.endpoint.api.dialect().has_open_schemas(),
            _ => true,
        };
        let format = request::format(options.answer_shape, form, &**kind, &ids)
            .filter(is_sent)
            .filter(|_| service == Service::Chat);
        let estimate = group.tokens(rows, format.as_ref(), service);
        let prompt = measured.prompt.apply(estimate.input);
        // Nothing is written. What a server reports all the same is what the next request may take.
        if service != Service::Chat {
            let Measured { thinking, .. } = measured;
            return Self {
                ids,
                format,
                estimate,
                worst: Tokens { input: measured.most_prompt(estimate.input), output: thinking.room() },
                reserve: stream.endpoint.counts.reserve(prompt, thinking.reserved(), thinking.room()),
                can_grow: false,
                expected: 0,
                is_flex: false,
            };
        }
        let expected = measured.expected_answer(estimate.output);
        // Spare tokens must not make a request too large that fits without them. A cap that is said to be the largest
        // is believed to be too small for the rows only if a row was tried alone with it.
        let said = learned.most_answer_tokens.max(measured.least_cap(estimate.output));
        let said = rows.iter().map(|row| row.most_answer).fold(said, u64::min);
        let most = largest.saturating_sub(prompt).max(expected).min(said);
        let spare = learned.spare_answer_tokens;
        let set = kind.most_tokens().map(|most| (rows.len() * most) as u64 + measured.spared(spare));
        let most_answer = measured.most_answer(estimate.output, spare).min(set.unwrap_or(u64::MAX)).min(most);
        let reserved = expected + measured.thinking.reserved();
        Self {
            ids,
            format,
            estimate,
            worst: Tokens { input: measured.most_prompt(estimate.input), output: most_answer },
            reserve: stream.endpoint.counts.reserve(prompt, reserved.min(most_answer), most_answer),
            can_grow: most_answer < most && most_answer < MOST_SPARE_ANSWER_TOKENS,
            expected,
            is_flex: stream.tier() != ServiceTier::Default && !learned.no_flex,
        }
    }

    /// Thinking before an answer makes no request too large for the limit of answers (`most`): that would be so for
    /// every row.
    fn within(mut self, most: Option<u64>, counts: Counts) -> Self {
        let Some(most) = most.map(|most| most.max(self.expected)) else { return self };
        if counts != Counts::Used && self.worst.output > most {
            (self.worst.output, self.can_grow) = (most, false);
        }
        self.reserve.output = self.reserve.output.min(most);
        self
    }

    /// Tokens of prompt and answer, by our count.
    fn size(&self) -> usize {
        (self.estimate.input + self.estimate.output) as usize
    }

    /// The size that is reserved of the limits.
    fn reserved(&self) -> Size {
        Size { tokens: self.reserve, inputs: self.ids.len() as u64 }
    }

    /// The terms under which it is sent.
    fn asked(&self, now: u64, asking: &Asking, (way, turn): (Way, u32), learned: Learned) -> Asked {
        Asked {
            scope: asking.scope,
            service: asking.service,
            way,
            turn,
            learned,
            estimate: self.estimate,
            reserved: self.reserve,
            worst: self.worst,
            can_grow: self.can_grow,
            is_flex: self.is_flex,
            sent: now,
        }
    }

    pub fn body(&self, learned: Learned, (group, stream): (&Group, &Stream), rows: &[Row]) -> Value {
        if let Some((embed, embeddings)) = stream.embeddings() {
            return embeddings.body(&Texts {
                model: &stream.model.model,
                texts: &group.texts(rows),
                dimensions: embed.dimensions,
                input_type: embed.input_type.as_deref(),
                encoding: request::encoding(learned.form(&stream.task.options)),
                parameters: &stream.model.parameters,
            });
        }
        let service = stream.task.service();
        let (system, user) = group.messages(rows, &self.ids, service);
        if let Some((choices, decisions)) = group.asking(service).kind.choices().zip(stream.decisions()) {
            return decisions.body(&Questions {
                model: &stream.model.model,
                input: &[system, &user].concat(),
                ids: &self.ids,
                choices,
                parameters: &stream.model.parameters,
            });
        }
        stream.endpoint.api.dialect().body(&Ask {
            model: &stream.model.model,
            system,
            no_system_role: learned.no_system_role,
            user: &user,
            max_tokens: self.worst.output,
            max_completion_tokens: learned.max_completion_tokens,
            context: stream.model.max_request_tokens,
            format: self.format.as_ref(),
            parameters: &stream.model.parameters,
            no_sampling: learned.no_sampling,
            tier: match stream.tier() {
                ServiceTier::Default => ServiceTier::Default,
                _ if self.is_flex => ServiceTier::Flex,
                _ => ServiceTier::FlexOrDefault,
            },
        })
    }
}

/// Tokens of a request (of `largest`) that may be rows and their answers: what is thought before an answer has its part.
pub(super) fn rows_of(learned: Learned, measured: Measured, largest: u64) -> u64 {
    let thinking = if measured.thinking.usual() > 0 { measured.spared(learned.spare_answer_tokens) } else { 0 };
    largest - thinking.min(largest / 4 * 3)
}

/// A pack that goes out.
struct Pack {
    rows: Vec<Row>,
    draft: Draft,
    asked: Asked,
    grant: Grant,
    stream: Rc<Stream>,
    /// Time (ms) that its answer may take.
    timeout: u64,
}

/// Why a pack does not go out now.
enum Unsent {
    /// The budget does not suffice for it. The client that is asked for more, and the message, unless it was asked before.
    Unpaid(Option<(u64, Box<FromGateway>)>),
    /// Not before this time (ms), at this size.
    Until(u64, Size),
    /// The number of its rows that are larger than a request may be; and why.
    TooLarge(usize, String),
}

impl Unsent {
    /// The number of rows of the pack that are not put back: those that are too large.
    fn rows(&self) -> usize {
        if let Self::TooLarge(rows, _) = self { *rows } else { 0 }
    }
}

/// The terms by which the requests of a group are drafted.
struct Terms<'a> {
    numbers: &'a Numbers,
    stream: &'a Stream,
    learned: Learned,
    measured: Measured,
    configured: Limits,
    /// Most tokens of a request, prompt and answer: by what the user has set, and by what a provider says too.
    set: u64,
    largest: u64,
    /// Most tokens of an answer.
    largest_answer: Option<u64>,
    /// Tokens of a request by which a limit is used evenly.
    even: Option<u64>,
}

impl<'a> Terms<'a> {
    /// The limits that are set, and those that answers state. The bounds by the provider's word: most tokens of a request,
    /// and of an answer.
    fn new(
        (numbers, stream): (&'a Numbers, &'a Stream),
        (learned, measured): (Learned, Measured),
        (configured, stated): (Limits, Limits),
        (by_word, largest_answer): (u64, Option<u64>),
    ) -> Self {
        // A row is too long by the user's settings only. A provider's limit is tried with the row alone.
        let set = configured.largest_request().unwrap_or(u64::MAX).min(stream.most_tokens());
        let (largest, even) = (set.min(by_word), configured.min(stated).even_request());
        Self { numbers, stream, learned, measured, configured, set, largest, largest_answer, even }
    }

    /// Most tokens of rows and their answers in a request, by our count; and the bytes of a number of a vector.
    fn most(&self) -> (usize, Option<f64>) {
        let tokens = self.counted(rows_of(self.learned, self.measured, self.largest));
        // Nothing is paid for twice where texts for vectors go in more requests.
        let even = self.even.filter(|_| self.stream.embeddings().is_some());
        (even.map_or(tokens, |even| tokens.min(self.counted(even))), self.measured.number(self.learned, self.stream))
    }

    /// The number of tokens by our count that make so many of the server's.
    fn counted(&self, tokens: u64) -> usize {
        (tokens as f64 / self.measured.prompt.apply(1000) as f64 * 1000.0) as usize
    }

    fn draft(&self, group: &Group, rows: &[Row]) -> Draft {
        let counts = self.stream.endpoint.counts;
        Draft::new(self.numbers, (self.learned, self.measured), (group, self.stream), rows, self.largest)
            .within(self.largest_answer, counts)
    }

    /// Decides how many of these rows go in one request now, by the budget and the limits.
    fn decide(
        &self,
        now: u64,
        group: &mut Group,
        limiter: &mut Limiter,
        rows: &[Row],
    ) -> Result<(usize, Draft, Grant), Unsent> {
        let draft = self.draft(group, rows);
        if rows.len() == 1 && draft.size() > self.counted(self.set) {
            let is_models = self.set == self.stream.most_tokens();
            let what = if is_models { "max_request_tokens" } else { "the limit a minute" };
            return Err(Unsent::TooLarge(1, format!("{what} of the model leaves {} tokens for one", self.set)));
        }
        let (rows, draft) = self.even(now, group, limiter, rows, draft);
        let (mut rows, mut draft) = self.afford(group, rows, draft)?;
        let whole = draft.reserved();
        let mut tried = limiter.reserve(now, draft.reserved(), group.class(), 1.0);
        if tried == Err(Refusal::TooLarge) && rows.len() == 1 && self.configured.admit(draft.reserved()) {
            tried = limiter.reserve(now, limiter.trial(draft.reserve), group.class(), 1.0);
        }
        if let Err(Refusal::Until { part, .. }) = tried
            && part > 0.0
        {
            let n = group.fit(rows, (draft.size() as f64 * part) as usize, self.stream.task.service());
            if n * LEAST_PART >= rows.len().max(LEAST_PART) {
                let part = n as f64 / rows.len() as f64;
                rows = rows.get(..n).unwrap_or(rows);
                draft = self.draft(group, rows);
                tried = limiter.reserve(now, draft.reserved(), group.class(), part).or(tried);
            }
        }
        match tried {
            Ok(grant) => Ok((rows.len(), draft, grant)),
            Err(Refusal::Until { at, .. }) => Err(Unsent::Until(at, whole)),
            Err(Refusal::TooLarge) => {
                Err(Unsent::TooLarge(rows.len(), "a limit a minute of the model is smaller".to_owned()))
            }
        }
    }

    /// The first of these rows, as many as use the limits evenly, and their draft. All of them, where others do not follow,
    /// and where fewer would use the limits for what stands around rows.
    fn even<'r>(
        &self,
        now: u64,
        group: &Group,
        limiter: &mut Limiter,
        rows: &'r [Row],
        draft: Draft,
    ) -> (&'r [Row], Draft) {
        let fitting = limiter.fitting(now, draft.reserved());
        let is_followed = group.queued() > 0 && group.class() == Class::Bulk;
        let Some(whole) = limiter.even(fitting).filter(|_| is_followed) else { return (rows, draft) };
        let tokens = (draft.size() as f64 * fitting / whole) as usize;
        let mut n = group.fit(rows, tokens, self.stream.task.service());
        let least = rows.len() as f64 * fitting * LEAST_EVEN / whole;
        // What does not grow with the rows, such as what is thought before an answer, may take several tries.
        while n > 0 && n as f64 >= least {
            let some = rows.get(..n).unwrap_or(rows);
            let cut = self.draft(group, some);
            let fits = limiter.fitting(now, cut.reserved());
            if fits >= whole {
                return (some, cut);
            }
            n = (n - 1).min((n as f64 * fits / whole) as usize);
        }
        (rows, draft)
    }

    /// The first of these rows, as many as the group's purse pays for, and their draft.
    fn afford<'r>(&self, group: &mut Group, rows: &'r [Row], full: Draft) -> Result<(&'r [Row], Draft), Unsent> {
        let (mut rows, mut draft) = (rows, full);
        let Some(mut purse) = group.purse.take() else { return Ok((rows, draft)) };
        let least = self.draft(group, rows.get(..1).unwrap_or_default()).worst;
        let pays = purse.pays(draft.worst, least, group.in_flight == 0);
        while pays == Pays::Less && rows.len() > 1 && !purse.covers(draft.worst) {
            rows = rows.get(..rows.len() - rows.len().div_ceil(8)).unwrap_or_default();
            draft = self.draft(group, rows);
        }
        let ask = |purse: &Purse| FromGateway::Exhausted { least: purse.worth(least), full: purse.worth(draft.worst) };
        let not = match pays {
            Pays::Yes | Pays::Less => None,
            Pays::Later => Some(Unsent::Unpaid(None)),
            Pays::Ask => Some(Unsent::Unpaid(Some((purse.conn, Box::new(ask(&purse)))))),
        };
        group.purse = Some(purse);
        not.map_or(Ok((rows, draft)), Err)
    }
}

/// The result of a look at a lane's queues.
enum Look {
    Sent,
    /// These rows of a group are larger than a request may be; and why.
    TooLarge(GroupId, Vec<Row>, String),
    /// The lane has no room for more.
    Full,
    /// Nothing can be sent now.
    Nothing,
}

/// Asks a client for more to spend. The answers so far go first: the client reckons with them.
fn ask(c: &mut Conn, message: &FromGateway) {
    super::flush(c);
    say(c, message);
}

/// After which time (ms) without an answer a request is given up: another model is asked if this one is silent for longer
/// than usual.
fn timeout(stream: &Stream, is_flex: bool, (policy, turn): (Policy, Turn), patience: Option<u64>) -> u64 {
    let has_next = policy != Policy::Spread && turn.open != turn.own;
    let most = stream.model.request_timeout_ms.max(if is_flex { flex::TIMEOUT } else { 0 });
    most.min(patience.filter(|_| has_next && !is_flex).unwrap_or(u64::MAX))
}

impl State {
    /// A request is sent now (ms): since it was granted, other work may have gone before it.
    pub fn sent(&mut self, now: u64, id: u64) {
        let Some(mut request) = self.in_flight.remove(&id) else { return };
        if let Some(lane) = self.lanes.get_mut(&request.lane) {
            request.grant = lane.limiter.sent(request.grant, now);
            request.asked.sent = now;
        }
        self.in_flight.insert(id, request);
    }

    /// The requests that can be sent at `now` (ms), and the time to look again.
    pub fn pump(&mut self, now: u64) -> (Vec<Launch>, Option<u64>) {
        let mut launches = std::mem::take(&mut self.doubts);
        let mut wake: Option<u64> = None;
        self.groups.forget_room();
        self.probe_circuits(now, &mut launches, &mut wake);
        // The next place is the lane's that has the fewest requests under way; of several, whose last one is the oldest.
        let turn = |lane: &Lane, key: &LaneKey| (lane.in_flight, lane.last_request, key.clone());
        let lanes = self.lanes.iter().filter(|(_, lane)| !lane.groups.is_empty());
        let mut turns: BTreeSet<(usize, u64, LaneKey)> = lanes.map(|(key, lane)| turn(lane, key)).collect();
        let mut changed = BTreeSet::new();
        while let Some((.., key)) = turns.pop_first() {
            match self.look(now, &key, &mut launches, &mut wake) {
                Look::Sent => {}
                Look::TooLarge(group, rows, why) => {
                    let size = rows.len();
                    self.too_large(now, (&key, group), rows, size, &why);
                    self.release_last(group);
                }
                Look::Full => {
                    let behind = self.behind(&key);
                    turns.extend(behind.iter().filter_map(|key| Some(turn(self.lanes.get(key)?, key))));
                    continue;
                }
                Look::Nothing => continue,
            }
            turns.extend(self.lanes.get(&key).map(|lane| turn(lane, &key)));
            changed.insert(key);
        }
        for key in changed {
            self.note(now, &key);
        }
        self.flush();
        (launches, wake)
    }

    /// A lane has no more room: the lanes that may take rows now, which would else have left them to it.
    fn behind(&mut self, key: &LaneKey) -> Vec<LaneKey> {
        let ids = self.lanes.get(key).map_or(&[][..], |lane| &lane.groups);
        ids.iter().filter_map(|id| Some(self.groups.get_mut(*id)?.fills(key))).flatten().collect()
    }

    /// Most requests that a lane may have under way for what others have. Requests to a server that has stopped answering give
    /// their places back only when their time is up, so some are left for the next lane: a lane may have as many
    /// as are free, of half of all those of its account, and no more than an eighth of all.
    fn room(&self, key: &LaneKey) -> usize {
        let all = self.places.requests;
        let first = LaneKey { account: Rc::clone(&key.account), model: "".into() };
        let lanes = self.lanes.range(first..).take_while(|(lane, _)| lane.account == key.account);
        let of_account: usize = lanes.map(|(_, lane)| lane.in_flight).sum();
        let free = all.saturating_sub(self.in_flight.len() + self.probing.len());
        free.min(all.div_ceil(2).saturating_sub(of_account)).min(all.div_ceil(8))
    }

    /// Sends one request of a lane, if that can be done now; else notes when to look again.
    fn look(&mut self, now: u64, key: &LaneKey, launches: &mut Vec<Launch>, wake: &mut Option<u64>) -> Look {
        let mut later = |at: u64| *wake = Some(wake.map_or(at, |w| w.min(at)));
        let (most, mut waits) = (self.room(key), Look::Nothing);
        let Some(lane) = self.lanes.get_mut(key) else { return Look::Nothing };
        self.groups.order(lane);
        lane.forget(now);
        let (allowed, allowed_interactive) = (lane.allowed(false).min(most), lane.allowed(true).min(most));
        let (configured, by_word, stated) = (lane.configured, lane.largest_by_word(now), lane.stated.limits());
        let Lane { groups, limiter, learned, flex, chats, decisions, standings, in_flight, .. } = lane;
        for id in groups.iter().copied() {
            let Some(group) = self.groups.get_mut(id) else { continue };
            if *in_flight >= if group.stream.interactive { allowed_interactive } else { allowed } {
                return Look::Full;
            }
            let Some(turn_of) = routes::turn(&self.circuits, group, key, now) else {
                routes::tried_again(group, key, now).into_iter().for_each(&mut later);
                continue;
            };
            let Some((place, member)) = group.member(key) else { continue };
            let (service, trial) = cheaper::next(now, (&*group, member), standings, *learned);
            let stream = Rc::clone(member.stream(service));
            let record = if stream.decisions().is_some() { &*decisions } else { &*chats };
            let standing = standings.of(now, group.asking(service).scope);
            if !standing.may_send(now) {
                continue;
            }
            let no_flex = match flex.turn(now, stream.tier(), learned.no_flex) {
                flex::Turn::Flex => false,
                flex::Turn::Default => true,
                flex::Turn::Until(at) => {
                    if group.queued() > 0 {
                        waits = Look::Full;
                        later(at);
                    }
                    continue;
                }
            };
            let (way, turn) = standing.patience.way();
            // No pack is made again of rows that can't go yet.
            if let Some(size) = group.next_size((place, service, way, trial))
                && let Some(at) = limiter.closed_until(now, size, group.class())
            {
                later(at);
                return Look::Full;
            }
            let learned = Learned { forms: standing.forms.without(learned.forms), no_flex, ..*learned };
            let measured = Measured { sizes: standing.sizes, ..record.measured };
            let bounds = (by_word, limiter.largest_answer());
            let terms = Terms::new((&self.numbers, &stream), (learned, measured), (configured, stated), bounds);
            let mut rows = match group.next(now, terms.most(), (service, way, trial), key, turn_of) {
                Next::Rows(rows) => rows,
                Next::Until(at) => {
                    later(at);
                    continue;
                }
                Next::Empty => continue,
            };
            let decided = terms.decide(now, group, limiter, &rows);
            // Rows that do not go return to where they were.
            group.put_back(rows.split_off(decided.as_ref().map_or_else(Unsent::rows, |(n, ..)| *n)));
            match decided {
                Ok((_, draft, grant)) => {
                    let asked = draft.asked(now, group.asking(service), (way, turn), learned);
                    let timeout = timeout(&stream, draft.is_flex, (group.stream.policy, turn_of), record.patience());
                    launches.extend(self.launch(now, key, id, Pack { rows, draft, asked, grant, stream, timeout }));
                    return Look::Sent;
                }
                Err(Unsent::TooLarge(_, why)) => return Look::TooLarge(id, rows, why),
                Err(Unsent::Until(at, size)) => {
                    let (queued, terms) = (group.queued(), (place, service, way, trial));
                    group.refused = Some(Refused { size, queued, terms });
                    later(at);
                    return Look::Full;
                }
                Err(Unsent::Unpaid(None)) => {}
                Err(Unsent::Unpaid(Some((conn, message)))) => {
                    self.conns.get_mut(&conn).into_iter().for_each(|c| ask(c, &message));
                }
            }
        }
        waits
    }

    /// A pack goes out.
    fn launch(&mut self, now: u64, key: &LaneKey, id: GroupId, pack: Pack) -> Option<Launch> {
        let lane = self.lanes.get_mut(key)?;
        let group = self.groups.get_mut(id)?;
        let Pack { mut rows, draft, asked, grant, stream, timeout } = pack;
        rows.iter_mut().for_each(|row| row.service = asked.service);
        if let Some(purse) = &mut group.purse {
            purse.take(draft.worst);
        }
        let level = &mut lane.level[usize::from(group.stream.interactive)];
        *level = level.max(group.served);
        group.count_served(now, &rows);
        lane.standings.of(now, asked.scope).patience.sent(now);
        if group.decided().is_some() {
            lane.standings.of(now, group.scope).cheaper.sent(asked.service);
        }
        if asked.is_flex {
            lane.flex.sent(now);
        }
        self.next_id += 1;
        let abandoned = Rc::new(Notify::new());
        let launch = Launch {
            id: self.next_id,
            ids: draft.ids.clone(),
            body: draft.body(asked.learned, (group, &stream), &rows),
            timeout: Duration::from_millis(timeout),
            most_tokens: match group.asking(asked.service).kind.choices() {
                Some(choices) => decisions::most_answer(choices, rows.len()),
                None => stream.embeddings().map_or(draft.worst.output, |_| Embed::most_answer(rows.len())),
            },
            stream,
            abandoned: Rc::clone(&abandoned),
        };
        lane.in_flight += 1;
        lane.in_flight_rows += rows.len();
        lane.last_request = self.next_id;
        lane.last_service = Some(asked.service);
        lane.requests_total += 1;
        lane.rows_total += rows.len() as u64;
        if asked.service != Service::Embeddings {
            self.numbers.used(&draft.ids);
        }
        let request = InFlight {
            id: self.next_id,
            lane: key.clone(),
            group: id,
            asked,
            rows,
            ids: draft.ids,
            grant,
            abandoned,
            is_accounted: false,
            in_doubt: None,
        };
        self.in_flight.insert(self.next_id, request);
        Some(launch)
    }
}
