//! The limiter: nothing is sent that would pass the limit in any window.
//!
//! `reserve` before a request, `settle` with what it really took, `refused` and `penalize` when the provider says no.
//! Time is a parameter: milliseconds of a monotonic clock.
//!
//! Two rolling windows keep the amounts that were sent: a minute, and a shorter one with the same part of the limit where the
//! limit is large enough for that. A rate that holds in every 6 s holds in every minute, for providers that look at
//! shorter windows than they say, and requests are spread instead of sent in one burst. Within the short window
//! requests are paced: each is followed by the time its tokens take to come back.
//!
//! A session that comes to an idle limit is not paced until what the windows allow is used up. `burst` finds out how much
//! that is at once.

mod burst;
mod even;
mod kept;
mod reported;
mod share;
mod stated;
mod window;

use burst::Burst;
use even::Even;
pub use kept::Kept;
use reported::Reported;
use share::Share;
pub use stated::Stated;
use window::Window;

/// A limit a minute, as a provider states it. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Requests a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens a minute, prompts and answers together.
    pub tokens_per_minute: Option<u64>,
    /// Tokens of prompts a minute.
    pub input_tokens_per_minute: Option<u64>,
    /// Tokens of answers a minute.
    pub output_tokens_per_minute: Option<u64>,
    /// Inputs a minute: texts, however many of them a request has.
    pub inputs_per_minute: Option<u64>,
}

impl Limits {
    /// The tighter of two limits, kind by kind.
    pub fn min(self, other: Self) -> Self {
        let min = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        Self {
            requests_per_minute: min(self.requests_per_minute, other.requests_per_minute),
            tokens_per_minute: min(self.tokens_per_minute, other.tokens_per_minute),
            input_tokens_per_minute: min(self.input_tokens_per_minute, other.input_tokens_per_minute),
            output_tokens_per_minute: min(self.output_tokens_per_minute, other.output_tokens_per_minute),
            inputs_per_minute: min(self.inputs_per_minute, other.inputs_per_minute),
        }
    }

    fn caps(self) -> Caps {
        [
            self.requests_per_minute,
            self.tokens_per_minute,
            self.input_tokens_per_minute,
            self.output_tokens_per_minute,
            self.inputs_per_minute,
        ]
    }

    /// Length (ms) of the shorter window: a whole part of a minute, or a minute could overlap one window more than it is
    /// entitled to.
    fn short_window(self) -> u64 {
        let [requests, tokens, input, output, inputs] = self.caps();
        [
            (tokens, TOKENS_PER_WINDOW),
            (input, TOKENS_PER_WINDOW),
            (output, OUTPUT_TOKENS_PER_WINDOW),
            (requests, REQUESTS_PER_WINDOW),
            (inputs, INPUTS_PER_WINDOW),
        ]
        .into_iter()
        .filter_map(|(limit, want)| limit.map(|l| MINUTE / (l / want).clamp(1, MINUTE / SHORTEST)))
        .max()
        .unwrap_or(MINUTE)
    }

    /// The part of each limit that a window of so many ms has.
    fn caps_of(self, length: u64) -> Caps {
        self.caps().map(|cap| cap.map(|l| (l * length / MINUTE).max(1)))
    }

    /// Most tokens one request may take, prompt and answer together, if there is a limit.
    pub fn largest_request(self) -> Option<u64> {
        let [_, tokens, input, ..] = self.caps_of(self.short_window());
        tokens.into_iter().chain(input).min()
    }

    /// Tokens of requests that use the limit evenly, if there is one: a small part of a window, so that little of it is left
    /// over at its edge, and still so large that half of the limit of requests suffices.
    pub fn even_request(self) -> Option<u64> {
        let most = self.largest_request()?;
        let a_minute = self.tokens_per_minute.into_iter().chain(self.input_tokens_per_minute).min()?;
        let least = self.requests_per_minute.map_or(0, |requests| 2 * a_minute / requests.max(1));
        Some((most / EVEN).max(least).max(1))
    }

    /// Most inputs that one request may have, if there is a limit.
    pub fn most_inputs(self) -> Option<u64> {
        let [.., inputs] = self.caps_of(self.short_window());
        inputs
    }

    /// Returns true if the limits ever allow a request of this size.
    pub fn admit(self, size: Size) -> bool {
        let caps = self.caps_of(self.short_window());
        caps.iter().zip(amounts(size)).all(|(cap, want)| cap.is_none_or(|cap| want <= cap))
    }
}

