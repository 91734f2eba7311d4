//! Writes the tables of `src/tokens.rs`: the tokens of o200k, and which of them a text is.

use std::path::PathBuf;

#[path = "src/tokens/hash.rs"]
mod hash;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/tokens/hash.rs");
    let bpe = &bpe_openai::o200k_base().bpe;
    let (mut bytes, mut starts, mut places) = (Vec::new(), vec![0_u32], vec![0_u32; hash::PLACES]);
    for id in 0..bpe.num_tokens() as u32 {
        let token = bpe.token_bytes(id);
        bytes.extend_from_slice(token);
        starts.push(bytes.len() as u32);
        let free = hash::places(token).find(|place| places.get(*place) == Some(&0));
        if let Some(place) = free.and_then(|free| places.get_mut(free)) {
            *place = id + 1;
        }
    }
    let little = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    for (name, table) in [("bytes", bytes), ("starts", little(&starts)), ("places", little(&places))] {
        if let Err(e) = std::fs::write(folder.join(format!("o200k.{name}")), table) {
            println!("cargo::error=could not write the table of {name}: {e}");
        }
    }
}
