//! The number grader: is the number a completion arrives at the right one?

use serde::Deserialize;
use serde_json::Value;

use super::{Grade, GradeCall, Grader, GraderConfigError, GraderError, config::output_text};
use crate::template::{Scope, Template};

/// Where in a text its answer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extract {
    /// After the last `####` (GSM8K) if there is one, else in the last `\boxed{}` (MATH), else the last number.
    #[default]
    Auto,
    /// The last number.
    Last,
    /// The first number after the last `####`, or none.
    Hashes,
    /// The first number in the last `\boxed{}`, or none.
    Boxed,
    /// The text is nothing but the number (and white space around it), or none.
    Only,
}

/// The number a text answers with. Signs, `$`, thousands' commas, decimals and a `%` sign are understood: `-$1,234.50` is -1234.5.
pub fn extract_number(text: &str, extract: Extract) -> Option<f64> {
    match extract {
        Extract::Last => numbers(text).last().map(|found| found.value),
        Extract::Hashes => numbers(text.rsplit_once("####")?.1).next().map(|found| found.value),
        Extract::Boxed => numbers(last_boxed(text)?).next().map(|found| found.value),
        Extract::Only => {
            let text = text.trim();
            numbers(text).next().filter(|found| found.start == 0 && found.end == text.len()).map(|found| found.value)
        }
        Extract::Auto if text.contains("####") => extract_number(text, Extract::Hashes),
        Extract::Auto if last_boxed(text).is_some() => extract_number(text, Extract::Boxed),
        Extract::Auto => extract_number(text, Extract::Last),
    }
}

/// The inside of the last `\boxed{...}`, braces balanced.
fn last_boxed(text: &str) -> Option<&str> {
    let inside = text.rsplit_once("\\boxed{")?.1;
    let mut depth = 1;
    for (index, byte) in inside.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inside[..index]);
        }
    }
    None
}

struct Found {
    value: f64,
    start: usize,
    end: usize,
}

/// All numbers of a text, from left to right.
fn numbers(text: &str) -> impl Iterator<Item = Found> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        while let Some(offset) = text[at..].find(|c: char| c.is_ascii_digit()) {
            let found = number_at(text, at + offset);
            at = found.end;
            if found.value.is_finite() {
                return Some(found);
            }
        }
        None
    })
}

/// The number whose first digit stands at `digit`.
fn number_at(text: &str, digit: usize) -> Found {
    let bytes = text.as_bytes();
    let digits = |from: usize| bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let mut end = digit + digits(digit);
    let mut literal = text[digit..end].to_owned();
    if end - digit <= 3 {
        while bytes.get(end) == Some(&b',') && digits(end + 1) == 3 {
            literal.push_str(&text[end + 1..end + 4]);
            end += 4;
        }
    }
    let mut start = digit;
    let before = |end: usize| text[..end].chars().next_back();
    if before(start) == Some('.') && !before(start - 1).is_some_and(char::is_alphanumeric) {
        // ".5"
        start -= 1;
        literal.insert_str(0, "0.");
    } else if bytes.get(end) == Some(&b'.') && digits(end + 1) > 0 {
        let length = 1 + digits(end + 1);
        literal.push_str(&text[end..end + length]);
        end += length;
    }
    if before(start) == Some('$') {
        start -= 1;
    }
    // A sign belongs to the number unless something stands before it: "5-3" ends with 3.
    let sign = before(start).filter(|sign| matches!(sign, '-' | '−' | '+'));
    let mut negative = false;
    if let Some(sign) = sign {
        let signed = start - sign.len_utf8();
        if !before(signed).is_some_and(|c| c.is_alphanumeric() || c == ')' || c == '$') {
            negative = sign != '+';
            start = signed;
        }
    }
    if bytes.get(end) == Some(&b'%') {
        end += 1;
    }
    let value: f64 = literal.parse().unwrap_or(f64::INFINITY);
    Found { value: if negative { -value } else { value }, start, end }
}

/// `{"type": "number", "reference": "{{item.answer}}"}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NumberSpec {
    #[serde(default = "output_text")]
    input: Template,
    reference: Template,
    #[serde(default)]
    extract: Extract,
    #[serde(default)]
    tolerance: f64,
}

/// 1 if the output's number is within `tolerance` of the reference's (which is always looked for as [`Extract::Auto`] does), else 0; an output without a number gets 0.
pub(super) struct NumberGrader(NumberSpec);

impl NumberGrader {
    pub(super) fn new(at: &str, spec: NumberSpec) -> Result<Self, GraderConfigError> {
        if !(spec.tolerance >= 0.0 && spec.tolerance.is_finite()) {
            return Err(GraderConfigError::new(format!("{at}.tolerance"), "must be 0 or above, and finite"));
        }
        Ok(Self(spec))
    }

    fn reference(&self, text: &str) -> Result<f64, String> {
        extract_number(text, Extract::Auto).ok_or_else(|| {
            let text: String = text.chars().take(60).collect();
            format!("the reference {text:?} holds no number")
        })
    }
}

