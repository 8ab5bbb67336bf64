//! `setsockopt` of the daemon's sockets: initial congestion windows, which plain system calls cannot set.

use aya_ebpf::{bindings::bpf_sockopt, helpers::generated::bpf_setsockopt};
use pepsal_ebpf::TCP_INITIAL_WINDOW;

const SOL_TCP: i32 = 6;
/// `TCP_BPF_IW`: the initial congestion window, in segments.
const TCP_BPF_IW: i32 = 1001;
const SOCKOPT_REFUSE: i32 = 0;
pub const SOCKOPT_PASS: i32 = 1;

/// Answers [`TCP_INITIAL_WINDOW`]; every other option is the kernel's.
#[inline(always)]
pub fn set_initial_window(sockopt: *mut bpf_sockopt) -> Option<i32> {
    // SAFETY: fields of the context that programs of this type may read, and the option's value within its bounds.
    unsafe {
        if (*sockopt).level != SOL_TCP || (*sockopt).optname != TCP_INITIAL_WINDOW {
            return None;
        }
        let value = (*sockopt).__bindgen_anon_2.optval.cast::<u32>();
        let end = (*sockopt).__bindgen_anon_3.optval_end.cast::<u32>();
        if value.add(1) > end {
            return Some(SOCKOPT_REFUSE);
        }
        let mut segments = *value;
        let socket = (*sockopt).__bindgen_anon_1.sk;
        if bpf_setsockopt(socket.cast(), SOL_TCP, TCP_BPF_IW, (&raw mut segments).cast(), 4) != 0 {
            return Some(SOCKOPT_REFUSE);
        }
        // The kernel has no such option, and is not to be asked.
        (*sockopt).optlen = -1;
    }
    Some(SOCKOPT_PASS)
}
