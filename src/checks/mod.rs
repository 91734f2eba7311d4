//! Repairs and checks of answers: SQL expressions of a task's owner. They run with the owner's rights for every caller, and
//! can change nothing.

mod look;
mod rules;

use std::cell::RefCell;
use std::ffi::CString;
use std::rc::Rc;
use std::time::{Duration, Instant};

use llm_batch_core::task::{Answer, Column, Spec, Type, array_literal};
use llm_batch_core::vector;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::PgOid;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, SpiClient};
use serde_json::{Number, Value};

use self::rules::{OPTIONS, ROW, Rule, by_column, from, hint, nothing, sql_oid, statement};
use crate::error::{Error, Result, is_passing};
use crate::process::TimeLimit;
use crate::{asking, catalog, process, settings, txn};

/// Most bytes that a repair makes of a value: as many as an answer may have.
const MOST_VALUE: usize = 4 << 20;
/// Most characters of an answer that are shown.
const MOST_SHOWN: usize = 500;
/// Most rows of those that are judged together for which an error that should pass is their own.
const MOST_SCARCE: u32 = 3;
/// So many rows judged together may take too long, until the rest is left for later.
pub const MOST_LATE: u32 = 3;
/// Rows are judged together for so long, or for three times the limit of a row if that is more.
const LONG: Duration = Duration::from_secs(10);
/// The same in a worker that is told to end.
const LAST: Duration = Duration::from_millis(500);
/// The hint to a model if the task has none.
const HINT: &str = "another answer is needed, the one before did not pass a check";

/// Classes of answers that a task's expressions refuse.
pub const FAILED: &str = "check_failed";
pub const RAISED: &str = "check_error";
/// The class of a value that its type does not take.
pub const BAD_VALUE: &str = "bad_value";

/// The expressions of a task, ready to run.
#[derive(Debug, Clone, PartialEq)]
pub struct Checks {
    owner: pg_sys::Oid,
    search_path: String,
    has_names: bool,
    columns: Vec<Column>,
    /// One a column.
    rules: Vec<Rule>,
    statement: String,
}

/// Why an answer is not taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    pub class: &'static str,
    pub detail: String,
    /// The hint to the model when the row is asked again. Without one it is not.
    pub hint: Option<String>,
}

pub type Judged = std::result::Result<Answer, Refused>;

impl Checks {
    /// Takes the expressions out of a task's options; `None` if there are none.
    pub fn take(spec: &Spec, options: &mut Value) -> Result<Option<Unowned>> {
        let columns = spec.columns();
        let mut rules = vec![Rule::default(); columns.len()];
        for key in OPTIONS {
            let Some(value) = options.as_object_mut().and_then(|o| o.remove(key)).filter(|v| !v.is_null()) else {
                continue;
            };
            for (at, text) in by_column(key, &value, spec.has_names(), &columns)? {
                let Some(rule) = rules.get_mut(at) else { continue };
                match key {
                    "repair" => rule.repair = Some(text),
                    "check" => rule.check = Some(text),
                    _ => rule.hint = Some(hint(&text)?),
                }
            }
        }
        if rules.iter().any(|rule| rule.hint.is_some() && rule.check.is_none()) {
            return Err(Error::invalid("option \"check_hint\" has no \"check\"")
                .hint("It is what the model is told about an answer that fails its check."));
        }
        let is_none = rules.iter().all(|rule| *rule == Rule::default());
        Ok((!is_none).then(|| Unowned { has_names: spec.has_names(), columns, rules }))
    }

    /// Refuses expressions of a role that is not a superuser where they would run in a superuser's job or, if a session asks, in
    /// a superuser's session, whatever role that has taken on. By what they leave in the process, such as a cursor that has
    /// moved or a function that is compiled, they would have a say in what the superuser does next.
    pub fn may_run_for(&self, role: pg_sys::Oid, is_session: bool) -> Result<()> {
        // SAFETY: catalog lookups on the main thread inside a transaction.
        let is_safe = unsafe {
            let is_session_safe = !is_session || !pg_sys::superuser_arg(pg_sys::GetSessionUserId());
            is_session_safe && !pg_sys::superuser_arg(role) || pg_sys::superuser_arg(self.owner)
        };
        if is_safe {
            return Ok(());
        }
        Err(Error::denied("a superuser cannot ask a task with checks whose owner is not a superuser")
            .detail("The checks would run in a process of the superuser.")
            .hint("Connect as another role, or create a task of your own."))
    }

