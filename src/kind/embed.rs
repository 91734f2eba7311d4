//! Embedders: vectors.

use pgrx::prelude::*;
use serde_json::json;

use crate::args::required;
use crate::json::Json;
use crate::scalar::{Answer, by_task};
use crate::task::define::{Made, alter, create};
use crate::text::Text;

pgrx::extension_sql_file!("../../sql/kind/embed.sql", name = "embed", requires = ["functions"]);

#[pg_extern(sql = false)]
fn create_embedder(
    name: Option<&str>,
    model: Option<&str>,
    dimensions: Option<i32>,
    input_type: Option<&str>,
    options: Option<Json>,
) -> Made {
    let members = json!({"dimensions": required(dimensions, "dimensions")?, "input_type": input_type});
    Ok(create("embed", name, members, model, options)?)
}

#[pg_extern(sql = false)]
fn alter_embedder(
    name: Option<&str>,
    model: Option<&str>,
    dimensions: Option<i32>,
    input_type: Option<&str>,
    options: Option<Json>,
) -> Made {
    Ok(alter("embed", name, json!({"dimensions": dimensions, "input_type": input_type}), model, options)?)
}

#[pg_extern(sql = false)]
fn llm_embed(input: Text, name: Text) -> Answer<Vec<f32>> {
    let numbers = |text: String| {
        let inner = text.trim_matches(['{', '}']);
        inner.split(',').map(|n| n.trim().parse().ok()).collect::<Option<Vec<f32>>>()
    };
    Ok(by_task("embed", input, name)?.and_then(numbers))
}
