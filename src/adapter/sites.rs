//! The adapted linears of a model, in the one order that everything else relies on.

/// The seven adapted linears of a layer, in PEFT's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SiteKind {
    /// self_attn.q_proj
    Q,
    /// self_attn.k_proj
    K,
    /// self_attn.v_proj
    V,
    /// self_attn.o_proj
    O,
    /// mlp.gate_proj
    Gate,
    /// mlp.up_proj
    Up,
    /// mlp.down_proj
    Down,
}

impl SiteKind {
    /// All kinds in the order of a layer.
    pub const ALL: [SiteKind; 7] =
        [SiteKind::Q, SiteKind::K, SiteKind::V, SiteKind::O, SiteKind::Gate, SiteKind::Up, SiteKind::Down];

    /// The short name that schemes use: q, k, v, o, gate, up, down.
    pub fn name(self) -> &'static str {
        match self {
            SiteKind::Q => "q",
            SiteKind::K => "k",
            SiteKind::V => "v",
            SiteKind::O => "o",
            SiteKind::Gate => "gate",
            SiteKind::Up => "up",
            SiteKind::Down => "down",
        }
    }

    /// The module path below a layer in Hugging Face models, e.g. `self_attn.q_proj`.
    pub fn module(self) -> &'static str {
        match self {
            SiteKind::Q => "self_attn.q_proj",
            SiteKind::K => "self_attn.k_proj",
            SiteKind::V => "self_attn.v_proj",
            SiteKind::O => "self_attn.o_proj",
            SiteKind::Gate => "mlp.gate_proj",
            SiteKind::Up => "mlp.up_proj",
            SiteKind::Down => "mlp.down_proj",
        }
    }

    /// The kind of a short name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// How many layers, and the shape of each kind of site. Site s is kind s % 7 of layer s / 7.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sites {
    /// Layers of the model.
    pub layers: usize,
    /// (outputs, inputs) of q, k, v, o, gate, up, down.
    pub shapes: [(usize, usize); 7],
}

impl Sites {
    /// Number of sites: 7 a layer.
    pub fn len(&self) -> usize {
        7 * self.layers
    }

    /// True for a model without layers.
    pub fn is_empty(&self) -> bool {
        self.layers == 0
    }

    /// Layer and kind of a site.
    pub fn at(&self, site: usize) -> (usize, SiteKind) {
        (site / 7, SiteKind::ALL[site % 7])
    }

    /// (outputs, inputs) of a site.
    pub fn shape(&self, site: usize) -> (usize, usize) {
        self.shapes[site % 7]
    }

    /// Hugging Face module path, e.g. `model.layers.3.mlp.up_proj`.
    pub fn module(&self, site: usize) -> String {
        let (layer, kind) = self.at(site);
        format!("model.layers.{layer}.{}", kind.module())
    }
}
