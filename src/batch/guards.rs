//! Guards: what has to hold for an evaluation to come to a call. They are a tree, since a call has all the guards of what
//! it stands in, and each is evaluated once for a row, however many calls are behind it.

use std::ptr::null_mut;

use pgrx::prelude::*;

use super::nodes::{make, to_list};

/// What has to hold of an expression.
#[derive(Debug, Clone, Copy)]
pub enum Test {
    True(*mut pg_sys::Node),
    NotTrue(*mut pg_sys::Node),
    NotFalse(*mut pg_sys::Node),
    Null(*mut pg_sys::Node),
}

impl Test {
    /// The expression.
    pub fn operand(self) -> *mut pg_sys::Node {
        match self {
            Self::True(node) | Self::NotTrue(node) | Self::NotFalse(node) | Self::Null(node) => node,
        }
    }

    /// As an expression that is never NULL.
    unsafe fn expression(self) -> *mut pg_sys::Node {
        // SAFETY: new nodes over a planned expression of type boolean, or any type for Null.
        unsafe {
            let test = |kind| {
                let test = make::<pg_sys::BooleanTest>(pg_sys::NodeTag::T_BooleanTest);
                (*test).arg = self.operand().cast();
                (*test).booltesttype = kind;
                test.cast::<pg_sys::Node>()
            };
            match self {
                Self::True(_) => test(pg_sys::BoolTestType::IS_TRUE),
                Self::NotTrue(_) => test(pg_sys::BoolTestType::IS_NOT_TRUE),
                Self::NotFalse(_) => test(pg_sys::BoolTestType::IS_NOT_FALSE),
                Self::Null(_) => {
                    let test = make::<pg_sys::NullTest>(pg_sys::NodeTag::T_NullTest);
                    (*test).arg = self.operand().cast();
                    (*test).nulltesttype = pg_sys::NullTestType::IS_NULL;
                    test.cast()
                }
            }
        }
    }
}

/// A guard, by whose position in the list of all of them calls and other guards refer to it.
#[derive(Debug, Clone, Copy)]
pub struct Guard {
    /// The one that has to hold before this is evaluated; it comes before it in the list.
    pub outer: Option<usize>,
    pub test: Test,
    /// The level of what is behind it, as of a call; none if it, or one before, can't be evaluated twice.
    pub level: Option<usize>,
}

/// The guards of a scan's calls, and which of them hold for the row at hand.
pub struct Guards(Vec<Gate>);

struct Gate {
    outer: Option<usize>,
    /// NULL if no call is behind it.
    state: *mut pg_sys::ExprState,
    /// Whether it and all before it hold, once that was looked at.
    holds: Option<bool>,
}

impl Guards {
    /// Compiles those that are before one of `innermost`.
    ///
    /// # Safety
    /// `ps` is the state of a batch scan that begins; the guards are of its expressions.
    pub unsafe fn new(
        ps: *mut pg_sys::PlanState,
        guards: &[Guard],
        innermost: impl Iterator<Item = Option<usize>>,
    ) -> Self {
        let mut gates: Vec<Gate> =
            guards.iter().map(|guard| Gate { outer: guard.outer, state: null_mut(), holds: None }).collect();
        for mut at in innermost {
            while let Some(i) = at
                && let (Some(gate), Some(guard)) = (gates.get_mut(i), guards.get(i))
                && gate.state.is_null()
            {
                pgrx::check_for_interrupts!();
                // SAFETY: as the caller says; compiled in the memory context of the query.
                gate.state = unsafe { pg_sys::ExecInitQual(to_list([guard.test.expression()]), ps) };
                at = guard.outer;
            }
        }
        Self(gates)
    }

    /// Forgets what was found out of the row before, or with fewer answers.
    pub fn forget(&mut self) {
        self.0.iter_mut().for_each(|gate| gate.holds = None);
    }

    /// Whether a guard and all before it hold. Those after one that does not are not evaluated.
    ///
    /// # Safety
    /// The context is that of the node, with a row in it.
    pub unsafe fn hold(&mut self, innermost: Option<usize>, econtext: *mut pg_sys::ExprContext) -> bool {
        let mut unknown = Vec::new();
        let mut at = innermost;
        let mut holds = loop {
            let Some((i, gate)) = at.and_then(|i| Some((i, self.0.get(i)?))) else { break true };
            if let Some(holds) = gate.holds {
                break holds;
            }
            unknown.push(i);
            at = gate.outer;
        };
        for i in unknown.into_iter().rev() {
            let Some(gate) = self.0.get_mut(i) else { continue };
            // SAFETY: as the caller says; compiled in new(), as one that a call is behind.
            holds = holds && unsafe { pg_sys::ExecQual(gate.state, econtext) };
            gate.holds = Some(holds);
        }
        holds
    }
}
