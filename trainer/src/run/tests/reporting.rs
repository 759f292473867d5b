use super::*;

#[test]
fn metrics_say_what_happened() {
    let hyper = json!({"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 6, "max_completion_tokens": 3, "learning_rate": 0.05});
    let report = |mismatch: f64, extra: Value| {
        let mut hyper = hyper.clone();
        hyper.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let mut run = Run::new(settings(hyper, Method::Grpo, 4), dataset(4), vec![0.1; 6]).unwrap();
        run.step(&mut Toy { mismatch, ..Toy::random(6) }, begins_with_b().as_ref(), &Stop::default()).unwrap()
    };
    let it = report(0.0, json!({}));
    let rewards: Vec<f32> = it.samples.iter().map(|sample| sample.reward).collect();
    assert_eq!(rewards.len(), 24);
    let metrics = &it.metrics;
    assert!((metrics.reward_mean.unwrap() - f64::from(rewards.iter().sum::<f32>()) / 24.0).abs() < 1e-6);
    let flat = rewards.chunks(6).filter(|group| group.iter().all(|&reward| reward == group[0])).count();
    assert_eq!(metrics.zero_variance_groups, Some(flat as f64 / 4.0));
    assert_eq!(metrics.tokens, it.samples.iter().map(|sample| sample.tokens as u64).sum::<u64>());
    assert_eq!(metrics.completion_tokens_max, Some(3));
    let cut = it.samples.iter().filter(|sample| !sample.finished).count() as f64 / 24.0;
    assert_eq!(metrics.truncated, Some(cut));
    assert!((1.0..1.61).contains(&metrics.entropy.unwrap()), "five tokens: {:?}", metrics.entropy);
    assert!(metrics.kl.unwrap() > 0.0 && metrics.gradient_norm > 0.0);
    assert_eq!((metrics.logprob_difference_max, metrics.importance_weight_mean), (Some(0.0), Some(1.0)));
    assert_eq!(
        (metrics.clip_fraction, metrics.updates, metrics.learning_rate, metrics.prompts),
        (Some(0.0), 1, 0.05, 4)
    );
    assert_eq!(it.end, Some(End::Steps));
    assert!(it.timing.tokens_per_second > 0.0);

    let apart = report(0.5, json!({})).metrics;
    let (least, most) = (apart.importance_weight_min.unwrap(), apart.importance_weight_max.unwrap());
    assert!(
        apart.logprob_difference_mean.unwrap() > 0.05 && apart.logprob_difference_max > apart.logprob_difference_mean
    );
    assert!(least < 0.95 && most > 1.05 && most <= 2.0, "{least} {most}");
    assert_eq!(report(0.5, json!({"importance_weight_cap": 1.0})).metrics.importance_weight_max, Some(1.0));
    let twice = report(0.5, json!({"updates_per_batch": 2, "minibatches": 2})).metrics;
    assert_eq!(twice.logprob_difference_max, apart.logprob_difference_max);
    let all = report(0.5, json!({"updates_per_batch": 2, "minibatches": 2, "beta": 1e-3})).metrics;
    assert_eq!(all.updates, 4);
    assert!(twice.updates <= 4, "a minibatch of flat groups makes no update");
    assert_eq!(report(0.0, json!({"kl_samples_per_prompt": 0})).metrics.kl, None);
    let moved = report(0.0, json!({"updates_per_batch": 6, "learning_rate": 0.5})).metrics;
    assert!(moved.clip_fraction.unwrap() > 0.05, "{moved:?}");
}

#[test]
fn a_reward_that_never_varies_ends_the_run_with_words() {
    let never = grader(json!({"type": "regex", "pattern": "z"}));
    for (method, extra) in [
        (Method::Grpo, json!({})),
        (Method::Grpo, json!({"beta": 0.1})),
        (Method::Grpo, json!({"dynamic_sampling": 2})),
        (Method::Es, json!({})),
    ] {
        let settings = Settings { steps: 50, ..planned(method, &extra) };
        let mut run = Run::new(settings, dataset(5), vec![0.0; 6]).unwrap();
        let reports = run_to_end(&mut run, &mut Toy::random(6), never.as_ref());
        assert_eq!(run.end(), Some(&End::RewardNeverVaried { steps: 20, reward: 0.0 }));
        let notices: Vec<Notice> = reports.iter().flat_map(|report| report.notices.clone()).collect();
        assert!(notices.contains(&Notice::RewardFlat { steps: 5, reward: 0.0 }), "{notices:?}");
        assert_eq!(norm(run.numbers()), 0.0);
        assert_eq!(run.step(&mut Toy::random(6), never.as_ref(), &Stop::default()), Err(TrainError::Ended));
        if method == Method::Grpo {
            assert!(reports[0].metrics.logprob_difference_mean.is_some(), "measured at every step");
        }
    }
}

#[test]
fn dynamic_sampling_keeps_drawing_until_groups_vary() {
    let hyper = json!({"steps": 1, "prompts_per_step": 3, "samples_per_prompt": 2, "dynamic_sampling": 40, "max_completion_tokens": 2});
    let mut run = Run::new(settings(hyper, Method::Grpo, 5), dataset(5), vec![0.0; 6]).unwrap();
    let report = run.step(&mut Toy::random(6), begins_with_b().as_ref(), &Stop::default()).unwrap();
    let varied = report.samples.chunks(2).filter(|group| group[0].reward != group[1].reward).count();
    assert_eq!(varied, 3);
    assert!(report.metrics.prompts > 3 && report.metrics.prompts == report.samples.len() as u64 / 2);
    assert_eq!(run.checkpoint().state.drawn, report.metrics.prompts);
}

#[test]
fn masked_completions_have_no_gradient() {
    let hyper = json!({"steps": 1, "mask_truncated": true, "max_completion_tokens": 1, "prompts_per_step": 3});
    let always = grader(json!({"type": "regex", "pattern": "^[ab]"}));
    let mut run = Run::new(settings(hyper, Method::Grpo, 3), dataset(3), vec![0.0; 6]).unwrap();
    let report = run.step(&mut Toy::random(6), always.as_ref(), &Stop::default()).unwrap();
    // With one token a completion is cut off unless it is the end itself, whose reward is 0.
    assert!(report.metrics.zero_variance_groups < Some(1.0));
    assert!(report.samples.iter().all(|sample| sample.finished == sample.text.is_empty()));
    let wholly: f64 = norm(run.numbers());
    assert!(wholly > 0.0, "the finished ones still push");
    assert_eq!(report.notices.len(), usize::from(report.metrics.truncated.unwrap() >= 0.9));
}
