//! Names of vendors, devices and classes from pci.ids, in the form that the build script writes.

mod key;

pub(crate) use key::Key;
use key::{RECORD, parts};

static TEXT: &str = include_str!(concat!(env!("OUT_DIR"), "/names.txt"));
static TABLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/names.table"));

/// The name that `key` has in pci.ids.
pub(crate) fn name(key: Key) -> Option<&'static str> {
    let (records, _) = TABLE.as_chunks::<RECORD>();
    let found = records
        .binary_search_by_key(&key.code(), |record| parts(*record).0)
        .ok()?;
    let (_, start, len) = parts(*records.get(found)?);
    TEXT.get(start..start + len)
}
