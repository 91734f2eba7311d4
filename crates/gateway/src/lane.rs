//! One account and model (a lane): its limiter, its limits, its requests.

use llm_batch_core::concurrency::Concurrency;
use llm_batch_core::dialect::Service;
use llm_batch_core::flex::Flex;
use llm_batch_core::forms::Forms;
use llm_batch_core::headers::{self, Reported};
use llm_batch_core::limiter::{Grant, Left, Limiter, Limits, Stated, Tokens};
use llm_batch_core::trouble::{self, Report, Trouble};

use crate::cache::TextKey;
use crate::group::Group;
use crate::kept::KeptLane;
use crate::key::GroupId;
use crate::learned::{Learned, Record, SPARE_ANSWER_TOKENS};
use crate::protocol::Words;
use crate::standing::Standings;

/// Requests of sessions that may be under way beyond what is allowed to jobs.
const INTERACTIVE_EXTRA: usize = 2;
/// Time (ms) for which requests are kept as small as a refusal said.
const SMALLER_FOR: u64 = 60_000;
/// Rows that are refused alone as larger than a limit, while nothing is served, until it is not the rows; and as many
/// requests of several rows, until single rows are tried.
const MOST_OVER_LIMIT: usize = 3;

/// One account and model.
#[derive(Debug)]
pub struct Lane {
    pub limiter: Limiter,
    /// The limits of the open streams' models, and those that the provider's answers state.
    pub configured: Limits,
    pub stated: Stated,
    /// Tokens of the largest request that was served.
    largest_served: u64,
    /// Most tokens of a request by what a refusal said, and until when (ms) that holds.
    smaller: Option<(u64, u64)>,
    /// Since a request was served last: how many of several rows were refused as larger than a limit, and which rows were
    /// alone.
    over_limit: (usize, Vec<TextKey>),
    /// The groups whose rows it takes, in the order in which they were served last.
    pub groups: Vec<GroupId>,
    /// The served rows of the group that went last, among jobs and among sessions.
    pub level: [f64; 2],
    pub learned: Learned,
    /// Its capacity at the tier "flex".
    pub flex: Flex,
    /// Of chats or embeddings, and of decisions: a question has another frame than a line of a chat, and its answer comes
    /// sooner.
    pub chats: Record,
    pub decisions: Record,
    /// Until when (ms) no larger cap of an answer is tried than is known not to be refused.
    smaller_cap: u64,
    pub standings: Standings,
    pub concurrency: Concurrency,
    /// As the model sets it.
    pub max_concurrent: Option<usize>,
    pub in_flight: usize,
    pub in_flight_rows: usize,
    /// The number of the request that was sent last.
    pub last_request: u64,
    /// The service that it asked.
    pub last_service: Option<Service>,
    /// Refusals in a row.
    pub refusals: u32,
    /// Those of requests that were sent after the one before had been refused, and when (ms) that was last.
    pub refused_in_vain: u32,
    pub refused_at: u64,
    /// Since when (ms) requests without rows are answered, and none with rows.
    pub vouched: Option<u64>,
    pub requests_total: u64,
    pub rows_total: u64,
    pub rows_reused: u64,
    pub throttled: u64,
    pub errors: u64,
    pub last_error: Option<Words>,
}

impl Lane {
    /// `kept`: what an earlier gateway knew of it. Of what was sent before `known_since` (ms) nothing is known otherwise.
    pub fn new(limits: Limits, kept: Option<KeptLane>, known_since: u64, now: u64) -> Self {
        let limiter = match kept {
            Some(kept) => kept.limiter(limits, now),
            None => Limiter::new(limits, known_since, now),
        };
        let mut lane = Self {
            limiter,
            configured: limits,
            stated: Stated::new(kept.map(|kept| kept.reported).unwrap_or_default(), now),
            largest_served: 0,
            smaller: None,
            over_limit: (0, Vec::new()),
            groups: Vec::new(),
            level: [0.0; 2],
            learned: Learned {
                forms: Forms::default(),
                no_system_role: false,
                max_completion_tokens: false,
                no_sampling: false,
                no_flex: false,
                spare_answer_tokens: SPARE_ANSWER_TOKENS,
                most_answer_tokens: u64::MAX,
                most_request_tokens: u64::MAX,
                most_choices: usize::MAX,
            },
            flex: Flex::default(),
            chats: Record::default(),
            decisions: Record::default(),
            smaller_cap: 0,
            standings: Standings::default(),
            concurrency: Concurrency::default(),
            max_concurrent: None,
            in_flight: 0,
            in_flight_rows: 0,
            last_request: 0,
            last_service: None,
            refusals: 0,
            refused_in_vain: 0,
            refused_at: 0,
            vouched: None,
            requests_total: 0,
            rows_total: 0,
            rows_reused: 0,
            throttled: 0,
            errors: 0,
            last_error: None,
        };
        lane.keep_to_limits(now);
        lane
    }

