//! Reading `base_url`, and which hosts and addresses may be asked. Strict on purpose: what this reads and what the HTTP
//! client reads must be the same host, so nothing that readers of URLs differ about (user names, backslashes, escapes in
//! the host, a dot at its end) gets through.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Error;

/// The target of a `base_url`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The host in lower case; an address in its usual form, without brackets.
    pub host: String,
    /// The port, also where the URL leaves it out.
    pub port: u16,
    /// The connection is encrypted.
    pub https: bool,
}

impl Target {
    /// The host, if it is an address.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// Returns true if the host is this machine, by its name alone.
    pub fn is_loopback(&self) -> bool {
        self.host == LOCALHOST || self.address().is_some_and(|ip| ip.is_loopback())
    }

    /// Returns true if a list of hosts has this one: `host` for any of its ports, or `host:port`. No patterns.
    pub fn is_listed(&self, hosts: &[String]) -> bool {
        hosts.iter().any(|entry| {
            let entry = entry.to_ascii_lowercase();
            // An IPv6 address has colons of its own; with a port it stands in brackets.
            let (host, port) = match entry.strip_prefix('[').and_then(|e| e.split_once(']')) {
                Some((v6, port)) => (v6, port.strip_prefix(':')),
                None if entry.matches(':').count() == 1 => {
                    entry.split_once(':').map_or((&*entry, None), |(h, p)| (h, Some(p)))
                }
                None => (&*entry, None),
            };
            let is_host = match host.parse::<IpAddr>() {
                Ok(ip) => self.address() == Some(ip),
                Err(_) => host == self.host,
            };
            is_host && port.is_none_or(|p| p.parse() == Ok(self.port))
        })
    }
}

/// The name of this machine that every machine knows.
pub const LOCALHOST: &str = "localhost";

/// Returns true if an address belongs to this machine, in any notation.
pub fn is_loopback(ip: IpAddr) -> bool {
    reached(ip).is_loopback()
}

/// Returns true if an address is one that no language model has: this host or link alone, multicast, or a cloud's
/// metadata service, which hands out keys to any client. Private addresses are not among them.
pub fn is_reserved(ip: IpAddr) -> bool {
    const METADATA_V4: [[u8; 4]; 3] = [[100, 100, 100, 200], [168, 63, 129, 16], [192, 0, 0, 192]];
    const METADATA_V6: [[u16; 8]; 2] = [[0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254]];
    match reached(ip) {
        IpAddr::V4(v4) => {
            v4.octets()[0] == 0
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || METADATA_V4.contains(&v4.octets())
        }
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_unicast_link_local()
                // Site-local, which some networks still route.
                || v6.segments()[0] & 0xffc0 == 0xfec0
                || v6.is_multicast()
                || METADATA_V6.contains(&v6.segments())
        }
    }
}

/// Returns true if texts and keys may go to an address in the clear: to this machine, and to private addresses where
/// that is allowed.
pub fn may_be_clear(ip: IpAddr, allow_http: bool) -> bool {
    // Traffic to translated and tunnelled addresses crosses other networks, so only the mapped form counts as IPv4.
    let ip = ip.to_canonical();
    ip.is_loopback() || (allow_http && is_private(ip))
}

/// Returns true if an address is private: RFC 1918, RFC 4193, or a provider's or a VPN's own (RFC 6598).
fn is_private(ip: IpAddr) -> bool {
    let is_inside = match ip {
        IpAddr::V4(v4) => v4.is_private() || v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64,
        IpAddr::V6(v6) => v6.is_unique_local(),
    };
    // Metadata services have some of these addresses.
    is_inside && !is_reserved(ip)
}

/// The IPv4 address that an IPv6 address stands for, where it does: mapped, compatible, translated (NAT64), tunnelled (6to4,
/// Teredo). Otherwise the address itself.
fn reached(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else { return ip };
    let v4 = |high: u16, low: u16| IpAddr::V4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match v6.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => ip,
        [0, 0, 0, 0, 0, 0 | 0xffff, a, b] => v4(a, b),
        [0, 0, 0, 0, 0xffff, 0, a, b] => v4(a, b),
        [0x64, 0xff9b, 0 | 1, _, _, _, a, b] => v4(a, b),
        [0x2002, a, b, ..] => v4(a, b),
        [0x2001, 0, _, _, _, _, a, b] => v4(!a, !b),
        _ => ip,
    }
}

