//! A line of the admin socket.

use pepsal::observe::admin::Asked;

/// It is understood or refused, in one line.
pub fn exercise(line: &[u8]) {
    if let Err(refusal) = Asked::parse(line) {
        assert!(!refusal.is_empty() && !refusal.contains('\n'), "{refusal:?}");
    }
}
