//! The same work, cut and shared in other ways.

use super::*;

fn fixture(case: &str) -> Fixture<CpuBackend> {
    Fixture::new(CpuBackend::new(2, None).unwrap(), model_of(case), 2, Precision::Q8)
}

/// Six completions of two prompts, one of them longer than a tile.
fn texts() -> Vec<(Vec<u32>, Vec<u32>)> {
    let prompts = [text(1, 37, 250), text(2, 6, 250)];
    (0..6).map(|i| (prompts[i / 3].clone(), text(10 + i as u64, [1, 9, 30, 4, 17, 2][i], 250))).collect()
}

fn sequences(texts: &[(Vec<u32>, Vec<u32>)]) -> Sequences<'_> {
    texts.iter().map(|(prompt, completion)| (&prompt[..], &completion[..])).collect()
}

fn weights(completion: usize, logprobs: &[f32]) -> Vec<f32> {
    noise(completion as u64, logprobs.len())
}

fn bits(result: &(Vec<Vec<f32>>, Option<CoreGradient>)) -> (Vec<u32>, Vec<u64>) {
    let gradient = result.1.iter().flat_map(|gradient| &gradient.data).map(|value| value.to_bits()).collect();
    (result.0.iter().flatten().map(|value| value.to_bits()).collect(), gradient)
}

#[test]
fn where_it_pauses_and_how_many_threads_it_has_does_not_matter() {
    for case in ["golden/qwen2", "golden2/qwen3"] {
        let mut fixture = fixture(case);
        let facts = fixture.facts(Scheme::u13_tied());
        let (texts, cores) = (texts(), fixture.cores(&facts, &noise(4, 13)));
        let job = |tile_rows| GradientJob { tile_rows, ..GradientJob::new(sequences(&texts), cores.clone(), 0.8) };
        for tile_rows in [16, TILE_ROWS] {
            let whole = bits(&run(&mut fixture.model, job(tile_rows), u64::MAX, weights));
            assert!(whole.1.iter().any(|value| *value != 0));
            for budget in [0, 1, 100_000, 3_000_000] {
                let cut = bits(&run(&mut fixture.model, job(tile_rows), budget, weights));
                assert!(cut == whole, "{case}, {tile_rows} rows, budget {budget}");
            }
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let model = &mut fixture.model;
                let result = pool.install(|| bits(&run(model, job(tile_rows), u64::MAX, weights)));
                assert!(result == whole, "{case}, {tile_rows} rows, {threads} threads");
            }
        }
    }
}

fn close(a: &(Vec<Vec<f32>>, Option<CoreGradient>), b: &(Vec<Vec<f32>>, Option<CoreGradient>), what: &str) {
    let worst = a.0.iter().flatten().zip(b.0.iter().flatten()).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(worst <= 2e-5, "{what}: log-probs {worst:e}");
    let (a, b) = (&a.1.as_ref().unwrap().data, &b.1.as_ref().unwrap().data);
    let largest = a.iter().fold(0f64, |most, value| most.max(value.abs()));
    let worst = a.iter().zip(b).fold(0f64, |most, (a, b)| most.max((a - b).abs()));
    println!("{what}: gradient {:.1e}", worst / largest);
    assert!(worst <= 1e-5 * largest, "{what}: gradient {worst:e} of {largest}");
}

#[test]
fn a_shared_prompt_is_a_repeated_one_and_tiles_change_last_bits_only() {
    for case in ["golden/llama", "golden/qwen2", "golden2/qwen3"] {
        let mut fixture = fixture(case);
        let facts = fixture.facts(Scheme::tiny13());
        let (texts, cores) = (texts(), fixture.cores(&facts, &noise(4, 13)));
        let shared = GradientJob::new(sequences(&texts), cores.clone(), 1.0);
        assert_eq!(shared.groups.len(), 2);
        let whole = run(&mut fixture.model, shared.clone(), u64::MAX, weights);
        let groups = texts.iter().map(|(prompt, completion)| GradientGroup {
            prompt: prompt.clone(),
            completions: vec![completion.clone()],
        });
        let apart = GradientJob { groups: groups.collect(), ..shared.clone() };
        let rows = |job: &GradientJob| {
            let rows = fixture.model.begin_gradient(job.clone()).unwrap().rows();
            assert_eq!(job.rows(), rows);
            rows
        };
        let tokens: usize = texts.iter().map(|(_, completion)| completion.len() - 1).sum();
        assert_eq!((rows(&shared), rows(&apart)), (37 + 6 + tokens, 3 * 43 + tokens));
        close(&whole, &run(&mut fixture.model, apart, u64::MAX, weights), case);
        for tile_rows in [1, 5, 16, 48] {
            let job = GradientJob { tile_rows, ..shared.clone() };
            close(&whole, &run(&mut fixture.model, job, u64::MAX, weights), &format!("{case}, {tile_rows} rows"));
        }
    }
}