    /// Looks at the expressions as the task's owner.
    pub fn look(&self) -> Result<()> {
        let source = from(&self.columns, self.has_names, &nothing);
        for (column, rule) in self.columns.iter().zip(&self.rules) {
            for (key, text) in [("repair", &rule.repair), ("check", &rule.check)] {
                let Some(text) = text else { continue };
                let wanted = if key == "check" { pg_sys::BOOLOID } else { sql_oid(column) };
                self.restricted(|| look::expression(key, text, &source, wanted)).map_err(|e| {
                    let of = if self.has_names { format!(" of field \"{}\"", column.name) } else { String::new() };
                    let names = if self.has_names { "the fields" } else { "answer" };
                    // Postgres' hints name what the expression reads with the row that we have made for it.
                    let hint = e.hint.map(|hint| hint.replace(&format!("{ROW}."), ""));
                    Error { message: format!("{key}{of}: {}", e.message), hint, ..e }
                        .hint_if_none(format!("It is an SQL expression over {names} and input."))
                })?;
            }
        }
        Ok(())
    }

    /// Repairs answers, and checks them: each is taken, perhaps as another one, or refused. Only the first answers are judged
    /// if the expressions take long: so this takes a bounded time. Returns beside them for how many rows the expressions took
    /// too long, `late` of them before; from [`MOST_LATE`] on no further answer is judged.
    pub fn judge(&self, rows: &[(&str, &Answer)], mut late: u32) -> Result<(Vec<Judged>, u32)> {
        let judged = RefCell::new(Vec::with_capacity(rows.len()));
        // The row whose expressions raised what should pass.
        let (mut tried_before, mut scarce) = (None, 0);
        let (most, began, was_told) = (settings::check_timeout(), Instant::now(), process::is_told_to_end());
        // A worker that ends writes what is judged, before its time is up.
        let longest =
            if was_told { LAST } else { LONG.max(Duration::from_millis(most.unsigned_abs().into()) * MOST_LATE) };
        let is_long = |done| done > 0 && began.elapsed() > longest;
        loop {
            let done = judged.borrow().len();
            let rest = rows.get(done..).and_then(<[_]>::split_first);
            let Some((row, _)) = rest.filter(|_| late < MOST_LATE && !is_long(done)) else {
                return Ok((judged.into_inner(), late));
            };
            // As far as the first that raises.
            let tried = self.restricted(|| {
                for (input, answer) in rows.iter().skip(done) {
                    if is_long(judged.borrow().len()) {
                        break;
                    }
                    let limit = TimeLimit::new(most);
                    let one = self.one(input, answer)?;
                    limit.end();
                    judged.borrow_mut().push(one);
                }
                Ok(())
            });
            let Err(e) = tried else { continue };
            let done = judged.borrow().len();
            // A worker that is told to end meanwhile does so; one that was before judges the answers in hand.
            let is_cancelled = e.code == PgSqlErrorCode::ERRCODE_QUERY_CANCELED;
            if is_cancelled && TimeLimit::was_up() && (was_told || !process::is_told_to_end()) {
                late += 1;
                judged.borrow_mut().push(Err(Refused::too_long(most)));
                continue;
            }
            // An expression waits for locks by its own wish alone.
            let is_own = matches!(
                e.code,
                PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE
                    | PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED
                    | PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE
            );
            if is_passing(e.code) && !is_own {
                // A session is cancelled at once, and so is a worker that is to end. What is raised for one row twice is of
                // its expressions.
                let ends = !process::is_worker() || process::is_told_to_end();
                if e.code == PgSqlErrorCode::ERRCODE_QUERY_CANCELED && ends {
                    return Err(e);
                }
                if tried_before.replace(done) != Some(done) {
                    continue;
                }
                // That it is raised for several rows is of the server.
                scarce += 1;
                if scarce > MOST_SCARCE {
                    return Err(e);
                }
            }
            let (_, answer) = rows.get(done).unwrap_or(row);
            // A value that its type does not take raises before any expression does.
            let refused = unfit(&self.columns, self.has_names, answer)?.unwrap_or_else(|| Refused {
                class: RAISED,
                detail: e.with_state(),
                hint: None,
            });
            judged.borrow_mut().push(Err(refused));
        }
    }

