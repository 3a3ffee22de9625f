//! `libgpusvm`: the client library ([`guest_agent::client`]) for C, and for whatever calls C.
//!
//! The contract is the header, `include/gpusvm.h`; its comments are not repeated here. This crate adds no behaviour of its
//! own: it checks arguments, turns errors into a negative errno and a text for the thread, and lets no panic cross.
//!
//! * `types`: structs that C programs see, as the header has them.
//! * `failure`: errors, errno, the text.
//! * `handle`: what handles point to.
//! * `connection`, `mirror`, `job`: the functions.

mod connection;
mod failure;
mod handle;
mod job;
mod mirror;
mod types;

pub use connection::{svm_close, svm_connect, svm_devices, svm_fd, svm_map, svm_open, svm_unmap};
pub use failure::{svm_error, svm_version};
pub use handle::{Job, Mirror, Svm};
pub use job::{svm_job_failure, svm_job_free, svm_job_poll, svm_job_wait, svm_run, svm_submit};
pub use mirror::{svm_device_address, svm_mirror, svm_mirror_all, svm_mirror_device, svm_unmirror};
pub use types::{Device, Failure, Packet};
