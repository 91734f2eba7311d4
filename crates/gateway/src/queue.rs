//! Rows that have not been asked yet. Only rows of the same compartment share a request.

use std::collections::{HashMap, VecDeque};

use crate::cache::TextKey;
use crate::row::Row;

/// Time that rows wait for company while their task has a request under way, ms: as long as others keep coming, and the
/// second time at most.
const GATHER: (u64, u64) = (20, 80);
/// Time that rows wait for the rest of their message, ms: it is taken in by parts.
const COMING: u64 = 1_000;
/// Compartments of a client that are looked at for one that may be sent: those behind have not waited longer.
const LOOKED_AT: usize = 32;

/// The rows of one compartment: those with the same isolation, or all that have none.
#[derive(Debug, Default)]
struct Compartment {
    /// By client; the first one's turn is next. None is empty.
    rows: VecDeque<(u64, VecDeque<Row>)>,
    count: usize,
    /// Tokens of their lines and answers.
    tokens: usize,
    /// When (ms) the first and the last of them came.
    waiting_since: u64,
    last_came: u64,
}

impl Compartment {
    /// Adds a row. Returns true if it is its client's only one.
    fn add(&mut self, row: Row, in_front: bool) -> bool {
        self.count += 1;
        self.tokens += row.size();
        match self.rows.iter_mut().find(|(conn, _)| *conn == row.conn) {
            Some((_, rows)) if in_front => rows.push_front(row),
            Some((_, rows)) => rows.push_back(row),
            None => {
                let own = (row.conn, VecDeque::from([row]));
                if in_front {
                    self.rows.push_front(own)
                } else {
                    self.rows.push_back(own)
                }
                return true;
            }
        }
        false
    }

    /// One row of the client whose turn it is.
    fn pop(&mut self) -> Option<Row> {
        let (conn, mut rows) = self.rows.pop_front()?;
        let row = rows.pop_front()?;
        if !rows.is_empty() {
            self.rows.push_back((conn, rows));
        }
        self.count -= 1;
        self.tokens = self.tokens.saturating_sub(row.size());
        Some(row)
    }

    fn gathered_at(&self) -> u64 {
        (self.last_came + GATHER.0).min(self.waiting_since + GATHER.1)
    }
}

/// When a compartment may be sent.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub now: u64,
    /// Nothing of the task is under way: there is no company to wait for.
    pub is_idle: bool,
    /// More rows of a message are just being taken in.
    pub is_coming: bool,
    /// Rows, and tokens by our count, that fill a request.
    pub rows: usize,
    pub tokens: usize,
}

/// Rows by compartment. Clients take turns, and a client's compartments do: many of them cost no more than few.
#[derive(Debug, Default)]
pub struct Queue {
    compartments: HashMap<TextKey, Compartment>,
    /// The clients, the next one first, with the compartments that they have rows in, the oldest first. One whose rows
    /// went in another client's turn is named until it would be next.
    turns: VecDeque<(u64, VecDeque<TextKey>)>,
    count: usize,
}

impl Queue {
    pub fn len(&self) -> usize {
        self.count
    }

    /// Queues a row that came now (ms).
    pub fn push(&mut self, now: u64, row: Row) {
        let compartment = self.compartments.entry(row.compartment).or_default();
        if compartment.count == 0 {
            compartment.waiting_since = now;
        }
        compartment.last_came = now;
        self.add(row, false);
    }

    /// Queues a row in its client's turn. Unlike one that has just come it does not wait for company.
    pub fn add(&mut self, row: Row, in_front: bool) {
        let (conn, key) = (row.conn, row.compartment);
        self.count += 1;
        if !self.compartments.entry(key).or_default().add(row, in_front) {
            return;
        }
        match self.turns.iter_mut().find(|(c, _)| *c == conn) {
            // It was taken and could not be sent: its compartment still is where it was.
            Some((_, keys)) if in_front && keys.iter().take(LOOKED_AT).any(|k| *k == key) => {}
            Some((_, keys)) if in_front => keys.push_front(key),
            Some((_, keys)) => keys.push_back(key),
            None if in_front => self.turns.push_front((conn, VecDeque::from([key]))),
            None => self.turns.push_back((conn, VecDeque::from([key]))),
        }
    }

    /// The compartment whose turn it is among those that may be sent; else when (ms) to look again, if there are rows.
    pub fn ready(&mut self, ready: Ready) -> Result<TextKey, Option<u64>> {
        let Self { compartments, turns, .. } = self;
        let mut again = None;
        for (_, keys) in &mut *turns {
            while let Some(key) = keys.front().filter(|key| compartments.get(key).is_none_or(|c| c.count == 0)) {
                compartments.remove(key);
                keys.pop_front();
            }
            for key in keys.iter().take(LOOKED_AT) {
                let Some(c) = compartments.get(key).filter(|c| c.count > 0) else { continue };
                let is_full = c.count >= ready.rows || c.tokens >= ready.tokens;
                let at = if ready.is_coming { c.waiting_since + COMING } else { c.gathered_at() };
                if ready.is_idle || is_full || ready.now >= at {
                    return Ok(*key);
                }
                again = Some(again.map_or(at, |before: u64| before.min(at)));
            }
        }
        turns.retain(|(_, keys)| !keys.is_empty());
        Err(again)
    }

    /// Takes rows of a compartment, at most so many; its clients take turns, row by row.
    pub fn take(&mut self, key: TextKey, most: usize) -> Vec<Row> {
        let Some(compartment) = self.compartments.get_mut(&key) else { return Vec::new() };
        let rows: Vec<Row> = std::iter::from_fn(|| compartment.pop()).take(most).collect();
        self.count -= rows.len();
        rows
    }