impl Grader for NumberGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let reference = self.reference(&call.render(&self.0.reference)?).map_err(GraderError::Failed)?;
        let found = extract_number(&call.render(&self.0.input)?, self.0.extract);
        // Decimals are binary fractions: 0.1 + 0.2 and 0.3 are the same answer.
        let allowed = self.0.tolerance + 1e-9 * reference.abs();
        Ok(Grade::pass(found.is_some_and(|found| (found - reference).abs() <= allowed)))
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        self.0.input.check(item, true).map_err(|error| error.to_string())?;
        let text =
            self.0.reference.render(Scope { item, output_text: Some("0") }).map_err(|error| error.to_string())?;
        self.reference(&text).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    #[test]
    fn answers_are_found_where_they_stand() {
        use Extract::*;
        for (text, extract, want) in [
            ("", Auto, None),
            ("no number", Auto, None),
            ("It is 42.", Auto, Some(42.0)),
            ("3 + 4 = 7", Last, Some(7.0)),
            ("5-3", Last, Some(3.0)),
            ("= -3", Last, Some(-3.0)),
            ("x=-3", Last, Some(-3.0)),
            ("(−3.5)", Last, Some(-3.5)),
            ("(2)-3", Last, Some(3.0)),
            ("it costs -$1,234.50 today", Last, Some(-1234.5)),
            ("$-5", Last, Some(5.0)),
            ("1,234,567", Last, Some(1_234_567.0)),
            ("1,2,3", Last, Some(3.0)),
            ("12,345,6", Last, Some(6.0)),
            ("1234,567", Last, Some(567.0)),
            ("about .5", Last, Some(0.5)),
            ("a.5", Last, Some(5.0)),
            ("3.", Last, Some(3.0)),
            ("50%", Last, Some(50.0)),
            ("v2 beats v10", Last, Some(10.0)),
            ("20 + 4 = 24\n#### 24", Auto, Some(24.0)),
            ("#### 1\n#### 2 of 3", Auto, Some(2.0)),
            ("9 and ####", Auto, None),
            ("9", Hashes, None),
            ("so \\boxed{7} or 8", Auto, Some(7.0)),
            ("\\boxed{1} \\boxed{\\text{a {b}} 12}", Auto, Some(12.0)),
            ("\\boxed{1", Auto, Some(1.0)),
            ("8", Boxed, None),
            (" 12\n", Only, Some(12.0)),
            ("-$12.5%", Only, Some(-12.5)),
            ("12.", Only, None),
            ("It is 12", Only, None),
            ("12 13", Only, None),
            ("", Only, None),
            ("٣", Last, None),
        ] {
            assert_eq!(extract_number(text, extract), want, "{text:?} {extract:?}");
        }
        assert_eq!(extract_number(&"9".repeat(400), Last), None);
    }

    #[test]
    fn grades_compare_numbers() {
        let item = json!({"answer": "half of 6 is <<6/2=3>>3\n#### 3", "value": 51.0, "none": "?"});
        let grade = |spec: Value, output: &str| {
            build(&spec, &NoRemote)
                .unwrap()
                .grade(GradeCall { item: &item, output_text: output })
                .map(|grade| grade.reward)
        };
        let plain = json!({"type": "number", "name": "n", "reference": "{{item.answer}}"});
        for (output, want) in [("So 3.", 1.0), ("3.0", 1.0), ("3.01", 0.0), ("none", 0.0), ("", 0.0)] {
            assert_eq!(grade(plain.clone(), output), Ok(want), "{output}");
        }
        let loose = json!({"type": "number", "reference": "{{item.value}}", "tolerance": 0.5});
        assert_eq!(grade(loose.clone(), "51.5"), Ok(1.0));
        assert_eq!(grade(loose, "51.6"), Ok(0.0));
        let only = json!({"type": "number", "reference": "{{item.value}}", "extract": "only"});
        assert_eq!((grade(only.clone(), "51"), grade(only, "It is 51")), (Ok(1.0), Ok(0.0)));
        let bad = build(&json!({"type": "number", "reference": "{{item.none}}"}), &NoRemote).unwrap();
        assert_eq!(bad.check_item(&item), Err("the reference \"?\" holds no number".to_owned()));
        assert!(bad.grade(GradeCall { item: &item, output_text: "3" }).is_err());
        let missing = build(&json!({"type": "number", "reference": "{{item.nothing}}"}), &NoRemote).unwrap();
        assert!(missing.check_item(&item).unwrap_err().contains("no `item.nothing`"));
    }

    proptest! {
        #[test]
        fn integers_are_found_in_any_text(value in -1_000_000i64..1_000_000, before in "[a-zé ]{0,8}", after in "[a-zé .!]{0,8}") {
            let text = format!("{before} {value} {after}");
            prop_assert_eq!(extract_number(&text, Extract::Auto), Some(value as f64));
        }

        #[test]
        fn no_text_makes_it_panic(text in "[-+−$.,%0-9a{}\\\\#é ]{0,40}") {
            for extract in [Extract::Auto, Extract::Last, Extract::Hashes, Extract::Boxed, Extract::Only] {
                let _ = extract_number(&text, extract);
            }
        }
    }
}
