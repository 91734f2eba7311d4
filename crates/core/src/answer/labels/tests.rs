//! Readings of answers, by kind and by property.

use super::Verdict::{Contradicted, Label, Missing, UnknownCode};
use super::*;
use crate::options::Codes;
use crate::{prompt, task, thinking};
use proptest::prelude::*;

/// Reads an answer; one to another request says nothing of any row.
fn read(text: &str, ids: &[u16], legend: &Legend) -> Vec<Verdict> {
    super::read(&thinking::spoken(text), ids, legend).unwrap_or_else(|| vec![Missing; ids.len()])
}

fn legend() -> Legend {
    let labels = task::labels_from_json(&serde_json::json!(["billing", "bug", "3", "true"])).unwrap();
    Legend::new(&labels, Codes::Words, &str::len)
}

/// Shapes that models write.
#[derive(Clone, Copy)]
enum Shape {
    Map,
    Objects,
    Strings,
}

const SHAPES: [Shape; 3] = [Shape::Map, Shape::Objects, Shape::Strings];

fn in_shape(shape: Shape, rows: &[(u16, &str)]) -> String {
    let row = |(id, code): &(u16, &str)| match shape {
        Shape::Map => format!("\"{id}\":{}", prompt::quote(code)),
        Shape::Objects => format!("{{\"i\":{id},\"c\":{}}}", prompt::quote(code)),
        Shape::Strings => prompt::quote(&format!("{id}{code}")),
    };
    let rows = rows.iter().map(row).collect::<Vec<_>>().join(",");
    if matches!(shape, Shape::Map) { format!("{{{rows}}}") } else { format!("{{\"r\":[{rows}]}}") }
}

fn check(text: &str, want: [Verdict; 3]) {
    assert_eq!(read(text, &[417, 902, 118], &legend()), want, "{text}");
}

