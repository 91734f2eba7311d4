//! Frames that wait to be written to a client, bounded in case it does not read them.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use crate::protocol::MAX_FRAME;

/// Bytes that wait for a client to read them, above which it is let go: two frames of the largest size.
const MOST_UNREAD: usize = 2 * MAX_FRAME;

/// Frames that wait to be written to a client.
pub struct Frames {
    queue: UnboundedSender<Vec<u8>>,
    unread: Rc<Cell<usize>>,
    /// Woken when too much waits.
    too_slow: Rc<Notify>,
}

impl Frames {
    pub fn new(queue: UnboundedSender<Vec<u8>>, unread: Rc<Cell<usize>>, too_slow: Rc<Notify>) -> Self {
        Self { queue, unread, too_slow }
    }

    /// Closes the connection.
    pub fn hang_up(&self) {
        self.too_slow.notify_one();
    }

    /// Everything has been written.
    pub fn is_empty(&self) -> bool {
        self.unread.get() == 0
    }

    pub fn send(&self, frame: Vec<u8>) {
        let unread = self.unread.get() + frame.len();
        if unread > MOST_UNREAD {
            self.hang_up();
            return;
        }
        // The reader task notices a disconnected client.
        if self.queue.send(frame).is_ok() {
            self.unread.set(unread);
        }
    }
}
