//! The congestion control of legs whose link's rate is known: send at the share, whatever is lost.
//!
//! On a satellite link a lost packet says that it rained, not that somebody else wants to send. Loss-based control slows
//! down for it; BBR finds the rate again, but takes many round trips of 600 ms each. Here no leg has to find it: the link's
//! [`budget`](crate::link::budget) divides what the link carries, and caps each leg's pacing at its share. So the window is what
//! the share sends in the shortest round trip seen, a quarter and 50 ms more, from the first segment on; a standing queue can
//! never grow past that.
//!
//! It is registered with the kernel as a `struct_ops` of four small eBPF programs, which are put together here, since the
//! places of the members they touch are the running kernel's. They live as long as this process.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    process,
};

use anyhow::{Context, Result};

use crate::{
    host::{
        bpf::{Command, bpf},
        btf::Btf,
    },
    tcp::congestion::{Congestion, OWN},
};

/// Microseconds that the window covers beyond the shortest round trip and its quarter: on a low orbit the next satellite may be
/// so much farther away.
const SLACK_US: i32 = 50_000;

/// The registration, undone when this is dropped.
#[derive(Debug)]
pub struct RateControl {
    /// What sockets choose it by.
    pub congestion: Congestion,
    _link: OwnedFd,
}

impl RateControl {
    /// Registers it, under a name of its own when another instance has the plain one.
    ///
    /// # Errors
    /// Before Linux 6.4, and where the kernel refuses for other reasons; BBR then has to do.
    pub fn register() -> Result<Self> {
        let kernel = Kernel::read().context("the kernel's structures are not as expected")?;
        let window = kernel.window();
        let keep = kernel.keep();
        let members = [
            ("init", &window),
            ("cong_control", &window),
            ("ssthresh", &keep),
            ("undo_cwnd", &keep),
        ];
        let mut programs = Vec::new();
        for (member, code) in members {
            let (number, offset) = kernel.operations.member(member)?;
            let program =
                load(code, kernel.operations_id, number).with_context(|| format!("program {member}"))?;
            programs.push((offset, program));
        }
        let register = |name: &str| -> io::Result<OwnedFd> {
            let mut value = vec![0; kernel.value_size];
            for (offset, program) in &programs {
                let slot = kernel.value_data + offset;
                value[slot..slot + 8].copy_from_slice(&(program.as_raw_fd() as u64).to_ne_bytes());
            }
            let slot = kernel.value_data + kernel.name;
            value[slot..slot + name.len()].copy_from_slice(name.as_bytes());
            register(&value, kernel.value_id)
        };
        let own = format!("{OWN}_{}", process::id());
        let (name, link) = match register(OWN) {
            Ok(link) => (OWN.to_owned(), link),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let link = register(&own).context("cannot register it")?;
                (own, link)
            }
            Err(error) => return Err(error).context("cannot register it"),
        };
        Ok(Self {
            congestion: Congestion::Own(name),
            _link: link,
        })
    }
}

/// What of the running kernel the programs have to know.
struct Kernel {
    operations: Members,
    operations_id: u32,
    name: usize,
    value_id: u32,
    value_size: usize,
    value_data: usize,
    max_pacing_rate: i16,
    pacing_rate: i16,
    snd_cwnd: i16,
    srtt_us: i16,
    rtt_min: i16,
    mss_cache: i16,
}

