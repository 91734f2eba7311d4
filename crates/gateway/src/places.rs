//! Bounds on what takes a file. A process has a limit of open files, and one that has reached it serves nobody: it
//! takes no client, reaches no provider and finds no name.

/// The most files in use, however high the limit is.
const MOST_FILES: u64 = 16_384;
/// Files that the process itself has open: the server's and the runtime's.
const OWN_FILES: usize = 32;

/// Places for clients, requests and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Streams of sessions, each on a connection of its own.
    pub sessions: usize,
    /// Most of them for one role.
    pub of_a_role: usize,
    /// Clients beyond: jobs, and who asks for the activity.
    pub others: usize,
    /// Requests under way.
    pub requests: usize,
    /// Connections to providers: of requests, kept for later ones, or on their way.
    pub connections: usize,
}

impl Places {
    /// Those of a process that may have so many files open. Together they take at most four fifths of them.
    pub fn within(files: u64) -> Self {
        let files = usize::try_from(files.min(MOST_FILES)).unwrap_or_default();
        let free = (files * 4 / 5).saturating_sub(OWN_FILES);
        let (clients, connections) = (free / 2, free / 2);
        let others = clients / 4;
        let sessions = clients - others;
        let some = |n: usize| n.max(1);
        Self {
            sessions: some(sessions),
            of_a_role: some(sessions / 4 * 3),
            others: some(others),
            requests: some(connections / 4 * 3),
            connections: some(connections),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_fifths_of_the_files_suffice() {
        for files in (64..20_000).chain([524_288, u64::MAX]) {
            let p = Places::within(files);
            let all = OWN_FILES + p.sessions + p.others + p.connections;
            assert!(all as u64 <= files / 5 * 4 + 4, "{files}: {p:?}");
            assert!(p.requests <= p.connections && p.of_a_role <= p.sessions);
        }
        // If there is no room at all a few are tried.
        assert_eq!(Places::within(0).requests, 1);
    }
}
