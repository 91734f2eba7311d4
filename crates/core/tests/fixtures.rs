//! Whole answers as providers, proxies and broken servers give them, and what each is taken for.
//!
//! A file of fixtures/ has the class in its first line, then status, headers and body. The classes are those of
//! `trouble`, and of `Finish` for what is an answer.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use llm_batch_core::dialect::{Api, Sent};
use llm_batch_core::headers;
use llm_batch_core::trouble::{self, one_line};

struct Fixture {
    name: String,
    class: String,
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

fn fixtures() -> Vec<Fixture> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let end = bytes.windows(2).position(|w| w == b"\n\n").unwrap();
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let (class, head) = head.split_once('\n').unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines.map(|l| l.split_once(": ").unwrap()).map(|(n, v)| (n.into(), v.into())).collect();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        Fixture { name, class: class.to_owned(), status, headers, body: bytes[end + 2..].to_vec() }
    };
    std::fs::read_dir(folder).unwrap().map(read).collect()
}

/// The dialect that a file's name begins with; of the others, that of most.
fn api(name: &str) -> Api {
    let is_its = |api: &&Api| name.split('-').next() == Some(api.name());
    Api::ALL.iter().find(is_its).copied().unwrap_or_default()
}

#[test]
fn each_answer_is_of_its_class() {
    let all = fixtures();
    assert!(all.len() > 60);
    for f in all {
        let said = headers::read(|name| f.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str()));
        let (class, message) = match trouble::outcome(api(&f.name), Sent::default(), f.status, &f.body, said.wait) {
            Ok(reply) => (format!("{:?}", reply.finish), String::new()),
            Err(report) => (format!("{:?}", report.trouble), report.message),
        };
        assert_eq!(class, f.class, "{}: {message}", f.name);
        // The message is one line, and not empty.
        let line = one_line(&message);
        assert_eq!(line.is_empty(), message.is_empty(), "{}", f.name);
        assert!(!line.contains(char::is_control), "{}: {line}", f.name);
    }
}
