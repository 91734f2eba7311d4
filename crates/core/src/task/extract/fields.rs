//! The fields of an extractor, as SQL writes them, and what is no field.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::classify::{check_labels, labels_from_json};
use super::super::kind::{only, text, whole};
use super::super::value::Type;
use crate::Error;
use crate::codes::{Label, Legend};
use crate::options::Codes;

/// Most fields: each may need a letter as its key.
const MOST_FIELDS: usize = 26;

/// The handling of a value that is not in the text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// NULL is the answer.
    #[default]
    Null,
    /// The row is asked again.
    Refuse,
    /// This value is the answer, as JSON.
    Value(Value),
}

/// A field and its type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// The type of its values.
    pub of: Type,
    /// A value is a list of these.
    #[serde(default)]
    pub is_array: bool,
    /// Its description for the model.
    #[serde(default)]
    pub description: String,
    /// The labels, if it has some.
    #[serde(default)]
    pub labels: Vec<Label>,
    /// The handling of a value that is not in the text.
    #[serde(default)]
    pub missing: Missing,
    /// Most values of a list.
    #[serde(default)]
    pub max_items: Option<u64>,
    /// Most words of a text.
    #[serde(default)]
    pub max_words: Option<u64>,
    /// The time zone of a time that has none.
    #[serde(default)]
    pub time_zone: Option<String>,
}

/// Reads fields: an object name → type or definition, or an array of definitions with names.
///
/// # Errors
/// Any other form, too many fields, a name or a type that is none.
pub fn fields_from_json(value: &Value) -> Result<Vec<Field>, Error> {
    let bad = || {
        Error::new("fields must be a JSON object of names and types").hint(format!(
            "Write '{{\"amount\": \"numeric\", \"due\": {{\"type\": \"date\", \"description\": \"…\"}}}}'. Types are: {}, \
             and lists of these such as text[]; \"labels\" instead of a type for one of some labels.",
            Type::names()
        ))
    };
    let fields: Vec<Field> = match value {
        Value::Object(map) => map.iter().map(|(name, of)| field(name, of, &bad)).collect::<Result<_, _>>()?,
        Value::Array(items) => items
            .iter()
            .map(|item| match item.get("of") {
                Some(_) => Field::deserialize(item).map_err(|_| bad()),
                None => {
                    let mut item = item.as_object().cloned().ok_or_else(bad)?;
                    let Some(Value::String(name)) = item.remove("name") else { return Err(bad()) };
                    field(&name, &Value::Object(item), &bad)
                }
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(bad()),
    };
    check_fields(fields)
}

/// Reads fields as an array names them, ad hoc: `name`, `name type`, `"a name" type`.
///
/// # Errors
/// A type that is none, a field that is given twice, a description of none.
pub fn fields_from_names(names: &[String], descriptions: &Map<String, Value>) -> Result<Vec<Field>, Error> {
    let mut fields = Map::new();
    for text in names {
        let text = text.trim();
        let (name, of) = match text.strip_prefix('"').and_then(|rest| rest.split_once('"')) {
            Some((name, of)) => (name, of.trim()),
            None => {
                let (name, of) =
                    text.split_once(char::is_whitespace).map_or((text, ""), |(name, of)| (name, of.trim()));
                // A sign is rather one between a name and its type than a part of the name.
                if !name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c)) {
                    return Err(Error::new(format!("\"{text}\" is not a name and a type")).hint(
                        "Write the name and the type with a space between them, such as 'amount numeric'; a name with other \
                         signs than letters and digits stands in double quotes.",
                    ));
                }
                (name, of)
            }
        };
        let of = if of.is_empty() { "text" } else { of };
        let description = descriptions.get(name).cloned().unwrap_or(json!(""));
        if fields.insert(name.to_owned(), json!({"type": of, "description": description})).is_some() {
            return Err(Error::new(format!("the field \"{name}\" is given twice")));
        }
    }
    if let Some(name) = descriptions.keys().find(|name| !fields.contains_key(*name)) {
        return Err(Error::new(format!("the field \"{name}\" of a description does not exist")));
    }
    fields_from_json(&Value::Object(fields))
}

