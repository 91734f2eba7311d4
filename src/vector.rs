//! Vectors, as the gateway hands them out, as arrays of Postgres.

use llm_batch_core::vector;
use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::text::Text;

/// The numbers of a real[]. A Vec is turned into an array number by number, which takes ten times as long.
#[derive(Debug)]
struct Reals(Vec<f32>);

impl Reals {
    /// As an array in the current memory context.
    fn array(&self) -> pg_sys::Datum {
        let Ok(count @ 1..) = i32::try_from(self.0.len()) else {
            // SAFETY: on the main thread.
            return unsafe { pg_sys::construct_empty_array(pg_sys::FLOAT4OID) }.into();
        };
        // The length and the first index of the only dimension stand between the head and the numbers.
        let head = size_of::<pg_sys::ArrayType>() + 2 * size_of::<i32>();
        let bytes = head + size_of_val(self.0.as_slice());
        // SAFETY: on the main thread. The array is as long as is written here, and aligned to 8 bytes, of which its head
        // takes a multiple; with no bitmap of NULLs the numbers stand right behind that.
        unsafe {
            let array: *mut pg_sys::ArrayType = pg_sys::palloc(bytes).cast();
            pgrx::set_varsize_4b(array.cast(), bytes as i32);
            (*array).ndim = 1;
            (*array).dataoffset = 0;
            (*array).elemtype = pg_sys::FLOAT4OID;
            let dimension: *mut i32 = array.add(1).cast();
            dimension.write(count);
            dimension.add(1).write(1);
            std::ptr::copy_nonoverlapping(self.0.as_ptr(), array.byte_add(head).cast(), self.0.len());
            array.into()
        }
    }
}

// SAFETY: the datum is a real[], as the declaration in sql/ says of the function that returns it.
unsafe impl BoxRet for Reals {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        // SAFETY: the datum is made in the memory context that the function is called in.
        unsafe { fcinfo.return_raw_datum(self.array()) }
    }
}

// SAFETY: says what SQL calls the type.
unsafe impl SqlTranslatable for Reals {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Reals);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: std::result::Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("real[]"));
    const RETURN_SQL: std::result::Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("real[]")));
}

fn numbers(text: Text) -> Result<Reals> {
    let invalid = || {
        Error::new(PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION, "the text is no vector in base64")
            .hint("Jobs write vectors through this function. To read decimal numbers, cast a text such as '{1, 2}' to real[].")
    };
    vector::decode(&text.checked()?).map(Reals).ok_or_else(invalid)
}

/// Jobs write vectors by it, row by row, so it looks nothing up.
#[pg_extern(sql = false)]
fn vector_numbers(vector: Text) -> std::result::Result<Reals, ErrorReport> {
    Ok(numbers(vector)?)
}
