//! Keeps what describes the SQL entities in the library, where `cargo pgrx` looks for it: the linker sees no use of it.
//!
//! `cargo pgrx` would otherwise pass the flag to every crate, and build all of them once more beside those of the tests.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-link-arg-cdylib=-Wl,--no-gc-sections");
    }
}
