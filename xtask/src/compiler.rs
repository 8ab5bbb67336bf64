//! Finds compilers that can build the eBPF object: with the source of the library, and new enough.

use std::{env, fmt, fs, path::PathBuf, process::Command, str::FromStr};

use anyhow::{Error, Result};

use crate::shell;

/// Returns the minimum version of the compiler, major and minor.
pub fn minimum() -> Version {
    env!("CARGO_PKG_RUST_VERSION")
        .parse()
        .expect("the workspace states its rust-version")
}

/// Major and minor version of a compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Self(major, minor)),
            _ => Err(Error::msg(format!("`{text}` is not a version"))),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// A compiler: the folder of its programs, and its versions.
pub struct Compiler {
    bin: PathBuf,
    release: Version,
    /// Major version of its LLVM, which the linker has to share.
    pub llvm: u32,
}

impl Compiler {
    /// Returns the compiler in a folder, if it exists with the source of its library and is new enough.
    fn find(bin: PathBuf) -> Option<Self> {
        let core = bin.parent()?.join("lib/rustlib/src/rust/library/core");
        if !core.is_dir() || !bin.join("cargo").is_file() {
            return None;
        }
        let about = shell::output(Command::new(bin.join("rustc")).arg("-vV")).ok()?;
        let (release, llvm) = parse_rustc(&about)?;
        (release >= minimum()).then_some(Self { bin, release, llvm })
    }

    pub fn system() -> Option<Self> {
        Self::find("/usr/bin".into())
    }

    pub fn nightly() -> Option<Self> {
        let home = env::var_os("RUSTUP_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(env::home_dir()?.join(".rustup")))?;
        let prefix = format!("nightly-{}-", env::consts::ARCH);
        fs::read_dir(home.join("toolchains"))
            .ok()?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .find_map(|entry| Self::find(entry.path().join("bin")))
    }

    /// Returns the path of one of its programs, which may not exist.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rustc {} from {}", self.release, self.bin.display())
    }
}

/// Parses release and LLVM's major version from the output of `rustc -vV`.
fn parse_rustc(about: &str) -> Option<(Version, u32)> {
    let field = |name| about.lines().find_map(|line| line.strip_prefix(name));
    let release = field("release: ")?.parse().ok()?;
    let Version(llvm, _) = field("LLVM version: ")?.parse().ok()?;
    Some((release, llvm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustc_tells_its_release_and_its_llvm() {
        let about = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
                     host: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_rustc(about), Some((Version(1, 96), 22)));
        assert_eq!(
            parse_rustc(&about.replace("1.96.0\n", "1.97.0-nightly\n")),
            Some((Version(1, 97), 22))
        );
        assert_eq!(parse_rustc("rustc 1.96.0"), None);
    }

    #[test]
    fn versions_compare_by_number() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert_eq!(version("1.96.0+dfsg1-1~deb12u2"), Version(1, 96));
        assert!(version("1.100") > version("1.99.1"));
        assert!("(none)".parse::<Version>().is_err());
    }
}
