//! Training for adapters of a few numbers, without tensors and without HTTP.
mod advantage;
mod bits;
/// Data.
pub mod data;
mod es;
mod hyper;
mod loss;
mod optimizer;
mod policy;
mod rng;
mod settings;
/// Templates.
pub mod template;
pub use advantage::*;
pub use es::*;
pub use hyper::*;
pub use loss::*;
pub use optimizer::*;
pub use policy::*;
pub use settings::*;
/// Graders.
pub mod grader;
