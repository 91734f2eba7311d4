//! The gateway's lines in the server log: one a minute for a class of trouble, not one a row.

use std::collections::HashMap;

/// Least time between two lines of a class, ms.
const QUIET: u64 = 60_000;
/// Most classes that are remembered.
const MOST: usize = 1_000;

/// Decides which lines are written.
#[derive(Debug, Default)]
pub struct Notices {
    /// Class → when its last line was written, and how often it came since.
    seen: HashMap<String, (u64, u64)>,
}

impl Notices {
    /// The line to write at `now` (ms), if it is time for one of this class.
    pub fn line(&mut self, now: u64, class: &str, message: &str) -> Option<String> {
        if self.seen.len() >= MOST {
            self.seen.clear();
        }
        match self.seen.get_mut(class) {
            Some((last, suppressed)) if now < *last + QUIET => {
                *suppressed += 1;
                None
            }
            Some((last, suppressed)) => {
                let line = match std::mem::take(suppressed) {
                    0 => message.to_owned(),
                    n => format!("{message} ({n} more like this since the last line)"),
                };
                *last = now;
                Some(line)
            }
            None => {
                self.seen.insert(class.to_owned(), (now, 0));
                Some(message.to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_minute_and_none_lost_in_silence() {
        let mut n = Notices::default();
        assert_eq!(n.line(0, "a", "x").as_deref(), Some("x"));
        assert_eq!(n.line(10, "b", "y").as_deref(), Some("y"));
        assert_eq!(n.line(59_999, "a", "x"), None);
        assert_eq!(n.line(60_000, "a", "x").as_deref(), Some("x (1 more like this since the last line)"));
        assert_eq!(n.line(130_000, "a", "x").as_deref(), Some("x"));
    }
}
