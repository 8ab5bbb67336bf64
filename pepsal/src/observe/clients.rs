//! Sums flows up by subscriber.

use std::collections::HashMap;

use crate::{
    link::division::Subscriber,
    observe::protocol::{
        ClientFlows, ClientLegs, ClientSort, ClientStatus, Clients, FlowState, FlowStatus, LegStatus,
        SideStatus, Ways,
    },
};

impl Clients {
    /// Returns the subscribers that flows belong to, in an order; at most `limit`, all for 0.
    pub(super) fn of(flows: &[FlowStatus], sort: ClientSort, limit: usize) -> Self {
        let mut sums = HashMap::<Subscriber, Sum>::new();
        for flow in flows {
            sums.entry(Subscriber::of(flow.client.ip()))
                .or_default()
                .add(flow);
        }
        let mut list: Vec<ClientStatus> = sums
            .into_iter()
            .map(|(subscriber, sum)| sum.status(subscriber))
            .collect();
        // Equals stay in one order from answer to answer.
        list.sort_by(|a, b| {
            let descending = sort.key(b).total_cmp(&sort.key(a));
            descending.then_with(|| a.client.cmp(&b.client))
        });
        let total = list.len();
        if limit > 0 {
            list.truncate(limit);
        }
        Self { total, list }
    }
}

#[derive(Default)]
struct Sum {
    flows: ClientFlows,
    bytes: Ways<u64>,
    bytes_per_second: Ways<f64>,
    client: Side,
    server: Side,
}

impl Sum {
    fn add(&mut self, flow: &FlowStatus) {
        match flow.state {
            FlowState::Open => self.flows.open += 1,
            FlowState::Pending => self.flows.pending += 1,
        }
        self.bytes.up += flow.bytes.up;
        self.bytes.down += flow.bytes.down;
        self.bytes_per_second.up += flow.bytes_per_second.up;
        self.bytes_per_second.down += flow.bytes_per_second.down;
        for (side, leg) in [
            (&mut self.client, &flow.legs.client),
            (&mut self.server, &flow.legs.server),
        ] {
            if let Some(leg) = leg {
                side.add(leg);
            }
        }
    }

    fn status(self, subscriber: Subscriber) -> ClientStatus {
        ClientStatus {
            client: subscriber.to_string(),
            flows: self.flows,
            bytes: self.bytes,
            bytes_per_second: self.bytes_per_second,
            legs: ClientLegs {
                client: self.client.status(),
                server: self.server.status(),
            },
        }
    }
}

/// The legs of one side, before the mean is known.
#[derive(Default)]
struct Side {
    status: SideStatus,
    /// Sum of the smoothed round trips, in seconds, and how many there are.
    round_trips: (f64, u32),
}

impl Side {
    fn add(&mut self, leg: &LegStatus) {
        let status = &mut self.status;
        status.open += 1;
        status.sent_segments += u64::from(leg.sent_segments);
        status.retransmitted_segments += u64::from(leg.retransmitted_segments);
        let least = [status.rtt_min_seconds, leg.rtt_min_seconds];
        status.rtt_min_seconds = least.into_iter().flatten().min_by(f64::total_cmp);
        if let Some(seconds) = leg.rtt_seconds {
            self.round_trips.0 += seconds;
            self.round_trips.1 += 1;
        }
    }

