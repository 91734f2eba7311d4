//! By what a lane is found.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::protocol::{Endpoint, Secret};

/// Account and model.
pub type LaneKey = (String, String);

/// Whose limits an endpoint is under: as the user named it, else the URL, a mark of the key, and who may sign for it, since
/// what fails by one such file does not fail by another.
pub fn account(endpoint: &Endpoint) -> String {
    if let Some(account) = &endpoint.account {
        return account.clone();
    }
    let mut account = endpoint.base_url.clone();
    if let Some(Secret(key)) = &endpoint.api_key {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        account.push_str(&format!(" (key {:08x})", hasher.finish() as u32));
    }
    if let Some(file) = &endpoint.ca_file {
        account.push_str(&format!(" (ca_file {file})"));
    }
    account
}
