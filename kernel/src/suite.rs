//! What the tests of every backend share: random cases, and running one through any backend by the public seam only.

use std::sync::Arc;

use super::{
    AttentionSpec, BASE_SLOT, BLOCK_TOKENS, Backend, Cores, Epilogue, Floats, KernelError, KvShape, LinearPart,
    Precision, Rows, SequenceRows, SiteFactors, StepBatch, Weight,
};

/// All precisions.
pub(super) const PRECISIONS: [Precision; 4] = [Precision::F32, Precision::Bf16, Precision::Q8, Precision::Q4];

/// A small generator (splitmix64): the same numbers everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub(super) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// So many numbers in -1..1.
    pub(super) fn units(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }

    /// Uniform below a limit.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// A group of linears with everything a product can have.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) inputs: usize,
    pub(super) outputs: Vec<usize>,
    pub(super) rank: usize,
    pub(super) bias: bool,
    pub(super) norm: bool,
    pub(super) epilogue: Epilogue,
    pub(super) precision: Precision,
}

impl Group {
    /// Columns of the result.
    pub(super) fn width(&self) -> usize {
        if self.epilogue == Epilogue::SwiGlu { self.outputs[0] } else { self.outputs.iter().sum() }
    }

    /// Its linear on a backend, from a seed.
    pub(super) fn pack<B: Backend>(&self, backend: &B, seed: u64) -> B::Linear {
        self.pack_with_rank(backend, seed, self.rank)
    }

    /// The same W and bias, with factors of the group's rank or (0) none.
    pub(super) fn pack_with_rank<B: Backend>(&self, backend: &B, seed: u64, rank: usize) -> B::Linear {
        let mut random = Random(seed);
        let scale = 1.0 / (self.inputs as f32).sqrt();
        let scaled = |mut values: Vec<f32>| {
            values.iter_mut().for_each(|value| *value *= scale);
            values
        };
        let parts: Vec<_> = (self.outputs.iter())
            .map(|&outputs| {
                let weight = scaled(random.units(outputs * self.inputs));
                let u = random.units(outputs * self.rank);
                let v = scaled(random.units(self.inputs * self.rank));
                (Weight::from_f32(outputs, self.inputs, weight).unwrap(), random.units(outputs), u, v)
            })
            .collect();
        let factors = |site, u, v| (rank > 0).then_some(SiteFactors { site, u, v, rank: self.rank });
        let parts: Vec<LinearPart<'_>> = (parts.iter().enumerate())
            .map(|(site, (weight, bias, u, v))| LinearPart {
                weight,
                bias: self.bias.then_some(&bias[..]),
                factors: factors(site, u, v),
            })
            .collect();
        backend.linear(&parts, self.precision).unwrap()
    }
}

/// Random cores of so many sites.
pub(super) fn cores(seed: u64, rank: usize, sites: usize) -> Arc<Cores> {
    Arc::new(Cores::new(rank, Random(seed).units(sites * rank * rank)))
}

/// A batch of one-token sequences, row i of which is token `rows[i].0` under slot `rows[i].1`.
pub(super) fn rows_batch(rows: &[(u32, u32)], cores: Vec<Arc<Cores>>) -> StepBatch {
    let sequence = |row| SequenceRows { first_row: row, rows: 1, start: 0, blocks: vec![row as u32] };
    StepBatch {
        tokens: rows.iter().map(|row| row.0).collect(),
        positions: vec![0; rows.len()],
        slots: rows.iter().map(|row| row.1).collect(),
        cores,
        sequences: (0..rows.len()).map(sequence).collect(),
        logits_rows: (0..rows.len() as u32).collect(),
    }
}

