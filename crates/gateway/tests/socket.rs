//! Clients that speak no sense: each loses its own connection, and nothing else happens.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Write;
use std::time::{Duration, Instant};

use llm_batch_gateway::protocol::*;
use llm_fake_provider::Config;
use support::*;

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(payload);
    frame
}

#[test]
fn garbage_ends_its_own_connection_and_nothing_else() {
    let provider = provider(Config::default());
    let setup = Setup::new(64 << 20);
    let mut honest = setup.client(&provider, |_| {});
    provider.hold();
    honest.rows(0..100);
    wait("rows are under way", || provider.stats().rows_in_flight, |n| *n > 0);

    let items = encode(&ToGateway::Items(vec![Item { n: 1, text: "x".into(), isolation: None, again: None }])).unwrap();
    let mut two_opens = encode(&ToGateway::Open(Box::new(stream(&provider)))).unwrap();
    two_opens.extend_from_slice(&items);
    two_opens.extend_from_slice(&encode(&ToGateway::Open(Box::new(stream(&provider)))).unwrap());
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("HTTP", b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec()),
        ("a frame of 4 GB", vec![0xff; 4096]),
        ("a frame of a byte too much", (MAX_FRAME as u32 + 1).to_le_bytes().to_vec()),
        ("an empty frame", frame(b"")),
        ("no JSON", frame(b"nonsense")),
        ("no UTF-8", frame(b"\"\xff\xfe\"")),
        ("half of a message", frame(&items[4..items.len() / 2])),
        ("a message and more", frame(b"\"probe\" \"probe\"")),
        ("nothing known", frame(b"\"shutdown\"")),
        ("what the gateway says", encode(&FromGateway::Probed(None)).unwrap()),
        ("depth", frame("[".repeat(1 << 20).as_bytes())),
        ("deep rows", frame(format!("{{\"items\":{}", "[".repeat(1 << 20)).as_bytes())),
        ("a number out of range", frame(b"{\"items\":[{\"n\":-1,\"text\":\"\"}]}")),
        ("rows without a stream", items.clone()),
        ("a second stream over the rows of the first", two_opens),
    ];
    for (what, bytes) in bad {
        let mut client = setup.connect();
        // The gateway may have hung up before all of it is written.
        let _ = client.stream.write_all(&bytes);
        assert_eq!(client.hear(&format!("the end of {what}")), None, "{what}");
    }
    // These messages make no sense without a stream, and do no harm.
    let mut early = setup.connect();
    early.say(&ToGateway::Withdraw);
    early.say(&ToGateway::Allow(Allowance { cost: u64::MAX, tokens: u64::MAX }));
    early.say(&ToGateway::Estimate(vec![Item { n: 1, text: "x".into(), isolation: None, again: None }]));
    assert_eq!(early.hear("an estimate"), Some(FromGateway::Estimated(Estimate::default())));
    early.say(&ToGateway::Probe);
    assert_eq!(early.activity().len(), 1);

    provider.release();
    let (outcomes, _) = honest.outcomes(100);
    assert!(outcomes.iter().all(|(n, verdict)| is_right(*n, verdict)), "{outcomes:?}");
    assert!(asked(&provider).values().all(|times| *times == 1), "rows were asked again: the gateway lost track");
}

#[test]
fn a_client_that_stops_in_the_midst_of_a_message_is_let_go() {
    let provider = provider(Config::default());
    let setup = Setup::new(64 << 20);
    let mut idle = setup.client(&provider, |_| {});
    idle.rows(0..10);
    idle.outcomes(10);
    let mut mute = setup.connect();
    let mut half_head = setup.connect();
    half_head.stream.write_all(&[7, 0]).unwrap();
    let mut half = setup.client(&provider, |_| {});
    half.rows(0..1);
    half.outcomes(1);
    half.stream.write_all(&(MAX_FRAME as u32).to_le_bytes()).unwrap();
    half.stream.write_all(b"{\"items\":[").unwrap();
    for client in [&mut mute, &mut half_head, &mut half] {
        assert_eq!(client.hear("the end"), None);
    }
    // A client that is not in the midst of a message may be silent for longer.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert_eq!(idle.activity().len(), 1);
        std::thread::sleep(Duration::from_millis(100));
    }
    idle.rows(10..20);
    let (outcomes, _) = idle.outcomes(10);
    assert!(outcomes.iter().all(|(n, verdict)| is_right(*n, verdict)), "{outcomes:?}");
}

/// A message of many rows is taken in part by part. Another client sees it halfway.
#[test]
fn a_large_message_lets_others_have_their_turn() {
    let provider = provider(Config::default());
    provider.hold();
    let setup = Setup::new(64 << 20);
    let mut other = setup.connect();
    let mut queued = || other.activity().first().map_or(0, |a| a.queued + a.in_flight_rows);
    let mut clients = Vec::new();
    for n in 0.. {
        let mut client = setup.client(&provider, |_| {});
        let before = queued();
        client.rows(n * 4_000..(n + 1) * 4_000);
        clients.push(client);
        let halfway = loop {
            match queued() - before {
                0 => {}
                n => break n,
            }
        };
        if halfway < 4_000 {
            break;
        }
        assert!(n < 20, "it was never seen halfway");
    }
}
