//! Access control lists of files (acl(5)): users besides the owner who may read and write.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;

/// Where the kernel has a list: a version, and entries of 8 bytes (linux/posix_acl_xattr.h).
const ATTRIBUTE: &str = "system.posix_acl_access";
const VERSION: [u8; 4] = 2_u32.to_le_bytes();
/// More than any list that is made by hand.
const MOST_BYTES: usize = 4096;
const READ_WRITE: u16 = 6;
/// The id of entries that have none.
const NOBODY: u32 = u32::MAX;

const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const OWNING_GROUP: u16 = 0x04;
const GROUP: u16 = 0x08;
/// The most that users, groups and the owning group may do.
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;

/// An entry. The kernel wants them in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    kind: u16,
    id: u32,
    may: u16,
}

/// Lets a user read and write a file, besides all who may.
///
/// # Errors
/// The file system has no lists (`Unsupported`), or the file is missing or not this user's.
pub(crate) fn allow(path: &Path, user: u32) -> io::Result<()> {
    change(path, |entries| {
        entries.retain(|entry| (entry.kind, entry.id) != (USER, user));
        entries.push(Entry {
            kind: USER,
            id: user,
            may: READ_WRITE,
        });
    })
}

/// Takes back what [`allow`] gave.
///
/// # Errors
/// As [`allow`].
pub(crate) fn withdraw(path: &Path, user: u32) -> io::Result<()> {
    change(path, |entries| {
        entries.retain(|entry| (entry.kind, entry.id) != (USER, user));
    })
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<Entry>)) -> io::Result<()> {
    let mut entries = read(path)?;
    change(&mut entries);
    entries.retain(|entry| entry.kind != MASK);
    let named = entries
        .iter()
        .any(|entry| matches!(entry.kind, USER | GROUP));
    if named {
        let masked = entries
            .iter()
            .filter(|entry| matches!(entry.kind, USER | OWNING_GROUP | GROUP));
        entries.push(Entry {
            kind: MASK,
            id: NOBODY,
            may: masked.fold(0, |all, entry| all | entry.may),
        });
    }
    entries.sort();
    let mut bytes = VERSION.to_vec();
    for Entry { kind, id, may } in entries {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(may.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    Ok(setxattr(path, ATTRIBUTE, &bytes, XattrFlags::empty())?)
}

fn read(path: &Path) -> io::Result<Vec<Entry>> {
    let mut bytes = [0; MOST_BYTES];
    let len = match getxattr(path, ATTRIBUTE, &mut bytes[..]) {
        Err(Errno::NODATA) => return of_mode(path),
        len => len?,
    };
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let list = bytes
        .get(..len)
        .and_then(|list| list.strip_prefix(&VERSION));
    let entries = list.ok_or_else(invalid)?.chunks_exact(8).map(|entry| {
        let half = |at: usize| entry.get(at..).and_then(<[u8]>::first_chunk);
        Some(Entry {
            kind: u16::from_le_bytes(*half(0)?),
            may: u16::from_le_bytes(*half(2)?),
            id: u32::from_le_bytes(*entry.get(4..)?.first_chunk()?),
        })
    });
    entries.collect::<Option<_>>().ok_or_else(invalid)
}

/// The entries of a file without a list.
fn of_mode(path: &Path) -> io::Result<Vec<Entry>> {
    let mode = fs::metadata(path)?.permissions().mode() as u16;
    let entry = |kind, shift: u32| Entry {
        kind,
        id: NOBODY,
        may: mode >> shift & 7,
    };
    Ok(vec![
        entry(OWNER, 6),
        entry(OWNING_GROUP, 3),
        entry(OTHERS, 0),
    ])
}

/// The users besides the owner who may read and write a file.
#[cfg(test)]
pub(crate) fn users(path: &Path) -> Vec<u32> {
    let entries = read(path).unwrap().into_iter();
    let users = entries.filter(|entry| (entry.kind, entry.may) == (USER, READ_WRITE));
    users.map(|entry| entry.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_and_go_and_nobody_else_gets_more() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mode = || fs::metadata(file.path()).unwrap().permissions().mode() & 0o777;
        let before = mode();
        assert_eq!(before & 0o077, 0);
        for user in [1001, 1000, 1001] {
            allow(file.path(), user).unwrap();
        }
        assert_eq!(users(file.path()), [1000, 1001]);
        // The group's bits are those of the mask now.
        assert_eq!(mode(), before | 0o060);
        // As udev does when it sets a mode.
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
        allow(file.path(), 1000).unwrap();
        assert_eq!(mode(), 0o660);
        withdraw(file.path(), 1001).unwrap();
        assert_eq!(users(file.path()), [1000]);
        withdraw(file.path(), 1000).unwrap();
        withdraw(file.path(), 1000).unwrap();
        assert_eq!((users(file.path()), mode()), (vec![], before));
        assert!(allow(Path::new("/nowhere/iommu"), 1000).is_err());
    }
}
