//! A rough measurement of the whole step on synthetic weights of SmolLM2-135M's shapes; by hand only:
//! `cargo nextest run --workspace --run-ignored only --no-capture cpu::measure`
//! (narrowed by the variables ISA, PRECISION, RANK, THREADS, CASE; with PARTS also what each kind of region takes;
//! with `CARGO_PROFILE_DEV_DEBUG_ASSERTIONS=false CARGO_PROFILE_DEV_OVERFLOW_CHECKS=false` for what a release build reaches).

use std::{sync::Arc, time::Instant};

use super::*;
use crate::suite::{Random, cores};
use crate::{BASE_SLOT, BLOCK_TOKENS, Cores, SequenceRows, SiteFactors};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 49152;

struct Layer {
    qkv: CpuLinear,
    o: CpuLinear,
    gate_up: CpuLinear,
    down: CpuLinear,
}

struct Model {
    backend: CpuBackend,
    layers: Vec<Layer>,
    norm: CpuNorm,
    head: CpuLinear,
    table: CpuTable,
    attention: AttentionSpec,
    kv: CpuKv,
    stream: CpuBuffer,
    qkv: CpuBuffer,
    attended: CpuBuffer,
    inner: CpuBuffer,
    logits: CpuBuffer,
}

fn group(
    backend: &CpuBackend,
    inputs: usize,
    outputs: &[usize],
    site: usize,
    rank: usize,
    precision: Precision,
) -> CpuLinear {
    let mut random = Random(site as u64);
    let parts: Vec<_> = (outputs.iter())
        .map(|&outputs| {
            let weight = random.units(outputs * inputs).into_iter().map(|w| w * 0.05).collect();
            let weight = Weight::from_f32(outputs, inputs, weight).unwrap();
            (weight, random.units(outputs * rank), random.units(inputs * rank))
        })
        .collect();
    let parts: Vec<_> = (parts.iter().enumerate())
        .map(|(i, (weight, u, v))| LinearPart {
            weight,
            bias: None,
            factors: (rank > 0).then_some(SiteFactors { site: site + i, u, v, rank }),
        })
        .collect();
    backend.linear(&parts, precision).unwrap()
}

impl Model {
    fn new(threads: usize, isa: Option<Isa>, precision: Precision, rank: usize, blocks: usize) -> Self {
        let backend = CpuBackend::new(threads, isa).unwrap();
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let layers = (0..LAYERS).map(|layer| Layer {
            qkv: group(&backend, HIDDEN, &[q, kv, kv], 7 * layer, rank, precision),
            o: group(&backend, q, &[HIDDEN], 7 * layer + 3, rank, precision),
            gate_up: group(&backend, HIDDEN, &[INTERMEDIATE, INTERMEDIATE], 7 * layer + 4, rank, precision),
            down: group(&backend, INTERMEDIATE, &[HIDDEN], 7 * layer + 6, rank, precision),
        });
        let embedding = Weight::from_f32(VOCAB, HIDDEN, Random(99).units(VOCAB * HIDDEN)).unwrap();
        let angles = (0..4096 * HEAD_DIM / 2).map(|i| (i / 32) as f32 * 1e4f32.powf(-((i % 32) as f32) / 32.0));
        let attention = AttentionSpec {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            q_norm: None,
            k_norm: None,
            cos: Arc::new(angles.clone().map(f32::cos).collect()),
            sin: Arc::new(angles.map(f32::sin).collect()),
        };
        let shape = KvShape { layers: LAYERS, blocks, kv_heads: KV_HEADS, head_dim: HEAD_DIM };
        let part = LinearPart { weight: &embedding, bias: None, factors: None };
        Self {
            layers: layers.collect(),
            norm: backend.norm(&[1.0; HIDDEN], 1e-5).unwrap(),
            head: backend.linear(&[part], precision).unwrap(),
            table: backend.table(&embedding, precision).unwrap(),
            attention,
            kv: backend.kv(shape, precision).unwrap(),
            stream: backend.buffer(HIDDEN).unwrap(),
            qkv: backend.buffer(q + 2 * kv).unwrap(),
            attended: backend.buffer(q).unwrap(),
            inner: backend.buffer(INTERMEDIATE).unwrap(),
            logits: backend.buffer(VOCAB).unwrap(),
            backend,
        }
    }

