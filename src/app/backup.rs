//! `mote backup` and `mote restore`.

use super::AppError;
use crate::{
    config::{BackupArgs, RestoreArgs},
    store,
};

/// `mote backup`: the copy's SHA-256 and its name.
///
/// # Errors
/// There is no database, or the copy cannot be written.
pub async fn backup(args: &BackupArgs) -> Result<String, AppError> {
    let sum = store::back_up(&args.data_dir, &args.out).await?;
    Ok(format!("{sum}  {}", args.out.display()))
}

/// `mote restore`
///
/// # Errors
/// The backup is damaged or newer than this program, or the directory is not empty.
pub async fn restore(args: &RestoreArgs) -> Result<(), AppError> {
    Ok(store::restore(&args.from, &args.data_dir, args.force).await?)
}
