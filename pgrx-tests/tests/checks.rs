//! Checks and repairs of fields, and values that do not fit. Those of texts are in `generate.rs`.

mod common;

use common::{Bed, asked_again, error, failures, numbered, one, run, text, wait_status};
use postgres::Client;

#[test]
fn fields_and_values_that_do_not_fit() {
    let bed = Bed::new("checks_fields");
    let c = &mut bed.connect();
    let extractor = |name: &str, options: &str| {
        format!(
            "SELECT llm_batch.create_extractor('{name}', '{{\"amount\": \"numeric\", \"due\": \"date\", \"tags\": \"text[]\", \"other\": \"jsonb\", \"input\": \"integer\"}}', 'm', options => $${{{options}}}$$)"
        )
    };
    run(
        c,
        &extractor(
            "parts",
            r#""repair": {"amount": "round(amount)", "due": "due + 1", "tags": "array_append(tags, other->>'id')", "other": "'[1]'::jsonb"},
               "check": {"amount": "input <> 9 AND amount = trunc(amount) AND cardinality(tags) = 3", "due": "due >= '2026-01-02'"},
               "check_hint": {"amount": "not nine"}"#,
        ),
    );
    numbered(c, "t", 1..=30);
    run(c, "SET datestyle = 'German'; SET timezone = 'Asia/Tokyo'");
    let fields = "SELECT id, llm_extract(body, 'parts') AS e FROM t";
    // The provider makes a value of the id and the field's name: "input" is the id.
    assert_eq!(text(c, &format!("SELECT string_agg(id::text, ' ') FROM ({fields}) x WHERE e IS NULL")), "9");
    assert_eq!(one(c, &format!("SELECT count(e) FROM ({fields}) x")), 29);
    assert_eq!(
        one(
            c,
            &format!(
                "SELECT count(*) FROM ({fields}) x
                  WHERE (e->>'amount')::numeric = trunc((e->>'amount')::numeric) AND (e->>'due')::date > '2026-01-01'
                    AND (e->>'due') LIKE '2026-%' AND jsonb_array_length(e->'tags') = 3 AND e->'other' = '[1]' AND e->>'tags' LIKE '%\"%'"
            )
        ),
        29
    );
    let lines = asked_again(&bed, 9);
    assert!(lines.len() == 2 && lines.iter().all(|l| l.ends_with("(asked again: the field \"amount\": not nine)")));
    run(c, "RESET datestyle; RESET timezone");

    // A value too large for its column: the row is asked again, told the type, and is not written in part.
    run(c, "SELECT llm_batch.create_extractor('sums', '{\"amount\": \"numeric\", \"due\": \"date\"}', 'm')");
    numbered(c, "sums", 981..=1020);
    let targets = r#"{"amount": "amount", "due": "due"}"#;
    let job = one(c, &format!("SELECT llm_batch.backfill('sums', 'body', targets => '{targets}', task => 'sums')"));
    let p = bed.done(job);
    assert_eq!(one(c, "SELECT count(*) FROM sums WHERE amount IS NOT NULL AND due IS NOT NULL"), p.done);
    assert_eq!(one(c, "SELECT count(*) FROM sums WHERE amount IS NULL AND due IS NULL"), p.failed);
    assert!(p.done > 10 && p.failed > 10, "{p:?}");
    let listed = failures(c, job);
    for (key, _, class, attempts, detail) in &listed {
        assert_eq!((class.as_str(), *attempts), ("bad_value", 3), "{listed:?}");
        let says = ["field \"amount\": \"10", "is no value of type numeric(5,2): 22003: numeric field overflow"];
        assert!(says.iter().all(|s| detail.contains(s)), "{detail}");
        let lines = asked_again(&bed, key["id"].as_i64().unwrap());
        let told = "\" (asked again: the field \"amount\" must be a value of PostgreSQL's type numeric(5,2))";
        assert!(lines.len() == 2 && lines.iter().all(|l| l.ends_with(&format!(":x#{told}"))), "{lines:?}");
    }
    // A refusal of the table is another matter, and is not asked again.
    numbered(c, "refuses", 2001..=2040);
    run(c, "ALTER TABLE refuses ALTER amount TYPE numeric, ADD CHECK (amount < 2020)");
    let job = one(c, &format!("SELECT llm_batch.backfill('refuses', 'body', targets => '{targets}', task => 'sums')"));
    let p = bed.done(job);
    let listed = failures(c, job);
    assert!(p.done > 5 && listed.len() > 5 && listed.iter().all(|f| f.2 == "write_error" && f.3 == 1), "{listed:?}");
    nothing_fits(&bed, c);

    // Texts that are no expressions.
    let bad = [
        (r#""check": "length(answer) >""#, "42601", "check"),
        (r#""check": "true) OR (true""#, "42601", "check"),
        (r#""check": "true FROM pg_class""#, "42601", "check"),
        (r#""check": "anwser <> ''""#, "42703", "check: column \"anwser\" does not exist"),
        (r#""check": "nothing(answer)""#, "42883", "check"),
        (r#""check": "answer""#, "42804", "check: the expression must be of type boolean, not text"),
        (r#""repair": "ARRAY[1]::point[]""#, "42846", "repair"),
        (r#""check": "count(*) > 0""#, "0A000", "check"),
        (r#""check": "llm_filter(answer, 'Is it?')""#, "0A000", "check"),
        (r#""check": "EXISTS (SELECT 1 WHERE llm_filter(answer, 'Is it?'))""#, "0A000", "check"),
        (r#""check": {"answer": "true"}"#, "22023", "check"),
        (r#""check_hint": "x""#, "22023", "check_hint"),
        (r#""check": "true", "check_hint": "a\nb""#, "22023", "check_hint"),
    ];
    for (options, code, says) in bad {
        let classifier = format!(
            "SELECT llm_batch.create_classifier('wrong', ARRAY['a', 'b'], model => 'm', options => $${{{options}}}$$)"
        );
        let (is, message, _, hint) = error(c, &classifier);
        assert!(is == code && message.contains(says) && !hint.is_empty(), "{options}: {is} {message} / {hint}");
    }
    for (options, code) in [
        (r#""check": "true""#, "22023"),
        (r#""check": {"amont": "true"}"#, "22023"),
        (r#""repair": {"due": "point(1, 2)"}"#, "42804"),
    ] {
        assert_eq!(error(c, &extractor("wrong", options)).0, code, "{options}");
    }
    // Nobody but the task's owner says what is checked.
    let (code, message, ..) =
        error(c, "SELECT llm_batch.backfill('t', 'body', 'answer', 'words', options => '{\"check\": \"true\"}')");
    assert_eq!((code.as_str(), message.as_str()), ("22023", "unrecognized option \"check\""));
}

/// NULL may be what a repair makes of a value, or a value what it makes of NULL: a later job knows it as it knows the model's.
#[test]
fn a_repair_may_give_null() {
    let bed = Bed::new("checks_nulls");
    let c = &mut bed.connect();
    numbered(c, "t", 1..=40);
    run(
        c,
        "ALTER TABLE t ADD by jsonb; UPDATE t SET body = body || ' no amount' WHERE id <= 20;
         SELECT llm_batch.create_extractor('facts', '{\"amount\": \"numeric\", \"due\": \"date\"}', 'm',
           options => '{\"reuse\": false, \"repair\": {\"due\": \"CASE WHEN amount IS NOT NULL THEN due END\", \"amount\": \"coalesce(amount, 0)\"}}');
         SELECT llm_batch.create_generator('odd', 'Explain.', 'm',
           options => '{\"reuse\": false, \"repair\": \"CASE WHEN input ~ ''[13579]:'' THEN answer END\"}')",
    );
    for (targets, task, column, written) in
        [(r#"{"amount": "amount", "due": "due"}"#, "facts", "due", 20), (r#"{"answer": "text"}"#, "odd", "answer", 20)]
    {
        let fill = format!(
            "SELECT llm_batch.backfill('t', 'body', targets => '{targets}', task => '{task}', options => '{{\"provenance_column\": \"by\"}}')"
        );
        let job = one(c, &fill);
        assert_eq!(bed.done(job).counts(), (40, 40, 0, 0, 0, 0));
        assert_eq!(one(c, &format!("SELECT count({column}) FROM t")), written);
        assert_eq!(
            one(
                c,
                "SELECT count(*) FROM t WHERE amount IS NULL OR (by ? 'nulls') = (due IS NOT NULL) AND answer IS NULL AND by->>'task' = 'facts'"
            ),
            0
        );
        let before = bed.provider.stats().admitted;
        let again = one(c, &fill);
        assert_eq!((bed.done(again).total, bed.provider.stats().admitted - before), (0, 0), "{task}");
    }
}

/// A column takes nothing of what the model gives: by a modifier, a domain, a constraint, also where each row is a request of
/// its own or is asked many times. The job pauses before twenty requests, and says what is wrong.
#[track_caller]
fn nothing_fits(bed: &Bed, c: &mut Client) {
    run(c, "CREATE DOMAIN word AS text CHECK (value !~ ' ')");
    run(
        c,
        "SELECT llm_batch.create_extractor('words', '{\"answer\": \"text\"}', 'm', options => '{\"reuse\": false}');
         SELECT llm_batch.create_classifier('many', ARRAY(SELECT 'label ' || i FROM generate_series(1, 26) i), model => 'm')",
    );
    let amount = "targets => '{\"amount\": \"amount\"}', task => 'sums'";
    let cases = [
        (
            "short",
            "ALTER answer TYPE varchar(5)",
            "'answer', 'words'",
            "no answer fits the columns: field \"answer\": \"3",
            "22001",
        ),
        (
            "dom",
            "ALTER answer TYPE word",
            "'answer', 'words'",
            "no answer fits the columns: field \"answer\": \"3",
            "23514",
        ),
        ("checked", "ADD CHECK (answer !~ ' ')", "'answer', 'words'", "rows with error 23514", "23514"),
        ("labels", "ADD CHECK (answer !~ ' ')", "'answer', 'many'", "", "23514"),
        ("sum", "ALTER due SET NOT NULL", amount, "no answer fits the columns: field \"amount\": \"3", "22003"),
    ];
    for (name, change, task, says, code) in cases {
        for options in ["{}", r#"{"isolation": "id", "max_attempts": 10, "max_rows_per_request": 100, "reuse": false}"#]
        {
            run(c, &format!("DROP TABLE IF EXISTS {name}"));
            numbered(c, name, 3001..=4000);
            run(c, &format!("UPDATE {name} SET due = 'today'; ALTER TABLE {name} {change}"));
            let before = bed.provider.stats().admitted;
            let job = one(c, &format!("SELECT llm_batch.backfill('{name}', 'body', {task}, options => '{options}')"));
            let p = wait_status(c, job, "paused");
            let paid = bed.provider.stats().admitted - before;
            assert!(paid <= 20, "{name} {options}: {paid} requests, {p:?}");
            assert!(p.reason.as_deref() == Some("label") && p.done + p.failed == 0, "{name} {options}: {p:?}");
            let last = text(c, &format!("SELECT last_error FROM llm_batch.progress WHERE job_id = {job}"));
            let is_said = last.starts_with(says) && last.contains(&format!(": {code}: "));
            assert!(is_said && last.ends_with(&format!(", then call llm_batch.resume({job})")), "{name}: {last}");
        }
    }
    // Mended, it goes on where it was.
    run(c, "ALTER TABLE checked DROP CONSTRAINT checked_answer_check");
    let job = one(c, "SELECT max(job_id) FROM llm_batch.progress WHERE relation = 'checked'");
    run(c, &format!("SELECT llm_batch.resume({job})"));
    assert_eq!(bed.done(job).done, 1000);
}
