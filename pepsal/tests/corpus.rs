//! Replays the corpus of the fuzzer without it (`cargo xtask fuzz`).

use std::{fs, path::Path};

#[path = "../../fuzz/src/lib.rs"]
mod exercises;

use exercises::{configuration, packet, relay, request};

/// Runs a fuzz target on every file below `fuzz/corpus`.
fn replay(name: &str, exercise: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let mut tried = 0;
    for entry in fs::read_dir(folder).expect("the corpus is part of the repository") {
        let path = entry.expect("a readable folder").path();
        // The last printed file is the failing one.
        println!("{}", path.display());
        exercise(&fs::read(path).expect("a readable file"));
        tried += 1;
    }
    assert!(tried > 0, "an empty corpus");
}

#[test]
fn packets() {
    replay("packet", packet::exercise);
}

#[test]
fn scripts_for_the_relay() {
    replay("relay", relay::exercise);
}

#[test]
fn configurations() {
    replay("configuration", configuration::exercise);
}

#[test]
fn requests() {
    replay("request", request::exercise);
}
