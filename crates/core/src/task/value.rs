//! Typed values in answers: which JSON is a value of which type, and how it is written for Postgres.
//!
//! The input functions of Postgres take more than a model should write: `today`, `infinity`, `NaN`, `01/02/2026` by
//! DateStyle, a time without its zone. So the form is checked here, and the range there.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::vector;

/// The types of values, by the names of Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Type {
    /// A text.
    Text,
    /// A whole number of 32 bits.
    Integer,
    /// A whole number of 64 bits.
    Bigint,
    /// A number with any digits.
    Numeric,
    /// A number of single precision.
    Real,
    /// True or false.
    Boolean,
    /// A date.
    Date,
    /// A point in time.
    Timestamptz,
    /// Any JSON.
    Jsonb,
    /// One of a field's labels.
    Labels,
}

/// Names of the types, and those that Postgres knows them by as well.
const NAMES: [(&str, Type); 16] = [
    ("text", Type::Text),
    ("integer", Type::Integer),
    ("bigint", Type::Bigint),
    ("numeric", Type::Numeric),
    ("real", Type::Real),
    ("boolean", Type::Boolean),
    ("date", Type::Date),
    ("timestamptz", Type::Timestamptz),
    ("jsonb", Type::Jsonb),
    ("labels", Type::Labels),
    ("int", Type::Integer),
    ("int4", Type::Integer),
    ("int8", Type::Bigint),
    ("decimal", Type::Numeric),
    ("bool", Type::Boolean),
    ("timestamp with time zone", Type::Timestamptz),
];

/// Most digits of a number's exponent that are believed: more would make a value of many megabytes.
const MOST_EXPONENT: i32 = 1_000;
/// Most characters of a number.
const MOST_NUMBER: usize = 1_000;

impl Type {
    /// The type of this name, in lower case.
    pub fn named(name: &str) -> Option<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, of)| *of)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, of)| *of == self).map_or("", |(name, _)| name)
    }

    /// The names that a user may write.
    pub fn names() -> String {
        let names: Vec<&str> = NAMES.iter().take(9).map(|(name, _)| *name).collect();
        names.join(", ")
    }

    /// A value's text is JSON as it stands.
    pub fn is_json(self) -> bool {
        matches!(self, Self::Integer | Self::Bigint | Self::Numeric | Self::Real | Self::Boolean | Self::Jsonb)
    }

    /// The words for a value in the system message.
    pub fn told(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Integer | Self::Bigint => "a whole number",
            Self::Numeric | Self::Real => "a number",
            Self::Boolean => "true or false",
            Self::Date => "a date",
            Self::Timestamptz => "a time with its offset",
            Self::Jsonb => "JSON",
            Self::Labels => "one of its labels",
        }
    }

    /// The words for a value to a model that wrote another one.
    pub fn wanted(self) -> String {
        match self {
            Self::Date | Self::Timestamptz => format!("{} as {}", self.told(), self.form().trim_matches('"')),
            of => of.told().to_owned(),
        }
    }

    /// The form of a value in an example. It is no value, so that a model that copies it has not answered.
    pub fn form(self) -> &'static str {
        match self {
            Self::Text => "\"TEXT\"",
            Self::Labels => "\"LABEL\"",
            Self::Integer | Self::Bigint | Self::Numeric | Self::Real => "NUMBER",
            Self::Boolean => "BOOLEAN",
            Self::Jsonb => "JSON",
            Self::Date => "\"YYYY-MM-DD\"",
            Self::Timestamptz => "\"YYYY-MM-DDThh:mm:ss+hh:mm\"",
        }
    }

    /// A value as long as most, in JSON.
    pub fn sample(self) -> &'static str {
        match self {
            Self::Text => "\"a text\"",
            Self::Integer | Self::Bigint => "12",
            Self::Numeric | Self::Real => "12.5",
            Self::Boolean => "true",
            Self::Date => "\"2026-01-31\"",
            Self::Timestamptz => "\"2026-01-31T12:00:00+01:00\"",
            Self::Jsonb => "{}",
            Self::Labels => "\"\"",
        }
    }

    /// The JSON schema of a value.
    pub fn schema(self) -> Value {
        let name = match self {
            Self::Text | Self::Date | Self::Timestamptz | Self::Labels => "string",
            Self::Integer | Self::Bigint => "integer",
            Self::Numeric | Self::Real => "number",
            Self::Boolean => "boolean",
            Self::Jsonb => return serde_json::json!({}),
        };
        serde_json::json!({ "type": name })
    }

    /// Reads a value as Postgres shall read it. `zone`: the time zone of times that have none. A `strict` reader takes no
    /// number and no truth value that is written as a string.
    ///
    /// # Errors
    /// The value that was wanted.
    pub fn read(self, json: &str, zone: Option<&str>, is_strict: bool) -> Result<String, String> {
        let string = || serde_json::from_str::<String>(json).ok();
        let bare = || match string() {
            None => Some(json.trim().to_owned()),
            Some(inner) => (!is_strict).then(|| digits(inner.trim())),
        };
        let read = match self {
            Self::Text => string().map(|text| cleaned(&text)).filter(|text| !is_form(text)),
            Self::Integer => bare().and_then(|n| whole(&n)).filter(|n| n.parse::<i32>().is_ok()),
            Self::Bigint => bare().and_then(|n| whole(&n)).filter(|n| n.parse::<i64>().is_ok()),
            Self::Numeric => bare().filter(|n| is_number(n)),
            Self::Real => bare().filter(|n| is_number(n) && n.parse::<f32>().is_ok_and(f32::is_finite)),
            Self::Boolean => bare().map(|b| b.to_lowercase()).filter(|b| b == "true" || b == "false"),
            Self::Date => string().filter(|date| is_date(date)),
            Self::Timestamptz => string().and_then(|time| timestamp(&time, zone)),
            // jsonb holds no NUL. Two backslashes are one, and begin nothing.
            Self::Jsonb => {
                let has_nul = json.replace("\\\\", "").contains("\\u0000");
                (!has_nul && serde_json::from_str::<Value>(json).is_ok()).then(|| json.to_owned())
            }
            Self::Labels => None,
        };
        read.ok_or_else(|| self.wanted())
    }
}

