//! The node's output in EXPLAIN. Nothing is sent for it.

use std::ffi::{CStr, CString};

use pgrx::prelude::*;

use super::ahead::Ahead;
use super::calls::deparse;
use super::nodes::list;
use crate::budget::dollars;
use crate::question::Question;

/// # Safety
/// Called by EXPLAIN, with the state of a batch scan and what Postgres hands on.
pub unsafe fn explain(
    ahead: &mut Ahead,
    plan: *mut pg_sys::Plan,
    ancestors: *mut pg_sys::List,
    es: *mut pg_sys::ExplainState,
) {
    // SAFETY: as the caller says.
    unsafe {
        let context = pg_sys::set_deparse_context_plan((*es).deparse_cxt, plan, ancestors);
        let with_prefix = (*es).verbose || list::<pg_sys::Node>((*es).rtable).len() > 1;
        let group = c"Calls".as_ptr();
        if sorts_before_limit(ancestors) {
            text(c"Rows to Ask", "all that WHERE lets through: the sort comes before the LIMIT", es);
        }
        pg_sys::ExplainOpenGroup(group, group, false, es);
        let mut known: Vec<(Question, Option<(String, u32)>)> = Vec::new();
        for site in &ahead.sites {
            pgrx::check_for_interrupts!();
            pg_sys::ExplainOpenGroup(c"Call".as_ptr(), std::ptr::null(), true, es);
            text(c"Call", &deparse(&site.call, context, with_prefix), es);
            // A task that is written in the statement is known before it runs. It can't be looked up where a log describes a
            // statement that has ended.
            let others = list::<pg_sys::Node>((*site.call.call).args).into_iter().skip(1);
            let is_constant = |arg: *mut pg_sys::Node| (*arg).type_ == pg_sys::NodeTag::T_Const;
            let model = match site.model() {
                Some(model) => Some((model.name.clone(), model.rows_per_request)),
                None if pg_sys::ActiveSnapshotSet() && others.clone().all(is_constant) => {
                    // Each question is looked up once.
                    site.question(ahead.state()).and_then(|question| {
                        let same = known.iter().find(|(other, _)| *other == question).map(|(_, model)| model.clone());
                        same.unwrap_or_else(|| {
                            let model = question.model();
                            known.push((question, model.clone()));
                            model
                        })
                    })
                }
                None => None,
            };
            if let Some((model, rows)) = model {
                text(c"Model", &model, es);
                number(c"Rows per Request", rows.into(), es);
            }
            if (*es).analyze {
                let done = site.done();
                number(c"Rows Sent", done.rows - done.reused, es);
                number(c"Rows Reused", done.reused, es);
                number(c"Requests", done.spent.requests, es);
                number(c"Input Tokens", done.spent.input_tokens + done.spent.unconfirmed_input_tokens, es);
                number(c"Output Tokens", done.spent.output_tokens + done.spent.unconfirmed_output_tokens, es);
                if (*es).timing && done.rows > 0 {
                    let rows = done.rows as f64;
                    let (all, sent) = (done.waited.as_secs_f64() * 1_000.0, done.spent.row_ms as f64);
                    // A row that shares another's answer waits, and is with the provider in the other's place.
                    milliseconds(c"Average Time Queued", (all - sent).max(0.0) / rows, es);
                    milliseconds(c"Average Time at Provider", sent / (done.rows - done.reused).max(1) as f64, es);
                }
                if site.model().is_some_and(|model| model.has_prices) {
                    text(c"Cost", &dollars(done.cost), es);
                }
            }
            pg_sys::ExplainCloseGroup(c"Call".as_ptr(), std::ptr::null(), true, es);
        }
        pg_sys::ExplainCloseGroup(group, group, false, es);
    }
}

/// Returns true if the rows of a node are sorted before a limit takes the first: then it is not the limit that bounds
/// what is asked.
///
/// # Safety
/// `ancestors` are the nodes above, the nearest first.
unsafe fn sorts_before_limit(ancestors: *mut pg_sys::List) -> bool {
    use pg_sys::NodeTag::{T_Limit, T_Sort};
    // SAFETY: as the caller says.
    let tags: Vec<_> = unsafe { list::<pg_sys::Node>(ancestors).into_iter().map(|node| (*node).type_).collect() };
    let above = tags.iter().skip_while(|tag| !matches!(tag, T_Limit | T_Sort)).collect::<Vec<_>>();
    above.first() == Some(&&T_Sort) && above.contains(&&T_Limit)
}

unsafe fn text(label: &CStr, value: &str, es: *mut pg_sys::ExplainState) {
    if let Ok(value) = CString::new(value) {
        // SAFETY: both end with a NUL and are copied.
        unsafe { pg_sys::ExplainPropertyText(label.as_ptr(), value.as_ptr(), es) };
    }
}

unsafe fn number(label: &CStr, value: u64, es: *mut pg_sys::ExplainState) {
    // SAFETY: the label ends with a NUL and is copied.
    unsafe { pg_sys::ExplainPropertyUInteger(label.as_ptr(), std::ptr::null(), value, es) };
}

unsafe fn milliseconds(label: &CStr, value: f64, es: *mut pg_sys::ExplainState) {
    // SAFETY: the texts end with a NUL and are copied.
    unsafe { pg_sys::ExplainPropertyFloat(label.as_ptr(), c"ms".as_ptr(), value, 3, es) };
}
