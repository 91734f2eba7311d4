//! Endpoints for decisions: closed questions about one input, each answered by one of its choices. Nothing is written, so
//! nothing but the request is paid for.
//!
//! The input has the task and the numbered rows; a question stands for a row and is called by the row's number. What comes
//! back is rewritten as the answers of a chat are: an object of numbers and labels, or places on a scale. So everything
//! behind this knows one form of answers, and holds each row's label against its task.

use serde_json::{Map, Value, json};

use super::{Reply, Unread, Usage, without_mark};
use crate::choices::Choices;
use crate::members::Members;
use crate::{CountTokens, parts};

/// Bytes of the answer to a question beside its labels, and of a label in it beside its text: a probability, and the signs.
const ANSWER_BYTES: usize = 128;
const CHOICE_BYTES: usize = 64;
/// Bytes of a label in JSON for each of its own, where all that is not ASCII is escaped.
const ESCAPED: usize = 3;
/// Bytes of the answers of a request, about.
const MOST_ANSWERS: usize = 3 << 20;
/// Parts of the answer to a question, and for each of its choices.
const PARTS: usize = 20;
const CHOICE_PARTS: usize = 8;
/// Bytes of an answer for each token that it would have in a chat.
const BYTES_PER_TOKEN: usize = 64;

/// The part of a dialect that decides.
pub trait Decisions: Sync {
    /// Its address. `base`: without a slash at its end.
    fn url(&self, base: &str) -> String {
        format!("{base}/decisions")
    }

    /// Most questions of a request.
    fn most_questions(&self) -> usize;

    /// The body of a request.
    fn body(&self, questions: &Questions) -> Value;

    /// Reads the body of a 2xx to a request about the rows with these numbers: the reply's text is an object of numbers and
    /// labels.
    ///
    /// # Errors
    /// If it is no answer, or carries an error.
    fn reply(&self, body: &[u8], ids: &[u16]) -> Result<Reply, Unread>;
}

/// The contents of a request for decisions.
#[derive(Debug)]
pub struct Questions<'a> {
    /// The provider's name of the model.
    pub model: &'a str,
    /// The task and the numbered rows.
    pub input: &'a str,
    /// The numbers of the rows, each of which is asked about.
    pub ids: &'a [u16],
    /// The labels, or the levels, to choose from.
    pub choices: Choices<'a>,
    /// Further parameters, as the user set them for the model.
    pub parameters: &'a Map<String, Value>,
}

impl Questions<'_> {
    /// A body with these members, and those of the user's parameters that a request for decisions may have: a model that
    /// answers chats as well may have others, which are refused here.
    pub(super) fn body<const N: usize>(&self, own: [(&str, Value); N], may_have: &[&str]) -> Value {
        let theirs = self.parameters.iter().filter(|(key, _)| may_have.contains(&key.as_str()));
        let theirs = theirs.map(|(key, value)| (key.clone(), value.clone()));
        theirs.chain(own.into_iter().map(|(key, value)| (key.to_owned(), value))).collect::<Map<_, _>>().into()
    }
}

/// The words of the question about a row.
pub(super) fn instructions(id: u16, choices: Choices) -> String {
    let what = if choices.are_levels { "What is the score of" } else { "Which label is right for" };
    format!("{what} text {id}?")
}

/// The question about a row in a list of such.
pub(super) fn question(id: u16, choices: Choices) -> Value {
    let (kind, members, name) =
        if choices.are_levels { ("score", "levels", "label") } else { ("choice", "choices", "value") };
    let all: Vec<Value> = choices.names.iter().map(|choice| json!({name: choice})).collect();
    json!({"type": kind, "name": id.to_string(), "instructions": instructions(id, choices), members: all})
}

/// The questions about rows as members of an object, by the rows' numbers. `description`: what stands behind each label, in
/// place of its description.
pub(super) fn by_number(ids: &[u16], choices: Choices, description: &Value) -> Value {
    let kind = if choices.are_levels { "score" } else { "choice" };
    let criteria = if choices.are_levels {
        json!(choices.names)
    } else {
        choices.names.iter().map(|label| (label.clone(), description.clone())).collect::<Map<_, _>>().into()
    };
    let question = |id: &u16| {
        let asked = json!({"type": kind, "instructions": instructions(*id, choices), "criteria": criteria});
        (id.to_string(), asked)
    };
    ids.iter().map(question).collect::<Map<_, _>>().into()
}