/// Returns true if a text is the one that stands for a text in examples.
pub fn is_form(text: &str) -> bool {
    text.trim() == Type::Text.form().trim_matches('"')
}

/// A text without what Postgres or a terminal would stumble over: NUL and control characters other than tab and line
/// feed are taken out, CR LF becomes LF, and a Markdown fence around all of it goes. All else stays byte for byte.
pub fn cleaned(text: &str) -> String {
    let inner = fenced(text).unwrap_or(text);
    inner.replace("\r\n", "\n").chars().filter(|c| !c.is_control() || matches!(c, '\t' | '\n')).collect()
}

/// The inside of a fence that is around all of a text.
fn fenced(text: &str) -> Option<&str> {
    let inner = text.trim().strip_prefix("```")?.strip_suffix("```")?;
    let (language, inner) = inner.split_once('\n')?;
    let is_name = language.trim().chars().all(|c| c.is_alphanumeric() || matches!(c, '+' | '-' | '#' | '_'));
    let inner = inner.strip_suffix('\n').unwrap_or(inner);
    (is_name && !inner.contains("```")).then(|| inner.strip_suffix('\r').unwrap_or(inner))
}

/// The digits of a whole number, which may have a fraction of zeros.
fn whole(number: &str) -> Option<String> {
    let (digits, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_whole = !fraction.is_empty() && fraction.bytes().all(|b| b == b'0');
    let bare = digits.strip_prefix('-').unwrap_or(digits);
    (is_whole && !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_digit())).then(|| digits.to_owned())
}

