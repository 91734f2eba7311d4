//! The common part of the functions that ask about one text, and `llm_run()`. The others are in the files of `kind`.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use crate::ask::ask;
use crate::asking;
use crate::batch;
use crate::blank::has_text;
use crate::client::check_usable;
use crate::error::Result;
use crate::json::Json;
use crate::question::{Prepared, Question};
use crate::statement;
use crate::text::Text;
use crate::txn;
use crate::verb::Verb;

/// The result of such a function.
pub type Answer<T> = std::result::Result<Option<T>, ErrorReport>;

/// An answer, or NULL with a warning. Where a plan node has read ahead, the answer is there.
fn one(input: Text, question: Question) -> Result<Option<String>> {
    asking::check()?;
    let input = input.checked()?;
    if let Some(answer) = batch::answered(&input, &question) {
        return answer;
    }
    txn::with_settings(&[(c"search_path", c"pg_catalog, pg_temp")], || {
        check_usable()?;
        if !has_text(&input) {
            return Ok(None);
        }
        let Prepared { asked, limit, conclude } = question.prepare()?;
        statement::count_single();
        let mut source = vec![(input, None)];
        let mut got = None;
        ask(asked, limit, &mut |_| Ok(std::mem::take(&mut source)), &mut |o| got = Some(o.verdict))?;
        got.map_or(Ok(None), |verdict| conclude.answer(&verdict))
    })
}

/// The author of the view, policy or cursor that a call stands in.
pub fn author(fcinfo: pg_sys::FunctionCallInfo) -> Option<pg_sys::Oid> {
    // SAFETY: what Postgres calls a function with. A direct call has no expression.
    unsafe { batch::author(fcinfo.as_ref()?.flinfo.as_ref()?.fn_expr) }
}

/// Asks the task of this name.
pub fn by_task(verb: &str, input: Text, name: Text) -> Result<Option<String>> {
    let subject = vec![Some(name.checked()?)];
    one(input, Question { verb: Verb::named(verb)?, subject, options: json!({}), author: None })
}

/// Asks about words.
pub fn about(
    verb: &str,
    input: Text,
    words: Text,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Option<String>> {
    ad_hoc(verb, input, vec![Some(words.checked()?)], options, fcinfo)
}

/// Asks about labels, fields or nothing.
pub fn ad_hoc(
    verb: &str,
    input: Text,
    subject: Vec<Option<String>>,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Option<String>> {
    one(input, Question { verb: Verb::named(verb)?, subject, options: options.0, author: author(fcinfo) })
}

#[pg_extern(sql = false)]
fn llm_run(input: Text, name: Text) -> Answer<String> {
    Ok(by_task("run", input, name)?)
}
