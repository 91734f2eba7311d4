//! Which of two ways of asking takes less money, where a task may be asked in a chat and by decisions.
//!
//! Both are reckoned by our count and the model's prices. What a provider counts differs from that, in each way by a factor of
//! its own: so each is tried with a few rows, and the factor is learnt. A way that is dearer by far is not tried again.

use crate::dialect::Service;

/// Most rows of a trial, and of other requests until both ways have been answered.
const TRIAL_ROWS: usize = 10;
const OTHER_ROWS: usize = 20;
/// Trials of the dearer way, if the two cost about the same.
const ENOUGH: u32 = 2;
/// Beyond this part of the other's costs, one is enough.
const FAR: f64 = 1.5;
/// The weight of what was known before, for each further answer.
const KEPT: f64 = 0.9;
/// Requests in a row that are not answered, until decisions are left alone; and for how long, ms.
const MOST_FAILED: u32 = 2;
const LEFT_ALONE: u64 = 600_000;

/// The record of a way.
#[derive(Debug, Clone, Copy, Default)]
struct Way {
    in_flight: u32,
    answered: u32,
    /// Costs by our count, and as they were.
    expected: f64,
    actual: f64,
}

impl Way {
    /// Costs for what are so many by our count.
    fn costs(&self, expected: f64) -> f64 {
        if self.expected > 0.0 && self.actual > 0.0 { expected * (self.actual / self.expected) } else { expected }
    }

    fn trials(&self) -> u32 {
        self.answered.saturating_add(self.in_flight)
    }
}

/// The record of a task with a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cheaper {
    chat: Way,
    decisions: Way,
    /// Requests for decisions in a row that were not answered.
    failed: u32,
    /// Until when (ms) there are none.
    out_until: u64,
}

impl Cheaper {
    fn way(&self, service: Service) -> &Way {
        if service == Service::Decisions { &self.decisions } else { &self.chat }
    }

    fn way_mut(&mut self, service: Service) -> &mut Way {
        if service == Service::Decisions { &mut self.decisions } else { &mut self.chat }
    }

    /// The costs of a row in the cheaper way and in the other; by our count they are `expected`, of a chat and of decisions.
    fn order(&self, [chat, decisions]: [f64; 2]) -> [(Service, f64); 2] {
        let chat = (Service::Chat, self.chat.costs(chat));
        let decisions = (Service::Decisions, self.decisions.costs(decisions));
        if decisions.1 < chat.1 { [decisions, chat] } else { [chat, decisions] }
    }

    /// The way that is cheaper, as far as is known.
    pub fn cheaper(&self, now: u64, expected: [f64; 2]) -> Service {
        let [(cheaper, _), _] = self.order(expected);
        if self.out_until > now { Service::Chat } else { cheaper }
    }

    /// The way for the next request, and most rows of it while the ways are tried.
    pub fn next(&self, now: u64, expected: [f64; 2]) -> (Service, Option<usize>) {
        if self.out_until > now {
            return (Service::Chat, None);
        }
        let [(cheaper, least), (other, most)] = self.order(expected);
        let trials = if most < least * FAR { ENOUGH } else { 1 };
        if self.way(cheaper).trials() == 0 {
            return (cheaper, Some(TRIAL_ROWS));
        }
        if self.way(other).trials() < trials {
            return (other, Some(TRIAL_ROWS));
        }
        let is_known = self.chat.answered > 0 && self.decisions.answered > 0;
        (cheaper, (!is_known).then_some(OTHER_ROWS))
    }

    /// A request is sent.
    pub fn sent(&mut self, service: Service) {
        self.way_mut(service).in_flight += 1;
    }

    /// It came to its end, however that was.
    pub fn ended(&mut self, service: Service) {
        let way = self.way_mut(service);
        way.in_flight = way.in_flight.saturating_sub(1);
    }

    /// It was answered, and took so much; by our count it was to be `expected`.
    pub fn answered(&mut self, service: Service, expected: f64, actual: f64) {
        let way = self.way_mut(service);
        way.answered = way.answered.saturating_add(1);
        if expected > 0.0 && actual > 0.0 {
            (way.expected, way.actual) = (way.expected * KEPT + expected, way.actual * KEPT + actual);
        }
        if service == Service::Decisions {
            self.failed = 0;
        }
    }

