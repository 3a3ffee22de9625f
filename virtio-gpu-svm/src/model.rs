//! The root of `virtio-gpu-svm-model`: the library's own sources, with shuttle's primitives behind [`sync`] and
//! switches behind [`seeded`], so that `tests/model/` runs the same code under schedules of its choice.
//!
//! A crate of its own and not a feature: features are united over a workspace, and neither shuttle nor a switch may
//! ever be in the library that a daemon links. The root lies here because modules are looked for beside it.

pub mod addr;
pub mod address_space;
mod backlog;
pub mod busy_poll;
pub mod clock;
pub mod command;
pub mod context;
pub mod device;
pub mod event;
pub mod fault;
pub mod few;
pub mod gpu_vm;
pub mod guest;
pub mod host;
pub mod info;
pub mod invalidation;
pub mod memory;
mod numbered;
pub mod page_table;
pub mod population;
pub mod protocol;
pub mod quota;
#[cfg(test)]
mod random;
pub mod resource;
#[path = "../model/seeded.rs"]
pub mod seeded;
mod seldom;
mod sleepers;
#[path = "../model/sync.rs"]
mod sync;
pub mod timeline;
mod turns;

pub use shuttle;
