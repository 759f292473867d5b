//! Schemes as JSON: a name, or an object whose missing keys are those of `tiny13`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value, json};

use super::{Convention, ProjectionDtype, Scheme, SchemeError, SiteKind, Targets, Ties};

impl Scheme {
    /// Reads `"tiny13"` or `{"convention", "rank", "u", "ties", "seed", "targets", "projection"}`.
    ///
    /// A missing key has `tiny13`'s value, so `{}` is `tiny13`; `projection` is `"f32"` or `"bf16"`. For `lora-xs`, `u`
    /// (1 or r * r), `ties` (untied) and `seed` may be given and do nothing.
    ///
    /// # Errors
    /// An unknown name or key, a wrong type, a value out of range; each with the field's path.
    pub fn from_json(value: &Value) -> Result<Self, SchemeError> {
        let fields = match value {
            Value::String(name) => return Self::preset(name).ok_or_else(|| SchemeError::UnknownName(clip(name))),
            Value::Object(fields) => fields,
            _ => return Err(SchemeError::invalid("scheme", "must be a name or an object")),
        };
        known_keys("scheme", fields, &["convention", "rank", "u", "ties", "seed", "targets", "projection"])?;
        let default = Self::tiny13();
        let convention = match string("scheme", fields, "convention")? {
            None => default.convention,
            Some("peft") => Convention::Peft,
            Some("paper") => Convention::Paper,
            Some("lora-xs") => Convention::LoraXs,
            Some(_) => return Err(SchemeError::invalid("scheme.convention", "must be peft, paper or lora-xs")),
        };
        let projection = match string("scheme", fields, "projection")? {
            None | Some("f32") => ProjectionDtype::F32,
            Some("bf16") => ProjectionDtype::Bf16,
            Some(_) => return Err(SchemeError::invalid("scheme.projection", "must be f32 or bf16")),
        };
        let scheme = Self {
            convention,
            rank: integer("scheme", fields, "rank")?.map_or(default.rank, saturate),
            u: integer("scheme", fields, "u")?.map_or(default.u, saturate),
            ties: fields.get("ties").map_or(Ok(default.ties), ties)?,
            seed: integer("scheme", fields, "seed")?.unwrap_or(default.seed),
            targets: fields.get("targets").map_or(Ok(default.targets), targets)?,
            projection,
        };
        scheme.check_ranges()?;
        if convention == Convention::LoraXs {
            return scheme.normalised_lora_xs(fields);
        }
        Ok(scheme)
    }

    /// LoRA-XS trains R itself: anything that asks for ties or projections is a misunderstanding.
    fn normalised_lora_xs(self, fields: &Map<String, Value>) -> Result<Self, SchemeError> {
        if fields.contains_key("u") && self.u != 1 && self.u != self.rank * self.rank {
            return Err(SchemeError::invalid("scheme.u", "does not apply to lora-xs, which has r * r numbers a site"));
        }
        let untied = matches!(
            self.ties,
            Ties::Tiled { n_tie: 1 } | Ties::Structured { n_tie: 1 } | Ties::Peft { weight_tying: 0.0 }
        );
        if fields.contains_key("ties") && !untied {
            return Err(SchemeError::invalid(
                "scheme.ties",
                "do not apply to lora-xs, which has its own numbers a site",
            ));
        }
        if self.projection != ProjectionDtype::F32 {
            return Err(SchemeError::invalid(
                "scheme.projection",
                "does not apply to lora-xs, which has no projection",
            ));
        }
        Ok(Self::lora_xs(self.rank, self.targets))
    }

    /// The name if the scheme has one, else the object in full.
    pub fn to_json(&self) -> Value {
        self.name().map_or_else(|| self.to_full_json(), Value::from)
    }

