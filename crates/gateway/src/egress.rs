//! The HTTP clients, and which addresses they may connect to. Names are resolved here, so that the address that was
//! checked is the one that is connected to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use llm_batch_core::url::{self, Target};
use rustls_platform_verifier::BuilderVerifierExt;

use crate::connections::{Connector, MAX_HEAD, Places, Share};
use crate::files;
use crate::protocol::{Endpoint, Secret};
use crate::resolver::{Lookup, Reach, Resolver, System};

/// Endpoints whose connections are kept. The one that was used longest ago gives way.
const MOST_POOLS: usize = 64;
/// Time that connecting may take, without TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for which a connection without a request is kept.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval of keep-alive probes on a silent connection, and the time for which it may stay silent.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(30));

/// An HTTP client with connections of its own. It follows no redirects and uses no proxy.
pub type HttpClient = Client<Connector, Full<Bytes>>;

/// Verifies certificates as the operating system does, for servers without a `ca_file`.
///
/// # Errors
/// If its certificates can't be read.
pub fn tls() -> Result<rustls::ClientConfig, String> {
    // Fails only if a provider of cryptography is installed already, which is then used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let verifying = rustls::ClientConfig::builder().with_platform_verifier();
    Ok(verifying.map_err(|e| format!("could not set up TLS: {e}"))?.with_no_client_auth())
}

/// The clients of all requests, one for each server and key: an answer that a server sends unasked on a kept connection
/// can meet no other server's or key's request.
pub struct Clients {
    tls: rustls::ClientConfig,
    lookup: Arc<dyn Lookup>,
    pools: BTreeMap<PoolKey, Pool>,
    /// What the answers of each host and port take.
    shares: BTreeMap<(String, u16), Weak<Share>>,
    /// Counts the uses of all pools.
    uses: u64,
    /// For connections of all of them.
    places: Arc<Places>,
}

struct Pool {
    client: HttpClient,
    /// When it was used last, as `Clients::uses` counts.
    used: u64,
    /// An answer came that belongs to another request: each connection has one request from then on.
    is_distrusted: Arc<AtomicBool>,
    keeps: bool,
    share: Arc<Share>,
}

/// The properties that requests on one connection have in common.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct PoolKey {
    base_url: String,
    reach: Reach,
    /// The content of the file: another one makes new connections.
    ca: Option<Vec<u8>>,
    api_key: Option<String>,
}

impl Clients {
    /// With at most so many `connections`.
    pub fn new(tls: rustls::ClientConfig, memory: usize, connections: usize) -> Self {
        Self::with(tls, Arc::new(System), memory, connections)
    }

    fn with(tls: rustls::ClientConfig, lookup: Arc<dyn Lookup>, memory: usize, connections: usize) -> Self {
        let places = Places::new(connections, memory);
        Self { tls, lookup, pools: BTreeMap::new(), shares: BTreeMap::new(), uses: 0, places }
    }

    /// The client for an endpoint, and room for an answer of at most so many bytes. Its permissions and its `ca_file` are
    /// looked at anew each time.
    ///
    /// # Errors
    /// If it can't be asked in this way.
    pub fn of(&mut self, endpoint: &Endpoint, most: usize) -> Result<(HttpClient, Answer), String> {
        self.uses += 1;
        let target = url::parse(&endpoint.base_url, endpoint.allow_http).map_err(|e| e.message)?;
        let unusable = |path: &str, e: String| format!("could not use ca_file \"{path}\": {e}");
        let file = endpoint.ca_file.as_deref();
        let key = PoolKey {
            base_url: endpoint.base_url.clone(),
            reach: Reach { is_trusted: endpoint.is_trusted, https: target.https, allow_http: endpoint.allow_http },
            ca: file.map(|path| files::read_ca(path).map_err(|e| unusable(path, e))).transpose()?,
            api_key: endpoint.api_key.as_ref().map(|Secret(key)| key.clone()),
        };
        let known = self.pools.get_mut(&key);
        let is_distrusted = known.as_ref().map(|pool| Arc::clone(&pool.is_distrusted)).unwrap_or_default();
        let keeps = !is_distrusted.load(Ordering::Relaxed);
        if let Some(pool) = known.filter(|pool| pool.keeps == keeps) {
            pool.used = self.uses;
            return Ok((pool.client.clone(), Answer::new(Arc::clone(&pool.share), most)));
        }
        let tls = match &key.ca {
            Some(pem) => self.tls_of(pem).map_err(|e| unusable(file.unwrap_or_default(), e))?,
            None => self.tls.clone(),
        };
        if self.pools.len() >= MOST_POOLS {
            self.close_oldest();
        }
        let client = self.client(tls, key.reach, &is_distrusted, keeps);
        let share = self.share(target);
        let answer = Answer::new(Arc::clone(&share), most);
        self.pools.insert(key, Pool { client: client.clone(), used: self.uses, is_distrusted, keeps, share });
        Ok((client, answer))
    }

