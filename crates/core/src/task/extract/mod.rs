//! Extraction: several typed values by name from every text.
//!
//! A row's answer is an array in the order of the fields. Where a value of one field can be a value of another, all but
//! one of these have a key: `["billing","2026-01-02","due","2026-02-03"]`. So a value never slides into a neighbour's
//! column: it would be ill-typed there, or behind the key of another. Where the key could be a value of the field, both
//! stand in an object, `["2026-01-02",{"gist":"…"}]`: small models take a key before a text for a further text.

mod fields;
#[cfg(test)]
mod tests;
mod value;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use self::fields::fields_from_names;
pub use self::fields::{Field, Missing, fields_from_json};
use super::kind::{Answer, Column, Example, Kind, Span, Unfit, examples, only, shown, text};
use super::value::Type;
use super::verb::{Said, Subject, Verb};
use crate::codes::{Label, Legend};
use crate::members::Members;
use crate::options::{Codes, Options};
use crate::{CountTokens, Error, prompt};

/// An extractor, as it is stored.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Extract {
    /// A description of the texts; may be empty.
    pub instruction: String,
    /// The fields, in their order.
    pub fields: Vec<Field>,
    /// Texts with their values, by the fields' names.
    pub examples: Vec<Example>,
}

impl Extract {
    pub(super) fn from_json(map: &Map<String, Value>) -> Result<Self, Error> {
        only(map, &["instruction", "fields", "examples"])?;
        let fields = fields_from_json(map.get("fields").unwrap_or(&Value::Null))?;
        let examples = examples(map, "{\"amount\": 12.5}")?;
        for e in &examples {
            check_example(e, &fields)?;
        }
        Ok(Self { instruction: text(map, "instruction")?, fields, examples })
    }

    pub(super) fn columns(&self) -> Vec<Column> {
        let column = |f: &Field| Column {
            name: f.name.clone(),
            of: f.of,
            is_array: f.is_array,
            values: (f.of == Type::Labels).then(|| f.labels.iter().map(|l| l.label.clone()).collect()),
        };
        self.fields.iter().map(column).collect()
    }
}

/// The functions that ask for values.
pub(super) static VERBS: [Verb; 2] =
    [Verb::of_tasks("extract"), Verb { name: "extract_fields", subject: Subject::Texts, put: extract }];

fn extract(spec: &mut Map<String, Value>, said: &Said) -> Result<(), Error> {
    spec.insert("fields".to_owned(), json!(fields_from_names(said.names, said.descriptions)?));
    Ok(())
}

/// The values of an example belong to fields and are of their types.
fn check_example(example: &Example, fields: &[Field]) -> Result<(), Error> {
    let bad = |what: String| {
        let names: Vec<String> = fields.iter().map(|f| Value::from(f.name.as_str()).to_string()).collect();
        Err(Error::new(format!("the answer of an example {what}"))
            .hint(format!("Write an object of fields and their values; the fields are {}.", names.join(", "))))
    };
    let Some(values) = example.answer.as_object() else { return bad("is not an object by the fields' names".into()) };
    for (name, value) in values {
        let Some(field) = fields.iter().find(|f| f.name == *name) else {
            return bad(format!("has a field \"{name}\" that does not exist"));
        };
        let legend = Legend::new(&field.labels, Codes::Words, &str::len);
        if !value.is_null()
            && let Err(want) = field.value(&value.to_string(), &legend, false)
        {
            return bad(format!("has {value} for the field \"{name}\", which must be {want}"));
        }
    }
    Ok(())
}

/// An extractor that is ready to be asked.
#[derive(Debug)]
pub(super) struct Prepared {
    task: Extract,
    /// Of each field, in their order.
    legends: Vec<Legend>,
    /// The keys of those fields that have one.
    keys: Vec<Option<String>>,
    /// A value that is written as a string is a string: there is a field of texts among values without keys.
    is_strict: bool,
    span: Span,
}

