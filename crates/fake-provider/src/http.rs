//! Just enough HTTP/1.1 over a raw socket: keep-alive, `Content-Length`, resets.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Fault;
use crate::reply::Reply;

const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;
const MAX_HEADERS: usize = 64;
/// The bytes that `ByteShort` announces.
const SHORT_BYTES: usize = 4 << 20;

/// One client's connection.
pub(crate) struct Connection {
    stream: TcpStream,
    /// Bytes read and not yet used: what is left of pipelined requests.
    buffer: Vec<u8>,
}

/// A request as read from the wire.
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    /// Those that dialects look at, with their names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) keep_alive: bool,
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// A header, if it is one of those that are kept.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// The next event on a connection.
pub(crate) enum Next {
    Request(Request),
    /// The client closed it, or it broke.
    Closed,
    /// The bytes make no request: answer this status, then close.
    Bad(u16, &'static str),
}

struct Head {
    request: Request,
    bytes: usize,
    body_bytes: usize,
    expects_continue: bool,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Reads the next request.
    pub(crate) async fn next(&mut self) -> Next {
        let head = loop {
            match parse_head(&self.buffer) {
                Ok(Some(head)) => break head,
                Ok(None) if self.buffer.len() > MAX_HEAD_BYTES => {
                    return Next::Bad(431, "the headers are too long");
                }
                Ok(None) => {}
                Err((status, message)) => return Next::Bad(status, message),
            }
            if !self.fill().await {
                return Next::Closed;
            }
        };
        if head.expects_continue && self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_err() {
            return Next::Closed;
        }
        let end = head.bytes + head.body_bytes;
        while self.buffer.len() < end {
            if !self.fill().await {
                return Next::Closed;
            }
        }
        let rest = self.buffer.split_off(end);
        let body = self.buffer.split_off(head.bytes);
        self.buffer = rest;
        Next::Request(Request { body, ..head.request })
    }

    /// Sends a reply, `times` times.
    pub(crate) async fn send(&mut self, reply: &Reply, keep_alive: bool, times: usize) -> io::Result<()> {
        self.stream.write_all(&reply.to_bytes(keep_alive).repeat(times)).await
    }

    /// Returns when the client has closed the connection; never, if it sends
    /// another request meanwhile.
    pub(crate) async fn left(&self) {
        match self.stream.peek(&mut [0]).await {
            Ok(0) | Err(_) => {}
            Ok(_) => std::future::pending().await,
        }
    }

    /// Ends the connection with a TCP reset.
    pub(crate) fn reset(self) {
        // Should it fail, the client sees an end of file instead.
        let _ = self.stream.set_zero_linger();
    }

    /// Answers as no server should, then closes the connection.
    pub(crate) async fn misbehave(mut self, fault: &Fault) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n";
        // An error here means that the client has gone.
        let _ = match fault {
            Fault::Raw(bytes) => self.stream.write_all(bytes).await,
            Fault::Continues => Ok(()),
            Fault::ByteShort => {
                let mut bytes = format!("HTTP/1.1 200 OK\r\ncontent-length: {SHORT_BYTES}\r\n\r\n").into_bytes();
                bytes.resize(bytes.len() + SHORT_BYTES - 1, b' ');
                let _ = self.stream.write_all(&bytes).await;
                return self.left().await;
            }
            _ => self.stream.write_all(head.as_bytes()).await,
        };
        let continues = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(100);
        let (chunk, pause): (&[u8], _) = match fault {
            Fault::Drip => (b" ", Duration::from_millis(100)),
            Fault::Endless => (&[b' '; 65536], Duration::ZERO),
            Fault::Continues => (&continues, Duration::ZERO),
            _ => {
                let _ = self.stream.shutdown().await;
                return self.left().await;
            }
        };
        while self.stream.write_all(chunk).await.is_ok() {
            tokio::time::sleep(pause).await;
        }
    }

    async fn fill(&mut self) -> bool {
        matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..))
    }
}

fn parse_head(buffer: &[u8]) -> Result<Option<Head>, (u16, &'static str)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let bytes = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err((400, "the request is not HTTP/1.1")),
    };
    let mut head = Head {
        request: Request {
            method: parsed.method.unwrap_or_default().to_owned(),
            path: parsed.path.unwrap_or_default().to_owned(),
            headers: Vec::new(),
            keep_alive: parsed.version == Some(1),
            body: Vec::new(),
        },
        bytes,
        body_bytes: 0,
        expects_continue: false,
    };
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => match value.parse() {
                Ok(length) if length <= MAX_BODY_BYTES => head.body_bytes = length,
                Ok(_) => return Err((413, "the body is too long")),
                Err(_) => return Err((400, "content-length is not a number")),
            },
            "transfer-encoding" => return Err((411, "a content-length is needed")),
            "expect" => head.expects_continue = value.eq_ignore_ascii_case("100-continue"),
            "connection" if value.eq_ignore_ascii_case("close") => head.request.keep_alive = false,
            "connection" if value.eq_ignore_ascii_case("keep-alive") => {
                head.request.keep_alive = true;
            }
            name @ ("authorization" | "x-api-key" | "api-key" | "x-goog-api-key" | "anthropic-version") => {
                head.request.headers.push((name.to_owned(), value.to_owned()));
            }
            _ => {}
        }
    }
    Ok(Some(head))
}
