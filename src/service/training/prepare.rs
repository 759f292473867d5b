//! From a job and its data to what a run takes: everything that can be wrong with a job is found here, before its first step and again after a restart.

use mote_trainer::{
    Method, Settings,
    data::{self, DataErrors, Dataset, Item, Limits, PromptTemplate, ReadOptions},
    grader::{self, Grader},
};
use serde_json::{Value, json};

use super::{
    config::TrainingConfig,
    encoder::BaseEncoder,
    spec::{JobSpec, hyper_error},
};
use crate::{
    adapter::Scheme,
    service::{BaseInfo, Error},
};

/// What a run takes.
pub struct Prepared {
    /// The plan.
    pub settings: Settings,
    /// Items to learn from.
    pub training: Dataset,
    /// Held-out items.
    pub validation: Option<Dataset>,
    /// Always there but for sft.
    pub grader: Option<Box<dyn Grader>>,
    /// What the numbers mean.
    pub scheme: Scheme,
    /// How many they are.
    pub numbers: usize,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("settings", &self.settings).field("items", &self.training.len()).finish()
    }
}

/// Checks and encodes everything. Takes a processor for a while.
///
/// # Errors
/// 400 that names the field, and the line of a data set.
pub(super) fn prepare(
    base: &BaseInfo,
    config: &TrainingConfig,
    spec: &JobSpec,
    training: &[u8],
    validation: Option<&[u8]>,
) -> Result<Prepared, Error> {
    let scheme = spec.read_scheme()?;
    let numbers = scheme.numbers(&base.sites);
    let supervised = spec.method == Method::Sft;
    let template = spec.prompt.as_ref().map(PromptTemplate::from_json).transpose();
    let template = template.map_err(|error| Error::invalid("prompt", format!("'prompt': {error}.")))?;
    let options = ReadOptions { supervised, prompt: template.as_ref(), limits: config.data };

    let training_name = if spec.training_file.is_some() { "training_file" } else { "dataset" };
    let validation_name = if spec.validation_file.is_some() { "validation_file" } else { "validation" };
    let items = read(training_name, training, &options)?;
    let settings = Settings::resolve(&spec.hyperparameters, spec.method, items.len(), spec.seed);
    let settings = settings.map_err(|error| hyper_error(&error))?;
    if settings.steps > config.steps {
        let field = if spec.hyperparameters.epochs.is_some() { "epochs" } else { "steps" };
        let message =
            format!("'hyperparameters.{field}' makes {} steps; this server takes {}.", settings.steps, config.steps);
        return Err(Error::invalid(format!("hyperparameters.{field}"), message));
    }
    let grader = build_grader(spec, &items, config)?;
    let encode = |name: &str, items: &[Item]| {
        let encoder = BaseEncoder(base);
        let encoded = data::encode(items, &encoder, settings.max_completion_tokens, supervised);
        let encoded = encoded.map_err(|errors| data_error(name, &errors))?;
        if let Some(grader) = &grader {
            grader::check_dataset(grader.as_ref(), &encoded).map_err(|errors| data_error(name, &errors))?;
        }
        Ok::<Dataset, Error>(encoded)
    };
    let training = encode(training_name, &items)?;
    let validation = match validation {
        None => None,
        Some(bytes) => Some(encode(validation_name, &read(validation_name, bytes, &options)?)?),
    };
    Ok(Prepared { settings, training, validation, grader, scheme, numbers })
}

fn read(name: &str, bytes: &[u8], options: &ReadOptions<'_>) -> Result<Vec<Item>, Error> {
    data::read_bytes(bytes, options).map_err(|errors| data_error(name, &errors))
}

fn data_error(name: &str, errors: &DataErrors) -> Error {
    Error::invalid(name, format!("'{name}': {errors}."))
}