    /// The share of a server, which all of its pools have.
    fn share(&mut self, target: Target) -> Arc<Share> {
        self.shares.retain(|_, share| share.strong_count() > 0);
        let share = self.shares.entry((target.host, target.port)).or_default();
        share.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Share::new(Arc::clone(&self.places.reading)));
            *share = Arc::downgrade(&new);
            new
        })
    }

    /// Verifies certificates by those in a file, and by no others.
    fn tls_of(&self, pem: &[u8]) -> Result<rustls::ClientConfig, String> {
        let config = rustls::ClientConfig::builder_with_provider(Arc::clone(self.tls.crypto_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?;
        Ok(config.with_root_certificates(files::roots(pem)?).with_no_client_auth())
    }

    /// Keeps no connection of the endpoint any more that was used longest ago.
    fn close_oldest(&mut self) {
        if let Some(oldest) = self.pools.iter().min_by_key(|(_, pool)| pool.used).map(|(key, _)| key.clone()) {
            self.pools.remove(&oldest);
        }
    }

    /// Most bytes of all answers that are being read.
    pub fn set_memory(&self, memory: usize) {
        self.places.reading.memory.store(memory, Ordering::Relaxed);
    }

    fn client(
        &self,
        tls: rustls::ClientConfig,
        reach: Reach,
        is_distrusted: &Arc<AtomicBool>,
        keeps: bool,
    ) -> HttpClient {
        let mut tcp = HttpConnector::new_with_resolver(Resolver { lookup: Arc::clone(&self.lookup), reach });
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_keepalive(Some(KEEPALIVE.0));
        tcp.set_tcp_user_timeout(Some(KEEPALIVE.1));
        let (places, is_distrusted) = (Arc::clone(&self.places), Arc::clone(is_distrusted));
        let connector = Connector { tls: Arc::new(tls), tcp, places, is_distrusted };
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(if keeps { usize::MAX } else { 0 })
            .http1_max_buf_size(MAX_HEAD)
            .build(connector)
    }
}

/// The bytes of an answer that is being read. They count against its server's memory until it is dropped.
#[derive(Debug)]
pub struct Answer {
    pub bytes: Vec<u8>,
    share: Arc<Share>,
    /// Most bytes of it.
    pub most: usize,
}

impl Answer {
    fn new(share: Arc<Share>, most: usize) -> Self {
        Self { bytes: Vec::new(), share, most }
    }

    /// Takes a further part.
    ///
    /// # Errors
    /// If it is not to be read on.
    pub fn push(&mut self, part: &[u8]) -> Result<(), String> {
        let length = self.bytes.len() + part.len();
        if length > self.most {
            return Err(format!("the provider's answer is larger than {} bytes", self.most));
        }
        self.share.add(part.len(), length)?;
        self.bytes.extend_from_slice(part);
        Ok(())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.share.give_back(self.bytes.len());
    }
}

#[cfg(test)]
mod own_network;
#[cfg(test)]
mod tests {
    use crate::connections::SMALL_ANSWER;
    use std::io::{Read, Write};
    use std::net::{IpAddr, SocketAddr, TcpListener};
    use std::sync::Mutex;

    use super::*;
    use llm_batch_core::dialect::Service;
    use serde_json::json;
    use tokio::runtime::Runtime;

    use crate::protocol::tests::stream;
    use crate::request::{self, Answered, Question};
    use crate::resolver::Looking;

    /// Answers each question with the next list, the last one again and again.
    struct Fake(Mutex<Vec<Vec<IpAddr>>>);

    impl Lookup for Fake {
        fn lookup(&self, _: String) -> Looking {
            let mut lists = self.0.lock().unwrap();
            let list = if lists.len() > 1 { lists.remove(0) } else { lists[0].clone() };
            Box::pin(async move { Ok(list.into_iter().map(|ip| SocketAddr::new(ip, 0)).collect()) })
        }
    }

    pub(super) fn clients(answers: &[&[&str]]) -> Clients {
        let ips = |list: &&[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect();
        let lookup = Arc::new(Fake(Mutex::new(answers.iter().map(ips).collect())));
        Clients::with(tls().unwrap(), lookup, usize::MAX, 100)
    }

    /// The head of a server that closes each connection.
    pub(super) const CLOSING: &str = "content-length: 0\r\nconnection: close\r\n";

    /// A server that answers with a 500 of this head, and counts connections; its port.
    pub(super) fn server(head: &'static str) -> (u16, Arc<Mutex<u32>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let count = Arc::new(Mutex::new(0));
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                *counter.lock().unwrap() += 1;
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    while stream.read(&mut [0; 65536]).is_ok_and(|n| n > 0) {
                        let _ = stream.write_all(format!("HTTP/1.1 500 no\r\n{head}\r\n").as_bytes());
                        if head == CLOSING {
                            return;
                        }
                    }
                });
            }
        });
        (port, count)
    }

    fn ask(clients: &mut Clients, host: &str, port: u16, is_trusted: bool) -> Answered {
        let mut endpoint = stream().endpoint;
        endpoint.base_url = format!("http://{host}:{port}/v1");
        endpoint.is_trusted = is_trusted;
        // Most of these names are not this machine's.
        endpoint.allow_http = true;
        ask_at(&runtime(), clients, &endpoint)
    }

    pub(super) fn runtime() -> Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    pub(super) fn ask_at(runtime: &Runtime, clients: &mut Clients, endpoint: &Endpoint) -> Answered {
        let question = Question {
            endpoint,
            model: "m",
            body: &json!({}),
            timeout: Duration::from_secs(20),
            most_tokens: 100,
            service: Service::Chat,
            ids: &[],
        };
        runtime.block_on(request::send(clients.of(endpoint, 9_000), &question))
    }

    pub(super) fn message(answered: &Answered) -> String {
        answered.result.as_ref().unwrap_err().message.clone()
    }

    #[test]
    fn a_name_that_means_this_machine_is_refused_to_those_who_are_not_trusted() {
        let (port, count) = server(CLOSING);
        let mut inside = clients(&[&["127.0.0.1"]]);
        let refused = ask(&mut inside, "inside.example", port, false);
        assert!(message(&refused).contains("\"inside.example\" is 127.0.0.1"), "{refused:?}");
        // Nothing was sent, so nothing was paid.
        assert!(!refused.is_unsure);
        assert_eq!(*count.lock().unwrap(), 0);
        // The name of this machine is allowed: it says what it is. A trusted endpoint may go there by any name.
        for (host, is_trusted) in [("localhost", false), ("inside.example", true)] {
            let answered = ask(&mut inside, host, port, is_trusted);
            assert!(message(&answered).contains("500"), "{host}: {answered:?}");
        }
        assert_eq!(*count.lock().unwrap(), 2);
    }

    #[test]
    fn reserved_addresses_are_left_out() {
        let (port, count) = server(CLOSING);
        for address in ["169.254.169.254", "fe80::1", "::", "0.0.0.0", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe"] {
            for host in ["metadata.example", "localhost"] {
                let answered = ask(&mut clients(&[&[address]]), host, port, false);
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
        let mut some = clients(&[&["169.254.169.254", "127.0.0.1"]]);
        assert!(message(&ask(&mut some, "localhost", port, false)).contains("500"));
        assert_eq!(*count.lock().unwrap(), before + 1);
    }

    #[test]
    fn a_name_is_looked_at_each_time_it_is_resolved() {
        let (port, count) = server(CLOSING);
        // A name that resolves to this machine the first time resolves to a link-local address the next time.
        let mut rebound = clients(&[&["127.0.0.1"], &["169.254.169.254"]]);
        assert!(message(&ask(&mut rebound, "localhost", port, false)).contains("500"));
        assert!(message(&ask(&mut rebound, "localhost", port, false)).contains("may not reach"));
        assert_eq!(*count.lock().unwrap(), 1);
    }

    #[test]
    fn servers_and_keys_share_no_connection() {
        let (port, count) = server("content-length: 0\r\n");
        let runtime = runtime();
        let mut clients = clients(&[&["127.0.0.1"]]);
        let mut endpoint = stream().endpoint;
        let mut connections = Vec::new();
        for (path, key) in [("v1", "a"), ("v1", "a"), ("v1", "b"), ("v2", "b"), ("v1", "a"), ("v1", "b"), ("v2", "b")] {
            endpoint.base_url = format!("http://localhost:{port}/{path}");
            endpoint.api_key = Some(Secret(key.to_owned()));
            let answered = ask_at(&runtime, &mut clients, &endpoint);
            assert!(message(&answered).contains("500"), "{answered:?}");
            connections.push(*count.lock().unwrap());
        }
        assert_eq!(connections, [1, 1, 2, 3, 3, 3, 3]);
    }

    #[test]
    fn a_connection_has_one_request_once_an_answer_was_another_s() {
        let (port, count) = server("content-length: 0\r\n");
        let runtime = runtime();
        let mut clients = clients(&[&["127.0.0.1"]]);
        let mut endpoint = stream().endpoint;
        let mut connections = Vec::new();
        for (key, distrusts) in [("a", false), ("a", true), ("b", false), ("a", false), ("a", false), ("b", false)] {
            endpoint.base_url = format!("http://localhost:{port}/v1");
            endpoint.api_key = Some(Secret(key.to_owned()));
            let answered = ask_at(&runtime, &mut clients, &endpoint);
            if distrusts {
                answered.distrust();
            }
            connections.push(*count.lock().unwrap());
        }
        assert_eq!(connections, [1, 1, 2, 3, 4, 4]);
    }

    #[test]
    fn answers_are_read_within_their_memory_and_small_ones_always() {
        let mut clients = Clients::with(tls().unwrap(), Arc::new(System), 16 * SMALL_ANSWER, 1);
        let answer = |clients: &mut Clients, port: u16, key: &str, most| {
            let mut endpoint = stream().endpoint;
            endpoint.base_url = format!("https://localhost:{port}/{key}");
            endpoint.api_key = Some(Secret(key.to_owned()));
            clients.of(&endpoint, most).unwrap().1
        };
        let part = vec![b'x'; SMALL_ANSWER];
        let takes = |answer: &mut Answer, parts| (0..parts).all(|_| answer.push(&part).is_ok());
        let mut first = answer(&mut clients, 1, "a", usize::MAX);
        let mut second = answer(&mut clients, 1, "b", usize::MAX);
        // A server has three quarters, by all keys and paths together; another one as much of the rest, and so on.
        assert!(takes(&mut first, 6) && takes(&mut second, 6));
        assert!(first.push(b"x").is_err() && second.push(b"x").is_err());
        let mut other = answer(&mut clients, 2, "b", usize::MAX);
        assert!(takes(&mut other, 3) && other.push(b"x").is_err());
        let mut third = answer(&mut clients, 3, "b", usize::MAX);
        assert!(takes(&mut third, 1) && third.push(b"x").is_err());
        let mut small = answer(&mut clients, 1, "a", 10);
        assert!(small.push(&[b'x'; 10]).is_ok() && small.push(b"x").is_err());
        drop((first, small));
        assert!(other.push(&part).is_ok() && third.push(b"x").is_ok() && second.push(b"x").is_ok());
        drop((second, other, third));
        assert_eq!(clients.places.reading.all(), 0);
        let mut all = answer(&mut clients, 1, "a", usize::MAX);
        assert!(takes(&mut all, 12) && all.push(b"x").is_err());
    }
}
