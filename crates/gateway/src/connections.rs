//! Connections to providers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_service::Service;

use crate::egress::Resolver;

/// How long connecting may take with TLS, and with the wait for a place.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Connects within a time. hyper finishes a connection in the background that no request waits for any more: one that a
/// server never finishes would hold its place for ever.
#[derive(Clone)]
pub struct Bounded(pub HttpsConnector<Connector>);

impl Service<Uri> for Bounded {
    type Response = MaybeHttpsStream<Placed>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move { tokio::time::timeout(WHOLE_TIMEOUT, connecting).await? })
    }
}

/// Connects, once there is a place.
#[derive(Clone)]
pub struct Connector {
    pub tcp: HttpConnector<Resolver>,
    pub places: Arc<Semaphore>,
}

impl Service<Uri> for Connector {
    type Response = Placed;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Placed, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (places, connecting) = (Arc::clone(&self.places), self.tcp.call(uri));
        Box::pin(async move {
            let place = places.acquire_owned().await?;
            Ok(Placed { stream: connecting.await?, _place: place })
        })
    }
}

/// A connection, which holds its place until it is closed.
pub struct Placed {
    stream: TokioIo<TcpStream>,
    _place: OwnedSemaphorePermit,
}

impl Connection for Placed {
    fn connected(&self) -> Connected {
        self.stream.connected()
    }
}

impl Read for Placed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Write for Placed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
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
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }
}
