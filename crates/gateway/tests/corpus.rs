//! What the fuzzer has found worth keeping is tried with every run of the tests.

#[path = "../../../fuzz/src/lib.rs"]
mod fuzz;

use std::path::Path;

#[test]
#[allow(clippy::unwrap_used)]
fn what_holds_for_any_bytes_holds_for_the_corpora() {
    for (name, check) in fuzz::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
        let mut files = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            check(&std::fs::read(&path).unwrap());
            files += 1;
        }
        assert!(files > 10, "{files} files for {name}");
    }
}

#[test]
fn what_is_deep_or_long_overflows_no_stack() {
    for text in
        ["{\"a\":", "[", "{\"i\":[", "{\"choices\":[{\"message\":{\"content\":["].map(|open| open.repeat(100_000))
    {
        for (name, check) in fuzz::TARGETS {
            let head: &[u8] = match name {
                "outcome" => &200_u16.to_be_bytes(),
                "frames" => &(text.len() as u32).to_le_bytes(),
                _ => b"",
            };
            check(&[head, text.as_bytes()].concat());
        }
    }
}
