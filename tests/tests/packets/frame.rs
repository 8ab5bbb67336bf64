//! Frames that are for another host, device or instance.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::libc;
use nix::net::if_::if_nametoindex;
use pepsal_ebpf::Counter;
use pepsal_tests::packet::Tcp;
use pepsal_tests::{Family, PATIENCE, eventually};

use crate::gateway::{
    Gateway, MAC, MARK, MARK_MASK, OTHERS, Outcome, STEER, ethernet, program, test_run_marked,
};

#[test]
fn frames_of_other_devices_and_hosts_pass() -> Result<()> {
    let mut gateway = Gateway::new()?;
    gateway.attach()?;
    gateway.topology.gateway.ip("link set lan0 promisc on")?;
    let syn = |port: u16| {
        let source = SocketAddr::new(Family::V4.client(), port);
        ethernet(
            &Tcp {
                source,
                ..Tcp::syn(Family::V4)
            }
            .packet(),
        )
    };
    let tagged = |port, vlan: u8| {
        let syn = syn(port);
        [&syn[..12], &[0x81, 0x00, 0x00, vlan], &syn[12..]].concat()
    };
    // A VLAN's comes again on the VLAN's own device; a priority tag (VID 0) makes none of its own.
    for (to, frame) in [
        (MAC, tagged(1001, 100)),
        ([2, 0, 0, 0, 0, 9], syn(1002)),
        ([0xff; 6], syn(1003)),
        (MAC, tagged(1004, 0)),
        (MAC, syn(1005)),
    ] {
        let frame = [&to[..], &frame[6..]].concat();
        gateway.topology.client.run(|| send_frame("eth0", &frame))?;
    }
    eventually(PATIENCE, || {
        gateway.count(Counter::Intercepted).is_ok_and(|count| count == 2)
    });
    assert_eq!(gateway.count(Counter::Vlan)?, 1);
    assert_eq!(gateway.count(Counter::OtherHost)?, 2);
    let mut ports: Vec<u16> = gateway
        .flows()?
        .iter()
        .map(|(key, _)| key.client().port())
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [1004, 1005]);
    Ok(())
}

#[test]
fn packet_of_another_instances_server_leg_is_left_to_that() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let frame = ethernet(&Tcp::syn(family).packet());
        let marked = OTHERS & !MARK_MASK | MARK;
        let lan0 = gateway.lan0;
        let program = program(&mut gateway.ebpf, STEER)?;
        let outcome = gateway
            .topology
            .gateway
            .run(|| test_run_marked(program, &frame, lan0, marked))?;
        assert_eq!(outcome, Outcome::Passed, "with its mark");
    }
    assert_eq!(gateway.count(Counter::NoFlow)?, 2);
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

/// Sends a frame from an interface of the thread's namespace.
pub fn send_frame(interface: &str, frame: &[u8]) -> Result<()> {
    // SAFETY: a system call without pointers.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    nix::errno::Errno::result(socket)?;
    // SAFETY: the descriptor is open and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zeroes is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = if_nametoindex(interface)? as i32;
    // SAFETY: `frame` and `address` are as long as is said and outlive the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    ensure!(nix::errno::Errno::result(sent)? as usize == frame.len());
    Ok(())
}
