//! The links that have a profile, by the numbers that the programs know them by.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use crate::link::{budget::Budget, profile::LinkProfile};

/// A link that has a profile, and the legs that share it.
#[derive(Debug)]
pub struct Link {
    /// How its legs are tuned.
    pub profile: LinkProfile,
    /// How they share its rate.
    pub budget: Arc<Budget>,
}

/// The links that have or had a profile, numbered from one as the kernel side knows them. A number stays its interface's.
#[derive(Debug, Default)]
pub struct Links(RwLock<Numbered>);

#[derive(Debug, Default)]
struct Numbered {
    links: Vec<Arc<Link>>,
    /// By position: whether the link has its profile still.
    described: Vec<bool>,
    /// Interface index to position.
    by_ifindex: HashMap<u32, usize>,
}

impl Links {
    /// Takes the profiles.
    pub fn new(profiles: Vec<LinkProfile>) -> Self {
        let links = Self::default();
        links.replace(links.prepare(profiles));
        links
    }

    /// What the links would be with these profiles. A number that was given is never taken back, and its budget stays.
    pub fn prepare(&self, profiles: Vec<LinkProfile>) -> Prepared {
        let (mut links, count) = (self.all(), self.read().links.len());
        let mut described = vec![false; count];
        for profile in profiles {
            match position(&links, &profile.interface) {
                Some(position) => {
                    let budget = links[position].budget.clone();
                    links[position] = Arc::new(Link { profile, budget });
                    described[position] = true;
                }
                None => {
                    let budget = Arc::new(Budget::new(&profile));
                    links.push(Arc::new(Link { profile, budget }));
                    described.push(true);
                }
            }
        }
        Prepared { links, described }
    }

    /// Lets what was prepared hold from now on: for legs that start later, and its rates for those that are there too.
    pub fn replace(&self, prepared: Prepared) {
        let mut numbered = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for link in &prepared.links {
            link.budget.change(&link.profile);
        }
        numbered.links = prepared.links;
        numbered.described = prepared.described;
    }

    /// All of them, in the order of their numbers, those that have no profile any more too.
    pub fn all(&self) -> Vec<Arc<Link>> {
        self.read().links.clone()
    }

    /// Those that have a profile at present.
    pub fn current(&self) -> Vec<Arc<Link>> {
        let numbered = self.read();
        let links = numbered.links.iter().zip(&numbered.described);
        links
            .filter(|(_, is)| **is)
            .map(|(link, _)| link.clone())
            .collect()
    }

    /// The number of the link behind an interface, [`pepsal_ebpf::NO_LINK`] when it has no profile. From now on legs
    /// find it by the interface's index.
    pub fn bind(&self, ifindex: u32, interface: &str) -> u32 {
        let mut numbered = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(position) = position(&numbered.links, interface) else {
            return pepsal_ebpf::NO_LINK;
        };
        numbered.by_ifindex.insert(ifindex, position);
        match numbered.described[position] {
            true => position as u32 + 1,
            false => pepsal_ebpf::NO_LINK,
        }
    }

    /// Forgets an interface that is gone.
    pub fn unbind(&self, ifindex: u32) {
        let mut numbered = self.0.write().unwrap_or_else(PoisonError::into_inner);
        numbered.by_ifindex.remove(&ifindex);
    }

    /// The link behind the interface of an index.
    pub fn of(&self, ifindex: u32) -> Option<Arc<Link>> {
        let numbered = self.read();
        let position = *numbered.by_ifindex.get(&ifindex)?;
        numbered.described[position].then(|| numbered.links[position].clone())
    }

    fn read(&self) -> RwLockReadGuard<'_, Numbered> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Links that do not hold yet.
pub struct Prepared {
    /// All of them, in the order of their numbers.
    pub links: Vec<Arc<Link>>,
    described: Vec<bool>,
}

fn position(links: &[Arc<Link>], interface: &str) -> Option<usize> {
    links.iter().position(|link| link.profile.interface == interface)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{tcp::congestion::Congestion, units::Rate};

    fn profile(text: &str) -> LinkProfile {
        LinkProfile::derive(&text.parse().unwrap(), &Congestion::Bbr, Duration::from_secs(60))
    }

    #[test]
    fn a_profile_that_changes_keeps_its_number_and_its_budget() {
        let (a, b) = (profile("a,rate=5mbit,rtt=1s"), profile("b,rate=5mbit,rtt=1s"));
        let (other_b, c) = (profile("b,rate=9mbit,rtt=1s"), profile("c,rate=1mbit,rtt=1s"));
        let links = Links::new(vec![a, b]);
        let none = pepsal_ebpf::NO_LINK;
        assert_eq!((links.bind(7, "b"), links.bind(8, "c")), (2, none));
        let before = links.of(7).unwrap();
        links.replace(links.prepare(vec![c, other_b]));
        let now = links.of(7).unwrap();
        assert_eq!(now.profile.receive_rate.value, Rate::from_bps(9_000_000));
        assert!(Arc::ptr_eq(&before.budget, &now.budget));
        assert_eq!(
            (links.bind(9, "a"), links.bind(7, "b"), links.bind(8, "c")),
            (none, 2, 3)
        );
        assert!(links.of(9).is_none(), "it has no profile any more");
    }
}
