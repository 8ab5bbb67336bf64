//! Settings of flows. A reload changes them for flows that start later.

use std::time::Duration;

use tokio::time::Instant;

use crate::flow::leg_config::LegConfig;

/// Settings that a flow reads at its start.
pub struct Settings {
    pub legs: LegConfig,
    pub connect_timeout: Duration,
    pub collector: Collector,
    pub idle_timeout: Option<Duration>,
}

/// PEPsal's garbage collector: every `interval` it resets connections that have been pending for `lifetime`.
#[derive(Debug, Clone, Copy)]
pub struct Collector {
    /// Start of the daemon.
    pub epoch: Instant,
    pub interval: Duration,
    /// How long a connection may stay pending.
    pub lifetime: Duration,
}

impl Collector {
    /// The round that ends a connection which is pending since `since`.
    pub fn due(&self, since: Instant) -> Instant {
        let expires = since + self.lifetime;
        let interval = self.interval.max(Duration::from_secs(1));
        let rounds = (expires - self.epoch).as_nanos().div_ceil(interval.as_nanos());
        self.epoch + interval * u32::try_from(rounds).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_connection_ends_at_the_first_round_past_its_lifetime() {
        let epoch = Instant::now();
        let seconds = Duration::from_secs;
        let collector = Collector {
            epoch,
            interval: seconds(10),
            lifetime: seconds(15),
        };
        assert_eq!(collector.due(epoch), epoch + seconds(20));
        assert_eq!(collector.due(epoch + seconds(5)), epoch + seconds(20));
        assert_eq!(collector.due(epoch + seconds(6)), epoch + seconds(30));
    }
}
