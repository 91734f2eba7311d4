//! Files that the options of a server name. They are read anew for each use.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// Most bytes of a file of certificates. All that an operating system knows take some 250 kB.
const MOST_CA: u64 = 1 << 20;

/// The content of an ordinary file of at most so many bytes.
///
/// # Errors
/// If it can't be read.
pub fn read(path: &str, most: u64) -> Result<Vec<u8>, String> {
    // Opening or reading a pipe or a device may wait for ever. This does not wait, and both are refused.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|e| e.to_string())?;
    let about = file.metadata().map_err(|e| e.to_string())?;
    if !about.is_file() {
        return Err("it is not an ordinary file".to_owned());
    }
    if about.len() > most {
        return Err(format!("it is larger than {most} bytes"));
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// Checks that a file can be used as `ca_file`.
///
/// # Errors
/// The reason why it cannot.
pub fn check_ca(path: &str) -> Result<(), String> {
    roots(&read_ca(path)?).map(drop)
}

/// The content of a `ca_file`.
pub(crate) fn read_ca(path: &str) -> Result<Vec<u8>, String> {
    read(path, MOST_CA)
}

/// The certificates in it.
pub(crate) fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let mut roots = RootCertStore::empty();
    // The error may quote the file. A bundle may hold some certificates that nothing can be verified with.
    roots.add_parsable_certificates(certificates.map_err(|_| "it is not in PEM form")?);
    if roots.is_empty() {
        return Err("it holds no usable certificate in PEM form".to_owned());
    }
    Ok(roots)
}