    /// Rows of a compartment went out now (ms). The rows that are left wait for company anew. Moves the client that was just
    /// served, and the compartment among its own, to the back.
    pub fn sent(&mut self, now: u64, key: TextKey) {
        let Some(compartment) = self.compartments.get_mut(&key) else { return };
        compartment.waiting_since = now;
        let stays = compartment.count > 0;
        if !stays {
            self.compartments.remove(&key);
        }
        for i in 0..self.turns.len() {
            let place = self.turns.get(i).and_then(|(_, keys)| keys.iter().take(LOOKED_AT).position(|k| *k == key));
            let Some(place) = place else { continue };
            let Some((conn, mut keys)) = self.turns.remove(i) else { return };
            keys.remove(place);
            if stays {
                keys.push_back(key);
            }
            if !keys.is_empty() {
                self.turns.push_back((conn, keys));
            }
            return;
        }
    }

    /// Takes out all rows, in the order of their turns.
    pub fn drain(&mut self) -> Vec<Row> {
        let Self { mut compartments, turns, .. } = std::mem::take(self);
        let keys = turns.into_iter().flat_map(|(_, keys)| keys);
        keys.filter_map(|key| compartments.remove(&key)).flat_map(|c| c.rows).flat_map(|(_, rows)| rows).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llm_batch_core::task::Span;
    use std::collections::BTreeSet;

    fn row(conn: u64, compartment: TextKey, key: TextKey) -> Row {
        Row::new(key, compartment, conn, String::new(), (10, Span { mean: 1.0, planned: 1 }), 50)
    }

    fn at(now: u64, is_idle: bool) -> Ready {
        Ready { now, is_idle, is_coming: false, rows: 50, tokens: 10_000 }
    }

    /// Takes the next pack, and says whose rows and which compartment it has.
    fn send(q: &mut Queue, now: u64) -> (TextKey, Vec<u64>) {
        let key = q.ready(at(now, true)).unwrap();
        let rows = q.take(key, 50);
        assert!(!rows.is_empty() && rows.iter().all(|r| r.compartment == key));
        q.sent(now, key);
        (key, rows.iter().map(|r| r.conn).collect())
    }

    #[test]
    fn packs_never_mix_compartments_whatever_is_pushed_taken_and_put_back() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut q, mut waiting, mut key) = (Queue::default(), BTreeSet::new(), 0);
            for now in 0..400 {
                for _ in 0..random.usize(..6) {
                    q.push(now, row(random.u64(..5), random.u128(..40), key));
                    waiting.insert(key);
                    key += 1;
                }
                if let Ok(compartment) = q.ready(at(now, random.bool())) {
                    let mut rows = q.take(compartment, random.usize(1..9));
                    assert!(!rows.is_empty() && rows.iter().all(|r| r.compartment == compartment), "{seed}");
                    let sent = if random.bool() { random.usize(..=rows.len()) } else { 0 };
                    rows.split_off(sent).into_iter().rev().for_each(|row| q.add(row, true));
                    if sent > 0 {
                        rows.iter().for_each(|r| assert!(waiting.remove(&r.key), "{seed}"));
                        q.sent(now, compartment);
                    }
                    if random.u8(..20) == 0 {
                        q.drain().into_iter().for_each(|row| q.add(row, false));
                    }
                }
                assert_eq!(q.len(), waiting.len(), "{seed}");
            }
            while q.len() > 0 {
                let key = q.ready(at(1_000, false)).unwrap();
                q.take(key, 50).iter().for_each(|r| assert!(waiting.remove(&r.key), "{seed}"));
                q.sent(1_000, key);
            }
            assert!(q.ready(at(1_000, true)).is_err() && waiting.is_empty(), "{seed}");
            assert!(q.compartments.is_empty() && q.turns.is_empty(), "nothing is left behind: {seed}");
        }
    }

    #[test]
    fn who_has_one_compartment_has_as_many_turns_as_who_has_thousands() {
        let mut q = Queue::default();
        for n in 0..5_000 {
            q.push(0, row(1, n, n));
        }
        for n in 5_000..5_200 {
            q.push(1, row(2, 5_000, n));
        }
        let clients: Vec<u64> = (0..8).map(|_| send(&mut q, 2).1[0]).collect();
        assert_eq!(clients, [1, 2, 1, 2, 1, 2, 1, 2]);
    }

    #[test]
    fn compartments_of_a_client_take_turns_and_a_pack_that_cannot_be_sent_keeps_its_turn() {
        let mut q = Queue::default();
        for n in 0..120 {
            q.push(0, row(1, 7, n));
        }
        q.push(1, row(1, 8, 120));
        let key = q.ready(at(1, true)).unwrap();
        let rows = q.take(key, 50);
        assert_eq!((key, rows.len()), (7, 50));
        rows.into_iter().rev().for_each(|row| q.add(row, true));
        assert_eq!(q.ready(at(1, true)), Ok(7), "it was not sent");
        assert_eq!([send(&mut q, 1).0, send(&mut q, 1).0, send(&mut q, 1).0], [7, 8, 7]);
    }

    #[test]
    fn a_full_compartment_goes_at_once_and_the_others_when_they_have_gathered() {
        let mut q = Queue::default();
        q.push(100, row(1, 1, 1));
        assert_eq!(q.ready(at(119, false)), Err(Some(120)));
        for n in 2..52 {
            q.push(110, row(1, 2, n));
        }
        assert_eq!(q.ready(at(110, false)), Ok(2));
        q.take(2, 50);
        q.sent(110, 2);
        assert_eq!((q.ready(at(110, false)), q.ready(at(120, false))), (Err(Some(120)), Ok(1)));
    }
}
