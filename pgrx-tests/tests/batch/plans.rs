//! Plans: in the log, of long expressions, compiled.

use pg_llm_batch_e2e::wait_until;
use postgres::Client;

use super::{count_anew, explain, questions};
use crate::common::{Bed, PATIENCE, error, one, run, text};

#[test]
fn plans_in_the_log() {
    let bed = Bed::new("batch_log");
    let c = &mut bed.connect();
    questions(c, 20);
    // At the end of a SELECT there is no snapshot any more.
    match c.batch_execute("LOAD 'auto_explain'") {
        Err(e) => assert!(e.to_string().contains("auto_explain"), "{e}"),
        Ok(()) => {
            run(c, "SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on");
            assert_eq!(c.query("SELECT llm_classify(body, 'topic') FROM t WHERE id > 0", &[]).unwrap().len(), 20);
            assert_eq!(c.query("SELECT llm_classify(body, 'topic') FROM t WHERE id < 0", &[]).unwrap().len(), 0);
            let logged = |log: &String| log.matches("Call: llm_classify(body, 'topic'::text)").count() == 2;
            let log = wait_until("both plans are logged", PATIENCE, || bed.cluster.log(), logged);
            assert!(log.contains("Rows per Request: 50") && log.contains("Rows Sent: 20"), "{log}");
        }
    }
}

/// CPU time of a statement's process, in ns, whether the statement ends well or not.
fn cpu(c: &mut Client, sql: &str) -> u64 {
    let pid = one(c, "SELECT pg_backend_pid()::bigint");
    let spent = || {
        let schedstat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        schedstat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let before = spent();
    let _ = c.simple_query(sql);
    spent() - before
}

#[test]
fn a_case_of_many_arms() {
    let bed = Bed::new("batch_arms");
    let c = &mut bed.connect();
    questions(c, 60);
    let case = |arms: usize, call: &dyn Fn(usize) -> String| {
        let arms: String = (0..arms).map(|k| format!(" WHEN id % 50 = {k} THEN {}", call(k))).collect();
        format!("SELECT id, CASE{arms} END FROM t WHERE id < 70 ORDER BY id")
    };
    let classify = |k: usize| format!("llm_classify(body || ' {k}', 'topic')");
    // Eight times the arms take eight times the CPU, and not sixty times it, whether calls are alike or not. Before each,
    // the cache of what is known of functions is there.
    let filter = |k: usize| format!("llm_filter(ask, 'Is it {k}?')::text");
    for call in [&classify as &dyn Fn(usize) -> String, &filter, &|_| "llm_classify(body, 'topic')".to_owned()] {
        let mut least = |arms: usize| {
            let sql = format!("EXPLAIN {}", case(arms, call));
            (0..3).map(|_| cpu(c, &sql)).min().unwrap()
        };
        let (few, many) = (least(100), least(800));
        println!("100 arms: {} us, 800 arms: {} us", few / 1_000, many / 1_000);
        assert!(many < 20 * few, "{few} ns for 100 arms, {many} ns for 800 arms of {}", call(1));
    }
    // It can be cancelled meanwhile.
    let sql = format!("EXPLAIN {}", case(5_000, &classify));
    let all = cpu(c, &sql);
    run(c, "SET statement_timeout = '50 ms'");
    assert_eq!(error(c, &sql).0, "57014");
    let cancelled = cpu(c, &sql);
    assert!(2 * cancelled < all, "{cancelled} of {all} ns");
    run(c, "RESET statement_timeout");
    // The answers are the same, of the same rows.
    let sql = case(45, &classify);
    let rows = |c: &mut Client| {
        let rows = c.query(&sql, &[]).unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i32, Option<String>)>>()
    };
    count_anew(&bed);
    let with = rows(c);
    let asked = bed.provider.stats().rows;
    assert!(asked.len() == 55 && asked.values().all(|r| r.asked == 1), "{asked:?}");
    run(c, "SET llm_batch.enable_batch_scan = off");
    assert_eq!(with, rows(c));
    assert_eq!(with.iter().filter(|(id, label)| label.is_none() == (id % 50 >= 45)).count(), 60);
    // A condition is evaluated once for a row ahead of its turn and once in its turn, however many calls are behind it.
    run(
        c,
        "RESET llm_batch.enable_batch_scan; CREATE FUNCTION probe(int) RETURNS bool STABLE LANGUAGE plpgsql
             AS 'BEGIN RAISE NOTICE ''probed''; RETURN $1 < 0; END'",
    );
    let arms: String = (0..10).map(|k| format!(" WHEN probe(id + {k}) THEN {}", classify(k))).collect();
    let probed = format!("SET llm_batch.default_model = 'm'; SELECT CASE{arms} END FROM t WHERE id = 7");
    let said = String::from_utf8_lossy(&bed.cluster.psql("postgres", &probed).stderr).into_owned();
    assert_eq!(said.matches("NOTICE:  probed").count(), 20, "{said}");
}

