//! The rows that a batch scan has in hand: as many as are wanted and fit, each looked at for the calls it comes to.

use std::rc::Rc;

use pgrx::prelude::*;

use super::{Ahead, Fate, Row, is_empty};
use crate::ask::Asker;
use crate::batch::answers::Shown;
use crate::batch::site::{Site, evaluate, string};
use crate::batch::wanted::Wanted;
use crate::blank::has_text;

/// Most rows that are kept. Those that wait for the slowest answer should not fill the disk.
const MOST_ROWS: usize = 32_000;
/// Rows handed over at a time, if there are so many: the gateway sends the first that it gets at once.
const FRAME: usize = 200;
/// Rows read at first where it is not known how many are wanted.
const FIRST: u64 = 10;

impl Ahead {
    /// Rows that the limit takes, if it is one.
    pub(super) unsafe fn bound(&self) -> Option<u64> {
        // SAFETY: expressions of the LIMIT above, which has evaluated them by now.
        unsafe {
            let value = |bound: *mut pg_sys::ExprState| {
                if bound.is_null() { None } else { evaluate::<i64>(bound, (*self.ps).ps_ExprContext) }
            };
            let [count, offset] = self.bounds.map(value);
            let count = u64::try_from(count?).unwrap_or(0);
            Some(count.saturating_add(offset.and_then(|n| u64::try_from(n).ok()).unwrap_or(0)))
        }
    }

    /// Most rows to have in hand. With a filter before a limit, twice the rows that have to be asked about are, at most,
    /// and as many as the limit takes.
    fn most_rows(&self) -> u64 {
        let left = match (self.wanted, self.limit) {
            (Wanted::All, _) | (Wanted::Limit { .. }, None) => return u64::MAX,
            (Wanted::Limit { .. }, Some(limit)) => limit.saturating_sub(self.passed),
            (Wanted::Unknown, _) => 0,
        };
        if left == 0 {
            return FIRST.max(self.taken);
        }
        let left = match self.wanted {
            Wanted::Limit { is_sure: false, .. } => left.min(FIRST.max(self.taken)),
            _ => left,
        };
        // SAFETY: reads a field of our state.
        if unsafe { (*self.ps).qual.is_null() } {
            return left;
        }
        // As many as it takes if as many pass as did so far.
        let expected = left.saturating_mul(self.taken + 1).div_ceil(self.passed + 1);
        expected.min(left.max(self.taken))
    }

    fn has_room(&self) -> bool {
        // SAFETY: a setting, read on the main thread.
        let memory = unsafe { pg_sys::work_mem } as usize * 1024;
        (self.rows.len() as u64) < self.most_rows()
            && self.stored_rows() < MOST_ROWS
            && (self.bytes < memory || self.rows.is_empty())
            && self.sites.iter().all(|s| s.failed.is_none() && s.asker.as_ref().is_none_or(Asker::has_room))
    }

    /// Rows that take room in the store.
    fn stored_rows(&self) -> usize {
        // SAFETY: our own store, which was made before the first row.
        if unsafe { pg_sys::tuplestore_in_memory(self.store) } { self.rows.len() } else { self.stored }
    }

    /// Reads on while there is room, and hands over what is to be asked.
    pub(super) unsafe fn fill(&mut self) {
        // SAFETY: as of next().
        unsafe {
            while !self.is_child_done && (self.has_room() || self.rows.is_empty()) {
                let slot = pg_sys::ExecProcNode((*self.ps).lefttree);
                if is_empty(slot) {
                    self.is_child_done = true;
                    break;
                }
                pg_sys::tuplestore_puttupleslot(self.store, slot);
                self.stored += 1;
                let number = self.first + self.rows.len() as u64;
                let fates = self.sites.iter().map(|_| Fate::Unknown).collect();
                self.rows.push_back(Row { fates, bytes: 0 });
                self.examine(0, number, slot);
                self.flush(FRAME);
            }
            for level in 1..self.examined.len() {
                self.look_again(level);
            }
            self.flush(1);
        }
    }

    /// Looks at rows for the calls of a level, as long as those have the answers of the levels before.
    unsafe fn look_again(&mut self, level: usize) {
        // SAFETY: as of next(). Every row is looked at once at each level before it is returned.
        unsafe {
            while let Some(number) = self.examined.get(level).copied() {
                let is_below = |site: &Site| site.call.level < level;
                let row = self.rows.get((number - self.first) as usize);
                let is_ready = row.is_some_and(|row| {
                    self.sites.iter().zip(&row.fates).all(|(site, fate)| !is_below(site) || fate.is_decided())
                });
                let has_room = self.sites.iter().all(|s| s.asker.as_ref().is_none_or(Asker::has_room));
                if !is_ready || !(has_room || number == self.first) {
                    return;
                }
                let [_, slot] = self.slots;
                pg_sys::tuplestore_select_read_pointer(self.store, level as i32);
                if !pg_sys::tuplestore_gettupleslot(self.store, true, true, slot) {
                    return;
                }
                self.examine(level, number, slot);
                if let Some(examined) = self.examined.get_mut(level) {
                    *examined += 1;
                }
            }
        }
    }

    /// Decides which calls of a level a row comes to, and queues what they ask.
    unsafe fn examine(&mut self, level: usize, number: u64, slot: *mut pg_sys::TupleTableSlot) {
        // SAFETY: as of next(). Values and their sources are freed with the row's memory.
        unsafe {
            let econtext = (*self.ps).ps_ExprContext;
            let at = (number - self.first) as usize;
            let known = self.rows.get(at).map(|row| {
                row.fates.iter().filter_map(|f| if let Fate::Answered(a) = f { Some(Rc::clone(a)) } else { None })
            });
            let _shown = Shown::new(known.map(Iterator::collect).unwrap_or_default(), true);
            (*econtext).ecxt_outertuple = slot;
            self.guards.forget();
            for i in 0..self.sites.len() {
                let Some(site) = self.sites.get(i).filter(|s| s.call.level == level) else { continue };
                let text =
                    if self.guards.hold(site.call.guard, econtext) { string(site.input, econtext) } else { None };
                match text.filter(|t| has_text(t)) {
                    Some(text) => self.ask(i, number, text),
                    None => self.set(number, i, Fate::NotAsked),
                }
            }
            (*econtext).ecxt_outertuple = std::ptr::null_mut();
            pg_sys::MemoryContextReset((*econtext).ecxt_per_tuple_memory);
        }
    }
}
