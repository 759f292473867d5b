//! Every kernel on every instruction set of this machine: equal to the reference, and the same bits however the work is cut.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::{
    isa::lanes_for_tests::{self, Functions},
    *,
};
use crate::suite::{self, AttentionCase, Group, Random, bits, cores, groups, mixed_rows, rows_batch, run_product};
use crate::{BASE_SLOT, reference::ReferenceBackend};

fn backend(isa: Isa, threads: usize) -> CpuBackend {
    CpuBackend::new(threads, Some(isa)).unwrap()
}

#[test]
fn products_equal_the_reference() {
    for isa in Isa::available() {
        // Sums of up to 257 terms in f32: weights and activations are rounded alike, so the error is that of the sums. Behind a norm an
        // activation may differ in its last f32 bit, and then fall on the other side of a rounding: one step of one term.
        suite::products_equal_reference(backend(isa, 2), |group| match (group.precision, group.norm) {
            (Precision::F32, _) => 4e-6,
            (Precision::Bf16, true) => 1e-3,
            // The reference rounds activations beside integers to eight bits, tiles do not: see `isa::amx` for tests of those numbers.
            (Precision::Q8 | Precision::Q4, _) if isa == Isa::Amx => 3e-2,
            (_, false) => 4e-6,
            (Precision::Q8 | Precision::Q4, true) => 2e-3,
        });
    }
}