    fn step(&mut self, batch: &StepBatch, times: &mut [f64; 8]) {
        let b = &mut self.backend;
        let mut last = Instant::now();
        let mut mark = |kind: usize| {
            let now = Instant::now();
            times[kind] += (now - last).as_secs_f64();
            last = now;
        };
        let step = b.begin(batch).unwrap();
        b.embed(&step, &self.table, &mut self.stream).unwrap();
        mark(0);
        let norm = Some(&self.norm);
        for (number, layer) in self.layers.iter().enumerate() {
            b.product(&step, &layer.qkv, Rows::All, norm, &self.stream, Epilogue::Store, &mut self.qkv).unwrap();
            mark(1);
            b.attend(&step, &self.attention, number, &self.qkv, &mut self.kv, &mut self.attended).unwrap();
            mark(2);
            b.product(&step, &layer.o, Rows::All, None, &self.attended, Epilogue::Add, &mut self.stream).unwrap();
            mark(3);
            b.product(&step, &layer.gate_up, Rows::All, norm, &self.stream, Epilogue::SwiGlu, &mut self.inner).unwrap();
            mark(4);
            b.product(&step, &layer.down, Rows::All, None, &self.inner, Epilogue::Add, &mut self.stream).unwrap();
            mark(5);
        }
        b.product(&step, &self.head, Rows::Logits, norm, &self.stream, Epilogue::Store, &mut self.logits).unwrap();
        mark(6);
    }
}

fn batch(sequences: usize, start: usize, rows: usize, cores: &[Arc<Cores>]) -> StepBatch {
    let mut batch = StepBatch { cores: cores.to_vec(), ..StepBatch::default() };
    let blocks = (start + rows).div_ceil(BLOCK_TOKENS);
    for sequence in 0..sequences {
        let first_row = batch.rows();
        batch.tokens.extend((0..rows).map(|row| ((sequence * 31 + row * 7) % VOCAB) as u32));
        batch.positions.extend((start..start + rows).map(|position| position as u32));
        let slot = if cores.is_empty() { BASE_SLOT } else { (sequence % cores.len()) as u32 };
        batch.slots.extend(std::iter::repeat_n(slot, rows));
        let blocks = (sequence * blocks..(sequence + 1) * blocks).map(|block| block as u32).collect();
        batch.sequences.push(SequenceRows { first_row, rows, start, blocks });
        batch.logits_rows.push((first_row + rows - 1) as u32);
    }
    batch
}

/// Seconds that this thread has run: what a busy machine leaves comparable.
#[cfg(unix)]
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(not(unix))]
fn cpu_seconds() -> f64 {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    START.elapsed().as_secs_f64()
}

/// Tokens a second by the wall clock and by the caller's processor time: of several steps the median and the best.
fn rate(model: &mut Model, batch: &StepBatch) -> (f64, f64) {
    let mut times = [0.0; 8];
    model.step(batch, &mut times);
    times = [0.0; 8];
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let (start, used) = (Instant::now(), cpu_seconds());
        model.step(batch, &mut times);
        wall.push(start.elapsed().as_secs_f64());
        cpu.push(cpu_seconds() - used);
    }
    if std::env::var("PARTS").is_ok() {
        let all: f64 = times.iter().sum();
        let parts: Vec<String> = (NAMES.iter().zip(times))
            .map(|(name, time)| format!("{name} {:.3} ms ({:.0} %)", time / 9.0 * 1e3, 100.0 * time / all))
            .collect();
        println!("\n    {}", parts.join("  "));
    }
    wall.sort_by(f64::total_cmp);
    cpu.sort_by(f64::total_cmp);
    (batch.rows() as f64 / wall[wall.len() / 2], batch.rows() as f64 / cpu[0])
}

