//! Mote

pub mod adapter;
pub mod kernel;
pub mod types;
