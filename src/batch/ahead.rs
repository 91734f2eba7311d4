//! Reading ahead: the child's rows are kept in their order, what their calls will ask is asked as far ahead as is wanted,
//! and a row is evaluated when all of its answers are there.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use pgrx::prelude::*;

use super::answers::{Answer, Shown};
use super::calls::Found;
use super::guards::Guards;
use super::site::{Site, evaluate, string};
use super::wanted::Wanted;
use crate::ask::{Asker, has_text};
use crate::error::{Error, Result};
use crate::process::current_user;
use crate::{settings, statement};

/// Most rows that are kept. Those that wait for the slowest answer should not fill the disk.
const MOST_ROWS: usize = 32_000;
/// Rows handed over at a time, if there are so many: the gateway sends the first that it gets at once.
const FRAME: usize = 200;
/// Refill the gateway after this many rows, even if no row is being waited for.
const REFILL: u64 = 100;
/// Time that one call's answer is waited for before the others' are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Rows read at first where it is not known how many are wanted.
const FIRST: u64 = 10;

/// The state of a call in a row.
enum Fate {
    /// It was not looked at yet.
    Unknown,
    /// The row does not come to it, or it gives NULL without being asked.
    NotAsked,
    Pending,
    Answered(Rc<Answer>),
}

impl Fate {
    fn is_decided(&self) -> bool {
        matches!(self, Self::NotAsked | Self::Answered(_))
    }
}

/// A row that was read and not returned.
struct Row {
    fates: Vec<Fate>,
    /// Bytes of the texts that were asked about.
    bytes: usize,
}

/// The state of a batch scan.
pub struct Ahead {
    ps: *mut pg_sys::PlanState,
    is_on: bool,
    /// Row security holds for what is read.
    has_policies: bool,
    pub sites: Vec<Site>,
    guards: Guards,
    wanted: Wanted,
    /// The expressions of a limit, compiled.
    bounds: [*mut pg_sys::ExprState; 2],
    /// The number of rows that a limit takes, once it is known.
    limit: Option<u64>,
    role: pg_sys::Oid,
    /// The budget that the setting gives each statement.
    max_cost: Option<f64>,
    default_model: String,
    /// When the statement began that took the last row.
    began: i64,
    store: *mut pg_sys::Tuplestorestate,
    /// The slot of the row that is returned, and of one that is looked at once more.
    slots: [*mut pg_sys::TupleTableSlot; 2],
    rows: VecDeque<Row>,
    /// The number of the first of them.
    first: u64,
    /// By level of calls, how many rows were looked at; that of level 0 is not used.
    examined: Vec<u64>,
    bytes: usize,
    /// Rows that were put into the store since it was empty.
    stored: usize,
    is_child_done: bool,
    /// Rows that were taken, and those of them that passed the filter.
    taken: u64,
    passed: u64,
}

impl Ahead {
    /// # Safety
    /// `ps` is the state of a batch scan that begins, with its child; what was found is of its expressions.
    pub unsafe fn new(
        ps: *mut pg_sys::PlanState,
        found: Found,
        wanted: Wanted,
        is_on: bool,
        has_policies: bool,
    ) -> Self {
        // SAFETY: as the caller says; compiled in the memory context of the query.
        unsafe {
            let compile = |e: *mut pg_sys::Node| pg_sys::ExecInitExpr(e.cast(), ps);
            let Found { calls, guards, conditions } = found;
            let guards = Guards::new(ps, &guards, &conditions.expressions, calls.iter().map(|call| call.guard));
            let levels = calls.iter().map(|c| c.level + 1).max().unwrap_or(1);
            let sites = calls.into_iter().map(|call| Site::new(ps, call));
            let bounds = match wanted {
                Wanted::Limit { count, offset, .. } => [compile(count), compile(offset)],
                _ => [std::ptr::null_mut(); 2],
            };
            let kind = pg_sys::ExecGetResultType((*ps).lefttree);
            let slot = || pg_sys::ExecInitExtraTupleSlot((*ps).state, kind, &raw const pg_sys::TTSOpsMinimalTuple);
            Self {
                ps,
                is_on,
                has_policies,
                sites: sites.collect(),
                guards,
                wanted,
                bounds,
                limit: None,
                role: current_user(),
                max_cost: settings::statement_max_cost(),
                default_model: settings::default_model(),
                began: statement::began(),
                store: std::ptr::null_mut(),
                slots: [slot(), slot()],
                rows: VecDeque::new(),
                first: 0,
                examined: vec![0; levels],
                bytes: 0,
                stored: 0,
                is_child_done: false,
                taken: 0,
                passed: 0,
            }
        }
    }

