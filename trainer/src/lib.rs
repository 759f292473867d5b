//! mote-trainer
