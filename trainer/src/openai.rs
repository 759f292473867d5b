//! OpenAI's names for hyperparameters, as `fine_tuning.jobs.create` sends them.

use serde_json::Value;

use crate::hyper::{FIELDS, HyperparameterError, Hyperparameters, Method};

/// Reads the `hyperparameters` of OpenAI's `method.supervised` or `method.reinforcement`. `"auto"` and null are our own default. `n_epochs` is `epochs`, `batch_size` is `prompts_per_step`, `learning_rate_multiplier` multiplies the default
/// `learning_rate`, and `compute_multiplier` the default `samples_per_prompt`. What we cannot do (`reasoning_effort`, evaluation in mid-run) is an error unless it is `"auto"`.
pub fn hyperparameters(method: Method, value: &Value) -> Result<Hyperparameters, HyperparameterError> {
    let mut hyper = Hyperparameters::default();
    if value.is_null() {
        return Ok(hyper);
    }
    let Value::Object(object) = value else {
        return Err(HyperparameterError::new("", "must be an object"));
    };
    for (name, value) in object {
        let given = !value.is_null() && value.as_str() != Some("auto");
        match (name.as_str(), method) {
            ("n_epochs" | "batch_size" | "learning_rate_multiplier", _) | ("compute_multiplier", Method::Grpo)
                if !given => {}
            ("n_epochs", _) => hyper.epochs = Some(whole(name, value)?),
            ("batch_size", _) => hyper.prompts_per_step = Some(whole(name, value)?),
            ("learning_rate_multiplier", _) => {
                hyper.learning_rate = Some(positive(name, value)? * default("learning_rate", method));
            }
            ("compute_multiplier", Method::Grpo) => {
                let samples = positive(name, value)? * default("samples_per_prompt", method);
                hyper.samples_per_prompt = Some(samples.round().clamp(2.0, 1e9) as u64);
            }
            ("eval_interval" | "eval_samples" | "reasoning_effort", Method::Grpo) if !given => {}
            ("eval_interval" | "eval_samples" | "reasoning_effort", Method::Grpo) => {
                return Err(HyperparameterError::new(name, "is not supported; leave it out or say \"auto\""));
            }
            _ => return Err(HyperparameterError::new(name, "unknown")),
        }
    }
    Ok(hyper)
}

fn default(name: &str, method: Method) -> f64 {
    let field = FIELDS.iter().find(|field| field.name == name);
    field.and_then(|field| (field.default)(method).as_f64()).unwrap_or(1.0)
}

fn whole(name: &str, value: &Value) -> Result<u64, HyperparameterError> {
    let number = value.as_u64().filter(|number| *number > 0);
    number.ok_or_else(|| HyperparameterError::new(name, "must be \"auto\" or a whole number above 0"))
}

fn positive(name: &str, value: &Value) -> Result<f64, HyperparameterError> {
    let number = value.as_f64().filter(|number| *number > 0.0);
    number.ok_or_else(|| HyperparameterError::new(name, "must be \"auto\" or a number above 0"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_translated() {
        let all = json!({"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "compute_multiplier": 2, "eval_interval": "auto", "reasoning_effort": null});
        let hyper = hyperparameters(Method::Grpo, &all).unwrap();
        let want = json!({"epochs": 2, "prompts_per_step": 4, "learning_rate": 0.005, "samples_per_prompt": 16});
        assert_eq!(hyper, Hyperparameters::from_json(&want).unwrap());
        let auto = json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
        assert_eq!(hyperparameters(Method::Sft, &auto).unwrap(), Hyperparameters::default());
        assert_eq!(hyperparameters(Method::Sft, &Value::Null).unwrap(), Hyperparameters::default());
    }

    #[test]
    fn mistakes_name_their_field() {
        for (method, value, field) in [
            (Method::Grpo, json!({"eval_samples": 3}), "eval_samples"),
            (Method::Grpo, json!({"epochs": 3}), "epochs"),
            (Method::Sft, json!({"compute_multiplier": 1}), "compute_multiplier"),
            (Method::Sft, json!({"n_epochs": 0}), "n_epochs"),
            (Method::Sft, json!({"batch_size": "large"}), "batch_size"),
            (Method::Sft, json!({"learning_rate_multiplier": -1}), "learning_rate_multiplier"),
            (Method::Sft, json!(3), ""),
        ] {
            assert_eq!(hyperparameters(method, &value).unwrap_err().field, field);
        }
    }
}
