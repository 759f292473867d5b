//! The two files in one: a zip for downloads; zip or gzipped tar for uploads.

use std::io::{Cursor, Read, Write};

use flate2::read::GzDecoder;
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

use super::{CONFIG_FILE, MODEL_FILE, PeftError, PeftFiles};

/// Entries looked at before an archive is taken for a joke.
const MAX_ENTRIES: usize = 1000;

impl PeftFiles {
    /// Both files in a zip. Floats do not compress, so they are stored; equal files, equal bytes.
    ///
    /// # Errors
    /// [`PeftError::Write`], when the files are too large for a zip.
    pub fn to_zip(&self) -> Result<Vec<u8>, PeftError> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        for (name, bytes) in [(CONFIG_FILE, &self.config), (MODEL_FILE, &self.model)] {
            zip.start_file(name, options).map_err(|error| PeftError::Write(error.to_string()))?;
            zip.write_all(bytes).map_err(|error| PeftError::Write(error.to_string()))?;
        }
        let cursor = zip.finish().map_err(|error| PeftError::Write(error.to_string()))?;
        Ok(cursor.into_inner())
    }
}

/// Takes the two files out of a zip or a gzipped tar, wherever in it they lie. At most `limit` bytes are decompressed
/// ([`super::size_limit`]); names are compared and never opened.
///
/// # Errors
/// Neither format, a broken one, one larger than the limit, or one without exactly one of each file.
pub fn read_archive(bytes: &[u8], limit: usize) -> Result<PeftFiles, PeftError> {
    let mut found = Found { config: None, model: None, left: limit };
    match bytes {
        [b'P', b'K', ..] => read_zip(bytes, &mut found)?,
        [0x1f, 0x8b, ..] => read_tar(bytes, &mut found)?,
        _ => return Err(refuse("is neither a zip nor a gzipped tar")),
    }
    match (found.config, found.model) {
        (Some(config), Some(model)) => Ok(PeftFiles { config, model }),
        (None, _) => Err(refuse(format!("has no {CONFIG_FILE}"))),
        (_, None) => Err(refuse(format!("has no {MODEL_FILE}"))),
    }
}

struct Found {
    config: Option<Vec<u8>>,
    model: Option<Vec<u8>>,
    left: usize,
}

impl Found {
    /// Reads an entry if it is one of the two, judged by what follows the last slash.
    fn take(&mut self, path: &[u8], reader: impl Read) -> Result<(), PeftError> {
        let name = path.rsplit(|&c| c == b'/' || c == b'\\').next().unwrap_or(path);
        let place = match name {
            name if name == CONFIG_FILE.as_bytes() => &mut self.config,
            name if name == MODEL_FILE.as_bytes() => &mut self.model,
            _ => return Ok(()),
        };
        if place.is_some() {
            return Err(refuse("has the same file twice"));
        }
        let mut bytes = Vec::new();
        reader.take(self.left as u64 + 1).read_to_end(&mut bytes).map_err(|error| refuse(error.to_string()))?;
        self.left = self.left.checked_sub(bytes.len()).ok_or_else(|| refuse("is too large for this model"))?;
        *place = Some(bytes);
        Ok(())
    }
}

fn read_zip(bytes: &[u8], found: &mut Found) -> Result<(), PeftError> {
    let broken = |error: zip::result::ZipError| refuse(error.to_string());
    let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(broken)?;
    if zip.len() > MAX_ENTRIES {
        return Err(refuse(format!("has more than {MAX_ENTRIES} entries")));
    }
    for index in 0..zip.len() {
        let entry = zip.by_index(index).map_err(broken)?;
        if entry.is_file() {
            let path = entry.name_raw().to_vec();
            found.take(&path, entry)?;
        }
    }
    Ok(())
}

fn read_tar(bytes: &[u8], found: &mut Found) -> Result<(), PeftError> {
    // A bomb may hide in files we skip: the whole stream is bounded, with room for the blocks of a few small others.
    let bounded = GzDecoder::new(bytes).take(found.left as u64 + (1 << 20));
    let mut tar = tar::Archive::new(bounded);
    for (index, entry) in tar.entries().map_err(|error| refuse(error.to_string()))?.enumerate() {
        let entry = entry.map_err(|error| refuse(format!("is broken or too large for this model: {error}")))?;
        if index >= MAX_ENTRIES {
            return Err(refuse(format!("has more than {MAX_ENTRIES} entries")));
        }
        if entry.header().entry_type().is_file() {
            let path = entry.path_bytes().into_owned();
            found.take(&path, entry)?;
        }
    }
    Ok(())
}

fn refuse(message: impl Into<String>) -> PeftError {
    PeftError::Archive(message.into())
}
