//! Guards: the conditions under which an evaluation reaches a call. They are a tree, since a call has all the guards of the
//! expressions around it. Each is evaluated once for a row, however many calls are behind it.

use std::ptr::null_mut;

use pgrx::prelude::*;

/// The test that a condition has to pass: true, false or NULL. A value of another type is tested for NULL alone.
#[derive(Debug, Clone, Copy)]
pub enum Test {
    True,
    NotTrue,
    NotFalse,
    Null,
}

impl Test {
    fn holds(self, value: Option<bool>) -> bool {
        match self {
            Self::True => value == Some(true),
            Self::NotTrue => value != Some(true),
            Self::NotFalse => value != Some(false),
            Self::Null => value.is_none(),
        }
    }
}

/// A guard, by whose position in the list of all of them calls and other guards refer to it.
#[derive(Debug, Clone, Copy)]
pub struct Guard {
    /// The one that has to hold before this is evaluated; it comes before it in the list.
    pub outer: Option<usize>,
    pub test: Test,
    /// By position in the list of conditions.
    pub condition: usize,
    /// The level of what is behind it, as of a call; none if it, or one before, can't be evaluated twice.
    pub level: Option<usize>,
}

/// The guards of a scan's calls, and which of them hold for the row at hand.
pub struct Guards {
    gates: Vec<Gate>,
    conditions: Vec<Condition>,
}

struct Gate {
    guard: Guard,
    /// A call is behind it.
    is_needed: bool,
    /// It and all before it hold; `None` until that was looked at.
    holds: Option<bool>,
}

struct Condition {
    /// NULL if no call is behind it.
    state: *mut pg_sys::ExprState,
    /// Its value, once it was evaluated.
    value: Option<Option<bool>>,
}

impl Guards {
    /// Compiles the conditions of those that are before one of `innermost`.
    ///
    /// # Safety
    /// `ps` is the state of a batch scan that begins; the conditions are of its expressions.
    pub unsafe fn new(
        ps: *mut pg_sys::PlanState,
        guards: &[Guard],
        conditions: &[*mut pg_sys::Node],
        innermost: impl Iterator<Item = Option<usize>>,
    ) -> Self {
        let gate = |guard: &Guard| Gate { guard: *guard, is_needed: false, holds: None };
        let mut gates: Vec<Gate> = guards.iter().map(gate).collect();
        for mut at in innermost {
            while let Some(gate) = at.and_then(|i| gates.get_mut(i)).filter(|gate| !gate.is_needed) {
                gate.is_needed = true;
                at = gate.guard.outer;
            }
        }
        let mut compiled: Vec<Condition> =
            conditions.iter().map(|_| Condition { state: null_mut(), value: None }).collect();
        for Gate { guard, .. } in gates.iter().filter(|gate| gate.is_needed) {
            pgrx::check_for_interrupts!();
            if let (Some(condition), Some(node)) = (compiled.get_mut(guard.condition), conditions.get(guard.condition))
                && condition.state.is_null()
            {
                // SAFETY: as the caller says; compiled in the memory context of the query.
                condition.state = unsafe { pg_sys::ExecInitExpr(node.cast(), ps) };
            }
        }
        Self { gates, conditions: compiled }
    }

    /// Forgets what was found out of the row before, or with fewer answers.
    pub fn forget(&mut self) {
        self.gates.iter_mut().for_each(|gate| gate.holds = None);
        self.conditions.iter_mut().for_each(|condition| condition.value = None);
    }

    /// Returns true if a guard and all before it hold. Those after one that does not are not evaluated.
    ///
    /// # Safety
    /// The context is that of the node, with a row in it; a call is behind the guard.
    pub unsafe fn hold(&mut self, innermost: Option<usize>, econtext: *mut pg_sys::ExprContext) -> bool {
        let mut unknown = Vec::new();
        let mut at = innermost;
        let mut holds = loop {
            let Some((i, gate)) = at.and_then(|i| Some((i, self.gates.get(i)?))) else { break true };
            if let Some(holds) = gate.holds {
                break holds;
            }
            unknown.push(i);
            at = gate.guard.outer;
        };
        for i in unknown.into_iter().rev() {
            let Some(gate) = self.gates.get_mut(i) else { continue };
            if holds && let Some(condition) = self.conditions.get_mut(gate.guard.condition) {
                // SAFETY: as the caller says; new() has compiled it.
                let value = *condition.value.get_or_insert_with(|| unsafe { evaluate(condition.state, econtext) });
                holds = gate.guard.test.holds(value);
            }
            gate.holds = Some(holds);
        }
        holds
    }
}

/// Evaluates a condition. A value of another type than boolean gives some value that is not NULL, unless it is NULL.
unsafe fn evaluate(state: *mut pg_sys::ExprState, econtext: *mut pg_sys::ExprContext) -> Option<bool> {
    // SAFETY: a compiled expression, in the context of its node. A result by reference is freed with the row's memory.
    unsafe {
        let before = pg_sys::MemoryContextSwitchTo((*econtext).ecxt_per_tuple_memory);
        let mut is_null = true;
        let datum = pg_sys::ExecEvalExpr(state, econtext, &mut is_null);
        pg_sys::MemoryContextSwitchTo(before);
        (!is_null).then(|| datum.value() as u8 != 0)
    }
}
