//! A model on one's own network: at another address than loopback, behind a certificate of one's own.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;

use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, SignatureScheme, StreamOwned};

/// The certificate of the authority that signs [`TlsFront`]'s, in PEM form.
pub const CA: &str = include_str!("../tls/ca.pem");
/// The certificate of another authority.
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

/// Speaks TLS before a server that does not. Its certificate is for `localhost`, `127.0.0.1`, `models.example` and the
/// address at which it listens. It runs until the process ends.
#[derive(Debug)]
pub struct TlsFront {
    /// The address that it listens on.
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
                vec![certificate(at)?],
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

/// The server's certificate with this address in it, signed by [`CA`].
fn certificate(at: IpAddr) -> io::Result<CertificateDer<'static>> {
    const SIGNATURE: usize = 64;
    let bad = || io::Error::other("tls/server.der or tls/ca-key.der is not as it was made");
    let mut der = include_bytes!("../tls/server.der").to_vec();
    // It holds two addresses of documentation, in whose places an address is written.
    let (place, address) = match at {
        IpAddr::V4(v4) => ([198, 51, 100, 77].to_vec(), v4.octets().to_vec()),
        IpAddr::V6(v6) => (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77).octets().to_vec(), v6.octets().to_vec()),
    };
    let start = der.windows(place.len()).position(|bytes| bytes == place).ok_or_else(bad)?;
    der[start..start + place.len()].copy_from_slice(&address);
    // The signature covers all but 4 bytes of length before, and before the signature itself 10 that say its kind.
    let signature_at = der.len() - SIGNATURE;
    let key = PrivatePkcs8KeyDer::from(include_bytes!("../tls/ca-key.der").as_slice());
    let signer = any_eddsa_type(&key).map_err(io::Error::other)?;
    let signer = signer.choose_scheme(&[SignatureScheme::ED25519]).ok_or_else(bad)?;
    let signature = signer.sign(&der[4..signature_at - 10]).map_err(io::Error::other)?;
    der[signature_at..].copy_from_slice(&signature);
    Ok(CertificateDer::from(der))
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
