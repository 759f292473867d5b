//! Memory that starts on a cache line, and the pointer through which threads write their own parts of a result.
#![allow(unsafe_code)]

/// One cache line.
const LINE: usize = 64;
const WORD: usize = size_of::<u128>();

/// Zeroed bytes on whole cache lines.
pub(super) struct Lines {
    /// A line more than asked for, so that some word starts on a line. Words of the allocator's own alignment: with a larger one it
    /// would zero the pages itself, and touch all of a large KV cache before it is used.
    words: Vec<u128>,
    /// Word at which the first line starts.
    start: usize,
    bytes: usize,
}

impl Lines {
    /// So many bytes, rounded up to lines.
    pub(super) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(LINE);
        if bytes == 0 {
            return Self { words: Vec::new(), start: 0, bytes };
        }
        let words = vec![0u128; (bytes + LINE) / WORD];
        let start = words.as_ptr().addr().wrapping_neg() % LINE / WORD;
        Self { words, start, bytes }
    }

    /// The first byte.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.words[self.start..].as_ptr().cast()
    }

    /// The first byte.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.words[self.start..].as_mut_ptr().cast()
    }

    /// All bytes.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the words from `start` on hold at least so many bytes, all initialised, and are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.bytes) }
    }
}

/// A pointer that may cross threads. Whoever makes one says why no two threads touch one element at a time.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

// SAFETY: it is only an address; every access through it is in an unsafe block with its own reason.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
