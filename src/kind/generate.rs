//! Generators: texts, summaries, translations.

use pgrx::prelude::*;
use serde_json::json;

use super::value;
use crate::args::required;
use crate::json::Json;
use crate::scalar::{Answer, about, ad_hoc};
use crate::task::define::{Made, alter, create};
use crate::text::Text;

pgrx::extension_sql_file!("../../sql/kind/generate.sql", name = "generate", requires = ["functions"]);

#[pg_extern(sql = false)]
fn create_generator(
    name: Option<&str>,
    instruction: Option<&str>,
    model: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let members = json!({"instruction": required(instruction, "instruction")?, "examples": value(examples)});
    Ok(create("generate", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn alter_generator(
    name: Option<&str>,
    instruction: Option<&str>,
    model: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let members = json!({"instruction": instruction, "examples": value(examples)});
    Ok(alter("generate", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn llm_generate(input: Text, instruction: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<String> {
    Ok(about("generate", input, instruction, options, fcinfo)?)
}

#[pg_extern(sql = false)]
fn llm_summarize(input: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<String> {
    Ok(ad_hoc("summarize", input, Vec::new(), options, fcinfo)?)
}

#[pg_extern(sql = false)]
fn llm_translate(input: Text, language: Text, options: Json, fcinfo: pg_sys::FunctionCallInfo) -> Answer<String> {
    Ok(about("translate", input, language, options, fcinfo)?)
}