impl Prepared {
    pub(super) fn new(task: &Extract, options: &Options, count: CountTokens) -> Self {
        let fields = &task.fields;
        let legends: Vec<Legend> = fields.iter().map(|f| Legend::new(&f.labels, options.codes, count)).collect();
        let keys = keys(fields, &legends, count);
        let is_bare_text = |(field, key): (&Field, &Option<String>)| field.of == Type::Text && key.is_none();
        let is_strict = fields.len() > 1 && fields.iter().zip(&keys).any(is_bare_text);
        let mut span = Span { mean: 0.0, planned: 0 };
        for (field, legend) in fields.iter().zip(&legends) {
            let (usual, most) = field.tokens(legend, count);
            span.mean += usual;
            span.planned += most;
        }
        // Beside the values: the row's number, signs between values, keys.
        let empty = vec!["\"\"".to_owned(); fields.len()];
        let signs = prompt::tokens_of_a_row(&written(fields, &keys, &empty), count).saturating_sub(fields.len());
        let span = Span { mean: span.mean + signs as f64, planned: span.planned + signs };
        Self { task: task.clone(), legends, keys, is_strict, span }
    }

    /// The form of a row's answer, without a value.
    fn form(&self) -> String {
        let forms: Vec<String> = self.task.fields.iter().zip(&self.legends).map(|(f, legend)| f.form(legend)).collect();
        written(&self.task.fields, &self.keys, &forms)
    }

    /// Returns true if the name is that of a field: its key, its name in any case, or as no other field's may be written.
    fn is_named(&self, i: usize, name: &str) -> bool {
        let fields = &self.task.fields;
        let is_key = |field: usize| self.keys.get(field).and_then(Option::as_deref) == Some(name);
        if (0..fields.len()).any(is_key) {
            return is_key(i);
        }
        if let Some(at) = fields.iter().position(|f| f.name.eq_ignore_ascii_case(name)) {
            return at == i;
        }
        let letters = letters(name);
        let mut alike =
            (0..fields.len()).filter(|at| fields.get(*at).is_some_and(|f| self::letters(&f.name) == letters));
        !letters.is_empty() && (alike.next(), alike.next()) == (Some(i), None)
    }

    /// Returns true if a string says that the text does not say, where it can be no value.
    fn says_nothing(&self, field: &Field, json: &str) -> bool {
        let Ok(text) = serde_json::from_str::<String>(json) else { return false };
        let word = text.trim().to_lowercase();
        // Beside a text without a key, a string where a number is awaited may be that text.
        let may_be_another = self.is_strict && !field.is_array && field.of.is_json();
        match field.of {
            Type::Jsonb if !field.is_array => false,
            // Small models put null in quotes. A name is written otherwise.
            Type::Text if !field.is_array => word.is_empty() || text.trim() == "null",
            _ => {
                NOTHING.contains(&word.as_str())
                    && !may_be_another
                    && self.legends.iter().all(|legend| legend.resolve(&word).is_none())
            }
        }
    }

    /// Returns true if an element is the key of a field.
    fn is_key(&self, element: &RawValue) -> bool {
        let name: Option<String> = serde_json::from_str(element.get()).ok();
        name.is_some_and(|name| {
            (0..self.keys.len()).any(|i| self.keys.get(i).is_some_and(Option::is_some) && self.is_named(i, &name))
        })
    }

    /// The values of a row's array, each with its key if it has one. `None`: they are not.
    fn elements<'a>(&self, items: &[&'a RawValue]) -> Option<Vec<Option<&'a RawValue>>> {
        let mut items = items.iter().copied();
        let mut values = Vec::new();
        // Of objects that were read, what no field has taken.
        let mut named: Vec<(String, &RawValue)> = Vec::new();
        for (i, key) in self.keys.iter().enumerate() {
            let is_this = |(name, _): &(String, &RawValue)| self.is_named(i, name);
            if key.is_none() {
                values.push(Some(items.next()?));
                continue;
            }
            if !named.iter().any(is_this) {
                let item = items.next()?;
                match serde_json::from_str(item.get()) {
                    Ok(Members(members)) => named.extend(members),
                    Err(_) => {
                        let value = items.next().filter(|value| !self.is_key(value))?;
                        named.push((serde_json::from_str(item.get()).ok()?, value));
                    }
                }
            }
            let at = named.iter().position(is_this)?;
            values.push(Some(named.swap_remove(at).1));
        }
        (named.is_empty() && items.next().is_none()).then_some(values)
    }

    /// The members of a row's answer: each value once, under no other name.
    fn members<'a>(&self, json: &'a str) -> Result<Vec<Option<&'a RawValue>>, Unfit> {
        let fields = &self.task.fields;
        let n = fields.len();
        let form = || Unfit::bad_value(format!("the answer must have the form {}", self.form()));
        if json.trim_start().starts_with('[') {
            let items: Vec<&RawValue> = serde_json::from_str(json).map_err(|_| form())?;
            // A list of one value, if that is the only field's, may be the row's array or the field's.
            return self.elements(&items).ok_or_else(|| form().not(json));
        }
        if !json.trim_start().starts_with('{') {
            // The value alone, if there is one field.
            let only: Option<&RawValue> = serde_json::from_str(json).ok().filter(|_| n == 1);
            return only.map(|v| vec![Some(v)]).ok_or_else(|| form().not(json));
        }
        let Members(members) = serde_json::from_str(json).map_err(|_| form())?;
        let mut values: Vec<Option<&RawValue>> = vec![None; n];
        for (name, value) in members {
            let at = (0..n).find(|i| self.is_named(*i, &name));
            match at.and_then(|i| values.get_mut(i)) {
                None => return Err(form().not(&format!("with a field {}", Value::from(name)))),
                Some(Some(_)) => return Err(form().not(&format!("with {} twice", Value::from(name)))),
                Some(slot) => *slot = Some(value),
            }
        }
        Ok(values)
    }
}

