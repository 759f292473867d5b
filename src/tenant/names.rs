//! Which names adapters and tenants may have.

/// The longest name, in characters.
const MAX_LEN: usize = 64;

/// Names that are routes below `/adapters`, or mean something to a path.
const RESERVED: [&str; 5] = ["train", "batch", "schemes", ".", ".."];

/// Why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Too short, too long, or with other characters.
    #[error("a name has 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'")]
    Malformed,
    /// Taken by a route or a path.
    #[error("the names 'train', 'batch', 'schemes', '.' and '..' are reserved")]
    Reserved,
}

fn well_formed(name: &str) -> bool {
    (1..=MAX_LEN).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// Checks an adapter's name.
///
/// # Errors
/// When it is malformed or reserved.
pub fn check_adapter_name(name: &str) -> Result<(), NameError> {
    if !well_formed(name) {
        return Err(NameError::Malformed);
    }
    if RESERVED.contains(&name) {
        return Err(NameError::Reserved);
    }
    Ok(())
}

/// Checks a tenant's name: the same characters, and no path component of its own.
///
/// # Errors
/// When it is malformed or reserved.
pub fn check_tenant_name(name: &str) -> Result<(), NameError> {
    if !well_formed(name) {
        return Err(NameError::Malformed);
    }
    if matches!(name, "." | "..") {
        return Err(NameError::Reserved);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_api_says() {
        for name in ["a", "Alice-2.0_x", &"n".repeat(64), "...", "trainer"] {
            assert_eq!(check_adapter_name(name), Ok(()), "{name}");
        }
        for name in ["", "a b", "a/b", "é", "a:b", "a+b", "a\0", &"n".repeat(65)] {
            assert_eq!(check_adapter_name(name), Err(NameError::Malformed), "{name}");
        }
        for name in RESERVED {
            assert_eq!(check_adapter_name(name), Err(NameError::Reserved), "{name}");
        }
        assert_eq!(check_tenant_name("train"), Ok(()));
        assert_eq!(check_tenant_name(".."), Err(NameError::Reserved));
    }
}
