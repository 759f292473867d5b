//! Tensors of safetensors files by name: header first, then each tensor when it is asked for.
//!
//! Read rather than mapped: a mapping is unsafe (the file may change under us), and candle copies the bytes anyway.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::Metadata};

use super::cannot_read;
use crate::{kernel::Weight, model::ModelError};

/// As in the safetensors crate: no honest header is longer.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of one or many files. Each can be taken once, so that [`Tensors::rest`] says what nobody wanted.
pub(super) struct Tensors {
    files: Vec<OpenFile>,
    entries: HashMap<String, Entry>,
}

struct OpenFile {
    file: File,
    shown: String,
}

struct Entry {
    file: usize,
    offset: u64,
    len: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Tensors {
    /// Reads the headers.
    pub(super) fn open<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Self, ModelError> {
        let mut tensors = Self { files: Vec::new(), entries: HashMap::new() };
        for path in paths {
            let mut file = File::open(path).map_err(|error| cannot_read(path, &error))?;
            let (header, start) = read_header(&mut file).map_err(|error| cannot_read(path, &error))?;
            for (name, info) in header.tensors() {
                let entry = Entry {
                    file: tensors.files.len(),
                    offset: start + info.data_offsets.0 as u64,
                    len: info.data_offsets.1 - info.data_offsets.0,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                };
                if tensors.entries.insert(name.clone(), entry).is_some() {
                    return Err(ModelError::Load(format!("tensor {name} is in two files")));
                }
            }
            tensors.files.push(OpenFile { file, shown: path.display().to_string() });
        }
        Ok(tensors)
    }

    /// True when the tensor is there and was not taken.
    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The names that nobody took, sorted.
    pub(super) fn rest(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.entries.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Takes a matrix `[rows, cols]`.
    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        Ok(Weight::from_tensor(self.take(name, &[rows, cols])?)?)
    }

    /// Takes a vector as f32.
    pub(super) fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let widen = |tensor: Tensor| tensor.to_dtype(DType::F32)?.to_vec1::<f32>();
        widen(self.take(name, &[len])?).map_err(|error| ModelError::Load(format!("tensor {name}: {error}")))
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let Some(entry) = self.entries.remove(name) else {
            return Err(ModelError::Load(format!("tensor {name} is missing")));
        };
        if entry.shape != shape {
            let found = &entry.shape;
            return Err(ModelError::Load(format!(
                "tensor {name} has shape {found:?}, the configuration says {shape:?}"
            )));
        }
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let message = format!("tensor {name} has dtype {other:?} (supported: F32, F16, BF16)");
                return Err(ModelError::Unsupported(message));
            }
        };
        let OpenFile { file, shown, .. } = &mut self.files[entry.file];
        let mut bytes = vec![0; entry.len];
        file.seek(SeekFrom::Start(entry.offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| ModelError::Load(format!("cannot read tensor {name} of {shown}: {error}")))?;
        Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)
            .map_err(|error| ModelError::Load(format!("tensor {name} of {shown}: {error}")))
    }
}

/// The header and where the data start. Checks that the file is exactly as long as the header says.
fn read_header(file: &mut File) -> Result<(Metadata, u64), String> {
    let file_len = file.metadata().map_err(|error| error.to_string())?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|_| "not a safetensors file: shorter than its header".to_owned())?;
    let len = u64::from_le_bytes(prefix);
    if len > MAX_HEADER || len + 8 > file_len {
        return Err(format!("not a safetensors file, or cut off: its header claims {len} bytes of {file_len}"));
    }
    let mut header = vec![0; len as usize];
    file.read_exact(&mut header).map_err(|error| error.to_string())?;
    // Deserialising checks offsets against shapes and dtypes.
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| format!("its safetensors header is broken: {error}"))?;
    let expected = 8 + len + header.data_len() as u64;
    if expected != file_len {
        return Err(format!("the file has {file_len} bytes, its header says {expected}"));
    }
    Ok((header, 8 + len))
}
