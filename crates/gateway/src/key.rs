//! The keys of lanes and groups. A key that is cloned for each request is cheap, and nothing in it is secret.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use crate::protocol::{Endpoint, Secret, Stream};

/// Account and model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneKey {
    pub account: Rc<str>,
    pub model: Rc<str>,
}

impl LaneKey {
    /// The lane of a stream.
    pub fn of(stream: &Stream) -> Self {
        Self { account: account(&stream.endpoint).into(), model: stream.model.model.as_str().into() }
    }
}

/// A group's number. No two groups ever have the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupId(pub u64);

/// The account that limits an endpoint: as the user named it, else the URL, a mark of the key, and who may sign for it, since
/// what fails by one such file does not fail by another.
fn account(endpoint: &Endpoint) -> String {
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
