//! The JSON schema grader: is the output JSON of this form? A fixed set of JSON Schema's words; any other is refused when the job is made, for ignoring one would grade something else.

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Grade, GradeCall, Grader, GraderConfigError, GraderError, config::output_text};
use crate::template::Template;

const MAX_NODES: usize = 1000;
const MAX_DEPTH: usize = 32;
const ANNOTATIONS: [&str; 8] =
    ["title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"];

/// `{"type": "json_schema", "schema": {"type": "object", "required": ["answer"]}}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JsonSchemaSpec {
    #[serde(default = "output_text")]
    input: Template,
    schema: Value,
}

/// 1 if the whole output is JSON that satisfies the schema, else 0.
pub(super) struct JsonSchemaGrader {
    input: Template,
    schema: Schema,
}

impl JsonSchemaGrader {
    pub(super) fn new(at: &str, spec: JsonSchemaSpec) -> Result<Self, GraderConfigError> {
        let mut nodes = 0;
        let schema = Schema::read(&spec.schema, &format!("{at}.schema"), 0, &mut nodes)?;
        Ok(Self { input: spec.input, schema })
    }
}

impl Grader for JsonSchemaGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let input = call.render(&self.input)?;
        let value: Result<Value, _> = serde_json::from_str(&input);
        Ok(Grade::pass(value.is_ok_and(|value| self.schema.allows(&value))))
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        self.input.check(item, true).map_err(|error| error.to_string())
    }
}

/// One demand on a value. Demands on another type than the value's are met, as JSON Schema has it.
#[derive(Debug)]
enum Demand {
    Never,
    Types(Vec<String>),
    OneOfValues(Vec<Value>),
    Minimum(f64, bool),
    Maximum(f64, bool),
    MultipleOf(f64),
    Length(usize, usize),
    Pattern(Regex),
    Items(Box<Schema>),
    ItemCount(usize, usize),
    UniqueItems,
    Required(Vec<String>),
    Properties(Vec<(String, Schema)>),
    /// Properties that [`Demand::Properties`] does not name.
    Additional(Vec<String>, Box<Schema>),
    PropertyCount(usize, usize),
    AllOf(Vec<Schema>),
    AnyOf(Vec<Schema>),
    OneOf(Vec<Schema>),
    Not(Box<Schema>),
}

#[derive(Debug)]
struct Schema(Vec<Demand>);

impl Schema {
    fn read(value: &Value, at: &str, depth: usize, nodes: &mut usize) -> Result<Self, GraderConfigError> {
        *nodes += 1;
        if *nodes > MAX_NODES || depth > MAX_DEPTH {
            let message = format!("is too large: at most {MAX_NODES} schemas, {MAX_DEPTH} deep");
            return Err(GraderConfigError::new(at, message));
        }
        match value {
            Value::Bool(true) => Ok(Self(Vec::new())),
            Value::Bool(false) => Ok(Self(vec![Demand::Never])),
            Value::Object(object) => {
                let words = object.iter().filter(|(word, _)| !ANNOTATIONS.contains(&word.as_str()));
                let mut reader = Reader { object, at, depth, nodes };
                words.map(|(word, value)| reader.demand(word, value)).collect::<Result<_, _>>().map(Self)
            }
            _ => Err(GraderConfigError::new(at, "must be an object or a boolean")),
        }
    }

    fn allows(&self, value: &Value) -> bool {
        self.0.iter().all(|demand| demand.met(value))
    }
}

struct Reader<'a> {
    object: &'a Map<String, Value>,
    at: &'a str,
    depth: usize,
    nodes: &'a mut usize,
}

