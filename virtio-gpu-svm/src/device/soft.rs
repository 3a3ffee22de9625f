//! The embedded software GPU.