/// The tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    /// Tokens of its prompt.
    pub input: u64,
    /// Tokens of its answer.
    pub output: u64,
}

/// The size of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Its tokens.
    pub tokens: Tokens,
    /// Its inputs.
    pub inputs: u64,
}

/// A request of a single input.
impl From<Tokens> for Size {
    fn from(tokens: Tokens) -> Self {
        Self { tokens, inputs: 1 }
    }
}

/// The rest of its limits that a provider reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Left {
    /// Requests.
    pub requests: Option<u64>,
    /// Tokens, prompts and answers together.
    pub tokens: Option<u64>,
    /// Tokens of prompts.
    pub input_tokens: Option<u64>,
    /// Tokens of answers.
    pub output_tokens: Option<u64>,
}

/// Kinds of amounts: requests, tokens, tokens of prompts, tokens of answers, inputs.
const KINDS: usize = 5;
type Amounts = [u64; KINDS];
type Caps = [Option<u64>; KINDS];

/// The amounts of one request.
fn amounts(Size { tokens, inputs }: Size) -> Amounts {
    [1, tokens.input + tokens.output, tokens.input, tokens.output, inputs]
}

/// The class of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Somebody waits: bursts are let through, and room is kept for the next one.
    Interactive,
    /// A job: evenly paced.
    Bulk,
}

/// Why a request may not be sent now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Refusal {
    /// Not before this time (ms).
    Until {
        /// The time.
        at: u64,
        /// The part (0 to 1) of the request that could be sent now, where sending that would use what is otherwise
        /// lost at the window's edge; else 0.
        part: f64,
    },
    /// Never: it is larger than the whole limit.
    TooLarge,
}

/// A reservation, to be settled.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a reservation that is not settled counts in full"]
pub struct Grant {
    slot: u64,
    size: Size,
    /// When (ms) it was sent.
    at: u64,
    /// Our own estimate of the rest at that time.
    left: Caps,
    /// With it more went within 6 s than they let through.
    beyond: bool,
}

/// Longest window, ms.
const MINUTE: u64 = 60_000;
/// Shortest window, ms.
const SHORTEST: u64 = 6_000;
/// A window that holds fewer tokens than this is too coarse for whole requests of some thousand tokens.
const TOKENS_PER_WINDOW: u64 = 48_000;
/// The same for tokens of answers, of which a request has some hundred.
const OUTPUT_TOKENS_PER_WINDOW: u64 = 8_000;
/// The same for requests.
const REQUESTS_PER_WINDOW: u64 = 16;
/// The same for inputs, of which a request may have a hundred.
const INPUTS_PER_WINDOW: u64 = 1_600;
/// By how much our windows are longer than the provider's, ms: the short one and the minute. Requests take that much
/// more or less time to get there. The short one has a tenth of a minute's: over a minute it comes to as much.
const SLACK: (u64, u64) = (60, 250);
/// Requests are paced a little faster than the limit, so that what was missed is caught up with.
const PACE: f64 = 0.95;
/// Interactive requests may come at once as far as this part of the window would have let them through, also where it is
/// not idle.
const INTERACTIVE_BURST: u64 = 4;
/// Room is kept for the next interactive request for so long (ms) after one, up to this part of the window.
const SPARE_FOR: u64 = 60_000;
const MOST_SPARE: u64 = 50;
/// Requests whose size is free are this part of the window.
const EVEN: u64 = 20;
/// Cutting a request to fit the window's edge gains nothing where requests are a smaller part of the window than this.
const WORTH_CUTTING: u64 = 64;
/// A request may be cut to this part of it any time.
const TRIMMED: f64 = 0.9;
/// A trial whether a limit exists reserves at most the limit divided by this.
const TRIAL: u64 = 4;
/// The part of a request that is to stay of the reported rest.
const AIM: f64 = 0.3;
/// The longest pause (ms) for what others may use; what is left is looked at then.
const MOST_GAP: f64 = 6_000.0;
/// Time (ms) for which the limiter follows the provider's count, once that was lower than ours.
const CROWDED_FOR: u64 = 60_000;

