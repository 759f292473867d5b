use super::*;

#[test]
fn grpo_finds_the_best_arm_with_every_loss() {
    for loss in ["grpo", "dr_grpo", "dapo"] {
        for extra in [
            json!({}),
            json!({"updates_per_batch": 2, "minibatches": 2}),
            json!({"dynamic_sampling": 3, "beta": 0.001}),
        ] {
            let mut hyper = json!({"loss": loss, "steps": 60, "learning_rate": 0.15, "prompts_per_step": 4, "max_completion_tokens": 1});
            hyper.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let mut run = Run::new(settings(hyper, Method::Grpo, 3), dataset(3), vec![0.0; 4]).unwrap();
            let mut policy = Toy::bandit(4);
            let reports = run_to_end(&mut run, &mut policy, begins_with_b().as_ref());
            let arms = policy.arms(run.numbers());
            assert!(arms[1] > 0.9, "{loss} {extra}: {arms:?}");
            let (early, late) = (mean_reward(&reports[..2]), mean_reward(&reports[55..]));
            assert!(late > 0.9 && early < 0.6, "{loss} {extra}: {early} {late}");
        }
    }
}

#[test]
fn evolution_strategies_find_the_best_arm_without_a_gradient() {
    let hyper = json!({"steps": 80, "learning_rate": 0.2, "sigma": 0.5, "population": 16, "prompts_per_step": 8, "max_completion_tokens": 1});
    let mut run = Run::new(settings(hyper, Method::Es, 3), dataset(3), vec![0.0; 4]).unwrap();
    let mut policy = Toy::bandit(4);
    let reports = run_to_end(&mut run, &mut policy, begins_with_b().as_ref());
    assert!(policy.arms(run.numbers())[1] > 0.9, "{:?}", policy.arms(run.numbers()));
    assert_eq!(policy.calls, 80, "one mixed batch a step and nothing else");
    let metrics = &reports[0].metrics;
    assert!(
        metrics.candidate_reward_min < metrics.candidate_reward_max && metrics.kl.is_none() && metrics.loss.is_none()
    );
    assert_eq!((metrics.prompts, reports[0].samples.len()), (8, 8 * 16));
}

