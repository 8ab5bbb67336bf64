//! Both ends of a device pair: a leg's socket mark is the interface of its client's SYN. Marks do not cross from one
//! namespace to another, but the frame's addresses do.

use crate::skb::{NEXT, Skb};

/// The first octets of a source address that names an interface; it is a locally administered one (IEEE 802).
const LABEL: [u8; 2] = [0x02, b'i'];

const SOURCE_ADDRESS_AT: u32 = 6;

/// Inner end, egress: writes the interface into the frame's source address. None where it cannot be written.
#[inline(always)]
pub fn label(skb: Skb) -> Option<i32> {
    let [a, b, c, d] = skb.mark().to_ne_bytes();
    let [first, second] = LABEL;
    skb.write(SOURCE_ADDRESS_AT, &[first, second, a, b, c, d])
        .then_some(NEXT)
}

/// Host end: the interface that [`label`] has written.
#[inline(always)]
pub fn origin(skb: Skb) -> Option<u32> {
    let [first, second, ifindex @ ..]: [u8; 6] = skb.frame(SOURCE_ADDRESS_AT)?;
    ([first, second] == LABEL).then(|| u32::from_ne_bytes(ifindex))
}
