//! Making guest RAM exist before it is needed: what takes most of the time until RAM is mapped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use gantry_devices::mapping::HostMapping;

use super::domain::RamRanges;
use crate::error::Error;
use crate::sandbox::Sandbox;
use crate::threads::{self, Role, Task};

/// Bytes that one thread takes at a time: a huge page. Meanwhile no thread of the process can map anything,
/// and those that open devices do: many pages at a time hold them up for as long as all the rest takes.
const PART: usize = 2 << 20;

/// RAM that is being made present. Dropping the value ends that soon.
pub struct Populating {
    work: Arc<Work>,
    threads: Vec<Task<()>>,
}

struct Work {
    /// Memory and offset of each part.
    parts: Vec<(Arc<HostMapping>, usize)>,
    next: AtomicUsize,
    dropped: AtomicBool,
    ending: Arc<AtomicBool>,
}

impl Populating {
    /// Begins with all of `ram`, on so many threads, if any; to be left off once the VM is `ending`.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn begin(
        ram: &RamRanges,
        threads: usize,
        ending: &Arc<AtomicBool>,
        sandbox: &Sandbox,
    ) -> Result<Self, Error> {
        let work = Arc::new(Work {
            parts: parts(ram),
            next: AtomicUsize::new(0),
            dropped: AtomicBool::new(false),
            ending: Arc::clone(ending),
        });
        let mut populating = Self {
            work: Arc::clone(&work),
            threads: Vec::new(),
        };
        for _ in 0..threads {
            let work = Arc::clone(&work);
            let thread = threads::spawn(Role::Dma, sandbox, move || work.go_on());
            let thread = thread.map_err(Error::host("spawn a thread"))?;
            populating.threads.push(thread);
        }
        Ok(populating)
    }

    /// Waits until all of it is there, or it is left off.
    pub fn finish(mut self) {
        self.threads.clear();
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        self.work.dropped.store(true, Ordering::Release);
    }
}

impl Work {
    fn go_on(&self) {
        while let Some((memory, offset)) = self.take() {
            if let Err(error) = memory.populate(*offset, PART) {
                // It comes to be when it is touched or mapped.
                tracing::info!(%error, "memory is not made present in advance");
                return;
            }
        }
    }

    fn take(&self) -> Option<&(Arc<HostMapping>, usize)> {
        if self.dropped.load(Ordering::Acquire) || self.ending.load(Ordering::Acquire) {
            return None;
        }
        self.parts.get(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

fn parts(ram: &RamRanges) -> Vec<(Arc<HostMapping>, usize)> {
    let of = |memory: &Arc<HostMapping>| {
        let memory = Arc::clone(memory);
        let offsets = (0..memory.size()).step_by(PART);
        offsets.map(move |offset| (Arc::clone(&memory), offset))
    };
    ram.iter().flat_map(|(_, memory)| of(memory)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::SeccompMode;

    #[test]
    fn all_of_it_is_there_in_the_end() {
        let memory = |len| Arc::new(HostMapping::anonymous(len, 2 << 20).unwrap());
        let (small, large) = (memory(4 << 10), memory(PART + (2 << 20)));
        let ram: RamRanges = [(0, small), (1 << 20, large)].into();
        assert_eq!(parts(&ram).len(), 3);
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let ending = Arc::default();
        let populating = Populating::begin(&ram, 2, &ending, &sandbox).unwrap();
        let work = Arc::clone(&populating.work);
        populating.finish();
        assert!(work.take().is_none());
        assert!(work.next.load(Ordering::Relaxed) >= 3);
    }
}
