//! The same query with batch scans and without them: the same rows. Queries are made up from a seed, so that a failure
//! says which; `ORACLE_SEED` and `ORACLE_QUERIES` change them.

mod common;

use std::fmt::Write as _;

use common::{Bed, one, run};
use llm_fake_provider::{Config, kinds};
use postgres::{Client, SimpleQueryMessage};

/// Random choices from a seed.
struct Dice {
    rng: fastrand::Rng,
    /// Texts that are made of an input, by kinds of tasks.
    texts: Vec<String>,
}

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.rng.usize(..sides)
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.roll(of.len())]
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.roll(one_in) == 0
    }

    /// A text to ask about, of one of these tables.
    fn input(&mut self, from: &[&str]) -> String {
        let a = self.pick(from);
        let b = self.pick(from);
        match self.roll(8) {
            0 => format!("{a}.body || coalesce({b}.body, '')"),
            1 => format!("CASE {a}.grp WHEN 1 THEN {b}.body ELSE {a}.body END"),
            2 => format!("lower({a}.body)"),
            3 => format!("(SELECT max(body) FROM u z WHERE z.tid = {a}.id)"),
            _ => format!("{a}.body"),
        }
    }

    /// A text with a call, or what has none.
    fn value(&mut self, from: &[&str], depth: usize) -> String {
        let input = self.input(from);
        let a = self.pick(from);
        match self.roll(if depth == 0 { 4 } else { 17 }) {
            0 => format!("llm_classify({input}, ARRAY['bug', 'spam', 'billing'])"),
            4 => format!("coalesce({a}.note, {})", self.value(from, depth - 1)),
            5 => format!(
                "CASE WHEN {} THEN {} WHEN {a}.grp = 3 THEN {} END",
                self.condition(from, depth - 1),
                self.value(from, depth - 1),
                self.value(from, depth - 1)
            ),
            6 => format!(
                "CASE {a}.grp WHEN 0 THEN {} WHEN 2 THEN {} ELSE {a}.note END",
                self.value(from, depth - 1),
                self.value(from, depth - 1)
            ),
            7 => format!(
                "CASE {} WHEN 'bug' THEN {} ELSE 'other' END",
                self.value(from, depth - 1),
                self.value(from, depth - 1)
            ),
            8 => format!("upper({})", self.value(from, depth - 1)),
            9 => format!("nullif({}, {})", self.value(from, depth - 1), self.value(from, depth - 1)),
            10 => format!("llm_classify({a}.body || {}, 'topic')", self.value(from, depth - 1)),
            11 => format!("ARRAY[{}, {}]::text", self.value(from, depth - 1), self.value(from, depth - 1)),
            12 => format!("greatest({}, {a}.note)", self.value(from, depth - 1)),
            13 if self.chance(3) => format!("llm_run({input}, 'topic')"),
            13 => format!("({})::text || {a}.id", self.condition(from, depth - 1)),
            14..=16 => {
                let text = self.roll(self.texts.len());
                self.texts[text].replace("{input}", &input)
            }
            _ => format!("llm_classify({input}, 'topic')"),
        }
    }

    fn condition(&mut self, from: &[&str], depth: usize) -> String {
        let a = self.pick(from);
        match self.roll(if depth == 0 { 4 } else { 14 }) {
            0 => format!("{a}.grp < 3"),
            1 => format!("{} = 'bug'", self.value(from, 0)),
            4 => format!("({} AND {})", self.condition(from, depth - 1), self.condition(from, depth - 1)),
            5 => format!("({} OR {})", self.condition(from, depth - 1), self.condition(from, depth - 1)),
            6 => format!("NOT {}", self.condition(from, depth - 1)),
            7 => format!("{} IN ('bug', 'spam')", self.value(from, depth - 1)),
            8 => format!("{} IN (SELECT body FROM labels)", self.value(from, depth - 1)),
            9 => format!("EXISTS (SELECT 1 FROM u x WHERE x.tid = {a}.id AND {})", self.condition(&["x"], depth - 1)),
            10 => format!("{a}.n / ({a}.grp - 1) > 0 IS TRUE AND {a}.grp <> 1"),
            11 => format!("{a}.grp <> 1 AND {} AND {a}.n / ({a}.grp - 1) >= -100", self.condition(from, depth - 1)),
            12 => format!("{} IS NULL", self.value(from, depth - 1)),
            13 => format!("{a}.n > (SELECT count(*) FROM u y WHERE {})", self.condition(&["y"], 0)),
            _ => format!("llm_filter({a}.ask, 'Is it so?')"),
        }
    }

    /// The part behind FROM, and the names in it.
    fn source(&mut self) -> (String, &'static [&'static str]) {
        let on = |dice: &mut Self| {
            let more = if dice.chance(2) { format!(" AND {}", dice.condition(&["t", "u"], 1)) } else { String::new() };
            format!("u.tid = t.id{more}")
        };
        match self.roll(12) {
            0 => (format!("t JOIN u ON {}", on(self)), &["t", "u"]),
            1 => (format!("t LEFT JOIN u ON {}", on(self)), &["t", "u"]),
            2 => (format!("u RIGHT JOIN t ON {}", on(self)), &["t", "u"]),
            3 => ("p t".to_owned(), &["t"]),
            4 => ("v t".to_owned(), &["t"]),
            5 => (
                format!(
                    "(SELECT id, grp, {} body, ask, note, n FROM t t{}) t",
                    self.value(&["t"], 1),
                    if self.chance(2) { " OFFSET 0" } else { "" }
                ),
                &["t"],
            ),
            6 => (
                format!("t CROSS JOIN LATERAL (SELECT * FROM u WHERE u.tid = t.id AND {} LIMIT 2) u", {
                    self.condition(&["t", "u"], 1)
                }),
                &["t", "u"],
            ),
            7 => ("generate_series(1, 9) g JOIN t ON t.id = g".to_owned(), &["t"]),
            8 => ("secured t".to_owned(), &["t"]),
            _ => ("t".to_owned(), &["t"]),
        }
    }

    fn select(&mut self, columns: usize) -> String {
        let (source, from) = self.source();
        let ids: Vec<String> = from.iter().map(|a| format!("{a}.id")).collect();
        let mut q = String::new();
        let filter = if self.chance(2) { format!(" WHERE {}", self.condition(from, 2)) } else { String::new() };
        match self.roll(8) {
            0 => {
                let (a, b) = (self.value(from, 1), self.value(from, 1));
                let kept = self.condition(from, 1);
                write!(
                    q,
                    "SELECT {a}, count(*)::text || coalesce(min({b}), '-') || (count(*) FILTER (WHERE {kept}))::text"
                )
                .unwrap();
                write!(q, " FROM {source}{filter} GROUP BY 1").unwrap();
                if self.chance(2) {
                    write!(q, " HAVING llm_classify(string_agg({}.body, ''), 'topic') <> 'bug'", from[0]).unwrap();
                }
            }
            1 => {
                let (a, b) = (self.value(from, 1), self.value(from, 1));
                write!(q, "SELECT DISTINCT {a}, {b} FROM {source}{filter}").unwrap();
            }
            2 => {
                let (a, b) = (self.value(from, 1), self.value(from, 1));
                let order = ids.join(", ");
                write!(
                    q,
                    "SELECT {a}, (rank() OVER (PARTITION BY {b} ORDER BY {order}))::text || \
                     llm_classify(lag({}.body) OVER (ORDER BY {order}), 'topic') FROM {source}{filter}",
                    from[0]
                )
                .unwrap();
            }
            _ => {
                let first = if columns == 2 { self.value(from, 2) } else { format!("{}.id::text", from[0]) };
                let second = self.value(from, 2);
                write!(q, "SELECT {first}, {second} FROM {source}{filter}").unwrap();
                if self.chance(2) {
                    let by = if self.chance(3) { format!("{}, ", self.value(from, 0)) } else { String::new() };
                    write!(q, " ORDER BY {by}{}", ids.join(", ")).unwrap();
                    if self.chance(2) {
                        write!(q, " LIMIT {}", self.roll(12)).unwrap();
                    }
                    if self.chance(3) {
                        write!(q, " OFFSET {}", self.roll(5)).unwrap();
                    }
                }
            }
        }
        q
    }

    fn statement(&mut self) -> String {
        let from = &["t"];
        match self.roll(16) {
            0 => {
                let how = self.pick(&["UNION", "UNION ALL", "EXCEPT", "INTERSECT"]);
                format!("({}) {how} ({})", self.select(2), self.select(2))
            }
            1 => format!("WITH c AS MATERIALIZED ({}) SELECT a.* FROM c a, c b WHERE a = b", self.select(2)),
            2 => format!("UPDATE t SET note = {} WHERE {} RETURNING id, note", self.value(from, 2), {
                self.condition(from, 1)
            }),
            3 => format!(
                "UPDATE t SET note = {}, n = t.n + 1 FROM u WHERE u.tid = t.id AND u.id % 3 = 0 AND {} RETURNING t.id, t.note",
                self.value(&["t", "u"], 1),
                self.condition(&["t", "u"], 1)
            ),
            4 => format!("DELETE FROM p t WHERE {} RETURNING id, note", self.condition(from, 2)),
            5 => format!("INSERT INTO made {} RETURNING *", self.select(2)),
            6 => format!("UPDATE p t SET grp = (t.grp + 1) % 4, note = {} RETURNING id, note", self.value(from, 1)),
            7 => format!("SELECT * FROM loop({})", quoted(&self.select(2))),
            8 => format!("SELECT * FROM fetched({}, {})", quoted(&self.select(2)), self.roll(7)),
            9 => format!("SELECT t.id, t.note FROM t WHERE {} ORDER BY id FOR UPDATE", self.condition(from, 1)),
            _ => self.select(2),
        }
    }
}