/// The number that a text for people is: `$1,234.50`, `1.234,50 €`, `1,234,567`. Where it may be two, as `1,234`, the text.
fn digits(text: &str) -> String {
    const CURRENCIES: [char; 4] = ['$', '€', '£', '¥'];
    let (minus, bare) = text.strip_prefix('-').map_or(("", text), |rest| ("-", rest));
    let amount = bare.strip_prefix(CURRENCIES).or(bare.strip_suffix(CURRENCIES)).map(str::trim);
    let number = amount.unwrap_or(bare);
    // A point before three digits may part thousands, as in `1.234 €`.
    let is_either = |(whole, rest): (&str, &str)| (1..=3).contains(&whole.len()) && rest.len() == 3;
    if amount.is_some() && number.split_once('.').is_some_and(is_either) {
        return text.to_owned();
    }
    without_zeros(&format!("{minus}{}", ungrouped(number).as_deref().unwrap_or(number)))
}

/// Digits in groups of three with a fraction, or at least three groups.
fn ungrouped(number: &str) -> Option<String> {
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    [(',', '.'), ('.', ',')].into_iter().find_map(|(separator, point)| {
        let (whole, fraction) = number.split_once(point).map_or((number, None), |(whole, rest)| (whole, Some(rest)));
        let groups: Vec<&str> = whole.split(separator).collect();
        let (first, others) = groups.split_first()?;
        let is_grouped = is_digits(first)
            && first.len() <= 3
            && !others.is_empty()
            && others.iter().all(|group| is_digits(group) && group.len() == 3);
        match fraction {
            Some(fraction) if is_grouped && is_digits(fraction) => Some(format!("{}.{fraction}", groups.concat())),
            None if is_grouped && others.len() > 1 => Some(groups.concat()),
            _ => None,
        }
    })
}

/// Digits without the zeros before them, which JSON does not write.
fn without_zeros(number: &str) -> String {
    let (sign, digits) = number.strip_prefix('-').map_or(("", number), |digits| ("-", digits));
    let bare = digits.trim_start_matches('0');
    let zero = if bare.starts_with(|c: char| c.is_ascii_digit()) { "" } else { "0" };
    if bare.len() == digits.len() { number.to_owned() } else { format!("{sign}{zero}{bare}") }
}

/// A number as JSON writes it, of a size that can be meant.
pub fn is_number(text: &str) -> bool {
    if text.len() > MOST_NUMBER || !text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)) {
        return false;
    }
    let exponent = text.split_once(['e', 'E']).map_or(Ok(0), |(_, exponent)| exponent.parse::<i32>());
    serde_json::from_str::<&RawValue>(text).is_ok()
        && text.ends_with(|c: char| c.is_ascii_digit())
        && text.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit())
        && text.parse::<f64>().is_ok()
        && exponent.is_ok_and(|e| e.abs() <= MOST_EXPONENT)
}

/// `2026-01-31`.
fn is_date(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let [year, month, day] = parts.as_slice() else { return false };
    let number = |part: &str, digits: usize| {
        (part.len() == digits && part.bytes().all(|b| b.is_ascii_digit())).then(|| part.parse::<u32>().ok()).flatten()
    };
    let (Some(year), Some(month), Some(day)) = (number(year, 4), number(month, 2), number(day, 2)) else {
        return false;
    };
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        4 | 6 | 9 | 11 => 30,
        2 if is_leap => 29,
        2 => 28,
        1..=12 => 31,
        _ => return false,
    };
    year > 0 && (1..=days).contains(&day)
}

/// `2026-01-31T12:00:00.5+01:00`; without an offset only in a known zone.
fn timestamp(text: &str, zone: Option<&str>) -> Option<String> {
    let (date, time) = text.split_once(['T', 't', ' '])?;
    if !is_date(date) {
        return None;
    }
    let utc = time.trim().strip_suffix("UTC").map(|clock| format!("{}Z", clock.trim_end()));
    let time = utc.as_deref().unwrap_or(time.trim());
    let end = time.find(['Z', 'z', '+', '-', '\u{2212}']).unwrap_or(time.len());
    let (clock, offset) = time.split_at_checked(end)?;
    let clock = clock.trim_end();
    let is_offset = |text: &str| {
        let digits = text.strip_prefix(['+', '-'])?.replace(':', "");
        let is = matches!(digits.len(), 2 | 4) && digits.bytes().all(|b| b.is_ascii_digit());
        let hours = digits.get(..2)?.parse::<u32>().ok()?;
        (is && hours < 16).then_some(())
    };
    let zone = match offset {
        "" => format!(" {}", zone?),
        "Z" | "z" => "Z".to_owned(),
        _ => is_offset(offset).map(|()| offset.to_owned())?,
    };
    is_clock(clock).then(|| format!("{date} {clock}{zone}"))
}