    /// The object with every key that applies; [`Scheme::from_json`] reads it back to an equal scheme.
    pub fn to_full_json(&self) -> Value {
        let targets: Vec<&str> = self.targets.iter().map(SiteKind::name).collect();
        if self.convention == Convention::LoraXs {
            return json!({"convention": self.convention.name(), "rank": self.rank, "targets": targets});
        }
        let ties = match self.ties {
            Ties::Groups { count } => json!({"kind": "groups", "count": count}),
            Ties::Peft { weight_tying } => json!({"kind": "peft", "weight_tying": weight_tying}),
            Ties::Tiled { n_tie } => json!({"kind": "tiled", "n_tie": n_tie}),
            Ties::Structured { n_tie } => json!({"kind": "structured", "n_tie": n_tie}),
        };
        let mut object = json!({
            "convention": self.convention.name(), "rank": self.rank, "u": self.u, "ties": ties, "seed": self.seed,
            "targets": targets,
        });
        if self.projection == ProjectionDtype::Bf16 {
            object["projection"] = "bf16".into();
        }
        object
    }
}

impl Serialize for Scheme {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Scheme {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(&Value::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

fn ties(value: &Value) -> Result<Ties, SchemeError> {
    const PATH: &str = "scheme.ties";
    let Value::Object(fields) = value else {
        return Err(SchemeError::invalid(PATH, "must be an object such as {\"kind\": \"groups\", \"count\": 13}"));
    };
    let required = |key: &str| {
        integer(PATH, fields, key)?
            .map(saturate)
            .ok_or_else(|| SchemeError::invalid(format!("{PATH}.{key}"), "is required for this kind of ties"))
    };
    match string(PATH, fields, "kind")? {
        Some("groups") => {
            known_keys(PATH, fields, &["kind", "count"])?;
            Ok(Ties::Groups { count: required("count")? })
        }
        Some("peft") => {
            known_keys(PATH, fields, &["kind", "weight_tying"])?;
            let weight_tying = fields.get("weight_tying").and_then(Value::as_f64);
            let message = "must be a number from 0 to 1";
            let weight_tying = weight_tying.ok_or_else(|| SchemeError::invalid("scheme.ties.weight_tying", message))?;
            Ok(Ties::Peft { weight_tying: weight_tying + 0.0 })
        }
        Some("tiled") => {
            known_keys(PATH, fields, &["kind", "n_tie"])?;
            Ok(Ties::Tiled { n_tie: required("n_tie")? })
        }
        Some("structured") => {
            known_keys(PATH, fields, &["kind", "n_tie"])?;
            Ok(Ties::Structured { n_tie: required("n_tie")? })
        }
        _ => Err(SchemeError::invalid("scheme.ties.kind", "must be groups, peft, tiled or structured")),
    }
}

fn targets(value: &Value) -> Result<Targets, SchemeError> {
    const PATH: &str = "scheme.targets";
    let Value::Array(names) = value else {
        return Err(SchemeError::invalid(PATH, "must be a list of q, k, v, o, gate, up, down"));
    };
    let mut targets = Targets::NONE;
    for (i, name) in names.iter().enumerate() {
        let path = || format!("{PATH}[{i}]");
        let kind = name.as_str().and_then(SiteKind::from_name);
        let kind = kind.ok_or_else(|| SchemeError::invalid(path(), "must be one of q, k, v, o, gate, up, down"))?;
        if targets.contains(kind) {
            return Err(SchemeError::invalid(path(), format!("'{}' is listed twice", kind.name())));
        }
        targets = targets.with(kind);
    }
    Ok(targets)
}

fn known_keys(path: &str, fields: &Map<String, Value>, known: &[&str]) -> Result<(), SchemeError> {
    match fields.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(SchemeError::UnknownKey { path: format!("{path}.{}", clip(key)), known: known.join(", ") }),
    }
}

fn string<'a>(path: &str, fields: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, SchemeError> {
    fields
        .get(key)
        .map(|value| value.as_str().ok_or_else(|| SchemeError::invalid(format!("{path}.{key}"), "must be a string")))
        .transpose()
}

fn integer(path: &str, fields: &Map<String, Value>, key: &str) -> Result<Option<u64>, SchemeError> {
    let message = "must be a whole number, 0 or more";
    fields
        .get(key)
        .map(|value| value.as_u64().ok_or_else(|| SchemeError::invalid(format!("{path}.{key}"), message)))
        .transpose()
}

/// Too large for usize is too large for any bound that follows.
fn saturate(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// What a client sent, short enough to be quoted in an error.
fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}
