use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::{
    data::{DataError, Example, Place},
    eval::{EvalSettings, demonstration_loss, evaluate, final_report},
    grader::{NoRemote, build},
    hyper::{Hyperparameters, Method},
    loss::{ClipSettings, GrpoLoss, GrpoSequence, LossKind},
    policy::{RolloutRequest, Sequence, TokenLoss},
    settings::Settings,
    toy::Toy,
};

fn dataset(prompts: usize) -> Dataset {
    let example = |index: usize| Example {
        place: Place::Line(index + 1),
        prompt: vec![index as u32 + 1, 7],
        target: vec![2, 1 + index as u32 % 4, 0],
        fields: json!({"answer": "b"}),
    };
    Dataset::new((0..prompts).map(example).collect()).unwrap()
}

fn settings(value: Value, method: Method, items: usize) -> Settings {
    Settings::resolve(&Hyperparameters::from_json(&value).unwrap(), method, items, 11).unwrap()
}

fn grader(spec: Value) -> Box<dyn Grader> {
    build(&spec, &NoRemote).unwrap()
}

/// Reward 1 for a completion that begins with `b`.
fn begins_with_b() -> Box<dyn Grader> {
    grader(json!({"type": "regex", "pattern": "^b"}))
}

fn run_to_end(run: &mut Run, policy: &mut Toy, grader: &dyn Grader) -> Vec<StepReport> {
    let mut reports = Vec::new();
    while run.end().is_none() {
        reports.push(run.step(policy, grader, &Stop::default()).unwrap());
    }
    reports
}

fn mean_reward(reports: &[StepReport]) -> f64 {
    reports.iter().map(|report| report.metrics.reward_mean.unwrap()).sum::<f64>() / reports.len() as f64
}

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
    let target =
        |token: u32| Example { place: Place::Line(1), prompt: vec![1], target: vec![token], fields: json!({}) };
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

fn plans() -> Vec<(Method, Value)> {
    vec![
        (Method::Grpo, json!({})),
        (
            Method::Grpo,
            json!({"updates_per_batch": 2, "minibatches": 3, "loss": "dapo", "schedule": "cosine", "warmup_steps": 2}),
        ),
        (
            Method::Grpo,
            json!({"dynamic_sampling": 2, "beta": 0.02, "mask_truncated": true, "loss": "dr_grpo", "weight_decay": 0.01, "patience": 4}),
        ),
        (Method::Es, json!({"population": 6, "samples_per_prompt": 2})),
        (Method::Sft, json!({"schedule": "linear", "patience": 5})),
    ]
}

fn planned(method: Method, extra: &Value) -> Settings {
    let mut hyper = json!({"steps": 10, "learning_rate": 0.1, "prompts_per_step": 3, "max_completion_tokens": 4});
    if method == Method::Grpo {
        hyper["samples_per_prompt"] = json!(4);
    }
    hyper.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    settings(hyper, method, 5)
}

