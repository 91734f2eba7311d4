//! What goes wrong, and what was not sent then.

use llm_fake_provider::Fault;
use pg_llm_batch_e2e::wait_until;
use postgres::Client;

use super::{questions, settle};
use crate::common::{Bed, PATIENCE, error, one, run, slow, text};

#[test]
fn what_goes_wrong_is_told_in_its_place() {
    let bed = Bed::with("batch_errors", slow(5));
    let c = &mut bed.connect();
    questions(c, 200);
    let select = "SELECT count(llm_classify(body, 'topic')) FROM t WHERE id > 0";
    // A row without an answer is NULL, with a warning; or an error, if the task says so.
    run(c, "SELECT llm_batch.alter_classifier('topic', options => '{\"max_attempts\": 1, \"reuse\": false}')");
    bed.provider.script([Some(Fault::DropId)]);
    assert_eq!(one(c, select), 199);
    run(
        c,
        "SELECT llm_batch.alter_classifier('topic', options => '{\"max_attempts\": 1, \"reuse\": false, \"on_error\": \"error\"}')",
    );
    for setting in ["on", "off"] {
        run(c, &format!("SET llm_batch.enable_batch_scan = {setting}"));
        settle(&bed);
        bed.provider.script([Some(Fault::DropId)]);
        let e = error(c, select);
        assert_eq!((e.0.as_str(), e.1.as_str()), ("22000", "the model gave no answer for a text"), "{e:?}");
        assert!(e.2.contains("no_answer") && e.3.contains("on_error"), "{e:?}");
    }
    run(
        c,
        "RESET llm_batch.enable_batch_scan; SELECT llm_batch.alter_classifier('topic', options => '{\"reuse\": false}')",
    );
    assert_eq!(error(c, "SELECT llm_classify(body, 'nothing') FROM t").0, "42704");
    assert_eq!(error(c, "SELECT llm_classify(body, ARRAY['a', 'b'], '{\"x\": 1}') FROM t").0, "22023");
    // An error behind the rows that a limit takes is nobody's.
    let limited = "SELECT llm_classify(body || 1 / (5 - id), 'topic') FROM t ORDER BY id LIMIT 4";
    assert_eq!(c.query(limited, &[]).unwrap().len(), 4);
    assert_eq!(error(c, "SELECT llm_classify(body || 1 / (5 - id), 'topic') FROM t").0, "22012");
    // A budget.
    run(c, "SET llm_batch.statement_max_cost = 0.0004");
    bed.provider.reset_stats();
    let e = error(c, select);
    assert!(e.0 == "53400" && e.2.contains("of $0.0004"), "{e:?}");
    let stats = bed.provider.stats();
    assert!(stats.requests > 0 && stats.rows.len() < 200, "{stats:?}");
    // Each fetch is a statement, with a budget of its own.
    run(c, "BEGIN; DECLARE x CURSOR FOR SELECT id, llm_classify(body, 'topic') topic FROM t");
    for _ in 0..4 {
        assert_eq!(c.query("FETCH 20 FROM x", &[]).unwrap().len(), 20);
    }
    run(c, "COMMIT; RESET llm_batch.statement_max_cost");
    // A wrong key, in the middle.
    bed.provider.configure(|config| config.api_key = Some("another".to_owned()));
    let e = error(c, select);
    assert_eq!(e.0, "28000", "{e:?}");
    bed.provider.configure(|config| config.api_key = None);
    assert_eq!(one(c, select), 200);
}

#[test]
fn what_was_not_sent_is_withdrawn() {
    let bed = Bed::new("batch_withdrawn");
    let c = &mut bed.connect();
    questions(c, 1_000);
    let witness = &mut bed.connect();
    // One request at a time, so that rows wait.
    run(c, "SELECT llm_batch.alter_model('m', max_concurrent_requests => 1)");
    let queued = |witness: &mut Client| one(witness, "SELECT coalesce(sum(queued), 0)::bigint FROM llm_batch.activity");
    let quiet = |witness: &mut Client, what: &str| {
        wait_until("what waits is withdrawn", PATIENCE, || queued(witness), |n| *n == 0);
        bed.provider.release();
        settle(&bed);
        // A later question is answered after the rows that would have been sent before it.
        let before = bed.provider.stats().requests;
        let one_more = "SELECT llm_classify('#r777777:bug# ' || clock_timestamp(), 'topic')";
        assert_eq!(text(witness, one_more), "bug", "{what}");
        assert_eq!(bed.provider.stats().requests, before + 1, "{what}");
    };
    for what in ["cancel", "terminate"] {
        let c = &mut bed.connect();
        bed.provider.hold();
        let pid = one(c, "SELECT pg_backend_pid()::bigint");
        std::thread::scope(|scope| {
            let waiting = scope
                .spawn(|| c.batch_execute(&format!("UPDATE t SET topic = llm_classify(body || '{what}', 'topic')")));
            wait_until("rows wait", PATIENCE, || queued(witness), |n| *n > 500);
            run(witness, &format!("SELECT pg_{what}_backend({pid})"));
            let e = waiting.join().unwrap().unwrap_err();
            // A terminated session may find the connection closed, and not why.
            assert!(e.is_closed() || e.code().is_some_and(|c| ["57014", "57P01"].contains(&c.code())), "{what}: {e:?}");
        });
        quiet(witness, what);
        // One request was held, and one may have been on its way.
        assert!(bed.provider.stats().rows.len() <= 100 + 1);
        bed.provider.reset_stats();
    }
    // A cursor that is closed early has read no more than it may be asked for next.
    run(
        c,
        "BEGIN; DECLARE x CURSOR FOR SELECT llm_classify(body || 'cursor', 'topic') FROM t; FETCH 1 FROM x; CLOSE x; COMMIT",
    );
    quiet(witness, "cursor");
    assert_eq!(bed.provider.stats().rows.len(), 10 + 1);
    // An error in the middle, in the first request's rows: of the thousand in hand no more is asked than the next has.
    bed.provider.reset_stats();
    bed.provider.hold_after(1);
    assert_eq!(error(c, "SELECT 1 / (40 - id), llm_classify(body || 'error', 'topic') FROM t").0, "22012");
    quiet(witness, "error");
    assert!(bed.provider.stats().rows.len() <= 100 + 1);
}