/// Tokens of a question, by our count.
pub fn tokens(choices: Choices, count: CountTokens) -> usize {
    count(&question(417, choices).to_string())
}

/// Bytes of the answer to a question.
fn answer_bytes(choices: Choices) -> usize {
    ANSWER_BYTES + choices.names.iter().map(|label| CHOICE_BYTES + ESCAPED * label.len()).sum::<usize>()
}

/// Most rows of a request: their answers are no larger than an answer may be, and have no more parts.
pub fn most_rows(choices: Choices) -> usize {
    let parts = parts::MOST / (PARTS + CHOICE_PARTS * choices.names.len());
    (MOST_ANSWERS / answer_bytes(choices)).min(parts).max(1)
}

/// Most tokens of an answer about so many rows, were it one of a chat.
pub fn most_answer(choices: Choices, rows: usize) -> u64 {
    (answer_bytes(choices) / BYTES_PER_TOKEN + 1).saturating_mul(rows) as u64
}

/// The probability of the choice in an answer, or of the likeliest level; what is called its confidence may be reckoned in
/// other ways.
fn confidence(answer: &Value) -> Option<f64> {
    let (chosen, all) = (&answer["choice"], &answer["probabilities"]);
    if chosen.is_null() && answer["score"].is_number() {
        let listed = all.as_array().into_iter().flatten().map(|one| &one["probability"]);
        let named = all.as_object().into_iter().flat_map(Map::values);
        let likeliest = listed.chain(named).filter_map(Value::as_f64).reduce(f64::max);
        return likeliest.or(answer["confidence"].as_f64()).filter(|given| (0.0..=1.0).contains(given));
    }
    let listed =
        all.as_array().and_then(|all| all.iter().find(|one| one["value"] == *chosen)).map(|one| &one["probability"]);
    let named = chosen.as_str().and_then(|chosen| all.get(chosen));
    let given = listed.or(named).filter(|given| given.is_number()).unwrap_or(&answer["confidence"]);
    given.as_f64().filter(|given| (0.0..=1.0).contains(given))
}

/// A reply with these answers, each under the name of its question. What has no number for a name belongs to no row.
pub(super) fn reply<'a>(answers: impl IntoIterator<Item = (String, &'a Value)>, ids: &[u16], usage: Usage) -> Reply {
    let (mut members, mut refused, mut confidences) = (Vec::new(), Vec::new(), Vec::new());
    let is_number = |name: &String| name.len() == 3 && name.bytes().all(|b| b.is_ascii_digit());
    for (name, answer) in answers.into_iter().filter(|(name, _)| is_number(name)) {
        match answer["type"].as_str() {
            Some("refusal") => refused.extend(ids.iter().filter(|id| id.to_string() == name)),
            None | Some("choice" | "score") => {
                confidences.extend(name.parse().ok().zip(confidence(answer)));
                let given = [&answer["choice"], &answer["score"]].into_iter().find(|given| !given.is_null());
                members.push(format!("{}:{}", Value::from(name), given.unwrap_or(&Value::Null)));
            }
            // It answers a question that was not asked.
            Some(_) => {}
        }
    }
    Reply {
        text: format!("{{{}}}", members.join(",")),
        usage,
        // None of it is the answer's.
        thought: usage.output,
        refused,
        confidences,
        ..Reply::default()
    }
}

/// The members of an object, as they are written; one that comes twice is not lost.
fn members(json: &[u8]) -> Vec<(String, String)> {
    let all: Option<Members> = serde_json::from_slice(json).ok();
    all.into_iter().flat_map(|all| all.0).map(|(name, value)| (name, value.get().to_owned())).collect()
}