/// The parts of a report that repeat.
fn fixed(reports: &[StepReport]) -> Vec<(u64, String, Vec<Sample>, Option<End>)> {
    let metrics = |report: &StepReport| serde_json::to_string(&report.metrics).unwrap();
    reports.iter().map(|it| (it.step, metrics(it), it.samples.clone(), it.end.clone())).collect()
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    for (method, extra) in plans() {
        let settings = planned(method, &extra);
        let toy = || Toy { mismatch: 0.05, ..Toy::random(6) };
        let mut whole = Run::new(settings.clone(), dataset(5), vec![0.0; 6]).unwrap();
        let reports = run_to_end(&mut whole, &mut toy(), begins_with_b().as_ref());
        assert!(norm(whole.numbers()) > 0.1, "{method:?} {extra} went nowhere");
        let again = run_to_end(
            &mut Run::new(settings.clone(), dataset(5), vec![0.0; 6]).unwrap(),
            &mut toy(),
            begins_with_b().as_ref(),
        );
        assert_eq!(fixed(&again), fixed(&reports), "{method:?}: a run repeats");

        for cut in 0..reports.len() {
            let mut first = Run::new(settings.clone(), dataset(5), vec![0.0; 6]).unwrap();
            for _ in 0..cut {
                first.step(&mut toy(), begins_with_b().as_ref(), &Stop::default()).unwrap();
            }
            let text = serde_json::to_string(&first.checkpoint()).unwrap();
            let checkpoint: Checkpoint = serde_json::from_str(&text).unwrap();
            assert_eq!(checkpoint, first.checkpoint());
            let mut second = Run::resume(checkpoint, &settings, dataset(5)).unwrap();
            let rest = run_to_end(&mut second, &mut toy(), begins_with_b().as_ref());
            assert_eq!(fixed(&rest), fixed(&reports[cut..]), "{method:?} {extra} cut at {cut}");
            let bits = |run: &Run| run.numbers().iter().map(|number| number.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&second), bits(&whole));
            assert_eq!(second.checkpoint(), whole.checkpoint());
        }
    }
}

#[test]
fn another_seed_is_another_run() {
    let settings = planned(Method::Grpo, &json!({}));
    let numbers = |settings: Settings| {
        let mut run = Run::new(settings, dataset(5), vec![0.0; 6]).unwrap();
        run_to_end(&mut run, &mut Toy::random(6), begins_with_b().as_ref());
        run.numbers().to_vec()
    };
    assert_ne!(numbers(settings.clone()), numbers(Settings { seed: 12, ..settings }));
}

#[test]
fn a_step_that_fails_or_is_stopped_changes_nothing() {
    for (method, extra) in plans() {
        let settings = planned(method, &extra);
        let mut whole = Run::new(settings.clone(), dataset(5), vec![0.0; 6]).unwrap();
        run_to_end(&mut whole, &mut Toy::random(6), begins_with_b().as_ref());
        let mut run = Run::new(settings, dataset(5), vec![0.0; 6]).unwrap();
        let mut call = 1;
        while run.end().is_none() {
            let before = run.checkpoint();
            let mut failing = Toy { fail_at: Some(call), ..Toy::random(6) };
            match run.step(&mut failing, begins_with_b().as_ref(), &Stop::default()) {
                Err(error) => {
                    assert_eq!(error, TrainError::Policy("out of memory".to_owned()));
                    assert_eq!(run.checkpoint(), before);
                    let stop = Stop::default();
                    let mut stopped = Toy { stop_at: Some((call, stop.clone())), ..Toy::random(6) };
                    assert_eq!(run.step(&mut stopped, begins_with_b().as_ref(), &stop), Err(TrainError::Stopped));
                    assert_eq!(run.checkpoint(), before);
                    call += 1;
                }
                Ok(_) => call = 1,
            }
        }
        assert_eq!(run.checkpoint(), whole.checkpoint(), "{method:?} {extra}");
    }
}

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

#[test]
fn every_prompt_is_drawn_once_an_epoch() {
    let mut order = Order::new(3, 7);
    let epoch = |order: &mut Order, epoch: u64| {
        (7 * epoch..7 * epoch + 7).map(|position| order.item(position)).collect::<Vec<_>>()
    };
    let (first, second) = (epoch(&mut order, 0), epoch(&mut order, 1));
    assert_ne!(first, second);
    for items in [first.clone(), second] {
        let mut sorted = items;
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
    }
    assert_eq!(epoch(&mut order, 0), first);
}

