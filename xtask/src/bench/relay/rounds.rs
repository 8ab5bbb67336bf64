//! The common part of all measurements, and the order of contenders.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{contender::Contender, lane::Equipment, observation::Observations};
use crate::progress::Progress;

pub struct Amounts {
    pub rounds: u32,
    /// Payload of a bulk transfer.
    pub bulk_bytes: u64,
    pub connections: Duration,
    /// Numbers of open flows; the last is the maximum that descriptors allow.
    pub flows: Vec<usize>,
    /// Requests over the open flows.
    pub exchanges: usize,
    /// Runs of a program on a packet.
    pub packets: u32,
    /// Frames sent through a gateway.
    pub frames: u32,
}

pub struct Bench<'a> {
    pub contenders: &'a [Contender],
    pub amounts: &'a Amounts,
    pub equipment: &'a Equipment<'a>,
    pub progress: Progress,
    pub found: Observations,
}

impl Bench<'_> {
    /// Measures all contenders in every round, starting with a different one in each.
    pub fn rounds(
        &mut self,
        what: &str,
        mut measure: impl FnMut(&mut Self, u32, Contender) -> Result<()>,
    ) -> Result<()> {
        for round in 1..=self.amounts.rounds {
            for turn in 0..self.contenders.len() {
                let contender = self.contenders[(turn + round as usize) % self.contenders.len()];
                let of = self.amounts.rounds;
                self.progress
                    .show(|| format!("{what}, round {round} of {of}: {contender}"));
                measure(self, round, contender).with_context(|| format!("{what}, {contender}"))?;
            }
        }
        Ok(())
    }
}