    /// The node's state, as Postgres knows it.
    pub fn state(&self) -> *mut pg_sys::PlanState {
        self.ps
    }

    /// The next row that passes the filter, or NULL.
    ///
    /// # Safety
    /// The scan has begun and not ended.
    pub unsafe fn next(&mut self) -> Result<*mut pg_sys::TupleTableSlot> {
        // SAFETY: the executor calls this in the memory context of the query.
        unsafe {
            let (qual, projection) = ((*self.ps).qual, (*self.ps).ps_ProjInfo);
            let econtext = (*self.ps).ps_ExprContext;
            loop {
                pg_sys::MemoryContextReset((*econtext).ecxt_per_tuple_memory);
                self.is_on &= !(self.taken == 0 && self.has_policies && self.is_in_parts());
                let (slot, answers) =
                    if self.is_on { self.row()? } else { (pg_sys::ExecProcNode((*self.ps).lefttree), Vec::new()) };
                if is_empty(slot) {
                    return Ok(std::ptr::null_mut());
                }
                (*econtext).ecxt_outertuple = slot;
                self.taken += 1;
                let _shown = Shown::new(answers, false);
                if !qual.is_null() && !pg_sys::ExecQual(qual, econtext) {
                    if let Some(instrument) = (*self.ps).instrument.as_mut() {
                        instrument.nfiltered1 += 1.0;
                    }
                    continue;
                }
                self.passed += 1;
                if projection.is_null() {
                    // Nothing is wanted of the row but that it is there.
                    let empty = (*self.ps.cast::<pg_sys::ScanState>()).ss_ScanTupleSlot;
                    return Ok(pg_sys::ExecStoreVirtualTuple(pg_sys::ExecClearTuple(empty)));
                }
                return Ok(pg_sys::ExecProject(projection));
            }
        }
    }