    /// Sets what the models of the open streams allow.
    pub fn configure(&mut self, now: u64, limits: Limits, max_concurrent: Option<u32>) {
        self.configured = limits;
        self.max_concurrent = max_concurrent.map(|n| n.max(1) as usize);
        self.keep_to_limits(now);
    }

    /// A request was served that took so many tokens: what its answer says about limits may be true.
    pub fn serves(&mut self, now: u64, said: &Reported, took: Tokens) {
        let size = took.input + took.output;
        self.largest_served = self.largest_served.max(size);
        self.smaller = self.smaller.filter(|(most, _)| size <= *most);
        self.over_limit = (0, Vec::new());
        let say = Limits {
            requests_per_minute: said.requests.limit,
            tokens_per_minute: said.tokens.limit,
            input_tokens_per_minute: said.input_tokens.limit,
            output_tokens_per_minute: said.output_tokens.limit,
            inputs_per_minute: None,
        };
        self.stated.serves(now, took, say);
        self.keep_to_limits(now);
    }

    /// A request of several rows was refused as larger than a limit. If it may be as it is said, further ones are smaller.
    /// Returns true if it is likely that not even one row is small enough.
    pub fn refuses_as_over_limit(&mut self, now: u64, message: &str) -> bool {
        if let Some((limit, requested)) = headers::limit_in(message)
            && requested > limit
            && self.may_be_limit(limit)
        {
            self.smaller = Some((limit, now + SMALLER_FOR));
        }
        self.over_limit.0 += 1;
        self.over_limit.0 > MOST_OVER_LIMIT
    }

    /// Returns true if a row that was refused alone as larger than a limit, in a request of up to `size` tokens, is
    /// larger by all that was served.
    pub fn is_over_limit(&self, message: &str, size: u64) -> bool {
        let stated = self.stated.limits().tokens_per_minute;
        let said = headers::limit_in(message).map(|(limit, _)| limit);
        // By their count it may be larger than by ours.
        let is_larger = |limit: u64| size + size / 4 > limit;
        said.or(stated).is_some_and(|limit| is_larger(limit) && (stated == Some(limit) || self.may_be_limit(limit)))
    }

    /// A row was refused so that is not, as far as is known. Returns true if that is no single row's matter.
    pub fn refuses_all_as_over_limit(&mut self, row: TextKey) -> bool {
        let rows = &mut self.over_limit.1;
        if !rows.contains(&row) {
            rows.push(row);
        }
        rows.len() >= MOST_OVER_LIMIT
    }

    /// Nothing was served as far as is known.
    pub fn has_served_nothing(&self) -> bool {
        self.largest_served == 0
    }

    /// Returns true if a limit of tokens, or a context, does not contradict what was served.
    fn may_be_limit(&self, tokens: u64) -> bool {
        self.largest_served > 0 && tokens >= self.largest_served
    }

    /// Most tokens of a request, by what a provider says.
    pub fn largest_by_word(&self, now: u64) -> u64 {
        let smaller = self.smaller.filter(|(_, until)| now < *until).map(|(most, _)| most);
        let limited = self.limiter.largest_request();
        smaller.into_iter().chain(limited).fold(self.learned.most_request_tokens, u64::min)
    }

    /// The smaller of the configured and the stated limits holds.
    fn keep_to_limits(&mut self, now: u64) {
        self.limiter.set_limits(self.configured.min(self.stated.limits()), now);
        if self.limiter.is_limited() {
            self.concurrency.has_limits();
        }
    }