    /// A request for decisions was not answered. `is_refused`: nor will others be. Returns true if there are none for a while.
    pub fn failed(&mut self, now: u64, is_refused: bool) -> bool {
        self.failed = self.failed.saturating_add(1);
        if is_refused || self.failed >= MOST_FAILED {
            (self.failed, self.out_until) = (0, now.saturating_add(LEFT_ALONE));
        }
        self.out_until > now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The place of a way, where costs are given.
    fn place(service: Service) -> usize {
        usize::from(service == Service::Decisions)
    }

    /// A provider that takes `factors` of what we count for rows that are `expected` to cost so much. Returns the rows that went
    /// in each way, and those of the dearer one that went last.
    fn run(factors: [f64; 2], expected: [f64; 2], ahead: usize) -> ([usize; 2], usize) {
        let (mut cheaper, mut under_way) = (Cheaper::default(), std::collections::VecDeque::new());
        let (mut rows, mut last, mut all) = ([0; 2], 0, 0);
        let is_dearer = |at: usize| factors[at] * expected[at] > factors[1 - at] * expected[1 - at];
        while all < 6_000 {
            let (service, most) = cheaper.next(0, expected);
            let n = most.unwrap_or(50).min(50);
            cheaper.sent(service);
            under_way.push_back((service, n));
            rows[place(service)] += n;
            all += n;
            if is_dearer(place(service)) {
                last = all;
            }
            if under_way.len() >= ahead
                && let Some((service, n)) = under_way.pop_front()
            {
                let by_us = expected[place(service)] * n as f64;
                cheaper.ended(service);
                cheaper.answered(service, by_us, by_us * factors[place(service)]);
            }
        }
        (rows, last)
    }

    proptest! {
        /// Within 200 rows, and within 3 % of a job in the cheaper way, as long as the other is not dearer by far.
        #[test]
        fn the_cheaper_way_is_found(
            factors in proptest::array::uniform2(0.5..2.0f64),
            expected in proptest::array::uniform2(20.0..100.0f64),
            ahead in 1usize..=8,
        ) {
            let (rows, last) = run(factors, expected, ahead);
            let costs: Vec<f64> = (0..2).map(|at| factors[at] * expected[at]).collect();
            let (least, most) = (costs[0].min(costs[1]), costs[0].max(costs[1]));
            let paid = rows[0] as f64 * costs[0] + rows[1] as f64 * costs[1];
            let all = (rows[0] + rows[1]) as f64;
            prop_assert!(last <= 200 || most < least * 1.001, "{rows:?} {last}");
            // What is known beforehand misleads by the factor at most.
            prop_assert!(paid <= all * least * 1.03 || most > least * 2.0, "{rows:?} {}", paid / all / least);
        }

        /// Whatever answers cost, and whichever of them come: a way is named that is not left alone.
        #[test]
        fn never_stuck(steps in proptest::collection::vec((0u8..4, 0.0..1e9f64, 0.0..1e9f64), 0..60), now in 0u64..1_000_000) {
            let mut cheaper = Cheaper::default();
            for (step, a, b) in steps {
                let (service, most) = cheaper.next(now, [a, b]);
                prop_assert!(cheaper.out_until <= now || service == Service::Chat);
                prop_assert!(most.is_none_or(|most| most > 0));
                match step {
                    0 => cheaper.sent(service),
                    1 => cheaper.ended(service),
                    2 => cheaper.answered(service, a, b),
                    _ => drop(cheaper.failed(now, a > b)),
                }
            }
        }
    }

    #[test]
    fn decisions_that_are_refused_or_fail_are_left_alone_and_tried_again() {
        let mut cheaper = Cheaper::default();
        let next = |cheaper: &Cheaper, now| cheaper.next(now, [9.0, 1.0]).0;
        assert_eq!(next(&cheaper, 0), Service::Decisions);
        assert!(!cheaper.failed(0, false));
        assert_eq!(next(&cheaper, 0), Service::Decisions);
        // An answer in between.
        cheaper.answered(Service::Decisions, 1.0, 1.0);
        assert!(!cheaper.failed(0, false) && cheaper.failed(0, false));
        assert_eq!((next(&cheaper, 0), cheaper.next(0, [9.0, 1.0]).1), (Service::Chat, None));
        assert_eq!(next(&cheaper, LEFT_ALONE), Service::Chat, "it has yet to be tried");
        cheaper.answered(Service::Chat, 1.0, 1.0);
        assert_eq!(next(&cheaper, LEFT_ALONE), Service::Decisions);
        assert!(cheaper.failed(LEFT_ALONE, true));
        assert_eq!(cheaper.cheaper(LEFT_ALONE, [9.0, 1.0]), Service::Chat);
    }
}
