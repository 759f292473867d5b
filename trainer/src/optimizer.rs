//! Adam and AdamW on the f32 master vector, the learning rate's schedule, and clipping of the gradient.

use serde::{Deserialize, Serialize};

use crate::bits;

/// Adam's constants (Kingma & Ba, arXiv 1412.6980). With `weight_decay` above zero it is AdamW: the decay is decoupled from the moments (Loshchilov & Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of each number lost in a step, times the learning rate; 0 is Adam.
    pub weight_decay: f64,
}

impl Default for AdamSettings {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimiser's state; serialised by bits, so that nothing is lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adam {
    /// Updates made.
    pub updates: u64,
    /// First moment, `[numbers]`.
    #[serde(with = "bits")]
    pub first: Vec<f32>,
    /// Second moment, `[numbers]`.
    #[serde(with = "bits")]
    pub second: Vec<f32>,
}

impl Adam {
    /// A state without history.
    pub fn new(numbers: usize) -> Self {
        Self { updates: 0, first: vec![0.0; numbers], second: vec![0.0; numbers] }
    }

    /// Moves the numbers against the gradient: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, x -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), after x *= 1 - lr * decay.
    /// Each number is computed in f64 and rounded once to the f32 that is stored. All three slices have one length.
    pub fn update(&mut self, numbers: &mut [f32], gradient: &[f32], learning_rate: f64, settings: &AdamSettings) {
        self.updates += 1;
        let t = self.updates as f64;
        let correction1 = 1.0 - settings.beta1.powf(t);
        let correction2 = 1.0 - settings.beta2.powf(t);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((number, &gradient), (first, second)) in numbers.iter_mut().zip(gradient).zip(moments) {
            let gradient = f64::from(gradient);
            *first = (settings.beta1 * f64::from(*first) + (1.0 - settings.beta1) * gradient) as f32;
            *second = (settings.beta2 * f64::from(*second) + (1.0 - settings.beta2) * gradient * gradient) as f32;
            let step =
                (f64::from(*first) / correction1) / ((f64::from(*second) / correction2).sqrt() + settings.epsilon);
            let decayed = f64::from(*number) * (1.0 - learning_rate * settings.weight_decay);
            *number = (decayed - learning_rate * step) as f32;
        }
    }
}

/// How the learning rate moves over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The same at every step.
    Constant,
    /// Straight down to zero, which the step after the last would have.
    Linear,
    /// Half a cosine down to zero (Loshchilov & Hutter, arXiv 1608.03983, without restarts).
    Cosine,
}

/// The learning rate's plan.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// The rate after warm-up.
    pub peak: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Steps of linear rise; the first step has `peak / (warmup + 1)`, so none is wasted on a rate of zero.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub steps: u64,
}

impl LearningRate {
    /// The rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let left = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / left as f64).min(1.0);
        self.peak
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - progress,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }
}

/// The Euclidean norm.
pub fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// Scales the gradient down to `max_norm` if it is longer; 0 leaves it alone. Gives the norm before.
pub fn clip_norm(gradient: &mut [f32], max_norm: f64) -> f64 {
    let before = norm(gradient);
    if max_norm > 0.0 && before > max_norm {
        let scale = max_norm / before;
        for value in gradient {
            *value = (f64::from(*value) * scale) as f32;
        }
    }
    before
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What torch.optim.Adam and AdamW give for x = [1, -2], gradients [0.1, -0.2], [0.3, 0.0], [-0.1, 0.5] and lr 0.1, worked out by hand in f64 from the papers' formulas.
    #[test]
    fn adam_follows_the_papers_formulas() {
        for weight_decay in [0.0, 0.1] {
            let settings = AdamSettings { weight_decay, ..AdamSettings::default() };
            let (mut x, mut m, mut v) = ([1.0f64, -2.0], [0.0f64; 2], [0.0f64; 2]);
            let mut numbers = [1.0f32, -2.0];
            let mut adam = Adam::new(2);
            for (t, gradient) in [[0.1f32, -0.2], [0.3, 0.0], [-0.1, 0.5]].iter().enumerate() {
                adam.update(&mut numbers, gradient, 0.1, &settings);
                for i in 0..2 {
                    let g = f64::from(gradient[i]);
                    m[i] = 0.9 * m[i] + 0.1 * g;
                    v[i] = 0.999 * v[i] + 0.001 * g * g;
                    let t = t as i32 + 1;
                    let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
                    x[i] = x[i] * (1.0 - 0.1 * weight_decay) - 0.1 * mh / (vh.sqrt() + 1e-8);
                    assert!((f64::from(numbers[i]) - x[i]).abs() < 1e-6, "{} is not {}", numbers[i], x[i]);
                }
            }
            assert_eq!(adam.updates, 3);
        }
        // The first step has the length of the learning rate, whatever the gradient's: m / sqrt(v) = sign(g).
        let mut numbers = [0.0f32];
        Adam::new(1).update(&mut numbers, &[-1e-3], 0.03, &AdamSettings::default());
        assert!((numbers[0] - 0.03).abs() < 1e-6);
    }

    #[test]
    fn adam_finds_the_bottom_of_a_bowl() {
        let mut numbers = [3.0f32, -4.0];
        let mut adam = Adam::new(2);
        let rate = LearningRate { peak: 0.2, schedule: Schedule::Cosine, warmup_steps: 5, steps: 300 };
        for step in 0..300 {
            let gradient = [2.0 * (numbers[0] - 1.0), 20.0 * (numbers[1] - 2.0)];
            adam.update(&mut numbers, &gradient, rate.at(step), &AdamSettings::default());
        }
        assert!((numbers[0] - 1.0).abs() < 1e-3 && (numbers[1] - 2.0).abs() < 1e-3, "{numbers:?}");
    }

    #[test]
    fn schedules_rise_and_fall_as_they_say() {
        let rate = |schedule| LearningRate { peak: 1.0, schedule, warmup_steps: 3, steps: 13 };
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let rate = rate(schedule);
            assert_eq!([rate.at(0), rate.at(1), rate.at(2), rate.at(3)], [0.25, 0.5, 0.75, 1.0]);
        }
        assert_eq!(rate(Schedule::Constant).at(12), 1.0);
        assert!((rate(Schedule::Linear).at(8) - 0.5).abs() < 1e-12);
        assert!((rate(Schedule::Linear).at(12) - 0.1).abs() < 1e-12);
        assert!((rate(Schedule::Cosine).at(8) - 0.5).abs() < 1e-12);
        assert!(rate(Schedule::Cosine).at(12) > 0.0);
        assert!(rate(Schedule::Linear).at(1000) == 0.0);
        let short = LearningRate { peak: 1.0, schedule: Schedule::Linear, warmup_steps: 5, steps: 5 };
        assert!(short.at(4) < 1.0 && short.at(5) == 1.0);
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let mut gradient = [3.0f32, 4.0];
        assert_eq!(clip_norm(&mut gradient, 1.0), 5.0);
        assert!((gradient[0] - 0.6).abs() < 1e-7 && (gradient[1] - 0.8).abs() < 1e-7);
        assert_eq!(clip_norm(&mut gradient, 0.0), norm(&gradient));
        let before = gradient;
        clip_norm(&mut gradient, 2.0);
        assert_eq!(gradient, before);
        let mut zero = [0.0f32; 3];
        assert_eq!(clip_norm(&mut zero, 1.0), 0.0);
    }
}