    fn status(self) -> SideStatus {
        let (sum, legs) = self.round_trips;
        SideStatus {
            rtt_seconds: (legs > 0).then(|| sum / f64::from(legs)),
            ..self.status
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A leg with figures that tests look at.
    fn leg(rtt: Option<f64>, rtt_min: Option<f64>, retransmitted: u32) -> Value {
        json!({
            "local": null, "peer": null, "interface": "lan0", "state": "established", "congestion": null,
            "rtt_seconds": rtt, "rtt_min_seconds": rtt_min, "mss_bytes": 1448, "cwnd_segments": 10,
            "unacknowledged_segments": 0, "unsent_bytes": 0, "sent_segments": 100,
            "retransmitted_segments": retransmitted, "delivery_rate_bytes_per_second": 0,
            "pacing_limit_bytes_per_second": null, "send_window_bytes": 65_535, "busy_seconds": 0.0,
            "receiver_limited_seconds": 0.0, "send_buffer_limited_seconds": 0.0,
        })
    }

    fn flow(client: &str, up: u64, client_leg: Value, server_leg: Value) -> FlowStatus {
        let state = if server_leg.is_null() { "pending" } else { "open" };
        serde_json::from_value(json!({
            "id": 1, "client": client, "server": "192.0.2.1:80", "state": state, "age_seconds": 1.0,
            "idle_seconds": 0.0, "bytes": {"up": up, "down": 1},
            "bytes_per_second": {"up": up as f64, "down": 0.5}, "limited": {"up": null, "down": null},
            "legs": {"client": client_leg, "server": server_leg},
        }))
        .unwrap()
    }

    fn names(clients: &Clients) -> Vec<&str> {
        clients.list.iter().map(|client| client.client.as_str()).collect()
    }

    #[test]
    fn flows_are_summed_up_by_address_and_by_prefix() {
        let flows = [
            flow("10.1.0.2:1", 10, leg(Some(0.2), Some(0.1), 1), leg(None, None, 2)),
            flow("10.1.0.2:2", 20, leg(Some(0.4), Some(0.3), 4), Value::Null),
            flow("[fd01::2]:3", 50, leg(None, None, 0), leg(None, None, 0)),
            flow("[fd01::1:0:0:7]:3", 50, leg(None, None, 0), leg(None, None, 0)),
            flow("[fd01:0:0:1::2]:3", 40, leg(None, None, 0), leg(None, None, 0)),
        ];
        let clients = Clients::of(&flows, ClientSort::Rate, 0);
        assert_eq!(names(&clients), ["fd01::/64", "fd01:0:0:1::/64", "10.1.0.2"]);
        let v4 = &clients.list[2];
        assert_eq!(v4.flows, ClientFlows { open: 1, pending: 1 });
        assert_eq!(v4.bytes, Ways { up: 30, down: 2 });
        assert_eq!(v4.bytes_per_second, Ways { up: 30.0, down: 1.0 });
        let side = &v4.legs.client;
        assert_eq!(
            (side.open, side.sent_segments, side.retransmitted_segments),
            (2, 200, 5)
        );
        assert!((side.rtt_seconds.unwrap() - 0.3).abs() < 1e-9);
        assert_eq!(side.rtt_min_seconds, Some(0.1));
        let side = &v4.legs.server;
        assert_eq!((side.open, side.retransmitted_segments), (1, 2));
        assert_eq!((side.rtt_seconds, side.rtt_min_seconds), (None, None));
    }

    #[test]
    fn subscribers_are_sorted_and_limited() {
        let flows = [
            flow("10.1.0.2:1", 1, leg(Some(0.2), None, 1), leg(Some(0.1), None, 2)),
            flow("10.1.0.3:1", 2, leg(Some(0.1), None, 0), leg(Some(0.6), None, 0)),
            flow("10.1.0.4:1", 1, leg(Some(0.1), None, 0), leg(None, None, 0)),
            flow("10.1.0.4:2", 0, leg(Some(0.1), None, 0), leg(None, None, 0)),
        ];
        let first = |sort| {
            let clients = Clients::of(&flows, sort, 1);
            assert_eq!(clients.total, 3);
            names(&clients).join(" ")
        };
        assert_eq!(first(ClientSort::Rate), "10.1.0.3");
        assert_eq!(first(ClientSort::Bytes), "10.1.0.3");
        assert_eq!(first(ClientSort::Rtt), "10.1.0.3");
        assert_eq!(first(ClientSort::Flows), "10.1.0.4");
        assert_eq!(first(ClientSort::Retransmits), "10.1.0.2");
    }
}