/// Words in place of a value that a text does not say.
const NOTHING: [&str; 9] = ["", "null", "none", "nil", "n/a", "na", "unknown", "not specified", "not mentioned"];

/// A name without what differs between `due_date`, `dueDate` and `Due Date`.
fn letters(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// The array or object that a row's answer has around it: a list, an object or a string with nothing else in it.
fn within(json: &str) -> Option<String> {
    let inner = if let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(json) {
        let [only] = items.as_slice() else { return None };
        only.get().to_owned()
    } else if let Ok(Members(members)) = serde_json::from_str(json) {
        let [(_, only)] = members.as_slice() else { return None };
        only.get().to_owned()
    } else {
        serde_json::from_str::<String>(json).ok()?
    };
    inner.trim_start().starts_with(['{', '[']).then_some(inner)
}

/// Keys for the fields that need one: their names, or the beginnings of these, as labels have codes. Those that have none
/// do not resemble each other, so that the fewest have one.
fn keys(fields: &[Field], legends: &[Legend], count: CountTokens) -> Vec<Option<String>> {
    let names: Vec<Label> =
        fields.iter().map(|f| Label { label: f.name.clone(), description: String::new() }).collect();
    let codes = Legend::new(&names, Codes::Auto, count);
    let key = |(field, code): (&Field, &String)| {
        let is_of_another = |f: &Field| f.name != field.name && f.name.eq_ignore_ascii_case(code);
        // A number stands for a row.
        let is_number = code.bytes().all(|b| b.is_ascii_digit());
        if is_number || fields.iter().any(is_of_another) { field.name.clone() } else { code.clone() }
    };
    let mut keys: Vec<Option<String>> = fields.iter().zip(codes.codes()).map(|pair| Some(key(pair))).collect();
    let all: Vec<(&Field, &Legend)> = fields.iter().zip(legends).collect();
    let resemble = |(a, mine): (&Field, &Legend), (b, others): (&Field, &Legend)| {
        a.resembles(b, (mine, others)) || b.resembles(a, (others, mine))
    };
    let others_like = |one: (&Field, &Legend)| all.iter().filter(|other| resemble(one, **other)).count();
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by_cached_key(|i| all.get(*i).map_or(0, |one| others_like(*one)));
    let mut bare: Vec<(&Field, &Legend)> = Vec::new();
    for i in order {
        let (Some(one), Some(key)) = (all.get(i), keys.get_mut(i)) else { continue };
        // Of JSON anything is a value, an object with a key too.
        let is_any = one.0.of == Type::Jsonb && !one.0.is_array && all.len() > 1;
        if !is_any && !bare.iter().any(|other| resemble(*one, *other)) {
            bare.push(*one);
            *key = None;
        }
    }
    keys
}

/// A row's answer.
fn written(fields: &[Field], keys: &[Option<String>], values: &[String]) -> String {
    let element = |((field, key), value): ((&Field, &Option<String>), &String)| match key.as_deref().map(prompt::quote)
    {
        None => value.clone(),
        Some(key) if field.may_be_a_key() => format!("{{{key}:{value}}}"),
        Some(key) => format!("{key},{value}"),
    };
    format!("[{}]", fields.iter().zip(keys).zip(values).map(element).collect::<Vec<_>>().join(","))
}

impl Kind for Prepared {
    fn names(&self) -> Vec<&str> {
        let keys = self.keys.iter().flatten().map(String::as_str);
        keys.chain(self.task.fields.iter().map(|f| f.name.as_str())).collect()
    }

    fn head(&self) -> String {
        let Extract { instruction, fields, examples } = &self.task;
        let instruction = if instruction.is_empty() { "Find these fields in each text." } else { instruction };
        let key = |i: usize| match (self.keys.get(i), fields.get(i)) {
            (Some(Some(key)), Some(field)) if *key != field.name => format!("{key} = "),
            _ => String::new(),
        };
        let all = fields.iter().zip(&self.legends).enumerate();
        let told: String = all.map(|(i, (field, legend))| format!("{}{}", key(i), field.told(legend))).collect();
        let answer = |e: &Example| {
            let value = |(field, legend): (&Field, &Legend)| match e.answer.get(&field.name) {
                None | Some(Value::Null) => "null".to_owned(),
                Some(Value::String(label)) if field.of == Type::Labels => {
                    let code = field.labels.iter().position(|l| l.label == *label).and_then(|i| legend.codes().get(i));
                    prompt::quote(code.unwrap_or(label))
                }
                Some(other) => other.to_string(),
            };
            let values: Vec<String> = fields.iter().zip(&self.legends).map(value).collect();
            written(fields, &self.keys, &values)
        };
        let examples = shown(examples.iter().map(|e| (e.input.as_str(), answer(e))));
        format!("{instruction}\n\nFields:\n{told}{examples}")
    }

    fn asks_for(&self) -> String {
        "Answer for every number with an array of all fields in order, null where a text does not say, in JSON on one line \
         without spaces"
            .into()
    }

    fn samples(&self) -> [String; 2] {
        [self.form(), "…".into()]
    }

    fn schema(&self) -> Value {
        let element = |((field, legend), key): ((&Field, &Legend), &Option<String>)| {
            let one = match field.of {
                Type::Labels => json!({"type": "string", "enum": legend.codes()}),
                of => of.schema(),
            };
            let of = if field.is_array { json!({"type": "array", "items": one}) } else { one };
            let value = json!({"anyOf": [of, {"type": "null"}]});
            match key {
                Some(key) if field.may_be_a_key() => {
                    json!({"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": false})
                }
                _ => value,
            }
        };
        let fields = self.task.fields.iter().zip(&self.legends).zip(&self.keys);
        let before_a_value =
            |((field, _), key): ((&Field, _), &'_ Option<String>)| key.clone().filter(|_| !field.may_be_a_key());
        let keys: Vec<String> = fields.clone().filter_map(before_a_value).collect();
        let mut elements: Vec<Value> = fields.map(element).collect();
        elements.extend((!keys.is_empty()).then(|| json!({"type": "string", "enum": keys})));
        // One schema for all: strict schemas know no tuples.
        json!({"type": "array", "items": {"anyOf": elements}})
    }

    fn tokens(&self, _: usize) -> Span {
        self.span
    }

    fn read(&self, value: &RawValue) -> Result<Answer, Unfit> {
        let answer = self.answer(value.get());
        // What is around a single field's value may belong to it.
        let inner = if answer.is_err() && self.task.fields.len() > 1 { within(value.get()) } else { None };
        inner.and_then(|json| self.answer(&json).ok()).map_or(answer, Ok)
    }
}

impl Prepared {
    fn answer(&self, json: &str) -> Result<Answer, Unfit> {
        let members = self.members(json)?;
        let fields = self.task.fields.iter().zip(&self.legends).zip(members);
        let read = |((field, legend), value): ((&Field, &Legend), Option<&RawValue>)| {
            let name = Value::from(field.name.as_str());
            let Some(value) = value else { return Err(Unfit::bad_value(format!("the field {name} is not given"))) };
            if value.get() != "null" && !self.says_nothing(field, value.get()) {
                return field
                    .value(value.get(), legend, self.is_strict)
                    .map(Some)
                    .map_err(|want| Unfit::bad_value(format!("the field {name} must be {want}")).not(value.get()));
            }
            match &field.missing {
                Missing::Null => Ok(None),
                Missing::Refuse => Err(Unfit::bad_value(format!("the field {name} must not be null"))),
                Missing::Value(value) => {
                    let text = field.value(&value.to_string(), legend, false);
                    text.map(Some).map_err(|want| Unfit::bad_value(format!("the field {name} must be {want}")))
                }
            }
        };
        fields.map(read).collect::<Result<Vec<_>, _>>().map(Answer)
    }
}