/// A reply with the answers that are members of an object in a body, by the names of their questions.
pub(super) fn reply_by_number(body: &[u8], ids: &[u16], usage: Usage) -> Reply {
    let all = members(without_mark(body)).into_iter().filter(|(name, _)| name == "answers");
    let all = all.flat_map(|(_, json)| members(json.as_bytes()));
    let all: Vec<(String, Value)> =
        all.map(|(name, json)| (name, serde_json::from_str(&json).unwrap_or_default())).collect();
    reply(all.iter().map(|(name, answer)| (name.clone(), answer)), ids, usage)
}

/// The answers of a list, each with the name of its question. If none has a name they go by their order, as long as there
/// are as many as there are questions; else nobody knows which is whose.
pub(super) fn named<'a>(answers: &'a [Value], ids: &[u16]) -> Vec<(String, &'a Value)> {
    if answers.iter().all(|answer| answer["name"].is_null()) {
        let is_whole = answers.len() == ids.len();
        return ids.iter().map(u16::to_string).zip(answers).filter(|_| is_whole).collect();
    }
    let name = |answer: &Value| match &answer["name"] {
        Value::String(name) => Some(name.clone()),
        Value::Number(name) => Some(name.to_string()),
        _ => None,
    };
    answers.iter().filter_map(|answer| Some((name(answer)?, answer))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{self, Verdict};
    use crate::options::Options;
    use crate::task::{Answer, Spec};
    use proptest::prelude::*;

    const LABELS: [&str; 3] = ["billing", "bug \"x\"", "ü"];

    /// Reads a list of answers about the rows 417, 902 and 118.
    fn read(answers: &Value) -> (Vec<Verdict>, Vec<u16>) {
        let ids = [417, 902, 118];
        let spec = Spec::from_json("classify", &json!({"labels": LABELS})).unwrap();
        let options = Options::from_json([&json!({"ask_by": "decisions"})]).unwrap();
        let kind = spec.prepare(&options, &str::len);
        let all = answers.as_array().cloned().unwrap_or_default();
        let reply = reply(named(&all, &ids), &ids, Usage::default());
        let verdicts = answer::read(&reply.text, &ids, &*kind).unwrap_or_else(|| vec![Verdict::Missing; 3]);
        (verdicts, reply.refused)
    }

    fn label(of: usize) -> Verdict {
        Verdict::Answer(Answer(vec![Some(LABELS[of].to_owned())]))
    }

    fn choice(name: Value, of: &str) -> Value {
        json!({"type": "choice", "name": name, "choice": of, "confidence": 0.9, "probabilities": []})
    }

    #[test]
    fn answers_go_by_the_names_of_their_questions() {
        let [a, b, c] =
            [choice("417".into(), LABELS[0]), choice("902".into(), LABELS[1]), choice(118.into(), LABELS[2])];
        assert_eq!(read(&json!([c, b, a])).0, [label(0), label(1), label(2)]);
        // One is missing, one is of nobody, one has no name among others that have one.
        assert_eq!(read(&json!([a, choice("500".into(), "ü"), choice(Value::Null, "ü")])).0, {
            [label(0), Verdict::Missing, Verdict::Missing]
        });
        for name in ["0417", " 417", "id", "r417", "+17", ""] {
            assert_eq!(read(&json!([choice(name.into(), "ü")])).0, [const { Verdict::Missing }; 3], "{name}");
        }
        // Twice, with two labels.
        let (all, _) = read(&json!([a, choice("417".into(), LABELS[1]), b]));
        assert_eq!(all, [Verdict::Contradicted, label(1), Verdict::Missing]);
        // No label, or an answer to another question.
        let (all, _) =
            read(&json!([choice("417".into(), "spam"), {"type": "predicate", "name": "902", "probability": 1}]));
        assert!(matches!(all[0], Verdict::Unfit(_)) && all[1..] == [const { Verdict::Missing }; 2], "{all:?}");
        // Most of what it names was not asked: it answers another request.
        let others: Vec<Value> = (500..504).map(|n| choice(n.to_string().into(), "ü")).collect();
        assert_eq!(read(&json!(others)).0, [const { Verdict::Missing }; 3]);
    }

    #[test]
    fn without_names_they_go_by_their_order_if_they_are_as_many() {
        let all = |n: usize| (0..n).map(|i| choice(Value::Null, LABELS[i % 3])).collect::<Vec<_>>();
        assert_eq!(read(&json!(all(3))).0, [label(0), label(1), label(2)]);
        for n in [0, 1, 2, 4, 6] {
            assert_eq!(read(&json!(all(n))).0, [const { Verdict::Missing }; 3], "{n}");
        }
    }

    #[test]
    fn a_row_has_the_probability_of_its_choice() {
        let of = |confidence: Value, probabilities: Value| {
            let answer = json!({"choice": "ü", "confidence": confidence, "probabilities": probabilities});
            reply([("417".to_owned(), &answer)], &[417], Usage::default()).confidence(417)
        };
        let list = json!([{"value": "x", "probability": 0.3}, {"value": "ü", "probability": 0.7}]);
        assert_eq!((of(0.4.into(), list), of(0.4.into(), json!({"x": 0.3, "ü": 0.7}))), (Some(0.7), Some(0.7)));
        for none in
            [json!([]), json!({}), json!(["ü"]), json!({"ü": "0.7"}), json!({"x": 0.3}), json!(0.7), Value::Null]
        {
            assert_eq!(of(0.4.into(), none), Some(0.4));
        }
        for odd in [json!("0.4"), json!([0.4]), json!(1.5), json!(-0.1), json!(1e308), Value::Null] {
            assert_eq!(of(odd, json!({})), None);
        }
        assert_eq!(of(0.4.into(), json!({"ü": 1.5})), None);
        // Of two answers the lesser; another row's is not this one's.
        let answer = |confidence: f64| json!({"choice": "ü", "confidence": confidence});
        let all = [("417", &answer(0.9)), ("118", &answer(0.1)), ("417", &answer(0.8))];
        let reply = reply(all.map(|(name, answer)| (name.to_owned(), answer)), &[417, 118], Usage::default());
        assert_eq!((reply.confidence(417), reply.confidence(118), reply.confidence(902)), (Some(0.8), Some(0.1), None));
    }

    #[test]
    fn a_refusal_is_of_its_question() {
        let refusal = json!({"type": "refusal", "name": "902"});
        let (all, refused) = read(&json!([choice("417".into(), "billing"), refusal, {"type": "refusal", "name": "1"}]));
        assert_eq!((all[0].clone(), all[1].clone(), refused), (label(0), Verdict::Missing, vec![902]));
    }

    #[test]
    fn answers_are_within_what_is_read() {
        let longest: Vec<String> = (0..250).map(|n| format!("{n}{}", "ü".repeat(98))).collect();
        for names in [&longest[..], &longest[..2], &["a".to_owned(), "b".to_owned()]] {
            let choices = Choices { names, are_levels: false };
            let probabilities: Vec<Value> =
                names.iter().map(|c| json!({"value": c, "probability": 0.123_456_789_012_345_67})).collect();
            let answer = json!({"type": "choice", "name": "417", "choice": "", "confidence": 0.5, "probabilities": probabilities});
            let escaped: usize = answer.to_string().chars().map(|c| if c.is_ascii() { 1 } else { 6 }).sum();
            assert!(escaped <= answer_bytes(choices), "{escaped} {}", answer_bytes(choices));
            assert!(most_rows(choices) * answer_bytes(choices) <= MOST_ANSWERS);
        }
    }

    proptest! {
        /// A row has a label only if its number is among the names.
        #[test]
        fn never_panics(names in proptest::collection::vec("417|902|118|[0-9]{0,4}|id", 0..5), label in "\\PC{0,8}") {
            let all: Vec<Value> = names.iter().map(|name| choice(name.as_str().into(), &label)).collect();
            let (verdicts, _) = read(&json!(all));
            for (id, verdict) in ["417", "902", "118"].iter().zip(verdicts) {
                prop_assert!(names.iter().any(|name| name == id) || verdict == Verdict::Missing);
            }
        }
    }
}
