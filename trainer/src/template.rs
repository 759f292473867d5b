//! Templates: `{{item.answer}}`, `{{ sample.output_text }}`, `{{item.steps[0].value}}`. Substitution and nothing else, so that a template cannot loop, grow or fail in a way that its check did not see.

use serde::Deserialize;
use serde_json::Value;

const MAX_SOURCE: usize = 64 * 1024;
const MAX_PLACEHOLDERS: usize = 256;
const MAX_DEPTH: usize = 16;
/// The longest text a template may become, in bytes.
pub const MAX_RENDERED: usize = 1 << 20;

/// A template that cannot be read, or names something that is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(pub String);

/// What a template may name.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// `item`: the dataset's object.
    pub item: &'a Value,
    /// `sample.output_text`: the completion, where there is one.
    pub output_text: Option<&'a str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Text(String),
    Item { source: String, path: Vec<Step> },
    OutputText,
}

/// A checked template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    segments: Vec<Segment>,
}

impl Template {
    /// Reads a template. Known are `item.<path>` and `sample.output_text`.
    pub fn parse(source: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE {
            return Err(TemplateError(format!("a template is at most {MAX_SOURCE} bytes long")));
        }
        let mut segments = Vec::new();
        let mut rest = source;
        while let Some(start) = rest.find("{{") {
            let Some(length) = rest[start..].find("}}") else {
                return Err(TemplateError(format!("`{}` has no closing `}}}}`", clip(&rest[start..]))));
            };
            if start > 0 {
                segments.push(Segment::Text(rest[..start].to_owned()));
            }
            segments.push(placeholder(rest[start + 2..start + length].trim())?);
            rest = &rest[start + length + 2..];
        }
        if !rest.is_empty() {
            segments.push(Segment::Text(rest.to_owned()));
        }
        if segments.len() > 2 * MAX_PLACEHOLDERS {
            return Err(TemplateError(format!("a template has at most {MAX_PLACEHOLDERS} placeholders")));
        }
        Ok(Self { segments })
    }

    /// Does it name `sample.output_text`?
    pub fn uses_output(&self) -> bool {
        self.segments.contains(&Segment::OutputText)
    }

    /// Does it name the item?
    pub fn uses_item(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment, Segment::Item { .. }))
    }

    /// The text with every name replaced: strings as they are, numbers, booleans, lists and objects as JSON. A name that is missing or null is an error.
    pub fn render(&self, scope: Scope<'_>) -> Result<String, TemplateError> {
        let mut text = String::new();
        for segment in &self.segments {
            match segment {
                Segment::Text(literal) => text.push_str(literal),
                Segment::OutputText => text.push_str(scope.output_text.ok_or_else(|| {
                    TemplateError("`sample.output_text` is not known here: there is no completion yet".to_owned())
                })?),
                Segment::Item { source, path } => match find(scope.item, path) {
                    None | Some(Value::Null) => {
                        return Err(TemplateError(format!("the item has no `{}`", clip(source))));
                    }
                    Some(Value::String(value)) => text.push_str(value),
                    Some(value) => text.push_str(&value.to_string()),
                },
            }
            if text.len() > MAX_RENDERED {
                return Err(TemplateError(format!("the template becomes longer than {MAX_RENDERED} bytes")));
            }
        }
        Ok(text)
    }

    /// Would it render for this item (with a completion, if `with_output`)?
    pub fn check(&self, item: &Value, with_output: bool) -> Result<(), TemplateError> {
        self.render(Scope { item, output_text: with_output.then_some("") }).map(|_| ())
    }
}

impl<'de> Deserialize<'de> for Template {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn find<'a>(item: &'a Value, path: &[Step]) -> Option<&'a Value> {
    path.iter().try_fold(item, |value, step| match step {
        Step::Key(key) => value.as_object()?.get(key),
        Step::Index(index) => value.as_array()?.get(*index),
    })
}

fn placeholder(source: &str) -> Result<Segment, TemplateError> {
    let path = parse_path(source)?;
    let name = |step: Option<&Step>| match step {
        Some(Step::Key(key)) => key.clone(),
        _ => String::new(),
    };
    match name(path.first()).as_str() {
        "item" if path.len() > 1 => Ok(Segment::Item { source: source.to_owned(), path: path[1..].to_vec() }),
        "item" => Err(TemplateError("`{{item}}` needs a field, as in `{{item.answer}}`".to_owned())),
        "sample" if path.len() == 2 && name(path.get(1)) == "output_text" => Ok(Segment::OutputText),
        "sample" => Err(TemplateError(format!(
            "unknown name `{}`: of the sample only `sample.output_text` is known",
            clip(source)
        ))),
        _ => Err(TemplateError(format!(
            "unknown name `{}`: names begin with `item.` or are `sample.output_text`",
            clip(source)
        ))),
    }
}

