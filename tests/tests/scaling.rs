//! More than one gateway behind a router that shares flows out with a resilient next-hop group.

use anyhow::{Result, ensure};
use pepsal_tests::{Cancel, Connector, Daemon, Family, LAN, Namespace, Server, Session, Transfer};

#[test]
fn flows_are_shared_out_and_when_a_gateway_dies_the_other_takes_new_ones() -> Result<()> {
    let site = Site::new()?;
    let server = Server::start(&site.server)?;
    let [first, second] = site.daemons()?;
    let mut sessions = [Vec::new(), Vec::new()];
    for family in Family::BOTH {
        for _ in 0..8 {
            let (connector, address) = (Connector::default(), server.address(family));
            let session = Session::open(&connector, &site.client, address, &Cancel::default())?;
            assert!(session.download(10_000, 1)?.1);
            let is_firsts = flows(&first)? > sessions[0].len();
            sessions[usize::from(!is_firsts)].push(session);
        }
    }
    let shares = sessions.each_ref().map(Vec::len);
    assert!(shares.iter().all(|share| *share > 0), "{shares:?}");
    assert_eq!(
        [flows(&first)?, flows(&second)?],
        shares,
        "each is split by one gateway"
    );

    // The whole machine is gone, and the router notices as it does for a cable.
    site.router.ip("link set gw1 down")?;
    first.kill()?;
    for session in &sessions[1] {
        assert!(session.download(10_000, 2)?.1, "the other gateway's flows go on");
    }
    for family in Family::BOTH {
        for _ in 0..16 {
            let outcome = Transfer::upload(10_000).run(&site.client, server.address(family))?;
            assert!(outcome.intact);
            assert_eq!(outcome.peer, outcome.local, "the server sees the client");
        }
    }
    Ok(())
}

#[test]
fn stopped_daemon_costs_no_new_connection() -> Result<()> {
    let site = Site::new()?;
    let server = Server::start(&site.server)?;
    let [first, _second] = site.daemons()?;
    assert!(first.terminate()?.status.success());
    // Its gateway forwards, so that the router has nothing to notice.
    for family in Family::BOTH {
        for _ in 0..16 {
            assert!(
                Transfer::upload(10_000)
                    .run(&site.client, server.address(family))?
                    .intact
            );
        }
    }
    Ok(())
}

/// ```text
///                 gateway 1
///                  lan0 | 10.4.1.2
///                       |
/// client eth0 ──── lan router wan ──── eth0 server
///                       |
///                  lan0 | 10.4.2.2
///                 gateway 2
/// ```
///
/// What comes from the client and from the server goes to a gateway first, whichever its bucket names; what comes from a
/// gateway goes on. Addresses of client and server are those of a [`pepsal_tests::Topology`].
struct Site {
    client: Namespace,
    router: Namespace,
    gateways: [Namespace; 2],
    server: Namespace,
}

impl Site {
    fn new() -> Result<Self> {
        let site = Self {
            client: Namespace::new("client")?,
            router: Namespace::new("router")?,
            gateways: [Namespace::new("gateway 1")?, Namespace::new("gateway 2")?],
            server: Namespace::new("server")?,
        };
        for namespace in [&site.router, &site.gateways[0], &site.gateways[1]] {
            namespace.sysctl("net.ipv4.conf.all.forwarding", 1)?;
            namespace.sysctl("net.ipv6.conf.all.forwarding", 1)?;
        }
        // Addresses, protocol and ports count, and both directions of a connection have the same hash. Policy 1 would
        // take a hash that a packet brings along, which here its sender has drawn.
        for family in ["ipv4", "ipv6"] {
            site.router
                .sysctl(&format!("net.{family}.fib_multipath_hash_policy"), 3)?;
            site.router
                .sysctl(&format!("net.{family}.fib_multipath_hash_fields"), 0x37)?;
        }
        let router = &site.router;
        join(router, "lan", &site.client, "eth0", "10.1.0", "fd01:")?;
        join(router, "wan", &site.server, "eth0", "10.2.0", "fd02:")?;
        for (number, gateway) in (1..).zip(&site.gateways) {
            let (v4, v6) = (format!("10.4.{number}"), format!("fd04:{number}:"));
            join(router, &format!("gw{number}"), gateway, "lan0", &v4, &v6)?;
            router.ip(format!(
                "nexthop add id 4{number} via {v4}.2 dev gw{number}
                 nexthop add id 6{number} via {v6}:2 dev gw{number}"
            ))?;
        }
        router.ip("nexthop add id 4 group 41/42 type resilient buckets 64
             nexthop add id 6 group 61/62 type resilient buckets 64
             route add 0.0.0.0/0 table 100 nhid 4
             route add ::/0 table 100 nhid 6")?;
        // A batch has rules of one family only.
        for family in ["-4", "-6"] {
            for device in ["lan", "wan"] {
                let rule = [family, "rule", "add", "iif", device, "lookup", "100"];
                let added = router.command("ip").args(rule).status()?;
                ensure!(added.success(), "ip {}: {added}", rule.join(" "));
            }
        }
        Ok(site)
    }

    fn daemons(&self) -> Result<[Daemon; 2]> {
        let start = |gateway| Daemon::start(gateway, LAN);
        Ok([start(&self.gateways[0])?, start(&self.gateways[1])?])
    }
}

/// Connections from the client that a daemon has split.
fn flows(daemon: &Daemon) -> Result<usize> {
    let clients = Family::BOTH.map(Family::client);
    let legs = daemon.legs()?;
    Ok(legs.iter().filter(|leg| clients.contains(&leg.peer.ip())).count())
}

/// A veth pair, the router's end with host number 1 and the default route to it from the other.
fn join(router: &Namespace, near: &str, host: &Namespace, far: &str, v4: &str, v6: &str) -> Result<()> {
    router.ip(format!(
        "link add {near} type veth peer name {far} netns {}
         link set {near} up
         address add {v4}.1/24 dev {near}
         address add {v6}:1/64 dev {near} nodad",
        host.path().display()
    ))?;
    host.ip(format!(
        "link set {far} up
         address add {v4}.2/24 dev {far}
         address add {v6}:2/64 dev {far} nodad
         route add default via {v4}.1
         route add default via {v6}:1"
    ))
}
