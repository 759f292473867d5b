//! Group-relative advantages (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783).

use serde::{Deserialize, Serialize};

/// Added to the standard deviation, as the field does (TRL).
const STD_EPSILON: f32 = 1e-4;

/// What a group's centred rewards are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardScale {
    /// `(R - mean) / (std + 1e-4)`, std over the group with n - 1 in the denominator.
    Group,
    /// The same, but std over all rewards of the batch (arXiv 2508.08221).
    Batch,
    /// `R - mean` (Dr. GRPO: no bias towards groups of small spread).
    None,
}

/// Advantages of a batch of groups (a group is the completions of one prompt). A group whose rewards are all equal teaches nothing: exact zeros.
pub fn advantages(groups: &[Vec<f32>], scale: RewardScale) -> Vec<Vec<f32>> {
    let batch: Vec<f32> = if scale == RewardScale::Batch { groups.concat() } else { Vec::new() };
    groups
        .iter()
        .map(|rewards| {
            if is_flat(rewards) {
                return vec![0.0; rewards.len()];
            }
            let divisor = match scale {
                RewardScale::Group => standard_deviation(rewards) + STD_EPSILON,
                RewardScale::Batch => standard_deviation(&batch) + STD_EPSILON,
                RewardScale::None => 1.0,
            };
            let mean = rewards.iter().sum::<f32>() / rewards.len() as f32;
            rewards.iter().map(|reward| (reward - mean) / divisor).collect()
        })
        .collect()
}

/// Are all rewards of a group the same?
pub(crate) fn is_flat(rewards: &[f32]) -> bool {
    rewards.windows(2).all(|pair| pair[0] == pair[1])
}

/// With n - 1 in the denominator; 0 for fewer than two.
pub(crate) fn standard_deviation(values: &[f32]) -> f32 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    let squares: f32 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
    (squares / (values.len() - 1) as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [RewardScale; 3] = [RewardScale::Group, RewardScale::Batch, RewardScale::None];

    #[test]
    fn advantages_of_a_group_match_the_formula() {
        // mean 0.25; deviations .75, -.25, -.25, -.25; std (n - 1) = sqrt(0.75 / 3) = 0.5
        let rewards = vec![vec![1.0, 0.0, 0.0, 0.0]];
        assert_eq!(advantages(&rewards, RewardScale::None)[0], [0.75, -0.25, -0.25, -0.25]);
        for scale in [RewardScale::Group, RewardScale::Batch] {
            let normalised = &advantages(&rewards, scale)[0];
            for (got, want) in normalised.iter().zip([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]) {
                assert!((got - want).abs() < 1e-6, "{got} is not {want}");
            }
            assert!(normalised.iter().sum::<f32>().abs() < 1e-6);
        }
    }

    #[test]
    fn the_batch_scale_divides_all_groups_by_one_number() {
        // all rewards 1, 0, 4, 0: mean 1.25, squares .0625 + 1.5625 + 7.5625 + 1.5625 = 10.75, std = sqrt(10.75 / 3)
        let got = advantages(&[vec![1.0, 0.0], vec![4.0, 0.0]], RewardScale::Batch);
        let divisor = (10.75f32 / 3.0).sqrt() + 1e-4;
        assert!((got[0][0] - 0.5 / divisor).abs() < 1e-6 && (got[1][0] - 2.0 / divisor).abs() < 1e-6, "{got:?}");
    }

    #[test]
    fn groups_without_variance_teach_nothing() {
        for rewards in [vec![], vec![0.3], vec![0.3; 5]] {
            for scale in ALL {
                let got = advantages(&[rewards.clone(), vec![0.0, 1.0]], scale);
                assert_eq!(got[0], vec![0.0; rewards.len()]);
                assert!(got[1][1] > 0.0);
            }
        }
    }

    #[test]
    fn advantages_do_not_depend_on_an_offset_of_the_rewards() {
        for scale in ALL {
            let low = advantages(&[vec![0.0, 1.0, 3.0]], scale);
            let high = advantages(&[vec![8.0, 9.0, 11.0]], scale);
            for (a, b) in low[0].iter().zip(&high[0]) {
                assert!((a - b).abs() < 1e-5);
            }
        }
    }
}