    /// A request is too large that was written by what had been learnt `before`, of so many tokens of its prompt by our
    /// count and with this cap of its answer, of which its rows need the `least`. Returns true if that is the fault of
    /// the cap, which has grown for thinking: then the next is smaller.
    pub fn takes_less_answer(
        &mut self,
        now: u64,
        message: &str,
        before: Learned,
        input: u64,
        (cap, least): (u64, u64),
    ) -> bool {
        let prompt = self.chats.measured.prompt.apply(input);
        if self.chats.measured.thinking.usual() == 0 || cap <= least {
            return false;
        }
        match trouble::context_in(message) {
            Some(context)
                if prompt + cap > context && context < before.most_request_tokens && self.may_be_limit(context) =>
            {
                self.learned.most_request_tokens = context;
            }
            Some(_) => return false,
            None => self.answer_cap(now, (cap / 2).max(least)),
        }
        true
    }

    /// A cap of an answer was refused: this one may not be. After a while larger ones are tried again.
    pub fn answer_cap(&mut self, now: u64, cap: u64) {
        self.learned.most_answer_tokens = self.learned.most_answer_tokens.min(cap);
        self.smaller_cap = now + SMALLER_FOR;
    }

    /// Forgets facts that were learnt a while ago and may have changed.
    pub fn forget(&mut self, now: u64) {
        if self.smaller_cap <= now {
            self.learned.most_answer_tokens = u64::MAX;
        }
    }

    /// The record of a service.
    pub fn record(&self, service: Service) -> &Record {
        if service == Service::Decisions { &self.decisions } else { &self.chats }
    }

    /// The same, to be changed.
    pub fn record_mut(&mut self, service: Service) -> &mut Record {
        if service == Service::Decisions { &mut self.decisions } else { &mut self.chats }
    }

    /// A request for a service was answered with a 2xx.
    pub fn answers(&mut self, now: u64, service: Service) {
        (self.refusals, self.refused_in_vain) = (0, 0);
        self.record_mut(service).last_success = Some(now);
    }

    /// A request failed that was sent at `sent` (ms), for a role. `is_own`: that says nothing of other requests.
    pub fn fails(
        &mut self,
        now: u64,
        (grant, sent): (Grant, u64),
        report: &Report,
        left: Left,
        (role, is_own): (Option<u32>, bool),
    ) {
        match report.trouble {
            Trouble::Rate(_) => self.throttled += 1,
            Trouble::Unsupported(_) | Trouble::TooLarge | Trouble::OverLimit | Trouble::AnswerCap | Trouble::CutOff => {
            }
            _ => {
                self.errors += u64::from(!matches!(report.trouble, Trouble::NoCapacity(_)));
                self.last_error = role.map(|role| Words { role, message: report.message.clone() });
            }
        }
        match report.trouble {
            Trouble::Rate(_) => self.limiter.refused(now, grant, left),
            // The usage of requests that broke off is unknown, so the reservation is kept.
            Trouble::Overload(_) => drop(grant),
            _ => self.limiter.settle(grant, Tokens::default(), left),
        }
        if (matches!(report.trouble, Trouble::Overload(_)) && !is_own)
            || (matches!(report.trouble, Trouble::Rate(_)) && !self.limiter.is_limited())
        {
            self.concurrency.troubled(sent, now);
        }
    }

    /// Most requests that may be under way now.
    pub fn allowed(&self, interactive: bool) -> usize {
        let most = self.max_concurrent.unwrap_or(usize::MAX);
        let extra = if interactive { INTERACTIVE_EXTRA } else { 0 };
        (self.concurrency.allowed() + extra).min(most)
    }

    /// Rows come for one of its groups. If that had none, it begins level with the others: nothing was saved up meanwhile.
    pub fn wake(&self, group: &mut Group) {
        if group.in_flight == 0 && group.queued() == 0 {
            group.served = group.served.max(self.level[usize::from(group.stream.interactive)]);
        }
    }

    /// A lane that nothing is queued in or under way.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.groups.is_empty()
    }
}
