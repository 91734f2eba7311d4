//! The statements of a job, as text. Expressions of users (input, filter) are part of them as written, and run with the
//! owner's rights under the search_path of `backfill()`'s caller. Everything of ours is qualified.
//!
//! Keys come as arrays `$1 … $k`, one a column; a row is a position in them.

use llm_batch_gateway::protocol::most_text;

use crate::blank::has_text_sql;
use crate::isolation::digest_sql;
use crate::job::fit;
use crate::job::store::Job;
use crate::job::table::Table;
use crate::job::target::{Cast, Target};
use crate::provenance;
use crate::sql::name;
use crate::task::Asked;

/// The statements of a job for the table as it is named now.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Bytes of a text that are sent at the most.
    pub most_text: usize,
    /// The number of columns that are filled.
    pub targets: usize,
    /// The conversions of values for them.
    pub columns: Vec<fit::Column>,
    /// Answers to a row, until it is given up.
    pub max_attempts: u32,
    /// Rows say which task answered them.
    pub has_provenance: bool,
    /// Rows get the probability of their answer.
    pub has_confidence: bool,
    /// The values are labels, each of which may be at fault.
    pub has_labels: bool,
    /// The search_path under which input and filter are read.
    pub search_path: String,
    /// Counts the rows to fill, and those of them without text.
    pub count: String,
    /// The first page; `$1` is its size.
    pub claim_first: String,
    /// The page after row `$k+1` of the keys; `$k+2` is its size.
    pub claim_next: String,
    /// Locks rows `$k+1` (positions), looks at them, and writes values `$k+3 …`, one array a target, to those that are as
    /// they were, by the inputs' hashes `$k+2`: each where its target is NULL. If rows say who answered them, an array of that
    /// comes behind: a row with one is written even if all of its values are NULL. An array of probabilities comes last. Of
    /// each row that could be locked: position,
    /// whether a target was NULL, the input's hash, whether there was something to write, NULL; of each that was written:
    /// position, NULL, NULL, NULL, whether something of it is NULL.
    pub write: String,
    /// Looks at rows `$k+1`: position, whether a target is NULL, the input's hash.
    pub look: String,
    /// Tries to lock row `$k+1`: raises if another transaction holds it, returns no row if it is out of reach.
    pub try_lock: String,
    /// Checks whether we may write the targets at all.
    pub may_update: String,
    /// Which targets of the rows `$k+1` are NULL: position, and an array in their order. A trigger may have emptied them
    /// again.
    pub nulls: Option<String>,
    /// The keys of rows `$k+1` as the text of JSON: position, key.
    pub describe: String,
    /// A hash of each of the rows `$k+1`, of its key and the input's hash `$k+2`: position, hash.
    pub digest: String,
}

/// A text without what is far beyond its first `most` characters. Of a damaged one left() would raise, where it comes to
/// the end.
pub fn cut(text: &str, most: usize) -> String {
    format!(
        "CASE WHEN pg_catalog.octet_length({text}) OPERATOR(pg_catalog.<=) {} THEN {text} ELSE pg_catalog.left({text}, {most}) END",
        most.saturating_mul(4).min(i32::MAX as usize)
    )
}

/// A condition: one of these columns is NULL.
fn any_null(columns: impl Iterator<Item = String>) -> String {
    columns.map(|column| format!("{column} IS NULL")).collect::<Vec<_>>().join(" OR ")
}

fn hash_sql(text: &str, seed: &str) -> String {
    format!("pg_catalog.hashtextextended({text} COLLATE pg_catalog.\"C\", {seed})")
}

/// The expressions that all statements over a table's rows share.
pub struct Rows {
    /// The table, as it stands in a FROM clause.
    pub from: String,
    /// The text to send.
    pub input: String,
    /// Which rows are to be filled.
    pub todo: String,
    /// Which rows have something to send.
    pub has_text: String,
    /// The value of `isolation`.
    pub isolation: String,
}

