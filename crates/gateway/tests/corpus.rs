//! Inputs that the fuzzer found worth keeping, tried with every run of the tests.

#[path = "../../../fuzz/src/lib.rs"]
mod fuzz;

use std::path::Path;

use llm_batch_gateway::protocol::{FromGateway, ToGateway, decode};

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

/// A message that can't be read any more, since it has got another field, is no seed.
#[test]
#[allow(clippy::unwrap_used)]
fn the_seeds_of_frames_are_messages() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/frames");
    let mut opened = 0;
    for n in 0.. {
        let Ok(mut bytes) = std::fs::read(folder.join(format!("seed{n}"))) else { break };
        let mut others = bytes.clone();
        let (mut to, mut from) = (0, 0);
        while let Ok(Some(message)) = decode::<ToGateway>(&mut bytes) {
            opened += usize::from(matches!(message, ToGateway::Open(_)));
            to += 1;
        }
        while let Ok(Some(_)) = decode::<FromGateway>(&mut others) {
            from += 1;
        }
        assert!(to + from > 0, "seed{n}");
    }
    assert!(opened > 0);
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
