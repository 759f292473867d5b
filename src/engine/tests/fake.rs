//! A model whose logits are a hash of everything that the sequence's block table leads to. Every position's entry in the cache is itself a hash of
//! adapter, token, position and all entries before it, as K and V of a deep model are: a wrong block, a stale entry, another
//! adapter's entry or rows in the wrong order all change what comes out.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::{
    kernel::{BASE_SLOT, BLOCK_TOKENS, Cores, Floats, StepBatch},
    model::{Model, ModelError},
    types::TokenId,
};

pub(in crate::engine) const VOCAB: usize = 40;
pub(in crate::engine) const RANK: usize = 2;
pub(in crate::engine) const SITES: usize = 3;
/// Tokens with an effect of their own when they are in a batch.
pub(in crate::engine) const PANICS: TokenId = 39;
pub(in crate::engine) const ERRS: TokenId = 38;
pub(in crate::engine) const NAN: TokenId = 37;

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn hash_of(cores: Option<&Cores>) -> u64 {
    cores.map_or(7, |cores| cores.data.iter().fold(11, |hash, x| mix(hash, u64::from(x.to_bits()))))
}

fn entry(adapter: u64, token: TokenId, position: usize, before: u64) -> u64 {
    mix(mix(mix(adapter, u64::from(token)), position as u64), before)
}

fn row(state: u64, token: TokenId) -> impl Iterator<Item = f32> {
    // 12 bits: ties happen. The special tokens are never chosen.
    (0..VOCAB as u64).map(move |id| match token {
        NAN => f32::NAN,
        _ if id >= u64::from(NAN) => f32::NEG_INFINITY,
        _ => (mix(state, id) & 0xfff) as f32 / 512.0 - 4.0,
    })
}

/// An adapter; equal numbers make equal adapters.
pub(in crate::engine) fn cores(number: u32) -> Arc<Cores> {
    Arc::new(Cores::new(RANK, vec![number as f32; SITES * RANK * RANK]))
}

/// The logits after each of these tokens, computed without any cache.
pub(in crate::engine) fn logits_alone(cores: Option<&Cores>, tokens: &[TokenId]) -> Vec<Vec<f32>> {
    let adapter = hash_of(cores);
    let mut fold = 0;
    let step = |(position, &token)| {
        fold = mix(fold, entry(adapter, token, position, fold));
        row(fold, token).collect()
    };
    tokens.iter().enumerate().map(step).collect()
}

/// What the tests may look at while the engine owns the model.
#[derive(Debug, Default)]
pub(in crate::engine) struct Watch {
    pub(in crate::engine) steps: AtomicUsize,
    pub(in crate::engine) rows: AtomicUsize,
    /// (sequences, adapters) of each step.
    pub(in crate::engine) shapes: Mutex<Vec<(usize, usize)>>,
    /// Milliseconds that a step takes at least.
    pub(in crate::engine) slow: AtomicU64,
    /// The model waits for this lock before each step.
    pub(in crate::engine) hold: Mutex<()>,
}

pub(in crate::engine) struct Fake {
    cache: Vec<[Option<u64>; BLOCK_TOKENS]>,
    watch: Arc<Watch>,
}

impl Fake {
    pub(in crate::engine) fn model(blocks: usize) -> (Box<dyn Model>, Arc<Watch>) {
        let watch = Arc::new(Watch::default());
        (Box::new(Self { cache: vec![[None; BLOCK_TOKENS]; blocks], watch: Arc::clone(&watch) }), watch)
    }
}

/// Everything that a backend takes for granted.
fn check(batch: &StepBatch) {
    let mut next = 0;
    let mut readers: HashMap<u32, usize> = HashMap::new();
    for sequence in &batch.sequences {
        assert!(sequence.rows > 0 && sequence.first_row == next, "rows out of order");
        assert!(sequence.blocks.len() * BLOCK_TOKENS >= sequence.start + sequence.rows, "too few blocks");
        sequence.blocks.iter().for_each(|&block| *readers.entry(block).or_default() += 1);
        let rows = next..next + sequence.rows;
        let positions = rows.clone().map(|row| batch.positions[row] as usize);
        assert!(positions.eq(sequence.start..sequence.start + sequence.rows), "positions");
        assert!(batch.slots[rows].windows(2).all(|pair| pair[0] == pair[1]), "one adapter a sequence");
        next += sequence.rows;
    }
    assert!(next == batch.rows() && next == batch.positions.len() && next == batch.slots.len() && next > 0);
    for sequence in &batch.sequences {
        let written = sequence.start / BLOCK_TOKENS..(sequence.start + sequence.rows).div_ceil(BLOCK_TOKENS);
        assert!(written.into_iter().all(|block| readers[&sequence.blocks[block]] == 1), "a shared block is written");
    }
    assert!(batch.logits_rows.windows(2).all(|pair| pair[0] < pair[1]), "logits rows ascend");
    assert!(batch.logits_rows.iter().all(|&row| (row as usize) < next));
    let used: std::collections::BTreeSet<u32> = batch.slots.iter().copied().filter(|&slot| slot != BASE_SLOT).collect();
    assert!(used.into_iter().eq(0..batch.cores.len() as u32), "every slot is used, none is missing");
    for (at, cores) in batch.cores.iter().enumerate() {
        assert!(batch.cores[..at].iter().all(|other| !Arc::ptr_eq(other, cores)), "an adapter twice");
    }
}

impl Model for Fake {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn kv_blocks(&self) -> usize {
        self.cache.len()
    }

    fn forward(&mut self, batch: &StepBatch, logits: &mut Floats) -> Result<(), ModelError> {
        drop(self.watch.hold.lock());
        std::thread::sleep(Duration::from_millis(self.watch.slow.load(SeqCst)));
        check(batch);
        self.watch.steps.fetch_add(1, SeqCst);
        self.watch.rows.fetch_add(batch.rows(), SeqCst);
        self.watch.shapes.lock().unwrap().push((batch.sequences.len(), batch.cores.len()));
        assert!(!batch.tokens.contains(&PANICS), "the model panics");
        if batch.tokens.contains(&ERRS) {
            return Err(ModelError::Unsupported("the device is on fire".into()));
        }
        let mut rows = Vec::new();
        let mut read = batch.logits_rows.iter().peekable();
        for sequence in &batch.sequences {
            let slot = batch.slots[sequence.first_row];
            let adapter = hash_of((slot != BASE_SLOT).then(|| &*batch.cores[slot as usize]));
            for at in sequence.first_row..sequence.first_row + sequence.rows {
                let position = batch.positions[at] as usize;
                let place = |p: usize| (sequence.blocks[p / BLOCK_TOKENS] as usize, p % BLOCK_TOKENS);
                let mut fold = 0;
                for before in 0..position {
                    let (block, offset) = place(before);
                    fold = mix(fold, self.cache[block][offset].expect("an entry that was never written is read"));
                }
                let (block, offset) = place(position);
                let new = entry(adapter, batch.tokens[at], position, fold);
                self.cache[block][offset] = Some(new);
                fold = mix(fold, new);
                if read.next_if(|&&row| row as usize == at).is_some() {
                    rows.extend(row(fold, batch.tokens[at]));
                }
            }
        }
        logits.set(&rows);
        Ok(())
    }
}
