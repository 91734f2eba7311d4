//! Right answers to tasks that are not answered by a code: fields, scores, texts. What a row's answer is follows from
//! the id of its marker, so that a test knows it; `right_value` says it for SQL and for tests.

use serde_json::Value;

/// What is to be answered about each row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wanted {
    /// Values of fields in an array, some of them under a key.
    Fields(Vec<Field>),
    /// A number from the first to the second.
    Score(f64, f64),
    /// A text of at least and at most so many words.
    Text(u64, u64),
}

/// A field, as the prompt describes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Field {
    pub(crate) key: Option<String>,
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
            return Some(Self::Fields(fields(system)));
        }
        if let Some((_, range)) = system.split_once("\nA score is a number from ") {
            let (low, rest) = range.split_once(" to ")?;
            let high = rest.split_once(".\n")?.0;
            return Some(Self::Score(low.parse().ok()?, high.parse().ok()?));
        }
        system.contains("Answer with a text for every number").then(|| {
            let most = system.split_once(" words for each text.").and_then(|(told, _)| told.rsplit(' ').next()?.parse().ok());
            most.map_or(Self::Text(WORDS.0, WORDS.1), |most| Self::Text(u64::div_ceil(most, 2), most))
        })
    }

    /// The answer to the row with this id, label and text, in JSON.
    pub(crate) fn right(&self, id: u64, label: Option<&str>, text: &str) -> String {
        match self {
            Self::Text(least, most) => Value::from(words(id, (*least, *most))).to_string(),
            Self::Score(low, high) => Value::from(low + (high - low) * (id % 101) as f64 / 100.0).to_string(),
            Self::Fields(fields) => {
                let values: Vec<String> = fields.iter().map(|field| field.right(id, label, text)).collect();
                write_fields(fields, &values)
            }
        }
    }
}

/// A row's values as the prompt asks for them.
pub(crate) fn write_fields(fields: &[Field], values: &[String]) -> String {
    let element = |(field, value): (&Field, &String)| match &field.key {
        Some(key) => format!("{{\"{key}\":{value}}}"),
        None => value.clone(),
    };
    format!("[{}]", fields.iter().zip(values).map(element).collect::<Vec<_>>().join(","))
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

/// The lines behind `Fields:`: `name: …` or `key = name: …`, with the lines of a legend set in; and which have a key, by
/// the example of an answer.
fn fields(system: &str) -> Vec<Field> {
    let mut fields: Vec<Field> = Vec::new();
    for line in system.lines().skip_while(|line| *line != "Fields:").skip(1).take_while(|line| !line.is_empty()) {
        if let Some(line) = line.strip_prefix("  ") {
            let head = line.split_once(": ").map_or(line, |(head, _)| head);
            let (code, label) = head.split_once(" = ").unwrap_or((head, head));
            if let Some(field) = fields.last_mut() {
                field.legend.push((code.to_owned(), label.to_owned()));
            }
            continue;
        }
        let Some((head, told)) = line.split_once(": ") else { continue };
        let name = head.split_once(" = ").map_or(head, |(_, name)| name);
        fields.push(Field { key: None, name: name.to_owned(), told: told.to_owned(), legend: Vec::new() });
    }
    for (field, element) in fields.iter_mut().zip(example(system)) {
        field.key = element.as_object().and_then(|members| members.keys().next().cloned());
    }
    fields
}

/// The values of the first row of the example of an answer; `…` stands for some.
fn example(system: &str) -> Vec<Value> {
    let first = system.rsplit_once("{\"417\":").and_then(|(_, row)| row.split_once(",\"902\":"));
    first.and_then(|(row, _)| serde_json::from_str(&row.replace('…', "null")).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSTEM: &str = "Find.\n\nFields:\nkind: one of these codes\n  bill = billing: invoices\n  bug\namount: a number. euros\n\
                          tags: a list of at most 5, each a text\n\nEach line";

    #[test]
    fn fields_are_read_and_answered() {
        let wanted = Wanted::read(SYSTEM).unwrap();
        let Wanted::Fields(fields) = &wanted else { panic!("{wanted:?}") };
        assert_eq!(fields.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["kind", "amount", "tags"]);
        let values: Vec<Value> = serde_json::from_str(&wanted.right(7, Some("billing"), "x")).unwrap();
        assert_eq!(values[0], "bill");
        assert!(values[1].is_f64() && values[2].as_array().is_some_and(|tags| tags.len() == 2));
        let values: Vec<Value> = serde_json::from_str(&wanted.right(7, None, "no amount here")).unwrap();
        assert!(values[1].is_null() && values[0].is_string());
        let keyed = "\nFields:\nfrom: a date as\nb = to: a date as\n\nX {\"417\":[\"Y\",{\"b\":…}],\"902\":[…]}";
        let dates: Value = serde_json::from_str(&Wanted::read(keyed).unwrap().right(3, None, "")).unwrap();
        assert!(dates[0].is_string() && dates[1]["b"].is_string() && dates[0] != dates[1]["b"]);
    }

    #[test]
    fn scores_and_texts() {
        let score = Wanted::read("How?\nA score is a number from 0 to 10.\n\nEach").unwrap();
        assert_eq!((score.right(0, None, ""), score.right(50, None, "")), ("0.0".to_owned(), "5.0".to_owned()));
        let text = Wanted::read("X\nAnswer with a text for every number, as").unwrap();
        assert!(text.right(9, None, "").starts_with("\"9 "));
        let text = Wanted::read("X\nWrite in German at most 30 words for each text.\nAnswer with a text for every number, as");
        assert_eq!(text, Some(Wanted::Text(15, 30)));
        assert_eq!(Wanted::read("Labels:\na\nb\n"), None);
    }
}
