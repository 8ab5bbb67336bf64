//! Urgent bytes (RFC 9293, 3.8.5).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::thread;

use anyhow::Result;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::OobInline;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use pepsal_tests::{Bed, PATIENCE, eventually, receive_all, send_all};

use crate::{KIB, MIB, cases, payload};

/// Neither splice nor a read crosses an urgent byte; a receiver that has them in line finds it where it was sent.
#[test]
fn urgent_bytes_keep_their_place_and_their_mark() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        setsockopt(&receiver, OobInline, &true)?;
        let (before, after) = (payload(1, MIB), payload(2, MIB));
        let (received, marked) = thread::scope(|scope| -> Result<_> {
            let sending = scope.spawn(|| -> Result<()> {
                (&sender).write_all(&before)?;
                send(sender.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
                send_all(&sender, &after)?;
                Ok(())
            });
            let (mut received, mut marked) = (Vec::<u8>::new(), None);
            let mut buffer = vec![0; 64 * KIB];
            loop {
                // Once it is there, it is known for what it is.
                receiver.peek(&mut [0])?;
                if is_at_mark(&receiver)? {
                    marked = Some(received.len());
                }
                match (&receiver).read(&mut buffer)? {
                    0 => break,
                    bytes => received.extend(&buffer[..bytes]),
                }
            }
            sending.join().expect("no panic")?;
            Ok((received, marked))
        })?;
        assert_eq!(marked, Some(MIB), "{family:?} {from:?}");
        let sent = [&before[..], b"!", &after].concat();
        assert!(received == sent, "{family:?} {from:?}: {} bytes", received.len());
    }
    Ok(())
}

#[test]
fn urgent_byte_alone_arrives_at_once_and_out_of_band() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        for byte in *b"XYZ" {
            send(sender.as_raw_fd(), &[byte], MsgFlags::MSG_OOB)?;
            let mut urgent = [0];
            eventually(PATIENCE, || {
                let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT;
                recv(receiver.as_raw_fd(), &mut urgent, flags) == Ok(1)
            });
            assert_eq!(urgent, [byte], "{family:?} {from:?}");
        }
        send_all(&sender, b"the end")?;
        assert_eq!(receive_all(&receiver)?, b"the end", "{family:?} {from:?}");
    }
    Ok(())
}

/// `sockatmark` of POSIX.
fn is_at_mark(stream: &TcpStream) -> io::Result<bool> {
    const SIOCATMARK: libc::c_ulong = 0x8905;
    let mut at_mark: libc::c_int = 0;
    // SAFETY: the request writes one int.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), SIOCATMARK, &raw mut at_mark) };
    Errno::result(result)?;
    Ok(at_mark != 0)
}
