//! A relay in front of a provider that does to its answers what no provider should.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

use llm_fake_provider::FakeProvider;

/// A message of HTTP with a body of known length: its first line, the rest of its head, its body. `None` at the end.
pub fn message(from: &mut impl BufRead) -> Option<(String, String, Vec<u8>)> {
    let (mut first, mut head, mut length) = (String::new(), String::new(), 0);
    from.read_line(&mut first).ok().filter(|n| *n > 0)?;
    loop {
        let mut line = String::new();
        from.read_line(&mut line).ok().filter(|n| *n > 0)?;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        head.push_str(&line);
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).ok()?;
    Some((first, head, body))
}

/// Stands before a provider. Under `/twice` each answer comes twice on its connection: the second at once, or when the
/// next request has come, before its own. Under `/mute` answers do not say what they took, under `/input` and `/output`
/// a half of it.
pub fn twice(provider: &FakeProvider) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let to = provider.base_url().trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    std::thread::spawn(move || {
        for (n, client) in listener.incoming().enumerate() {
            let (client, server) = (client.unwrap(), TcpStream::connect(&to).unwrap());
            std::thread::spawn(move || relay(client, server, n % 2 == 0));
        }
    });
    url
}

fn relay(mut client: TcpStream, mut server: TcpStream, at_once: bool) {
    let (mut requests, mut answers) = (BufReader::new(client.try_clone().unwrap()), server.try_clone().unwrap());
    let mut answers = BufReader::new(&mut answers);
    let mut kept: Vec<u8> = Vec::new();
    while let Some((first, head, body)) = message(&mut requests) {
        let way =
            ["/twice", "/honest", "/mute", "/input", "/output"].into_iter().find(|way| first.contains(way)).unwrap();
        let is_twice = way == "/twice";
        let asked = [first.replace(way, "").as_bytes(), head.as_bytes(), &body].concat();
        if server.write_all(&asked).is_err() {
            return;
        }
        let Some((first, head, mut body)) = message(&mut answers) else { return };
        let hidden: &[&str] = match way {
            "/mute" => &["\"usage\""],
            "/input" => &["\"completion_tokens\"", "\"total_tokens\""],
            "/output" => &["\"prompt_tokens\"", "\"total_tokens\""],
            _ => &[],
        };
        let mut text = String::from_utf8(body).unwrap();
        for name in hidden {
            text = text.replace(name, &name.to_uppercase());
        }
        body = text.into_bytes();
        let answer = [first.as_bytes(), head.as_bytes(), &body].concat();
        let mut all = std::mem::take(&mut kept);
        all.extend_from_slice(&answer);
        if is_twice && at_once {
            all.extend_from_slice(&answer);
        } else if is_twice {
            kept = answer;
        }
        if client.write_all(&all).is_err() {
            return;
        }
    }
}

/// Stands before a provider and gives answers of its own to requests that it wants to. It is given the whole request: its
/// texts with a line for each row.
pub fn before(provider: &FakeProvider, own: impl Fn(&str) -> Option<Vec<u8>> + Clone + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let to = provider.base_url().trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server, own) = (client.unwrap(), TcpStream::connect(&to).unwrap(), own.clone());
            std::thread::spawn(move || -> Option<()> {
                let mut requests = BufReader::new(client.try_clone().ok()?);
                let mut answers = BufReader::new(server.try_clone().ok()?);
                loop {
                    let (first, head, body) = message(&mut requests)?;
                    let json: serde_json::Value = serde_json::from_slice(&body).ok()?;
                    let texts: Vec<&str> =
                        json["messages"].as_array()?.iter().filter_map(|m| m["content"].as_str()).collect();
                    if let Some(answer) = own(&texts.join("\n")) {
                        client.write_all(&answer).ok()?;
                        continue;
                    }
                    server.write_all(&[first.as_bytes(), head.as_bytes(), &body].concat()).ok()?;
                    let (first, head, body) = message(&mut answers)?;
                    client.write_all(&[first.as_bytes(), head.as_bytes(), &body].concat()).ok()?;
                }
            });
        }
    });
    url
}

/// An answer with this status and body.
pub fn answer(status: u16, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}
