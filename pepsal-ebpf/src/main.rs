//! pepsal's kernel side. Legs live in two network namespaces, client legs in one and server legs in the other, each with a
//! device pair to the host; the programs carry packets between them and the wire of the intercepted interfaces.
//!
//! - [`pepsal_steer`], ingress of every intercepted interface: segments of client legs, and new connections, which it
//!   records, go to the clients' side.
//! - [`pepsal_listener`], socket lookup of the clients' side: gives the daemon's listener the connections that are recorded,
//!   and no others.
//! - [`pepsal_clients_out`], host end of the clients' device: what client legs send goes out to the client.
//! - [`pepsal_label`] and [`pepsal_servers_out`], inner and host end of the servers' device: what server legs send enters
//!   the host by the interface that the client's SYN came in by, like the client's own packets.
//! - [`pepsal_replies`], egress of every interface: what the host sends to a server leg as to the client goes to the
//!   servers' side.
//! - [`pepsal_window`], the daemon's own cgroup: sets initial congestion windows, which plain system calls cannot.
//!
//! Whatever cannot be decided is passed on untouched.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    missing_docs,
    reason = "the macros export each program a second time, without its documentation"
)]

use aya_ebpf::{
    macros::{cgroup_sockopt, classifier, sk_lookup},
    programs::{SkLookupContext, SockoptContext, TcContext},
};
use pepsal_ebpf::Counter;

use crate::{
    maps::{clients_ifindex, count},
    skb::{DROP, NEXT, Skb},
};

mod client_limit;
mod clients_out;
mod label;
mod listener;
mod maps;
mod replies;
mod route;
mod servers_out;
mod skb;
mod sockets;
mod steer;
mod window;

/// TC ingress of an intercepted interface.
#[classifier]
pub fn pepsal_steer(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if let Some(counter) = steer::injected(skb) {
        count(counter);
        return NEXT;
    }
    match steer::classify(&ctx) {
        Ok(counter) => {
            count(counter);
            // The leg's socket takes the mark over, and names its interface with it.
            skb.set_mark(skb.ifindex());
            skb.redirect_to_peer(clients_ifindex())
        }
        Err(counter) => {
            count(counter);
            NEXT
        }
    }
}

/// TC egress of every interface.
#[classifier]
pub fn pepsal_replies(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if replies::is_of_client_leg(skb) {
        count(Counter::Sent);
        return NEXT;
    }
    match replies::classify(skb) {
        Ok(counter) => {
            count(counter);
            match counter {
                Counter::IcmpRedirect => DROP,
                _ => or_drop(replies::to_servers(skb)),
            }
        }
        Err(counter) => {
            count(counter);
            NEXT
        }
    }
}

/// TC ingress of the clients' device, host end.
#[classifier]
pub fn pepsal_clients_out(ctx: TcContext) -> i32 {
    or_drop(clients_out::to_client(Skb(ctx.skb.skb)))
}

/// TC ingress of the servers' device, host end.
#[classifier]
pub fn pepsal_servers_out(ctx: TcContext) -> i32 {
    or_drop(servers_out::to_host(Skb(ctx.skb.skb)))
}

/// TC egress of either device, inner end.
#[classifier]
pub fn pepsal_label(ctx: TcContext) -> i32 {
    or_drop(label::label(Skb(ctx.skb.skb)))
}

/// The verdict for a packet of a leg. One that cannot be delivered is dropped: no other connection has it.
#[inline(always)]
fn or_drop(verdict: Option<i32>) -> i32 {
    verdict.unwrap_or_else(|| {
        count(Counter::Undeliverable);
        DROP
    })
}

/// Socket lookup of the client legs' namespace.
#[sk_lookup]
pub fn pepsal_listener(ctx: SkLookupContext) -> u32 {
    if let Some(counter) = listener::assign(&ctx) {
        count(counter);
    }
    listener::SK_PASS
}

/// `setsockopt` of the daemon's sockets.
#[cgroup_sockopt(setsockopt)]
pub fn pepsal_window(ctx: SockoptContext) -> i32 {
    match window::set_initial_window(ctx.sockopt) {
        Some(answer) => answer,
        None => window::SOCKOPT_PASS,
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What is read of the packets may be shown to GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
