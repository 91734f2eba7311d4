//! Shapes of answers that people met with models and servers of many kinds. A right value is taken where it can be no other;
//! else the row is asked again. No row gets a value that is another's, or a part of its own.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Verdict, read};
use crate::options::Options;
use crate::task::{Answer, Kind, Spec};

fn kind(name: &str, spec: Value) -> Box<dyn Kind> {
    Spec::from_json(name, &spec).unwrap().prepare(&Options::default(), &|s| s.len().div_ceil(4))
}

/// The values of the rows 417 and 902, joined; `-`: it is asked again.
fn values(text: &str, kind: &dyn Kind) -> [String; 2] {
    let said = read(text, &[417, 902], kind).unwrap_or_else(|| vec![Verdict::Missing; 2]);
    let mut values = said.into_iter().map(|verdict| match verdict {
        Verdict::Answer(Answer(values)) => {
            values.into_iter().map(|v| v.unwrap_or("NULL".into())).collect::<Vec<_>>().join("|")
        }
        _ => "-".to_owned(),
    });
    [values.next().unwrap(), values.next().unwrap()]
}

/// Tries answers; all that differ are told at once.
#[track_caller]
fn check(kind: &dyn Kind, cases: &[(&str, [&str; 2])]) {
    let differs = |(text, want): &&(&str, [&str; 2])| values(text, kind) != *want;
    let wrong: Vec<String> = cases
        .iter()
        .filter(differs)
        .map(|(text, want)| format!("{text}\n  is read as {:?}, not {want:?}", values(text, kind)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn fields_in_many_shapes() {
    let kind = kind(
        "extract",
        json!({"fields": {"kind": {"labels": ["billing", "bug"]}, "amount": "numeric", "due_date": "date"}}),
    );
    let both = ["bug|12.5|2026-01-02", "billing|NULL|NULL"];
    let read = [
        r#"{"417":["bug",12.5,"2026-01-02"],"902":["billing",null,null]}"#,
        "\u{feff}```json\n{\"417\":[\"bug\",12.5,\"2026-01-02\"],\"902\":[\"billing\",null,null]}\n```",
        r#"{"json_input":{"417":["bug",12.5,"2026-01-02"],"902":["billing",null,null]}}"#,
        r#"{"type":"object","properties":{"417":["bug",12.5,"2026-01-02"],"902":["billing",null,null]}}"#,
        r#"{"417":["bug",12.5,"2026-01-02"],"902":["billing",null,null]}{"417":["bug",12.5,"2026-01-02"],"902":["billing",null,null]}"#,
        r#""{\"417\":[\"bug\",12.5,\"2026-01-02\"],\"902\":[\"billing\",null,null]}""#,
        // The row within something of its own.
        r#"{"417":{"kind":"bug","amount":12.5,"due_date":"2026-01-02"},"902":[{"kind":"billing","amount":null,"due_date":null}]}"#,
        r#"{"417":{"fields":{"kind":"bug","amount":12.5,"due_date":"2026-01-02"}},"902":{"values":["billing",null,null]}}"#,
        r#"{"417":"[\"bug\",12.5,\"2026-01-02\"]","902":"{\"kind\":\"billing\",\"amount\":null,\"due_date\":null}"}"#,
        // Objects with their numbers.
        r#"[{"id":417,"kind":"bug","amount":12.5,"due_date":"2026-01-02"},{"id":902,"kind":"billing","amount":null,"due_date":null}]"#,
        "{\"id\":417,\"kind\":\"bug\",\"amount\":12.5,\"due_date\":\"2026-01-02\"}\n{\"kind\":\"billing\",\"amount\":null,\"due_date\":null,\"id\":\"902\"}\n",
        // Names in another style.
        r#"{"417":{"Kind":"Bug","Amount":12.5,"Due Date":"2026-01-02"},"902":{"KIND":"billing","amount":null,"dueDate":null}}"#,
        // JSON but for a trifle.
        r#"{"417":["bug",12.5,"2026-01-02",],"902":["billing",null,null],}"#,
        "{\"417\":[\"bug\",12.5,\"2026-01-02\"], // \"it\" breaks\n/* nothing, else */ \"902\":[\"billing\" /* ] */,null,null] // end\n}",
        r#"{"417":["bug",12.5,"2026-01-02"],"902":["billing",None,None]}"#,
        r#"{417:["bug",12.5,"2026-01-02"], 902 : ["billing",null,null]}"#,
        // Values as strings, and words for none.
        r#"{"417":["Bug","12.5","2026-01-02"],"902":["billing","N/A",""]}"#,
        r#"{"417":["bug","$12.5","2026-01-02"],"902":["billing","null","unknown"]}"#,
    ];
    check(&*kind, &read.map(|text| (text, both)));
    // What may be two things, or is none.
    let asked_again = [
        r#"{"417":["bug","1,234","2026-01-02"],"902":["billing","12 %",null]}"#,
        r#"{"417":["bug",1,234,"2026-01-02"],"902":["billing",12 %,null]}"#,
        r#"{"417":["bug",12.5,"2026-01-02T09:00:00"],"902":["billing",null,"02.01.2026"]}"#,
        r#"{"417":[["bug"],12.5,"2026-01-02"],"902":["billing",[],null]}"#,
        r#"{"417":{"art":"bug","betrag":12.5,"faellig":"2026-01-02"},"902":{"kind":"billing","amount":null}}"#,
        r#"{"417":["bug",12.5],"902":["billing",null,null,null]}"#,
        r#"{"properties":{"417":{"type":"array","items":{"anyOf":[{"type":"string"}]}},"902":{"kind":{"type":"string"},"amount":{"type":"number"},"due_date":{"type":"string"}}}}"#,
        "| id | kind | amount | due_date |\n|---|---|---|---|\n| 417 | bug | 12.5 | 2026-01-02 |\n| 902 | billing | | |",
        "{\u{201c}417\u{201d}:[\u{201c}bug\u{201d},12.5,\u{201c}2026-01-02\u{201d}]}",
        "{'417':['bug',12.5,'2026-01-02'],'902':['billing',None,None]}",
        r#"[["bug",12.5,"2026-01-02"],["billing",null,null]]"#,
        r#"[{"kind":"bug","amount":12.5,"due_date":"2026-01-02"},{"kind":"billing","amount":null,"due_date":null}]"#,
    ];
    check(&*kind, &asked_again.map(|text| (text, ["-", "-"])));
}

#[test]
fn fields_that_resemble_each_other() {
    let dates = kind("extract", json!({"fields": {"start": "date", "end": "date"}}));
    let both = ["2026-01-02|2026-03-04", "2026-01-02|NULL"];
    let read = [
        r#"{"417":["2026-01-02","end","2026-03-04"],"902":["2026-01-02","end",null]}"#,
        r#"{"417":["2026-01-02",{"end":"2026-03-04"}],"902":["2026-01-02",{"END":"n/a"}]}"#,
        r#"{"417":[{"end":"2026-03-04","start":"2026-01-02"}],"902":{"row":{"start":"2026-01-02","end":"None"}}}"#,
    ];
    check(&*dates, &read.map(|text| (text, both)));
    let asked_again = [
        r#"{"417":["2026-01-02","2026-03-04"],"902":["2026-01-02",null]}"#,
        r#"{"417":["2026-01-02",{"begin":"2026-03-04"}],"902":["2026-01-02",{"end":null,"start":null}]}"#,
        r#"{"417":[{"start":"2026-01-02"},{"end":"2026-03-04"}],"902":["n/a"]}"#,
    ];
    check(&*dates, &asked_again.map(|text| (text, ["-", "-"])));
    // Beside a text, a string in a number's place may be the text.
    let beside = kind("extract", json!({"fields": {"title": "text", "amount": "numeric"}}));
    check(
        &*beside,
        &[
            (r#"{"417":["x","n/a"],"902":["",5]}"#, ["-", "NULL|5"]),
            (r#"{"417":["n/a",null],"902":["12","$5"]}"#, ["n/a|NULL", "-"]),
        ],
    );
    // A word that is a label is that, whatever it says.
    let labels = kind("extract", json!({"fields": {"kind": {"labels": ["bug", "unknown"]}, "due": "date"}}));
    check(
        &*labels,
        &[
            (r#"{"417":["unknown",null],"902":["bug","unknown"]}"#, ["unknown|NULL", "-"]),
            (r#"{"417":["n/a","n/a"],"902":[null,"none"]}"#, ["NULL|NULL", "NULL|NULL"]),
        ],
    );
    // Two names that differ in their style alone.
    let alike = kind("extract", json!({"fields": {"due_date": "date", "duedate": "integer"}}));
    check(
        &*alike,
        &[(
            r#"{"417":{"due_date":"2026-01-02","duedate":1},"902":{"dueDate":"2026-01-02","due date":1}}"#,
            ["2026-01-02|1", "-"],
        )],
    );
}

#[test]
fn texts_in_many_shapes() {
    let texts = kind("generate", json!({"instruction": "x"}));
    let read = [
        r#"{"417":{"text":"one"},"902":{"Answer":"two"}}"#,
        r#"{"response":{"response":{"417":"one","902":"two"}}}"#,
        "{\"id\":417,\"text\":\"one\"}\n{\"id\":902,\"summary\":\"two\"}",
        r#"{417:"one",902:"two"}"#,
        "{\"417\":\"one\", // \"the first\"\n\"902\":\"two\" /* , */}",
        r#"{"417":"one","902":"two",}"#,
    ];
    check(&*texts, &read.map(|text| (text, ["one", "two"])));
    let asked_again = [
        r#"{"417":{"type":"string"},"902":{"text":"the input","summary":"two"}}"#,
        r#"{"properties":{"417":{"type":"string"},"902":{"type":"string"}},"required":["417","902"]}"#,
        r#"{"417":["one"],"902":null}"#,
        "{\u{201c}417\u{201d}: \u{201c}one\u{201d}}",
    ];
    check(&*texts, &asked_again.map(|text| (text, ["-", "-"])));
    check(
        &*texts,
        &[
            (r#"{"417":"it\'s","902":"a\u2028b"}"#, ["it's", "a\u{2028}b"]),
            // A quote that ends a text for JSON alone: „…" as in German, and others before a comma.
            ("{\"417\":\"Er sagte \u{201e}Halt\", dann ging er.\",\"902\":\"two\"}", ["-", "-"]),
            ("{\"417\":\"He said \"stop\", then left.\",\n\"902\":\"two\"}", ["-", "-"]),
            ("{\"417\":\"\u{201e}Halt\", so {\"902\":\"evil\"} ging es\",\"902\":\"two\"}", ["-", "-"]),
            ("{\"902\":\"two\",\"417\":\"\u{201e}Halt\", \"dann\" ging er\"}", ["-", "two"]),
            ("{\"902\":\"two\",\"417\":\"see \"// here", ["-", "two"]),
            // Cut off behind a quote, which may be one of the text.
            ("{\"902\":\"two\",\"417\":\"\u{201e}Halt\"", ["-", "two"]),
            ("{\"902\":\"two\",\"417\":\"\u{201e}Halt\",", ["-", "two"]),
        ],
    );
}

#[test]
fn scores_in_many_shapes() {
    let scores = kind("score", json!({"instruction": "x", "low": 0, "high": 5000}));
    let read = [
        r#"{"417":{"score":7},"902":{"reason":"so \"high\"","score":"1,234.5"}}"#,
        r#"[{"id":417,"score":7,"reason":"low"},{"id":902,"value":1234.5}]"#,
        "{\"id\":417,\"score\":7}\n{\"id\":902,\"score\":1234.5}",
        "{\"417\":7, // low\n\"902\":1234.5 // high\n}",
    ];
    check(&*scores, &read.map(|text| (text, ["7", "1234.5"])));
    check(
        &*scores,
        &[
            // A comma within a number.
            (r#"{"417":1,234,"902":7}"#, ["-", "-"]),
            (r#"{"902":7,"417":1,234}"#, ["-", "7"]),
            (r#"{"902":7,"417":1,"#, ["-", "7"]),
            (r#"{"417":"12 %","902":12 %}"#, ["-", "-"]),
            (r#"{"417":{"score":1,"Score":2},"902":{"low":0,"high":1}}"#, ["-", "-"]),
            (r#"{"417":"7/10","902":[7]}"#, ["-", "-"]),
        ],
    );
}

proptest! {
    /// A model that does not escape the quotes in its texts loses rows, and no row gets a part of its text.
    #[test]
    fn a_text_is_read_whole_or_not_at_all(
        texts in proptest::collection::vec(proptest::collection::vec(0usize..9, 1..6), 2),
        spaces: bool,
    ) {
        const PARTS: [&str; 9] = ["so", "\"so\"", "\u{201e}so\"", "\u{201c}so\"", ",", ".", "{\"902\":\"evil\"}", "\"", "// so"];
        let space = if spaces { " " } else { "" };
        let text = |parts: &Vec<usize>| parts.iter().map(|i| PARTS[*i]).collect::<Vec<_>>().join(space);
        let texts = [text(&texts[0]), text(&texts[1])];
        let kind = kind("generate", json!({"instruction": "x"}));
        let answer = format!("{{\"417\":\"{}\",\"902\":\"{}\"}}", texts[0], texts[1]);
        for (got, text) in values(&answer, &*kind).iter().zip(&texts) {
            prop_assert!(got == "-" || got == text, "{answer}: {got}");
        }
    }
}