/// The limiter of one account and model.
#[derive(Debug)]
pub struct Limiter {
    limits: Limits,
    /// The shorter one first; the same length twice for small limits.
    windows: [Window; 2],
    /// The burst that sessions may send at once.
    burst: Burst,
    /// When (ms) the next request may go, by class: interactive, bulk.
    paced: [u64; 2],
    /// When (ms) the last interactive request went, and what it took.
    interactive: Option<(u64, Amounts)>,
    /// When (ms) a request was last cut to fit.
    cut_at: Option<u64>,
    even: Even,
    reported: [Option<Reported>; KINDS],
    /// Until when (ms) the limiter follows what is reported.
    crowded_until: u64,
    share: Share,
    blocked_until: u64,
}

impl Limiter {
    /// A limiter that knows nothing of what was sent before `started` (ms), and therefore behaves as if the window
    /// before had been used up evenly. It is `now` (ms).
    pub fn new(limits: Limits, started: u64, now: u64) -> Self {
        let mut limiter = Self {
            limits: Limits::default(),
            windows: [Window::new(MINUTE, SLACK.1), Window::new(MINUTE, SLACK.1)],
            burst: Burst::default(),
            paced: [0; 2],
            interactive: None,
            cut_at: None,
            even: Even::default(),
            reported: [None; KINDS],
            crowded_until: 0,
            share: Share::whole(),
            blocked_until: 0,
        };
        limiter.set_limits(limits, now);
        // The longer window holds what the shorter one would have let through in it.
        for window in &mut limiter.windows {
            window.fill(started, now);
        }
        limiter
    }

    /// Changes the limits; what was counted stays counted.
    pub fn set_limits(&mut self, limits: Limits, now: u64) {
        if limits == self.limits {
            return;
        }
        self.limits = limits;
        let length = limits.short_window();
        let [short, minute] = &mut self.windows;
        if short.length != length {
            let slack = if length == MINUTE { SLACK.1 } else { SLACK.0 * length / SHORTEST };
            *short = minute.resized(length, slack, now);
        }
        for window in &mut self.windows {
            window.caps = limits.caps_of(window.length);
        }
        self.burst.set_limits(limits);
    }

    /// Most tokens one request may take, prompt and answer together, if there is a limit.
    pub fn largest_request(&self) -> Option<u64> {
        self.limits.largest_request()
    }

    /// The reservation of a request that is larger than the reported limits, as a trial: a part of them.
    pub fn trial(&self, tokens: Tokens) -> Tokens {
        let [_, all, input, output, _] = self.windows[0].caps.map(|cap| cap.map_or(u64::MAX, |cap| cap / TRIAL));
        Tokens { input: tokens.input.min(input).min(all / 2), output: tokens.output.min(output).min(all / 2) }
    }

    /// Most tokens one answer may have, if there is a limit for answers.
    pub fn largest_answer(&self) -> Option<u64> {
        let [_, _, _, output, _] = self.windows[0].caps;
        output
    }

    /// The number of requests of this size that fit into the short window, by what they take of the limits.
    pub fn fitting(&mut self, now: u64, size: Size) -> f64 {
        let share = self.share.at(now);
        let fit = |(cap, want): (&Option<u64>, u64)| cap.map(|cap| cap as f64 * share / want.max(1) as f64);
        self.windows[0].caps.iter().zip(amounts(size)).filter_map(fit).fold(f64::INFINITY, f64::min)
    }

    /// The number of requests that are to fill the short window where so many fit. `None`: they are as large as they come.
    pub fn even(&mut self, fitting: f64) -> Option<f64> {
        self.even.whole(fitting)
    }

    /// Until when (ms) neither a request of this size nor a part of it goes, if that is later than `now` (ms).
    pub fn closed_until(&mut self, now: u64, size: Size, class: Class) -> Option<u64> {
        match self.admit(now, amounts(size), class) {
            Err(Refusal::Until { at, part: 0.0 }) => Some(at),
            _ => None,
        }
    }

    /// Asks to send one request of this size at `now` (ms). `part`: 1, or less for one that was cut to that part
    /// because the refusal of the whole proposed it.
    ///
    /// # Errors
    /// When it may not be sent now; see [`Refusal`].
    pub fn reserve(&mut self, now: u64, size: impl Into<Size>, class: Class, part: f64) -> Result<Grant, Refusal> {
        let size = size.into();
        let want = amounts(size);
        let is_burst = self.admit(now, want, class)?;
        if part < TRIMMED {
            self.cut_at = Some(now);
        }
        let share = self.share.at(now);
        self.pace(now, want, class, share);
        if class == Class::Interactive {
            self.interactive = Some((now, want));
        }
        if is_burst {
            self.burst.goes(now);
        }
        let grant = self.count(now, size, false);
        Ok(Grant { beyond: self.burst.is_beyond(now, &self.windows[1]), ..grant })
    }