#[test]
fn every_shape_is_read() {
    let want = [Label(0), Label(1), Missing];
    check(r#"{"417":"billing","902":"bug"}"#, want);
    check(r#"{"r":[{"i":417,"c":"billing"},{"c":"bug","i":"902"}]}"#, want);
    check(r#"{"r":["417billing","902bug"]}"#, want);
    check("Sure! Here it is:\n```json\n{ \"417\": \"Billing\",\n \"902\": \"bug\" }\n```\nAnything else?", want);
    check(r#"{"answers":{"417":"billing","902":"bug"}}"#, want);
    check(r#"Rows {417} and {902}: {"417":"billing"} {"902":"bug"}"#, want);
    check(r#"{"417":3,"902":true}"#, [Label(2), Label(3), Missing]);
}

#[test]
fn dropped_invented_doubled_and_unknown_answers_touch_no_other_row() {
    check(r#"{"417":"billing","903":"bug"}"#, [Label(0), Missing, Missing]);
    check(r#"{"417":"billing","902":"bug","417":"billing"}"#, [Label(0), Label(1), Missing]);
    check(r#"{"417":"billing","902":"bug","417":"bug"}"#, [Contradicted, Label(1), Missing]);
    check(r#"{"417":"nonsense","902":"bug"}"#, [UnknownCode, Label(1), Missing]);
    check(r#"{"417":"nonsense","417":"bug"}"#, [Contradicted, Missing, Missing]);
    check(r#"{"417":null,"902":["bug"],"0118":"bug"}"#, [Missing, Label(1), Missing]);
    check(r#"{"417":"billing"} on second thought {"417":"bug"}"#, [Contradicted, Missing, Missing]);
}

#[test]
fn what_is_complete_in_a_cut_text_is_kept() {
    check(r#"{"417":"billing","902":"bu"#, [Label(0), Missing, Missing]);
    check(r#"{"r":[{"i":417,"c":"billing"},{"i":902,"c":"#, [Label(0), Missing, Missing]);
    check(r#"{"r":["417billing","902b"#, [Label(0), Missing, Missing]);
    check(r#"{"417":"billing","902":3"#, [Label(0), Missing, Missing]);
    check(r#"{"417":"billing","902":bug"#, [Label(0), Missing, Missing]);
}

#[test]
fn an_answer_to_another_request_is_none() {
    let legend = legend();
    let is_none = |text: &str, ids: &[u16]| super::read(text, ids, &legend).is_none();
    // Three of its rows are not ours, one has the number of one of ours.
    let others: [(u16, &str); 4] = [(417, "billing"), (200, "bug"), (201, "bug"), (202, "3")];
    let mut texts: Vec<String> = SHAPES.map(|shape| in_shape(shape, &others)).into();
    let lines = |between: &str| others.map(|(id, label)| format!("{id}{between}{label}")).join("\n");
    texts.extend([": ", " = ", " - "].map(lines));
    texts.push(lines(": ").replace("20", "- 20").replace("417", "- 417"));
    texts.push(
        r#"[{"id":417,"label":"bug"},{"id":200,"label":"bug"},{"id":201,"label":"bug"},{"id":202,"label":"bug"}]"#
            .into(),
    );
    for text in texts {
        assert!(is_none(&text, &[417]) && is_none(&text, &[417, 902, 118]), "{text}");
        assert!(!is_none(&text, &[417, 200]) && !is_none(&text, &[417, 200, 201, 202]), "{text}");
    }
    // Nothing of it is ours.
    assert!(is_none(r#"{"200":"bug"}"#, &[417]) && is_none("200: bug", &[417, 902]));
    assert!(!is_none("I can't say.", &[417]) && !is_none(r#"{"417":"none of them"}"#, &[417]));
    // Invented rows beside right ones, numbers in prose and numbers of other lengths say nothing.
    check(
        r#"{"417":"billing","902":"bug","118":"3","200":"bug","201":"bug","202":"bug"}"#,
        [Label(0), Label(1), Label(2)],
    );
    check("417: billing\n200: bug\n201: bug", [Label(0), Missing, Missing]);
    check(
        "{\"417\":\"billing\"}\nOrder 200\n201 pieces\n300: see above\n400 - 500: none\n1: bug\n2: bug\n3: bug\n",
        [Label(0), Missing, Missing],
    );
}

#[test]
fn hostile_texts_are_bounded() {
    let deep = "{\"a\":".repeat(100_000);
    check(&deep, [Missing; 3]);
    check(&"{".repeat(1_000_000), [Missing; 3]);
    check("", [Missing; 3]);
    check(&"[1,\"'`//*".repeat(100_000), [Missing; 3]);
}

proptest! {
    #[test]
    fn never_panics(text in ".{0,200}", json in r#"[{}\[\]":,0-9a-z ]{0,200}"#) {
        read(&text, &[417], &legend());
        read(&json, &[417], &legend());
    }

    /// Only an id of the pack with a code of the legend says something: whatever else an answer holds, about other
    /// ids, with other labels or in other words, changes nothing.
    #[test]
    fn nothing_comes_back_but_ids_of_the_pack_with_codes_of_the_legend(
        codes in proptest::collection::vec(0usize..4, 1..20),
        foreign in proptest::collection::vec((0u16..2_000, "[a-z]{0,9}"), 0..20),
        places in proptest::collection::vec(0usize..40, 20),
        around in "[^{]{0,60}",
    ) {
        let ids: Vec<u16> = (100..).take(codes.len()).collect();
        let legend = legend();
        let of = |id: u16, code: &str| format!("\"{id}\":{}", prompt::quote(code));
        let mut pairs: Vec<String> = ids.iter().zip(&codes).map(|(id, c)| of(*id, &legend.codes()[*c])).collect();
        for ((id, code), at) in foreign.iter().zip(places).filter(|((id, _), _)| !ids.contains(id)) {
            pairs.insert(at.min(pairs.len()), of(*id, code));
            pairs.insert(at.min(pairs.len()), of(*id, "bug"));
        }
        let text = format!("{around}{{{}}}{around}", pairs.join(","));
        let others: HashSet<u16> = foreign.iter().map(|(id, _)| *id).filter(|id| (100..1000).contains(id)).collect();
        let others = others.iter().filter(|id| !ids.contains(id)).count();
        let whole: Option<Vec<Verdict>> = (others <= ids.len().max(2)).then(|| codes.iter().map(|c| Label(*c)).collect());
        prop_assert_eq!(super::read(&text, &ids, &legend), whole);
    }

    /// An answer in any shape is read back; a cut at any byte loses rows but never changes one.
    #[test]
    fn a_cut_never_changes_an_answer(codes in proptest::collection::vec(0usize..4, 1..40), cut in 0usize..2000, shape in 0usize..3) {
        let shape = SHAPES[shape];
        let ids: Vec<u16> = (100..).take(codes.len()).collect();
        let legend = legend();
        let rows: Vec<(u16, &str)> = ids.iter().zip(&codes).map(|(id, c)| (*id, legend.codes()[*c].as_str())).collect();
        let text = in_shape(shape, &rows);
        let whole: Vec<Verdict> = codes.iter().map(|c| Label(*c)).collect();
        prop_assert_eq!(read(&text, &ids, &legend), whole.clone());
        for (got, want) in read(&text[..cut.min(text.len())], &ids, &legend).iter().zip(whole) {
            prop_assert!(*got == Missing || *got == want);
        }
    }
}

/// Kinds of answers that people report of models and servers, for billing, bug and shipping of 417, 902 and 118, and
/// how many of the three are read.
const KINDS: [(&str, &str, usize); 58] = [
    ("as asked", r#"{"417":"billing","902":"bug","118":"shipping"}"#, 3),
    ("byte order mark", "\u{feff}{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}", 3),
    ("fence with a language", "```json\n{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}\n```", 3),
    ("prose around", "Sure! {\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"} Anything else?", 3),
    ("prose with brackets", "See [\"1] {\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}", 3),
    (
        "wrapped, with objects",
        r#"{"answers":{"417":{"label":"billing","confidence":0.9},"902":{"label":"bug","confidence":0.8},"118":{"label":"shipping","confidence":1}}}"#,
        3,
    ),
    (
        "objects, ids as numbers",
        r#"[{"id":417,"label":"billing"},{"id":902,"label":"bug"},{"id":118,"label":"shipping"}]"#,
        3,
    ),
    (
        "objects, ids as strings",
        r#"[{"id":"417","label":"billing"},{"id":"902","label":"bug"},{"id":"118","label":"shipping"}]"#,
        3,
    ),
    (
        "objects, any keys",
        r#"{"data":[{"ticket_no":417,"topic":"billing"},{"ticket_no":902,"topic":"bug"},{"ticket_no":118,"topic":"shipping"}]}"#,
        3,
    ),
    (
        "objects with texts and numbers",
        r#"[{"id":417,"text":"order 902: bug","label":"billing"},{"id":902,"text":"{\"118\":\"bug\"}","label":"bug"},{"id":118,"text":"x","label":"shipping"}]"#,
        3,
    ),
    (
        "objects nested",
        r#"[{"id":417,"result":{"label":"billing","p":0.9}},{"id":902,"result":{"label":"bug"}},{"id":118,"result":{"label":"shipping"}}]"#,
        3,
    ),
    ("lists of one", r#"{"417":["billing"],"902":["bug"],"118":["shipping"]}"#, 3),
    ("pairs as lists", r#"[[417,"billing"],["902","bug"],[118,"shipping",0.7]]"#, 3),
    ("Python's tuples", "[(417, 'billing'), (902, 'bug'), (118, 'shipping')]", 3),
    ("strings with both", r#"["417: billing","902 - bug","118shipping"]"#, 3),
    (
        "JSON lines",
        "{\"id\":417,\"label\":\"billing\"}\n{\"id\":902,\"label\":\"bug\"}\n{\"id\":118,\"label\":\"shipping\"}\n",
        3,
    ),
    ("maps, one a line", "{\"417\":\"billing\"}\n{\"902\":\"bug\"}\n{\"118\":\"shipping\"}", 3),
    ("Python's quotes", "{'417': 'billing', '902': 'bug', '118': 'shipping'}", 3),
    ("Python's None and True", "{'417': 'billing', '902': None, '118': 'shipping', 'done': True}", 2),
    ("keys and words without quotes", "{417: billing, 902: bug, 118: shipping}", 3),
    (
        "curly quotes",
        "{\u{201c}417\u{201d}: \u{201c}billing\u{201d}, \u{201c}902\u{201d}: \u{201c}bug\u{201d}, \u{201c}118\u{201d}: \u{201c}shipping\u{201d}}",
        3,
    ),
    ("comma at the end", r#"{"417":"billing","902":"bug","118":"shipping",}"#, 3),
    ("lines without commas", "{\n\"417\": \"billing\"\n\"902\": \"bug\"\n\"118\": \"shipping\"\n}", 3),
    (
        "comments",
        "{\n\"417\": \"billing\", // charged twice, \"902\"\n\"902\": \"bug\", # breaks\n/* \"118\":\"bug\" */\"118\": \"shipping\"\n}",
        3,
    ),
    ("PHP's arrows", "[\n\"417\" => \"billing\",\n\"902\" => \"bug\",\n\"118\" => \"shipping\"\n]", 3),
    ("NaN beside", r#"{"417":"billing","902":"bug","118":"shipping","p":NaN}"#, 3),
    (
        "confidences in a map of their own",
        r#"{"labels":{"417":"billing","902":"bug","118":"shipping"},"p":{"417":0.9,"902":0.8,"118":1}}"#,
        3,
    ),
    (
        "the same twice",
        r#"{"417":"billing","902":"bug","118":"shipping"}{"417":"billing","902":"bug","118":"shipping"}"#,
        3,
    ),
    ("JSON in a string", r#""{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}""#, 3),
    ("JSON in a member", r#"{"output":"{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}"}"#, 3),
    ("case, stops and stars", r#"{"417":"Billing.","902":"**bug**","118":" SHIPPING "}"#, 3),
    ("named keys", r##"{"Row 417":"billing","#902":"bug","id: 118":"shipping"}"##, 3),
    ("rows under their labels", r#"{"billing":[417],"bug":["902"],"shipping":[118]}"#, 3),
    ("labels as keys of numbers: may be counts", r#"{"billing":417,"bug":902,"shipping":118}"#, 0),
    ("columns: may be shifted", r#"{"ids":[417,902,118],"labels":["billing","bug","shipping"]}"#, 0),
    ("labels alone: may be shifted", r#"["billing","bug","shipping"]"#, 0),
    ("cut off in the middle", r#"{"417":"billing","902":"bug","118":"shi"#, 2),
    (
        "cut off in an object",
        r#"[{"id":417,"label":"billing"},{"id":902,"label":"bug"},{"id":118,"label":"shipping""#,
        2,
    ),
    ("no brace at the end", r#"{"417":"billing","902":"bug","118":"shipping""#, 3),
    ("no brace at the beginning", r#""417":"billing","902":"bug","118":"shipping"}"#, 3),
    ("bold in a list", "Here you are:\n\n- 417: **billing**\n- 902: **bug**\n- 118: **shipping**\n\nLet me know!", 3),
    ("bold numbers", "* **417**: billing\n* **902**: bug\n* **118**: shipping\n", 3),
    ("an ordered list", "1. 417: billing\n2. 902: bug\n3. 118: shipping\n", 3),
    ("explained", "417: **billing** because of 902: bug\n902: **bug** - it breaks\n118: **shipping** (late)\n", 3),
    ("arrows", "417 -> billing\n902 -> bug\n118 -> shipping\n", 3),
    ("hash rockets", "\"417\" => \"billing\",\n\"902\" => \"bug\",\n\"118\" => \"shipping\"\n", 3),
    ("YAML", "417: billing\n902: bug\n118: shipping\n", 3),
    ("YAML in blocks", "- id: 417\n  label: billing\n- id: 902\n  label: bug\n- id: 118\n  label: shipping\n", 3),
    ("CSV", "id,label\n417,billing\n902,bug\n118,shipping\n", 3),
    ("a table", "| id | label |\n|---|---|\n| 417 | billing |\n| 902 | bug |\n| 118 | shipping |", 3),
    (
        "a table with texts",
        "| id | text | label |\n|---|:-:|---|\n| 417 | a | b | billing |\n| 902 | x | bug |\n| 118 | 417 | shipping |",
        1,
    ),
    ("numbers in brackets", "[417] billing\n[902] bug\n[118] shipping\n", 3),
    ("on one line", "417: billing, 902: bug, 118: shipping\n", 3),
    (
        "a thought before",
        "<think>{\"417\":\"bug\",\"902\":\"billing\"}</think>{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}",
        3,
    ),
    (
        "the end of a thought",
        "417 is a bug: {\"417\":\"bug\"}\n</think>\n{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}",
        3,
    ),
    ("a thought without an end", "<think>{\"417\":\"billing\",\"902\":\"bug\"", 0),
    (
        "channels",
        "<|channel|>analysis<|message|>{\"417\":\"bug\"}<|end|><|start|>assistant<|channel|>final<|message|>{\"417\":\"billing\",\"902\":\"bug\",\"118\":\"shipping\"}",
        3,
    ),
    ("corrected afterwards", "417: billing\n902: bug\n118: shipping\nNo: 417 => bug\n417 = bug\n", 2),
];

#[test]
fn kinds_of_answers_that_people_report() {
    let labels = task::labels_from_json(&serde_json::json!(["billing", "bug", "shipping"])).unwrap();
    let legend = Legend::new(&labels, Codes::Words, &str::len);
    let mut wrong = Vec::new();
    for (kind, text, want) in KINDS {
        let got = read(text, &[417, 902, 118], &legend);
        let right = (0..3).filter(|i| got[*i] == Label(*i)).count();
        let labels = got.iter().filter(|v| matches!(v, Label(_))).count();
        println!(
            "{kind:42} {right} of 3 read   {}",
            text.replace('\n', "\u{23ce}").chars().take(70).collect::<String>()
        );
        if right != want || labels != right {
            wrong.push((kind, got));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Ways of writing an answer. Quotes of a text are as a model would write them.
fn written(shape: usize, rows: &[(u16, &str, &str)]) -> String {
    let quoted = |text: &str| prompt::quote(text);
    let all = |between: &str, one: &dyn Fn(u16, &str, &str) -> String| {
        rows.iter().map(|(id, code, text)| one(*id, code, text)).collect::<Vec<_>>().join(between)
    };
    match shape {
        0 => format!("{{{}}}", all(",", &|id, c, _| format!("\"{id}\":\"{c}\""))),
        1 => format!(
            "{{\"answers\":{{{}}}}}",
            all(",", &|id, c, _| format!("\"{id}\":{{\"label\":\"{c}\",\"confidence\":0.9}}"))
        ),
        2 => format!("[{}]", all(",", &|id, c, t| format!("{{\"n\":{id},\"text\":{},\"k\":\"{c}\"}}", quoted(t)))),
        3 => all("\n", &|id, c, t| format!("{{\"text\":{},\"label\":\"{c}\",\"id\":\"{id}\"}}", quoted(t))),
        4 => format!("{{{}}}", all(", ", &|id, c, _| format!("'{id}': '{c}'"))),
        5 => format!("Here:\n\n{}\n\nDone.", all("\n", &|id, c, _| format!("- {id}: **{c}**"))),
        6 => format!("| id | label |\n|---|---|\n{}\n", all("\n", &|id, c, _| format!("| {id} | {c} |"))),
        7 => format!("{}\n", all("\n", &|id, c, t| format!("{id}: **{c}** ({})", quoted(t)))),
        8 => format!(
            "<think>{}</think>{{{}}}",
            all(" ", &|id, _, t| format!("{{\"{id}\":\"bug\"}} {t}")),
            all(",", &|id, c, _| format!("\"{id}\":\"{c}\""))
        ),
        9 => format!(
            "{{\"417x\":0,{}}}",
            all(",", &|id, c, t| format!("\"{id}\":{{\"reason\":{},\"label\":\"{c}\"}}", quoted(t)))
        ),
        _ => format!("{{\"r\":[{}]}}", all(",", &|id, c, _| format!("\"{id}{c}\""))),
    }
}

proptest! {
    /// Any shape, in any order, with rows dropped, doubled and invented, and with texts that hold numbers and labels of
    /// others: never a wrong row; and none is lost where nothing was dropped. A cut at any byte changes none.
    #[test]
    fn no_shape_gives_a_row_the_label_of_another(
        codes in proptest::collection::vec(0usize..4, 1..30),
        order in any::<prop::sample::Index>(),
        dropped in proptest::collection::vec(any::<bool>(), 30),
        texts in proptest::collection::vec((0u16..45, 0usize..4, 0usize..7), 30),
        shape in 0usize..11,
        cut in any::<prop::sample::Index>(),
    ) {
        let legend = legend();
        let code = |i: usize| legend.codes()[i].as_str();
        let text = |(id, label, kind): (u16, usize, usize)| match (id + 100, code(label), kind) {
            (n, c, 0) => format!("{n}: {c}"),
            (n, c, 1) => format!("my order {n}, {c}"),
            (n, c, 2) => format!("{{\"{n}\":\"{c}\"}}"),
            (n, c, 3) => format!("x\n{n}: {c}\n- {n}: **{c}**"),
            (n, c, 4) => format!("| {n} | {c} |"),
            (n, c, 5) => format!("\",\"{n}\":\"{c}\""),
            (n, _, _) => n.to_string(),
        };
        let ids: Vec<u16> = (100..).take(codes.len()).collect();
        let texts: Vec<String> = texts.into_iter().map(text).collect();
        let mut rows: Vec<(u16, &str, &str)> =
            ids.iter().zip(&codes).zip(&texts).map(|((id, c), t)| (*id, code(*c), t.as_str())).collect();
        let first = order.index(rows.len());
        rows.rotate_left(first);
        let doubled = rows[0];
        let mut kept: Vec<_> = rows.iter().zip(&dropped).filter(|(_, d)| !**d).map(|(r, _)| *r).collect();
        kept.push(doubled);
        kept.push((999, "bug", "x"));
        let answer = written(shape, &kept);
        let got = read(&answer, &ids, &legend);
        for (i, verdict) in got.iter().enumerate() {
            let is_there = kept.iter().any(|(id, ..)| *id == ids[i]);
            prop_assert!(!matches!(verdict, Label(l) if *l != codes[i] || !is_there), "{} {verdict:?}: {answer}", ids[i]);
            // A text that is a number asked, or a label, makes an object ambiguous.
            prop_assert!(!is_there || *verdict == Label(codes[i]) || matches!(shape, 2 | 3 | 7 | 9), "{} {verdict:?}: {answer}", ids[i]);
        }
        let cut = &answer[..answer.floor_char_boundary(cut.index(answer.len()))];
        for (i, verdict) in read(cut, &ids, &legend).iter().enumerate() {
            prop_assert!(!matches!(verdict, Label(l) if *l != codes[i]), "{} {verdict:?}: {cut}", ids[i]);
        }
    }
}
