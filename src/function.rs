//! Functions of this library by their OIDs.

use std::cell::RefCell;
use std::collections::HashMap;

use pgrx::prelude::*;

use crate::verb::Verb;

/// The oid of the language C (pg_language.dat).
const C_LANGUAGE: u32 = 13;

thread_local! {
    /// By oid, what a function is, as far as that was looked up; forgotten when functions change.
    static VERBS: RefCell<Option<HashMap<u32, Option<Verb>>>> = const { RefCell::new(None) };
}

/// Which of our functions this is: one in C, of our library, whatever it is called and wherever it lives.
pub fn verb(function: pg_sys::Oid) -> Option<Verb> {
    // Built-in ones have no entry of ours.
    if function.to_u32() < pg_sys::FirstNormalObjectId {
        return None;
    }
    let known = VERBS.with_borrow_mut(|verbs| {
        let verbs = verbs.get_or_insert_with(|| {
            // SAFETY: on the main thread; the function lives as long as the process. Registered once in a process.
            unsafe {
                pg_sys::CacheRegisterSyscacheCallback(
                    pg_sys::SysCacheIdentifier::PROCOID as i32,
                    Some(forget),
                    pg_sys::Datum::from(0),
                );
            }
            HashMap::new()
        });
        verbs.get(&function.to_u32()).copied()
    });
    known.unwrap_or_else(|| {
        let found = look_up(function);
        VERBS.with_borrow_mut(|verbs| verbs.as_mut().map(|v| v.insert(function.to_u32(), found)));
        found
    })
}

#[pg_guard]
unsafe extern "C-unwind" fn forget(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    VERBS.with_borrow_mut(|verbs| {
        if let Some(verbs) = verbs {
            verbs.clear();
        }
    });
}

fn look_up(function: pg_sys::Oid) -> Option<Verb> {
    Verb::of_symbol(&source(function)?)
}

/// The symbol of a function of our library.
pub fn source(function: pg_sys::Oid) -> Option<String> {
    // SAFETY: on the main thread, in a transaction; the tuple is released and its attributes are copies by then.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::PROCOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(function));
        if tuple.is_null() {
            return None;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        let text = |attribute: u32| {
            let mut is_null = false;
            let datum = pg_sys::SysCacheGetAttr(cache, tuple, attribute as i16, &mut is_null);
            String::from_datum(datum, is_null).unwrap_or_default()
        };
        let is_c = (*form).prolang == pg_sys::Oid::from(C_LANGUAGE);
        let is_ours = is_c && text(pg_sys::Anum_pg_proc_probin).ends_with("pg_llm_batch");
        let source = is_ours.then(|| text(pg_sys::Anum_pg_proc_prosrc));
        pg_sys::ReleaseSysCache(tuple);
        source
    }
}
