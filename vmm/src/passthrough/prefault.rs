//! Makes guest RAM present before it is mapped, which takes most of the time otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use gantry_devices::mapping::HostMapping;

use super::io_address_space::RamRanges;
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};

/// Bytes that a thread populates at a time: a huge page. Meanwhile no other thread of the process can map
/// memory, which opening a device needs: larger steps would delay it.
const PART: usize = 2 << 20;

/// Threads that make RAM present. Dropping the value ends them soon.
pub struct Prefault {
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

impl Prefault {
    /// Starts to populate `ram` on `threads` threads. They stop once the VM is `ending`.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn start(
        ram: &RamRanges,
        threads: usize,
        ending: &Arc<AtomicBool>,
        sandbox: &Sandbox,
    ) -> Result<Self, HostError> {
        let work = Arc::new(Work {
            parts: parts(ram),
            next: AtomicUsize::new(0),
            dropped: AtomicBool::new(false),
            ending: Arc::clone(ending),
        });
        let mut prefault = Self {
            work: Arc::clone(&work),
            threads: Vec::new(),
        };
        for _ in 0..threads {
            let work = Arc::clone(&work);
            let thread = threads::spawn(Role::Dma, sandbox, move || work.run());
            let thread = thread.map_err(cannot("spawn a thread"))?;
            prefault.threads.push(thread);
        }
        Ok(prefault)
    }

    /// Waits until all RAM is present, or the threads have stopped.
    pub fn finish(mut self) {
        self.threads.clear();
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.work.dropped.store(true, Ordering::Release);
    }
}

impl Work {
    fn run(&self) {
        while let Some((memory, offset)) = self.take() {
            if let Err(error) = memory.populate(*offset, PART) {
                // It becomes present when it is touched or mapped.
                tracing::info!(%error, "cannot prefault guest RAM");
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
    use crate::process::sandbox::SeccompMode;

    #[test]
    fn all_of_it_is_there_in_the_end() {
        let memory = |len| Arc::new(HostMapping::anonymous(len, 2 << 20).unwrap());
        let (small, large) = (memory(4 << 10), memory(PART + (2 << 20)));
        let ram: RamRanges = [(0, small), (1 << 20, large)].into();
        assert_eq!(parts(&ram).len(), 3);
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let ending = Arc::default();
        let prefault = Prefault::start(&ram, 2, &ending, &sandbox).unwrap();
        let work = Arc::clone(&prefault.work);
        prefault.finish();
        assert!(work.take().is_none());
        assert!(work.next.load(Ordering::Relaxed) >= 3);
    }
}