impl Reader<'_> {
    fn fail<T>(&self, word: &str, message: &str) -> Result<T, GraderConfigError> {
        Err(GraderConfigError::new(format!("{}.{word}", self.at), message))
    }

    fn demand(&mut self, word: &str, value: &Value) -> Result<Demand, GraderConfigError> {
        Ok(match word {
            "type" => Demand::Types(self.types(value)?),
            "enum" => match value.as_array().filter(|list| !list.is_empty()) {
                Some(list) => Demand::OneOfValues(list.clone()),
                None => return self.fail(word, "must be a list with something in it"),
            },
            "const" => Demand::OneOfValues(vec![value.clone()]),
            "minimum" => Demand::Minimum(self.number(word, value)?, false),
            "exclusiveMinimum" => Demand::Minimum(self.number(word, value)?, true),
            "maximum" => Demand::Maximum(self.number(word, value)?, false),
            "exclusiveMaximum" => Demand::Maximum(self.number(word, value)?, true),
            "multipleOf" => match self.number(word, value)? {
                number if number > 0.0 => Demand::MultipleOf(number),
                _ => return self.fail(word, "must be above 0"),
            },
            "minLength" => Demand::Length(self.count(word, value)?, usize::MAX),
            "maxLength" => Demand::Length(0, self.count(word, value)?),
            "pattern" => Demand::Pattern(self.pattern(value)?),
            "items" => Demand::Items(Box::new(self.schema(word, value)?)),
            "minItems" => Demand::ItemCount(self.count(word, value)?, usize::MAX),
            "maxItems" => Demand::ItemCount(0, self.count(word, value)?),
            "uniqueItems" if value == &Value::Bool(true) => Demand::UniqueItems,
            "uniqueItems" if value == &Value::Bool(false) => Demand::AllOf(Vec::new()),
            "required" => Demand::Required(self.names(word, value)?),
            "properties" => Demand::Properties(self.properties(value)?),
            "additionalProperties" => {
                let named = self.object.get("properties").and_then(Value::as_object);
                let named = named.map(|named| named.keys().cloned().collect()).unwrap_or_default();
                Demand::Additional(named, Box::new(self.schema(word, value)?))
            }
            "minProperties" => Demand::PropertyCount(self.count(word, value)?, usize::MAX),
            "maxProperties" => Demand::PropertyCount(0, self.count(word, value)?),
            "allOf" => Demand::AllOf(self.schemas(word, value)?),
            "anyOf" => Demand::AnyOf(self.schemas(word, value)?),
            "oneOf" => Demand::OneOf(self.schemas(word, value)?),
            "not" => Demand::Not(Box::new(self.schema(word, value)?)),
            "uniqueItems" => return self.fail(word, "must be true or false"),
            _ => return Err(GraderConfigError::new(self.at, format!("`{word}` is not supported"))),
        })
    }

    fn schema(&mut self, word: &str, value: &Value) -> Result<Schema, GraderConfigError> {
        Schema::read(value, &format!("{}.{word}", self.at), self.depth + 1, self.nodes)
    }

    fn schemas(&mut self, word: &str, value: &Value) -> Result<Vec<Schema>, GraderConfigError> {
        match value.as_array().filter(|list| !list.is_empty()) {
            Some(list) => list.iter().map(|schema| self.schema(word, schema)).collect(),
            None => self.fail(word, "must be a list with something in it"),
        }
    }

    fn properties(&mut self, value: &Value) -> Result<Vec<(String, Schema)>, GraderConfigError> {
        let Some(object) = value.as_object() else {
            return self.fail("properties", "must be an object");
        };
        let property =
            |(name, schema): (&String, &Value)| Ok((name.clone(), self.schema(&format!("properties.{name}"), schema)?));
        object.iter().map(property).collect()
    }

    fn types(&self, value: &Value) -> Result<Vec<String>, GraderConfigError> {
        const TYPES: [&str; 7] = ["null", "boolean", "object", "array", "number", "integer", "string"];
        let types = if value.is_string() {
            vec![value.as_str().unwrap_or_default().to_owned()]
        } else {
            self.names("type", value)?
        };
        match types.iter().find(|name| !TYPES.contains(&name.as_str())) {
            None => Ok(types),
            Some(other) => self.fail("type", &format!("unknown: {other:?}")),
        }
    }

    fn names(&self, word: &str, value: &Value) -> Result<Vec<String>, GraderConfigError> {
        let names =
            value.as_array().and_then(|list| list.iter().map(|name| name.as_str().map(str::to_owned)).collect());
        names.map_or_else(|| self.fail(word, "must be a list of strings"), Ok)
    }

    fn number(&self, word: &str, value: &Value) -> Result<f64, GraderConfigError> {
        value.as_f64().map_or_else(|| self.fail(word, "must be a number"), Ok)
    }

    fn count(&self, word: &str, value: &Value) -> Result<usize, GraderConfigError> {
        value.as_u64().map_or_else(|| self.fail(word, "must be a whole number, 0 or above"), |count| Ok(count as usize))
    }

    fn pattern(&self, value: &Value) -> Result<Regex, GraderConfigError> {
        let Some(source) = value.as_str().filter(|source| source.len() <= 1024) else {
            return self.fail("pattern", "must be a string of at most 1024 bytes");
        };
        let built = RegexBuilder::new(source).size_limit(1 << 18).dfa_size_limit(1 << 18).nest_limit(64).build();
        built.map_or_else(|error| self.fail("pattern", &error.to_string()), Ok)
    }
}