/// Beside tiles nothing is rounded but each factor, to bfloat16: [`super::unpack`]'s tests hold the weights to that, this one the sums.
#[test]
fn products_on_tiles_are_sums_of_products_of_bfloat16() {
    if !Isa::available().contains(&Isa::Amx) {
        return;
    }
    let groups = groups().into_iter().filter(|group| group.epilogue == Epilogue::Store);
    for (group, precision) in groups.flat_map(|group| suite::PRECISIONS.map(|precision| (group.clone(), precision))) {
        let group = Group { precision, rank: 0, bias: false, norm: false, ..group };
        let mut backend = backend(Isa::Amx, 2);
        let linear = group.pack(&backend, 5);
        let weights = backend.dense(&linear, 0..group.width(), None).unwrap().to_vec2::<f32>().unwrap();
        for rows in [1, 2, 3, 40] {
            let batch = rows_batch(&mixed_rows(rows), vec![cores(7, 1, 3), cores(8, 1, 3)]);
            let got = run_product(&mut backend, &group, &linear, &batch, Rows::All, 9, rows).unwrap();
            let mut x = Random(9).units(rows * group.inputs);
            if precision != Precision::F32 {
                x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
            let of_row = |x: &[f32]| weights.iter().map(|w| dot(w, x) as f32).collect::<Vec<_>>();
            let want: Vec<f32> = x.chunks(group.inputs).flat_map(of_row).collect();
            let error = suite::error(&got, &want);
            assert!(error <= 2e-6, "{group:?}, {rows} rows: {error:e}");
        }
    }
}

#[test]
fn weights_that_an_f16_cannot_hold_are_multiplied_without_tiles() {
    for (isa, precision) in Isa::available().into_iter().flat_map(|isa| suite::PRECISIONS.map(|p| (isa, p))) {
        let weight: Vec<f32> = Random(2).units(40 * 64).into_iter().map(|w| 1e4 * w).collect();
        let weight = Weight::from_f32(40, 64, weight).unwrap();
        let part = LinearPart { weight: &weight, bias: None, factors: None };
        let (mut backend, mut reference) = (backend(isa, 1), ReferenceBackend);
        let group = Group { precision, outputs: vec![40], rank: 0, norm: false, ..groups().remove(0) };
        let (linear, slow) =
            (backend.linear(&[part], precision).unwrap(), reference.linear(&[part], precision).unwrap());
        let batch = rows_batch(&[(0, BASE_SLOT), (1, BASE_SLOT), (2, BASE_SLOT)], Vec::new());
        let got = run_product(&mut backend, &group, &linear, &batch, Rows::All, 1, 3).unwrap();
        let want = run_product(&mut reference, &group, &slow, &batch, Rows::All, 1, 3).unwrap();
        let error = suite::error(&got, &want);
        assert!(error <= 4e-6, "{isa} {precision:?}: {error:e}");
    }
}

#[test]
fn attention_equals_the_reference() {
    for isa in Isa::available() {
        // Keys, values and queries are bfloat16 beside weights that are not f32, and so are the tokens' weights where pairs are multiplied: eight bits.
        let tolerance = |precision| if precision == Precision::F32 { 4e-6 } else { 4e-3 };
        suite::attention_equals_reference(backend(isa, 2), tolerance);
    }
}

#[test]
fn bad_batches_and_shapes_are_refused() {
    suite::bad_batches_are_refused(backend(Isa::Portable, 1));
    suite::bad_shapes_are_refused(backend(Isa::Portable, 1));
    suite::bad_batches_are_refused(ReferenceBackend);
    suite::bad_shapes_are_refused(ReferenceBackend);
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch_on_any_threads() {
    for isa in Isa::available() {
        for (number, group) in groups().into_iter().enumerate() {
            for precision in suite::PRECISIONS {
                let group = Group { precision, ..group.clone() };
                let all_cores = vec![cores(7, group.rank, 3), cores(8, group.rank, 3)];
                let (rows, width) = (mixed_rows(41), group.width());
                let run = |threads, rows: &[(u32, u32)]| {
                    let mut backend = backend(isa, threads);
                    let linear = group.pack(&backend, number as u64);
                    let batch = rows_batch(rows, all_cores.clone());
                    bits(&run_product(&mut backend, &group, &linear, &batch, Rows::All, 3, 41).unwrap())
                };
                let want = run(1, &rows);
                let row_of = |result: &[u32], row: usize| result[row * width..(row + 1) * width].to_vec();
                for threads in 2..4 {
                    assert_eq!(run(threads, &rows), want, "{isa} {group:?}: {threads} threads");
                }
                let mut shuffled = rows.clone();
                let mut random = Random(4);
                (1..rows.len()).rev().for_each(|i| shuffled.swap(i, random.below(i + 1)));
                for size in [1, 2, 3, 5, 8, 12, 13, 17, 32, 40, 64, 300] {
                    let rows: Vec<_> = shuffled.iter().copied().cycle().take(size).collect();
                    let result = run(2, &rows);
                    for (i, row) in rows.iter().enumerate() {
                        assert_eq!(row_of(&result, i), row_of(&want, row.0 as usize), "{isa} {group:?}: {size} rows");
                    }
                }
            }
        }
    }
}

#[test]
fn a_step_sees_its_own_cores_whatever_the_step_before_had_in_their_slots() {
    let group = groups().into_iter().find(|group| group.rank >= 2).unwrap();
    let mut reused = backend(Isa::Portable, 1);
    let linear = group.pack(&reused, 3);
    let [a, b, c] = [7, 8, 9].map(|seed| cores(seed, group.rank, 3));
    let rows = mixed_rows(9);
    for cores in [vec![a.clone(), b.clone()], vec![a.clone(), c.clone()], vec![c.clone(), a.clone()], vec![b, c, a]] {
        let run = |backend: &mut CpuBackend| {
            let batch = rows_batch(&rows, cores.clone());
            bits(&run_product(backend, &group, &linear, &batch, Rows::All, 3, 9).unwrap())
        };
        assert_eq!(run(&mut reused), run(&mut backend(Isa::Portable, 1)));
    }
}

#[test]
fn rows_on_the_base_have_the_bits_of_a_linear_without_adapters() {
    for isa in Isa::available() {
        for (number, group) in groups().into_iter().enumerate().filter(|(_, group)| group.rank > 0) {
            for precision in suite::PRECISIONS {
                let group = Group { precision, ..group.clone() };
                let mut backend = backend(isa, 2);
                let mut run = |rank: usize, rows: &[(u32, u32)]| {
                    // The same W and bias at rank 0: the parts' factors are drawn, then left out.
                    let linear = group.pack_with_rank(&backend, number as u64, rank);
                    let batch = rows_batch(rows, vec![cores(7, rank, 3), cores(8, rank, 3)]);
                    run_product(&mut backend, &group, &linear, &batch, Rows::All, 3, 20).unwrap()
                };
                let (mixed, base) = (mixed_rows(20), (0..20).map(|row| (row, BASE_SLOT)).collect::<Vec<_>>());
                let (adapted, bare) = (run(group.rank, &mixed), run(0, &base));
                let width = group.width();
                let mut changed = 0;
                for (row, (_, slot)) in mixed.iter().enumerate() {
                    let rows = row * width..(row + 1) * width;
                    let same = bits(&adapted[rows.clone()]) == bits(&bare[rows]);
                    assert!(same || *slot != BASE_SLOT, "{isa} {group:?}: base row {row} changed");
                    changed += usize::from(!same);
                }
                assert!(changed > 0, "{isa} {group:?}: no adapter had an effect");
            }
        }
    }
}

#[test]
fn attention_has_the_same_bits_however_a_sequence_is_cut() {
    let case = AttentionCase {
        heads: 6,
        kv_heads: 2,
        head_dim: 24,
        norms: true,
        precision: Precision::F32,
        lengths: vec![40, 21, 100],
    };
    for isa in Isa::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let case = AttentionCase { precision, ..case.clone() };
            let run = |threads, steps: &[Vec<(usize, usize)>]| {
                case.run(&mut backend(isa, threads), steps)
                    .into_iter()
                    .map(|rows| bits(&rows.concat()))
                    .collect::<Vec<_>>()
            };
            let whole = run(1, &[vec![(0, 40), (1, 21), (2, 100)]]);
            let cuts: [Vec<Vec<(usize, usize)>>; 4] = [
                vec![vec![(0, 40)], vec![(1, 21)], vec![(2, 100)]],
                vec![vec![(2, 99), (0, 7)], vec![(0, 33), (1, 16), (2, 1)], vec![(1, 5)]],
                (0..40).map(|_| vec![(0, 1)]).chain([vec![(1, 21), (2, 16)], vec![(2, 84)]]).collect(),
                (0..21).map(|_| vec![(2, 4), (1, 1), (0, 1)]).chain([vec![(0, 19), (2, 16)]]).collect(),
            ];
            for (number, steps) in cuts.iter().enumerate() {
                for threads in 1..4 {
                    assert_eq!(run(threads, steps), whole, "{isa} {precision:?}: cut {number}, {threads} threads");
                }
            }
        }
    }
}