    /// Returns true if these amounts may go at `now` (ms) only as a burst, false if they may go in any case.
    fn admit(&mut self, now: u64, want: Amounts, class: Class) -> Result<bool, Refusal> {
        if self.windows[0].caps.iter().zip(want).any(|(cap, want)| cap.is_some_and(|cap| want > cap)) {
            return Err(Refusal::TooLarge);
        }
        let wait = |at: u64| Err(Refusal::Until { at, part: 0.0 });
        if now < self.blocked_until {
            return wait(self.blocked_until);
        }
        if let Some(at) = self.reported_allows(now, want) {
            return wait(at);
        }
        let share = self.share.at(now);
        let spare = self.spare(now, class);
        self.forget(now);
        let [short, minute] = self.windows.each_ref().map(|window| window.fits_at(want, spare, share));
        let paced = Some(self.paced[class as usize]).filter(|at| *at > now);
        let burst = |is_paced| self.burst.fits_at(now, want, spare, share, &self.windows[1], is_paced);
        // `None` is before any time.
        let steady = paced.max(short).max(burst(true));
        let may_burst = class == Class::Interactive && now >= self.crowded_until && !self.burst.is_off();
        let near = if may_burst && steady.is_some() { steady.min(burst(false)) } else { steady };
        let Some(at) = near.max(minute) else { return Ok(steady.is_some()) };
        match paced {
            // When it is paced no more a part of it may fit, long before all of it does.
            Some(paced) => wait(self.cut_from(paced, want, spare, share).map_or(at, |part| at.min(part))),
            None => Err(Refusal::Until { at, part: self.part(now, want, spare, share) }),
        }
    }

    fn forget(&mut self, now: u64) {
        for window in &mut self.windows {
            window.forget(now);
        }
    }

    /// The rest by the provider's reports, for each kind, as long as the reports count.
    fn left_as_reported(&self, now: u64) -> [Option<(&Reported, f64)>; KINDS] {
        if now >= self.crowded_until {
            return [None; KINDS];
        }
        let [_, minute] = &self.windows;
        std::array::from_fn(|kind| {
            let reported = self.reported.get(kind)?.as_ref()?;
            let sent = minute.since(reported.at).get(kind).copied().unwrap_or(0);
            Some((reported, reported.left(now, sent)?))
        })
    }

    /// When (ms) what the provider said is left will do, if that counts and does not now.
    fn reported_allows(&self, now: u64, want: Amounts) -> Option<u64> {
        let mut at = None;
        for (want, reported) in want.into_iter().zip(self.left_as_reported(now)) {
            if let Some((reported, left)) = reported {
                let missing = want as f64 - left;
                if missing > 0.0 {
                    at = at.max(Some(now + reported.comes_in(missing)));
                }
            }
        }
        at
    }

    /// The amounts to keep free for the next interactive request.
    fn spare(&self, now: u64, class: Class) -> Amounts {
        match self.interactive {
            Some((at, took)) if class == Class::Bulk && now < at + SPARE_FOR => {
                let mut spare = took;
                for (spare, cap) in spare.iter_mut().zip(self.windows[0].caps) {
                    *spare = (*spare).min(cap.unwrap_or(0) / MOST_SPARE);
                }
                spare
            }
            _ => [0; KINDS],
        }
    }

    /// When (ms) a part of these amounts may go, if not before `paced` (ms), though all of them do not: when what can be
    /// trimmed off is all that does not fit, or when it is time to cut a request.
    fn cut_from(&self, paced: u64, want: Amounts, spare: Amounts, share: f64) -> Option<u64> {
        let trimmed = want.map(|want| (want as f64 * TRIMMED).ceil() as u64);
        let fits = |window: &Window| window.fits_at(trimmed, spare, share).is_none_or(|at| at <= paced);
        if self.windows.iter().all(fits) {
            return Some(paced);
        }
        let is_worth = |(want, cap): (u64, Option<u64>)| cap.is_some_and(|cap| want * WORTH_CUTTING > cap);
        let worth = self.windows.iter().filter(|window| want.into_iter().zip(window.caps).any(is_worth));
        worth.map(|window| self.cut_at.map_or(paced, |at| paced.max(at + window.length))).min()
    }

