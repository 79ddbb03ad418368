//! Model-specific registers: those that firmware would set, and all of them for a reboot.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Error, VcpuFd};

const TSC: u32 = 0x10;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const PAT: u32 = 0x277;
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// What VMX can do (Intel's manual, volume 3, appendix A).
const VMX: std::ops::RangeInclusive<u32> = 0x480..=0x491;
/// `VM_HSAVE_PA`: where SVM saves the host's state.
const SVM_HOST_SAVE: u32 = 0xc001_0117;

/// `IA32_MISC_ENABLE`: fast string instructions. Without it Linux does not use them.
const FAST_STRINGS: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: memory is write-back by default, and MTRRs are on.
const WRITE_BACK: u64 = 6 | 1 << 11;

/// MTRRs are emulated on every host, but not always listed: eight variable pairs, the fixed ones,
/// the default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    MTRR_DEF_TYPE..=MTRR_DEF_TYPE,
];

/// The registers to save for a reboot, out of those that KVM lists.
///
/// The TSC runs on over a reboot, or the vCPUs' would drift apart. Guests cannot reach Hyper-V's registers, and
/// writing one makes KVM set Hyper-V emulation up.
///
/// A guest that cannot run VMs has no registers of VMX and SVM.
pub fn saved(listed: &[u32], nested: bool) -> Vec<u32> {
    let mut indices: Vec<_> = listed
        .iter()
        .copied()
        .filter(|index| *index != TSC && !HYPER_V.contains(index))
        .filter(|index| nested || !(VMX.contains(index) || *index == SVM_HOST_SAVE))
        .chain(MTRRS.into_iter().flatten())
        .chain([PAT])
        .collect();
    indices.sort_unstable();
    indices.dedup();
    indices
}

/// Sets what firmware would have set.
pub fn set_up(vcpu: &VcpuFd) -> Result<(), Error> {
    let misc_enable = read(vcpu, &[MISC_ENABLE])?;
    let misc_enable = misc_enable.first().map_or(0, |entry| entry.data);
    let entries = [
        entry(MISC_ENABLE, misc_enable | FAST_STRINGS),
        entry(MTRR_DEF_TYPE, WRITE_BACK),
    ];
    match write(vcpu, &entries)?.first() {
        None => Ok(()),
        Some(_) => Err(Error::new(libc::EINVAL)),
    }
}

/// Reads `indices`, without those that this host or vCPU lacks.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut taken = Vec::with_capacity(indices.len());
    let entries: Vec<_> = indices.iter().map(|index| entry(*index, 0)).collect();
    each(&entries, |msrs| {
        let count = vcpu.get_msrs(msrs)?;
        taken.extend_from_slice(&msrs.as_slice()[..count]);
        Ok(count)
    })?;
    Ok(taken)
}

/// Writes `entries`; returns those that could not be written.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<Vec<u32>, Error> {
    each(entries, |msrs| vcpu.set_msrs(msrs))
}

/// The TSC in step with the other vCPUs': to KVM, a zero written from outside means that.
pub fn synchronize_tsc(vcpu: &VcpuFd) -> Result<(), Error> {
    write(vcpu, &[entry(TSC, 0)]).map(drop)
}

/// Passes `entries` to an ioctl that stops at the first one that it refuses, and continues after that one.
/// Returns the refused ones.
fn each(
    entries: &[kvm_msr_entry],
    mut ioctl: impl FnMut(&mut Msrs) -> Result<usize, Error>,
) -> Result<Vec<u32>, Error> {
    let mut refused = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let mut msrs = Msrs::from_entries(some).map_err(|_| Error::new(libc::ENOMEM))?;
        let done = ioctl(&mut msrs)?.min(some.len());
        if done < some.len() {
            refused.push(some[done].index);
        }
        rest = &rest[(done + 1).min(some.len())..];
    }
    Ok(refused)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_saved_registers_leave_the_clock_alone() {
        let listed = [
            0x6e0,
            TSC,
            0x4b56_4d01,
            0x4000_0000,
            0x4000_0118,
            0x277,
            0x174,
            0x480,
            SVM_HOST_SAVE,
        ];
        let of_nested = saved(&listed, true);
        assert!(of_nested.contains(&0x480) && of_nested.contains(&SVM_HOST_SAVE));
        let saved = saved(&listed, false);
        assert!(!saved.contains(&0x480) && !saved.contains(&SVM_HOST_SAVE));
        assert!(!saved.contains(&TSC));
        assert!(!saved.iter().any(|index| HYPER_V.contains(index)));
        for index in [
            0x174,
            0x6e0,
            0x4b56_4d01,
            0x200,
            0x20f,
            0x26f,
            MTRR_DEF_TYPE,
        ] {
            assert!(saved.contains(&index), "{index:#x}");
        }
        assert_eq!(saved.iter().filter(|index| **index == PAT).count(), 1);
    }

    /// An ioctl that refuses multiples of seven.
    fn picky(seen: &mut Vec<u32>, msrs: &Msrs) -> usize {
        let good = msrs
            .as_slice()
            .iter()
            .take_while(|entry| !entry.index.is_multiple_of(7));
        let before = seen.len();
        seen.extend(good.map(|entry| entry.index));
        seen.len() - before
    }

    #[test]
    fn refused_registers_are_stepped_over() {
        for count in [0, 1, 7, 8, 300, 1000] {
            let entries: Vec<_> = (1..=count).map(|index| entry(index, 0)).collect();
            let mut seen = Vec::new();
            let refused = each(&entries, |msrs| Ok(picky(&mut seen, msrs))).unwrap();
            let is_refused = |index: &u32| index.is_multiple_of(7);
            assert_eq!(refused, (1..=count).filter(is_refused).collect::<Vec<_>>());
            assert_eq!(
                seen,
                (1..=count).filter(|i| !is_refused(i)).collect::<Vec<_>>()
            );
        }
    }
}
