//! Long texts in pieces: `llm_split()`.

use llm_batch_core::split::split;
use llm_batch_gateway::tokens;
use pgrx::iter::TableIterator;
use pgrx::name;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::text::Text;

fn pieces(input: Text, max_tokens: i32, overlap: i32) -> Result<Vec<(i32, String)>> {
    let most = usize::try_from(max_tokens).ok().filter(|most| *most > 0);
    let most = most.ok_or_else(|| {
        Error::invalid("\"max_tokens\" must be positive").hint("Say how many tokens a piece may have, such as 500.")
    })?;
    let overlap = usize::try_from(overlap).ok().filter(|overlap| *overlap < most).ok_or_else(|| {
        Error::invalid(format!("\"overlap\" must be 0 or more and less than \"max_tokens\", which is {most}"))
            .hint("Say how many tokens at the end of a piece the next one begins with.")
    })?;
    let input = input.checked()?;
    let count = |text: &str| {
        pgrx::check_for_interrupts!();
        tokens::count(text)
    };
    Ok((1..).zip(split(&input, most, overlap, &count).into_iter().map(str::to_owned)).collect())
}

#[pg_extern(sql = false)]
fn llm_split(
    input: Text,
    max_tokens: i32,
    overlap: i32,
) -> std::result::Result<TableIterator<'static, (name!(n, i32), name!(piece, String))>, ErrorReport> {
    Ok(TableIterator::new(pieces(input, max_tokens, overlap)?))
}
