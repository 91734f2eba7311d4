//! Right answers to tasks that are not answered by a code: fields, scores, texts. A row's answer follows from
//! the id of its marker, so that a test knows it; `right_value` says it for SQL and for tests.

use serde_json::Value;

/// The values to answer for each row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wanted {
    /// Values of fields, in an array or an object.
    Fields(Fields),
    /// A number from the first to the second.
    Score(f64, f64),
    /// A text of at least and at most so many words.
    Text(u64, u64),
}

/// The fields of a row's answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fields {
    pub(crate) all: Vec<Field>,
    /// The answer is a list of objects, `{"id":417,…}`, with all fields under their keys; else each field stands in a
    /// row's array, behind its key or in an object of its own if it has one.
    pub(crate) is_object: bool,
}

/// A field, as the prompt describes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Field {
    pub(crate) key: Option<String>,
    /// Its key and its value stand in an object.
    is_apart: bool,
    pub(crate) name: String,
    /// The beginning of its description says its type.
    told: String,
    /// Pairs of code and label.
    legend: Vec<(String, String)>,
}

/// Words of the shortest and the longest text.
const WORDS: (u64, u64) = (5, 20);
/// A month has at least so many days.
const DAYS: u64 = 28;

impl Wanted {
    /// Reads a system message; `None` if it asks for codes.
    pub(crate) fn read(system: &str) -> Option<Self> {
        if system.contains("\nFields:\n") {
            return Some(Self::Fields(Fields::read(system)));
        }
        if let Some((_, range)) = system.split_once("\nA score is a number from ") {
            let (low, rest) = range.split_once(" to ")?;
            let high = rest.split_once(".\n")?.0;
            return Some(Self::Score(low.parse().ok()?, high.parse().ok()?));
        }
        system.contains("Answer with a text for every number").then(|| {
            let most =
                system.split_once(" words for each text.").and_then(|(told, _)| told.rsplit(' ').next()?.parse().ok());
            most.map_or(Self::Text(WORDS.0, WORDS.1), |most| Self::Text(u64::div_ceil(most, 2), most))
        })
    }

    /// The answer to the row with this id, label and text, in JSON.
    pub(crate) fn right(&self, id: u64, label: Option<&str>, text: &str) -> String {
        match self {
            Self::Text(least, most) => Value::from(words(id, (*least, *most))).to_string(),
            Self::Score(low, high) => Value::from(low + (high - low) * (id % 101) as f64 / 100.0).to_string(),
            Self::Fields(fields) => {
                let values: Vec<String> = fields.all.iter().map(|field| field.right(id, label, text)).collect();
                fields.write(&values)
            }
        }
    }
}

impl Fields {
    /// The lines behind `Fields:`: `name: …` or `key = name: …`, with the lines of a legend set in; and which have a key, by
    /// the example of an answer.
    fn read(system: &str) -> Self {
        let mut all: Vec<Field> = Vec::new();
        for line in system.lines().skip_while(|line| *line != "Fields:").skip(1).take_while(|line| !line.is_empty()) {
            if let Some(line) = line.strip_prefix("  ") {
                let head = line.split_once(": ").map_or(line, |(head, _)| head);
                let (code, label) = head.split_once(" = ").unwrap_or((head, head));
                if let Some(field) = all.last_mut() {
                    field.legend.push((code.to_owned(), label.to_owned()));
                }
                continue;
            }
            let Some((head, told)) = line.split_once(": ") else { continue };
            let (key, name) = head.split_once(" = ").unwrap_or((head, head));
            all.push(Field {
                key: Some(key.to_owned()),
                is_apart: false,
                name: name.to_owned(),
                told: told.to_owned(),
                legend: Vec::new(),
            });
        }
        let example = example(system);
        let is_object = example[0].get("id").is_some_and(Value::is_u64);
        if !is_object {
            let mut elements = example.as_array().into_iter().flatten().peekable();
            for field in &mut all {
                field.key = elements.next_if(|one| is_key(one)).and_then(Value::as_str).map(str::to_owned);
                if let Some(Value::Object(one)) = elements.next() {
                    (field.key, field.is_apart) = (one.keys().next().cloned(), true);
                }
            }
        }
        Self { all, is_object }
    }

    /// A row's values as the prompt asks for them.
    pub(crate) fn write(&self, values: &[String]) -> String {
        let member = |(field, value): (&Field, &String)| match (&field.key, self.is_object) {
            (None, _) => value.clone(),
            (Some(key), true) => format!("\"{key}\":{value}"),
            (Some(key), false) if field.is_apart => format!("{{\"{key}\":{value}}}"),
            (Some(key), false) => format!("\"{key}\",{value}"),
        };
        let all = self.all.iter().zip(values).map(member).collect::<Vec<_>>().join(",");
        if self.is_object { format!("{{{all}}}") } else { format!("[{all}]") }
    }

    /// The values of a row's answer.
    pub(crate) fn values(&self, written: &str) -> Vec<String> {
        let all: Value = serde_json::from_str(written).unwrap_or_default();
        let mut elements = all.as_array().into_iter().flatten();
        let value = |field: &Field| match (&field.key, self.is_object) {
            (Some(key), true) => all[key].to_string(),
            (Some(key), false) if field.is_apart => elements.next().map_or(String::new(), |one| one[key].to_string()),
            (key, _) => elements.nth(usize::from(key.is_some())).map_or(String::new(), Value::to_string),
        };
        self.all.iter().map(value).collect()
    }
}

