//! A client on a raw socket, and prompts as the extension writes them.

// Each test file uses its part of this.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use llm_fake_provider::{FakeProvider, Stats};
use serde_json::{Value, json};

/// A response, its header names in lower case.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The answer's text.
    pub fn content(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()["choices"][0]["message"]["content"]
            .as_str()
            .unwrap_or_else(|| panic!("no content: {}", self.body))
            .to_owned()
    }

    pub fn finish_reason(&self) -> String {
        self.json()["choices"][0]["finish_reason"].as_str().unwrap().to_owned()
    }
}

/// A kept-alive connection.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub fn connect(provider: &FakeProvider) -> Self {
        Self::to(&provider.base_url())
    }

    pub fn to(url: &str) -> Self {
        let address = url.strip_prefix("http://").unwrap().strip_suffix("/v1").unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) {
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len());
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
    }

    pub fn send_chat(&mut self, body: &Value) {
        self.send("POST", "/v1/chat/completions", "", &body.to_string());
    }

    /// The next response, or how the connection ended.
    pub fn receive(&mut self) -> Result<Response, ErrorKind> {
        let mut line = |expected| {
            let mut line = String::new();
            match self.0.read_line(&mut line) {
                Ok(0) => Err(ErrorKind::UnexpectedEof),
                Ok(_) => Ok(line.trim_end().to_owned()),
                Err(error) => Err(error.kind()),
            }
            .inspect_err(|kind| eprintln!("no {expected}: {kind}"))
        };
        let status = line("status")?.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let header = line("header")?;
            if header.is_empty() {
                break;
            }
            let (name, value) = header.split_once(": ").unwrap();
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut response = Response { status, headers, body: String::new() };
        let mut body = vec![0; response.header("content-length").unwrap().parse().unwrap()];
        self.0.read_exact(&mut body).map_err(|error| error.kind())?;
        response.body = String::from_utf8(body).unwrap();
        Ok(response)
    }

    pub fn chat(&mut self, body: &Value) -> Response {
        self.send_chat(body);
        self.receive().unwrap()
    }
}

/// One request on a connection of its own.
pub fn chat(provider: &FakeProvider, body: &Value) -> Response {
    Client::connect(provider).chat(body)
}

pub const MAP: &str = r#"Answer as {"417":"b"}."#;
pub const OBJECTS: &str = r#"Answer as {"r":[{"i":417,"c":"b"}]}."#;
pub const STRINGS: &str = r#"Answer as {"r":["417b"]}."#;

/// A prompt of these rows, with the codes a (first), b (second: bug) and c.
pub fn prompt(shape: &str, rows: &[(u32, &str)]) -> Value {
    let system = format!("Label each row.\n{shape}\n\nLabels:\na = first\nb = bug: what: breaks\nc\n\nGo.");
    let user: String = rows.iter().map(|(index, text)| format!("{index}: {}\n", Value::from(*text))).collect();
    json!({
        "model": "m",
        "messages": [
            { "role": "system", "content": system },
            { "role": "user", "content": user },
        ],
    })
}

/// Three rows whose right codes are b, a and c.
pub fn three_rows() -> Value {
    prompt(MAP, &[(7, "x #r1:bug#"), (8, "#r2:?# y"), (9, "#r3:c#")])
}

pub const THREE_ANSWERS: &str = r#"{"7":"b","8":"a","9":"c"}"#;

/// Times each of the rows 1, 2 and 3 was answered.
pub fn answered(stats: &Stats) -> [u32; 3] {
    ["1", "2", "3"].map(|id| stats.rows.get(id).map_or(0, |row| row.answered))
}

/// Waits for the provider to get there.
pub fn wait_for(provider: &FakeProvider, ok: impl Fn(&Stats) -> bool) -> Stats {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let stats = provider.stats();
        if ok(&stats) {
            return stats;
        }
        assert!(Instant::now() < deadline, "never came: {stats:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