#[test]
fn what_does_not_fit_is_refused() {
    let settings = planned(Method::Grpo, &json!({}));
    let invalid = |numbers: Vec<f32>| Run::new(settings.clone(), dataset(5), numbers).unwrap_err().to_string();
    assert!(invalid(vec![]).contains("at least one") && invalid(vec![f32::NAN]).contains("finite"));
    let mut run = Run::new(settings.clone(), dataset(5), vec![0.0; 6]).unwrap();
    let error = run.step(&mut Toy::random(5), begins_with_b().as_ref(), &Stop::default()).unwrap_err();
    assert_eq!(error.to_string(), "the run has 6 numbers, the policy 5");
    let no_target = Dataset::new(vec![Example { target: vec![], ..dataset(1).examples[0].clone() }]).unwrap();
    let sft = Run::new(planned(Method::Sft, &json!({})), no_target, vec![0.0; 6]).unwrap_err();
    assert_eq!(sft.to_string(), "line 1 has no demonstration: sft needs one");

    let checkpoint = || run.checkpoint();
    let wrong =
        |checkpoint, settings: &Settings, data| Run::resume(checkpoint, settings, data).unwrap_err().to_string();
    assert!(wrong(checkpoint(), &Settings { seed: 1, ..settings.clone() }, dataset(5)).contains("other settings"));
    assert!(wrong(checkpoint(), &settings, dataset(4)).contains("other data"));
    let mut text = serde_json::to_value(checkpoint()).unwrap();
    text["version"] = json!(9);
    assert!(wrong(serde_json::from_value(text.clone()).unwrap(), &settings, dataset(5)).contains("version 9"));
    text["version"] = json!(1);
    text["state"]["adam"]["first"] = json!("00000000");
    assert!(wrong(serde_json::from_value(text).unwrap(), &settings, dataset(5)).contains("moments"));
}

#[test]
fn a_grader_that_fails_names_the_item_and_never_gives_zero() {
    let settings = planned(Method::Grpo, &json!({}));
    let mut run = Run::new(settings, dataset(5), vec![0.0; 6]).unwrap();
    let missing = grader(json!({"type": "number", "reference": "{{item.nothing}}"}));
    let error = run.step(&mut Toy::random(6), missing.as_ref(), &Stop::default()).unwrap_err();
    assert!(
        matches!(&error, TrainError::Grader { place: Place::Line(_), message } if message.contains("no `item.nothing`")),
        "{error}"
    );
    let error = run.step(&mut Toy::random(6), &NoGrader, &Stop::default()).unwrap_err();
    assert!(error.to_string().contains("this job has no grader"));
    let errors = crate::grader::check_dataset(missing.as_ref(), &dataset(2)).unwrap_err();
    assert_eq!(
        errors.0[1],
        DataError {
            place: Place::Line(2),
            field: None,
            message: "the grader cannot use it: the item has no `item.nothing`".to_owned()
        }
    );

    struct Infinite;
    impl Grader for Infinite {
        fn grade(&self, _: GradeCall<'_>) -> Result<Grade, GraderError> {
            Ok(Grade::of(f32::INFINITY))
        }
        fn check_item(&self, _: &Value) -> Result<(), String> {
            Ok(())
        }
    }
    let error = run.step(&mut Toy::random(6), &Infinite, &Stop::default()).unwrap_err();
    assert!(error.to_string().contains("the reward is inf"));
    assert_eq!(run.steps_done(), 0);
}

