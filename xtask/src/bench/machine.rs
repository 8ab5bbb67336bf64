//! Properties of the measuring machine.

use std::{fs, thread};

use anyhow::{Context as _, Result};
use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// `uname -r`.
    pub kernel: String,
    pub cpus: usize,
}

impl Machine {
    pub fn here() -> Result<Self> {
        let kernel =
            fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's version")?;
        Ok(Self {
            kernel: kernel.trim().to_owned(),
            cpus: cpus(),
        })
    }
}

/// Returns the number of CPUs of this process.
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
