//! Memory that starts on a cache line, and the pointer through which threads write their own parts of a result.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Zeroed bytes on whole cache lines.
pub(super) struct Lines(Vec<Line>);

impl Lines {
    /// So many bytes, rounded up to lines.
    pub(super) fn zeroed(bytes: usize) -> Self {
        let count = bytes.div_ceil(64);
        if count == 0 {
            return Self(Vec::new());
        }
        // Straight from the allocator: pages of a large KV cache are not touched before they are used.
        let layout = Layout::array::<Line>(count).expect("callers check that what they ask for can be addressed");
        // SAFETY: the layout is not empty.
        let data = unsafe { alloc_zeroed(layout) };
        if data.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: freshly allocated by the global allocator with the layout of `count` lines; all-zero bytes are valid lines.
        Self(unsafe { Vec::from_raw_parts(data.cast(), count, count) })
    }

    /// The first byte.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }

    /// The first byte.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    /// All bytes.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: a line is 64 initialised bytes without padding; the lines are contiguous and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), 64 * self.0.len()) }
    }
}

/// A pointer that may cross threads. Whoever makes one says why no two threads touch one element at a time.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

// SAFETY: it is only an address; every access through it is in an unsafe block with its own reason.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
