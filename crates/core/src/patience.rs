//! When a model counts as unable to answer a task: none of its answers has a valid row, whichever way it is asked.
//!
//! As long as a task and a model have had no valid row together within the hour, little is risked: a few requests go
//! ahead, then one at a time, and no more than a known number is paid for. Where they have had valid rows, it takes more
//! answers without any.

/// Requests that go ahead as long as nothing is known.
const AHEAD: u32 = 8;
/// Requests that are paid for at most until the first valid row.
const MOST_PAID: u32 = 20;
/// Time for which a valid row counts, ms.
const HOUR: u64 = 3_600_000;
/// Answers without a valid row, one after the other, after which other ways of asking are tried.
const FEW: u32 = 5;
/// The same where there have been valid rows within the hour: this part of the answers that had one, this many at most.
const STRETCH: (u64, u32) = (50, 200);
/// And so many at least, or the rows of a request and some more: when a whole request of rows has no answer, each row on its
/// own account, as many requests follow.
const LEAST_STRETCH: (u32, u32) = (60, 10);
/// Answers in a way until the next is tried.
const PER_FORM: u32 = 1;
const WITH_FEWER_ROWS: u32 = 2;
const WITH_ONE_ROW: u32 = 3;

/// The way in which rows are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    /// As the task says.
    #[default]
    AsEver,
    /// In a form of `response_format` that was not tried before.
    OtherForm,
    /// With a quarter of the rows.
    FewerRows,
    /// With a single row.
    OneRow,
}

impl Way {
    /// Most rows of a request, of those there usually may be.
    pub fn rows(self, usual: usize) -> usize {
        match self {
            Self::AsEver | Self::OtherForm => usual,
            Self::FewerRows => (usual / 4).max(1),
            Self::OneRow => 1,
        }
    }
}

/// The consequence of an answer without a valid row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Continue in the same way.
    GoOn,
    /// The form is given up; another one is tried.
    OtherForm,
    /// Nothing that is left to try gave a valid row.
    GiveUp,
}

/// The standing of a task with a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Patience {
    /// When (ms) there last was a valid row.
    valid_at: Option<u64>,
    /// Answers that had one.
    valid: u64,
    /// Answers in a row that had none, in the present way.
    barren: u32,
    /// Requests that were paid for since it is not known whether there will be a valid row.
    paid: u32,
    in_flight: u32,
    way: Way,
    /// Goes up with each change of the way.
    turn: u32,
}

impl Patience {
    /// Returns true if there was a valid row within the hour.
    pub fn is_proven(&self, now: u64) -> bool {
        self.valid_at.is_some_and(|at| at + HOUR > now)
    }

    /// Returns true if there was a valid row since the task was last given up.
    pub fn has_answered(&self) -> bool {
        self.valid > 0
    }

