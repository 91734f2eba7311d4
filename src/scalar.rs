//! Functions for one text: `llm_run()`, `llm_classify()`, `llm_filter()`, `llm_extract()`, `llm_generate()`,
//! `llm_summarize()`, `llm_translate()`, `llm_score()`.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::{Value, json};

use crate::ask::{ask, has_text};
use crate::asking;
use crate::batch;
use crate::client::check_usable;
use crate::error::Result;
use crate::json::{Json, JsonText};
use crate::question::{Prepared, Question};
use crate::statement;
use crate::text::{self, Text};
use crate::txn;
use crate::verb::{Verb, YES};

type Answer<T> = std::result::Result<Option<T>, ErrorReport>;

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

fn task(verb: Verb, name: Text) -> Result<Question> {
    Ok(Question { verb, subject: vec![Some(name.checked()?)], options: json!({}), author: None })
}

fn ad_hoc(verb: Verb, subject: Vec<Option<String>>, options: Value, fcinfo: pg_sys::FunctionCallInfo) -> Question {
    Question { verb, subject, options, author: author(fcinfo) }
}

fn about(verb: Verb, subject: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Result<Question> {
    Ok(ad_hoc(verb, vec![Some(subject.checked()?)], options.0, fcinfo))
}

#[pg_extern(sql = false)]
fn llm_run(input: Text, name: Text) -> Answer<String> {
    Ok(one(input, task(Verb::Run, name)?)?)
}

#[pg_extern(sql = false)]
fn llm_classify(input: Text, name: Text) -> Answer<String> {
    Ok(one(input, task(Verb::ClassifyTask, name)?)?)
}

#[pg_extern(sql = false)]
fn llm_classify_labels(
    input: Text,
    labels: Vec<Option<Text>>,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Answer<String> {
    Ok(one(input, ad_hoc(Verb::Classify, text::all(labels)?, options.0, fcinfo))?)
}

/// NULL where the model gives no answer.
#[pg_extern(sql = false)]
fn llm_filter(input: Text, question: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<bool> {
    Ok(one(input, about(Verb::Filter, question, options, fcinfo)?)?.map(|label| label == YES))
}

#[pg_extern(sql = false)]
fn llm_extract(input: Text, name: Text) -> Answer<JsonText> {
    Ok(one(input, task(Verb::ExtractTask, name)?)?.map(JsonText))
}

#[pg_extern(sql = false)]
fn llm_extract_fields(
    input: Text,
    fields: Vec<Option<Text>>,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Answer<JsonText> {
    Ok(one(input, ad_hoc(Verb::Extract, text::all(fields)?, options.0, fcinfo))?.map(JsonText))
}

#[pg_extern(sql = false)]
fn llm_generate(input: Text, instruction: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<String> {
    Ok(one(input, about(Verb::Generate, instruction, options, fcinfo)?)?)
}

#[pg_extern(sql = false)]
fn llm_summarize(input: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<String> {
    Ok(one(input, ad_hoc(Verb::Summarize, Vec::new(), options.0, fcinfo))?)
}

#[pg_extern(sql = false)]
fn llm_translate(input: Text, language: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<String> {
    Ok(one(input, about(Verb::Translate, language, options, fcinfo)?)?)
}

#[pg_extern(sql = false)]
fn llm_score(input: Text, question: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<f32> {
    Ok(one(input, about(Verb::Score, question, options, fcinfo)?)?.and_then(|score| score.parse().ok()))
}

#[pg_extern(sql = false)]
fn llm_embed(input: Text, name: Text) -> Answer<Vec<f32>> {
    let numbers = |text: String| {
        let inner = text.trim_matches(['{', '}']);
        inner.split(',').map(|n| n.parse().ok()).collect::<Option<Vec<f32>>>()
    };
    Ok(one(input, task(Verb::Embed, name)?)?.and_then(numbers))
}