/// Members of `struct tcp_congestion_ops`: name, number, offset.
struct Members(Vec<(&'static str, u32, usize)>);

impl Members {
    fn member(&self, name: &str) -> Result<(u32, usize)> {
        let found = self.0.iter().find(|(member, ..)| *member == name);
        found
            .map(|(_, number, offset)| (*number, *offset))
            .with_context(|| format!("no member {name}"))
    }
}

impl Kernel {
    fn read() -> Result<Self> {
        let btf = Btf::of_kernel()?;
        let operations = btf.structure("tcp_congestion_ops")?;
        let mut members = Vec::new();
        for name in ["init", "cong_control", "ssthresh", "undo_cwnd"] {
            let (number, offset) = operations.member(name)?;
            members.push((name, number, offset));
        }
        let value = btf.structure("bpf_struct_ops_tcp_congestion_ops")?;
        // A `struct tcp_sock` begins with its `struct sock`.
        let (sock, tcp) = (btf.structure("sock")?, btf.structure("tcp_sock")?);
        let short = |offset: usize| i16::try_from(offset).context("a member lies too far into its structure");
        // `struct minmax` begins with its best sample, whose value follows its time.
        let best_sample_value = btf.structure("minmax_sample")?.offset("v")?;
        Ok(Self {
            operations: Members(members),
            operations_id: operations.id,
            name: operations.offset("name")?,
            value_id: value.id,
            value_size: value.size()?,
            value_data: value.offset("data")?,
            max_pacing_rate: short(sock.offset("sk_max_pacing_rate")?)?,
            pacing_rate: short(sock.offset("sk_pacing_rate")?)?,
            snd_cwnd: short(tcp.offset("snd_cwnd")?)?,
            srtt_us: short(tcp.offset("srtt_us")?)?,
            rtt_min: short(tcp.offset("rtt_min")? + best_sample_value)?,
            mss_cache: short(tcp.offset("mss_cache")?)?,
        })
    }

    /// `init` and `cong_control`: pace at the cap, and let the window cover it.
    fn window(&self) -> Vec<Instruction> {
        use Register::*;
        vec![
            // The first argument, the socket.
            load_64(R6, R1, 0),
            load_64(R7, R6, self.max_pacing_rate),
            // Uncapped, or so fast that the product below would overflow.
            jump_if_at_most(R7, i32::MAX, 1),
            set(R7, i32::MAX),
            store_64(R6, self.pacing_rate, R7),
            // The shortest round trip of late in microseconds; before the first sample it is all ones. The smoothed one is
            // kept in eighths, and is zero before the first.
            load_32(R8, R6, self.rtt_min),
            load_32(R9, R6, self.srtt_us),
            shift_right(R9, 3),
            jump_if_at_most_register(R8, R9, 1),
            copy(R8, R9),
            jump_if_zero(R8, 10),
            copy(R9, R8),
            shift_right(R9, 2),
            add_register(R8, R9),
            add(R8, SLACK_US),
            load_32(R9, R6, self.mss_cache),
            multiply(R7, R8),
            divide(R7, 1_000_000),
            // By zero it is zero.
            divide_by(R7, R9),
            add(R7, 10),
            store_32(R6, self.snd_cwnd, R7),
            set(R0, 0),
            exit(),
        ]
    }

    /// `ssthresh` and `undo_cwnd`: the window stays as it is.
    fn keep(&self) -> Vec<Instruction> {
        use Register::*;
        vec![load_64(R6, R1, 0), load_32(R0, R6, self.snd_cwnd), exit()]
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Register {
    R0,
    R1,
    R6 = 6,
    R7,
    R8,
    R9,
}

/// `struct bpf_insn` of `uapi/linux/bpf.h`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: Register, from: Register, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: (from as u8) << 4 | to as u8,
        offset,
        immediate,
    }
}

const fn load_64(to: Register, from: Register, offset: i16) -> Instruction {
    instruction(0x79, to, from, offset, 0)
}
const fn load_32(to: Register, from: Register, offset: i16) -> Instruction {
    instruction(0x61, to, from, offset, 0)
}
const fn store_64(to: Register, offset: i16, from: Register) -> Instruction {
    instruction(0x7b, to, from, offset, 0)
}
const fn store_32(to: Register, offset: i16, from: Register) -> Instruction {
    instruction(0x63, to, from, offset, 0)
}
const fn set(to: Register, value: i32) -> Instruction {
    instruction(0xb7, to, Register::R0, 0, value)
}
const fn copy(to: Register, from: Register) -> Instruction {
    instruction(0xbf, to, from, 0, 0)
}
const fn add(to: Register, value: i32) -> Instruction {
    instruction(0x07, to, Register::R0, 0, value)
}
const fn add_register(to: Register, from: Register) -> Instruction {
    instruction(0x0f, to, from, 0, 0)
}
const fn multiply(to: Register, from: Register) -> Instruction {
    instruction(0x2f, to, from, 0, 0)
}
const fn divide(to: Register, value: i32) -> Instruction {
    instruction(0x37, to, Register::R0, 0, value)
}
const fn divide_by(to: Register, from: Register) -> Instruction {
    instruction(0x3f, to, from, 0, 0)
}
const fn shift_right(to: Register, bits: i32) -> Instruction {
    instruction(0x77, to, Register::R0, 0, bits)
}
const fn jump_if_zero(what: Register, over: i16) -> Instruction {
    instruction(0x15, what, Register::R0, over, 0)
}
const fn jump_if_at_most(what: Register, value: i32, over: i16) -> Instruction {
    instruction(0xb5, what, Register::R0, over, value)
}
const fn jump_if_at_most_register(what: Register, than: Register, over: i16) -> Instruction {
    instruction(0xbd, what, than, over, 0)
}
const fn exit() -> Instruction {
    instruction(0x95, Register::R0, Register::R0, 0, 0)
}

/// Constants of `uapi/linux/bpf.h`.
const BPF_MAP_TYPE_STRUCT_OPS: u32 = 26;
const BPF_PROG_TYPE_STRUCT_OPS: u32 = 27;
const BPF_STRUCT_OPS: u32 = 44;
/// The map is registered by a link, and so for as long as that is open.
const BPF_F_LINK: u32 = 1 << 13;

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

/// `union bpf_attr` for `BPF_MAP_CREATE`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
    map_ifindex: u32,
    btf_fd: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    btf_vmlinux_value_type_id: u32,
}

/// `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map_fd: u64,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for `BPF_LINK_CREATE`, as far as it is used.
#[repr(C)]
struct LinkCreate {
    map_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn load(code: &[Instruction], operations_id: u32, member: u32) -> io::Result<OwnedFd> {
    let mut prog_name = [0; 16];
    prog_name[..OWN.len()].copy_from_slice(OWN.as_bytes());
    let mut program = ProgLoad {
        prog_type: BPF_PROG_TYPE_STRUCT_OPS,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        prog_name,
        expected_attach_type: member,
        attach_btf_id: operations_id,
        ..ProgLoad::default()
    };
    // SAFETY: the kernel reads as many instructions as it is told there are, and a string that ends.
    Ok(owned(unsafe { bpf(Command::ProgLoad, &mut program) }?))
}

/// `union bpf_attr` for `BPF_BTF_LOAD`, as far as it is used.
#[repr(C)]
struct BtfLoad {
    btf: u64,
    btf_log_buf: u64,
    btf_size: u32,
    btf_log_size: u32,
}

/// The kernel wants types of the program's own beside a map of a type of its own, and does not look at them.
fn some_types() -> io::Result<OwnedFd> {
    const INT: [u32; 4] = [1, 1 << 24, 4, 1 << 24 | 32];
    let header = [
        0x0001_eb9f,
        24,
        0,
        size_of_val(&INT) as u32,
        size_of_val(&INT) as u32,
        5,
    ];
    let mut types: Vec<u8> = header
        .iter()
        .chain(&INT)
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    types.extend(b"\0int\0");
    let mut load = BtfLoad {
        btf: types.as_ptr() as u64,
        btf_log_buf: 0,
        btf_size: types.len() as u32,
        btf_log_size: 0,
    };
    // SAFETY: the kernel reads as many bytes of types as it is told there are.
    Ok(owned(unsafe { bpf(Command::BtfLoad, &mut load) }?))
}

fn register(value: &[u8], value_id: u32) -> io::Result<OwnedFd> {
    let types = some_types()?;
    let mut map_name = [0; 16];
    map_name[..OWN.len()].copy_from_slice(OWN.as_bytes());
    let mut wanted = MapCreate {
        map_type: BPF_MAP_TYPE_STRUCT_OPS,
        key_size: 4,
        value_size: value.len() as u32,
        max_entries: 1,
        map_flags: BPF_F_LINK,
        map_name,
        btf_fd: types.as_raw_fd() as u32,
        btf_vmlinux_value_type_id: value_id,
        ..MapCreate::default()
    };
    // SAFETY: nothing is pointed to.
    let map = owned(unsafe { bpf(Command::MapCreate, &mut wanted) }?);
    let key = 0_u32;
    let mut update = MapUpdate {
        map_fd: map.as_raw_fd() as u64,
        key: (&raw const key) as u64,
        value: value.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads a key and a value of the sizes that the map was made with.
    unsafe { bpf(Command::MapUpdateElem, &mut update) }?;
    let mut link = LinkCreate {
        map_fd: map.as_raw_fd() as u32,
        target_fd: 0,
        attach_type: BPF_STRUCT_OPS,
        flags: 0,
    };
    // SAFETY: nothing is pointed to.
    Ok(owned(unsafe { bpf(Command::LinkCreate, &mut link) }?))
}
