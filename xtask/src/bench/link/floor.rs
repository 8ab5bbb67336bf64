//! What no protocol that begins with TCP's handshake can beat.
//!
//! ```text
//! floor = round trips × RTT + (payload + headers) × 8 / rate
//! ```
//!
//! Round trips: one for the handshake, and one for the exchange: a download's request goes one way and its last byte comes
//! the other way; an upload's last byte goes one way and the server's receipt comes the other way. A connection that is kept
//! has had its handshake. (TCP fast open, RFC 7413, saves the handshake's round trip: with it a time may be below the floor.)
//!
//! Headers: 52 bytes for every 1448 bytes of payload, which are 20 of IPv4, 20 of TCP and 12 of its timestamps (RFC 7323) in
//! packets of 1500. The request and the receipt, some hundred bytes together, are not counted, nor is anything on the
//! terrestrial networks.

use std::time::Duration;

use pepsal_tests::Direction;

use super::path::Path;

const SEGMENT_BYTES: u64 = 1448;
const HEADER_BYTES: u64 = 52;

/// Payload's share of what a link carries.
pub const PAYLOAD_SHARE: f64 = SEGMENT_BYTES as f64 / (SEGMENT_BYTES + HEADER_BYTES) as f64;

/// Whether an exchange has to open its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Connection {
    /// A new one.
    Fresh,
    /// One that is open already.
    Kept,
}

/// The least time for `bytes` of payload over a path whose link carries nothing else.
pub fn floor(path: Path, direction: Direction, bytes: u64, connection: Connection) -> Duration {
    let round_trips = match connection {
        Connection::Fresh => 2,
        Connection::Kept => 1,
    };
    let wire_bytes = bytes + bytes.div_ceil(SEGMENT_BYTES) * HEADER_BYTES;
    let seconds = wire_bytes as f64 * 8.0 / path.rate_bps(direction) as f64;
    path.rtt() * round_trips + Duration::from_secs_f64(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_round_trips_and_transmission() {
        let seconds = |path, direction, bytes, connection| {
            (floor(path, direction, bytes, connection).as_secs_f64() * 1e4).round() / 1e4
        };
        // 10 MiB are 7242 segments: 10,862,344 bytes, 1.738 s at 50 Mbit/s.
        let mib = 10 << 20;
        assert_eq!(
            seconds(Path::GeoSymmetric, Direction::Download, mib, Connection::Fresh),
            2.938
        );
        assert_eq!(
            seconds(Path::Geo, Direction::Upload, mib, Connection::Kept),
            17.9798
        );
        assert_eq!(seconds(Path::Geo, Direction::Download, 0, Connection::Fresh), 1.2);
    }
}
