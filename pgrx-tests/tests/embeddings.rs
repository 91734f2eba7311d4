//! Vectors in columns and queries: each text gets its own, and what a user may write wrongly is told.

mod common;

use common::{Bed, PATIENCE, error, failures, one, progress, run, text, tickets};
use llm_fake_provider::{Config, Fault, embedding};
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

const DIMENSIONS: usize = 16;

/// Counts rows whose vector is not their text's, and rows without one.
fn wrong(c: &mut Client, column: &str) -> (usize, usize) {
    let all = c.query(&format!("SELECT body, {column} FROM t"), &[]).unwrap();
    let is_wrong = |body: &str, vector: &[f32]| vector != embedding(body, DIMENSIONS).as_slice();
    let vectors = all.iter().map(|row| (row.get::<_, String>(0), row.get::<_, Option<Vec<f32>>>(1)));
    let (mut bad, mut none) = (0, 0);
    for (body, vector) in vectors {
        bad += usize::from(vector.as_ref().is_some_and(|v| is_wrong(&body, v)));
        none += usize::from(vector.is_none());
    }
    (bad, none)
}

#[test]
fn vectors_of_jobs_and_queries() {
    let bed = Bed::with("embeddings", Config { seed: 5, ..Config::default() });
    let c = &mut bed.connect();
    tickets(c, "t", 1..=2000);
    run(c, "ALTER TABLE t ADD v real[], ADD d double precision[], ADD j jsonb, ADD i integer[], ADD n numeric");
    run(c, "ALTER TABLE t ADD x text, ADD s varchar[], ADD r real[]");
    run(c, "SELECT llm_batch.create_embedder('e', 'm', 16, options => '{\"max_attempts\": 10}')");

    queries(c);
    numbers(c);
    pieces(c);
    what_is_wrong(c);

    let faults = Fault::OF_VECTORS.into_iter().chain([Fault::Http500, Fault::RateLimit429, Fault::ResetAfter]);
    bed.provider.configure(|config| config.faults = faults.map(|fault| (fault, 0.02)).collect());
    let job = one(c, "SELECT llm_batch.backfill('t', 'body', 'v', 'e', options => '{\"max_rows_per_request\": 20}')");
    wait_until("the job is under way", PATIENCE, || progress(c, job).done, |done| *done > 0);
    let p = bed.done(job);
    assert_eq!(p.counts(), (2000, 2000, 0, 0, 0, 0), "{:?}", failures(c, job));
    assert_eq!(wrong(c, "v"), (0, 0));

    bed.provider.configure(|config| config.faults = Vec::new());
    run(
        c,
        "SELECT llm_batch.create_embedder('checked', 'm', 16,
           options => '{\"repair\": \"answer\", \"check\": \"cardinality(answer) = 16\", \"max_rows_per_request\": 2048}')",
    );
    let of_json = |column: &str| format!("ARRAY(SELECT jsonb_array_elements_text({column}::jsonb)::real)");
    for (column, as_real, task) in [
        ("d", "d::real[]".to_owned(), "e"),
        ("j", of_json("j"), "e"),
        ("x", of_json("x"), "e"),
        ("s", "s::real[]".to_owned(), "e"),
        ("r", "r".to_owned(), "checked"),
    ] {
        let job = one(c, &format!("SELECT llm_batch.backfill('t', 'body', '{column}', '{task}')"));
        assert_eq!(bed.done(job).counts().1, 2000, "{:?}", failures(c, job));
        assert_eq!(wrong(c, &as_real), (0, 0), "{column}");
    }
    assert_eq!(one(c, "SELECT count(llm_embed(body, 'checked')) FROM t WHERE id <= 3"), 3);
    // What is no vector fits no column. The refusal shows its numbers.
    run(c, "CREATE DOMAIN short AS real[] CHECK (cardinality(VALUE) < 9); ALTER TABLE t ADD w short");
    let job = one(
        c,
        "SELECT llm_batch.backfill('t', 'body', 'w', 'e', filter => 'id < 3', options => '{\"max_attempts\": 1}')",
    );
    wait_until("the rows are refused", PATIENCE, || progress(c, job).failed, |failed| *failed == 2);
    let detail = text(c, &format!("SELECT detail FROM llm_batch.failure WHERE job_id = {job} LIMIT 1"));
    assert!(detail.contains("[0.") || detail.contains("[-0."), "{detail}");
}

