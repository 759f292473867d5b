use super::*;

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
