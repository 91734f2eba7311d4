//! A session's rows to the gateway, and what becomes of them. The same path as a job's.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use llm_batch_gateway::protocol::{Allowance, FromGateway, Item, Stream, ToGateway, Verdict, most_text};

use crate::budget::UNLIMITED;
use crate::classifier::Asked;
use crate::client::{Client, LostInVain, Received, WINDOW_ROWS};
use crate::error::{Error, Result};
use crate::statement::Purse;

/// Bytes of their text.
const WINDOW_BYTES: usize = 4 << 20;
/// Rows taken from their source at a time.
const FETCH: usize = 100;

/// A text, and what keeps it apart from others.
pub type Asking = (String, Option<String>);

/// The connection of the last call, with nothing under way, and what was opened on it.
struct Kept {
    client: Client,
    stream: Stream,
    purse: Purse,
}

thread_local! {
    /// A scalar function is called row by row.
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

/// Asks about rows as `source` yields them (at most so many at a call; none: the end), and hands what became of each, by
/// its position, to `sink`. The statement spends no more than `limit`.
pub fn ask(
    mut asked: Asked,
    limit: Allowance,
    source: &mut dyn FnMut(usize) -> Result<Vec<Asking>>,
    sink: &mut dyn FnMut(usize, Verdict),
) -> Result<()> {
    if limit != (Allowance { cost: UNLIMITED, tokens: UNLIMITED }) {
        asked = asked.with_budget(limit.cost != UNLIMITED)?;
    }
    let Asked { stream, model, price } = asked;
    let mut purse = Purse::new(limit, price, stream.budget);
    let mut client = match KEPT.take() {
        // What a stream was allowed holds for one budget.
        Some(kept) if kept.stream == stream && (stream.budget.is_none() || kept.purse.is_same(&purse)) => {
            match if_fresh(kept)? {
                Some(Kept { client, purse: kept, .. }) => {
                    if stream.budget.is_some() {
                        purse = kept;
                    }
                    client
                }
                None => Client::open(&stream)?,
            }
        }
        kept => {
            close(kept);
            Client::open(&stream)?
        }
    };
    let most_text = most_text(stream.model.max_request_tokens);
    let mut fetched: VecDeque<Asking> = VecDeque::new();
    let mut pending: BTreeMap<u64, Item> = BTreeMap::new();
    let mut bytes = 0;
    let mut next = 0;
    let mut ended = false;
    let mut lost = LostInVain::default();
    loop {
        let mut items = Vec::new();
        while pending.len() < WINDOW_ROWS {
            if fetched.is_empty() && !ended {
                fetched.extend(source(FETCH)?);
                ended = fetched.is_empty();
            }
            let fits =
                |asking: &mut Asking| pending.is_empty() || bytes + asking.0.len().min(most_text) <= WINDOW_BYTES;
            let Some((mut text, isolation)) = fetched.pop_front_if(fits) else { break };
            text.truncate(text.floor_char_boundary(most_text));
            bytes += text.len();
            let item = Item { n: next, text, isolation };
            pending.insert(next, item.clone());
            items.push(item);
            next += 1;
        }
        send(&mut client, items)?;
        if pending.is_empty() {
            close(KEPT.replace(Some(Kept { client, stream, purse })));
            return Ok(());
        }
        match client.receive(Duration::from_secs(60))? {
            Received::Message(FromGateway::Outcomes { outcomes, spent }) => {
                lost.answered();
                purse.spend(&spent, outcomes.iter().filter(|o| o.verdict != Verdict::Withdrawn).count() as u64);
                if let Some(more) = purse.top_up() {
                    client.send(&ToGateway::Allow(more))?;
                }
                for o in outcomes {
                    // What was withdrawn is followed by the reason: the stream is stopped.
                    if o.verdict != Verdict::Withdrawn
                        && let Some(item) = pending.remove(&o.n)
                    {
                        bytes -= item.text.len();
                        sink(o.n as usize, o.verdict);
                    }
                }
            }
            Received::Message(FromGateway::Stopped(stop)) => return Err(Error::from_stop(&stop, &model)),
            Received::Message(FromGateway::Exhausted { least, full }) => {
                client.send(&ToGateway::Allow(purse.grant(least, full, &stream)?))?;
            }
            Received::Message(_) | Received::Nothing => {}
            Received::Lost => {
                lost.another()?;
                purse.release(true);
                client = Client::open(&stream)?;
                send(&mut client, pending.values().cloned().collect())?;
            }
        }
    }
}

/// A connection, if nothing has come on it since it was last used: a stop of back then says nothing about today.
fn if_fresh(mut kept: Kept) -> Result<Option<Kept>> {
    if matches!(kept.client.receive(Duration::ZERO)?, Received::Nothing) {
        return Ok(Some(kept));
    }
    close(Some(kept));
    Ok(None)
}

/// Nothing is under way on a connection that was kept: what it was allowed was not spent.
fn close(kept: Option<Kept>) {
    if let Some(mut kept) = kept {
        kept.purse.release(false);
    }
}

/// Sends rows in frames that are small enough.
fn send(client: &mut Client, items: Vec<Item>) -> Result<()> {
    let mut frame = Vec::new();
    let mut bytes = 0;
    for item in items {
        bytes += item.text.len();
        frame.push(item);
        if bytes > 1 << 20 {
            client.send(&ToGateway::Items(std::mem::take(&mut frame)))?;
            bytes = 0;
        }
    }
    if frame.is_empty() { Ok(()) } else { client.send(&ToGateway::Items(frame)) }
}