impl Demand {
    fn met(&self, value: &Value) -> bool {
        let number = |met: &dyn Fn(f64) -> bool| value.as_f64().is_none_or(met);
        let text = |met: &dyn Fn(&str) -> bool| value.as_str().is_none_or(met);
        let list = |met: &dyn Fn(&Vec<Value>) -> bool| value.as_array().is_none_or(met);
        let object = |met: &dyn Fn(&Map<String, Value>) -> bool| value.as_object().is_none_or(met);
        match self {
            Self::Never => false,
            Self::Types(types) => types.iter().any(|name| has_type(value, name)),
            Self::OneOfValues(values) => values.iter().any(|allowed| equal(allowed, value)),
            Self::Minimum(least, exclusive) => number(&|x| if *exclusive { x > *least } else { x >= *least }),
            Self::Maximum(most, exclusive) => number(&|x| if *exclusive { x < *most } else { x <= *most }),
            Self::MultipleOf(unit) => number(&|x| ((x / unit) - (x / unit).round()).abs() < 1e-9),
            Self::Length(least, most) => text(&|text| (*least..=*most).contains(&text.chars().count())),
            Self::Pattern(pattern) => text(&|text| pattern.is_match(text)),
            Self::Items(schema) => list(&|items| items.iter().all(|item| schema.allows(item))),
            Self::ItemCount(least, most) => list(&|items| (*least..=*most).contains(&items.len())),
            Self::UniqueItems => list(&|items| {
                let mut texts: Vec<String> = items.iter().map(Value::to_string).collect();
                texts.sort_unstable();
                texts.windows(2).all(|pair| pair[0] != pair[1])
            }),
            Self::Required(names) => object(&|object| names.iter().all(|name| object.contains_key(name))),
            Self::Properties(properties) => object(&|object| {
                properties.iter().all(|(name, schema)| object.get(name).is_none_or(|value| schema.allows(value)))
            }),
            Self::Additional(named, schema) => {
                object(&|object| object.iter().all(|(name, value)| named.contains(name) || schema.allows(value)))
            }
            Self::PropertyCount(least, most) => object(&|object| (*least..=*most).contains(&object.len())),
            Self::AllOf(schemas) => schemas.iter().all(|schema| schema.allows(value)),
            Self::AnyOf(schemas) => schemas.iter().any(|schema| schema.allows(value)),
            Self::OneOf(schemas) => schemas.iter().filter(|schema| schema.allows(value)).count() == 1,
            Self::Not(schema) => !schema.allows(value),
        }
    }
}

