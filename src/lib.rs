//! Mote

pub mod adapter;
pub mod kernel;
pub mod model;
pub mod types;
