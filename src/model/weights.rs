//! The frozen weights of a model, as its files hold them.

use crate::kernel::Weight;

/// One transformer layer.
#[derive(Clone)]
pub struct LayerWeights {
    /// q, k, v, o, gate, up, down: `[out, in]`.
    pub sites: [Weight; 7],
    /// Bias of each, `[out]`.
    pub biases: [Option<Vec<f32>>; 7],
    /// RMSNorm before attention, `[hidden]`.
    pub input_norm: Vec<f32>,
    /// RMSNorm before the MLP, `[hidden]`.
    pub post_norm: Vec<f32>,
    /// RMSNorm of query heads (Qwen3), `[head_dim]`.
    pub q_norm: Option<Vec<f32>>,
    /// RMSNorm of key heads (Qwen3), `[head_dim]`.
    pub k_norm: Option<Vec<f32>>,
}

/// A whole model.
#[derive(Clone)]
pub struct ModelWeights {
    /// `[vocab, hidden]`.
    pub embedding: Weight,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// RMSNorm before the head, `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocab, hidden]`; None: tied to the embedding.
    pub head: Option<Weight>,
}

impl ModelWeights {
    /// The weight of a site (see [`crate::adapter::Sites`]).
    pub fn site(&self, site: usize) -> &Weight {
        &self.layers[site / 7].sites[site % 7]
    }
}
