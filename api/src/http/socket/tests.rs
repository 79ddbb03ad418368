//! The socket: who may connect, and whose place it is.

use std::os::unix::net::UnixStream;

use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_socket_is_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_of(&dir.path().join("run"), "web");
    let socket = Socket::bind(&path, None, dir.path()).unwrap();
    assert_eq!(mode(socket.path()), 0o600);
    assert!(UnixStream::connect(&path).is_ok());
}

#[test]
fn who_is_out_of_sight_is_nobody_to_be_killed() {
    assert_eq!([7, 0, -1].map(process), [Some(7), None, None]);
}

/// The other process of the next test, which has a umask of 077.
#[test]
#[ignore = "run by a_folder_that_a_user_names_is_made_as_the_user_makes_folders"]
fn make_folders_anew() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    for (folder, wanted) in [(run.join("more"), 0o755), (dir.path().join("own"), 0o700)] {
        Socket::bind(&path_of(&folder, "web"), None, &run).unwrap();
        assert_eq!(mode(&folder), wanted, "{}", folder.display());
    }
}

#[test]
fn a_folder_that_a_user_names_is_made_as_the_user_makes_folders() {
    let name = "http::socket::tests::make_folders_anew";
    let run = std::process::Command::new("sh")
        .args(["-c", r#"umask 077; exec "$0" "$@""#])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", name])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn a_group_gets_it_where_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_of(dir.path(), "web");
    let own = nix::unistd::getgid().to_string();
    let _socket = Socket::bind(&path, Some(&own), dir.path()).unwrap();
    assert_eq!(mode(&path), 0o660);
    let error = Socket::bind(&path, Some("no-such-group"), dir.path()).unwrap_err();
    assert!(error.to_string().contains("\"no-such-group\""), "{error}");
}

#[test]
fn a_stale_one_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_of(dir.path(), "web");
    drop(Socket::bind(&path, None, dir.path()).unwrap());
    assert!(is_stale(&path), "the file outlives the listener");
    let live = Socket::bind(&path, None, dir.path()).unwrap();
    let error = Socket::bind(&path, None, dir.path()).unwrap_err();
    let own = Some(std::process::id());
    assert!(
        matches!(error, SocketError::Live { pid, .. } if pid == own),
        "{error}"
    );
    remove_stale(&path, dir.path()).unwrap();
    assert!(path.exists() && UnixStream::connect(&path).is_ok());
    drop(live);
    remove_stale(&path, dir.path()).unwrap();
    assert!(!path.exists());
}

#[test]
fn what_a_killed_process_of_the_same_number_left_is_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    let left = dir.path().join(format!(".{}", std::process::id()));
    fs::create_dir(&left).unwrap();
    drop(UnixListener::bind(left.join("s")).unwrap());
    Socket::bind(&path_of(dir.path(), "web"), None, dir.path()).unwrap();
    assert!(!left.exists());
}

#[test]
fn who_was_killed_is_dying_and_who_runs_is_not() {
    assert!(!is_dying(std::process::id()));
    assert!(is_exiting("12 (a) b) Z 1 12 12 0 -1 4194308 0"));
    assert!(!is_exiting("12 (a) b) S 1 12 12 0 -1 4194304 0"));
    assert!(has_kill_pending("Name:\tx\nSigPnd:\t0000000000000100\n"));
    assert!(!has_kill_pending("SigPnd:\t0000000000004000\nShdPnd:\t0\n"));
    let mut child = std::process::Command::new("sleep")
        .arg("100")
        .spawn()
        .unwrap();
    assert!(!is_dying(child.id()));
    child.kill().unwrap();
    // Not waited for yet.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_dying(child.id()) && Instant::now() < deadline {}
    assert!(is_dying(child.id()));
    child.wait().unwrap();
    assert!(is_dying(child.id()));
}

#[test]
fn it_is_others_turn_while_somebody_dies() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_of(dir.path(), "web");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = std::cell::Cell::new(Some(listener));
    let looks = std::cell::Cell::new(0);
    let dies = |pid| {
        assert_eq!(pid, std::process::id());
        let lock = File::open(dir.path().join("sockets.lock")).unwrap();
        lock.try_lock().unwrap();
        looks.set(looks.get() + 1);
        if looks.get() == 5 {
            drop(listener.take());
        }
        true
    };
    let turn = wait_until_free(&path, dir.path(), dies).unwrap().unwrap();
    assert_eq!(looks.get(), 5);
    let lock = File::open(dir.path().join("sockets.lock")).unwrap();
    assert!(lock.try_lock().is_err(), "it is whose turn it is");
    drop(turn);
    lock.try_lock().unwrap();
}

#[test]
fn who_was_dying_when_its_queue_filled_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_of(dir.path(), "web");
    let listener = UnixListener::bind(&path).unwrap();
    socket::listen(&listener, socket::Backlog::new(4).unwrap()).unwrap();
    let queue = std::cell::RefCell::new((Some(listener), Vec::new()));
    let dies = |_| {
        let (listener, waiting) = &mut *queue.borrow_mut();
        match waiting.is_empty() {
            true => waiting.extend((0..100_000).map_while(|_| connect(&path))),
            false => drop(listener.take()),
        }
        true
    };
    wait_until_free(&path, dir.path(), dies).unwrap();
    assert!(queue.borrow().0.is_none(), "it was full");
}

/// Without waiting; kept open by what comes back.
fn connect(path: &Path) -> Option<std::os::fd::OwnedFd> {
    let (family, kind) = (AddressFamily::Unix, SockType::Stream);
    let socket = socket::socket(family, kind, SockFlag::SOCK_NONBLOCK, None).ok()?;
    let address = UnixAddr::new(path).ok()?;
    socket::connect(socket.as_raw_fd(), &address).ok()?;
    Some(socket)
}

#[test]
fn a_live_one_with_a_full_queue_is_live() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_of(dir.path(), "web");
    let _listener = UnixListener::bind(&path).unwrap();
    // As many as net.core.somaxconn takes; more would have to wait.
    let waiting: Vec<_> = (0..100_000).map_while(|_| connect(&path)).collect();
    assert!(!waiting.is_empty());
    assert!(!is_stale(&path));
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.json");
    fs::write(&path, "{}").unwrap();
    let error = Socket::bind(&path, None, dir.path()).unwrap_err();
    assert!(matches!(error, SocketError::NoSocket { .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "{}");
    let names = fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(
        names,
        ["sockets.lock", "vm.json"],
        "nothing of an attempt stays"
    );
}