impl Rows {
    /// `targets`: columns and their fields; `known`: where a row says that its NULL is the answer.
    pub fn new(
        table: &str,
        is_partitioned: bool,
        input: &str,
        targets: &[(&str, Option<&str>)],
        filter: Option<&str>,
        isolation: Option<&str>,
        known: Option<&provenance::Known>,
    ) -> Self {
        // The line end closes a comment at the end of the expression.
        let input = format!("(({input}\n))::pg_catalog.text");
        let hash = hash_sql(&input, "0");
        let is_to_do = |(column, field): &(&str, Option<&str>)| match (known, field) {
            (Some(known), Some(field)) => {
                format!("{} IS NULL AND NOT COALESCE({}, false)", name(column), known.is_answer(field, &hash))
            }
            _ => format!("{} IS NULL", name(column)),
        };
        let is_to_do = targets.iter().map(is_to_do).collect::<Vec<_>>().join(" OR ");
        Self {
            from: format!("{}{table}", if is_partitioned { "" } else { "ONLY " }),
            todo: format!("({is_to_do}) AND ({}\n)", filter.unwrap_or("true")),
            has_text: has_text_sql(&input),
            isolation: digest_sql(isolation),
            input,
        }
    }

    /// The texts' hash.
    pub fn hash(&self, seed: i64) -> String {
        hash_sql(&self.input, &seed.to_string())
    }

    /// Counts rows to fill, and those of them without text.
    pub fn count(&self) -> String {
        format!(
            "SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE NOT ({})) FROM {} WHERE {}",
            self.has_text, self.from, self.todo
        )
    }
}

impl Plan {
    /// The statements for the table as it is named now; `casts` of the targets' values, texts cut to `most_text`
    /// characters.
    pub fn new(job: &Job, table: &Table, casts: &[Cast], asked: &Asked) -> Self {
        let task = &asked.stream.task;
        let most_text = most_text(asked.stream.model.max_request_tokens);
        let Table { full, bare, is_partitioned, has_triggers } = table;
        let (filter, isolation) = (job.filter.as_deref(), job.isolation.as_deref());
        let known = job.provenance.as_deref();
        let known = known.map(|column| provenance::Known { column, task: &job.task, version: asked.version });
        let targets: Vec<_> = job.targets.iter().map(|t| (t.name.as_str(), t.field.as_deref())).collect();
        let rows = Rows::new(full, *is_partitioned, &job.input, &targets, filter, isolation, known.as_ref());
        let parts = Parts {
            keys: job.key_names.iter().map(|n| name(n)).collect(),
            targets: job.targets.iter().map(|t| format!("{bare}.{}", name(&t.name))).collect(),
            hash: rows.hash(0),
            rows: &rows,
            job,
            bare,
        };
        let spec = &task.spec;
        let column = |(target, cast): (&Target, &Cast)| fit::Column::new(job.relation, target, spec.has_names(), cast);
        Self {
            most_text,
            targets: job.targets.len(),
            columns: job.targets.iter().zip(casts).map(column).collect(),
            max_attempts: task.options.max_attempts,
            has_provenance: job.provenance.is_some(),
            has_confidence: job.confidence.is_some(),
            // With several columns each value may be at fault.
            has_labels: job.targets.len() == 1 && spec.columns().iter().all(|field| field.values.is_some()),
            search_path: format!("{}, pg_temp", job.search_path),
            // Rows without text are counted at the start, and never claimed.
            count: rows.count(),
            claim_first: parts.claim("", 1, most_text),
            claim_next: parts.claim(&parts.after(), parts.keys.len() + 2, most_text),
            write: parts.write(casts),
            look: parts.look(),
            try_lock: parts.try_lock(),
            may_update: format!("SELECT {}", parts.may_update()),
            nulls: has_triggers.then(|| parts.nulls()),
            describe: parts.describe(),
            digest: parts.digest(),
        }
    }
}

/// A position in the arrays. The table stands alone in the FROM clause of what evaluates the input, so that no name of ours
/// gets into its way; positions come from a list of odd names.
const POSITION: &str = "\"llm_batch u\".\"llm_batch i\"";

/// The parts of which the statements are made.
struct Parts<'a> {
    job: &'a Job,
    rows: &'a Rows,
    bare: &'a str,
    /// The key's columns, quoted.
    keys: Vec<String>,
    /// The targets, quoted and qualified.
    targets: Vec<String>,
    /// The input's hash.
    hash: String,
}

