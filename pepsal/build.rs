//! Embeds the eBPF object that `cargo xtask build` made, named by `PEPSAL_EBPF_OBJECT`.
//!
//! Without it the crate still builds, for `cargo check`, clippy and unit tests on machines without the eBPF
//! toolchain; the daemon then fails at the start with a message.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=PEPSAL_EBPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("pepsal.bpf.o");
    match env::var_os("PEPSAL_EBPF_OBJECT") {
        Some(object) => {
            println!("cargo::rerun-if-changed={}", object.to_string_lossy());
            if let Err(error) = fs::copy(&object, &out) {
                println!(
                    "cargo::error=PEPSAL_EBPF_OBJECT={}: {error}",
                    object.to_string_lossy()
                );
            }
        }
        None => fs::write(&out, []).expect("OUT_DIR is writable"),
    }
}