/// What each kind of region takes under adapters over what it takes on the base, step by step in turn: medians of the rounds' ratios and their quartiles.
#[test]
#[ignore = "a measurement, by hand"]
fn adapters_over_base() {
    let variable = |name: &str, otherwise: &str| std::env::var(name).unwrap_or_else(|_| otherwise.to_owned());
    let isa = variable("ISA", &Isa::available()[0].to_string());
    let isa = Isa::available().into_iter().find(|other| other.to_string() == isa).unwrap();
    let precision = variable("PRECISION", "Q4");
    let precision = crate::suite::PRECISIONS.into_iter().find(|p| format!("{p:?}") == precision).unwrap();
    let (threads, rounds) = (variable("THREADS", "2").parse().unwrap(), variable("ROUNDS", "60").parse().unwrap());
    let mut model = Model::new(threads, Some(isa), precision, 2, 64 * 40);
    let cores: Vec<_> = (0..64).map(|i| cores(i, 2, 7 * LAYERS)).collect();
    for (name, sequences, start, rows) in CASES.into_iter().filter(|(name, ..)| variable("CASE", name) == *name) {
        let batches = [batch(sequences, start, rows, &[]), batch(sequences, start, rows, &cores)];
        let mut step = |at: usize| {
            let mut times = [0.0; 8];
            model.step(&batches[at], &mut times);
            times[NAMES.len()] = times.iter().sum();
            times
        };
        step(0);
        step(1);
        let rounds: Vec<[[f64; 8]; 2]> = (0..rounds)
            .map(|round| {
                let first = step(round % 2);
                let second = step(1 - round % 2);
                if round % 2 == 0 { [first, second] } else { [second, first] }
            })
            .collect();
        print!("{name}:");
        for kind in 0..8 {
            let mut ratios: Vec<f64> = rounds.iter().map(|[base, each]| each[kind] / base[kind]).collect();
            ratios.sort_by(f64::total_cmp);
            let quartile = |i: usize| ratios[i * (ratios.len() - 1) / 4];
            let name = NAMES.get(kind).unwrap_or(&"all");
            print!("  {name} {:.3} ({:.3} {:.3})", quartile(2), quartile(1), quartile(3));
        }
        println!();
    }
}

/// Name, sequences, tokens before, rows of each.
const CASES: [(&str, usize, usize, usize); 6] = [
    ("1", 1, 64, 1),
    ("8", 8, 64, 1),
    ("32", 32, 64, 1),
    ("64", 64, 64, 1),
    ("32@512", 32, 512, 1),
    ("pp512", 1, 0, 512),
];

/// What [`Model::step`] tells apart.
const NAMES: [&str; 7] = ["begin", "qkv", "attend", "o", "gate_up", "down", "head"];

#[test]
#[ignore = "a measurement, by hand"]
fn tokens_a_second() {
    let threads = std::env::var("THREADS").map_or(2, |threads| threads.parse().unwrap());
    let wanted = |name: &str, value: String| std::env::var(name).is_ok_and(|only| only != value);
    for isa in Isa::available().into_iter().filter(|isa| !wanted("ISA", isa.to_string())) {
        for precision in crate::suite::PRECISIONS.into_iter().filter(|p| !wanted("PRECISION", format!("{p:?}"))) {
            for rank in [2, 0].into_iter().filter(|rank| !wanted("RANK", rank.to_string())) {
                let mut model = Model::new(threads, Some(isa), precision, rank, 64 * 40);
                let cores: Vec<_> = (0..64).filter(|_| rank > 0).map(|i| cores(i, rank, 7 * LAYERS)).collect();
                print!("{isa} {precision:?} rank {rank}:");
                for (name, sequences, start, rows) in
                    CASES.into_iter().filter(|(name, ..)| !wanted("CASE", (*name).to_owned()))
                {
                    let (wall, cpu) = rate(&mut model, &batch(sequences, start, rows, &cores));
                    print!("  {name} {wall:.0}/{cpu:.0}");
                }
                println!();
            }
        }
    }
}
