//! Texts as they come from tables. A database in UTF8 may hold what is none: a broken disk, an upgrade of long ago or a
//! cast without function leave it, and Postgres does not look at it again. Rust must never take it for a string.

use pgrx::callconv::{Arg, ArgAbi};
use pgrx::datum::{Datum, UnboxDatum};
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use pgrx::{FromDatum, IntoDatum};

use crate::error::{Error, Result};

/// The class of a row whose text is none.
pub const INVALID: &str = "invalid_text";

/// The bytes of a text, which nobody has looked at.
#[derive(Debug)]
pub struct Text(Vec<u8>);

impl Text {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// As a string; 22021 if it is none.
    pub fn checked(self) -> Result<String> {
        String::from_utf8(self.0).map_err(|e| {
            let (bytes, at) = (e.as_bytes(), e.utf8_error());
            let wrong = bytes.get(at.valid_up_to()..).unwrap_or_default();
            let wrong = wrong.get(..at.error_len().unwrap_or(wrong.len())).unwrap_or_default();
            let wrong: Vec<_> = wrong.iter().map(|byte| format!("0x{byte:02x}")).collect();
            Error::new(
                PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
                format!("invalid byte sequence for encoding \"UTF8\": {}", wrong.join(" ")),
            )
            .hint("The text is damaged: mend it where it is stored, or leave its row out.")
        })
    }

    /// As well as it can be read.
    pub fn lossy(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

/// The detail of a row with this error.
pub fn detail(e: &Error) -> String {
    format!("22021: {}", e.message)
}

/// All of an array as strings.
pub fn all(texts: Vec<Option<Text>>) -> Result<Vec<Option<String>>> {
    texts.into_iter().map(|text| text.map(Text::checked).transpose()).collect()
}

impl FromDatum for Text {
    unsafe fn from_polymorphic_datum(datum: pg_sys::Datum, is_null: bool, oid: pg_sys::Oid) -> Option<Self> {
        // SAFETY: a text is laid out as a bytea is.
        unsafe { Vec::<u8>::from_polymorphic_datum(datum, is_null, oid).map(Self) }
    }
}

impl IntoDatum for Text {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        self.0.into_datum()
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::TEXTOID
    }
}

// SAFETY: a text in an array is a varlena.
unsafe impl UnboxDatum for Text {
    type As<'src> = Text;

    unsafe fn unbox<'src>(datum: Datum<'src>) -> Text
    where
        Self: 'src,
    {
        // SAFETY: as of the trait: not NULL.
        unsafe { Self::from_datum(datum.sans_lifetime(), false) }.unwrap_or(Self(Vec::new()))
    }
}

// SAFETY: the declarations in sql/ say that the argument is a text.
unsafe impl<'fcx> ArgAbi<'fcx> for Text {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: as of the trait: not NULL.
        unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or(Self(Vec::new()))
    }
}

// SAFETY: says what SQL calls the type.
unsafe impl SqlTranslatable for Text {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Text);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: std::result::Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("text"));
    const RETURN_SQL: std::result::Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("text")));
}
