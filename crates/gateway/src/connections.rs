//! Connections to providers: places for them, which ones give theirs to others, and how much of one is read
//! at a time.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use hyper::Uri;
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_service::Service;

use crate::resolver::Resolver;

/// Time that connecting may take with TLS, once there is a place.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for which a new connection is left to the request that it was made for.
const GRACE: Duration = Duration::from_secs(1);
/// Interval at which a request that waits for a place looks for a connection without a request.
const LOOK: Duration = Duration::from_millis(100);
/// Most bytes that are read of a connection before others have their turn: of the beginning of an answer, and twice as many
/// each time, up to the second. hyper takes interim answers (1xx) apart for as long as some arrive, and only when others
/// have had their turn is one that sends too many of them given up.
const TURN: (usize, usize) = (2 << 10, 16 << 10);

/// Answers up to this size (bytes) are read whatever memory is left.
pub const SMALL_ANSWER: usize = 4 << 10;
/// Largest head of an answer, bytes.
pub const MAX_HEAD: usize = 16 << 10;

tokio::task_local! {
    /// True while the request at hand waits for a place.
    pub static WAITS: Arc<AtomicBool>;
}

/// Places for the connections of all clients. They are more than there may be requests, so that whoever waits for one
/// gets that of a connection without a request.
pub struct Places {
    places: Arc<Semaphore>,
    all: Mutex<Vec<Weak<Use>>>,
    most: usize,
    pub reading: Arc<Reading>,
}

/// Bytes of the bodies that one server sends, whoever asks it.
#[derive(Debug)]
pub struct Share {
    bytes: AtomicUsize,
    all: Arc<Reading>,
}

impl Share {
    pub fn new(all: Arc<Reading>) -> Self {
        Self { bytes: AtomicUsize::new(0), all }
    }

    /// Takes bytes of an answer that has so many with them.
    ///
    /// # Errors
    /// If it is not small, and this server has three quarters of the memory that others leave: however many are bad, there is
    /// some for the next one.
    pub fn add(&self, bytes: usize, length: usize) -> Result<(), String> {
        // Large answers give their bytes back on another thread.
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let others = self.all.bytes.load(Ordering::Relaxed).saturating_sub(before);
        let most = self.all.memory.load(Ordering::Relaxed).saturating_sub(others) / 4 * 3;
        if length > SMALL_ANSWER && before.saturating_add(bytes) > most {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(
                "answers of this server that are being read use its share of llm_batch.gateway_memory".to_owned()
            );
        }
        self.all.add(bytes, length).inspect_err(|_| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        })
    }

    pub fn give_back(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.all.give_back(bytes);
    }
}

/// Bytes of all answers that are being read: of their heads, as far as they may be heads, and of their bodies.
#[derive(Debug)]
pub struct Reading {
    bytes: AtomicUsize,
    pub memory: AtomicUsize,
}