/// A product over rows of activations (row i of `x` is token i), from embedding to host, with the stream `before` where the epilogue adds.
pub(super) fn run_product<B: Backend>(
    backend: &mut B,
    group: &Group,
    linear: &B::Linear,
    batch: &StepBatch,
    rows: Rows,
    seed: u64,
    vocab: usize,
) -> Result<Vec<f32>, KernelError> {
    let mut random = Random(seed);
    let mut buffer_of = |backend: &mut B, step: &B::Step, width: usize| {
        let weight = Weight::from_f32(vocab, width, random.units(vocab * width)).unwrap();
        let table = backend.table(&weight, Precision::F32)?;
        let mut buffer = backend.buffer(width)?;
        backend.embed(step, &table, &mut buffer).map(|()| buffer)
    };
    let step = backend.begin(batch)?;
    let x = buffer_of(backend, &step, group.inputs)?;
    let mut out = buffer_of(backend, &step, group.width())?;
    let norm = backend.norm(&Random(seed + 1).units(group.inputs), 1e-5)?;
    backend.product(&step, linear, rows, group.norm.then_some(&norm), &x, group.epilogue, &mut out)?;
    let mut result = Floats::default();
    backend.read(&mut out, &mut result)?;
    Ok(result.to_vec())
}

/// Largest difference, relative to the largest value wanted (at least 1).
pub(super) fn error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1f32, |m, x| m.max(x.abs()));
    got.iter().zip(want).fold(0f32, |worst, (g, w)| {
        assert!(g.is_finite(), "{g} where {w} was wanted");
        worst.max((g - w).abs())
    }) / scale
}

/// The bits, for exact comparison.
pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Slots that mix two adapters and the base.
pub(super) fn mixed_rows(rows: usize) -> Vec<(u32, u32)> {
    (0..rows as u32).map(|row| (row, [0, BASE_SLOT, 1][row as usize % 3])).collect()
}

/// Groups of every kind: odd inputs and outputs, one output, several parts, every rank and epilogue.
pub(super) fn groups() -> Vec<Group> {
    let group = |inputs, outputs: &[usize], rank, bias, norm, epilogue| Group {
        inputs,
        outputs: outputs.to_vec(),
        rank,
        bias,
        norm,
        epilogue,
        precision: Precision::F32,
    };
    vec![
        group(64, &[64, 32, 32], 2, true, true, Epilogue::Store),
        group(64, &[64, 32, 32], 0, true, true, Epilogue::Store),
        group(33, &[7, 19, 19], 8, true, true, Epilogue::Store),
        group(1, &[1], 1, false, false, Epilogue::Store),
        group(95, &[1], 2, false, true, Epilogue::Store),
        group(100, &[70], 1, false, false, Epilogue::Add),
        group(48, &[16], 8, true, false, Epilogue::Add),
        group(64, &[96, 96], 2, false, true, Epilogue::SwiGlu),
        group(31, &[21, 21], 8, true, true, Epilogue::SwiGlu),
        group(257, &[130], 0, false, true, Epilogue::Store),
        group(70, &[40, 24], 3, false, true, Epilogue::Store),
        group(64, &[50], 4, false, false, Epilogue::Add),
        group(47, &[33, 33], 5, false, true, Epilogue::SwiGlu),
        group(96, &[17], 6, true, true, Epilogue::Store),
        group(130, &[64], 7, false, false, Epilogue::Add),
    ]
}

/// Every group, precision and batch size against the reference. `tolerance` is of [`error`], a group.
pub(super) fn products_equal_reference<B: Backend>(mut backend: B, tolerance: impl Fn(&Group) -> f32) {
    let mut reference = super::reference::ReferenceBackend;
    for (number, group) in groups().into_iter().enumerate() {
        for precision in PRECISIONS {
            let group = Group { precision, ..group.clone() };
            let seed = 100 * number as u64;
            let (linear, slow) = (group.pack(&backend, seed), group.pack(&reference, seed));
            let adapted = |rows: usize| (0..rows as u32).map(|row| (row, row % 2)).collect::<Vec<_>>();
            let some = [0, 1, 2, 3, 8, 17, 300].map(mixed_rows);
            // Tiles without a row on the base end otherwise.
            for rows in some.into_iter().chain([17, 40].map(adapted)) {
                let cores = vec![cores(7, group.rank, 3), cores(8, group.rank, 3)];
                let (mut batch, rows) = (rows_batch(&rows, cores), rows.len());
                for chosen in [Rows::All, Rows::Logits] {
                    batch.logits_rows.retain(|row| row % 4 != 1);
                    if chosen == Rows::Logits && group.epilogue == Epilogue::Add {
                        continue;
                    }
                    let want = run_product(&mut reference, &group, &slow, &batch, chosen, seed, rows.max(1)).unwrap();
                    let got = run_product(&mut backend, &group, &linear, &batch, chosen, seed, rows.max(1)).unwrap();
                    let error = error(&got, &want);
                    assert!(error <= tolerance(&group), "{group:?}, {rows} rows, {chosen:?}: error {error:e}");
                }
            }
        }
    }
}

