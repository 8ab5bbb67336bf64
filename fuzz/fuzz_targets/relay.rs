#![no_main]

use nix::sys::signal::{SigHandler, Signal, signal};

libfuzzer_sys::fuzz_target!(
    init: {
        // As any Rust program has it that begins with its own `main`.
        // SAFETY: no handler runs.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("a signal that may be ignored");
    },
    |data: &[u8]| pepsal_fuzz::relay::exercise(data)
);
