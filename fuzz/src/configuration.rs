//! A configuration file.

use std::{ffi::OsString, io::Write, os::fd::AsRawFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use pepsal::config::Configuration;

/// It is taken, and then means the same when it is read again, or it is refused, a line for each problem.
pub fn exercise(content: &[u8]) {
    let file = memfd_create(c"configuration", MFdFlags::MFD_CLOEXEC).expect("there are descriptors");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::File::from(file.try_clone().expect("there are descriptors"))
        .write_all(content)
        .expect("memory holds it");
    let arguments = ["pepsal", "--config", &path].map(OsString::from);
    match Configuration::load(arguments.into()) {
        Ok(configuration) => {
            let again = configuration.reload().expect("it was taken before");
            assert_eq!(configuration.changes_to(&again), []);
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            for problem in problems {
                let line = problem.to_string();
                let first = line.lines().next().unwrap_or_default();
                assert!(first.contains(&path), "{line}");
            }
        }
    }
}
