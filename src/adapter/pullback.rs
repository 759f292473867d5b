//! From derivatives by cores to derivatives by numbers: the transpose of the expansion.

use super::{ExpandError, Expander, Facts, frame::Side};

impl Expander {
    /// The derivative by an adapter's numbers, group-major, from the one by the cores that [`Expander::expand`] made of them with weight `scale`: `cores` is `[sites, R, R]`
    /// where R is the basis' rank. Expansion is linear, so this is its transpose wherever it is taken: `<expand(v), D> = <v, pullback(D)>`. Sites that share a
    /// number add up. In f64, in a fixed order: equal arguments, equal bits.
    ///
    /// # Errors
    /// Facts that [`Expander::expand`] refuses, or another count of entries than the cores have.
    pub fn pullback(&self, facts: &Facts, scale: f32, cores: &[f64]) -> Result<Vec<f64>, ExpandError> {
        let Facts { scheme, frame, .. } = facts;
        scheme.validate(&self.sites, self.served)?;
        if frame.as_ref().is_some_and(|frame| !frame.fits(scheme, &self.sites)) {
            return Err(ExpandError::Frame);
        }
        let (r, rank) = (scheme.rank, self.basis.rank);
        let expected = self.sites.len() * rank * rank;
        if cores.len() != expected {
            return Err(ExpandError::Cores { expected, actual: cores.len() });
        }
        let size = scheme.group_size();
        let projections = self.projections(scheme);
        let mut numbers = vec![0f64; scheme.numbers(&self.sites)];
        let (mut u, mut v) = (vec![0f64; rank * r], vec![0f64; rank * r]);
        for at in scheme.assignments(&self.sites) {
            let d = &cores[at.site * rank * rank..(at.site + 1) * rank * rank];
            let mut core: Vec<f64> = match frame {
                None => (0..r * r).map(|entry| d[entry / r * rank + entry % r]).collect(),
                Some(frame) => {
                    frame.matrix(&at, Side::U, &mut u);
                    frame.matrix(&at, Side::V, &mut v);
                    turn_back(&u, d, &v, r)
                }
            };
            core.iter_mut().enumerate().for_each(|(entry, value)| *value *= self.stretch(scheme, at.site, entry));
            let of_group = &mut numbers[at.group * size..(at.group + 1) * size];
            match &projections {
                None => of_group.iter_mut().zip(&core).for_each(|(number, value)| *number += value),
                Some(p) => {
                    let p = &p[at.layer_idx * size * r * r..(at.layer_idx + 1) * size * r * r];
                    for (number, p) in of_group.iter_mut().zip(p.chunks_exact(r * r)) {
                        *number += core.iter().zip(p).map(|(value, p)| value * f64::from(*p)).sum::<f64>();
                    }
                }
            }
        }
        numbers.iter_mut().for_each(|number| *number *= f64::from(scale));
        Ok(numbers)
    }
}