/// A block that another sequence left full of NaN must not reach the next owner, which has not filled it.
#[test]
fn stale_slots_of_a_block_are_never_read() {
    for isa in Isa::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let case =
                AttentionCase { heads: 2, kv_heads: 1, head_dim: 16, norms: false, precision, lengths: vec![3, 16] };
            let spec = case.spec();
            let mut backend = backend(isa, 1);
            let attention = backend.attention(&spec).unwrap();
            let shape = KvShape { layers: 1, blocks: 1, kv_heads: 1, head_dim: 16 };
            let mut run = |kv: &mut CpuKv, rows: usize, value: f32| {
                let mut batch = rows_batch(&vec![(0, BASE_SLOT); rows], Vec::new());
                batch.positions = (0..rows as u32).collect();
                batch.sequences = vec![crate::SequenceRows { first_row: 0, rows, start: 0, blocks: vec![0] }];
                let step = backend.begin(&batch).unwrap();
                let weight = Weight::from_f32(1, case.width(), vec![value; case.width()]).unwrap();
                let table = backend.table(&weight, Precision::F32).unwrap();
                let (mut qkv, mut out) = (backend.buffer(case.width()).unwrap(), backend.buffer(32).unwrap());
                backend.embed(&step, &table, &mut qkv).unwrap();
                backend.attend(&step, &attention, 0, &qkv, kv, &mut out).unwrap();
                let mut values = Floats::default();
                backend.read(&mut out, &mut values).unwrap();
                values
            };
            let mut fresh = CpuKv::new(shape, precision).unwrap();
            let mut stale = CpuKv::new(shape, precision).unwrap();
            assert!(run(&mut stale, 16, f32::NAN).iter().all(|value| value.is_nan()));
            let (clean, reused) = (run(&mut fresh, 3, 0.5), run(&mut stale, 3, 0.5));
            assert!(clean.iter().all(|value| value.is_finite()));
            assert_eq!(bits(&clean), bits(&reused), "{isa} {precision:?}");
        }
    }
}

/// Sums of integers are exact, and what follows is one chain of multiply-adds.
#[test]
fn all_sets_with_fused_arithmetic_give_the_same_bits() {
    let fused: Vec<Isa> = Isa::available().into_iter().filter(|isa| ![Isa::Portable, Isa::Amx].contains(isa)).collect();
    for precision in [Precision::F32, Precision::Q8, Precision::Q4] {
        let group = Group { precision, ..groups().remove(0) };
        let results = fused.iter().map(|&isa| {
            let mut backend = backend(isa, 1);
            let linear = group.pack(&backend, 1);
            let batch = rows_batch(&mixed_rows(9), vec![cores(7, 2, 3), cores(8, 2, 3)]);
            bits(&run_product(&mut backend, &group, &linear, &batch, Rows::All, 3, 9).unwrap())
        });
        let results: Vec<_> = results.collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{precision:?}");
    }
}

#[test]
fn weights_are_powers_of_e_or_zero_and_never_subnormal() {
    for Functions { isa, exp, weight, .. } in lanes_for_tests::each() {
        let xs = [
            0.0,
            -0.5,
            -1.0,
            -20.0,
            -59.0,
            -59.8,
            -59.9,
            -60.0,
            -86.0,
            -87.0,
            -88.0,
            -104.0,
            -1e9,
            f32::NEG_INFINITY,
            f32::NAN,
            -3.0,
        ];
        for ((x, weight), exp) in xs.into_iter().zip(weight(xs)).zip(exp(xs)) {
            if x.is_nan() {
                assert!(weight.is_nan(), "{isa}");
            } else {
                assert_eq!(weight, if x > -59.85 { exp } else { 0.0 }, "{isa}: {x}");
            }
        }
    }
}

