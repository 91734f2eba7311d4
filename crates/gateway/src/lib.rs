//! The network part of pg_llm_batch: takes rows from sessions and jobs over a Unix socket, packs them into requests,
//! keeps within the limits, checks the answers. It does not know Postgres and can run in a test of its own.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod asking;
mod cache;
mod connections;
mod dispatch;
mod egress;
pub mod failure;
pub mod files;
mod frames;
mod group;
mod groups;
mod kept;
mod key;
mod lane;
mod learned;
mod notice;
mod numbers;
pub mod outgoing;
mod places;
pub mod protocol;
mod purse;
mod queue;
mod redact;
mod request;
mod resolver;
mod route;
mod row;
mod ruler;
mod server;
mod sizes;
mod standing;
pub mod tokens;

pub use kept::{Kept, KeptLane, MOST_LANES, Stock};
pub use places::Places;

use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use tokio::sync::watch;

/// Returns true if the HTTP client can read an URL that core's `url::parse` accepts: it refuses names that begin like
/// international ones (`xn--`) and are none.
pub fn is_readable(url: &str) -> bool {
    url::Url::parse(url).is_ok_and(|url| url.as_str().parse::<hyper::Uri>().is_ok())
}

/// Settings that may change while the gateway runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Off: nothing is sent, and streams are told to stop.
    pub enabled: bool,
    /// Bytes of waiting text above which no more is read from clients.
    pub memory: usize,
    /// Bytes for answers that are kept for later rows of the same text; 0 keeps none.
    pub cache: usize,
}

/// The gateway on its own thread. Dropping it ends the thread; requests under way are abandoned.
#[derive(Debug)]
pub struct Gateway {
    settings: Option<watch::Sender<Settings>>,
    kept: Kept,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Gateway {
    /// Starts the gateway on a bound socket. `before`: what an earlier one has left; the default if that is not known.
    /// `places` is what its files allow. Lines for the server's log are sent to `log`.
    ///
    /// # Errors
    /// If the thread, its runtime or the HTTP client can't be set up.
    pub fn start(
        listener: UnixListener,
        settings: Settings,
        places: Places,
        before: Stock,
        log: mpsc::Sender<String>,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let tls = egress::tls().map_err(std::io::Error::other)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (sender, receiver) = watch::channel(settings);
        let kept = Kept::new(before);
        let known = kept.clone();
        let thread = std::thread::Builder::new().name("llm_batch net".into()).spawn(move || {
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, server::run(listener, (tls, places), receiver, known, log));
        })?;
        Ok(Self { settings: Some(sender), kept, thread: Some(thread) })
    }

    /// Changes the settings.
    pub fn configure(&self, settings: Settings) {
        if let Some(sender) = &self.settings {
            sender.send_if_modified(|old| {
                let changed = *old != settings;
                *old = settings;
                changed
            });
        }
    }

    /// The state that is to outlive it.
    pub fn kept(&self) -> Kept {
        self.kept.clone()
    }

    /// Returns true if its thread has ended, which it does by itself only when something is broken.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.settings = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