impl Field {
    /// A text that says `no NAME` has no value for the field.
    pub(crate) fn right(&self, id: u64, label: Option<&str>, text: &str) -> String {
        if text.contains(&format!("no {}", self.name)) {
            return "null".to_owned();
        }
        // Two fields of one type have different values.
        let id = id + self.name.bytes().map(u64::from).sum::<u64>() % 7;
        match self.told.strip_prefix("a list of at most ") {
            Some(list) => {
                let told = list.split_once(", each ").map_or("", |(_, told)| told);
                format!("[{},{}]", self.scalar(told, id, label), self.scalar(told, id + 1, None))
            }
            None => self.scalar(&self.told, id, label),
        }
    }

    fn scalar(&self, told: &str, id: u64, label: Option<&str>) -> String {
        if !self.legend.is_empty() {
            let found = self.legend.iter().find(|(_, name)| Some(name.as_str()) == label);
            let found = found.or_else(|| self.legend.get(id as usize % self.legend.len()));
            return Value::from(found.map_or("", |(code, _)| code.as_str())).to_string();
        }
        let date = format!("2026-{:02}-{:02}", id / DAYS % 12 + 1, id % DAYS + 1);
        match told {
            _ if told.starts_with("a whole number") => id.to_string(),
            _ if told.starts_with("a number") => format!("{id}.25"),
            _ if told.starts_with("true or false") => id.is_multiple_of(2).to_string(),
            _ if told.starts_with("a date") => format!("\"{date}\""),
            _ if told.starts_with("a time") => format!("\"{date}T12:00:00Z\""),
            _ if told.starts_with("JSON") => format!("{{\"id\":{id}}}"),
            _ => Value::from(words(id, WORDS)).to_string(),
        }
    }
}

/// The text about the row with this id, of so many words.
fn words(id: u64, (least, most): (u64, u64)) -> String {
    let n = least + id % (most - least + 1);
    let words = (1..n).map(|i| ["the", "text", "is", "about", "row"][i as usize % 5]);
    format!("{id} {}", words.collect::<Vec<_>>().join(" "))
}

/// Returns true if an element of the example is a key: no form of a value.
fn is_key(element: &Value) -> bool {
    element.as_str().is_some_and(|text| !matches!(text, "LABEL" | "TEXT" | "…") && !text.starts_with("YYYY"))
}

/// The answer to the first row of the prompt's example. The words for a value there may be no JSON.
fn example(system: &str) -> Value {
    let row = system.rsplit_once("exactly like {\"").and_then(|(_, example)| example.split_once("\":"));
    let row = row.map_or(String::new(), |(_, row)| row.to_owned());
    let row = ["NUMBER", "BOOLEAN", "JSON", "…"].iter().fold(row, |row, form| row.replace(form, "null"));
    serde_json::Deserializer::from_str(&row).into_iter().next().and_then(Result::ok).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSTEM: &str = "Find.\n\nFields:\nkind: one of these codes\n  bill = billing: invoices\n  bug\namount: a number. euros\n\
                          tags: a list of at most 5, each a text\n\nEach line … exactly like {\"417\":[\"LABEL\",NUMBER,[\"TEXT\"]]}";

    #[test]
    fn fields_are_read_and_answered() {
        let wanted = Wanted::read(SYSTEM).unwrap();
        let Wanted::Fields(fields) = &wanted else { panic!("{wanted:?}") };
        assert_eq!(fields.all.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["kind", "amount", "tags"]);
        let values: Vec<Value> = serde_json::from_str(&wanted.right(7, Some("billing"), "x")).unwrap();
        assert_eq!(values[0], "bill");
        assert!(values[1].is_f64() && values[2].as_array().is_some_and(|tags| tags.len() == 2));
        let values: Vec<Value> = serde_json::from_str(&wanted.right(7, None, "no amount here")).unwrap();
        assert!(values[1].is_null() && values[0].is_string());
        let keyed = |row: &str| {
            format!("\nFields:\nfrom: a date as\nb = to: a date as\n\nX exactly like {{\"1\":{row},\"2\":…}}")
        };
        let right = |row: &str| -> Value {
            serde_json::from_str(&Wanted::read(&keyed(row)).unwrap().right(3, None, "")).unwrap()
        };
        let dates = right(r#"["YYYY-MM-DD",{"b":NUMBER}]"#);
        let to = &dates[1]["b"];
        assert!(dates[0].is_string() && to.is_string() && dates[0] != *to);
        assert_eq!(right(r#"["YYYY-MM-DD","b",NUMBER]"#), serde_json::json!([dates[0], "b", to]));
        assert_eq!(right(r#"[{"id":1,"from":"Y","b":"Y"},{}]"#), serde_json::json!({"from": dates[0], "b": to}));
    }

    #[test]
    fn scores_and_texts() {
        let score = Wanted::read("How?\nA score is a number from 0 to 10.\n\nEach").unwrap();
        assert_eq!((score.right(0, None, ""), score.right(50, None, "")), ("0.0".to_owned(), "5.0".to_owned()));
        let text = Wanted::read("X\nAnswer with a text for every number, as").unwrap();
        assert!(text.right(9, None, "").starts_with("\"9 "));
        let text =
            Wanted::read("X\nWrite in German at most 30 words for each text.\nAnswer with a text for every number, as");
        assert_eq!(text, Some(Wanted::Text(15, 30)));
        assert_eq!(Wanted::read("Labels:\na\nb\n"), None);
    }
}