fn has_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => value.is_string(),
    }
}

/// 1 and 1.0 are one number.
fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    fn reward(schema: &Value, output: &str) -> f32 {
        let grader = build(&json!({"type": "json_schema", "schema": schema}), &NoRemote).unwrap();
        grader.grade(GradeCall { item: &json!({}), output_text: output }).unwrap().reward
    }

    #[test]
    fn schemas_say_what_passes() {
        let person = json!({
            "title": "a person", "type": "object", "required": ["name", "age"], "additionalProperties": false,
            "properties": {
                "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
                "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2, "uniqueItems": true},
            },
        });
        for (output, want) in [
            (r#" {"name": "Ann", "age": 3} "#, 1.0),
            (r#"{"name": "Ann", "age": 3.0, "tags": ["b", "a"]}"#, 1.0),
            (r#"{"name": "ann", "age": 3}"#, 0.0),
            (r#"{"name": "Ann", "age": 3.5}"#, 0.0),
            (r#"{"name": "Ann", "age": 150}"#, 0.0),
            (r#"{"name": "Ann"}"#, 0.0),
            (r#"{"name": "Ann", "age": 3, "more": 1}"#, 0.0),
            (r#"{"name": "Ann", "age": 3, "tags": ["a", "a"]}"#, 0.0),
            (r#"{"name": "Ann", "age": 3, "tags": ["c"]}"#, 0.0),
            (r#"{"name": "Ann", "age": 3} and more"#, 0.0),
            ("[1]", 0.0),
            ("", 0.0),
        ] {
            assert_eq!(reward(&person, output), want, "{output}");
        }
    }

    #[test]
    fn every_word_works() {
        for (schema, good, bad) in [
            (json!({"const": 1}), "1.0", "2"),
            (json!({"type": ["null", "boolean"]}), "null", "0"),
            (json!({"multipleOf": 0.1}), "0.3", "0.35"),
            (json!({"exclusiveMinimum": 1, "maximum": 2}), "2", "1"),
            (json!({"maxLength": 2}), "\"äö\"", "\"abc\""),
            (json!({"minItems": 1}), "[0]", "[]"),
            (json!({"minProperties": 1, "maxProperties": 1}), "{\"a\": 1}", "{}"),
            (json!({"allOf": [{"minimum": 1}, {"maximum": 3}]}), "2", "4"),
            (json!({"anyOf": [{"const": 1}, {"const": 2}]}), "2", "3"),
            (json!({"oneOf": [{"minimum": 1}, {"minimum": 3}]}), "2", "4"),
            (json!({"not": {"type": "null"}}), "1", "null"),
            (json!({"items": false}), "[]", "[1]"),
            (json!({"additionalProperties": {"type": "string"}}), "{\"a\": \"b\"}", "{\"a\": 1}"),
        ] {
            assert_eq!((reward(&schema, good), reward(&schema, bad)), (1.0, 0.0), "{schema}");
        }
    }

    #[test]
    fn nothing_is_too_deep() {
        let mut deep = json!({});
        for _ in 0..40 {
            deep = json!({"not": deep});
        }
        assert!(build(&json!({"type": "json_schema", "schema": deep}), &NoRemote).is_err());
        assert_eq!(reward(&json!({}), &"[".repeat(100_000)), 0.0);
        for (schema, want) in [
            (json!({"type": "text"}), "grader.schema.type: unknown"),
            (json!({"required": "a"}), "grader.schema.required: must be a list"),
            (json!({"minLength": -1}), "grader.schema.minLength: must"),
            (json!({"pattern": "("}), "grader.schema.pattern: "),
            (json!(3), "grader.schema: must be an object"),
        ] {
            match build(&json!({"type": "json_schema", "schema": schema}), &NoRemote) {
                Ok(_) => panic!("{schema} was taken"),
                Err(error) => assert!(error.to_string().starts_with(want), "{schema}: {error}"),
            }
        }
    }
}
