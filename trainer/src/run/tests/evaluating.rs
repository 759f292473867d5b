use super::*;

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
