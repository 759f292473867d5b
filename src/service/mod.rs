//! Use cases, one file each: resolve an adapter, complete, manage adapters and tenants.

mod error;

pub use error::{Error, ErrorKind};