/// The types of pgvector, where Postgres has it.
#[test]
fn vectors_of_pgvector() {
    let bed = Bed::with("pgvector", Config { seed: 6, ..Config::default() });
    let c = &mut bed.connect();
    if one(c, "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'") == 0 {
        eprintln!("SKIPPED: this Postgres has no pgvector; nothing is tested of vector and halfvec");
        return;
    }
    // In a schema that is in nobody's path.
    run(c, "CREATE SCHEMA elsewhere; CREATE EXTENSION vector SCHEMA elsewhere");
    tickets(c, "t", 1..=1000);
    for (column, of) in [("v", "vector(16)"), ("h", "halfvec(16)"), ("w", "vector(8)"), ("u", "vector")] {
        run(c, &format!("ALTER TABLE t ADD {column} elsewhere.{of}"));
    }
    run(c, "CREATE DOMAIN v16 AS elsewhere.vector(16); CREATE DOMAIN h8 AS elsewhere.halfvec(8)");
    run(c, "ALTER TABLE t ADD d v16, ADD b h8");
    run(c, "SELECT llm_batch.create_embedder('e', 'm', 16, options => '{\"max_attempts\": 10}')");
    for column in ["w", "b"] {
        let (code, message, _, hint) = error(c, &format!("SELECT llm_batch.backfill('t', 'body', '{column}', 'e')"));
        let says = format!("16 dimensions but column \"{column}\" has 8");
        assert!(code == "42804" && message.contains(&says) && !hint.is_empty(), "{code} {message} {hint}");
    }
    assert_eq!(bed.provider.stats().requests, 0);
    let faults = Fault::OF_VECTORS.into_iter().map(|fault| (fault, 0.02)).collect();
    bed.provider.configure(|config| config.faults = faults);
    for (column, as_real) in [("v", "v::real[]"), ("u", "u::real[]"), ("d", "d::real[]")] {
        let job = one(c, &format!("SELECT llm_batch.backfill('t', 'body', '{column}', 'e')"));
        assert_eq!(bed.done(job).counts(), (1000, 1000, 0, 0, 0, 0), "{:?}", failures(c, job));
        assert_eq!(wrong(c, as_real), (0, 0), "{column}");
    }
    // halfvec keeps half of the digits.
    let job = one(c, "SELECT llm_batch.backfill('t', 'body', 'h', 'e')");
    assert_eq!(bed.done(job).counts().1, 1000, "{:?}", failures(c, job));
    let far = "SELECT count(*) FROM t WHERE (h OPERATOR(elsewhere.<->) v::elsewhere.halfvec) IS DISTINCT FROM 0";
    assert_eq!(one(c, far), 0);
    // The nearest of a text that is there is that text.
    run(c, "CREATE INDEX ON t USING hnsw (v elsewhere.vector_cosine_ops)");
    let nearest = "SELECT id FROM t ORDER BY v OPERATOR(elsewhere.<=>) \
                   (SELECT llm_embed(body, 'e')::elsewhere.vector FROM t WHERE id = 7) LIMIT 1";
    assert_eq!(one(c, nearest), 7);
}

/// Scalars and set-returning functions give the same vectors; many rows go in one request.
fn queries(c: &mut Client) {
    let before = one(c, "SELECT count(*) FROM t");
    assert_eq!(before, 2000);
    let got = c.query("SELECT body, llm_embed(body, 'e') FROM t WHERE id <= 100", &[]).unwrap();
    assert_eq!(got.len(), 100);
    for row in &got {
        assert_eq!(row.get::<_, Vec<f32>>(1), embedding(row.get(0), DIMENSIONS));
    }
    for value in [
        "llm_run('a text', 'e')::real[]",
        "(SELECT value::real[] FROM llm_run_batch($$SELECT 1 AS id, 'a text' AS input$$, 'e'))",
        "(SELECT value::real[] FROM llm_run_array(ARRAY[1], ARRAY['a text'], 'e'))",
    ] {
        let got: Vec<f32> = c.query_one(&format!("SELECT {value}"), &[]).unwrap().get(0);
        assert_eq!(got, embedding("a text", DIMENSIONS), "{value}");
    }
    assert_eq!(
        text(c, "SELECT kind || ' ' || spec FROM llm_batch.task WHERE name = 'e'"),
        "embed {\"dimensions\": 16}"
    );
}