/// An attention with a history, as the engine would run it: each entry is one sequence cut into chunks.
#[derive(Debug, Clone)]
pub(super) struct AttentionCase {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) norms: bool,
    pub(super) precision: Precision,
    /// Tokens of each sequence.
    pub(super) lengths: Vec<usize>,
}

/// Blocks of the cache in attention tests.
pub(super) const TEST_BLOCKS: usize = 64;

impl AttentionCase {
    /// The frozen parts.
    pub(super) fn spec(&self) -> AttentionSpec {
        let mut random = Random(5);
        let mut norm = || self.norms.then(|| (random.units(self.head_dim), 1e-6));
        let (q_norm, k_norm) = (norm(), norm());
        let angle = |i: usize| {
            let half = self.head_dim / 2;
            (i / half) as f64 / 10_000f64.powf((i % half) as f64 / half as f64)
        };
        let angles = (0..512 * self.head_dim / 2).map(angle);
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            q_norm,
            k_norm,
            cos: Arc::new(angles.clone().map(|angle| angle.cos() as f32).collect()),
            sin: Arc::new(angles.map(|angle| angle.sin() as f32).collect()),
        }
    }

    /// Columns of q|k|v.
    pub(super) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Blocks of sequence i: scattered over the cache, none shared.
    fn blocks(&self, sequence: usize) -> Vec<u32> {
        let before: usize = self.lengths[..sequence].iter().map(|length| length.div_ceil(BLOCK_TOKENS)).sum();
        let count = self.lengths[sequence].div_ceil(BLOCK_TOKENS);
        (before..before + count).map(|block| (block * 37 % TEST_BLOCKS) as u32).collect()
    }

    /// Runs steps, each a list of (sequence, rows): the next so many tokens of it. Returns the result of every token, by sequence and position.
    /// Token t of sequence s has the same q, k, v however the steps are cut.
    pub(super) fn run<B: Backend>(&self, backend: &mut B, steps: &[Vec<(usize, usize)>]) -> Vec<Vec<Vec<f32>>> {
        let total: usize = self.lengths.iter().sum();
        let qkv = Weight::from_f32(total, self.width(), Random(9).units(total * self.width())).unwrap();
        let table = backend.table(&qkv, Precision::F32).unwrap();
        let attention = backend.attention(&self.spec()).unwrap();
        let shape = KvShape { layers: 2, blocks: TEST_BLOCKS, kv_heads: self.kv_heads, head_dim: self.head_dim };
        let mut kv = backend.kv(shape, self.precision).unwrap();
        let mut results = vec![Vec::new(); self.lengths.len()];
        for step in steps {
            let mut batch = StepBatch::default();
            for &(sequence, rows) in step {
                let start = results[sequence].len();
                let before: usize = self.lengths[..sequence].iter().sum();
                let first_row = batch.rows();
                batch.tokens.extend((before + start..before + start + rows).map(|token| token as u32));
                batch.positions.extend((start..start + rows).map(|position| position as u32));
                batch.slots.extend(std::iter::repeat_n(BASE_SLOT, rows));
                batch.sequences.push(SequenceRows { first_row, rows, start, blocks: self.blocks(sequence) });
            }
            let begun = backend.begin(&batch).unwrap();
            let mut qkv = backend.buffer(self.width()).unwrap();
            let mut out = backend.buffer(self.heads * self.head_dim).unwrap();
            backend.embed(&begun, &table, &mut qkv).unwrap();
            backend.attend(&begun, &attention, 1, &qkv, &mut kv, &mut out).unwrap();
            let mut values = Floats::default();
            backend.read(&mut out, &mut values).unwrap();
            let mut rows_of = values.chunks(self.heads * self.head_dim).map(<[f32]>::to_vec);
            for &(sequence, rows) in step {
                results[sequence].extend(rows_of.by_ref().take(rows));
            }
        }
        results
    }
}

