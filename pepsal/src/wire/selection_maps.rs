//! The kernel's maps of the selection, which can be replaced while packets pass.
//!
//! Rules have a generation, which is part of every prefix's key. New rules are written beside the rules in effect; then one
//! word is changed, which the program reads once for each connection. So a connection is judged by the old rules or by the
//! new rules, never by none and never by a mixture. A program that had read the word before the change still finds its
//! rules: old rules are removed when the next generation is written.

use std::{io, thread};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, lpm_trie},
};
use pepsal_ebpf::{PortSet, PrefixKey};

use crate::wire::{object::take_map, selection::Selection};

/// The maps, and the rules that they contain.
pub struct SelectionMaps {
    destinations: LpmTrie<MapData, PrefixKey, u32>,
    sources: LpmTrie<MapData, PrefixKey, u32>,
    port_sets: HashMap<MapData, u32, PortSetPod>,
    generation: Array<MapData, u32>,
    holding: Option<Rules>,
    former: Option<Rules>,
}

/// Prefixes that are written or removed between two signs of life.
const BATCH: usize = 1000;

/// What is in the maps of one generation.
struct Rules {
    generation: u32,
    destinations: Vec<lpm_trie::Key<PrefixKey>>,
    sources: Vec<lpm_trie::Key<PrefixKey>>,
    /// The number of the first set of ports, and how many there are.
    port_sets: (u32, u32),
}

impl SelectionMaps {
    /// Takes the maps out of a loaded object. They contain no rule yet, so that no connection is intercepted.
    ///
    /// # Errors
    /// When the object has no such map.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            destinations: take_map(ebpf, "DESTINATIONS")?.try_into()?,
            sources: take_map(ebpf, "SOURCES")?.try_into()?,
            port_sets: take_map(ebpf, "PORT_SETS")?.try_into()?,
            generation: take_map(ebpf, "GENERATION")?.try_into()?,
            holding: None,
            former: None,
        })
    }

    /// Replaces the rules in effect. `alive` is called after every 1000 prefixes, for the heartbeat.
    ///
    /// # Errors
    /// When the kernel has no room for the new rules; the old ones stay in effect.
    pub fn install(&mut self, selection: &Selection, mut alive: impl FnMut()) -> Result<()> {
        if let Some(former) = self.former.take() {
            self.remove(&former, &mut alive);
        }
        let (generation, first_set) = self.holding.as_ref().map_or((0, 0), |rules| {
            let (first, sets) = rules.port_sets;
            (rules.generation.wrapping_add(1), first.wrapping_add(sets))
        });
        let mut rules = Rules {
            generation,
            destinations: Vec::new(),
            sources: Vec::new(),
            port_sets: (first_set, 0),
        };
        let written = self
            .write(selection, &mut rules, &mut alive)
            .and_then(|()| self.generation.set(0, generation, 0).map_err(Into::into));
        match written {
            Ok(()) => self.former = self.holding.replace(rules),
            Err(_) => self.remove(&rules, &mut alive),
        }
        written
    }

    fn write(&mut self, selection: &Selection, rules: &mut Rules, alive: &mut impl FnMut()) -> Result<()> {
        let first_set = rules.port_sets.0;
        for set in &selection.port_sets {
            let number = first_set.wrapping_add(rules.port_sets.1);
            insert_patiently(|| self.port_sets.insert(number, PortSetPod(**set), 0))
                .context("too many different sets of ports for the kernel")?;
            rules.port_sets.1 += 1;
            alive();
        }
        for (trie, prefixes, written) in [
            (
                &mut self.destinations,
                &selection.destinations,
                &mut rules.destinations,
            ),
            (&mut self.sources, &selection.sources, &mut rules.sources),
        ] {
            for (addr, len, set) in prefixes {
                let prefix = PrefixKey::new(rules.generation, *addr);
                let key = lpm_trie::Key::new(PrefixKey::GENERATION_BITS + len, prefix);
                insert_patiently(|| trie.insert(&key, first_set.wrapping_add(*set), 0))
                    .context("too many prefixes for the kernel")?;
                written.push(key);
                if written.len() % BATCH == 0 {
                    alive();
                }
            }
        }
        Ok(())
    }

    fn remove(&mut self, rules: &Rules, alive: &mut impl FnMut()) {
        // What could not be removed is of a generation that does not hold.
        for (trie, written) in [
            (&mut self.destinations, &rules.destinations),
            (&mut self.sources, &rules.sources),
        ] {
            for keys in written.chunks(BATCH) {
                keys.iter().for_each(|key| drop(trie.remove(key)));
                alive();
            }
        }
        let (first, sets) = rules.port_sets;
        for number in 0..sets {
            let _ = self.port_sets.remove(&first.wrapping_add(number));
        }
    }
}

/// The kernel keeps a few free elements at hand and fetches more a moment later: until then it says that there are none.
fn insert_patiently(mut insert: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    const TRIES: u32 = 100;
    for _ in 1..TRIES {
        match insert() {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::OutOfMemory => {
                thread::yield_now();
            }
            inserted => return inserted,
        }
    }
    insert()
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct PortSetPod(PortSet);

// SAFETY: an array of bytes.
unsafe impl aya::Pod for PortSetPod {}
