//! Claims of interfaces: at most one instance intercepts an interface, and the next one takes over from it without a gap.
//!
//! A claim is a file below the runtime directory that its process has locked by flock(2). The lock ends with the process,
//! however the process ends. The files are named by network namespace and interface, since namespaces share file
//! systems; each contains its owner's process id, for messages and to find its socket for takeovers. The directory is open
//! to the daemon's user only, so that no other user can hold a lock there, or listen.
//!
//! With `--takeover` the next instance requests the claims by that socket once it is set up beside the running instance:
//! from then on both would intercept. The earlier instance stops intercepting, and passes its locked descriptors on
//! (`SCM_RIGHTS`). The lock belongs to the open file description, so that the claims are free at no moment.

pub use crate::wire::claims::{
    claim::Claims,
    directory::{Directory, RUNTIME_DIRECTORY},
    predecessor::Predecessor,
    successor::{Requests, Successor},
};

mod claim;
mod directory;
mod lock;
mod predecessor;
mod protocol;
mod successor;

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        io,
        os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
        path::{Path, PathBuf},
        process,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread,
    };

    use tokio::{
        net::{UnixListener, UnixStream},
        time::timeout,
    };

    use super::*;
    use crate::wire::claims::{
        directory::{DIRECTORY_MODE, NAME},
        lock::{Lock, lock, open_claim, own_process},
        protocol::{DESCRIPTORS_MAX, PATIENCE},
        successor::ASKING_MAX,
    };

    /// A runtime directory, removed in the end.
    struct Runtime(PathBuf);

    impl Runtime {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pepsal-claims-{}-{name}", process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }

        fn open(&self) -> Directory {
            Directory::open(&self.0).unwrap()
        }

        fn files(&self) -> Vec<String> {
            let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
            fs::read_dir(self.0.join(NAME)).unwrap().map(name).collect()
        }
    }

    impl Drop for Runtime {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_claim_excludes_others_and_names_its_process_until_it_is_dropped() {
        let runtime = Runtime::new("exclusive");
        let directory = runtime.open();
        let claims = Claims::acquire(&directory, &names(&["a", "b", "a"])).unwrap();
        let error = Claims::acquire(&directory, &names(&["c", "b"]))
            .unwrap_err()
            .to_string();
        let own = process::id();
        let expected =
            format!("interface b: another pepsal (process {own}) intercepts it already: stop that");
        assert!(error.starts_with(&expected), "{error}");
        assert_eq!(runtime.files().len(), 2, "the claim of c is released again");
        drop(claims);
        assert_eq!(runtime.files(), [""; 0]);
        drop(Claims::acquire(&directory, &names(&["a", "b"])).unwrap());
    }

    #[test]
    fn a_file_that_nobody_has_locked_is_no_claim() {
        let runtime = Runtime::new("stale");
        let directory = runtime.open();
        fs::write(directory.claim_path("a"), "1\n").unwrap();
        assert!(directory.is_alone());
        let claims = Claims::acquire(&directory, &names(&["a"])).unwrap();
        let text = fs::read_to_string(directory.claim_path("a")).unwrap();
        assert_eq!(text, format!("{}\n", process::id()));
        drop(claims);
    }

    #[test]
    fn claims_of_other_namespaces_do_not_count() {
        let runtime = Runtime::new("namespaces");
        let directory = runtime.open();
        let other = Directory {
            namespace: directory.namespace + 1,
            ..directory.clone()
        };
        let claims = Claims::acquire(&other, &names(&["a"])).unwrap();
        // Another process's, as far as its file shows.
        claims.0[0].file.write_all_at(b"1\n\0\0\0\0\0", 0).unwrap();
        claims.0[0].file.set_len(2).unwrap();
        assert!(directory.is_alone());
        assert!(!other.is_alone());
        drop(Claims::acquire(&directory, &names(&["a"])).unwrap());
    }

    #[test]
    fn directories_that_others_could_write_to_are_refused() {
        let runtime = Runtime::new("trust");
        let refusal = |path: &Path| Directory::open(path).unwrap_err().to_string();
        drop(runtime.open());
        let claims = runtime.0.join(NAME);
        assert_eq!(fs::metadata(&claims).unwrap().mode() & 0o777, DIRECTORY_MODE);
        for path in [&runtime.0, &claims] {
            let before = fs::metadata(path).unwrap().permissions();
            for mode in [0o770, 0o707] {
                fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
                let error = refusal(&runtime.0);
                assert!(error.contains("can be written to by other users"), "{error}");
            }
            fs::set_permissions(path, before).unwrap();
        }
        let link = Runtime::new("link");
        symlink(&runtime.0, &link.0).unwrap();
        assert!(refusal(&link.0).contains("is not a directory"));
        fs::remove_file(&link.0).unwrap();
        fs::remove_dir(&claims).unwrap();
        symlink("/", &claims).unwrap();
        assert!(refusal(&runtime.0).contains("is not a directory"));
        fs::remove_file(&claims).unwrap();
        let error = refusal(&runtime.0.join("a/b"));
        assert!(error.starts_with("cannot make "), "{error}");
    }

    #[test]
    fn a_link_in_the_place_of_a_claim_is_not_followed() {
        let runtime = Runtime::new("nofollow");
        let directory = runtime.open();
        let precious = runtime.0.join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, directory.claim_path("a")).unwrap();
        let error = Claims::acquire(&directory, &names(&["a"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("interface a: cannot lock its file"), "{error}");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_successor_gets_what_it_wants_and_the_claims_are_free_at_no_moment() {
        let runtime = Runtime::new("successor");
        let directory = runtime.open();
        let requests = Requests::listen(&directory).unwrap();
        let many: Vec<String> = (0..3 * DESCRIPTORS_MAX).map(|i| format!("if{i}")).collect();
        let claims = Claims::acquire(&directory, &[names(&["left"]), many.clone()].concat()).unwrap();
        let wanted = [names(&["new"]), many].concat();
        let predecessor = Predecessor::find(&directory, &wanted).unwrap().unwrap();
        assert_eq!(predecessor.process, own_process());

        // Somebody else tries for a claim all the time.
        let done = Arc::new(AtomicBool::new(false));
        let file = open_claim(&directory.claim_path("if7")).unwrap();
        let rival = thread::spawn({
            let done = done.clone();
            move || {
                while !done.load(Ordering::Relaxed) {
                    assert!(!lock(&file, Lock::Exclusive).unwrap());
                }
            }
        });
        let hand_over = async { requests.next().await.hand_over(claims).await };
        let (taken, ()) = tokio::join!(predecessor.take_over(), hand_over);
        done.store(true, Ordering::Relaxed);
        rival.join().expect("the claim is free at no moment");

        let taken = taken.unwrap();
        assert_eq!(taken.0.len(), wanted.len());
        assert!(wanted.iter().all(|name| taken.has(name)));
        assert!(!directory.claim_path("left").exists());
        let third = Claims::acquire(&directory, &names(&["left"])).unwrap();
        assert!(Claims::acquire(&directory, &names(&["if7"])).is_err());
        drop((taken, third, requests));
        assert_eq!(runtime.files(), [""; 0]);
    }

    #[tokio::test]
    async fn those_who_connect_and_stay_silent_do_not_keep_a_successor_waiting() {
        let runtime = Runtime::new("silent");
        let directory = runtime.open();
        let requests = Requests::listen(&directory).unwrap();
        let claims = Claims::acquire(&directory, &names(&["a"])).unwrap();
        let path = directory.socket_path(own_process());
        let mut silent = Vec::new();
        for _ in 0..ASKING_MAX - 1 {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        let predecessor = Predecessor::find(&directory, &names(&["a"])).unwrap().unwrap();
        let hand_over = async { requests.next().await.hand_over(claims).await };
        let both = async { tokio::join!(predecessor.take_over(), hand_over).0 };
        let taken = timeout(PATIENCE / 2, both).await.expect("nobody is waited for");
        assert_eq!(taken.unwrap().0.len(), 1);
    }

    #[tokio::test]
    async fn sockets_of_processes_that_are_gone_are_removed() {
        let runtime = Runtime::new("sockets");
        let directory = runtime.open();
        // Above the largest process id that there can be.
        let gone = directory.socket_path(1 << 23);
        drop(UnixListener::bind(&gone).unwrap());
        let lives = directory.socket_path(1);
        drop(UnixListener::bind(&lives).unwrap());
        // Left by a process that had this one's number.
        drop(UnixListener::bind(directory.socket_path(own_process())).unwrap());
        let requests = Requests::listen(&directory).unwrap();
        assert!(!gone.exists());
        assert!(lives.exists(), "a process that exists may be about to listen");
        drop(requests);
        assert_eq!(runtime.files().len(), 1);
    }
}
