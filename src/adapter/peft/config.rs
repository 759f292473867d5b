//! `adapter_config.json` to a scheme.

use serde_json::{Map, Value};

use super::{PeftError, clip};
use crate::adapter::{Convention, ProjectionDtype, Scheme, SchemeError, SiteKind, Sites, Targets, Ties};

/// Largest configuration read: a list of every module path of a large model is far below.
const MAX_CONFIG: usize = 1 << 20;
/// Most entries of `target_modules`.
const MAX_TARGETS: usize = 10_000;

/// The scheme of a configuration, checked against the model and the rank served. Projections are taken as f32 until the
/// tensors say otherwise. Missing fields have PEFT's defaults.
pub(super) fn parse(bytes: &[u8], sites: &Sites, served_rank: usize) -> Result<Scheme, PeftError> {
    if bytes.len() > MAX_CONFIG {
        return Err(PeftError::ConfigFile(format!("is larger than {MAX_CONFIG} bytes")));
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|error| PeftError::ConfigFile(error.to_string()))?;
    let Value::Object(fields) = value else {
        return Err(PeftError::ConfigFile("must be a JSON object".into()));
    };
    match fields.get("peft_type").and_then(Value::as_str) {
        Some("TINYLORA") => {}
        Some(other) => {
            return Err(PeftError::config("peft_type", format!("'{}' is not TINYLORA", clip(other))));
        }
        None => return Err(PeftError::config("peft_type", "must be \"TINYLORA\"")),
    }
    refuse_what_changes_meaning(&fields)?;
    let weight_tying = match fields.get("weight_tying") {
        None => 0.0,
        Some(value) => value.as_f64().ok_or_else(|| PeftError::config("weight_tying", "must be a number"))?,
    };
    let scheme = Scheme {
        convention: Convention::Peft,
        rank: integer(&fields, "r", 2)?.try_into().unwrap_or(usize::MAX),
        u: integer(&fields, "u", 64)?.try_into().unwrap_or(usize::MAX),
        ties: Ties::Peft { weight_tying: weight_tying + 0.0 },
        seed: integer(&fields, "projection_seed", 42)?,
        targets: targets(fields.get("target_modules").unwrap_or(&Value::Null), sites)?,
        projection: ProjectionDtype::F32,
    };
    scheme.validate(sites, served_rank).map_err(|error| in_peft_words(&error))?;
    Ok(scheme)
}

/// Options that make PEFT adapt other modules, or more than its numbers.
fn refuse_what_changes_meaning(fields: &Map<String, Value>) -> Result<(), PeftError> {
    for field in ["layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save"] {
        let empty = match fields.get(field) {
            None | Some(Value::Null) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(_) => false,
        };
        if !empty {
            return Err(PeftError::config(field, "is not supported; every layer is adapted alike"));
        }
    }
    match fields.get("bias").unwrap_or(&Value::Null) {
        Value::Null => Ok(()),
        Value::String(bias) if bias == "none" => Ok(()),
        _ => Err(PeftError::config("bias", "only \"none\" is supported")),
    }
}

fn integer(fields: &Map<String, Value>, field: &str, default: u64) -> Result<u64, PeftError> {
    let message = "must be a whole number, 0 or more";
    fields.get(field).map_or(Ok(default), |value| value.as_u64().ok_or_else(|| PeftError::config(field, message)))
}

/// The kinds of sites that PEFT would adapt: an entry matches a module that it equals or ends, after a dot.
fn targets(value: &Value, sites: &Sites) -> Result<Targets, PeftError> {
    let refuse = |message: String| Err(PeftError::config("target_modules", message));
    let names = match value {
        Value::String(name) if name == "all-linear" => return Ok(Targets::ALL),
        Value::String(_) => return refuse("a regular expression is not supported; list the modules".into()),
        Value::Array(names) if names.len() <= MAX_TARGETS => names,
        Value::Array(_) => return refuse(format!("has more than {MAX_TARGETS} entries")),
        _ => return refuse("must be a list of module names or \"all-linear\"".into()),
    };
    let modules: Vec<String> = (0..sites.len()).map(|site| sites.module(site)).collect();
    let mut targeted = vec![false; sites.len()];
    for name in names {
        let Some(name) = name.as_str() else { return refuse("must be a list of module names".into()) };
        let mut found = false;
        for (module, targeted) in modules.iter().zip(&mut targeted) {
            let matches = module.strip_suffix(name).is_some_and(|head| head.is_empty() || head.ends_with('.'));
            *targeted |= matches;
            found |= matches;
        }
        if !found {
            let kinds = SiteKind::ALL.map(SiteKind::module).join(", ");
            return refuse(format!("'{}' is not one of the adapted linears ({kinds})", clip(name)));
        }
    }
    let mut targets = Targets::NONE;
    for kind in SiteKind::ALL {
        let of_kind = || (0..sites.len()).filter(|&site| sites.at(site).1 == kind);
        match of_kind().filter(|&site| targeted[site]).count() {
            0 => {}
            count if count == sites.layers => targets = targets.with(kind),
            _ => return refuse(format!("targets {} in some layers only; all or none is supported", kind.module())),
        }
    }
    Ok(targets)
}

/// The same complaint about the field as PEFT calls it.
fn in_peft_words(error: &SchemeError) -> PeftError {
    let field = match error.path() {
        "scheme.rank" => "r",
        "scheme.u" => "u",
        "scheme.ties.weight_tying" => "weight_tying",
        "scheme.seed" => "projection_seed",
        "scheme.targets" => "target_modules",
        other => other,
    };
    match error {
        SchemeError::Invalid { message, .. } => PeftError::config(field, message),
        other => PeftError::config(field, other.to_string()),
    }
}