#[test]
fn plans_are_compiled_as_without_our_functions() {
    let bed = Bed::new("batch_jit");
    let c = &mut bed.connect();
    questions(c, 2_000);
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{}'); SET jit = on");
    let select = "SELECT llm_classify(body, 'topic') FROM t";
    for _ in 0..2 {
        let plan = explain(c, "ANALYZE", select);
        assert!(plan.contains("LLM Batch") && !plan.contains("JIT:"), "{plan}");
    }
    if text(c, "SELECT pg_jit_available()::text") == "false" {
        return;
    }
    let cost_functions = |c: &mut Client, cost: &str| {
        for function in
            ["llm_classify(text, text)", "llm_classify(text, text[], jsonb)", "llm_filter(text, text, jsonb)"]
        {
            run(c, &format!("ALTER FUNCTION {function} COST {cost}"));
        }
    };
    // Compilation begins at the cost of a plan by itself.
    let by_itself = |c: &mut Client, sql: &str| -> f64 {
        cost_functions(c, "0.000001");
        let plan = explain(c, "COSTS", sql);
        cost_functions(c, "100000");
        let cost = plan.split("..").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        cost.parse().unwrap()
    };
    // A high cost makes costs alike, and another plan the first among them.
    run(
        c,
        "SET jit_optimize_above_cost = -1; SET jit_inline_above_cost = -1; SET enable_hashagg = off; SET enable_material = off",
    );
    let mut wrong = String::new();
    for sql in [
        select,
        "SELECT id FROM t WHERE llm_filter(ask, 'Is it?')",
        "SELECT id FROM t WHERE id % 2 = 0 AND llm_filter(ask, 'Is it?') AND llm_classify(body, 'topic') = 'bug'",
        "SELECT CASE WHEN id = 1 THEN llm_classify(body, 'topic') WHEN id = 2 THEN llm_filter(ask, 'Is it?')::text END FROM t",
        "SELECT count(*) FILTER (WHERE llm_classify(body, 'topic') = 'bug'), max(llm_classify(body, 'topic')) FROM t",
        "SELECT llm_classify(body, 'topic'), count(*) FROM t GROUP BY 1",
        "SELECT llm_classify(body, 'topic') FROM t LIMIT 1000",
        "SELECT llm_classify(string_agg(body, ''), 'topic') FROM t GROUP BY id % 10",
        "SELECT count(*) FROM t a, t b WHERE a.id + b.id < 100 AND llm_filter(a.ask, 'Is it?')",
        "SELECT (SELECT max(llm_classify(u.body, 'topic')) FROM t u WHERE u.id <= t.id) FROM t",
        "WITH c AS MATERIALIZED (SELECT llm_classify(body, 'topic') topic FROM t) SELECT * FROM c a, c b WHERE a = b",
        "SELECT llm_classify('a', 'topic') FROM t WHERE id = 7 UNION ALL SELECT llm_classify(body, 'topic') FROM t",
    ] {
        let cost = by_itself(c, sql);
        for (factor, is_compiled) in [(0.8, true), (1.25, false)] {
            run(c, &format!("SET jit_above_cost = {}", cost * factor));
            let plan = explain(c, "COSTS", sql);
            if plan.contains("JIT:") != is_compiled {
                wrong += &format!("above {factor} of {cost}: {sql}\n{plan}");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    run(c, "SET jit_above_cost = 0");
    assert!(explain(c, "ANALYZE", select).contains("JIT:"));
}
