//! Reading `base_url`. Strict on purpose: what this reads and what the HTTP client reads must be the same host, so
//! nothing that readers of URLs differ about (user names, backslashes, escapes in the host) gets through.

use crate::Error;

/// Where a `base_url` leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The host in lower case, without brackets.
    pub host: String,
    /// Whether the connection is encrypted.
    pub https: bool,
}

impl Target {
    /// Whether the host is this machine, by its name alone.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

/// Reads a `base_url`.
///
/// # Errors
/// If it is not `https://host[:port][/path]`, or `http://` with a host that is not this machine.
pub fn parse(base_url: &str) -> Result<Target, Error> {
    let hint = "Write it as https://host/path, such as https://api.openai.com/v1.";
    let bad = |why: &str| Error::new(format!("invalid base_url \"{base_url}\": {why}")).hint(hint);
    let (https, rest) = match base_url.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => return Err(bad("the scheme must be https, or http for this machine")),
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
    if !path.chars().all(|c| plain(c) || "/:%@+,=".contains(c)) {
        return Err(bad("the path has a character that is not allowed there"));
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, after) = v6.split_once(']').ok_or_else(|| bad("a bracket is not closed"))?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| bad("what is in brackets is no IPv6 address"))?;
            (host, after.strip_prefix(':').or((after.is_empty()).then_some("")))
        }
        None => {
            let (host, port) = authority.split_once(':').map_or((authority, ""), |(h, p)| (h, p));
            // A host whose last part is a number is read as an address, in forms that are easily misread.
            let last = host.rsplit('.').next().unwrap_or_default();
            let numeric = last.starts_with(|c: char| c.is_ascii_digit());
            if host.is_empty() || !host.chars().all(plain) || (numeric && host.parse::<std::net::Ipv4Addr>().is_err()) {
                return Err(bad("the host is missing or not a plain name"));
            }
            (host, Some(port))
        }
    };
    if !port.is_some_and(|p| p.is_empty() || p.parse::<u16>().is_ok_and(|n| n > 0)) {
        return Err(bad("the port is not a number"));
    }
    let target = Target { host: host.to_ascii_lowercase(), https };
    if !https && !target.is_loopback() {
        return Err(bad("http is for this machine alone; keys and texts would cross the network in the clear"));
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_urls_are_read() {
        for (url, host, https) in [
            ("https://api.openai.com/v1", "api.openai.com", true),
            ("https://Gpu-01.lan:8443", "gpu-01.lan", true),
            ("http://127.0.0.1:8000/v1/", "127.0.0.1", false),
            ("http://localhost/v1", "localhost", false),
            ("http://[::1]:8000/v1", "::1", false),
            ("https://x.openai.azure.com/openai/deployments/d", "x.openai.azure.com", true),
        ] {
            assert_eq!(parse(url).unwrap(), Target { host: host.into(), https }, "{url}");
        }
    }

    #[test]
    fn what_could_be_misread_is_refused() {
        for url in [
            "",
            "api.openai.com/v1",
            "ftp://x/",
            "file:///etc/passwd",
            "https://",
            "https:///v1",
            "https://a b/",
            "HTTPS://x/",
            "http://api.openai.com/v1",
            "http://169.254.169.254/",
            "http://127.0.0.1@evil.example/",
            "http://localhost\\@evil.example/",
            "https://x/?a=b",
            "https://x/#a",
            "https://x:0/",
            "https://x:port/",
            "https://[::1",
            "https://[::1]x/",
            "http://0x7f.1/",
            "http://127.1/",
            "https://0x7f.0.0.1/",
            "http://localhost.evil.example/",
            "https://ex%61mple.com/",
            "https://x/\u{7f}",
        ] {
            assert!(parse(url).is_err(), "{url}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(url in ".{0,60}", tail in r"[a-z0-9.:@/\\\[\]]{0,40}") {
            let _ = parse(&url);
            let _ = parse(&format!("http://{tail}"));
        }
    }
}
