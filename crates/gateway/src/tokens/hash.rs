//! The place of a token in the table; shared with the build script, which fills it.

/// Places for the 200,000 tokens; a power of two.
pub const PLACES: usize = 1 << 19;

/// The places in which a token may be, in order.
pub fn places(token: &[u8]) -> impl Iterator<Item = usize> + use<> {
    let hash = token.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let first = (hash ^ (hash >> 32)) as usize;
    (0..PLACES).map(move |i| first.wrapping_add(i) % PLACES)
}
