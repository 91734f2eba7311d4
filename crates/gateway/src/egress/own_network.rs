//! Models on one's own network: what `http` may reach, and who may sign a certificate.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use llm_fake_provider::{CA, Config, FakeProvider, OTHER_CA, TlsFront, private_address};

use super::tests::{CLOSING, ask_at, clients, message, runtime, server};
use super::*;
use crate::protocol::tests::stream;
use crate::request::Answered;

fn ask(clients: &mut Clients, endpoint: &Endpoint) -> Answered {
    ask_at(&runtime(), clients, endpoint)
}

fn endpoint(base_url: &str, allow_http: bool) -> Endpoint {
    Endpoint { base_url: base_url.to_owned(), allow_http, ..stream().endpoint }
}

#[test]
fn http_leads_to_private_addresses_if_that_is_allowed() {
    let (port, count) = server(CLOSING);
    let named = format!("http://models.example:{port}/v1");
    // Names are refused where it is not allowed, and addresses in the URL, before anything is connected to.
    for url in [&named, "http://10.1.2.3/v1", "http://[fd00::2]/v1", "http://8.8.8.8/v1"] {
        let answered = ask(&mut clients(&[&["127.0.0.1"]]), &endpoint(url, false));
        assert!(message(&answered).contains("http is for this machine alone"), "{url}: {answered:?}");
        assert!(!answered.is_unsure);
    }
    for url in ["http://8.8.8.8/v1", "http://169.254.169.254/v1", "http://100.100.100.200/v1", "http://[fe80::1]/v1"] {
        let answered = ask(&mut clients(&[]), &endpoint(url, true));
        assert!(message(&answered).contains("private addresses alone"), "{url}: {answered:?}");
    }
    for address in ["8.8.8.8", "169.254.169.254", "100.100.100.200", "fd00:ec2::254", "fe80::1", "64:ff9b::a01:203"] {
        let answered = ask(&mut clients(&[&[address]]), &endpoint(&named, true));
        let said = message(&answered);
        assert!(said.contains(&format!("\"models.example\" is {address}, which http may not reach")), "{said}");
        assert!(!answered.is_unsure);
    }
    assert_eq!(*count.lock().unwrap(), 0);
    // Only the permitted ones of several addresses are asked. This one stands for a private one, which not every
    // machine has.
    for list in [&["127.0.0.1"][..], &["8.8.8.8", "127.0.0.1"], &["169.254.169.254", "127.0.0.1", "2606:4700::1"]] {
        let before = *count.lock().unwrap();
        let answered = ask(&mut clients(&[list]), &endpoint(&named, true));
        assert!(message(&answered).contains("500"), "{list:?}: {answered:?}");
        assert_eq!(*count.lock().unwrap(), before + 1, "{list:?}");
    }
    // A private address is checked again for the next connection.
    let mut rebound = clients(&[&["127.0.0.1"], &["8.8.8.8"]]);
    assert!(message(&ask(&mut rebound, &endpoint(&named, true))).contains("500"));
    assert!(message(&ask(&mut rebound, &endpoint(&named, true))).contains("http may not reach"));
    // The reach of https does not change.
    let reach = |allow_http| Reach { is_trusted: true, https: true, allow_http };
    assert_eq!(reach(false).refusal("a", [8, 8, 8, 8].into()), None);
    assert_eq!(reach(true).refusal("a", [8, 8, 8, 8].into()), None);
}

/// A file that a test changes.
struct CaFile(PathBuf);

impl CaFile {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("llm_batch-{name}-{}.pem", std::process::id())))
    }

    fn write(&self, content: &str) {
        fs::write(&self.0, content).unwrap();
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for CaFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The tests below ask a provider at another address of this machine, if it has one.
fn other_address() -> IpAddr {
    private_address().unwrap_or_else(|| {
        eprintln!("SKIPPED in part: this machine has no private address; loopback is used instead");
        [127, 0, 0, 1].into()
    })
}

#[test]
fn certificates_are_verified_by_ca_file_alone() {
    let here = other_address();
    let provider = FakeProvider::start(Config::default()).unwrap();
    let front = TlsFront::start(here, provider.address()).unwrap();
    let mut clients = clients(&[&[&here.to_string()]]);
    let file = CaFile::new("ca");
    let mut there = endpoint(&format!("https://models.example:{}/v1", front.address.port()), false);
    let mut says = |endpoint: &Endpoint| message(&ask(&mut clients, endpoint));
    // An empty question is none: that it is refused says that it came there.
    let (came, unknown) = ("400", "certificate");

    assert!(says(&there).contains(unknown), "{}", says(&there));
    there.ca_file = Some(file.path());
    assert!(
        says(&there).contains("could not use ca_file") && says(&there).contains("No such file"),
        "{}",
        says(&there)
    );
    file.write(CA);
    assert!(says(&there).contains(came), "{}", says(&there));
    // A connection that is kept is one that this file has let be made.
    file.write(OTHER_CA);
    assert!(says(&there).contains(unknown), "{}", says(&there));
    file.write(&format!("Somebody's:\n{OTHER_CA}\nOurs:\n{CA}"));
    assert!(says(&there).contains(came), "{}", says(&there));
    // Another server verifies by its own file, also with the same URL and key.
    assert!(says(&Endpoint { ca_file: None, ..there.clone() }).contains(unknown));
    let elsewhere = there.base_url.replace("models.example", "else.example");
    assert!(says(&Endpoint { base_url: elsewhere, ..there.clone() }).contains(unknown));
    let broken = CA.replace("-----END", "-----");
    for (content, why) in [("", "no usable certificate"), ("text", "no usable certificate"), (&*broken, "PEM")] {
        file.write(content);
        let said = says(&there);
        assert!(said.contains("could not use ca_file") && said.contains(why), "{content}: {said}");
    }
    file.write(&"x".repeat(2 << 20));
    assert!(says(&there).contains("larger than"));
    for (path, why) in [("/", "ordinary file"), ("/dev/zero", "ordinary file"), ("/nowhere/ca.pem", "No such file")] {
        there.ca_file = Some(path.to_owned());
        assert!(says(&there).contains(why), "{path}: {}", says(&there));
    }
}