    fn one(&self, input: &str, answer: &Answer) -> Result<Judged> {
        let mut args: Vec<Option<String>> = vec![Some(input.to_owned())];
        args.extend(self.columns.iter().zip(&answer.0).map(|(column, text)| {
            let text = text.as_deref()?;
            if column.is_array { array_literal(text) } else { Some(text.to_owned()) }
        }));
        let (values, passed) = self.run(args)?;
        let mut repaired = answer.clone();
        let all = self.columns.iter().zip(&self.rules).zip(repaired.0.iter_mut().zip(values));
        for ((column, rule), (value, new)) in all {
            if rule.repair.is_none() {
                continue;
            }
            if let Some(bytes) = new.as_ref().map(String::len).filter(|bytes| *bytes > MOST_VALUE) {
                let detail = format!("the repair gives {bytes} bytes, and no value may have more than {MOST_VALUE}");
                return Ok(Err(Refused { class: RAISED, detail, hint: None }));
            }
            if let Some(new) = new.as_deref().filter(|new| !is_value(column, new)) {
                let detail = format!("the repair gives {}, which cannot be a value", shown(new));
                return Ok(Err(Refused { class: RAISED, detail, hint: None }));
            }
            *value = new;
        }
        let failed = self.rules.iter().zip(passed).position(|(rule, is)| rule.check.is_some() && is != Some(true));
        let Some(at) = failed else { return Ok(Ok(repaired)) };
        let told = self.rules.get(at).and_then(|rule| rule.hint.as_deref()).unwrap_or(HINT);
        let named = self.columns.get(at).filter(|_| self.has_names);
        let (field, hint) = match named {
            Some(column) => (format!("field \"{}\": ", column.name), format!("the field \"{}\": {told}", column.name)),
            None => (String::new(), told.to_owned()),
        };
        let value = repaired.0.get(at).and_then(Option::as_deref);
        let decimals = value.filter(|_| self.columns.get(at).is_some_and(|c| c.is_array)).and_then(vector::to_json);
        let value = decimals.as_deref().or(value).map_or_else(|| "NULL".to_owned(), shown);
        let detail = format!("{field}{value} is not what the check wants");
        Ok(Err(Refused { class: FAILED, detail, hint: Some(hint) }))
    }

    /// The values after the repairs, and what the checks say of them.
    fn run(&self, args: Vec<Option<String>>) -> Result<Repaired> {
        Spi::connect(|client| {
            // In SPI's memory, which is freed at the end.
            let args: Vec<DatumWithOid> = args.into_iter().map(DatumWithOid::from).collect();
            let plan = self.plan(client, args.len())?;
            let row = client.select(&*plan, Some(1), &args)?.first();
            Ok((row.get::<Vec<Option<String>>>(1)?.unwrap_or_default(), row.get(2)?.unwrap_or_default()))
        })
    }

    fn plan(&self, client: &SpiClient<'_>, args: usize) -> Result<Rc<OwnedPreparedStatement>> {
        let is_it = |(whose, statement): &(pg_sys::Oid, String)| *whose == self.owner && *statement == self.statement;
        let known = PLAN.with_borrow(|kept| kept.as_ref().filter(|(of, _)| is_it(of)).map(|(_, plan)| Rc::clone(plan)));
        if let Some(plan) = known {
            return Ok(plan);
        }
        let types = vec![PgOid::from(pg_sys::TEXTOID); args];
        let plan = Rc::new(client.prepare(self.statement.as_str(), &types)?.keep());
        PLAN.set(Some(((self.owner, self.statement.clone()), Rc::clone(&plan))));
        Ok(plan)
    }

    fn restricted<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        asking::refused(|| txn::restricted(self.owner, &self.search_path, f))
    }
}

