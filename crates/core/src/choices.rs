//! What an answer that is decided is chosen from.

/// The choices of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choices<'a> {
    /// Their names.
    pub names: &'a [String],
    /// They are the levels of a scale, in their order: the answer is a number, which is the place of a level, from 0, or one
    /// between two.
    pub are_levels: bool,
}
