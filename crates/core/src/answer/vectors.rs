//! Reading vectors: an object of numbers and values that a dialect has written (`dialect/embeddings.rs`), and no model. So
//! nothing is read into it.

use std::collections::HashMap;

use super::{Verdict, is_of_another};
use crate::members::Members;
use crate::task::Kind;

/// As [`super::read`].
pub(super) fn read(text: &str, ids: &[u16], kind: &dyn Kind) -> Option<Vec<Verdict>> {
    let places: HashMap<u16, usize> = ids.iter().enumerate().map(|(place, id)| (*id, place)).collect();
    let mut said = vec![Verdict::Missing; ids.len()];
    let (mut named, mut others) = (0, 0);
    let Members(all) = serde_json::from_str::<Members>(text).unwrap_or(Members(Vec::new()));
    for (number, value) in all {
        let place = number.parse().ok().and_then(|id: u16| places.get(&id));
        let Some(verdict) = place.and_then(|place| said.get_mut(*place)) else {
            others += 1;
            continue;
        };
        named += 1;
        *verdict = match kind.read(value) {
            _ if *verdict != Verdict::Missing => Verdict::Contradicted,
            Ok(answer) => Verdict::Answer(answer),
            Err(unfit) => Verdict::Unfit(unfit),
        };
    }
    (!is_of_another(named, others)).then_some(said)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::options::Options;
    use crate::task::{Answer, Spec};

    fn read(text: &str) -> Option<Vec<Verdict>> {
        let kind = Spec::from_json("embed", &json!({"dimensions": 2})).unwrap();
        super::read(text, &[100, 2_147, 101], &*kind.prepare(&Options::default(), &str::len))
    }

    #[test]
    fn a_vector_goes_to_its_number_alone() {
        let vector = || Verdict::Answer(Answer(vec![Some("AACAPwAAAMA=".to_owned())]));
        let said = read(r#"{"101":null,"102":"AACAPwAAAMA=","2147":"AACAPwAAAMA="}"#).unwrap();
        assert!(matches!(said.as_slice(), [Verdict::Missing, v, Verdict::Unfit(_)] if *v == vector()), "{said:?}");
        let said = read(r#"{"100":"AACAPwAAAMA=","101":"AACAPwAAAMA=","100":"AACAPwAAAMA="}"#).unwrap();
        assert_eq!(said, [Verdict::Contradicted, Verdict::Missing, vector()]);
        for none in ["", "{}", "[\"AACAPwAAAMA=\"]", "{\"100\":\"AACAPwAAAMA=\"", "<think>{\"100\":null}"] {
            assert_eq!(read(none), Some(vec![Verdict::Missing; 3]), "{none}");
        }
        // Most of its numbers are those of other texts.
        let of_another = r#"{"100":"AACAPwAAAMA=","102":null,"103":null,"104":null}"#;
        assert_eq!((read(of_another), read(r#"{"102":null}"#)), (None, None));
    }
}