/// `Q_u^T D Q_v`: `d` is `[R, R]`, `u` and `v` are `[R, r]`, the result is `[r, r]`.
fn turn_back(u: &[f64], d: &[f64], v: &[f64], r: usize) -> Vec<f64> {
    let rank = u.len() / r;
    let entry = |i: usize, j: usize| -> f64 {
        let row = |a: usize| (0..rank).map(|b| d[a * rank + b] * v[b * r + j]).sum::<f64>();
        (0..rank).map(|a| u[a * r + i] * row(a)).sum()
    };
    (0..r * r).map(|at| entry(at / r, at % r)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::adapter::{
        Basis, Convention, Frame, Interner, NumberType, Scheme, SignMask, SiteKind, Targets, Ties, codec,
        fixtures::{noise, turned, uniform_sites},
    };

    fn expander(rank: usize, served: usize) -> Expander {
        let sites = uniform_sites(3, 10, 8);
        let basis = Basis::compute(&sites, rank, |site| Ok::<_, String>(noise(site as u64, 80))).unwrap();
        Expander::new(sites, Arc::new(basis), served)
    }

    fn facts(expander: &Expander, scheme: Scheme, frame: Option<Frame>) -> Facts {
        Facts { scheme, frame, fingerprint: expander.basis.fingerprint, dtype: NumberType::F32, approximate: false }
    }

    /// Every kind of scheme, each without a frame, with signs and with turned vectors.
    fn cases(expander: &Expander) -> Vec<Facts> {
        let some = Targets::NONE.with(SiteKind::V).with(SiteKind::Down);
        let schemes = [
            Scheme::tiny13(),
            Scheme::u13_tied(),
            Scheme::lora_xs(2, Targets::ALL),
            Scheme::lora_xs(1, some),
            Scheme { targets: some, u: 5, ties: Ties::Peft { weight_tying: 0.4 }, ..Scheme::tiny13() },
            Scheme { convention: Convention::Paper, u: 3, ties: Ties::Structured { n_tie: 2 }, ..Scheme::tiny13() },
            Scheme { ties: Ties::Groups { count: 30 }, ..Scheme::tiny13() }, // more groups than sites
        ];
        let frames = |scheme: &Scheme| {
            let signs = SignMask::new(21, scheme.rank, |site, k| (site + k) % 3 == 1).map(Frame::Signs);
            [None, signs, turned(scheme, &expander.sites, scheme.rank + 2, 0.05)]
        };
        let with_frames = |scheme: Scheme| frames(&scheme).map(|frame| facts(expander, scheme.clone(), frame));
        schemes.into_iter().flat_map(with_frames).collect()
    }

    fn expand(expander: &Expander, facts: &Facts, numbers: &[f32], scale: f32) -> Vec<f64> {
        let bytes = codec::encode(numbers, NumberType::F32).unwrap();
        let adapter = Interner::new().adapter(facts.clone(), &bytes, numbers.len()).unwrap();
        expander.expand(&[(&adapter, scale)]).unwrap().data.iter().map(|value| f64::from(*value)).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn it_is_the_transpose_of_the_expansion() {
        let expander = expander(4, 2);
        for (seed, facts) in cases(&expander).into_iter().enumerate() {
            let numbers = noise(seed as u64, facts.scheme.numbers(&expander.sites));
            let d: Vec<f64> = noise(seed as u64 + 100, 21 * 16).into_iter().map(f64::from).collect();
            let left = dot(&expand(&expander, &facts, &numbers, 0.7), &d);
            let pulled = expander.pullback(&facts, 0.7, &d).unwrap();
            let right = dot(&numbers.iter().map(|number| f64::from(*number)).collect::<Vec<_>>(), &pulled);
            assert!((left - right).abs() <= 1e-5 * left.abs().max(1.0), "{facts:?}: {left} and {right}");
        }
    }

    /// A function of the cores that is not linear, differentiated by each number.
    #[test]
    fn it_is_the_chain_rule() {
        let expander = expander(4, 2);
        for (seed, facts) in cases(&expander).into_iter().enumerate() {
            let numbers = noise(seed as u64, facts.scheme.numbers(&expander.sites));
            let value = |numbers: &[f32]| -> f64 {
                let cores = expand(&expander, &facts, numbers, 1.3);
                cores.iter().enumerate().map(|(i, c)| (0.1 * i as f64 + c).sin() + c * c).sum()
            };
            let cores = expand(&expander, &facts, &numbers, 1.3);
            let d: Vec<f64> = cores.iter().enumerate().map(|(i, c)| (0.1 * i as f64 + c).cos() + 2.0 * c).collect();
            let pulled = expander.pullback(&facts, 1.3, &d).unwrap();
            let scale = pulled.iter().fold(1.0, |most: f64, value| most.max(value.abs()));
            for k in 0..numbers.len() {
                let at = |step: f32| {
                    let mut moved = numbers.clone();
                    moved[k] += step;
                    (value(&moved), f64::from(moved[k]))
                };
                let ((above, x), (below, y)) = (at(2e-3), at(-2e-3));
                let expected = (above - below) / (x - y);
                assert!((pulled[k] - expected).abs() <= 3e-4 * scale, "{facts:?} {k}: {} {expected}", pulled[k]);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let expander = expander(4, 2);
        let tiny = facts(&expander, Scheme::tiny13(), None);
        let error = expander.pullback(&tiny, 1.0, &[0.0; 21 * 4]).unwrap_err();
        assert_eq!(error, ExpandError::Cores { expected: 336, actual: 84 });
        let wide = facts(&expander, Scheme { rank: 3, ..Scheme::tiny13() }, None);
        assert!(expander.pullback(&wide, 1.0, &[0.0; 336]).unwrap_err().to_string().starts_with("scheme.rank"));
        let frame = turned(&Scheme::u13_tied(), &expander.sites, 4, 0.05);
        let elsewhere = facts(&expander, Scheme { rank: 1, ..Scheme::u13_tied() }, frame);
        assert_eq!(expander.pullback(&elsewhere, 1.0, &[0.0; 336]), Err(ExpandError::Frame));
    }
}
