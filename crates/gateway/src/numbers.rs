//! The numbers of rows in a request: three digits each, which is one token.

/// Other numbers that are tried for a text that holds its own.
const MOST_LOOKS: usize = 8;

/// Those that were not used for the longest time, among which the next ones are drawn.
const REST: usize = 450;

/// All numbers, that which was used longest ago first. An answer that comes too late, or twice, is taken for the next
/// one's where a server mixes them up: then no number of both may be the same, as far as there are enough of them.
#[derive(Debug)]
pub struct Numbers(Vec<u16>);

impl Default for Numbers {
    fn default() -> Self {
        let mut all: Vec<u16> = (100..1000).collect();
        fastrand::shuffle(&mut all);
        Self(all)
    }
}

impl Numbers {
    /// Draws `n` of them, in random order.
    pub fn draw(&self, n: usize) -> Vec<u16> {
        let mut drawn = fastrand::choose_multiple(self.0.iter().copied().take(n.max(REST)), n);
        fastrand::shuffle(&mut drawn);
        drawn
    }

    /// Draws a number for each text, which it does not hold, as far as there are such: then a value that is the number of
    /// its row is not from the text.
    pub fn draw_apart(&self, texts: &[&str]) -> Vec<u16> {
        let mut drawn = self.draw(texts.len());
        let first = drawn.clone();
        let mut others = self.0.iter().copied().filter(|number| !first.contains(number));
        for (text, number) in texts.iter().zip(&mut drawn) {
            let holds = |number: u16| text.contains(&number.to_string());
            if holds(*number)
                && let Some(other) = others.by_ref().take(MOST_LOOKS).find(|other| !holds(*other))
            {
                *number = other;
            }
        }
        drawn
    }

    /// A request is sent with these.
    pub fn used(&mut self, numbers: &[u16]) {
        let mut is_used = [false; 1000];
        for number in numbers {
            if let Some(is_used) = is_used.get_mut(usize::from(*number)) {
                *is_used = true;
            }
        }
        self.0.retain(|number| is_used.get(usize::from(*number)) == Some(&false));
        self.0.extend_from_slice(numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_and_soon_in_no_other_request() {
        for n in [1, 7, 50, 450, 500] {
            let mut numbers = Numbers::default();
            let mut recent: Vec<Vec<u16>> = Vec::new();
            for _ in 0..100 {
                let drawn = numbers.draw(n);
                let mut all: Vec<u16> = recent.iter().flatten().chain(&drawn).copied().collect();
                let length = all.len();
                all.sort_unstable();
                all.dedup();
                assert_eq!((drawn.len(), all.len()), (n, length));
                assert!(drawn.iter().all(|number| (100..1000).contains(number)));
                numbers.used(&drawn);
                recent.push(drawn);
                if recent.len() > (900 - n.max(REST)) / n {
                    recent.remove(0);
                }
            }
            assert_eq!(numbers.0.len(), 900);
        }
    }

    #[test]
    fn no_text_has_a_number_that_it_holds() {
        let held: String = (100..150).map(|n| format!("{n} ")).collect();
        let numbers = Numbers::default();
        for n in [1, 2, 20, 500].repeat(20) {
            let drawn = numbers.draw_apart(&vec![held.as_str(); n]);
            let mut all = drawn.clone();
            all.sort_unstable();
            all.dedup();
            assert_eq!((drawn.len(), all.len()), (n, n));
            assert_eq!(drawn.iter().filter(|number| held.contains(&number.to_string())).count(), 0);
        }
    }
}
