//! The running instance that this one takes over from.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    cmsg_space,
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
    time::timeout,
};

use crate::wire::claims::{
    claim::{Claim, Claims, Owner, Refusal},
    directory::Directory,
    protocol::{DESCRIPTORS_MAX, PATIENCE, RELEASED, TAKE_OVER},
};

/// The running instance that is taken over from.
#[derive(Debug)]
pub struct Predecessor {
    /// Process of the running instance.
    pub process: i32,
    directory: Directory,
    interfaces: Vec<String>,
    /// Claims of the interfaces that the running instance does not have.
    claims: Claims,
}

impl Predecessor {
    /// Returns the instance that has any of the interfaces, and claims the others.
    ///
    /// # Errors
    /// When they belong to more than one instance, or cannot be claimed.
    pub fn find(directory: &Directory, interfaces: &[String]) -> Result<Option<Self>> {
        let mut claims = Claims(Vec::new());
        let mut first: Option<(i32, &str)> = None;
        for name in interfaces {
            match (claims.add(directory, name), first) {
                (Ok(()), _) => {}
                (
                    Err(Refusal::Owned {
                        owner: Owner(Some(process)),
                        ..
                    }),
                    None,
                ) => first = Some((process, name)),
                (
                    Err(Refusal::Owned {
                        owner: Owner(Some(process)),
                        ..
                    }),
                    Some((other, its)),
                ) => ensure!(
                    process == other,
                    "cannot take over from both process {other} (interface {its}) and process {process} (interface \
                     {name}): stop one of them"
                ),
                (Err(error), _) => return Err(error.into()),
            }
        }
        Ok(first.map(|(process, _)| Self {
            process,
            directory: directory.clone(),
            interfaces: interfaces.to_vec(),
            claims,
        }))
    }

    /// Requests the running instance's claims, and releases those of interfaces that this instance does not intercept.
    ///
    /// # Errors
    /// When there is no answer in time; the running instance then goes on as before.
    pub async fn take_over(self) -> Result<Claims> {
        let process = self.process;
        let refused = || format!("process {process} does not let go: stop it, or start without --takeover");
        let path = self.directory.socket_path(process);
        let handed = timeout(PATIENCE, request(&path))
            .await
            .with_context(refused)?
            .with_context(refused)?;
        let mut claims = self.claims;
        for (interface, descriptor) in handed {
            let claim = Claim {
                path: self.directory.claim_path(&interface),
                file: descriptor.into(),
                interface,
            };
            match self.interfaces.contains(&claim.interface) {
                true => {
                    let signed = claim.sign();
                    signed.with_context(|| format!("cannot write to {}", claim.path.display()))?;
                    claims.0.push(claim);
                }
                false => claim.release(),
            }
        }
        // One that it had at the start may be released by now.
        for interface in &self.interfaces {
            claims.add(&self.directory, interface)?;
        }
        Ok(claims)
    }
}

/// Requests a takeover, and returns the interfaces that are handed over with their locked files.
async fn request(path: &Path) -> Result<Vec<(String, OwnedFd)>> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(TAKE_OVER).await?;
    let (mut said, mut descriptors) = (Vec::new(), Vec::new());
    while stream
        .async_io(Interest::READABLE, || {
            receive(&stream, &mut said, &mut descriptors)
        })
        .await?
        > 0
    {
        ensure!(said.len() < ANSWER_MAX, "the answer is too long");
    }
    let text = String::from_utf8(said)?;
    let names = text
        .strip_prefix(std::str::from_utf8(RELEASED)?)
        .ok_or_else(|| anyhow!("the answer is not that of a pepsal"))?;
    let names: Vec<String> = names.lines().map(str::to_owned).collect();
    if names.len() != descriptors.len() {
        bail!("{} interfaces with {} claims", names.len(), descriptors.len());
    }
    Ok(names.into_iter().zip(descriptors).collect())
}

/// Reads what there is, and returns its length in bytes; 0 at the end.
fn receive(stream: &UnixStream, said: &mut Vec<u8>, descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let mut space = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut data = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else knows them.
            descriptors.extend(
                received
                    .into_iter()
                    .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
            );
        }
    }
    let length = message.bytes;
    said.extend_from_slice(&buffer[..length]);
    Ok(length)
}

/// The longest answer, in bytes: more interfaces than a host has.
const ANSWER_MAX: usize = 1 << 20;
