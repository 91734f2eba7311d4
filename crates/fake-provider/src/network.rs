//! Where a model of one's own may be: at another address than loopback, behind a certificate of one's own.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// The certificate of who signed [`TlsFront`]'s, in PEM form.
pub const CA: &str = include_str!("../tls/ca.pem");
/// That of somebody else.
pub const OTHER_CA: &str = include_str!("../tls/other-ca.pem");

/// A private address of this machine that is not loopback; `None` if it has none.
pub fn private_address() -> Option<IpAddr> {
    // Nothing is sent: only a route is looked up.
    let own = |to: &str| {
        let here = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(here).ok()?;
        socket.connect(to).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    let is_private = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    };
    let routes = ["10.255.255.254:9", "172.16.255.254:9", "192.168.255.254:9", "[fd00::ffff:1]:9"];
    routes.iter().filter_map(|to| own(to)).find(is_private)
}

/// Speaks TLS before a server that does not. Its certificate is for `localhost`, `127.0.0.1` and `models.example`. It runs
/// until the process ends.
#[derive(Debug)]
pub struct TlsFront {
    /// Where it listens.
    pub address: SocketAddr,
}

impl TlsFront {
    /// Starts one at an address, before a server at another one.
    pub fn start(at: IpAddr, server: SocketAddr) -> io::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from(include_bytes!("../tls/server.der").as_slice())],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(include_bytes!("../tls/server-key.der").as_slice())),
            )
            .map_err(io::Error::other)?;
        let config = Arc::new(config);
        let listener = TcpListener::bind((at, 0))?;
        let address = listener.local_addr()?;
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let config = Arc::clone(&config);
                // A client that does not trust the certificate leaves. That is no failure of the server.
                std::thread::spawn(move || serve(client, config, server));
            }
        });
        Ok(Self { address })
    }
}

fn serve(client: TcpStream, config: Arc<ServerConfig>, server: SocketAddr) -> io::Result<()> {
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut client = BufReader::new(StreamOwned::new(connection, client));
    let mut server = BufReader::new(TcpStream::connect(server)?);
    loop {
        let request = message(&mut client)?;
        server.get_mut().write_all(&request)?;
        let answer = message(&mut server)?;
        client.get_mut().write_all(&answer)?;
        client.get_mut().flush()?;
    }
}

/// A head, and the body that it announces.
fn message(from: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let (mut message, mut length) = (Vec::new(), 0);
    loop {
        let start = message.len();
        if from.read_until(b'\n', &mut message)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = String::from_utf8_lossy(&message[start..]).to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let head = message.len();
    message.resize(head + length, 0);
    from.read_exact(&mut message[head..])?;
    Ok(message)
}