fn field(name: &str, definition: &Value, bad: &dyn Fn() -> Error) -> Result<Field, Error> {
    let map = match definition {
        Value::String(of) => Map::from_iter([("type".to_owned(), json!(of))]),
        Value::Object(map) => map.clone(),
        _ => return Err(bad()),
    };
    only(&map, &["type", "description", "labels", "missing", "max_items", "max_words", "time_zone"])?;
    let labels = match map.get("labels") {
        None | Some(Value::Null) => Vec::new(),
        Some(labels) => check_labels(labels_from_json(labels)?)?,
    };
    let default = if labels.is_empty() { "text" } else { "labels" };
    let named = map.get("type").and_then(Value::as_str).unwrap_or(default).trim().to_lowercase();
    let (scalar, is_array) = named.strip_suffix("[]").map_or((&*named, false), |scalar| (scalar.trim_end(), true));
    let of = match Type::named(scalar) {
        Some(Type::Text) if !labels.is_empty() => Type::Labels,
        Some(of) if (of == Type::Labels) != labels.is_empty() => of,
        Some(Type::Labels) => {
            return Err(Error::new(format!("the field \"{name}\" has no labels"))
                .hint("Write '{\"category\": {\"labels\": [\"billing\", \"other\"]}}'."));
        }
        Some(of) => {
            return Err(Error::new(format!("the field \"{name}\" is of type {} and has labels", of.name()))
                .hint("A field with labels has no type, or for several labels \"labels[]\"."));
        }
        None => {
            let modifier = if named.contains('(') { "Length and precision are those of the column. " } else { "" };
            return Err(Error::new(format!("the type \"{named}\" of the field \"{name}\" is not known"))
                .hint(format!("{modifier}Types are: {}, and lists of these such as text[].", Type::names())));
        }
    };
    let unused = [("max_items", is_array), ("max_words", of == Type::Text), ("time_zone", of == Type::Timestamptz)];
    let is_given = |key: &str| map.get(key).is_some_and(|value| !value.is_null());
    if let Some((key, _)) = unused.iter().find(|(key, has_use)| !has_use && is_given(key)) {
        return Err(Error::new(format!("the field \"{name}\" is of type {named} and has \"{key}\""))
            .hint("\"max_items\" is for lists, \"max_words\" for texts, \"time_zone\" for timestamptz."));
    }
    let field = Field {
        name: name.to_owned(),
        of,
        is_array,
        description: text(&map, "description")?,
        labels,
        missing: match map.get("missing") {
            None | Some(Value::Null) => Missing::Null,
            Some(missing) => Missing::deserialize(missing).map_err(|_| {
                Error::new(format!("invalid value for \"missing\" of the field \"{name}\": {missing}"))
                    .hint("Valid values are: \"null\", \"refuse\", or {\"value\": …} with the value to write.")
            })?,
        },
        max_items: whole(&map, "max_items", 1, 100)?,
        max_words: whole(&map, "max_words", 1, 2_000)?,
        time_zone: Some(text(&map, "time_zone")?).filter(|zone| !zone.is_empty()),
    };
    if let Missing::Value(value) = &field.missing {
        let legend = Legend::new(&field.labels, Codes::Words, &str::len);
        field.value(&value.to_string(), &legend, false).map_err(|want| {
            Error::new(format!("the value {value} for a missing field \"{name}\" must be {want}"))
                .hint("It is written where a text does not say the field; \"null\" leaves the column NULL.")
        })?;
    }
    Ok(field)
}

fn check_fields(fields: Vec<Field>) -> Result<Vec<Field>, Error> {
    if !(1..=MOST_FIELDS).contains(&fields.len()) {
        return Err(Error::new(format!("an extractor needs 1 to {MOST_FIELDS} fields, not {}", fields.len()))
            .hint("Write '{\"amount\": \"numeric\", \"due\": \"date\"}': names and types."));
    }
    for (i, field) in fields.iter().enumerate() {
        let name = &field.name;
        if name.trim().is_empty() || name.trim() != name || name.chars().any(char::is_control) || name.len() > 63 {
            return Err(Error::new(format!("\"{name}\" cannot be the name of a field"))
                .hint("A name has 1 to 63 bytes, no control characters, and no spaces at its ends."));
        }
        if name.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Error::new(format!("\"{name}\" cannot be the name of a field"))
                .hint("A number stands for a row in what a model answers."));
        }
        if fields.iter().take(i).any(|other| other.name.eq_ignore_ascii_case(name)) {
            return Err(Error::new(format!("the field \"{name}\" is given twice"))
                .hint("Names of fields are compared without regard to case."));
        }
        let zone = field.time_zone.as_deref().unwrap_or_default();
        if !zone.chars().all(|c| c.is_ascii_alphanumeric() || "/_+-".contains(c)) {
            return Err(Error::new(format!("\"{zone}\" cannot be a time zone"))
                .hint("The view pg_timezone_names lists time zones, such as Europe/Berlin."));
        }
    }
    Ok(fields)
}
