//! Forms of asking for machine-readable answers, and which of them are left to try with a server.
//!
//! A server refuses a form with a 400, or accepts it and answers in prose all the same. A refusal is kept for each account
//! and model, so that it is found once. The record of answers is kept for each task: instructions may lead a model to
//! prose that answers another task as it should. A form that is out stays out, so nothing goes round in circles.

use crate::options::{AnswerShape, StructuredOutput};

/// A form of `response_format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `json_schema`.
    Schema,
    /// `json_object`.
    Object,
    /// None at all.
    Plain,
}

/// Knowledge of one form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Known {
    #[default]
    Nothing,
    /// It was answered in prose once.
    Prose,
    /// An answer in it had a valid row.
    Works,
    /// It was refused, or is of no use.
    Out,
}

/// Knowledge of each form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Forms([Known; 3]);

impl Forms {
    /// The forms that are left to try for a task, in order; none if all are out. A task that names its form has that
    /// one alone.
    ///
    /// JSON mode goes first for a map, since a strict schema can't say "any key" and one that names every number costs
    /// some 14 tokens a row; a schema goes first for the other shapes.
    ///
    /// A caller that gives up a form for a reason of its own (answers without a valid row, again and again) calls
    /// [`Forms::give_up`] with the form that was used, and looks here for what is left. If nothing is,
    /// [`Forms::next`] stays with the last form. `Forms::default()` begins anew.
    pub fn left(self, shape: AnswerShape, wanted: StructuredOutput) -> impl Iterator<Item = Form> {
        order(shape, wanted).iter().copied().filter(move |form| self.0[*form as usize] != Known::Out)
    }

    /// The form to ask in.
    pub fn next(self, shape: AnswerShape, wanted: StructuredOutput) -> Form {
        let last = order(shape, wanted).last().copied().unwrap_or(Form::Plain);
        self.left(shape, wanted).next().unwrap_or(last)
    }

    /// This knowledge, with the forms that are out in `others` out here too.
    pub fn without(mut self, others: Self) -> Self {
        for (known, other) in self.0.iter_mut().zip(others.0) {
            if other == Known::Out {
                *known = Known::Out;
            }
        }
        self
    }

    /// The server refuses this form, or it is of no use.
    pub fn give_up(&mut self, form: Form) {
        self.0[form as usize] = Known::Out;
    }

    /// An answer in this form had a valid row.
    pub fn works(&mut self, form: Form) {
        let known = &mut self.0[form as usize];
        if *known != Known::Out {
            *known = Known::Works;
        }
    }

    /// A request in this form was answered in prose. Returns true if that is the form's fault, and not the rows': with
    /// a form that has worked before it is not. After the second time the form is out.
    pub fn answered_in_prose(&mut self, form: Form) -> bool {
        let known = &mut self.0[form as usize];
        match *known {
            _ if form == Form::Plain => return false,
            Known::Works => return false,
            Known::Nothing => *known = Known::Prose,
            Known::Prose | Known::Out => *known = Known::Out,
        }
        true
    }
}

/// The forms that may be tried, in order.
fn order(shape: AnswerShape, wanted: StructuredOutput) -> &'static [Form] {
    match (wanted, shape) {
        (StructuredOutput::Auto, AnswerShape::Map) => &[Form::Object, Form::Schema, Form::Plain],
        (StructuredOutput::Auto, _) => &[Form::Schema, Form::Object, Form::Plain],
        (StructuredOutput::JsonSchema, _) => &[Form::Schema],
        (StructuredOutput::JsonObject, _) => &[Form::Object],
        (StructuredOutput::None, _) => &[Form::Plain],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AUTO: StructuredOutput = StructuredOutput::Auto;
    const MAP: AnswerShape = AnswerShape::Map;

    #[test]
    fn each_form_that_is_refused_leaves_the_others_both_ways() {
        let mut forms = Forms::default();
        assert_eq!(forms.next(MAP, AUTO), Form::Object);
        assert_eq!(forms.next(AnswerShape::Properties, AUTO), Form::Schema);
        forms.give_up(Form::Object);
        assert_eq!(forms.next(MAP, AUTO), Form::Schema);
        assert_eq!(forms.next(AnswerShape::Properties, AUTO), Form::Schema);
        let mut forms = Forms::default();
        forms.give_up(Form::Schema);
        assert_eq!(forms.next(MAP, AUTO), Form::Object);
        assert_eq!(forms.next(AnswerShape::Properties, AUTO), Form::Object);
        forms.give_up(Form::Object);
        assert_eq!(forms.next(MAP, AUTO), Form::Plain);
        assert!(forms.left(MAP, StructuredOutput::JsonSchema).next().is_none());
        assert_eq!(forms.next(MAP, StructuredOutput::JsonSchema), Form::Schema);
    }

    #[test]
    fn prose_is_a_refusal_the_second_time_unless_the_form_has_worked() {
        let mut forms = Forms::default();
        assert!(forms.answered_in_prose(Form::Object));
        assert_eq!(forms.next(MAP, AUTO), Form::Object);
        assert!(forms.answered_in_prose(Form::Object));
        assert_eq!(forms.next(MAP, AUTO), Form::Schema);
        // Those that were under way meanwhile.
        assert!(forms.answered_in_prose(Form::Object));
        forms.works(Form::Schema);
        assert!(!forms.answered_in_prose(Form::Schema) && !forms.answered_in_prose(Form::Schema));
        assert_eq!(forms.next(MAP, AUTO), Form::Schema);
        // Without a form there is none to blame.
        assert!(!forms.answered_in_prose(Form::Plain));
    }

    #[test]
    fn what_is_out_elsewhere_is_out_and_nothing_else_is_taken_over() {
        let (mut own, mut others) = (Forms::default(), Forms::default());
        others.give_up(Form::Object);
        others.works(Form::Schema);
        assert!(own.without(others).left(MAP, AUTO).eq([Form::Schema, Form::Plain]));
        assert!(own.without(others).answered_in_prose(Form::Schema), "it has not worked here");
        own.give_up(Form::Schema);
        assert!(own.without(others).left(MAP, AUTO).eq([Form::Plain]));
    }

    proptest! {
        /// Whatever servers say, a form that is out does not come back, and rows are sent back for a form's sake at most
        /// as often as a form can be left, beside what was under way with it.
        #[test]
        fn nothing_goes_round_in_circles(said in proptest::collection::vec(0usize..3, 0..60), shape in 0usize..2) {
            let shape = [MAP, AnswerShape::Properties][shape];
            let (mut forms, mut sent_back) = (Forms::default(), 0);
            for said in said {
                let Some(form) = forms.left(shape, AUTO).next() else { break };
                let before: Vec<Form> = forms.left(shape, AUTO).collect();
                match said {
                    0 => forms.works(form),
                    1 => sent_back += usize::from(forms.answered_in_prose(form)),
                    _ => {
                        forms.give_up(form);
                        sent_back += 1;
                    }
                }
                prop_assert!(forms.left(shape, AUTO).all(|form| before.contains(&form)));
            }
            prop_assert!(sent_back <= 5, "{}", sent_back);
        }
    }
}
