use super::*;

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
