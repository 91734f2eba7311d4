//! The ways to fail.

use std::fmt;
use std::str::FromStr;

/// One way for a request to go wrong.
///
/// The first of them, up to `ByteShort`, come before admission: nothing is
/// charged or billed and no row counts as asked. Requests with one of the
/// others are admitted, charged and billed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Status 500.
    Http500,
    /// Status 503.
    Http503,
    /// Status 429 without `retry-after`.
    RateLimit429,
    /// Status 429, `insufficient_quota`: the account's money is spent.
    SpendLimit429,
    /// Status 429, "Resource Unavailable" (Gemini's 503), for requests at the tier "flex"; others pass.
    NoCapacity429,
    /// Status 429, "Request too large": it would not fit an empty window.
    TooLarge429,
    /// This status with this body. `Status(200, "<html>".into())` is a success
    /// that is no JSON.
    Status(u16, String),
    /// Status 302 to this location.
    Redirect(String),
    /// The connection is reset; nothing is billed.
    ResetBefore,
    /// These bytes are the whole answer, head and all; then the connection is closed.
    Raw(Vec<u8>),
    /// A body that comes byte by byte, ten a second, until the client leaves.
    Drip,
    /// A body that comes as fast as the client reads, until it leaves.
    Endless,
    /// Heads of `100 Continue` as fast as the client reads, until it leaves.
    Continues,
    /// A body of 4 MiB that stops a byte short, until the client leaves.
    ByteShort,

    /// Billed and counted as answered, then the connection is reset.
    ResetAfter,
    /// No answer until the client leaves or
    /// [`release`](crate::FakeProvider::release) is called. Charged at once,
    /// billed and answered only on release.
    Hang,
    /// The answer's text stops in the middle although `finish_reason` is `stop`.
    MalformedJson,
    /// The answer comes twice on its connection.
    Twice,
    /// The answer does not say what it took.
    NoUsage,
    /// The answer says what its prompt took, and no more.
    PromptUsage,
    /// One row is left out.
    DropId,
    /// One row's answer goes under an id that was not asked.
    InventId,
    /// One id comes twice, the second time with another code.
    DoubleId,
    /// One row gets a code that is not in the legend. Turns into `DropId` when
    /// the request holds a strict schema, which makes such an answer impossible.
    UnknownCode,
    /// The answer's text is empty.
    EmptyAnswer,
    /// The text is cut to half its tokens; `finish_reason` is `length`.
    CutByLength,
    /// A right answer, within prose and a code fence.
    Prose,
    /// Prose, and no answer in it.
    OnlyProse,
    /// The model refuses: no content, a `refusal` instead.
    Refusal,
    /// The answer is withheld: `finish_reason` is `content_filter`, no content.
    ContentFilter,

    /// A value of one row is left out.
    DropField,
    /// One row gets a value more.
    AddField,
    /// One row gets a value twice.
    DoubleField,
    /// One row gets a value under another key.
    RenameField,
    /// The values of one row change places.
    SwapFields,
    /// One row gets a value of another type.
    WrongType,
    /// The numbers of one row are in quotes.
    NumbersAsStrings,
    /// One row gets a date in words.
    DatesInWords,
    /// The quotes of the JSON are typographic ones.
    SmartQuotes,
    /// The text ends within its last string; `finish_reason` is `length`.
    CutInString,

    /// One vector has a number less.
    ShortVector,
    /// One vector has a number that is none; without base64 it is null.
    NanVector,
    /// One vector is all zeros.
    ZeroVector,
    /// The vectors, or the answers to questions, come in another order, each with its index or name.
    ShuffledVectors,

    /// The answers to questions have no names.
    Nameless,
    /// The answers to questions have no names, and one of them is left out.
    NamelessDropped,
}

impl Fault {
    /// Those that do not last: asked again, perhaps in smaller requests, rows get their answers.
    pub const PASSING: [Self; 13] = [
        Self::Http500,
        Self::Http503,
        Self::RateLimit429,
        Self::ResetBefore,
        Self::ResetAfter,
        Self::MalformedJson,
        Self::DropId,
        Self::InventId,
        Self::DoubleId,
        Self::UnknownCode,
        Self::EmptyAnswer,
        Self::CutByLength,
        Self::Prose,
    ];

    /// Those of the values of a row, for tasks that are not answered by a code.
    pub const OF_VALUES: [Self; 10] = [
        Self::DropField,
        Self::AddField,
        Self::DoubleField,
        Self::RenameField,
        Self::SwapFields,
        Self::WrongType,
        Self::NumbersAsStrings,
        Self::DatesInWords,
        Self::SmartQuotes,
        Self::CutInString,
    ];

    /// Those of vectors, for requests for embeddings.
    pub const OF_VECTORS: [Self; 9] = [
        Self::DropId,
        Self::InventId,
        Self::DoubleId,
        Self::EmptyAnswer,
        Self::MalformedJson,
        Self::ShortVector,
        Self::NanVector,
        Self::ZeroVector,
        Self::ShuffledVectors,
    ];

    /// The faults of decisions. A refusal is one row's.
    pub const OF_DECISIONS: [Self; 10] = [
        Self::DropId,
        Self::InventId,
        Self::DoubleId,
        Self::UnknownCode,
        Self::EmptyAnswer,
        Self::MalformedJson,
        Self::Refusal,
        Self::ShuffledVectors,
        Self::Nameless,
        Self::NamelessDropped,
    ];