/// The job's grader. Items of GSM8K and SVAMP as published need none to be named.
fn build_grader(spec: &JobSpec, items: &[Item], config: &TrainingConfig) -> Result<Option<Box<dyn Grader>>, Error> {
    let described = match &spec.grader {
        Some(described) => described.clone(),
        None if spec.method == Method::Sft => return Ok(None),
        None => match items.first().and_then(|item| data::default_reference(&item.fields)) {
            Some(reference) => json!({"type": "number", "reference": reference}),
            None => {
                let message = format!("'grader' is required for the method {}.", spec.method.name());
                return Err(Error::invalid("grader", message));
            }
        },
    };
    build_described(&described, config).map(Some)
}

/// A grader from its description.
///
/// # Errors
/// 400 that names the field.
pub(super) fn build_described(described: &Value, config: &TrainingConfig) -> Result<Box<dyn Grader>, Error> {
    grader::build(described, &config.remote).map_err(|error| {
        let message = format!("'{}': {}.", error.param, error.message.trim_end_matches('.'));
        Error::invalid(error.param, message)
    })
}

/// Inline data, if there is any, as the bytes that are kept: a list stays a list, so that errors count its items.
///
/// # Errors
/// 400 for anything but a list or a string, and for an item that is too large.
pub(super) fn inline_data(value: Option<Value>, name: &str, limits: Limits) -> Result<Option<Vec<u8>>, Error> {
    let bytes = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(lines)) => lines.into_bytes(),
        Some(Value::Array(items)) => {
            let mut bytes = vec![b'['];
            for (index, item) in items.iter().enumerate() {
                let text = item.to_string();
                if text.len() > limits.line_bytes {
                    let (item, size, most) = (index + 1, text.len(), limits.line_bytes);
                    let message = format!("'{name}': item {item}: holds {size} bytes; an item has at most {most}.");
                    return Err(Error::invalid(name, message));
                }
                if index > 0 {
                    bytes.extend_from_slice(b",\n");
                }
                bytes.extend_from_slice(text.as_bytes());
            }
            bytes.push(b']');
            bytes
        }
        Some(_) => {
            return Err(Error::invalid(name, format!("'{name}' is a list of items, or a string of JSON lines.")));
        }
    };
    check_sizes(name, &bytes, limits)?;
    Ok(Some(bytes))
}

/// The sizes of data and of its lines: what can be said at once, however much it is.
///
/// # Errors
/// 400 that names the line.
pub(super) fn check_sizes(name: &str, bytes: &[u8], limits: Limits) -> Result<(), Error> {
    if bytes.len() > limits.bytes {
        let message = format!("'{name}' has {} bytes; this server takes {}.", bytes.len(), limits.bytes);
        return Err(Error::invalid(name, message));
    }
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Ok(()); // one list: the sizes of its items are looked at when it is read
    }
    let long = bytes.split(|&byte| byte == b'\n').enumerate().find(|(_, line)| line.len() > limits.line_bytes);
    match long {
        None => Ok(()),
        Some((index, line)) => {
            let (number, size, most) = (index + 1, line.len(), limits.line_bytes);
            let message = format!("'{name}': line {number}: holds {size} bytes; a line has at most {most}.");
            Err(Error::invalid(name, message))
        }
    }
}

/// Checks a file line by line before it is known what it will be used for: it must be readable either for reinforcement or as demonstrations. Items
/// without `messages` may get their prompt from a job's template.
///
/// # Errors
/// 400 that names the lines.
pub(super) fn check_file(bytes: &[u8], limits: Limits) -> Result<(), Error> {
    let any = PromptTemplate::from_json(&Value::String("any".to_owned())).map_err(Error::internal)?;
    let read =
        |supervised| data::read_bytes(bytes, &ReadOptions { supervised, prompt: Some(&any), limits }).map(|_| ());
    let Err(errors) = read(false) else { return Ok(()) };
    match read(true) {
        Ok(()) => Ok(()),
        Err(others) => {
            let fewest = if others.0.len() < errors.0.len() { others } else { errors };
            Err(data_error("file", &fewest))
        }
    }
}
