//! Classifiers, and questions that are answered with yes or no.

use llm_batch_core::task::YES;
use pgrx::prelude::*;
use serde_json::{Value, json};

use super::{read, value};
use crate::args::required;
use crate::error::Result;
use crate::json::Json;
use crate::scalar::{Answer, about, ad_hoc, by_task};
use crate::task::define::{Made, alter, create};
use crate::text::{self, Text};

pgrx::extension_sql_file!("../../sql/kind/classify.sql", name = "classify", requires = ["functions"]);

fn labels(text: Option<Text>) -> Result<Value> {
    read(text, "labels", "'[\"billing\", \"other\"]' or ARRAY['billing', 'other']")
}

#[pg_extern(sql = false)]
fn create_classifier(
    name: Option<&str>,
    labels: Option<Text>,
    model: Option<&str>,
    instruction: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let labels = self::labels(Some(required(labels, "labels")?))?;
    let members = json!({"instruction": instruction, "labels": labels, "examples": value(examples)});
    Ok(create("classify", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn alter_classifier(
    name: Option<&str>,
    labels: Option<Text>,
    model: Option<&str>,
    instruction: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let members = json!({"instruction": instruction, "labels": self::labels(labels)?, "examples": value(examples)});
    Ok(alter("classify", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn llm_classify(input: Text, name: Text) -> Answer<String> {
    Ok(by_task("classify", input, name)?)
}

#[pg_extern(sql = false)]
fn llm_classify_labels(
    input: Text,
    labels: Vec<Option<Text>>,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Answer<String> {
    Ok(ad_hoc("classify_labels", input, text::all(labels)?, options, fcinfo)?)
}

/// NULL where the model gives no answer.
#[pg_extern(sql = false)]
fn llm_filter(input: Text, question: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<bool> {
    Ok(about("filter", input, question, options, fcinfo)?.map(|label| label == YES))
}
