//! Which addresses a name leads to, and which of them an endpoint may reach.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::Name;
use llm_batch_core::url::{LOCALHOST, is_loopback, is_reserved, may_be_clear};
use tower_service::Service;

pub type Looking = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Finds the addresses of a name.
pub trait Lookup: Send + Sync {
    fn lookup(&self, name: String) -> Looking;
}

/// The operating system's.
pub struct System;

impl Lookup for System {
    fn lookup(&self, name: String) -> Looking {
        Box::pin(async move { Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect()) })
    }
}

/// Which addresses an endpoint may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reach {
    pub is_trusted: bool,
    pub https: bool,
    pub allow_http: bool,
}

impl Reach {
    /// Why a name must not lead to an address.
    pub fn refusal(self, name: &str, ip: IpAddr) -> Option<&'static str> {
        let is_allowed = if is_loopback(ip) { name.eq_ignore_ascii_case(LOCALHOST) } else { !is_reserved(ip) };
        if !self.is_trusted && !is_allowed {
            return Some("which servers that a superuser does not own may not reach");
        }
        let is_fine = self.https || may_be_clear(ip, self.allow_http);
        (!is_fine).then_some("which http may not reach: it is not a private address")
    }
}

/// Finds the addresses of a name, and leaves out those that an endpoint may not reach. Addresses in URLs do not come here:
/// they are checked where the endpoint is made, and `Clients::of` checks those in `http://`.
#[derive(Clone)]
pub struct Resolver {
    pub lookup: Arc<dyn Lookup>,
    pub reach: Reach,
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (text, reach) = (name.as_str().to_owned(), self.reach);
        let found = self.lookup.lookup(text.clone());
        Box::pin(async move {
            let (mut fine, mut refused) = (Vec::new(), None);
            for address in found.await? {
                match reach.refusal(&text, address.ip()) {
                    None => fine.push(address),
                    Some(why) => refused = refused.or(Some((address.ip(), why))),
                }
            }
            match refused {
                Some((ip, why)) if fine.is_empty() => Err(io::Error::other(format!("\"{text}\" is {ip}, {why}"))),
                _ => Ok(fine.into_iter()),
            }
        })
    }
}