    /// A request is cut once in the length of the window that is full.
    fn is_time_to_cut(&self, now: u64, window: &Window) -> bool {
        self.cut_at.is_none_or(|at| now >= at + window.length)
    }

    /// The part of a request that fits now, if it is time to cut one, and only where what is lost at its edge matters.
    fn part(&self, now: u64, want: Amounts, spare: Amounts, share: f64) -> f64 {
        let mut tightest = (1.0, 0.0);
        for window in &self.windows {
            for (((want, left), cap), spare) in want.iter().zip(window.left(share)).zip(window.caps).zip(spare) {
                if let (Some(left), Some(cap)) = (left, cap) {
                    let part = left.saturating_sub(spare) as f64 / (*want).max(1) as f64;
                    let may_cut = want * WORTH_CUTTING > cap && (part >= TRIMMED || self.is_time_to_cut(now, window));
                    if part < tightest.0 {
                        tightest = (part, if may_cut { part } else { 0.0 });
                    }
                }
            }
        }
        tightest.1
    }

    /// Sets when the next request may go: when what this one takes has come back, at the limit's rate.
    fn pace(&mut self, now: u64, want: Amounts, class: Class, share: f64) {
        let mut gap: f64 = 0.0;
        for ((want, limit), reported) in want.into_iter().zip(self.limits.caps()).zip(self.left_as_reported(now)) {
            let limit = limit.map_or(f64::INFINITY, |l| l as f64 * share / MINUTE as f64 / PACE);
            let of_others = reported.map_or(0.0, |(r, left)| {
                let rate = r.rate(left - want as f64, AIM * want as f64);
                // By then more will have been said.
                if rate > 0.0 { (want as f64 / rate).min(MOST_GAP) } else { MOST_GAP }
            });
            gap = gap.max(want as f64 / limit).max(of_others);
        }
        let gap = gap as u64;
        let mut next = |class: Class, burst: u64| {
            let free = &mut self.paced[class as usize];
            *free = (*free).max(now.saturating_sub(burst)) + gap;
        };
        next(Class::Bulk, gap);
        if class == Class::Interactive {
            next(class, self.windows[0].length / INTERACTIVE_BURST);
        }
    }

    fn count(&mut self, now: u64, size: Size, beyond: bool) -> Grant {
        let want = amounts(size);
        let mut slot = Window::slot(now);
        // The longer window first: what it holds reaches as far as what the shorter one holds.
        for window in self.windows.iter_mut().rev() {
            slot = window.add(slot, want);
        }
        let [a, b] = &self.windows;
        let (a, b) = (a.really_left(), b.really_left());
        let left = std::array::from_fn(|kind| {
            let of = |caps: &Caps| caps.get(kind).copied().flatten();
            of(&a).into_iter().chain(of(&b)).min()
        });
        Grant { slot, size, at: now, left, beyond }
    }

    /// The request was sent only at `now` (ms), later than it was granted: so much later it leaves the window.
    pub fn sent(&mut self, grant: Grant, now: u64) -> Grant {
        let (old, mut moved) = (amounts(grant.size), false);
        for window in &mut self.windows {
            moved |= window.replace(grant.slot, old, [0; KINDS]);
        }
        if !moved {
            return grant;
        }
        self.count(now, grant.size, grant.beyond)
    }

    /// Replaces what was reserved by what the provider says it took. `left`: what it said was left when it got the
    /// request.
    pub fn settle(&mut self, grant: Grant, actual: Tokens, left: Left) {
        let left = self.limited(left);
        let actual = amounts(Size { tokens: actual, ..grant.size });
        self.replace(&grant, actual);
        self.observe(&grant, left);
        self.burst.settled(&grant, actual, left, &self.windows[1]);
    }