impl Parts<'_> {
    /// The parameter that comes `n` after those of the keys.
    fn parameter(&self, n: usize) -> String {
        format!("${}", self.keys.len() + n)
    }

    /// The key at a position of the arrays, column by column.
    fn at(&self, position: &str) -> Vec<String> {
        (1..=self.keys.len()).map(|i| format!("(${i})[{position}]")).collect()
    }

    /// A condition: a row of the table has the key at a position of the arrays.
    fn matches(&self, position: &str) -> String {
        let column = |(key, value): (&String, String)| format!("{}.{key} OPERATOR(pg_catalog.=) {value}", self.bare);
        self.keys.iter().zip(self.at(position)).map(column).collect::<Vec<_>>().join(" AND ")
    }

    /// The positions, as they stand in a FROM clause.
    fn positions(&self) -> String {
        format!("pg_catalog.unnest({}::pg_catalog.int4[]) \"llm_batch u\" (\"llm_batch i\")", self.parameter(1))
    }

    /// A page of rows to fill, of those for which `after` holds; `$limit` is its size.
    fn claim(&self, after: &str, limit: usize, most_text: usize) -> String {
        let Rows { from, input, todo, has_text, isolation } = self.rows;
        let hash = &self.hash;
        let aggregates = (1..=self.keys.len()).map(|i| format!("pg_catalog.array_agg(q.\"llm_batch k{i}\")"));
        let as_k = self.keys.iter().zip(1..).map(|(key, i)| format!("{key} AS \"llm_batch k{i}\""));
        format!(
            "SELECT {aggregates}, pg_catalog.array_agg({text}), pg_catalog.array_agg(q.\"llm_batch h\"),
                    pg_catalog.array_agg(q.\"llm_batch s\")
               FROM (SELECT {as_k}, {input} AS \"llm_batch t\", {hash} AS \"llm_batch h\", {isolation} AS \"llm_batch s\"
                       FROM {from} WHERE {todo} AND {has_text}{after} ORDER BY {order} LIMIT ${limit}) q
             HAVING pg_catalog.count(*) OPERATOR(pg_catalog.>) 0",
            aggregates = aggregates.collect::<Vec<_>>().join(", "),
            text = cut("q.\"llm_batch t\"", most_text),
            as_k = as_k.collect::<Vec<_>>().join(", "),
            order = self.keys.join(", "),
        )
    }

    /// A condition: a row comes after the one at the position of the first parameter.
    fn after(&self) -> String {
        let (keys, last) = (self.keys.join(", "), self.at(&self.parameter(1)).join(", "));
        format!(" AND ROW({keys}) OPERATOR(pg_catalog.>) ROW({last})")
    }

    /// One statement, and so one transaction id: a row that is locked under one and updated under another has a multixact
    /// made for it.
    fn write(&self, casts: &[Cast]) -> String {
        let Self { targets, hash, bare, rows: Rows { from, .. }, .. } = self;
        let each = |f: &dyn Fn(usize, &String) -> String, separator: &str| {
            targets.iter().enumerate().map(|(i, target)| f(i, target)).collect::<Vec<_>>().join(separator)
        };
        let mut values = each(&|i, _| format!("\"llm_batch v{i}\""), ", ");
        let is_missing = each(&|i, target| format!("({target} IS NULL AND \"llm_batch v{i}\" IS NOT NULL)"), " OR ");
        let value = |i: usize, target: &String| {
            let (column, cast) = (self.job.targets.get(i), casts.get(i));
            let column = name(column.map_or("", |t| t.name.as_str()));
            // A value that somebody has written meanwhile stays; so does NULL where there is no value.
            let value = format!("\"llm_batch v{i}\"");
            format!("{column} = COALESCE({target}, {})", cast.map_or_else(|| value.clone(), |cast| cast.of(&value)))
        };
        let mut arrays = each(&|i, _| format!(", pg_catalog.unnest({}::pg_catalog.text[])", self.parameter(3 + i)), "");
        let mut assignments = each(&value, ", ");
        let mut is_to_write = is_missing.clone();
        if let Some(column) = &self.job.provenance {
            values.push_str(", \"llm_batch p\"");
            arrays.push_str(&format!(", pg_catalog.unnest({}::pg_catalog.text[])", self.parameter(3 + targets.len())));
            assignments.push_str(&format!(
                ", {} = \"llm_batch p\"::pg_catalog.jsonb OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('at', pg_catalog.now())",
                name(column)
            ));
            is_to_write.push_str(" OR \"llm_batch p\" IS NOT NULL");
        }
        if let Some(column) = &self.job.confidence {
            let parameter = self.parameter(3 + targets.len() + usize::from(self.job.provenance.is_some()));
            values.push_str(", \"llm_batch c\"");
            arrays.push_str(&format!(", pg_catalog.unnest({parameter}::pg_catalog.float8[])"));
            // That of another answer is not left there.
            assignments.push_str(&format!(", {} = \"llm_batch c\"", name(column)));
        }
        format!(
            "WITH \"llm_batch l\" (\"llm_batch i\", {values}, \"llm_batch e\", \"llm_batch n\", \"llm_batch h\", \"llm_batch w\") AS MATERIALIZED (
                 SELECT {POSITION}, {values}, \"llm_batch u\".\"llm_batch e\", {any_null}, {hash}, {is_missing}
                   FROM ROWS FROM (pg_catalog.unnest({}::pg_catalog.int4[]), pg_catalog.unnest({}::pg_catalog.int8[]){arrays}) \"llm_batch u\" (\"llm_batch i\", \"llm_batch e\", {values})
                   JOIN {from} ON {}
                    FOR NO KEY UPDATE OF {bare} SKIP LOCKED),
             \"llm_batch w\" (i, n) AS (
                 UPDATE {from} SET {}
                   FROM \"llm_batch l\"
                  WHERE {} AND ({is_to_write}) AND \"llm_batch l\".\"llm_batch n\"
                    AND \"llm_batch l\".\"llm_batch h\" OPERATOR(pg_catalog.=) \"llm_batch l\".\"llm_batch e\"
              RETURNING \"llm_batch l\".\"llm_batch i\", {is_missing})
             SELECT \"llm_batch i\", \"llm_batch n\", \"llm_batch h\", \"llm_batch w\", NULL::pg_catalog.bool FROM \"llm_batch l\"
             UNION ALL SELECT i, NULL, NULL, NULL, n FROM \"llm_batch w\"",
            self.parameter(1),
            self.parameter(2),
            self.matches(POSITION),
            assignments,
            self.matches("\"llm_batch l\".\"llm_batch i\""),
            any_null = any_null(targets.iter().cloned()),
        )
    }

    fn may_update(&self) -> String {
        let may = |column: String| {
            format!(
                "pg_catalog.has_column_privilege({}::pg_catalog.oid, {column}, 'UPDATE')",
                self.job.relation.to_u32()
            )
        };
        let targets = self.job.targets.iter().map(|t| may(format!("{}::pg_catalog.int2", t.attnum)));
        let beside = self.job.provenance.iter().chain(&self.job.confidence).map(|c| may(pgrx::spi::quote_literal(c)));
        targets.chain(beside).collect::<Vec<_>>().join(" AND ")
    }

    fn look(&self) -> String {
        let Self { targets, hash, rows: Rows { from, .. }, .. } = self;
        let (positions, matches) = (self.positions(), self.matches(POSITION));
        let is_null = any_null(targets.iter().cloned());
        format!("SELECT {POSITION}, {is_null}, {hash} FROM {positions} JOIN {from} ON {matches}")
    }

    fn try_lock(&self) -> String {
        format!("SELECT 1 FROM {} WHERE {} FOR NO KEY UPDATE NOWAIT", self.rows.from, self.matches(&self.parameter(1)))
    }

    fn nulls(&self) -> String {
        let (positions, matches) = (self.positions(), self.matches(POSITION));
        let nulls: Vec<String> = self.targets.iter().map(|target| format!("{target} IS NULL")).collect();
        format!("SELECT {POSITION}, ARRAY[{}] FROM {positions} JOIN {} ON {matches}", nulls.join(", "), self.rows.from)
    }

    fn describe(&self) -> String {
        let pair = |(name, value): (&String, String)| format!("{}, {value}", pgrx::spi::quote_literal(name));
        let pairs: Vec<String> = self.job.key_names.iter().zip(self.at(POSITION)).map(pair).collect();
        format!(
            "SELECT {POSITION}, pg_catalog.jsonb_build_object({})::pg_catalog.text FROM {}",
            pairs.join(", "),
            self.positions()
        )
    }

    fn digest(&self) -> String {
        format!(
            "SELECT {POSITION}, {}
               FROM ROWS FROM (pg_catalog.unnest({}::pg_catalog.int4[]), pg_catalog.unnest({}::pg_catalog.int8[])) \"llm_batch u\" (\"llm_batch i\", \"llm_batch e\")",
            hash_sql(&format!("ROW({})::pg_catalog.text", self.at(POSITION).join(", ")), "\"llm_batch u\".\"llm_batch e\""),
            self.parameter(1),
            self.parameter(2),
        )
    }
}
