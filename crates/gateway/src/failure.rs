//! Failure points: places where a test has the process fail. Only builds with the feature `failure_points` have them.
//!
//! A test puts a file into `failure_points/` in the data directory. It is named after the point and says what is to
//! happen there (`error`, `panic`, `term`, `kill`, `stop`), how many times, and, if not always, for which text (a part of a row).
//! It is gone when that has happened.

/// A place where a test may have the process fail, by the `failure::pass` of the crate that it is in; nothing in other
/// builds.
#[cfg(feature = "failure_points")]
#[macro_export]
#[allow(clippy::crate_in_macro_def)] // the caller's is meant
macro_rules! failure_point {
    ($name:literal) => {
        crate::failure::pass($name, "")
    };
    ($name:literal, $text:expr) => {
        crate::failure::pass($name, $text)
    };
}

/// A place where a test may have the process fail; nothing in this build.
#[cfg(not(feature = "failure_points"))]
#[macro_export]
macro_rules! failure_point {
    ($name:literal) => {};
    ($name:literal, $text:expr) => {
        let _ = $text;
    };
}

/// Does what a test wants at this point, but for an `error`, which is the caller's business: returns what it was, if
/// anything.
#[cfg(feature = "failure_points")]
#[allow(clippy::panic)]
pub fn pass(name: &str, text: &str) -> Option<String> {
    let file = format!("failure_points/{name}");
    let wish = std::fs::read_to_string(&file).ok()?;
    let (action, rest) = wish.split_once(' ')?;
    let (times, part) = rest.split_once(' ')?;
    if !text.contains(part) {
        return None;
    }
    match times.parse::<u32>() {
        Ok(n) if n > 1 => std::fs::write(&file, format!("{action} {} {part}", n - 1)).ok()?,
        _ => std::fs::remove_file(&file).ok()?,
    }
    match action {
        "panic" => panic!("failure point {name}"),
        "term" => signal("TERM"),
        "kill" => signal("KILL"),
        "stop" => signal("STOP"),
        _ => {}
    }
    Some(action.to_owned())
}

/// Sends this process a signal. A shell knows its parent, and needs no unsafe code.
#[cfg(feature = "failure_points")]
fn signal(name: &str) {
    let _ = std::process::Command::new("sh").args(["-c", &format!("kill -{name} $PPID")]).status();
}
