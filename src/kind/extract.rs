//! Extractors: typed values by name.

use pgrx::prelude::*;
use serde_json::{Value, json};

use super::{read, value};
use crate::args::required;
use crate::error::Result;
use crate::json::{Json, JsonText};
use crate::scalar::{Answer, ad_hoc, by_task};
use crate::task::define::{Made, alter, create};
use crate::text::{self, Text};

pgrx::extension_sql_file!("../../sql/kind/extract.sql", name = "extract", requires = ["functions"]);

fn fields(text: Option<Text>) -> Result<Value> {
    read(text, "fields", "'{\"amount\": \"numeric\", \"due\": \"date\"}'")
}

#[pg_extern(sql = false)]
fn create_extractor(
    name: Option<&str>,
    fields: Option<Text>,
    model: Option<&str>,
    instruction: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let fields = self::fields(Some(required(fields, "fields")?))?;
    let members = json!({"instruction": instruction, "fields": fields, "examples": value(examples)});
    Ok(create("extract", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn alter_extractor(
    name: Option<&str>,
    fields: Option<Text>,
    model: Option<&str>,
    instruction: Option<&str>,
    examples: Option<Json>,
    options: Option<Json>,
) -> Made {
    let members = json!({"instruction": instruction, "fields": self::fields(fields)?, "examples": value(examples)});
    Ok(alter("extract", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn llm_extract(input: Text, name: Text) -> Answer<JsonText> {
    Ok(by_task("extract", input, name)?.map(JsonText))
}

#[pg_extern(sql = false)]
fn llm_extract_fields(
    input: Text,
    fields: Vec<Option<Text>>,
    options: Json,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Answer<JsonText> {
    Ok(ad_hoc("extract_fields", input, text::all(fields)?, options, fcinfo)?.map(JsonText))
}