    /// The next row of the child with the answers of its calls; an empty slot at the end.
    unsafe fn row(&mut self) -> Result<(*mut pg_sys::TupleTableSlot, Vec<Rc<Answer>>)> {
        // SAFETY: as of next().
        unsafe {
            self.begin();
            if self.taken % REFILL == REFILL - 1 {
                self.poll();
                self.fill();
            }
            while !self.is_first_decided() {
                self.poll();
                self.fill();
                let Some(row) = self.rows.front() else {
                    // Others may need the connections, and what they are allowed to spend.
                    self.sites.iter_mut().for_each(Site::close);
                    return Ok((std::ptr::null_mut(), Vec::new()));
                };
                let mut pending =
                    (0..).zip(&row.fates).filter(|(_, fate)| matches!(fate, Fate::Pending)).map(|(i, _)| i);
                // The row has to have all of its answers: one that does not come says so before the others come.
                let has_failed = |i: &usize| self.sites.get(*i).is_some_and(|site| site.failed.is_some());
                if let Some(site) = pending.clone().find(has_failed).or_else(|| pending.next()) {
                    if let Some(e) = self.sites.get_mut(site).and_then(|s| s.failed.take()) {
                        return Err(e);
                    }
                    self.receive(site, LOOK);
                }
            }
            let [slot, _] = self.slots;
            pg_sys::tuplestore_select_read_pointer(self.store, 0);
            if !pg_sys::tuplestore_gettupleslot(self.store, true, true, slot) {
                return Err(Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "a row that was read ahead is missing"));
            }
            pg_sys::tuplestore_trim(self.store);
            self.first += 1;
            let row = self.rows.pop_front();
            self.bytes -= row.as_ref().map_or(0, |r| r.bytes);
            if self.rows.is_empty() && !pg_sys::tuplestore_in_memory(self.store) {
                // Rows on disk are freed all at once, or never.
                pg_sys::tuplestore_clear(self.store);
                self.stored = 0;
            }
            let fates = row.into_iter().flat_map(|r| r.fates);
            let answers = fates.filter_map(|fate| if let Fate::Answered(a) = fate { Some(a) } else { None });
            Ok((slot, answers.collect()))
        }
    }

    /// Before each row: makes what the first needs, and looks at what has changed.
    unsafe fn begin(&mut self) {
        // SAFETY: as of next().
        unsafe {
            if self.store.is_null() {
                self.store = pg_sys::tuplestore_begin_heap(false, false, pg_sys::work_mem);
                // Nobody goes back: what was read may be freed.
                pg_sys::tuplestore_set_eflags(self.store, 0);
                // The row that is returned is read by pointer 0, those of a level by the pointer of its number.
                for _ in 1..self.examined.len() {
                    pg_sys::tuplestore_alloc_read_pointer(self.store, 0);
                }
            }
            if self.taken == 0
                && let Wanted::Limit { .. } = self.wanted
            {
                self.limit = self.bound();
                // As the LIMIT tells a Sort right below it; -1 is no bound.
                let bound = self.limit.filter(|_| (*self.ps).qual.is_null()).and_then(|n| i64::try_from(n).ok());
                pg_sys::ExecSetTupleBound(bound.unwrap_or(-1), (*self.ps).lefttree);
            }
            self.look_at_changes();
        }
    }

    /// Between two FETCHes much may change: streams are opened anew that are another role's or statement's, or of which
    /// anything is not as it was.
    unsafe fn look_at_changes(&mut self) {
        let role_and_budget = (current_user(), settings::statement_max_cost());
        let mut is_same = role_and_budget == (self.role, self.max_cost);
        (self.role, self.max_cost) = role_and_budget;
        let is_new_statement = std::mem::replace(&mut self.began, statement::began()) != self.began;
        let default_model = settings::default_model();
        if self.default_model != default_model {
            is_same = false;
            self.default_model = default_model;
            self.keep_to_former_model();
        }
        // SAFETY: as of next(). What others have changed is not heard by itself within a transaction.
        unsafe {
            if is_new_statement {
                pg_sys::AcceptInvalidationMessages();
            }
            for i in 0..self.sites.len() {
                let Some(site) = self.sites.get_mut(i).filter(|s| s.asker.is_some() || !s.waiting.is_empty()) else {
                    continue;
                };
                if is_same && (!is_new_statement || site.is_current()) {
                    site.asker.as_mut().map(Asker::move_on);
                    continue;
                }
                let waiting = std::mem::take(&mut site.waiting);
                site.close();
                for (row, text) in waiting.into_values() {
                    self.ask(i, row, text);
                }
            }
        }
    }

    /// Each text goes to one model: what was sent to the one that was the default is answered by it.
    fn keep_to_former_model(&mut self) {
        let Self { sites, rows, first, .. } = self;
        for (i, site) in sites.iter_mut().enumerate() {
            if site.asked.as_ref().is_some_and(|asked| asked.default_model.borrow().is_some()) {
                let recalled = site.recall(&mut |number, answer| {
                    if let Some(fate) = rows.get_mut((number - *first) as usize).and_then(|row| row.fates.get_mut(i)) {
                        *fate = Fate::Answered(Rc::new(answer));
                    }
                });
                if let Err(e) = recalled {
                    site.failed.get_or_insert(e);
                }
            }
        }
        for fate in rows.iter().flat_map(|row| &row.fates) {
            if let Fate::Answered(answer) = fate
                && answer.asked.default_model.borrow().is_some()
            {
                answer.asked.default_model.replace(Some(self.default_model.clone()));
            }
        }
    }

    /// Returns true if a client may read the result in parts, as drivers do that fetch so many rows at a time: the
    /// portal has a name then. Row security may allow other rows at the next part.
    unsafe fn is_in_parts(&self) -> bool {
        // SAFETY: what runs now, if anything; names are C strings. Those that Postgres makes up are loops of functions.
        unsafe {
            let Some(portal) = pg_sys::ActivePortal.as_ref() else { return false };
            let name = std::ffi::CStr::from_ptr(portal.name).to_bytes();
            portal.queryDesc.as_ref().is_some_and(|query| query.estate == (*self.ps).state)
                && !name.is_empty()
                && !name.starts_with(b"<unnamed portal")
        }
    }

    /// Rows that the limit takes, if it is one.
    unsafe fn bound(&self) -> Option<u64> {
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

    /// Returns true if the first row can be evaluated.
    fn is_first_decided(&self) -> bool {
        self.rows.front().is_some_and(|row| row.fates.iter().all(Fate::is_decided))
    }

    /// Reads on while there is room, and hands over what is to be asked.
    unsafe fn fill(&mut self) {
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
        // SAFETY: as of next(). What is evaluated, and what it is read from, is freed with the row's memory.
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

    fn set(&mut self, number: u64, site: usize, fate: Fate) {
        let row = self.rows.get_mut((number - self.first) as usize);
        if let Some(f) = row.and_then(|row| row.fates.get_mut(site)) {
            *f = fate;
        }
    }

    /// Queues a row's text of a call.
    unsafe fn ask(&mut self, site: usize, number: u64, text: String) {
        let Some(s) = self.sites.get_mut(site) else { return };
        // SAFETY: as of next().
        let fate = match unsafe { s.open(self.ps) } {
            Ok(Some(asker)) => {
                let n = asker.put((text.clone(), None));
                let bytes = text.len();
                s.waiting.insert(n, (number, text));
                if let Some(row) = self.rows.get_mut((number - self.first) as usize) {
                    row.bytes += bytes;
                    self.bytes += bytes;
                }
                Fate::Pending
            }
            Ok(None) => Fate::NotAsked,
            Err(e) => {
                s.failed.get_or_insert(e);
                Fate::Pending
            }
        };
        self.set(number, site, fate);
    }

    /// Hands over what is queued, where it is at least so much.
    fn flush(&mut self, least: usize) {
        for site in &mut self.sites {
            if let Some(asker) = &mut site.asker
                && asker.unsent() >= least
                && let Err(e) = asker.flush()
            {
                site.failed.get_or_insert(e);
            }
        }
    }

    /// Takes what has come.
    fn poll(&mut self) {
        for site in 0..self.sites.len() {
            while self.receive(site, Duration::ZERO) {}
        }
    }

    /// Waits for answers of a call. Whether anything came.
    fn receive(&mut self, site: usize, timeout: Duration) -> bool {
        let Self { sites, rows, first, .. } = self;
        let Some(Site { asker: Some(asker), asked: Some(asked), waiting, failed, .. }) = sites.get_mut(site) else {
            return false;
        };
        if failed.is_some() || asker.pending() == 0 {
            return false;
        }
        let received = asker.receive(timeout, &mut |n, verdict| {
            let Some((number, input)) = waiting.remove(&n) else { return };
            let answer = Answer { asked: Rc::clone(asked), input, verdict };
            if let Some(fate) = rows.get_mut((number - *first) as usize).and_then(|row| row.fates.get_mut(site)) {
                *fate = Fate::Answered(Rc::new(answer));
            }
        });
        let Err(e) = received else { return received.unwrap_or_default() };
        // Perhaps the budget lacks no more than what idle streams are allowed to spend.
        if asker.is_exhausted() && self.release_idle(site) {
            return true;
        }
        if let Some(site) = self.sites.get_mut(site) {
            site.failed.get_or_insert(e);
        }
        false
    }

    /// Closes the streams of other calls that wait for nothing, and asks for more of the budget once again. Whether there
    /// is more.
    fn release_idle(&mut self, site: usize) -> bool {
        let others = self.sites.iter_mut().enumerate().filter(|(i, s)| *i != site && s.waiting.is_empty());
        others.for_each(|(_, s)| s.close());
        let asker = self.sites.get_mut(site).and_then(|s| s.asker.as_mut());
        asker.is_some_and(|asker| asker.grant().is_ok())
    }

    /// Begins anew: the child's rows will be others.
    ///
    /// # Safety
    /// As of `next()`.
    pub unsafe fn restart(&mut self) {
        for site in &mut self.sites {
            site.close();
            site.waiting.clear();
            site.failed = None;
        }
        if !self.store.is_null() {
            // SAFETY: our own store.
            unsafe { pg_sys::tuplestore_clear(self.store) };
        }
        self.rows.clear();
        self.examined.fill(0);
        (self.first, self.bytes, self.stored, self.taken, self.passed, self.is_child_done) = (0, 0, 0, 0, 0, false);
    }

    /// Withdraws what is not sent, and frees what is kept.
    ///
    /// # Safety
    /// As of `next()`; which is not called any more.
    pub unsafe fn end(&mut self) {
        for site in &mut self.sites {
            site.close();
        }
        if !self.store.is_null() {
            // SAFETY: our own store, not used any more.
            unsafe { pg_sys::tuplestore_end(self.store) };
            self.store = std::ptr::null_mut();
        }
    }
}

unsafe fn is_empty(slot: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: the caller's slot is one or NULL.
    unsafe { slot.is_null() || (*slot).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 != 0 }
}