    /// The present way, and its number.
    pub fn way(&self) -> (Way, u32) {
        (self.way, self.turn)
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Returns true if another request may be sent at `now` (ms).
    pub fn may_send(&self, now: u64) -> bool {
        let is_proven = self.is_proven(now);
        let at_once = match self.way {
            Way::AsEver if is_proven => return true,
            Way::AsEver if self.paid == 0 => AHEAD,
            _ => 1,
        };
        self.in_flight < at_once && (is_proven || self.paid + self.in_flight < MOST_PAID)
    }

    /// Returns true if rows that used up their attempts are kept back, since it may not be their fault.
    pub fn is_in_doubt(&self, now: u64) -> bool {
        !self.is_proven(now) || self.barren >= FEW || self.way != Way::AsEver
    }

    /// A request is sent.
    pub fn sent(&mut self, now: u64) {
        if !self.is_proven(now) && self.paid + self.in_flight == 0 {
            self.barren = 0;
        }
        self.in_flight += 1;
    }

    /// A request came to its end, however that was.
    pub fn ended(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// An answer had a valid row. The way in which it was asked stays.
    pub fn valid(&mut self, now: u64) {
        self.valid_at = Some(now);
        self.valid += 1;
        (self.barren, self.paid) = (0, 0);
        if self.way != Way::AsEver {
            self.way = Way::AsEver;
            self.turn += 1;
        }
    }

    /// An answer was paid for that says nothing of whether there will be a valid row: it was cut off, and the next one
    /// will be longer. Returns true if there may be a next one.
    pub fn cut(&mut self, now: u64) -> Next {
        self.pay(now);
        self.in_bounds(now, Next::GoOn)
    }

    /// An answer without a valid row, asked in the way of this number. `has_form`: there is a form that was not tried.
    /// `rows`: most rows of a request.
    pub fn barren(&mut self, now: u64, turn: u32, has_form: bool, rows: u32) -> Next {
        self.pay(now);
        if turn != self.turn {
            return self.in_bounds(now, Next::GoOn);
        }
        self.barren += 1;
        let enough = match self.way {
            Way::AsEver if self.is_proven(now) => {
                let part = u32::try_from(self.valid / STRETCH.0).unwrap_or(u32::MAX);
                let least = LEAST_STRETCH.0.max(rows.saturating_add(LEAST_STRETCH.1));
                part.max(least).min(STRETCH.1)
            }
            Way::AsEver => FEW,
            Way::OtherForm => PER_FORM,
            Way::FewerRows => WITH_FEWER_ROWS,
            Way::OneRow => WITH_ONE_ROW,
        };
        if self.barren < enough {
            return self.in_bounds(now, Next::GoOn);
        }
        self.next_way(now, has_form)
    }

    /// The form of a way is refused: the next one is tried.
    pub fn next_way(&mut self, now: u64, has_form: bool) -> Next {
        self.barren = 0;
        self.turn += 1;
        let (way, next) = match self.way {
            Way::AsEver | Way::OtherForm if has_form => (Way::OtherForm, Next::OtherForm),
            Way::AsEver | Way::OtherForm => (Way::FewerRows, Next::GoOn),
            Way::FewerRows => (Way::OneRow, Next::GoOn),
            Way::OneRow => (Way::OneRow, Next::GiveUp),
        };
        self.way = way;
        self.in_bounds(now, next)
    }

    /// Nothing is sent for a while, and one request after that.
    pub fn holds(&mut self) {
        self.paid = self.paid.min(MOST_PAID - 1);
    }

    /// It was given up: the next stream begins anew.
    pub fn begin_anew(&mut self) {
        *self = Self { in_flight: self.in_flight, turn: self.turn + 1, ..Self::default() };
    }

    fn pay(&mut self, now: u64) {
        self.paid = if self.is_proven(now) { 0 } else { self.paid + 1 };
    }

    fn in_bounds(&self, now: u64, next: Next) -> Next {
        if !self.is_proven(now) && self.paid >= MOST_PAID { Next::GiveUp } else { next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends what may be sent, answers the oldest; how many were paid for until it is given up, and the ways of asking.
    fn give_up(p: &mut Patience, now: u64, forms: u32) -> (u32, Vec<Way>) {
        let (mut open, mut paid, mut ways, mut forms) = (Vec::new(), 0, Vec::new(), forms);
        loop {
            while p.may_send(now) && open.len() < 64 {
                p.sent(now);
                open.push(p.way().1);
                if ways.last() != Some(&p.way().0) {
                    ways.push(p.way().0);
                }
            }
            let turn = open.remove(0);
            p.ended();
            paid += 1;
            match p.barren(now, turn, forms > 0, 50) {
                Next::GoOn => {}
                Next::OtherForm => forms -= 1,
                Next::GiveUp => return (paid, ways),
            }
        }
    }

    #[test]
    fn what_was_never_valid_is_given_up_after_all_ways_were_tried() {
        let (paid, ways) = give_up(&mut Patience::default(), 1, 2);
        assert_eq!(paid, 8 + 2 + 2 + 3);
        assert_eq!(ways, [Way::AsEver, Way::OtherForm, Way::FewerRows, Way::OneRow]);
        let (paid, ways) = give_up(&mut Patience::default(), 1, 0);
        assert_eq!((paid, ways.len()), (8 + 2 + 3, 3));
    }

    #[test]
    fn eight_go_ahead_and_after_a_valid_row_all() {
        let mut p = Patience::default();
        let mut sent = 0;
        while p.may_send(1) {
            p.sent(1);
            sent += 1;
        }
        assert_eq!(sent, 8);
        p.ended();
        p.barren(1, 0, true, 50);
        for _ in 0..6 {
            p.ended();
            assert!(!p.may_send(1));
        }
        p.valid(1);
        for _ in 0..100 {
            assert!(p.may_send(HOUR));
            p.sent(HOUR);
        }
        assert!(!p.may_send(HOUR + 1));
    }

    #[test]
    fn who_had_valid_rows_is_given_up_after_a_longer_stretch() {
        for (valid, stretch) in [(1, 60), (3_500, 70), (1_000_000, 200)] {
            let mut p = Patience::default();
            (0..valid).for_each(|_| p.valid(1));
            let (paid, _) = give_up(&mut p, 2, 2);
            assert!((stretch..stretch + 64 + 8).contains(&paid), "{valid}: {paid}");
            p.begin_anew();
            assert!(p.is_in_doubt(2) && give_up(&mut p, 2, 0).0 <= MOST_PAID);
        }
    }

    #[test]
    fn a_valid_row_ends_the_trial() {
        let mut p = Patience::default();
        (0..5).for_each(|_| assert_ne!(p.barren(1, p.way().1, true, 50), Next::GiveUp));
        assert_eq!(p.way().0, Way::OtherForm);
        p.valid(1);
        assert_eq!(p.way().0, Way::AsEver);
        assert!(p.may_send(1) && !p.is_in_doubt(1));
    }

    proptest! {
        /// Whatever comes of requests, no more than twenty are paid for without a valid row, and never are more than eight
        /// under way then.
        #[test]
        fn what_is_risked_is_bounded(said in proptest::collection::vec((0u8..4, 0usize..8), 1..200), forms in 0u32..4) {
            let (mut p, mut open, mut paid, mut forms, mut now) = (Patience::default(), Vec::new(), 0, forms, 1);
            for (said, which) in said {
                now += 1_000;
                while p.may_send(now) {
                    p.sent(now);
                    open.push(p.way().1);
                }
                prop_assert!(open.len() <= AHEAD as usize && p.in_flight() as usize == open.len());
                prop_assert!(!open.is_empty());
                let turn = open.remove(which % open.len());
                p.ended();
                paid += u32::from(said < 3);
                prop_assert!(paid <= MOST_PAID);
                let next = match said {
                    0 | 1 => p.barren(now, turn, forms > 0, 50),
                    2 => p.cut(now),
                    // It was refused for now.
                    _ => Next::GoOn,
                };
                match next {
                    Next::GoOn => {}
                    Next::OtherForm => forms -= 1,
                    Next::GiveUp => return Ok(()),
                }
            }
        }
    }
}