    /// A request was refused for the limit's sake at `now` (ms), and took nothing. Unless the answer says what is left,
    /// less of the limit is used for a while: it is lower than was said, or shared. A little less even so.
    pub fn refused(&mut self, now: u64, grant: Grant, left: Left) {
        let left = self.limited(left);
        self.replace(&grant, [0; KINDS]);
        // A little less after a refusal although the limiter follows what is reported.
        if self.burst.refused(&grant) {
            // It has found out how much may be sent at once.
        } else if left == Left::default() {
            self.share.refused(now, share::CUT);
        } else if now < self.crowded_until {
            self.share.refused(now, share::TRIM);
        }
        // The assumptions about the time before the start are replaced by this knowledge.
        for window in &mut self.windows {
            window.forget_supposed();
        }
        if left != Left::default() {
            self.crowded_until = self.crowded_until.max(now + CROWDED_FOR);
            self.observe(&grant, left);
        }
    }

    /// The reported rest of the kinds that have a limit: some providers report 0 for the others.
    fn limited(&self, left: Left) -> Left {
        let [requests, tokens, input, output, _] = self.limits.caps().map(|cap| cap.is_some());
        Left {
            requests: left.requests.filter(|_| requests),
            tokens: left.tokens.filter(|_| tokens),
            input_tokens: left.input_tokens.filter(|_| input),
            output_tokens: left.output_tokens.filter(|_| output),
        }
    }

    fn replace(&mut self, grant: &Grant, actual: Amounts) {
        for window in &mut self.windows {
            window.replace(grant.slot, amounts(grant.size), actual);
        }
    }

    fn observe(&mut self, grant: &Grant, left: Left) {
        let want = amounts(grant.size);
        let [_, minute] = &self.windows;
        let left = [left.requests, left.tokens, left.input_tokens, left.output_tokens];
        for (kind, (left, reported)) in left.into_iter().zip(&mut self.reported).enumerate() {
            let Some(left) = left else { continue };
            let of = |all: Amounts| all.get(kind).copied().unwrap_or(0);
            let usual = self.limits.caps().get(kind).copied().flatten().map_or(0.0, |l| l as f64 / MINUTE as f64);
            match reported {
                Some(r) => {
                    let sent = of(minute.since(r.at)).saturating_sub(of(minute.since(grant.at)));
                    r.observe(grant.at, left, sent);
                }
                None => *reported = Some(Reported::new(grant.at, left, usual)),
            }
            let ours = grant.left.get(kind).copied().flatten().unwrap_or(0);
            if left + 2 * of(want) < ours || (grant.at < self.crowded_until && left < of(want)) {
                self.crowded_until = self.crowded_until.max(grant.at + CROWDED_FOR);
            }
        }
    }

    /// Sends nothing before `until` (ms): the provider said so.
    pub fn penalize(&mut self, until: u64) {
        self.blocked_until = self.blocked_until.max(until);
    }

    /// The time (ms) before which nothing is sent because the provider said so; 0 if it did not.
    pub fn blocked_until(&self) -> u64 {
        self.blocked_until
    }

    /// Returns true if there is any limit.
    pub fn is_limited(&self) -> bool {
        self.limits != Limits::default()
    }

    /// The use of the limits at `now` (ms).
    pub fn usage(&mut self, now: u64) -> Usage {
        let [_, left, ..] = self.left_as_reported(now).map(|r| r.map(|(_, left)| left.max(0.0) as u64));
        let window = &mut self.windows[0];
        window.forget(now);
        let minute = |n: u64| n * MINUTE / window.length;
        let used = window.sum.into_iter().zip(window.caps).filter_map(|(n, cap)| cap.map(|cap| n as f64 / cap as f64));
        let [requests, tokens, ..] = window.sum;
        Usage {
            requests: minute(requests),
            requests_limit: self.limits.requests_per_minute,
            tokens: minute(tokens),
            tokens_limit: self.limits.tokens_per_minute,
            used: used.reduce(f64::max),
            share: self.share.at(now),
            reported_left: left,
        }
    }
}

/// The use of the limits, scaled to a minute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Requests.
    pub requests: u64,
    /// Most requests.
    pub requests_limit: Option<u64>,
    /// Tokens of prompts and answers.
    pub tokens: u64,
    /// Most tokens.
    pub tokens_limit: Option<u64>,
    /// The part of the tightest limit that is used up, 0 to 1; `None` without limits.
    pub used: Option<f64>,
    /// The part of the limits that is ours, 0 to 1.
    pub share: f64,
    /// Tokens that are left by what the provider says, while that is less than we thought.
    pub reported_left: Option<u64>,
}

#[cfg(test)]
mod bursts;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
