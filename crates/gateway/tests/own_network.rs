//! Models on one's own network, through the whole gateway: at another address of this machine, and behind a certificate of
//! one's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use llm_batch_gateway::protocol::{FromGateway, Stop, StopReason};
use llm_fake_provider::{CA, Config, TlsFront, private_address};
use support::{Client, Setup, is_right, provider};

/// Rows that can't be asked about: why.
#[track_caller]
fn stop_of(client: &mut Client) -> Stop {
    client.rows(0..50);
    loop {
        match client.hear("a stop") {
            Some(FromGateway::Outcomes { .. }) => {}
            Some(FromGateway::Stopped(stop)) => return stop,
            other => panic!("expected a stop, got {other:?}"),
        }
    }
}

#[track_caller]
fn all_right(client: &mut Client) {
    client.rows(0..50);
    let (got, _) = client.outcomes(50);
    assert!(got.iter().all(|(n, verdict)| is_right(*n, verdict)), "{got:?}");
}

#[test]
fn http_at_another_address_of_this_machine() {
    let Some(here) = private_address() else {
        eprintln!("SKIPPED: this machine has no private address");
        return;
    };
    let setup = Setup::new(64 << 20);
    let provider = provider(Config { listen: (here, 0).into(), ..Config::default() });
    let stop = stop_of(&mut setup.client(&provider, |_| {}));
    assert_eq!(stop.reason, StopReason::ProviderDown);
    assert!(stop.message.contains("http is for this machine alone"), "{stop:?}");
    assert_eq!(provider.stats().requests, 0);
    // The endpoint is left alone for a while: another account has a circuit of its own.
    all_right(&mut setup.client(&provider, |s| {
        s.endpoint.allow_http = true;
        s.endpoint.account = Some("allowed".into());
    }));
}

/// A stream without the file, or with another, must not hold up those that name the right one.
#[test]
fn what_fails_by_one_ca_file_does_not_stop_another() {
    let setup = Setup::new(64 << 20);
    let provider = provider(Config::default());
    let front = TlsFront::start([127, 0, 0, 1].into(), provider.address()).unwrap();
    let url = format!("https://localhost:{}/v1", front.address.port());
    let file = std::env::temp_dir().join(format!("llm_batch-own-{}.pem", std::process::id()));
    std::fs::write(&file, CA).unwrap();
    let stop = stop_of(&mut setup.client(&provider, |s| s.endpoint.base_url = url.clone()));
    assert_eq!(stop.reason, StopReason::ProviderDown);
    assert!(stop.message.contains("certificate"), "{stop:?}");
    let mut named = setup.client(&provider, |s| {
        s.endpoint.base_url = url.clone();
        s.endpoint.ca_file = Some(file.display().to_string());
    });
    all_right(&mut named);
    std::fs::remove_file(&file).unwrap();
    let stop = stop_of(&mut named);
    assert!(stop.message.contains("could not use ca_file"), "{stop:?}");
}
