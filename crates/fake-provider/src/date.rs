//! Times as headers hold them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time since 1970.
pub(crate) fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The first whole second of Unix time that is `wait` from now, or later.
pub(crate) fn second_after(wait: Duration) -> u64 {
    let at = unix_time().saturating_add(wait);
    at.as_secs().saturating_add(u64::from(at.subsec_nanos() > 0)).min(LAST)
}

/// The end of the year 9999: later ones have too many digits.
const LAST: u64 = 253_402_300_799;

/// `Sun, 06 Nov 1994 08:49:37 GMT`, from seconds since 1970.
pub(crate) fn http_date(unix: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (year, month, day) = civil(unix);
    format!(
        "{}, {day:02} {} {year} {} GMT",
        DAYS[(unix / 86_400 % 7) as usize],
        MONTHS[month as usize - 1],
        time_of_day(unix)
    )
}

/// `1994-11-06T08:49:37Z`, from seconds since 1970.
pub(crate) fn rfc3339(unix: u64) -> String {
    let (year, month, day) = civil(unix);
    format!("{year:04}-{month:02}-{day:02}T{}Z", time_of_day(unix))
}

fn time_of_day(unix: u64) -> String {
    format!("{:02}:{:02}:{:02}", unix / 3600 % 24, unix / 60 % 60, unix % 60)
}

/// Year, month (1 to 12) and day. Howard Hinnant's civil_from_days: years start
/// in March, eras have 400 years.
fn civil(unix: u64) -> (u64, u64, u64) {
    let z = unix / 86_400 + 719_468;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12 + 1;
    (z / 146_097 * 400 + year_of_era + u64::from(month <= 2), month, day)
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
    fn dates_as_headers_want_them() {
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(http_date(1_709_164_800), "Thu, 29 Feb 2024 00:00:00 GMT");
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(rfc3339(784_111_777), "1994-11-06T08:49:37Z");
        assert_eq!(rfc3339(1_709_164_800), "2024-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(rfc3339(second_after(Duration::MAX)), "9999-12-31T23:59:59Z");
    }
}
