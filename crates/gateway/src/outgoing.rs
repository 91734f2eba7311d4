//! What a client of the gateway has still to write. Rows give way to everything else: an allowance must not come behind
//! megabytes of rows, which the gateway would have to read, whatever memory it has, to hear of it.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};

/// Frames that wait to be written.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// The rest of the frame that is being written, and the frames that follow it before any rows.
    bytes: Vec<u8>,
    /// Frames of rows, of which nothing is written.
    rows: VecDeque<Vec<u8>>,
}

impl Outgoing {
    /// Queues a frame before all rows that have not begun.
    pub fn push(&mut self, frame: &[u8]) {
        self.bytes.extend_from_slice(frame);
    }

    /// Queues a frame of rows behind everything else.
    pub fn push_rows(&mut self, frame: Vec<u8>) {
        self.rows.push_back(frame);
    }

    /// Returns true if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.rows.is_empty()
    }

    /// Writes as much as goes at once. Returns false if the other end is gone.
    pub fn write(&mut self, mut to: impl Write) -> bool {
        loop {
            if self.bytes.is_empty() {
                let Some(frame) = self.rows.pop_front() else { return true };
                self.bytes = frame;
            }
            match to.write(&self.bytes) {
                Ok(0) => return false,
                Ok(n) => drop(self.bytes.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use super::Outgoing;

    /// Takes so many bytes, and then no more for now.
    struct Narrow(Vec<u8>, usize);

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.1 - self.0.len());
            if n == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.0.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_allowance_overtakes_rows_that_have_not_begun() {
        let (mut outgoing, mut to) = (Outgoing::default(), Narrow(Vec::new(), 7));
        outgoing.push(b"open;");
        outgoing.push_rows(b"rows 1;".to_vec());
        outgoing.push_rows(b"rows 2;".to_vec());
        assert!(outgoing.write(&mut to));
        outgoing.push(b"allow;");
        to.1 = 100;
        assert!(outgoing.write(&mut to));
        assert_eq!(String::from_utf8_lossy(&to.0), "open;rows 1;allow;rows 2;");
        assert!(outgoing.is_empty());
    }

    #[test]
    fn an_end_that_takes_nothing_is_gone() {
        let mut outgoing = Outgoing::default();
        assert!(outgoing.write(&mut [][..]));
        outgoing.push_rows(vec![1]);
        assert!(!outgoing.write(&mut [][..]));
    }
}
