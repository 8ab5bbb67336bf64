#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pepsal_fuzz::packet::exercise(data));
