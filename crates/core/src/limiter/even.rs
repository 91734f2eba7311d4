//! Large requests, of which few fit into a window: what they leave at its edge may be too small for a part of another one.

/// Requests of which so many or fewer fit into a window are made so large that a whole number of them fills it.
const FEW_REQUESTS: f64 = 8.0;
/// Sizes vary: that number stays until one less would do for requests of 1 / this part of the size.
const STAYS: f64 = 0.8;

/// The number of requests that fill a window, if they are few; else 0.
#[derive(Debug, Default)]
pub(super) struct Even(f64);

impl Even {
    /// The number of requests that are to fill the window where so many fit. `None`: they are as large as they come.
    pub fn whole(&mut self, fitting: f64) -> Option<f64> {
        let stays = |even: &f64| (*even * STAYS - 1.0..=*even).contains(&fitting);
        let whole = Some(self.0).filter(stays).unwrap_or(fitting.ceil());
        if fitting < 1.0 || whole > FEW_REQUESTS {
            return None;
        }
        self.0 = whole;
        Some(whole)
    }
}