/// Heads of every kind.
pub(super) fn attention_cases() -> Vec<AttentionCase> {
    let case = |heads, kv_heads, head_dim, norms, lengths: &[usize]| AttentionCase {
        heads,
        kv_heads,
        head_dim,
        norms,
        precision: Precision::F32,
        lengths: lengths.to_vec(),
    };
    vec![
        case(9, 3, 64, false, &[40, 1, 17, 300]),
        case(4, 2, 8, true, &[16, 33]),
        case(4, 4, 6, false, &[15, 16, 17]),
        case(8, 1, 80, true, &[90, 5]),
        case(2, 1, 2, false, &[50]),
    ]
}

/// Attention of every case and precision against the reference: prefill of all sequences at once, with the last token of each decoded.
pub(super) fn attention_equals_reference<B: Backend>(mut backend: B, tolerance: impl Fn(Precision) -> f32) {
    for case in attention_cases() {
        for precision in PRECISIONS {
            let case = AttentionCase { precision, ..case.clone() };
            let prefill = case.lengths.iter().enumerate().map(|(i, &n)| (i, n - 1)).filter(|step| step.1 > 0).collect();
            let steps = [prefill, (0..case.lengths.len()).map(|i| (i, 1)).collect()];
            let want = case.run(&mut super::reference::ReferenceBackend, &steps).concat().concat();
            let got = case.run(&mut backend, &steps).concat().concat();
            let error = error(&got, &want);
            assert!(error <= tolerance(precision), "{case:?}: error {error:e}");
        }
    }
}

/// Bad batches are refused with a message that names the field.
pub(super) fn bad_batches_are_refused<B: Backend>(mut backend: B) {
    let good = || rows_batch(&mixed_rows(3), vec![cores(1, 2, 1), cores(2, 2, 1)]);
    assert!(backend.begin(&good()).is_ok());
    assert!(backend.begin(&StepBatch::default()).is_ok());
    let mut check = |field: &str, spoil: fn(&mut StepBatch)| {
        let mut batch = good();
        spoil(&mut batch);
        match backend.begin(&batch) {
            Err(KernelError::Shape(message)) => assert!(message.starts_with(field), "{field}: {message}"),
            Err(error) => panic!("{field}: {error}"),
            Ok(_) => panic!("{field}: accepted"),
        }
    };
    check("positions", |batch| batch.positions.truncate(2));
    check("positions", |batch| batch.positions[1] = 7);
    check("slots", |batch| batch.slots.push(0));
    check("slots", |batch| batch.slots[0] = 2);
    check("cores", |batch| batch.cores[1] = cores(1, 3, 1));
    check("cores", |batch| batch.cores[1] = cores(1, 2, 2));
    check("cores", |batch| batch.cores = (0..2).map(|_| Arc::new(Cores::new(2, vec![0.0; 5]))).collect());
    check("logits_rows", |batch| batch.logits_rows[2] = 3);
    check("logits_rows", |batch| batch.logits_rows = vec![1, 1]);
    check("sequences", |batch| batch.sequences.truncate(2));
    check("sequences", |batch| batch.sequences[1].rows = 0);
    check("sequences", |batch| batch.sequences[1].first_row = 0);
    check("sequences", |batch| batch.sequences[2].rows = usize::MAX);
    check("sequences", |batch| batch.sequences[2].start = usize::MAX);
    check("sequences", |batch| batch.sequences[2].blocks.clear());
    check("sequences: block 0 is written twice", |batch| batch.sequences[2].blocks[0] = 0);
}