#[test]
fn numbers_become_bfloat16_alike_everywhere() {
    let mut numbers: Vec<f32> = Random(5).units(1600).into_iter().map(|x| x * 1e3).collect();
    // Ties to even, up and down; what rounds to infinity; what has no number.
    numbers.extend(
        [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0xbf81_8000, 0x7f7f_ffff, 0xff7f_ffff, 0x7f80_0000]
            .map(f32::from_bits),
    );
    numbers.extend(
        [0x7f80_0001, 0xffff_ffff, 0x7fff_8000, 0x7fc0_0000, 0x8000_0000, 0, 0x0080_0000, 0x7f7f_7fff]
            .map(f32::from_bits),
    );
    for Functions { isa, narrow, .. } in lanes_for_tests::each() {
        for chunk in numbers.chunks_exact(16) {
            for (x, got) in chunk.iter().zip(narrow(chunk.try_into().unwrap())) {
                let want = half::bf16::from_f32(*x);
                let same = got == want.to_bits() || (x.is_nan() && half::bf16::from_bits(got).is_nan());
                assert!(same, "{isa}: {x:e} ({:#x}) becomes {got:#x}, not {want}", x.to_bits());
            }
        }
    }
}

#[test]
fn exp_is_within_two_ulp_and_keeps_nan() {
    let xs: Vec<f32> = (0..16_000).map(|i| -86.9 + i as f32 * 0.0109).collect();
    for Functions { isa, exp, .. } in lanes_for_tests::each() {
        for chunk in xs.chunks_exact(16) {
            for (x, got) in chunk.iter().zip(exp(chunk.try_into().unwrap())) {
                let want = f64::from(*x).exp();
                let error = (f64::from(got) - want).abs() / want;
                assert!(error < 2.4e-7, "{isa}: exp({x}) = {got}, error {error:e}");
            }
        }
        assert!(exp([f32::NAN; 16])[3].is_nan(), "{isa}");
        assert_eq!(exp([0.0; 16])[0], 1.0, "{isa}");
    }
}

#[test]
fn a_step_allocates_nothing_once_there_has_been_one_as_large() {
    for (precision, rows, threads) in
        suite::PRECISIONS.into_iter().flat_map(|precision| [1, 4, 41].map(|rows| (precision, rows, 1 + rows % 3)))
    {
        let mut backend = backend(Isa::available()[0], threads);
        let group = Group { precision, ..groups().remove(0) };
        let case = AttentionCase { heads: 4, kv_heads: 2, head_dim: 16, norms: true, precision, lengths: Vec::new() };
        let (linear, attention) = (group.pack(&backend, 1), backend.attention(&case.spec()).unwrap());
        let norm = backend.norm(&[0.5; 64], 1e-5).unwrap();
        let weight = Weight::from_f32(41, 64, Random(3).units(41 * 64)).unwrap();
        let table = backend.table(&weight, precision).unwrap();
        let mut kv = backend.kv(KvShape { layers: 1, blocks: 41, kv_heads: 2, head_dim: 16 }, precision).unwrap();
        let [mut x, mut qkv, mut out] = [64, 128, 64].map(|width| backend.buffer(width).unwrap());
        let batch = rows_batch(&mixed_rows(rows), vec![cores(7, 2, 3), cores(8, 2, 3)]);
        let mut values = Floats::default();
        let mut run = |backend: &mut CpuBackend| {
            let step = backend.begin(&batch).unwrap();
            backend.embed(&step, &table, &mut x).unwrap();
            let (all, store) = (Rows::All, Epilogue::Store);
            backend.product(&step, &linear, all, Some(&norm), &x, store, &mut qkv).unwrap();
            backend.attend(&step, &attention, 0, &qkv, &mut kv, &mut out).unwrap();
            backend.read(&mut out, &mut values).unwrap();
            values.len()
        };
        let counts = |backend: &mut CpuBackend| {
            let counts = [const { AtomicUsize::new(0) }; 3];
            backend.pool.run(&|thread| counts[thread].store(crate::counting::allocations(), Relaxed));
            counts.map(AtomicUsize::into_inner)
        };
        // Which thread gets which piece is chance: each of them has had the largest when the counts no longer change.
        let steady = (0..200).any(|_| {
            let before = counts(&mut backend);
            (0..5).for_each(|_| assert_eq!(run(&mut backend), rows * 64));
            counts(&mut backend) == before
        });
        assert!(steady, "{precision:?}, {rows} rows, {threads} threads: every five steps allocate");
    }
}