/// A vector in base64 as the numbers that it stands for.
fn numbers(c: &mut Client) {
    for (base64, numbers) in [("AACAPwAAAMA=", vec![1.0, -2.0]), ("", vec![]), ("AADAfw==", vec![f32::NAN])] {
        let got: Vec<f32> = c.query_one("SELECT llm_batch.vector_numbers($1)", &[&base64]).unwrap().get(0);
        assert!(got.iter().map(|n| n.to_bits()).eq(numbers.iter().map(|n| n.to_bits())), "{got:?}");
    }
    // As Postgres makes arrays.
    assert_eq!(one(c, "SELECT count(*) WHERE llm_batch.vector_numbers('AACAPwAAAMA=') = '{1,-2}'::real[]"), 1);
    assert_eq!(one(c, "SELECT count(*) WHERE array_dims(llm_batch.vector_numbers('AACAPwAAAMA=')) = '[1:2]'"), 1);
}

/// A long text in pieces, each with its vector.
fn pieces(c: &mut Client) {
    let all = "SELECT count(*), max(length(piece)), count(*) FILTER (WHERE piece LIKE '%.') \
               FROM llm_split((SELECT repeat('One two three four. ', 500)), 50, 10)";
    let row = c.query_one(all, &[]).unwrap();
    let (pieces, longest, ends): (i64, i32, i64) = (row.get(0), row.get(1), row.get(2));
    // Five tokens a sentence: ten of them in a piece, two of which were in the one before.
    assert_eq!((pieces, longest, ends), (63, 199, 63));
    run(c, "CREATE TABLE piece (doc bigint, n int, body text, v real[], PRIMARY KEY (doc, n))");
    run(c, "INSERT INTO piece (doc, n, body) SELECT 1, p.n, p.piece FROM llm_split('a b c d e', 2) p");
    assert_eq!(text(c, "SELECT string_agg(n || ':' || body, ' ' ORDER BY n) FROM piece"), "1:a b 2:c d 3:e");
    assert_eq!(one(c, "SELECT count(*) FROM llm_split('', 2)"), 0);
}

fn what_is_wrong(c: &mut Client) {
    for (sql, code, says) in [
        ("SELECT llm_batch.create_embedder('f', 'm', NULL)", "22004", "dimensions"),
        ("SELECT llm_batch.create_embedder('f', 'm', 0)", "22023", "1 to 8192"),
        ("SELECT llm_batch.create_embedder('f', 'nobody', 3)", "42704", "nobody"),
        ("SELECT llm_batch.create_embedder('e', 'm', 3)", "42710", "embedder"),
        ("SELECT llm_batch.alter_scorer('e', 'x')", "42809", "alter_embedder"),
        (
            "SELECT llm_batch.create_embedder('f', 'm', 3, options => '{\"max_rows_per_request\": 2049}')",
            "22023",
            "or to 2048 for an embedder",
        ),
        (
            "SELECT llm_batch.create_scorer('f', 'x', 0, 1, 'm', options => '{\"max_rows_per_request\": 501}')",
            "22023",
            "1 to 500",
        ),
        ("SELECT llm_batch.vector_numbers('[1, 2]')", "22P02", "base64"),
        ("SELECT llm_split('x', 0)", "22023", "max_tokens"),
        ("SELECT llm_split('x', 5, 5)", "22023", "less than"),
        ("SELECT llm_split('x', 5, -1)", "22023", "overlap"),
        ("SELECT llm_embed('x', 'topic')", "42809", "not an embedder"),
        ("SELECT llm_batch.backfill('t', 'body', 'i', 'e')", "42804", "real[]"),
        ("SELECT llm_batch.backfill('t', 'body', 'n', 'e')", "42804", "real[]"),
    ] {
        let (found, message, detail, hint) = error(c, sql);
        let all = format!("{message}\n{detail}\n{hint}");
        assert!(found == code && all.contains(says), "{sql}\n{found} {all}");
    }
}
