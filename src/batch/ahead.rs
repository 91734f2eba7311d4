//! Reading ahead: the child's rows are kept in their order, what their calls will ask is asked as far ahead as is wanted,
//! and a row is evaluated when all of its answers are there.

mod asking;
mod window;

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use pgrx::prelude::*;

use super::answers::{Answer, Shown};
use super::calls::Found;
use super::guards::Guards;
use super::site::Site;
use super::wanted::Wanted;
use crate::error::{Error, Result};
use crate::process::current_user;
use crate::{settings, statement};

/// Refill the gateway after this many rows, even if no row is being waited for.
const REFILL: u64 = 100;
/// Time that one call's answer is waited for before the others' are looked at.
const LOOK: Duration = Duration::from_secs(1);

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

    /// Returns true if the first row can be evaluated.
    fn is_first_decided(&self) -> bool {
        self.rows.front().is_some_and(|row| row.fates.iter().all(Fate::is_decided))
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