/// `12:00`, `12:00:00`, `12:00:00.123`.
fn is_clock(text: &str) -> bool {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let parts: Vec<&str> = whole.split(':').collect();
    let most = [24, 60, 60];
    let fits = parts.iter().zip(most).all(|(part, most)| {
        part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit()) && part.parse::<u32>().is_ok_and(|n| n < most)
    });
    let has_fraction = text.contains('.');
    matches!(parts.len(), 2 | 3)
        && fits
        && (!has_fraction || parts.len() == 3)
        && (1..=9).contains(&fraction.len())
        && fraction.bytes().all(|b| b.is_ascii_digit())
}

/// A list in JSON, or a vector, as an array of Postgres. `None` if it is neither.
pub fn array_literal(value: &str) -> Option<String> {
    let json: &str = &vector::to_json(value)?;
    // Numbers alone are written the same way, and vectors have many.
    let bare = json.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if let Some(numbers) = bare.filter(|n| n.bytes().all(|b| b.is_ascii_digit() || b"+-.eE, ".contains(&b))) {
        return Some(format!("{{{numbers}}}"));
    }
    let items: Vec<&RawValue> = serde_json::from_str(json).ok()?;
    let item = |item: &&RawValue| {
        let text = serde_json::from_str::<String>(item.get()).unwrap_or_else(|_| item.get().to_owned());
        match item.get() {
            "null" => "NULL".to_owned(),
            _ => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        }
    };
    Some(format!("{{{}}}", items.iter().map(item).collect::<Vec<_>>().join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(of: Type, json: &str) -> Option<String> {
        of.read(json, None, false).ok()
    }

    #[test]
    fn each_type_takes_its_form_and_no_other() {
        let taken = |of, json: &str| assert_eq!(read(of, json).as_deref(), Some(json.trim_matches('"')), "{json}");
        taken(Type::Date, "\"2026-02-28\"");
        taken(Type::Date, "\"2024-02-29\"");
        taken(Type::Integer, "-12");
        taken(Type::Bigint, "9223372036854775807");
        taken(Type::Numeric, "123456789012345678901234567890.123456789");
        taken(Type::Numeric, "\"12.50\"");
        taken(Type::Numeric, "1e3");
        taken(Type::Boolean, "true");
        assert_eq!(read(Type::Integer, "12.0").as_deref(), Some("12"));
        for (json, number) in [("\"00123\"", "123"), ("\"-007\"", "-7"), ("\"000\"", "0"), ("\"00.50\"", "0.50")] {
            assert_eq!(read(Type::Numeric, json).as_deref(), Some(number));
        }
        assert_eq!((read(Type::Numeric, "\"1.e5\""), read(Type::Integer, "\"01234\"")), (None, Some("1234".into())));
        for (text, number) in [
            ("$12", "12"),
            ("-$1,234.50", "-1234.50"),
            ("1.234,50 €", "1234.50"),
            ("1,234,567", "1234567"),
            ("1.234.567", "1234567"),
        ] {
            assert_eq!(read(Type::Numeric, &format!("\"{text}\"")).as_deref(), Some(number), "{text}");
        }
        assert_eq!(read(Type::Timestamptz, "\"2026-01-31 12:00 UTC\"").as_deref(), Some("2026-01-31 12:00Z"));
        assert_eq!(read(Type::Timestamptz, "\"2026-01-31T12:00Z\"").as_deref(), Some("2026-01-31 12:00Z"));
        let local = Type::Timestamptz.read("\"2026-01-31 12:00:00.5\"", Some("Europe/Berlin"), true);
        assert_eq!(local.as_deref(), Ok("2026-01-31 12:00:00.5 Europe/Berlin"));
        let refused: [(Type, &[&str]); 7] = [
            (
                Type::Date,
                &[
                    "\"today\"",
                    "\"infinity\"",
                    "\"01/02/2026\"",
                    "\"2026-02-29\"",
                    "\"2026-13-01\"",
                    "\"2026-1-2\"",
                    "20260131",
                    "\"0000-01-01\"",
                    "\"2026-01-31T00:00:00Z\"",
                    "\"31 January 2026\"",
                    "null",
                ],
            ),
            (
                Type::Timestamptz,
                &[
                    "\"2026-01-31T12:00\"",
                    "\"now\"",
                    "\"2026-01-31T25:00Z\"",
                    "\"2026-01-31T12:00 CET\"",
                    "\"2026-01-31\"",
                    "\"2026-01-31T12:00+99\"",
                    "\"2026-01-31T12:00.5Z\"",
                    "\"2026-01-31T12:00+1\"",
                ],
            ),
            (Type::Integer, &["2147483648", "12.5", "1e3", "\"twelve\"", "\"1,000\"", "NaN", "true", "\"\"", "-"]),
            (
                Type::Numeric,
                &[
                    "\"NaN\"",
                    "\"Infinity\"",
                    "1e99999",
                    "\"12 %\"",
                    "\"1.234 €\"",
                    "\"$1.234\"",
                    "\"1,5\"",
                    "\"1,234\"",
                    "\"1.23,4\"",
                    "\"1,23.4\"",
                    "\"$\"",
                    "[]",
                    "\"\"",
                    "\".\"",
                ],
            ),
            (Type::Real, &["1e39", "\"inf\"", "\"nan\""]),
            (Type::Boolean, &["1", "\"yes\"", "\"t\"", "null"]),
            (Type::Text, &["1", "true", "null", "[]"]),
        ];
        for (of, values) in refused {
            for value in values {
                assert_eq!(read(of, value), None, "{value} as {}", of.name());
            }
        }
        // Beside a text, what is written as a string is a text.
        assert!(
            Type::Numeric.read("\"12\"", None, true).is_err() && Type::Boolean.read("\"true\"", None, true).is_err()
        );
    }

    #[test]
    fn texts_lose_control_characters_and_the_fence_around_them() {
        let clean = |json: &str| read(Type::Text, json).unwrap();
        assert_eq!(clean(r#""a\u0000b\u0007c\u001bd\re\r\nf\tg\u0085h""#), "abcde\nf\tgh");
        assert_eq!(clean(r#""```json\n{\"a\": 1}\n```""#), "{\"a\": 1}");
        assert_eq!(clean(r#""```\nx\n```\n""#), "x");
        for same in ["see ```x``` here", "```a\nb``` and ```c\nd```", "  spaces  ", "</think>\",\"902\":\"x", "``````"]
        {
            assert_eq!(clean(&Value::from(same).to_string()), same);
        }
    }

    #[test]
    fn lists_become_arrays() {
        assert_eq!(
            array_literal(r#"["a","b\"c","d\\e",null,1.50,"NULL",""]"#).as_deref(),
            Some(r#"{"a","b\"c","d\\e",NULL,"1.50","NULL",""}"#)
        );
        assert_eq!(array_literal("[]").as_deref(), Some("{}"));
        assert_eq!(array_literal("\"a\""), None);
    }

    proptest! {
        #[test]
        fn what_is_read_is_of_the_type(json in r#""?[0-9a-zA-Z:+.\- /,]{0,30}"?"#) {
            for of in [Type::Integer, Type::Bigint, Type::Numeric, Type::Real] {
                if let Some(text) = read(of, &json) {
                    prop_assert!(text.parse::<f64>().is_ok_and(f64::is_finite), "{}", text);
                }
            }
            for of in [Type::Date, Type::Timestamptz] {
                if let Some(text) = read(of, &json) {
                    prop_assert!(text.len() >= 10 && text.as_bytes().get(4) == Some(&b'-'), "{}", text);
                }
            }
        }
    }
}
