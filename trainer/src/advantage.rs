//! Group-relative advantages (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783).

/// Added to the standard deviation, as the field does (TRL).
const STD_EPSILON: f32 = 1e-4;

/// How a group's rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdvantageKind {
    /// `(R - mean) / (std + 1e-4)`, std over the group with n - 1 in the denominator.
    Normalised,
    /// `R - mean` (Dr. GRPO: no bias towards groups of small spread).
    Centred,
}

/// Advantages of one group (the completions of one prompt). A group whose rewards are all equal teaches nothing: exact zeros.
pub fn group_advantages(rewards: &[f32], kind: AdvantageKind) -> Vec<f32> {
    if rewards.windows(2).all(|pair| pair[0] == pair[1]) {
        return vec![0.0; rewards.len()];
    }
    let n = rewards.len() as f32;
    let mean = rewards.iter().sum::<f32>() / n;
    let centred = rewards.iter().map(|reward| reward - mean);
    match kind {
        AdvantageKind::Centred => centred.collect(),
        AdvantageKind::Normalised => {
            let variance = centred.clone().map(|x| x * x).sum::<f32>() / (n - 1.0);
            centred.map(|x| x / (variance.sqrt() + STD_EPSILON)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advantages_of_a_group_match_the_formula() {
        // mean 0.25; deviations .75, -.25, -.25, -.25; std (n - 1) = sqrt(0.75 / 3) = 0.5
        let rewards = [1.0, 0.0, 0.0, 0.0];
        assert_eq!(group_advantages(&rewards, AdvantageKind::Centred), [0.75, -0.25, -0.25, -0.25]);
        let normalised = group_advantages(&rewards, AdvantageKind::Normalised);
        for (got, want) in normalised.iter().zip([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]) {
            assert!((got - want).abs() < 1e-6, "{got} is not {want}");
        }
        assert!(normalised.iter().sum::<f32>().abs() < 1e-6);
    }

    #[test]
    fn groups_without_variance_teach_nothing() {
        for rewards in [vec![], vec![0.3], vec![0.3; 5]] {
            for kind in [AdvantageKind::Centred, AdvantageKind::Normalised] {
                assert_eq!(group_advantages(&rewards, kind), vec![0.0; rewards.len()]);
            }
        }
    }

    #[test]
    fn advantages_do_not_depend_on_an_offset_of_the_rewards() {
        let low = group_advantages(&[0.0, 1.0, 3.0], AdvantageKind::Normalised);
        let high = group_advantages(&[8.0, 9.0, 11.0], AdvantageKind::Normalised);
        for (a, b) in low.iter().zip(&high) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