#[test]
fn a_gradient_that_is_not_finite_fails_the_step() {
    struct Broken(Toy);
    impl Policy for Broken {
        fn numbers(&self) -> usize {
            self.0.numbers()
        }
        fn rollout(
            &mut self,
            requests: &[RolloutRequest<'_>],
        ) -> Result<Vec<Vec<crate::policy::Rollout>>, crate::policy::PolicyError> {
            self.0.rollout(requests)
        }
        fn logprobs(
            &mut self,
            numbers: &[f32],
            sequences: &[Sequence<'_>],
            temperature: f32,
        ) -> Result<Vec<Vec<f32>>, crate::policy::PolicyError> {
            self.0.logprobs(numbers, sequences, temperature)
        }
        fn gradient(
            &mut self,
            numbers: &[f32],
            _: &[Sequence<'_>],
            _: &[Vec<f32>],
            _: f32,
        ) -> Result<Vec<f32>, crate::policy::PolicyError> {
            Ok(vec![f32::NAN; numbers.len()])
        }
    }
    let mut run = Run::new(planned(Method::Sft, &json!({})), dataset(5), vec![0.0; 6]).unwrap();
    let error = run.step(&mut Broken(Toy::random(6)), &NoGrader, &Stop::default()).unwrap_err();
    assert_eq!(error, TrainError::NotFinite { step: 1, what: "the gradient" });
}

/// A policy that fuses forward and backward pass calls the loss from wherever it likes.
#[test]
fn losses_can_be_asked_from_another_thread() {
    let loss: Arc<dyn TokenLoss> = Arc::new(crate::loss::CrossEntropy { tokens: 4 });
    let weights = std::thread::spawn(move || loss.weights(0, &[-1.0, -2.0])).join().unwrap();
    assert_eq!(weights, [-0.25, -0.25]);
}

#[test]
fn evaluation_reports_greedy_and_sampled_rewards() {
    let mut policy = Toy::bandit(4);
    let (data, judge) = (dataset(9), begins_with_b());
    let settings = EvalSettings { temperature: 1.0, samples: 4, max_tokens: 1, seed: 5, batch: 4 };
    let numbers = [0.0f32, 0.3, 0.1, 0.0];
    let mut heard = Vec::new();
    let mut with = |policy: &mut Toy, settings: &EvalSettings| {
        evaluate(policy, judge.as_ref(), &data, &numbers, settings, &Stop::default(), &mut |done| heard.push(done))
            .unwrap()
    };
    let it = with(&mut policy, &settings);
    assert_eq!((it.greedy.mean, it.greedy.n, it.completions.len()), (1.0, 9, 45));
    assert_eq!(it.greedy.interval.unwrap().kind, crate::stats::IntervalKind::Wilson);
    let sampled: Vec<f64> = it.completions.iter().filter(|c| c.sample.is_some()).map(|c| f64::from(c.reward)).collect();
    assert!((it.sampled.unwrap().mean - sampled.iter().sum::<f64>() / 36.0).abs() < 1e-9);
    assert_eq!(it.sampled.unwrap().interval.unwrap().kind, crate::stats::IntervalKind::Bootstrap);
    let greedy_only = with(&mut policy, &EvalSettings { samples: 0, batch: 100, ..settings.clone() });
    assert_eq!((greedy_only.greedy, greedy_only.sampled), (it.greedy, None));
    assert_eq!(with(&mut policy, &EvalSettings { batch: 1, ..settings.clone() }), it, "batches change nothing");
    assert_eq!(heard[..3], [4, 8, 9]);
    let stop = Stop::default();
    stop.stop();
    assert_eq!(
        evaluate(&mut policy, judge.as_ref(), &data, &numbers, &settings, &stop, &mut |_| ()),
        Err(TrainError::Stopped)
    );
}

#[test]
fn the_final_report_sets_the_rounded_adapter_against_the_base() {
    let settings = EvalSettings { temperature: 1.0, samples: 1, max_tokens: 1, seed: 5, batch: 4 };
    // The base's greedy arm is the last of equals, `d`; the adapter's is `b`.
    let numbers = [0.0f32, 0.3001, 0.0, 0.0];
    let mut policy = Toy::bandit(4);
    let mut heard = Vec::new();
    let judge = begins_with_b();
    let report = final_report(
        &mut policy,
        judge.as_ref(),
        &dataset(6),
        &numbers,
        true,
        &settings,
        &Stop::default(),
        &mut |done| heard.push(done),
    )
    .unwrap();
    assert_eq!((report.zero.greedy.mean, report.adapter.greedy.mean, report.gain.mean), (0.0, 1.0, 1.0));
    assert_eq!(report.full_precision.unwrap().greedy.mean, 1.0);
    assert_eq!(heard, [4, 6, 10, 12, 16, 18]);
}
