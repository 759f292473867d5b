use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::adapter::fixtures::uniform_sites;

fn read(value: Value) -> Result<Scheme, SchemeError> {
    Scheme::from_json(&value)
}

fn groups_of(scheme: &Scheme, sites: &Sites) -> Vec<usize> {
    scheme.assignments(sites).into_iter().map(|a| a.group).collect()
}

#[test]
fn thirteen_numbers_on_every_model_and_in_the_paper() {
    for layers in [1, 2, 3, 24, 28, 30, 126] {
        let sites = uniform_sites(layers, 8, 8);
        for name in ["tiny13", "u13-tied"] {
            let scheme = Scheme::preset(name).unwrap();
            scheme.validate(&sites, 2).unwrap();
            assert_eq!(scheme.numbers(&sites), 13, "{name} on {layers} layers");
            assert!(scheme.assignments(&sites).iter().all(|a| a.group < scheme.groups(&sites)));
        }
    }
    assert_eq!(Scheme::paper16().numbers(&uniform_sites(28, 8, 8)), 13, "ceil(196 / 16)");
}

#[test]
fn peft_rounds_half_to_even_in_f64() {
    assert_eq!(peft_groups(35, 0.9), 3, "3.4999999999999991 in f64, 3.5 in f32");
    assert_eq!(peft_groups(5, 0.5), 2);
    assert_eq!(peft_groups(7, 0.5), 4);
    assert_eq!(peft_groups(21, 1.0), 1);
    assert_eq!(peft_groups(21, 0.0), 21);
    assert_eq!(peft_groups(21, 1.0 - 13.0 / 21.0), 13);
}

#[test]
fn ties_group_as_their_rules_say() {
    let sites = uniform_sites(2, 8, 8);
    let with = |ties| Scheme { ties, ..Scheme::tiny13() };
    // 14 sites in 4 groups: tiles of 3, the last takes the rest.
    let tiled = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3];
    assert_eq!(groups_of(&with(Ties::Groups { count: 4 }), &sites), tiled);
    assert_eq!(groups_of(&with(Ties::Peft { weight_tying: 1.0 - 4.0 / 14.0 }), &sites), tiled);
    let fours = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3];
    assert_eq!(groups_of(&with(Ties::Tiled { n_tie: 4 }), &sites), fours);
    let sites = uniform_sites(3, 8, 8);
    let targets = Targets::NONE.with(SiteKind::Up).with(SiteKind::Q);
    let structured = Scheme { targets, ..with(Ties::Structured { n_tie: 2 }) };
    // q, up of each layer; q has groups 0 and 1, up 2 and 3.
    assert_eq!(groups_of(&structured, &sites), [0, 2, 0, 2, 1, 3]);
    assert_eq!(structured.groups(&sites), 4);
    let indices: Vec<_> = structured.assignments(&sites).iter().map(|a| (a.site, a.layer_idx)).collect();
    assert_eq!(indices, [(0, 0), (5, 1), (7, 2), (12, 3), (14, 4), (19, 5)], "only targeted modules are counted");
}

#[test]
fn names_and_objects_read_back_as_themselves() {
    for name in Scheme::PRESETS {
        let scheme = read(json!(name)).unwrap();
        assert_eq!(scheme.to_json(), json!(name));
        assert_eq!(read(scheme.to_full_json()).unwrap(), scheme);
    }
    assert_eq!(read(json!({})).unwrap(), Scheme::tiny13());
    let full = json!({"convention": "paper", "rank": 3, "u": 5, "ties": {"kind": "peft", "weight_tying": 0.9},
        "seed": 7, "targets": ["v", "q"], "projection": "bf16"});
    let scheme = read(full).unwrap();
    assert_eq!(scheme.targets.iter().collect::<Vec<_>>(), [SiteKind::Q, SiteKind::V]);
    assert_eq!(read(scheme.to_json()).unwrap(), scheme);
    let text = serde_json::to_string(&scheme).unwrap();
    assert_eq!(serde_json::from_str::<Scheme>(&text).unwrap(), scheme);
}

#[test]
fn lora_xs_has_all_of_r_and_nothing_else() {
    let sites = uniform_sites(2, 8, 8);
    let scheme =
        read(json!({"convention": "lora-xs", "rank": 3, "u": 9, "ties": {"kind": "tiled", "n_tie": 1}})).unwrap();
    assert_eq!(scheme, Scheme::lora_xs(3, Targets::ALL));
    assert_eq!(scheme.numbers(&sites), 14 * 9);
    assert_eq!(
        scheme.to_json(),
        json!({"convention": "lora-xs", "rank": 3, "targets": ["q", "k", "v", "o", "gate", "up", "down"]})
    );
    let path = |value: Value| read(value).unwrap_err().path().to_owned();
    assert_eq!(path(json!({"convention": "lora-xs", "u": 13})), "scheme.u");
    assert_eq!(path(json!({"convention": "lora-xs", "ties": {"kind": "groups", "count": 1}})), "scheme.ties");
}

