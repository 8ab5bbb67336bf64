//! A parser of the BPF type format (kernel's `Documentation/bpf/btf.rst`) for structures of the running
//! kernel: type number, size, and member offsets.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};

/// The BTF of the running kernel.
pub struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    structs: HashMap<String, (u32, usize)>,
}

pub struct Struct<'a> {
    btf: &'a Btf,
    pub id: u32,
    at: usize,
}

const MAGIC: u32 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

impl Btf {
    /// Reads the kernel's BTF.
    ///
    /// # Errors
    /// When it is missing or invalid.
    pub fn of_kernel() -> Result<Self> {
        let path = "/sys/kernel/btf/vmlinux";
        Self::parse(std::fs::read(path).with_context(|| format!("cannot read {path}"))?)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self> {
        let mut btf = Self {
            bytes,
            strings: 0,
            structs: HashMap::new(),
        };
        ensure!(
            btf.word(0)? & 0xffff == MAGIC,
            "not BTF in this machine's byte order"
        );
        let header = btf.word(4)? as usize;
        let types = header + btf.word(8)? as usize;
        let end = types + btf.word(12)? as usize;
        btf.strings = header + btf.word(16)? as usize;
        let (mut at, mut id) = (types, 1);
        while at < end {
            let info = btf.word(at + 4)?;
            if kind(info) == KIND_STRUCT {
                let name = btf.string(btf.word(at)?)?.to_owned();
                btf.structs.entry(name).or_insert((id, at));
            }
            at += 12 + details(info)?;
            id += 1;
        }
        Ok(btf)
    }

    /// Finds a structure by its name.
    ///
    /// # Errors
    /// When the kernel has no structure of that name.
    pub fn structure(&self, name: &str) -> Result<Struct<'_>> {
        let (id, at) = *self
            .structs
            .get(name)
            .with_context(|| format!("this kernel has no struct {name}"))?;
        Ok(Struct { btf: self, id, at })
    }

    fn word(&self, at: usize) -> Result<u32> {
        let bytes = self
            .bytes
            .get(at..at + 4)
            .context("the kernel's BTF is truncated")?;
        Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn string(&self, offset: u32) -> Result<&str> {
        let rest = self
            .bytes
            .get(self.strings + offset as usize..)
            .context("the kernel's BTF is truncated")?;
        let len = rest
            .iter()
            .position(|byte| *byte == 0)
            .context("the kernel's BTF is truncated")?;
        std::str::from_utf8(&rest[..len]).context("a name in the kernel's BTF is not UTF-8")
    }
}

impl Struct<'_> {
    /// Returns the size in bytes.
    ///
    /// # Errors
    /// When the BTF is truncated.
    pub fn size(&self) -> Result<usize> {
        Ok(self.btf.word(self.at + 8)? as usize)
    }

    /// Returns a member's index and its offset in bytes.
    ///
    /// # Errors
    /// When the member is missing, or does not start at a byte boundary.
    pub fn member(&self, name: &str) -> Result<(u32, usize)> {
        let info = self.btf.word(self.at + 4)?;
        for number in 0..info & 0xffff {
            let at = self.at + 12 + number as usize * 12;
            if self.btf.string(self.btf.word(at)?)? == name {
                // In structures with bit fields, the upper byte is the width of the field.
                let bits = self.btf.word(at + 8)? & if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
                ensure!(bits % 8 == 0, "member {name} does not start at a byte boundary");
                return Ok((number, bits as usize / 8));
            }
        }
        anyhow::bail!("no member {name}")
    }

    /// Returns a member's offset in bytes.
    ///
    /// # Errors
    /// As for [`Struct::member`].
    pub fn offset(&self, name: &str) -> Result<usize> {
        Ok(self.member(name)?.1)
    }
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// Returns the bytes of a type after its first twelve.
fn details(info: u32) -> Result<usize> {
    let count = (info & 0xffff) as usize;
    Ok(match kind(info) {
        // Integer, variable, declaration tag.
        1 | 14 | 17 => 4,
        // Pointer, forward, typedef, qualifiers, function, float, type tag.
        2 | 7..=12 | 16 | 18 => 0,
        // Array.
        3 => 12,
        // Structure, union, section, 64-bit enumeration.
        4 | 5 | 15 | 19 => count * 12,
        // Enumeration, function prototype.
        6 | 13 => count * 8,
        other => anyhow::bail!("unknown kind of type in the kernel's BTF: {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn members_are_found_by_name() {
        let strings = b"\0sock\0rate\0mark\0";
        let types = words(&[
            0,
            1 << 24,
            4,
            32, // an integer
            1,
            4 << 24 | 2,
            16, // struct sock of 16 bytes with two members
            6,
            1,
            0, // rate at 0
            11,
            1,
            64, // mark at 8
        ]);
        let mut bytes = words(&[
            MAGIC | 1 << 16,
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ]);
        bytes.extend(types);
        bytes.extend(strings);
        let btf = Btf::parse(bytes.clone()).unwrap();
        let sock = btf.structure("sock").unwrap();
        assert_eq!((sock.id, sock.size().unwrap()), (2, 16));
        assert_eq!(sock.member("mark").unwrap(), (1, 8));
        assert!(sock.member("none").is_err());
        assert!(btf.structure("none").is_err());
        for len in 0..bytes.len() - strings.len() {
            assert!(Btf::parse(bytes[..len].to_vec()).is_err(), "cut at {len}");
        }
    }
}
