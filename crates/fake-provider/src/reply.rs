//! What goes back: status, headers, body, in OpenAI's shapes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// A response.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(status: u16, body: &Value) -> Self {
        Self { status, headers: vec![("content-type", "application/json".to_owned())], body: body.to_string() }
    }

    /// An error of OpenAI's shape; `param` and `code` may be empty, for null.
    pub(crate) fn error(status: u16, kind: &str, param: &str, code: &str, message: &str) -> Self {
        let or_null = |text: &str| match text {
            "" => Value::Null,
            text => Value::from(text),
        };
        let error = json!({
            "message": message,
            "type": kind,
            "param": or_null(param),
            "code": or_null(code),
        });
        Self::json(status, &json!({ "error": error }))
    }

    /// A 400 of type `invalid_request_error`.
    pub(crate) fn invalid(param: &str, code: &str, message: &str) -> Self {
        Self::error(400, "invalid_request_error", param, code, message)
    }

    pub(crate) fn to_bytes(&self, keep_alive: bool) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\ndate: {}\r\ncontent-length: {}\r\nconnection: {}\r\n",
            self.status,
            reason(self.status),
            http_date(unix_time()),
            self.body.len(),
            if keep_alive { "keep-alive" } else { "close" },
        );
        for (name, value) in &self.headers {
            // A header of a test's making (a redirect's target) must not break the head.
            let value: String = value.chars().filter(|c| !c.is_control()).collect();
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(self.body.as_bytes());
        bytes
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A duration as Go prints it and OpenAI's `x-ratelimit-reset-*` headers hold
/// it, to the millisecond: `12ms`, `6.5s`, `1m30.5s`, `2h0m0s`.
pub(crate) fn go_duration(duration: Duration) -> String {
    // Rounded up: who waits that long must not come too early.
    let ms = duration.as_nanos().div_ceil(1_000_000);
    if ms == 0 {
        return "0s".to_owned();
    }
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let (hours, minutes) = (ms / 3_600_000, ms / 60_000 % 60);
    let seconds = format!("{}.{:03}", ms / 1000 % 60, ms % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    // The zeros of "0.000" are trimmed to nothing, those of "10.000" are not.
    let seconds = if seconds.is_empty() { "0" } else { seconds };
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        302 => "Found",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        413 => "Content Too Large",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Status",
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, from seconds since 1970.
fn http_date(unix: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = unix / 86_400;
    // Howard Hinnant's civil_from_days: years start in March, eras have 400 years.
    let z = days + 719_468;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12;
    let year = z / 146_097 * 400 + year_of_era + u64::from(month < 2);
    format!(
        "{}, {day:02} {} {year} {:02}:{:02}:{:02} GMT",
        DAYS[(days % 7) as usize],
        MONTHS[month as usize],
        unix / 3600 % 24,
        unix / 60 % 60,
        unix % 60,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_prints_them() {
        let go = |ms| go_duration(Duration::from_millis(ms));
        assert_eq!(go(0), "0s");
        assert_eq!(go(12), "12ms");
        assert_eq!(go(1000), "1s");
        assert_eq!(go(10_000), "10s");
        assert_eq!(go(90_500), "1m30.5s");
        assert_eq!(go(60_000), "1m0s");
        assert_eq!(go(7_200_020), "2h0m0.02s");
    }

    #[test]
    fn dates_as_http_wants_them() {
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(http_date(1_709_164_800), "Thu, 29 Feb 2024 00:00:00 GMT");
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }
}
