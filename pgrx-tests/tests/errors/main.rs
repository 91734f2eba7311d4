//! Errors: an impossible job is refused at once, with SQLSTATE, message, detail or hint, before a row is paid for. A
//! job that breaks in the middle is left in a state that says why. No key is ever shown.

#[path = "../common/mod.rs"]
mod common;

mod expressions;
mod first_steps;
mod jobs;
mod middle;
mod names;
mod secrets;

use common::{Bed, one};
use postgres::Client;

/// The key that [`Bed`] gives everybody.
const KEY: &str = "sk-test-0123456789abcdef";

/// A statement fails as [`common::refused`] says. There must be more than a message, something that helps, and no key.
#[track_caller]
fn refused(client: &mut Client, sql: &str, code: &str, says: &[&str]) {
    let [message, detail, hint] = common::refused(client, sql, code, says);
    assert!(!detail.is_empty() || !hint.is_empty() || says.is_empty(), "{sql}\nonly a message: {message}");
    assert!(![&message, &detail, &hint].iter().any(|part| part.contains(KEY)), "{sql}\n{message}\n{detail}\n{hint}");
}

/// The call of `backfill()` for column `topic` of `tickets` with another argument in place of one.
fn call(change: &str) -> String {
    let (name, _) = change.split_once(" => ").unwrap();
    let mut args = vec![change.to_owned()];
    for (n, value) in [("relation", "'tickets'"), ("input", "'body'"), ("target", "'topic'"), ("task", "'topic'")] {
        if n != name {
            args.push(format!("{n} => {value}"));
        }
    }
    format!("SELECT llm_batch.backfill({})", args.join(", "))
}

/// Nothing was paid for, and no job was made.
#[track_caller]
fn nothing_happened(bed: &Bed) {
    let stats = bed.provider.stats();
    assert!(stats.rows.is_empty() && stats.unmarked_rows == 0, "rows were asked: {stats:?}");
    assert_eq!(one(&mut bed.connect(), "SELECT count(*) FROM llm_batch.job"), 0);
}
