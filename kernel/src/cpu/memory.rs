//! Memory that starts on a cache line, and the pointer through which threads write their own parts of a result.
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc, dealloc, handle_alloc_error},
    fmt::{self, Debug, Formatter},
    ops::{Deref, DerefMut},
    sync::Arc,
};

use parking_lot::Mutex;

/// One cache line.
const LINE: usize = 64;
const WORD: usize = size_of::<u128>();
/// What the processor maps with one entry of its tables, if the system lends such pages.
const HUGE_PAGE: usize = 2 << 20;
/// Weights of many small matrices lie side by side in chunks of this size.
const CHUNK: usize = 32 << 20;

/// Zeroed bytes on whole cache lines, and on huge pages where they fill some.
#[derive(Default)]
pub(super) struct Lines {
    /// A line more than asked for, so that some word starts on a line. Words of the allocator's own alignment: with a larger one it
    /// would zero the pages itself, and touch all of a large KV cache before it is used.
    words: Vec<u128>,
    /// Word at which the first line starts.
    start: usize,
}

impl Lines {
    /// So many bytes, rounded up to lines.
    pub(super) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(LINE);
        if bytes == 0 {
            return Self { words: Vec::new(), start: 0 };
        }
        let words = vec![0u128; (bytes + LINE) / WORD];
        let start = words.as_ptr().addr().wrapping_neg() % LINE / WORD;
        huge_pages(words.as_ptr().cast(), words.len() * WORD);
        Self { words, start }
    }

    /// The first of at least so many bytes: if there are fewer, all are new and zero.
    pub(super) fn at_least(&mut self, bytes: usize) -> *mut u8 {
        if (self.words.len() - self.start) * WORD < bytes {
            *self = Self::zeroed(bytes);
        }
        self.as_mut_ptr()
    }

    /// The first byte.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.words[self.start..].as_ptr().cast()
    }

    /// The first byte.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.words[self.start..].as_mut_ptr().cast()
    }
}

/// Activations: numbers that start on a cache line. Sixteen of a row are stored at a time, and across two lines that takes twice as long.
#[derive(Default)]
pub struct Floats {
    lines: Lines,
    len: usize,
}

impl Floats {
    /// Makes them so many; what they are is unspecified.
    pub fn resize(&mut self, len: usize) {
        self.lines.at_least(len * size_of::<f32>());
        self.len = len;
    }

    /// Replaces them all.
    pub fn set(&mut self, numbers: &[f32]) {
        self.resize(numbers.len());
        self.copy_from_slice(numbers);
    }
}

impl Debug for Floats {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: there is room for so many, all bytes have been written, and any bytes are a number.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Asks for huge pages where they fit into a range of the program's memory. The advice does not change what it holds, and may be refused.
#[cfg(target_os = "linux")]
fn huge_pages(start: *const u8, bytes: usize) {
    let skipped = start.addr().wrapping_neg() % HUGE_PAGE;
    let whole = bytes.saturating_sub(skipped) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: whole pages within the range.
        unsafe {
            libc::madvise(start.wrapping_add(skipped).cast_mut().cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn huge_pages(_: *const u8, _: usize) {}

/// Where weights live: chunks on huge pages, which a stream of reads passes through faster (30 to 34 GB/s against 25 to 31 where it was measured).
#[derive(Default)]
pub(super) struct Arena {
    current: Mutex<Option<(Arc<Chunk>, usize)>>,
}

struct Chunk {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: the memory is written through a `Region` while it is built, which has its range for itself, and only read afterwards.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.next_multiple_of(HUGE_PAGE), HUGE_PAGE);
        let layout = layout.expect("a model's weights fit the address space: the file did");
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        huge_pages(start, layout.size());
        Self { start, layout }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and every region that points into it holds the chunk.
        unsafe { dealloc(self.start, self.layout) }
    }
}

/// A range of a chunk, on whole cache lines.
pub(super) struct Region {
    chunk: Option<Arc<Chunk>>,
    start: usize,
}

impl Arena {
    /// So many zeroed bytes, which `fill` writes before anybody else sees them.
    pub(super) fn take(&self, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Region {
        if bytes == 0 {
            return Region { chunk: None, start: 0 };
        }
        let mut current = self.current.lock();
        let (chunk, start) = match current.take() {
            Some((chunk, used)) if chunk.layout.size() - used >= bytes => (chunk, used),
            _ => (Arc::new(Chunk::new(bytes.max(CHUNK))), 0),
        };
        *current = Some((Arc::clone(&chunk), (start + bytes).next_multiple_of(LINE)));
        drop(current);
        // SAFETY: no other region has this range of the chunk, and no reference to it exists yet; it is zeroed before it is lent as a slice.
        unsafe {
            let first = chunk.start.add(start);
            first.write_bytes(0, bytes);
            fill(std::slice::from_raw_parts_mut(first, bytes));
        }
        Region { chunk: Some(chunk), start }
    }
}

impl Region {
    /// The first byte; dangling when there is none.
    pub(super) fn as_ptr(&self) -> *const u8 {
        match &self.chunk {
            // SAFETY: the region lies in its chunk.
            Some(chunk) => unsafe { chunk.start.add(self.start) },
            None => std::ptr::dangling(),
        }
    }
}

/// A pointer that may cross threads. Whoever makes one says why no two threads touch one element at a time.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

impl<T> Shared<T> {
    /// The address of element `i`.
    pub(super) fn get(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

// SAFETY: it is only an address; every access through it is in an unsafe block with its own reason.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_start_on_a_line_whatever_their_number() {
        let mut floats = Floats::default();
        for len in [1, 16, 17, 100_000, 3] {
            floats.resize(len);
            assert_eq!(floats.len(), len);
            assert_eq!(floats.as_ptr().addr() % LINE, 0, "{len}");
            floats.fill(1.5);
        }
        floats.set(&[1.0, 2.0]);
        assert_eq!(*floats, [1.0, 2.0]);
    }

    #[test]
    fn regions_lie_on_lines_and_keep_what_was_written() {
        let arena = Arena::default();
        let regions: Vec<Region> = (0..40u8)
            .map(|i| {
                arena.take(usize::from(i) * 1000 + 1, |bytes| {
                    assert!(bytes.iter().all(|byte| *byte == 0));
                    bytes.fill(i);
                })
            })
            .collect();
        drop(arena);
        for (i, region) in regions.iter().enumerate() {
            assert_eq!(region.as_ptr().addr() % LINE, 0);
            // SAFETY: the region holds so many bytes.
            let bytes = unsafe { std::slice::from_raw_parts(region.as_ptr(), i * 1000 + 1) };
            assert!(bytes.iter().all(|byte| usize::from(*byte) == i));
        }
    }
}