#[test]
fn errors_name_the_field() {
    for (value, path) in [
        (json!("tiny14"), "scheme"),
        (json!(13), "scheme"),
        (json!({"rnk": 2}), "scheme.rnk"),
        (json!({"convention": "lora"}), "scheme.convention"),
        (json!({"rank": "2"}), "scheme.rank"),
        (json!({"rank": 0}), "scheme.rank"),
        (json!({"rank": null}), "scheme.rank"),
        (json!({"rank": 1u64 << 40}), "scheme.rank"),
        (json!({"u": 0}), "scheme.u"),
        (json!({"u": u64::MAX}), "scheme.u"),
        (json!({"u": 1.5}), "scheme.u"),
        (json!({"seed": -1}), "scheme.seed"),
        (json!({"seed": u64::MAX}), "scheme.seed"),
        (json!({"ties": "tiled"}), "scheme.ties"),
        (json!({"ties": {}}), "scheme.ties.kind"),
        (json!({"ties": {"kind": "tiled"}}), "scheme.ties.n_tie"),
        (json!({"ties": {"kind": "tiled", "n_tie": 0}}), "scheme.ties.n_tie"),
        (json!({"ties": {"kind": "tiled", "n_tie": 4, "count": 1}}), "scheme.ties.count"),
        (json!({"ties": {"kind": "groups", "count": u64::MAX}}), "scheme.ties.count"),
        (json!({"ties": {"kind": "peft", "weight_tying": 1.1}}), "scheme.ties.weight_tying"),
        (json!({"ties": {"kind": "peft"}}), "scheme.ties.weight_tying"),
        (json!({"targets": []}), "scheme.targets"),
        (json!({"targets": "q"}), "scheme.targets"),
        (json!({"targets": ["q", "x"]}), "scheme.targets[1]"),
        (json!({"targets": ["q", "q"]}), "scheme.targets[1]"),
        (json!({"projection": "f16"}), "scheme.projection"),
    ] {
        let error = read(value.clone()).unwrap_err();
        assert_eq!(error.path(), path, "{value}");
        assert!(error.to_string().starts_with(&format!("{path}: ")), "{error}");
    }
}

#[test]
fn a_scheme_must_fit_the_model_and_the_server() {
    let sites = uniform_sites(3, 8, 5);
    let refused = |scheme: Scheme, rank: usize| scheme.validate(&sites, rank).unwrap_err().to_string();
    assert_eq!(
        refused(Scheme { rank: 4, ..Scheme::tiny13() }, 2),
        "scheme.rank: 4 is above the largest rank served, 2"
    );
    assert!(refused(Scheme { rank: 6, ..Scheme::tiny13() }, 8).contains("what site 'q' [8, 5] has"));
    let many = Scheme { u: MAX_U, ties: Ties::Groups { count: MAX_NUMBERS }, ..Scheme::tiny13() };
    assert!(refused(many, 2).contains("at most 262144"));
    let sites = uniform_sites(100, 64, 64);
    let wide = Scheme { rank: 16, u: 1000, ..Scheme::u13_tied() };
    assert!(wide.validate(&sites, 16).unwrap_err().to_string().contains("projection values"));
    assert!(Scheme::tiny13().validate(&uniform_sites(0, 8, 8), 2).is_err());
}

proptest! {
    /// Whatever is in range lands in a group that exists, and no sum overflows.
    #[test]
    fn assignments_are_in_range(
        layers in 0usize..40, kind in 0u8..4, amount in 1usize..MAX_NUMBERS, tying in 0.0f64..=1.0, bits in 1u8..128, u in 1usize..5000
    ) {
        let sites = uniform_sites(layers, 8, 8);
        let ties = match kind {
            0 => Ties::Groups { count: amount },
            1 => Ties::Peft { weight_tying: tying },
            2 => Ties::Tiled { n_tie: amount % 64 + 1 },
            _ => Ties::Structured { n_tie: amount % 64 + 1 },
        };
        let scheme = Scheme { ties, u, targets: Targets(bits), ..Scheme::tiny13() };
        let assignments = scheme.assignments(&sites);
        prop_assert_eq!(assignments.len(), scheme.targeted(&sites));
        prop_assert!(assignments.iter().all(|a| a.group < scheme.groups(&sites)));
        prop_assert!(assignments.iter().enumerate().all(|(i, a)| a.layer_idx == i && a.site < sites.len()));
        if scheme.validate(&sites, 2).is_ok() {
            prop_assert!(scheme.numbers(&sites) <= MAX_NUMBERS);
        }
        if scheme.check_ranges().is_ok() {
            prop_assert_eq!(&read(scheme.to_full_json()).unwrap(), &scheme);
        }
    }

    #[test]
    fn canonical_bytes_are_equal_only_for_equal_schemes(a in 0usize..4, b in 0usize..4, x in 1usize..3, y in 1usize..3) {
        let scheme = |kind, n_tie| {
            let ties = [Ties::Groups { count: n_tie }, Ties::Tiled { n_tie }, Ties::Structured { n_tie }, Ties::Peft { weight_tying: 0.0 }];
            Scheme { ties: ties[kind], ..Scheme::tiny13() }
        };
        let (a, b) = (scheme(a, x), scheme(b, y));
        prop_assert_eq!(a.canonical_bytes() == b.canonical_bytes(), a == b);
    }
}