/// The optimum of cross-entropy is the data's frequencies: 3 of 4 demonstrations are `a`, one is `b`.
#[test]
fn sft_reaches_the_frequencies_of_the_demonstrations() {
    let target = |token: u32| Example {
        place: Place::Line(1),
        prompt: vec![1],
        target: vec![token],
        fields: Arc::new(json!({})),
    };
    let data = Dataset::new(vec![target(1), target(1), target(1), target(2)]).unwrap();
    let hyper =
        json!({"steps": 400, "learning_rate": 0.1, "schedule": "cosine", "prompts_per_step": 4, "max_grad_norm": 0});
    let mut run = Run::new(settings(hyper, Method::Sft, 4), data.clone(), vec![0.0; 3]).unwrap();
    let mut policy = Toy::bandit(3);
    let reports = run_to_end(&mut run, &mut policy, &NoGrader);
    let arms = policy.arms(run.numbers());
    assert!((arms[0] - 0.75).abs() < 0.01 && (arms[1] - 0.25).abs() < 0.01, "{arms:?}");
    let entropy = -(0.75 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
    let loss = demonstration_loss(&mut policy, &data, run.numbers(), 3, &Stop::default()).unwrap();
    assert!((loss - entropy).abs() < 0.01, "{loss} {entropy}");
    assert!(reports[0].metrics.loss.unwrap() > loss && reports[0].metrics.reward_mean.is_none());
    assert_eq!(reports[0].metrics.tokens, 4);
}

#[test]
fn the_kl_keeps_the_policy_near_the_base() {
    let distance = |beta: f64| {
        let hyper = json!({"steps": 40, "learning_rate": 0.1, "beta": beta, "max_completion_tokens": 1, "scale_rewards": "none"});
        let mut run = Run::new(settings(hyper, Method::Grpo, 3), dataset(3), vec![0.0; 4]).unwrap();
        let reports = run_to_end(&mut run, &mut Toy::bandit(4), begins_with_b().as_ref());
        (norm(run.numbers()), reports.last().unwrap().metrics.kl.unwrap())
    };
    let ((far, free), (near, held)) = (distance(0.0), distance(5.0));
    assert!(near < far / 3.0, "{near} {far}");
    assert!(held < free / 3.0, "{held} {free}");
}

/// Central differences through the policy, of the loss as a function of the numbers: every aggregation, with and without KL, importance weights and a clip that bites.
#[test]
fn the_gradient_of_every_loss_is_that_of_finite_differences() {
    let mut policy = Toy::random(3);
    let prompts: Vec<Vec<u32>> = (0..3).map(|p| vec![p + 1]).collect();
    let completions: Vec<Vec<u32>> = vec![vec![2, 1, 0], vec![3], vec![1, 1, 4, 2, 0], vec![4, 0]];
    let sequences: Vec<Sequence<'_>> = completions
        .iter()
        .enumerate()
        .map(|(i, completion)| Sequence { prompt: &prompts[i % 3], completion })
        .collect();
    let (numbers, before, temperature) = ([0.3f32, -0.2, 0.5], [0.1f32, 0.0, 0.4], 0.8);
    let old = policy.logprobs(&before, &sequences, temperature).unwrap();
    let reference = policy.logprobs(&[0.0; 3], &sequences, temperature).unwrap();
    let lengths: Vec<usize> = completions.iter().map(Vec::len).collect();
    for kind in [LossKind::Grpo, LossKind::DrGrpo, LossKind::Dapo] {
        for beta in [0.0, 0.1] {
            let factors = kind.factors(&lengths, 6);
            let sequence = |index: usize| GrpoSequence {
                advantage: [1.2, -0.7, 0.4, -1.0][index],
                factor: factors[index],
                sampler: old[index].iter().map(|logprob| logprob - 0.1).collect(),
                old: Some(old[index].clone()),
                reference: Some(reference[index].clone()),
            };
            let clip = ClipSettings { low: 0.1, high: 0.1, beta, importance_cap: 2.0 };
            let loss = Arc::new(GrpoLoss { settings: clip, sequences: (0..4).map(sequence).collect() });
            let analytic = policy.loss_gradient(&numbers, &sequences, temperature, loss.clone()).unwrap();
            let mut at = |numbers: &[f32]| {
                let logprobs = policy.logprobs(numbers, &sequences, temperature).unwrap();
                logprobs.iter().enumerate().map(|(index, it)| loss.terms(index, it).loss).sum::<f64>()
            };
            let clipped: usize = analytic.logprobs.iter().enumerate().map(|(i, it)| loss.terms(i, it).clipped).sum();
            assert!(clipped > 0 && clipped < 11, "{clipped}");
            for j in 0..3 {
                let (mut high, mut low) = (numbers, numbers);
                high[j] += 2e-3;
                low[j] -= 2e-3;
                let slope = (at(&high) - at(&low)) / f64::from(high[j] - low[j]);
                let got = f64::from(analytic.gradient[j]);
                assert!((slope - got).abs() < 2e-4 * (1.0 + slope.abs()), "{kind:?} {beta}: {got} is not {slope}");
            }
        }
    }
}

/// The sampler rolls out from tilted logits. With the importance weight the mean gradient is that of the policy itself; without it, it is not.
#[test]
fn the_importance_weight_corrects_the_sampler() {
    let mut policy = Toy { mismatch: 0.4, ..Toy::bandit(3) };
    let numbers = [0.2f32, 0.0, -0.1];
    let seeds: Vec<u64> = (0..60_000).collect();
    let request = RolloutRequest { numbers: &numbers, prompt: &[1], seeds, max_tokens: 1, temperature: 1.0 };
    let group = policy.rollout(&[request]).unwrap().remove(0);
    let reward = |token: u32| if token == 2 { 1.0 } else { 0.0 };
    let mut estimate = |cap: f64| {
        let sequences: Vec<Sequence<'_>> =
            group.iter().map(|rollout| Sequence { prompt: &[1], completion: &rollout.tokens }).collect();
        let clip = ClipSettings { low: 0.2, high: 0.2, beta: 0.0, importance_cap: cap };
        let sequence = |rollout: &crate::policy::Rollout| GrpoSequence {
            advantage: reward(rollout.tokens[0]) - 0.3,
            factor: 1.0 / group.len() as f64,
            sampler: rollout.logprobs.clone(),
            old: None,
            reference: None,
        };
        let loss = GrpoLoss { settings: clip, sequences: group.iter().map(sequence).collect() };
        policy.loss_gradient(&numbers, &sequences, 1.0, Arc::new(loss)).unwrap().gradient
    };
    let (corrected, plain) = (estimate(10.0), estimate(0.0));
    let arms = policy.arms(&numbers);
    for j in 0..3 {
        // d/d number_j of -E[reward - 0.3]
        let exact = -arms[j] * (f64::from(u8::from(j == 1)) - arms[1]);
        assert!((f64::from(corrected[j]) - exact).abs() < 0.006, "{corrected:?} {exact}");
    }
    let exact = -arms[1] * (1.0 - arms[1]);
    assert!((f64::from(plain[1]) - exact).abs() > 0.01, "{plain:?} {exact}");
}

/// A policy that fuses forward and backward pass calls the loss from wherever it likes.
#[test]
fn losses_can_be_asked_from_another_thread() {
    let loss: Arc<dyn TokenLoss> = Arc::new(crate::loss::CrossEntropy { tokens: 4 });
    let weights = std::thread::spawn(move || loss.weights(0, &[-1.0, -2.0])).join().unwrap();
    assert_eq!(weights, [-0.25, -0.25]);
}
