#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pepsal_fuzz::request::exercise(data));
