//! svmd
fn main() {}
