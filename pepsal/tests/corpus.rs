//! What the fuzzer has found to be worth trying, tried again without it (`cargo xtask fuzz`).

use std::{fs, path::Path};

#[path = "../../fuzz/src/lib.rs"]
mod exercises;

use exercises::{configuration, packet, relay, request};

/// Runs an exercise on everything below `fuzz/corpus`.
fn replay(name: &str, exercise: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let mut tried = 0;
    for entry in fs::read_dir(folder).expect("the corpus is part of the repository") {
        let path = entry.expect("a readable folder").path();
        // Where it stops is where it failed.
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
