//! What coverage-guided fuzzing exercises: each module has one function that takes any bytes and panics when something
//! does not hold. `pepsal/tests/corpus.rs` runs them on the corpus, without a fuzzer.

pub mod configuration;
pub mod packet;
pub mod relay;
pub mod request;