/// The values after the repairs, and whether each passes its check.
type Repaired = (Vec<Option<String>>, Vec<Option<bool>>);

/// Whose plan it is, and of which statement.
type Kept = ((pg_sys::Oid, String), Rc<OwnedPreparedStatement>);

thread_local! {
    /// The plan of the task that was checked last.
    static PLAN: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

/// The expressions of a task, of which it is still to be said whose they are.
pub struct Unowned {
    has_names: bool,
    columns: Vec<Column>,
    rules: Vec<Rule>,
}

impl Unowned {
    pub fn of(self, owner: pg_sys::Oid, search_path: String) -> Checks {
        let Self { has_names, columns, rules } = self;
        let statement = statement(&columns, &rules, has_names);
        Checks { owner, search_path, has_names, columns, rules, statement }
    }
}

/// Returns true if the result of a repair can stand for a value of the column.
fn is_value(column: &Column, text: &str) -> bool {
    if column.is_array {
        return true;
    }
    if let Some(labels) = &column.values {
        return labels.iter().any(|label| label == text);
    }
    match column.of {
        // A type of Postgres has NaN and infinity, JSON has not.
        Type::Numeric | Type::Real => serde_json::from_str::<Number>(text).is_ok(),
        _ => true,
    }
}

/// The first value that the input function of its field's type does not take: the forms were looked at, the range was not.
pub fn unfit(columns: &[Column], has_names: bool, answer: &Answer) -> Result<Option<Refused>> {
    if !txn::has_subtransactions() {
        return Ok(None);
    }
    for (column, text) in columns.iter().zip(&answer.0) {
        // Those of a vector have been looked at.
        let fits = |text: &&str| match column.of {
            Type::Text | Type::Labels | Type::Boolean => true,
            Type::Real => column.is_array && !text.starts_with('['),
            _ => false,
        };
        let Some(text) = text.as_deref().filter(|text| !fits(text)) else { continue };
        let literal = if column.is_array { array_literal(text) } else { Some(text.to_owned()) };
        let Some(literal) = literal.and_then(|text| CString::new(text).ok()) else { continue };
        if let Err(e) = catalog::read_value(&literal, sql_oid(column), -1) {
            if is_passing(e.code) {
                return Err(e);
            }
            let field = has_names.then_some(column.name.as_str());
            let of = format!("{}{}", column.of.name(), if column.is_array { "[]" } else { "" });
            return Ok(Some(Refused::bad_value(field, text, &of, &e)));
        }
    }
    Ok(None)
}

/// The error of a statement in which expressions take too long for one row after the other.
pub fn take_too_long() -> Error {
    let most = settings::check_timeout();
    Error::new(PgSqlErrorCode::ERRCODE_QUERY_CANCELED, "the repairs and checks of the task take too long")
        .detail(format!("For {MOST_LATE} rows they took more than {most} ms each."))
        .hint("Change them so that they take less time, or raise llm_batch.check_timeout.")
}

impl Refused {
    /// The expressions took longer than they may.
    fn too_long(most: i32) -> Self {
        let what = format!("the repairs and checks took more than {most} ms");
        let detail = format!("57014: {what}; make them faster, or raise llm_batch.check_timeout");
        Self { class: RAISED, detail, hint: None }
    }

    /// A value that its type does not take. The model is told the field and the type alone.
    pub fn bad_value(field: Option<&str>, text: &str, of: &str, e: &Error) -> Self {
        let (named, told) = match field {
            Some(field) => (format!("field \"{field}\": "), format!("the field \"{field}\"")),
            None => (String::new(), "the answer".to_owned()),
        };
        Self {
            class: BAD_VALUE,
            detail: format!("{named}{} is no value of type {of}: {}", shown(text), e.with_state()),
            hint: Some(format!("{told} must be a value of PostgreSQL's type {of}")),
        }
    }
}

/// A value for people, cut.
fn shown(text: &str) -> String {
    let cut = text.char_indices().nth(MOST_SHOWN).map_or(text.len(), |(end, _)| end);
    let dots = if cut < text.len() { "…" } else { "" };
    format!("\"{}{dots}\"", text.get(..cut).unwrap_or_default())
}