fn quoted(query: &str) -> String {
    format!("'{}'", query.replace('\'', "''"))
}

/// The result of a statement and the tables after it; or the code of its error. Rolled back.
fn outcome(client: &mut Client, settings: &str, sql: &str) -> Vec<String> {
    run(client, &format!("BEGIN; {settings}"));
    let is_ordered = sql.starts_with("SELECT t.id") && sql.contains("ORDER BY");
    let mut rows = Vec::new();
    match client.simple_query(sql) {
        Err(e) => rows.push(format!("error {}", e.code().map_or("?", |c| c.code()))),
        Ok(messages) => {
            for m in messages {
                if let SimpleQueryMessage::Row(row) = m {
                    rows.push((0..row.len()).map(|i| row.get(i).unwrap_or("NULL")).collect::<Vec<_>>().join(" | "));
                }
            }
            if !is_ordered {
                rows.sort();
            }
            for table in ["t", "p", "made"] {
                let digest = format!("SELECT md5(string_agg({table}::text, ';' ORDER BY {table}::text)) FROM {table}");
                rows.push(format!("{table}: {}", common::text(client, &digest)));
            }
        }
    }
    run(client, "ROLLBACK");
    rows
}

#[test]
fn generated_queries() {
    let bed = Bed::with("oracle", Config::default());
    let c = &mut bed.connect();
    run(
        c,
        "SET llm_batch.default_model = 'm'; SET client_min_messages = error;
         CREATE TABLE t (id int PRIMARY KEY, grp int, body text, ask text, note text, n int);
         INSERT INTO t SELECT i, i % 4,
                CASE WHEN i % 7 = 0 THEN NULL WHEN i % 11 = 0 THEN '' ELSE format('#r%s:%s# in t', i,
                     (ARRAY['bug', 'billing', 'spam', 'other'])[1 + i % 4]) END,
                CASE WHEN i % 9 <> 0 THEN format('#r%s:%s#', i, CASE WHEN i % 3 = 0 THEN 'yes' ELSE 'no' END) END,
                CASE WHEN i % 5 = 0 THEN 'noted' END, i
           FROM generate_series(1, 40) i;
         CREATE TABLE u (LIKE t, tid int);
         INSERT INTO u SELECT t.id + 100 * j, t.grp, replace(t.body, 'in t', 'in u' || j), t.ask, t.note, t.n, t.id
                         FROM t, generate_series(0, 1) j WHERE t.id % 3 <> j;
         CREATE TABLE p (LIKE t) PARTITION BY LIST (grp);
         CREATE TABLE p0 PARTITION OF p FOR VALUES IN (0, 1);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (2);
         CREATE TABLE p2 PARTITION OF p DEFAULT;
         INSERT INTO p SELECT * FROM t;
         CREATE TABLE labels (body text);
         INSERT INTO labels VALUES ('bug'), ('billing'), (NULL);
         CREATE TABLE made (a text, b text);
         CREATE VIEW v AS SELECT id, grp, body || ' viewed' body, ask, llm_classify(body, 'topic') note, n FROM t;
         CREATE TABLE secured AS SELECT * FROM t;
         ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
         CREATE POLICY few ON secured USING (grp <> 2 AND llm_filter(ask, 'May they see it?'));
         CREATE FUNCTION loop(query text) RETURNS TABLE (a text, b text) LANGUAGE plpgsql AS $$
         BEGIN FOR a, b IN EXECUTE query LOOP RETURN NEXT; END LOOP; END $$;
         CREATE FUNCTION fetched(query text, most int) RETURNS TABLE (a text, b text) LANGUAGE plpgsql AS $$
         DECLARE c refcursor;
         BEGIN
             OPEN c SCROLL FOR EXECUTE query;
             FOR i IN 1 .. most LOOP FETCH c INTO a, b; EXIT WHEN NOT FOUND; RETURN NEXT; END LOOP;
             IF most > 4 THEN FETCH PRIOR FROM c INTO a, b; RETURN NEXT; FETCH FIRST FROM c INTO a, b; RETURN NEXT; END IF;
             CLOSE c;
         END $$;
         CREATE ROLE reader;
         GRANT SELECT, UPDATE, DELETE, INSERT ON t, u, p, labels, made, v, secured TO reader;
         GRANT USAGE ON FOREIGN SERVER fake TO reader;
         ANALYZE",
    );
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |v| v.parse().unwrap());
    let (seed, queries) = (number("ORACLE_SEED", 20), number("ORACLE_QUERIES", 300));
    for (_, sql) in kinds::<String>("setup").unwrap() {
        run(c, &sql);
    }
    let texts = kinds("queries").unwrap().into_iter().map(|(_, text)| text).collect();
    let mut dice = Dice { rng: fastrand::Rng::with_seed(seed), texts };
    let (mut placed, mut failed, mut empty) = (0, 0, 0);
    for i in 0..queries {
        let sql = dice.statement();
        let mut settings = String::from("SET LOCAL ROLE reader;");
        for _ in 0..dice.roll(4) {
            let setting = dice.pick(&[
                "enable_hashjoin = off",
                "enable_mergejoin = off",
                "enable_nestloop = off",
                "enable_hashagg = off",
                "enable_sort = off",
                "enable_material = off",
                "enable_seqscan = off",
                "work_mem = '64kB'",
                "from_collapse_limit = 1",
                "jit = off",
                "min_parallel_table_scan_size = 0; SET LOCAL parallel_setup_cost = 0; SET LOCAL parallel_tuple_cost = 0",
            ]);
            write!(settings, "SET LOCAL {setting};").unwrap();
        }
        let with = outcome(c, &settings, &sql);
        let without = outcome(c, &format!("{settings}SET LOCAL llm_batch.enable_batch_scan = off;"), &sql);
        assert_eq!(with, without, "query {i} of seed {seed}: {settings}\n{sql}");
        failed += u32::from(with[0].starts_with("error"));
        empty += u32::from(with.len() == 3);
        run(c, &format!("BEGIN; {settings}"));
        let plan = c.simple_query(&format!("EXPLAIN {sql}"));
        let is_placed = plan.iter().flatten().any(|m| match m {
            SimpleQueryMessage::Row(row) => row.get(0).is_some_and(|line| line.contains("LLM Batch")),
            _ => false,
        });
        placed += u32::from(is_placed);
        run(c, "ROLLBACK");
    }
    println!("{queries} queries, {placed} with the node, {failed} errors, {empty} without rows");
    assert!(u64::from(placed) * 10 > queries * 7 && u64::from(failed) * 10 < queries, "{placed} {failed} {empty}");
    assert_eq!(one(c, "SELECT count(*) FROM t WHERE note = 'noted'"), 8);
}