/// Gradients of parts of a batch add up, whatever it was cut into.
#[test]
fn completions_do_not_see_one_another() {
    let mut fixture = fixture("golden/llama");
    let facts = fixture.facts(Scheme::tiny13());
    let (texts, cores) = (texts(), fixture.cores(&facts, &noise(4, 13)));
    let together = run(&mut fixture.model, GradientJob::new(sequences(&texts), cores.clone(), 1.0), u64::MAX, weights);
    let mut sum = (Vec::new(), CoreGradient { rank: together.1.as_ref().unwrap().rank, data: Vec::new() });
    for (number, text) in texts.iter().enumerate() {
        let job = GradientJob::new(sequences(std::slice::from_ref(text)), cores.clone(), 1.0);
        let (logprobs, gradient) = run(&mut fixture.model, job, u64::MAX, |_, l| weights(number, l));
        let gradient = gradient.unwrap().data;
        sum.0.extend(logprobs);
        sum.1.data.resize(gradient.len(), 0.0);
        sum.1.data.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
    }
    close(&together, &(sum.0, Some(sum.1)), "one by one");
}

#[test]
fn costs_are_bounded_and_add_up() {
    fn crosses_threads<T: Send>() {}
    crosses_threads::<GradientTask>(); // to the one that serves

    let mut fixture = fixture("golden/qwen2");
    let facts = fixture.facts(Scheme::tiny13());
    let (texts, cores) = (texts(), fixture.cores(&facts, &[0.1; 13]));
    let job = GradientJob { tile_rows: 16, ..GradientJob::new(sequences(&texts), cores, 1.0) };
    let mut task = fixture.model.begin_gradient(job).unwrap();
    let (all, mut spent, mut calls) = (task.left(), 0, 0);
    // 110 thousand weights a layer: a unit is at most twice so many for 16 rows, and some attention.
    while task.stage() != Stage::Done {
        let progress = fixture.model.advance_gradient(&mut task, 0).unwrap();
        assert!(progress.spent < 16 * 300_000, "{}", progress.spent);
        (spent, calls) = (spent + progress.spent, calls + 1);
        assert_eq!(spent + progress.left, all);
        if progress.stage == Stage::Weights {
            let weights: Vec<_> = task.logprobs().unwrap().iter().enumerate().map(|(i, l)| weights(i, l)).collect();
            task.set_weights(&weights).unwrap();
        }
    }
    assert!(calls > 50 && task.left() == 0);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut fixture = fixture("golden/llama");
    let facts = fixture.facts(Scheme::tiny13());
    let cores = fixture.cores(&facts, &[0.1; 13]);
    let job = |prompt: &[u32], completion: &[u32]| GradientJob::new([(prompt, completion)], cores.clone(), 1.0);
    let refused = |job: GradientJob| fixture.model.begin_gradient(job).map(|_| ()).unwrap_err().to_string();
    assert_eq!(refused(GradientJob::new([], cores.clone(), 1.0)), "completions: none");
    assert!(refused(job(&[], &[1])).contains("prompt 0: no tokens"));
    assert!(refused(job(&[1], &[])).contains("completion 0 has no tokens"));
    assert!(refused(job(&[1], &[320])).contains("token 320 is not below 320"));
    assert!(refused(job(&[1; 90], &[2; 8])).contains("97 positions"));
    assert!(refused(GradientJob { temperature: 0.0, ..job(&[1], &[2]) }).contains("temperature"));
    assert!(refused(GradientJob { tile_rows: 0, ..job(&[1], &[2]) }).contains("tile_rows"));
    let other = Arc::new(Cores::new(4, vec![0.0; 16]));
    assert!(refused(GradientJob { cores: other, ..job(&[1], &[2]) }).contains("cores: 16 numbers for 21 sites"));
    let mut task = fixture.model.begin_gradient(job(&[1; 90], &[2; 7])).unwrap();
    assert!(task.set_weights(&[vec![1.0; 7]]).is_err() && task.logprobs().is_none());
    fixture.model.advance_gradient(&mut task, u64::MAX).unwrap();
    for bad in [vec![], vec![vec![1.0; 6]], vec![vec![f32::NAN; 7]]] {
        assert!(task.set_weights(&bad).unwrap_err().to_string().starts_with("weights: "));
    }
    task.set_weights(&[vec![1.0; 7]]).unwrap();
    assert!(task.gradient().is_none());
    let huge = fixture.cores(&facts, &[1e30; 13]);
    let mut task = fixture.model.begin_gradient(GradientJob { cores: huge, ..job(&[1, 5], &[2, 3]) }).unwrap();
    let error = fixture.model.advance_gradient(&mut task, u64::MAX).unwrap_err();
    assert!(error.to_string().contains("not finite"));
    assert!(fixture.model.advance_gradient(&mut task, u64::MAX).unwrap_err().to_string().contains("before"));
}

#[test]
fn a_model_without_adapters_has_log_probs_but_no_gradient() {
    let LoadedModel { spec, weights, .. } = model_of("golden/llama");
    let options = TransformerOptions { precision: Precision::F32, max_positions: 96, kv_blocks: 4 };
    let mut model = Transformer::new(CpuBackend::new(1, None).unwrap(), spec, weights, &[], options).unwrap();
    let job = GradientJob::new([(&[1u32, 2][..], &[3u32][..])], Arc::new(Cores::new(0, [])), 1.0);
    let error = model.begin_gradient(job.clone()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("without adapters"), "{error}");
    let (logprobs, _) = run(&mut model, job.only_logprobs(), u64::MAX, |_, _| unreachable!());
    assert!(logprobs[0][0].is_finite());
}
