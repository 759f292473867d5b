//! Values that nothing may show.

use std::{convert::Infallible, fmt, fs, path::PathBuf, str::FromStr};

/// A key, a password, a URL with one. `Debug` hides it, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value itself: for where it is used, not for where it could be seen.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

impl FromStr for Secret {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

/// A file that holds a secret; white space around it does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile(PathBuf);

impl SecretFile {
    /// Reads it.
    ///
    /// # Errors
    /// A sentence with the path.
    pub fn read(&self) -> Result<Secret, String> {
        let text = fs::read_to_string(&self.0).map_err(|error| format!("{}: {error}", self.0.display()))?;
        match text.trim() {
            "" => Err(format!("{} is empty", self.0.display())),
            secret => Ok(Secret(secret.to_owned())),
        }
    }
}

impl FromStr for SecretFile {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.into()))
    }
}

/// A secret given in one of two ways.
///
/// # Errors
/// The file cannot be read.
pub(super) fn given(value: Option<&Secret>, file: Option<&SecretFile>) -> Result<Option<Secret>, String> {
    match (value, file) {
        (Some(value), _) => Ok(Some(value.clone())),
        (None, Some(file)) => file.read().map(Some),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown() {
        let secret: Secret = "hunter2".parse().unwrap();
        assert_eq!(secret.expose(), "hunter2");
        assert!(!format!("{secret:?} {:#?}", Some(&secret)).contains("hunter"));
    }

    #[test]
    fn a_file_holds_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let file = SecretFile(path.clone());
        assert!(file.read().unwrap_err().contains("key"), "not there");
        fs::write(&path, "  \n").unwrap();
        assert!(file.read().unwrap_err().contains("empty"));
        fs::write(&path, "hunter2\n").unwrap();
        assert_eq!(file.read().unwrap().expose(), "hunter2");
        assert_eq!(given(None, Some(&file)).unwrap().unwrap().expose(), "hunter2");
        assert_eq!(given(None, None), Ok(None));
    }
}
