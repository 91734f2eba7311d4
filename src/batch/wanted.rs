//! The part of a batch scan's output that is wanted, and its place in a plan.

use std::ptr::null_mut;

use pgrx::prelude::*;

use super::nodes::{list, to_list};

/// The part of a node's output that will be wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// All of it.
    All,
    /// Perhaps a few rows, perhaps all.
    Unknown,
    /// As many rows as a LIMIT and an OFFSET say, if there is one; if that is not sure, perhaps a few of them.
    Limit { count: *mut pg_sys::Node, offset: *mut pg_sys::Node, is_sure: bool },
}

impl Wanted {
    /// The rows wanted from a node below one that reads another number of rows than it returns.
    pub fn below(self) -> Self {
        if self == Self::All { Self::All } else { Self::Unknown }
    }

    /// Writes it into a scan, with whether row security holds. Postgres copies plans, and writes them as text, so only nodes
    /// can carry it.
    ///
    /// # Safety
    /// `scan` is a new node; the expressions of a limit are planned ones.
    pub unsafe fn write(self, scan: *mut pg_sys::CustomScan, has_policies: bool) {
        let (kind, bounds) = match self {
            Self::All => (0, [null_mut(), null_mut()]),
            Self::Unknown => (1, [null_mut(), null_mut()]),
            Self::Limit { count, offset, is_sure } => (if is_sure { 2 } else { 3 }, [count, offset]),
        };
        let flags = [!bounds[0].is_null(), !bounds[1].is_null(), has_policies].map(i32::from);
        let flags = [kind].into_iter().chain(flags);
        let bounds = bounds.into_iter().filter(|b| !b.is_null());
        // SAFETY: as the caller says.
        unsafe {
            (*scan).custom_private = to_list(flags.map(|flag| pg_sys::makeInteger(flag)));
            (*scan).custom_exprs = to_list(bounds.map(|b| pg_sys::copyObjectImpl(b.cast()).cast::<pg_sys::Node>()));
        }
    }

    /// Reads back what `write()` wrote: what is wanted, and whether row security holds.
    ///
    /// # Safety
    /// `scan` is a node that `write()` was given, or a copy of it.
    pub unsafe fn read(scan: *mut pg_sys::CustomScan) -> (Self, bool) {
        // SAFETY: as the caller says.
        let (flags, bounds) = unsafe {
            let flags = list::<pg_sys::Integer>((*scan).custom_private);
            let flags: Vec<i32> = flags.into_iter().map(|i| (*i).ival).collect();
            (flags, list::<pg_sys::Node>((*scan).custom_exprs))
        };
        let mut bounds = bounds.into_iter();
        let mut bound = |flag: usize| {
            if flags.get(flag) == Some(&1) { bounds.next().unwrap_or(null_mut()) } else { null_mut() }
        };
        let wanted = match flags.first() {
            Some(0) => Self::All,
            Some(kind @ (2 | 3)) => Self::Limit { count: bound(1), offset: bound(2), is_sure: *kind == 2 },
            _ => Self::Unknown,
        };
        (wanted, flags.get(3) == Some(&1))
    }
}