/// `name(.name | [index] | ["name"])*`
fn parse_path(source: &str) -> Result<Vec<Step>, TemplateError> {
    let bad = || {
        TemplateError(format!(
            "`{}` is not a name: write it as in `{{{{item.answer}}}}` or `{{{{item.list[0]}}}}`",
            clip(source)
        ))
    };
    let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let mut path = Vec::new();
    let mut rest = source;
    loop {
        if path.is_empty() || rest.starts_with('.') {
            rest = rest.strip_prefix('.').filter(|_| !path.is_empty()).unwrap_or(rest);
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            if end == 0 {
                return Err(bad());
            }
            path.push(Step::Key(rest[..end].to_owned()));
            rest = &rest[end..];
        } else if let Some(inner) = rest.strip_prefix('[') {
            let (inside, after) = inner.split_once(']').ok_or_else(bad)?;
            let quoted = |quote| inside.strip_prefix(quote).and_then(|inside| inside.strip_suffix(quote));
            path.push(match quoted('"').or_else(|| quoted('\'')) {
                Some(key) => Step::Key(key.to_owned()),
                None => Step::Index(inside.trim().parse().map_err(|_| bad())?),
            });
            rest = after;
        } else if rest.is_empty() {
            return Ok(path);
        } else {
            return Err(bad());
        }
        if path.len() > MAX_DEPTH {
            return Err(TemplateError(format!("a name has at most {MAX_DEPTH} parts")));
        }
    }
}

/// A stranger's text in an error message: not all of it.
fn clip(text: &str) -> String {
    const LONGEST: usize = 60;
    if text.chars().count() <= LONGEST { text.to_owned() } else { text.chars().take(LONGEST).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn render(source: &str, item: &Value) -> Result<String, TemplateError> {
        Template::parse(source)?.render(Scope { item, output_text: Some("out") })
    }

    #[test]
    fn names_are_replaced() {
        let item = json!({"a": "x", "n": 7, "f": 51.0, "list": [{"v": true}], "a b": "spaced", "größe": "é"});
        for (source, want) in [
            ("", ""),
            ("plain { } }} text", "plain { } }} text"),
            ("{{item.a}}", "x"),
            ("<{{ item.a }}|{{sample.output_text}}>", "<x|out>"),
            ("{{item.n}} {{item.f}} {{item.list[0].v}} {{item.list}}", "7 51.0 true [{\"v\":true}]"),
            ("{{item[\"a b\"]}}{{item['a']}}", "spacedx"),
            ("{{item.größe}}", "é"),
            ("{% if %}", "{% if %}"),
        ] {
            assert_eq!(render(source, &item).as_deref(), Ok(want), "{source}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let item = json!({"a": "x", "none": null});
        for (source, want) in [
            ("{{question}}", "unknown name `question`"),
            ("{{item}}", "needs a field"),
            ("{{sample.output_json}}", "unknown name `sample.output_json`"),
            ("{{item.a", "no closing"),
            ("{{item.a | upper}}", "is not a name"),
            ("{{item..a}}", "is not a name"),
            ("{{}}", "is not a name"),
            ("{{item.a[x]}}", "is not a name"),
            ("{{item.b}}", "the item has no `item.b`"),
            ("{{item.none}}", "the item has no `item.none`"),
            ("{{item.a.b}}", "the item has no `item.a.b`"),
            ("{{item.a[0]}}", "the item has no `item.a[0]`"),
        ] {
            let error = render(source, &item).unwrap_err().to_string();
            assert!(error.contains(want), "{source}: {error}");
        }
        let prompt = Template::parse("{{sample.output_text}}").unwrap();
        assert!(prompt.uses_output() && !prompt.uses_item());
        assert!(prompt.check(&item, false).unwrap_err().to_string().contains("no completion yet"));
        assert!(prompt.check(&item, true).is_ok());
    }

    #[test]
    fn nothing_grows_without_bound() {
        let item = json!({"big": "x".repeat(700_000)});
        assert!(render("{{item.big}}{{item.big}}", &item).unwrap_err().to_string().contains("longer than"));
        assert!(Template::parse(&"x".repeat(MAX_SOURCE + 1)).is_err());
        assert!(Template::parse(&"a{{item.a}}".repeat(400)).unwrap_err().to_string().contains("placeholders"));
        assert!(
            Template::parse(&format!("{{{{item{}}}}}", ".a".repeat(20))).unwrap_err().to_string().contains("parts")
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(source in "[{}a-z.\\[\\]\" é0-9]{0,40}") {
            if let Ok(template) = Template::parse(&source) {
                let _ = template.render(Scope { item: &json!({"a": [1]}), output_text: None });
            }
        }
    }
}
