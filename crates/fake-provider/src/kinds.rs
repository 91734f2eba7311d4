//! The entries of `tests/kinds`: what tests try with each kind of task.

use std::path::Path;
use std::{fs, io};

use serde::de::DeserializeOwned;
use serde_json::Value;

/// The entries under a key, and the kind that each is of, in the order of the kinds' names.
///
/// # Errors
/// A file that is not as `tests/README.md` says.
pub fn kinds<T: DeserializeOwned>(key: &str) -> io::Result<Vec<(String, T)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/kinds");
    let mut files = fs::read_dir(folder)?.map(|file| file.map(|file| file.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    let mut all = Vec::new();
    for file in files {
        let kind = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut content: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        if let Some(entries) = content.get_mut(key) {
            let entries: Vec<T> = serde_json::from_value(entries.take())?;
            all.extend(entries.into_iter().map(|entry| (kind.clone(), entry)));
        }
    }
    if all.is_empty() {
        return Err(io::Error::other(format!("no kind has \"{key}\"")));
    }
    Ok(all)
}
