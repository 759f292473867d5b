//! The instructions of tiles, and what they read that lies nowhere else.
#![allow(unsafe_code)]

use super::TILE;
use crate::{cpu::format::WORD_LINE, rounding::GROUP};

// The tiles keep what they hold from one of these to the next: nothing else here is compiled for them, so that the compiler neither uses nor knows
// them. They read and write memory and are not moved across each other.

macro_rules! zero {
    ($tile:literal) => {
        std::arch::asm!(concat!("tilezero tmm", $tile), options(nostack, preserves_flags))
    };
}

macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tileloadd tmm", $tile, ", [{from} + {stride}*1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(nostack, preserves_flags, readonly)
        )
    };
}

macro_rules! store {
    ($tile:literal, $to:expr) => {
        std::arch::asm!(
            concat!("tilestored [{to} + {stride}*1], tmm", $tile),
            to = in(reg) $to,
            stride = in(reg) WORD_LINE,
            options(nostack, preserves_flags)
        )
    };
}

macro_rules! dot {
    ($sums:literal, $rows:literal, $weights:literal) => {
        std::arch::asm!(
            concat!("tdpbf16ps tmm", $sums, ", tmm", $rows, ", tmm", $weights),
            options(nostack, preserves_flags)
        )
    };
}

pub(super) use {dot, load, store, zero};

/// Lines of tiles that the next instructions read.
#[repr(align(64))]
pub(super) struct Room<const TILES: usize>(std::mem::MaybeUninit<[[u8; TILE]; TILES]>);

impl<const TILES: usize> Room<TILES> {
    #[inline(always)]
    pub(super) const fn new() -> Self {
        Self(std::mem::MaybeUninit::uninit())
    }

    #[inline(always)]
    pub(super) fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// The lines of a group of bfloat16 that is the last and not whole: something else begins behind it.
#[inline(always)]
pub(super) unsafe fn tail(panel: *const u8, inputs: usize, room: &mut Room<1>) -> *const u8 {
    // SAFETY: the panel has so many inputs; the room is a tile.
    unsafe {
        let group = inputs / GROUP;
        let bytes = inputs.div_ceil(2) * WORD_LINE - group * TILE;
        std::ptr::copy_nonoverlapping(panel.add(group * TILE), room.start(), bytes);
        room.start().add(bytes).write_bytes(0, TILE - bytes);
        room.start()
    }
}