/// Reads a `base_url`. With `allow_http`, a name in `http://` has to be looked at when it is resolved.
///
/// # Errors
/// If it is not `https://host[:port][/path]`, or `http://` with a host that is not this machine and, with `allow_http`, no
/// name and no private address. The error does not quote it: there may be a password in it.
pub fn parse(base_url: &str, allow_http: bool) -> Result<Target, Error> {
    let hint = "Write it as https://host/path, such as https://api.openai.com/v1.";
    let bad = |why: &str| Error::new(format!("invalid base_url: {why}")).hint(hint);
    let (https, rest) = match base_url.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => return Err(bad("the scheme must be https, or http for this machine")),
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
    if path.contains('?') {
        return Err(bad("it contains a query").hint(
            "Write it as https://host/path, without \"?\" and what follows. For Azure set api 'azure' and, if need be, \
             api_version; the deployment is the name of the model.",
        ));
    }
    if !path.chars().all(|c| plain(c) || "/:%@+,=".contains(c)) {
        return Err(bad("the path contains a character that is not allowed"));
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, after) = v6.split_once(']').ok_or_else(|| bad("a bracket is not closed"))?;
            let host = host.parse::<Ipv6Addr>().map_err(|_| bad("the brackets do not contain an IPv6 address"))?;
            (host.to_string(), after.strip_prefix(':').or((after.is_empty()).then_some("")))
        }
        None => {
            let (host, port) = authority.split_once(':').map_or((authority, ""), |(h, p)| (h, p));
            // A host whose last part is a number is read as an address, in forms that are easily misread.
            let numeric = host.rsplit('.').next().is_some_and(|last| last.starts_with(|c: char| c.is_ascii_digit()));
            let is_name = host.chars().all(plain) && !host.split('.').any(str::is_empty);
            if !is_name || (numeric && host.parse::<Ipv4Addr>().is_err()) {
                return Err(bad("the host is missing or not a plain name"));
            }
            (host.to_ascii_lowercase(), Some(port))
        }
    };
    let port = match port {
        Some("") => Some(if https { 443 } else { 80 }),
        Some(p) if p.bytes().all(|b| b.is_ascii_digit()) => p.parse::<u16>().ok().filter(|n| *n > 0),
        _ => None,
    };
    let target = Target { host, port: port.ok_or_else(|| bad("the port is not a number"))?, https };
    let is_fine =
        https || target.is_loopback() || allow_http && target.address().is_none_or(|ip| may_be_clear(ip, true));
    match (is_fine, allow_http) {
        (true, _) => Ok(target),
        (false, true) => Err(bad("http is for this machine and private addresses alone, also with allow_http")),
        (false, false) => {
            Err(bad("http is for this machine alone; keys and texts would cross the network in the clear").hint(
                "Write it as https://host/path. For a host with a private address a superuser can set the option \
                 allow_http 'true'.",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_urls_are_read() {
        for (url, host, port, https) in [
            ("https://api.openai.com/v1", "api.openai.com", 443, true),
            ("https://Gpu-01.lan:8443", "gpu-01.lan", 8443, true),
            ("http://127.0.0.1:8000/v1/", "127.0.0.1", 8000, false),
            ("http://localhost/v1", "localhost", 80, false),
            ("http://[::1]:8000/v1", "::1", 8000, false),
            ("https://[0:0::00:2]/v1", "::2", 443, true),
            ("https://x.openai.azure.com/openai/deployments/d", "x.openai.azure.com", 443, true),
            ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443, true),
        ] {
            assert_eq!(parse(url, false).unwrap(), Target { host: host.into(), port, https }, "{url}");
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
            "https://bücher.example/",
            "https://x:+443/",
            "https://x.example./",
            "https://127.0.0.1./",
            "https://2852039166./",
            "https://2852039166/",
            "https://0xa9fea9fe/",
            "https://0251.0376.0251.0376/",
            "https://169.254.43518/",
            "https://169.254.169.0xfe/",
            "https://a..example/",
            "https://.example/",
            "http://[::ffff:127.0.0.1]/",
            "https://[fe80::1%25eth0]/",
        ] {
            assert!(parse(url, false).is_err(), "{url}");
        }
    }

    #[test]
    fn a_password_is_not_quoted() {
        let error = parse("https://user:sk-very-secret@api.example/v1", false).unwrap_err();
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }

    #[test]
    fn hosts_are_listed_by_name_and_port() {
        let listed = |url: &str, entry: &str| parse(url, false).unwrap().is_listed(&[entry.to_owned()]);
        for (url, entry) in [
            ("https://api.example/v1", "api.example"),
            ("https://API.example/v1", "Api.EXAMPLE"),
            ("https://api.example:8443/v1", "api.example"),
            ("https://api.example:8443/v1", "api.example:8443"),
            ("https://api.example/v1", "api.example:443"),
            ("http://127.0.0.1:8000/", "127.0.0.1"),
            ("http://[::1]:8000/", "::1"),
            ("http://[::1]:8000/", "0:0:0:0:0:0:0:1"),
            ("http://[::1]:8000/", "[::1]"),
            ("http://[::1]:8000/", "[::1]:8000"),
        ] {
            assert!(listed(url, entry), "{url} {entry}");
        }
        for (url, entry) in [
            ("https://api.example/v1", ""),
            ("https://api.example/v1", "*"),
            ("https://api.example/v1", "*.example"),
            ("https://api.example/v1", "example"),
            ("https://api.example/v1", ".example"),
            ("https://example/v1", "api.example"),
            ("https://api.example.evil/v1", "api.example"),
            ("https://api.example/v1", "api.example:8443"),
            ("https://api.example/v1", "api.example:"),
            ("https://api.example/v1", "https://api.example"),
            ("http://127.0.0.1:8000/", "127.0.0.1:80"),
            ("http://127.0.0.1:8000/", "localhost"),
            ("http://[::1]:8000/", "[::1]:80"),
            ("http://[::1]:8000/", "::1:8000"),
        ] {
            assert!(!listed(url, entry), "{url} {entry}");
        }
    }

    #[test]
    fn addresses_that_no_model_has() {
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        for reserved in [
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "2001:0:1:2:3:4:5601:5601",
            "64:ff9b::",
            "::ffff:0.0.0.0",
        ] {
            assert!(is_reserved(ip(reserved)) && !is_loopback(ip(reserved)), "{reserved}");
        }
        for loopback in
            ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"]
        {
            assert!(is_loopback(ip(loopback)) && !is_reserved(ip(loopback)), "{loopback}");
        }
        for fine in [
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "104.18.7.192",
            "168.63.129.17",
            "2606:4700::6812:7c0",
            "fd00::1",
            "fd00:ec2::253",
            "64:ff9b::a01:203",
            "2002:a01:203::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!is_reserved(ip(fine)) && !is_loopback(ip(fine)), "{fine}");
        }
    }

    #[test]
    fn http_is_for_this_machine_and_where_allowed_for_private_addresses() {
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        let url =
            |s: &str| if s.contains(':') { format!("http://[{s}]:8000/v1") } else { format!("http://{s}:8000/v1") };
        for here in ["127.0.0.1", "127.8.9.10", "::1"] {
            assert!(may_be_clear(ip(here), false) && parse(&url(here), false).is_ok(), "{here}");
            assert!(may_be_clear(ip(here), true) && parse(&url(here), true).is_ok(), "{here}");
        }
        for private in [
            "10.0.0.0",
            "10.255.255.255",
            "172.16.0.0",
            "172.31.255.255",
            "192.168.0.0",
            "192.168.255.255",
            "100.64.0.0",
            "100.127.255.255",
            "fc00::",
            "fd00::2",
            "fdff:ffff::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!may_be_clear(ip(private), false) && parse(&url(private), false).is_err(), "{private}");
            assert!(may_be_clear(ip(private), true) && parse(&url(private), true).is_ok(), "{private}");
        }
        for never in [
            "9.255.255.255",
            "11.0.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "192.169.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "8.8.8.8",
            "192.0.2.1",
            "169.254.169.254",
            "169.254.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "fbff::1",
            "fe00::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2606:4700::6812:7c0",
            "fd00:ec2::254",
            "fd20:ce::254",
            "::ffff:169.254.169.254",
            "::ffff:8.8.8.8",
            // These cross other networks on their way.
            "64:ff9b::a01:203",
            "64:ff9b::7f00:1",
            "2002:a01:203::1",
            "::10.1.2.3",
        ] {
            assert!(!may_be_clear(ip(never), true) && parse(&url(never), true).is_err(), "{never}");
            assert!(!may_be_clear(ip(never), false) && parse(&url(never), false).is_err(), "{never}");
        }
        // A name is looked at when it is resolved. Other spellings of addresses stay none.
        assert!(parse("http://host.docker.internal:11434/v1", true).is_ok());
        for url in
            ["http://10.1/", "http://0x0a.0.0.1/", "http://167772161/", "http://10.0.0.1./", "http://a@10.0.0.1/"]
        {
            assert!(parse(url, true).is_err(), "{url}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(url in ".{0,60}", tail in r"[a-z0-9.:@/\\\[\]]{0,40}") {
            let _ = parse(&url, false);
            let _ = parse(&format!("http://{tail}"), true);
        }
    }
}