/// Sizes that do not fit one another are refused by the operation that sees both.
pub(super) fn bad_shapes_are_refused<B: Backend>(mut backend: B) {
    fn refused<T>(what: &str, result: Result<T, KernelError>) {
        assert!(matches!(result, Err(KernelError::Shape(_))), "{what} was not refused");
    }
    let group = Group {
        inputs: 8,
        outputs: vec![6],
        rank: 2,
        bias: false,
        norm: false,
        epilogue: Epilogue::Store,
        precision: Precision::F32,
    };
    let linear = group.pack(&backend, 1);
    let batch = |rank, sites| rows_batch(&[(0, 0)], vec![cores(1, rank, sites)]);
    let mut run = |group: &Group, batch: &StepBatch, vocab: usize| {
        run_product(&mut backend, group, &linear, batch, Rows::All, 1, vocab)
    };
    assert!(run(&group, &batch(2, 1), 1).is_ok());
    refused("another rank", run(&group, &batch(3, 1), 1));
    refused("no core for the site", run(&group, &batch(2, 0), 1));
    refused("too many inputs", run(&Group { inputs: 9, ..group.clone() }, &batch(2, 1), 1));
    refused("another width", run(&Group { outputs: vec![7], ..group.clone() }, &batch(2, 1), 1));
    refused("SwiGLU of one part", run(&Group { epilogue: Epilogue::SwiGlu, ..group.clone() }, &batch(2, 1), 1));
    refused("a token that is not in the table", run(&group, &rows_batch(&[(1, BASE_SLOT)], Vec::new()), 1));

    let weight = Weight::from_f32(2, 3, vec![0.0; 6]).unwrap();
    let part = LinearPart { weight: &weight, bias: None, factors: None };
    refused("no part", backend.linear(&[], Precision::F32));
    refused("a short bias", backend.linear(&[LinearPart { bias: Some(&[0.0]), ..part }], Precision::F32));
    let factors = Some(SiteFactors { site: 0, u: &[0.0; 2], v: &[0.0; 2], rank: 1 });
    refused("a short V", backend.linear(&[LinearPart { factors, ..part }], Precision::F32));
    let wider = Weight::from_f32(2, 4, vec![0.0; 8]).unwrap();
    let other = LinearPart { weight: &wider, ..part };
    refused("other inputs", backend.linear(&[part, other], Precision::F32));

    let case = attention_cases().remove(1);
    refused("an odd head", backend.attention(&AttentionSpec { head_dim: 7, ..case.spec() }));
    refused("heads that do not divide", backend.attention(&AttentionSpec { kv_heads: 3, ..case.spec() }));
    let huge = KvShape { layers: usize::MAX / 2, blocks: 3, kv_heads: 1, head_dim: 2 };
    refused("a cache that cannot be addressed", backend.kv(huge, Precision::F32));

    let attention = backend.attention(&case.spec()).unwrap();
    let shape = KvShape { layers: 1, blocks: 2, kv_heads: case.kv_heads, head_dim: case.head_dim };
    let mut attend = |layer: usize, block: u32, position: usize, shape: KvShape| {
        let mut batch = rows_batch(&[(0, BASE_SLOT)], Vec::new());
        batch.positions[0] = position as u32;
        batch.sequences[0].start = position;
        batch.sequences[0].blocks = vec![block; position / BLOCK_TOKENS + 1];
        let step = backend.begin(&batch)?;
        let weight = Weight::from_f32(1, case.width(), vec![0.0; case.width()])?;
        let (mut qkv, mut out) = (backend.buffer(case.width())?, backend.buffer(case.heads * case.head_dim)?);
        let table = backend.table(&weight, Precision::F32)?;
        backend.embed(&step, &table, &mut qkv)?;
        let mut kv = backend.kv(shape, Precision::F32)?;
        backend.attend(&step, &attention, layer, &qkv, &mut kv, &mut out)
    };
    assert!(attend(0, 1, 0, shape).is_ok());
    refused("a layer too many", attend(1, 1, 0, shape));
    refused("a block too many", attend(0, 2, 0, shape));
    refused("a position behind the rotary table", attend(0, 1, 512, shape));
    refused("another head size", attend(0, 1, 0, KvShape { head_dim: 10, ..shape }));
}