impl Reading {
    /// Takes bytes of an answer that has so many with them.
    ///
    /// # Errors
    /// If it is not small, and memory is full.
    pub fn add(&self, bytes: usize, length: usize) -> Result<(), String> {
        let all = self.bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        // A small answer never has to go without.
        if length > SMALL_ANSWER && all > self.memory.load(Ordering::Relaxed) {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err("answers that are being read use all of llm_batch.gateway_memory".to_owned());
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn all(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    pub fn give_back(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Places {
    pub fn new(most: usize, memory: usize) -> Arc<Self> {
        let reading = Arc::new(Reading { bytes: AtomicUsize::new(0), memory: AtomicUsize::new(memory) });
        Arc::new(Self { places: Arc::new(Semaphore::new(most)), all: Mutex::default(), most, reading })
    }

    /// A place, as soon as there is one.
    async fn place(&self) -> io::Result<OwnedSemaphorePermit> {
        let acquiring = Arc::clone(&self.places).acquire_owned();
        tokio::pin!(acquiring);
        if self.places.available_permits() == 0 {
            self.close_one();
        }
        loop {
            match tokio::time::timeout(LOOK, &mut acquiring).await {
                Ok(place) => return place.map_err(io::Error::other),
                Err(_) => self.close_one(),
            }
        }
    }

    fn add(&self, connection: &Arc<Use>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= 2 * self.most {
            all.retain(|other| other.strong_count() > 0);
        }
        all.push(Arc::downgrade(connection));
    }

    /// Closes the connection that has been without a request for longest.
    fn close_one(&self) {
        let now = Instant::now();
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let free = all.iter().filter_map(Weak::upgrade).filter_map(|connection| {
            let free_from = connection.state().free_from.filter(|from| *from <= now)?;
            Some((free_from, connection))
        });
        if let Some((_, oldest)) = free.min_by_key(|(free_from, _)| *free_from) {
            oldest.close();
        }
    }
}

/// Tells whether a connection has a request.
pub struct Use(Mutex<State>, Arc<Reading>, Arc<AtomicBool>);

#[derive(Default)]
struct State {
    /// Bytes that were read since its request, whatever they are, and most of them; 0: as many as come.
    read: usize,
    most: usize,
    /// The time from which it may be closed; `None`: it has a request.
    free_from: Option<Instant>,
    is_closing: bool,
    /// The reader that waits.
    reader: Option<Waker>,
}

impl Use {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer on it belongs to another request: no connection of its client is used again.
    pub fn distrust(&self) {
        self.2.store(true, Ordering::Relaxed);
    }

    /// The answer to its request has come, whole.
    pub fn is_free(&self) {
        let mut state = self.state();
        self.1.give_back(std::mem::take(&mut state.read).min(MAX_HEAD));
        (state.free_from, state.most) = (Some(Instant::now()), 0);
    }

    /// An answer of so many bytes is expected on it.
    pub fn expects(&self, bytes: usize) {
        // Framing between the parts of an answer is no larger than the parts, except from a harmful server.
        self.state().most = bytes.saturating_mul(2).saturating_add(2 * MAX_HEAD);
    }

    /// Counts bytes of the answer to its request.
    fn reads(&self, bytes: usize) -> Result<(), String> {
        let mut state = self.state();
        if state.free_from.is_some() {
            return Ok(());
        }
        let before = state.read.min(MAX_HEAD);
        let read = state.read + bytes;
        if state.most > 0 && read > state.most {
            return Err("the provider sends far more bytes than its answer may have".to_owned());
        }
        self.1.add(read.min(MAX_HEAD) - before, read)?;
        state.read = read;
        Ok(())
    }

    /// To who reads it looks as if the other side had closed it. A request that is on its way to it goes to another one:
    /// nothing of it was sent.
    fn close(&self) {
        let mut state = self.state();
        (state.free_from, state.is_closing) = (None, true);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }
}

/// Connects, once there is a place. hyper finishes a connection in the background that no request waits for any more: one
/// that a server never finishes would hold its place for ever, so the time is bounded.
#[derive(Clone)]
pub struct Connector {
    pub tls: Arc<rustls::ClientConfig>,
    pub tcp: HttpConnector<Resolver>,
    pub places: Arc<Places>,
    /// Set when an answer on one of its connections belongs to another request.
    pub is_distrusted: Arc<AtomicBool>,
}

type Connecting<T> = Pin<Box<dyn Future<Output = Result<T, Box<dyn std::error::Error + Send + Sync>>> + Send>>;

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<Placed>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { tls, tcp, places, is_distrusted } = self.clone();
        let waits = WAITS.try_with(Arc::clone).unwrap_or_default();
        Box::pin(async move {
            waits.store(true, Ordering::Relaxed);
            let place = places.place().await?;
            waits.store(false, Ordering::Relaxed);
            let usage = Arc::new(Use(Mutex::default(), Arc::clone(&places.reading), is_distrusted));
            places.add(&usage);
            let placing = Placing { tcp, place: Some((place, Arc::clone(&usage))) };
            let connecting = HttpsConnector::from((placing, tls)).call(uri);
            let connection = tokio::time::timeout(WHOLE_TIMEOUT, connecting).await??;
            usage.state().free_from = Some(Instant::now() + GRACE);
            Ok(connection)
        })
    }
}

/// Makes one connection, which has its place already.
struct Placing {
    tcp: HttpConnector<Resolver>,
    place: Option<(OwnedSemaphorePermit, Arc<Use>)>,
}

impl Service<Uri> for Placing {
    type Response = Placed;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Connecting<Placed>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (place, connecting) = (self.place.take(), self.tcp.call(uri));
        Box::pin(async move {
            let (place, usage) = place.ok_or("a place is for one connection")?;
            Ok(Placed { stream: connecting.await?, usage, read: 0, turn: TURN.0, _place: place })
        })
    }
}

/// A connection, which holds its place until it is closed.
pub struct Placed {
    stream: TokioIo<TcpStream>,
    usage: Arc<Use>,
    /// Bytes that were read in this turn, and most of them.
    read: usize,
    turn: usize,
    _place: OwnedSemaphorePermit,
}

impl Placed {
    /// A request is being sent: the beginning of an answer comes next.
    fn is_written(&mut self) {
        let mut state = self.usage.state();
        if state.free_from.take().is_some() {
            self.usage.1.give_back(std::mem::take(&mut state.read).min(MAX_HEAD));
        }
        drop(state);
        self.turn = TURN.0;
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.usage.1.give_back(std::mem::take(&mut self.usage.state().read).min(MAX_HEAD));
    }
}

impl Connection for Placed {
    fn connected(&self) -> Connected {
        self.stream.connected().extra(Arc::clone(&self.usage))
    }
}

impl Read for Placed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        {
            let mut state = self.usage.state();
            if state.is_closing {
                return Poll::Ready(Ok(()));
            }
            state.reader = Some(cx.waker().clone());
        }
        let left = self.turn.saturating_sub(self.read).min(buffer.remaining());
        if left == 0 && buffer.remaining() > 0 {
            (self.read, self.turn) = (0, TURN.1.min(2 * self.turn));
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut part = [0; TURN.1];
        let mut part = ReadBuf::new(part.get_mut(..left).unwrap_or_default());
        let read = Pin::new(&mut self.stream).poll_read(cx, part.unfilled());
        buffer.put_slice(part.filled());
        self.usage.reads(part.filled().len()).map_err(io::Error::other)?;
        self.read = if read.is_ready() { self.read + part.filled().len() } else { 0 };
        read
    }
}

impl Write for Placed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.is_written();
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.is_written();
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Reads as hyper does: as much as its buffer holds, until nothing more is there for now.
    fn turn(placed: &mut Placed, woken: &Arc<Woken>) -> usize {
        let (waker, mut read) = (Waker::from(Arc::clone(woken)), 0);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let mut buffer = ReadBuf::new(&mut buffer);
            let end = Pin::new(&mut *placed).poll_read(&mut Context::from_waker(&waker), buffer.unfilled());
            match end {
                Poll::Ready(_) if !buffer.filled().is_empty() => read += buffer.filled().len(),
                _ => return read,
            }
        }
    }

    #[test]
    fn a_server_that_never_stops_sending_lets_others_have_their_turn() {
        const ALL: usize = 1 << 20;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sending = std::thread::spawn(move || {
            let mut server = listener.accept().unwrap().0;
            server.write_all(&vec![b'x'; ALL]).unwrap();
            server
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let places = Places::new(1, usize::MAX);
            let place = places.place().await.unwrap();
            let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
            let mut placed = Placed {
                stream,
                usage: Arc::new(Use(Mutex::default(), Arc::clone(&places.reading), Arc::default())),
                read: 0,
                turn: TURN.0,
                _place: place,
            };
            let (mut all, mut most) = (0, TURN.0);
            while all < ALL {
                let woken = Arc::<Woken>::default();
                let read = turn(&mut placed, &woken);
                assert!(read <= most, "{read} bytes in a turn, after {all}");
                if read == most {
                    // A reader that stops before the end is woken again.
                    assert!(woken.0.load(Ordering::Relaxed));
                    most = TURN.1.min(2 * most);
                }
                all += read;
                tokio::task::yield_now().await;
            }
            assert_eq!((all, most), (ALL, TURN.1));
        });
        drop(sending.join().unwrap());
    }
}
