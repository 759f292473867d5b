//! Mote

pub mod adapter;
pub mod engine;
pub mod kernel;
pub mod model;
pub mod service;
pub mod text;
pub mod types;
