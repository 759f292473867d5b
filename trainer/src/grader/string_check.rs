//! The string check: OpenAI's four operations.

use serde::Deserialize;
use serde_json::Value;

use super::{Grade, GradeCall, Grader, GraderError, config::output_text};
use crate::template::Template;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Operation {
    /// Equal.
    #[default]
    Eq,
    /// Not equal.
    Ne,
    /// The input holds the reference.
    Like,
    /// The same, whatever the case.
    Ilike,
}

/// `{"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}`: 1 or 0, on the strings as they are.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StringCheckGrader {
    #[serde(default = "output_text")]
    input: Template,
    reference: Template,
    #[serde(default)]
    operation: Operation,
}

impl Grader for StringCheckGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let (input, reference) = (call.render(&self.input)?, call.render(&self.reference)?);
        Ok(Grade::pass(match self.operation {
            Operation::Eq => input == reference,
            Operation::Ne => input != reference,
            Operation::Like => input.contains(&reference),
            Operation::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
        }))
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        [&self.input, &self.reference]
            .iter()
            .try_for_each(|template| template.check(item, true).map_err(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    #[test]
    fn the_four_operations() {
        let item = json!({"answer": "Große"});
        for (operation, output, want) in [
            ("eq", "Große", 1.0),
            ("eq", "Große ", 0.0),
            ("ne", "Große", 0.0),
            ("ne", "x", 1.0),
            ("like", "die Große Stadt", 1.0),
            ("like", "die große Stadt", 0.0),
            ("ilike", "DIE GROßE STADT", 1.0),
            ("ilike", "klein", 0.0),
        ] {
            let spec = json!({"type": "string_check", "name": "x", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": operation});
            let grader = build(&spec, &NoRemote).unwrap();
            assert_eq!(
                grader.grade(GradeCall { item: &item, output_text: output }).unwrap().reward,
                want,
                "{operation} {output}"
            );
            assert!(grader.check_item(&item).is_ok() && grader.check_item(&json!({})).is_err());
        }
    }
}
