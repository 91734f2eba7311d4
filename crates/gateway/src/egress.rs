//! The HTTP clients, and which addresses they may connect to. Names are resolved here, so that the address that was
//! checked is the one that is connected to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use llm_batch_core::url::{LOCALHOST, is_loopback, is_reserved};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::protocol::Endpoint;
use crate::request::causes;

/// The clients of all requests: they keep connections, follow no redirects and use no proxy. Each has connections of its
/// own.
#[derive(Debug, Clone)]
pub struct Clients {
    trusted: reqwest::Client,
    guarded: reqwest::Client,
}

impl Clients {
    pub fn new() -> Result<Self, String> {
        Self::with(Arc::new(System))
    }

    fn with(resolver: Arc<dyn Resolve>) -> Result<Self, String> {
        // Fails only if a provider of cryptography is installed already, which is then used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = |resolver: Arc<dyn Resolve>| {
            reqwest::Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
                .dns_resolver(resolver)
                .connect_timeout(Duration::from_secs(10))
                .pool_idle_timeout(Duration::from_secs(60))
                .user_agent(concat!("pg_llm_batch/", env!("CARGO_PKG_VERSION")))
                .build()
                .map_err(|e| format!("could not set up HTTP: {}", causes(&e)))
        };
        Ok(Self { trusted: client(Arc::clone(&resolver))?, guarded: client(Arc::new(Guarded(resolver)))? })
    }

    pub fn of(&self, endpoint: &Endpoint) -> &reqwest::Client {
        if endpoint.is_trusted { &self.trusted } else { &self.guarded }
    }
}

/// The operating system's resolver.
struct System;

impl Resolve for System {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            Ok(Box::new(found.collect::<Vec<_>>().into_iter()) as Addrs)
        })
    }
}

/// Leaves out addresses that an endpoint that is not trusted may not reach. Addresses in URLs do not come here: whoever
/// makes the endpoint looks at them.
struct Guarded(Arc<dyn Resolve>);

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let may_be_here = name.as_str().eq_ignore_ascii_case(LOCALHOST);
        let text = name.as_str().to_owned();
        let found = self.0.resolve(name);
        Box::pin(async move {
            let is_fine = |a: &SocketAddr| if is_loopback(a.ip()) { may_be_here } else { !is_reserved(a.ip()) };
            let (fine, refused): (Vec<_>, Vec<_>) = found.await?.partition(is_fine);
            match refused.first() {
                Some(address) if fine.is_empty() => Err(format!(
                    "\"{text}\" is {}, which servers that a superuser does not own may not reach",
                    address.ip()
                )
                .into()),
                _ => Ok(Box::new(fine.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{IpAddr, TcpListener};
    use std::sync::Mutex;

    use super::*;
    use crate::protocol::tests::stream;
    use crate::request::{self, Answered};

    /// Answers each question with the next list, the last one again and again.
    struct Fake(Mutex<Vec<Vec<IpAddr>>>);

    impl Resolve for Fake {
        fn resolve(&self, _: Name) -> Resolving {
            let mut lists = self.0.lock().unwrap();
            let list = if lists.len() > 1 { lists.remove(0) } else { lists[0].clone() };
            Box::pin(async move { Ok(Box::new(list.into_iter().map(|ip| SocketAddr::new(ip, 0))) as Addrs) })
        }
    }

    fn clients(answers: &[&[&str]]) -> Clients {
        let ips = |list: &&[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect();
        Clients::with(Arc::new(Fake(Mutex::new(answers.iter().map(ips).collect())))).unwrap()
    }

    /// A server that closes each connection with a 500, and counts them; its port.
    fn server() -> (u16, Arc<Mutex<u32>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let count = Arc::new(Mutex::new(0));
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                *counter.lock().unwrap() += 1;
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 65536]);
                let _ = stream.write_all(b"HTTP/1.1 500 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        (port, count)
    }

    fn ask(clients: &Clients, host: &str, port: u16, is_trusted: bool) -> Answered {
        let mut endpoint = stream().endpoint;
        endpoint.base_url = format!("http://{host}:{port}/v1");
        endpoint.is_trusted = is_trusted;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(request::send(clients, &endpoint, &serde_json::json!({}), Duration::from_secs(20)))
    }

    fn message(answered: &Answered) -> String {
        answered.result.as_ref().unwrap_err().message.clone()
    }

    #[test]
    fn a_name_that_means_this_machine_is_refused_to_those_who_are_not_trusted() {
        let (port, count) = server();
        let inside = clients(&[&["127.0.0.1"]]);
        let refused = ask(&inside, "inside.example", port, false);
        assert!(message(&refused).contains("\"inside.example\" is 127.0.0.1"), "{refused:?}");
        // Nothing was sent, so nothing was paid.
        assert!(!refused.is_unsure);
        assert_eq!(*count.lock().unwrap(), 0);
        // The name of this machine is another matter: it says what it is. And whoever is trusted may go there.
        for (host, is_trusted) in [("localhost", false), ("inside.example", true)] {
            let answered = ask(&inside, host, port, is_trusted);
            assert!(message(&answered).contains("500"), "{host}: {answered:?}");
        }
        assert_eq!(*count.lock().unwrap(), 2);
    }

    #[test]
    fn reserved_addresses_are_left_out() {
        let (port, count) = server();
        for address in ["169.254.169.254", "fe80::1", "::", "0.0.0.0", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe"] {
            for host in ["metadata.example", "localhost"] {
                let answered = ask(&clients(&[&[address]]), host, port, false);
                let is_loopback = address == "::ffff:127.0.0.1" && host == "localhost";
                assert_eq!(
                    message(&answered).contains("may not reach"),
                    !is_loopback,
                    "{host} {address}: {answered:?}"
                );
            }
        }
        let before = *count.lock().unwrap();
        // Those beside them are asked.
        let some = clients(&[&["169.254.169.254", "127.0.0.1"]]);
        assert!(message(&ask(&some, "localhost", port, false)).contains("500"));
        assert_eq!(*count.lock().unwrap(), before + 1);
    }

    #[test]
    fn a_name_is_looked_at_each_time_it_is_resolved() {
        let (port, count) = server();
        // What was fine the first time (this machine, by its name) is something else the next time.
        let rebound = clients(&[&["127.0.0.1"], &["169.254.169.254"]]);
        assert!(message(&ask(&rebound, "localhost", port, false)).contains("500"));
        assert!(message(&ask(&rebound, "localhost", port, false)).contains("may not reach"));
        assert_eq!(*count.lock().unwrap(), 1);
    }
}