    /// The faults without parameters.
    const PLAIN: [Self; 43] = [
        Self::Http500,
        Self::Http503,
        Self::RateLimit429,
        Self::SpendLimit429,
        Self::NoCapacity429,
        Self::TooLarge429,
        Self::ResetBefore,
        Self::Drip,
        Self::Endless,
        Self::Continues,
        Self::ByteShort,
        Self::ResetAfter,
        Self::Hang,
        Self::MalformedJson,
        Self::Twice,
        Self::NoUsage,
        Self::PromptUsage,
        Self::DropId,
        Self::InventId,
        Self::DoubleId,
        Self::UnknownCode,
        Self::EmptyAnswer,
        Self::CutByLength,
        Self::Prose,
        Self::OnlyProse,
        Self::Refusal,
        Self::ContentFilter,
        Self::DropField,
        Self::AddField,
        Self::DoubleField,
        Self::RenameField,
        Self::SwapFields,
        Self::WrongType,
        Self::NumbersAsStrings,
        Self::DatesInWords,
        Self::SmartQuotes,
        Self::CutInString,
        Self::ShortVector,
        Self::NanVector,
        Self::ZeroVector,
        Self::ShuffledVectors,
        Self::Nameless,
        Self::NamelessDropped,
    ];

    /// Name of the variant, as [`Stats::faults`](crate::Stats::faults) has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Http500 => "Http500",
            Self::Http503 => "Http503",
            Self::RateLimit429 => "RateLimit429",
            Self::SpendLimit429 => "SpendLimit429",
            Self::NoCapacity429 => "NoCapacity429",
            Self::TooLarge429 => "TooLarge429",
            Self::Status(..) => "Status",
            Self::Redirect(_) => "Redirect",
            Self::ResetBefore => "ResetBefore",
            Self::Raw(_) => "Raw",
            Self::Drip => "Drip",
            Self::Endless => "Endless",
            Self::Continues => "Continues",
            Self::ByteShort => "ByteShort",
            Self::ResetAfter => "ResetAfter",
            Self::Hang => "Hang",
            Self::MalformedJson => "MalformedJson",
            Self::Twice => "Twice",
            Self::NoUsage => "NoUsage",
            Self::PromptUsage => "PromptUsage",
            Self::DropId => "DropId",
            Self::InventId => "InventId",
            Self::DoubleId => "DoubleId",
            Self::UnknownCode => "UnknownCode",
            Self::EmptyAnswer => "EmptyAnswer",
            Self::CutByLength => "CutByLength",
            Self::Prose => "Prose",
            Self::OnlyProse => "OnlyProse",
            Self::Refusal => "Refusal",
            Self::ContentFilter => "ContentFilter",
            Self::DropField => "DropField",
            Self::AddField => "AddField",
            Self::DoubleField => "DoubleField",
            Self::RenameField => "RenameField",
            Self::SwapFields => "SwapFields",
            Self::WrongType => "WrongType",
            Self::NumbersAsStrings => "NumbersAsStrings",
            Self::DatesInWords => "DatesInWords",
            Self::SmartQuotes => "SmartQuotes",
            Self::CutInString => "CutInString",
            Self::ShortVector => "ShortVector",
            Self::NanVector => "NanVector",
            Self::ZeroVector => "ZeroVector",
            Self::ShuffledVectors => "ShuffledVectors",
            Self::Nameless => "Nameless",
            Self::NamelessDropped => "NamelessDropped",
        }
    }

    /// Returns true if the fault changes the values of one row.
    pub(crate) fn is_of_values(&self) -> bool {
        Self::OF_VALUES.contains(self) && !matches!(self, Self::SmartQuotes | Self::CutInString)
    }

    /// Returns true if the fault comes before admission.
    pub(crate) fn refuses(&self) -> bool {
        matches!(
            self,
            Self::Http500
                | Self::Http503
                | Self::RateLimit429
                | Self::SpendLimit429
                | Self::NoCapacity429
                | Self::TooLarge429
                | Self::Status(..)
                | Self::Redirect(_)
                | Self::ResetBefore
                | Self::Raw(_)
                | Self::Drip
                | Self::Endless
                | Self::Continues
                | Self::ByteShort
        )
    }
}

/// The name, then the parameters after colons: `Status:418:short and stout`,
/// `Redirect:http://127.0.0.1:1/`.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Status(status, body) => write!(f, ":{status}:{body}"),
            Self::Redirect(location) => write!(f, ":{location}"),
            Self::Raw(bytes) => write!(f, ":{}", String::from_utf8_lossy(bytes)),
            _ => Ok(()),
        }
    }
}

/// Reads the text that `Display` writes. Case does not matter in the name.
impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        if name.eq_ignore_ascii_case("Status") {
            let (status, body) = rest.split_once(':').unwrap_or((rest, ""));
            return match status.parse() {
                Ok(status @ 200..=599) => Ok(Self::Status(status, body.to_owned())),
                _ => Err(format!("no status between 200 and 599 in \"{text}\"")),
            };
        }
        if name.eq_ignore_ascii_case("Redirect") {
            return Ok(Self::Redirect(rest.to_owned()));
        }
        if name.eq_ignore_ascii_case("Raw") {
            return Ok(Self::Raw(rest.as_bytes().to_vec()));
        }
        Self::PLAIN
            .into_iter()
            .find(|fault| fault.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| format!("no fault is called \"{text}\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let with_parameters = [
            Fault::Status(418, "a:b".into()),
            Fault::Redirect("http://x:1/".into()),
            Fault::Raw(b"HTTP/1.1 200 :)\r\n".into()),
        ];
        for fault in Fault::PLAIN.into_iter().chain(with_parameters) {
            assert_eq!(fault.to_string().parse(), Ok(fault));
        }
        assert_eq!("hang".parse(), Ok(Fault::Hang));
        assert!("Status:99:x".parse::<Fault>().is_err());
        assert!("Nothing".parse::<Fault>().is_err());
    }
}
