//! CPUID of a guest: the features that KVM supports, without those that cannot work, and the topology. APIC ids are
//! the numbers of the processors.
//!
//! Leaves are those of Intel's manual (volume 2, CPUID) and AMD's (volume 3, appendix E).

use crate::config::CpuConfig;
use crate::topology::Topology;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

type Entry = kvm_cpuid_entry2;

const HTT: u32 = 1 << 28;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const CMP_LEGACY: u32 = 1 << 1;

/// Features of SVM.
const SVM_LEAF: u32 = 0x8000_000a;
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;

/// Whether KVM offers guests to run VMs themselves.
pub fn offers_nested(supported: &[Entry]) -> bool {
    let has = |function, bit| {
        let mut entries = supported.iter();
        entries.any(|entry| entry.function == function && entry.ecx & bit != 0)
    };
    has(1, VMX) || has(0x8000_0001, SVM)
}

/// The CPUID leaves that all processors of a guest share, of those that KVM supports and the guest is offered.
pub fn common(supported: &[Entry], tsc_deadline: bool, offer: CpuConfig) -> Vec<Entry> {
    // Leaves of SGX, for which there is no memory, of encrypted memory, which is not supported, and of AMD's
    // extended topology, which the older leaves replace.
    let dropped = [0x12, 0x8000_001f, 0x8000_0026];
    let amx = has_tiles(supported);
    supported
        .iter()
        .filter(|entry| !dropped.contains(&entry.function))
        .filter(|entry| offer.nested || entry.function != SVM_LEAF)
        .filter(|entry| amx || !matches!(entry.function, 0x1d | 0x1e))
        .map(|entry| mask(entry, tsc_deadline, amx))
        .map(|entry| limit(entry, offer))
        .collect()
}

/// Takes away what the guest is not offered.
fn limit(mut entry: Entry, offer: CpuConfig) -> Entry {
    match entry.function {
        1 if !offer.nested => entry.ecx &= !VMX,
        0x8000_0001 if !offer.nested => entry.ecx &= !SVM,
        0x8000_0008 => {
            let bits = entry.eax & 0xff;
            let most = offer.max_phys_bits.map_or(bits, u32::from);
            set_bits(&mut entry.eax, 0..8, bits.min(most));
        }
        _ => {}
    }
    entry
}

fn mask(entry: &Entry, tsc_deadline: bool, amx: bool) -> Entry {
    const SGX: u32 = 1 << 2;
    const SGX_LAUNCH: u32 = 1 << 30;
    const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const AMX_FP16: u32 = 1 << 21;
    const AMX_COMPLEX: u32 = 1 << 8;

    let mut entry = *entry;
    match (entry.function, entry.index) {
        (1, _) => {
            // KVM lists the features of the local APIC only if it emulates the APIC itself.
            entry.ecx |= HYPERVISOR | X2APIC;
            entry.ecx &= !TSC_DEADLINE;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        (7, 0) => {
            entry.ebx &= !SGX;
            entry.ecx &= !SGX_LAUNCH;
            if !amx {
                entry.edx &= !AMX;
            }
        }
        (7, 1) if !amx => {
            entry.eax &= !AMX_FP16;
            entry.edx &= !AMX_COMPLEX;
        }
        _ => {}
    }
    entry
}

/// Whether guests may use AMX: KVM always lists its instructions, but its state only for a process that has
/// asked for it.
fn has_tiles(supported: &[Entry]) -> bool {
    const TILES: u32 = 1 << 17 | 1 << 18;
    let state = supported
        .iter()
        .find(|entry| entry.function == 0xd && entry.index == 0);
    state.is_some_and(|entry| entry.eax & TILES == TILES)
}

/// The leaves of processor `id`.
pub fn of_processor(common: &[Entry], id: u32, topology: &Topology) -> Vec<Entry> {
    let amd = is_amd(common);
    let basic_leaves = common
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    let mut entries: Vec<Entry> = common
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .map(|entry| place(entry, id, topology, amd))
        .collect();
    for function in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= basic_leaves) {
        entries.extend(extended_topology(function, id, topology));
    }
    entries
}

/// Puts a processor's place in the topology into a leaf.
fn place(entry: &Entry, id: u32, topology: &Topology, amd: bool) -> Entry {
    let mut entry = *entry;
    let threads = u32::from(topology.threads_per_core);
    let (count, ids) = (topology.per_package(), ids(topology.per_package()));
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | ids.min(255) << 16 | (id & 0xff) << 24;
            set(&mut entry.edx, HTT, count > 1);
        }
        4 if entry.eax & 0x1f != 0 => {
            share_cache(&mut entry, topology);
            let cores = ids >> bits(threads);
            set_bits(&mut entry.eax, 26..32, (cores - 1).min(63));
        }
        0x8000_0001 if amd => set(&mut entry.ecx, CMP_LEGACY, count > 1),
        0x8000_0008 if amd => {
            set_bits(&mut entry.ecx, 0..8, (count - 1).min(255));
            set_bits(&mut entry.ecx, 12..16, bits(count));
        }
        0x8000_001d if entry.eax & 0x1f != 0 => share_cache(&mut entry, topology),
        0x8000_001e => {
            let dies = u32::from(topology.dies_per_package);
            entry.eax = id;
            entry.ebx = id >> bits(threads) & 0xff | (threads - 1) << 8;
            // The die's number among those of all packages, and how many there are in one.
            entry.ecx = id >> bits(topology.per_die()) & 0xff | (dies - 1).min(7) << 8;
            entry.edx = 0;
        }
        _ => {}
    }
    entry
}

/// Caches from the third level on belong to the die, the others to a core. The descriptors of Intel's leaf 4 and of
/// AMD's 0x8000001d agree in this.
fn share_cache(entry: &mut Entry, topology: &Topology) {
    let level = entry.eax >> 5 & 7;
    let sharing = match level >= 3 {
        true => topology.per_die(),
        false => topology.threads_per_core.into(),
    };
    set_bits(&mut entry.eax, 14..26, ids(sharing) - 1);
}

/// Leaf 0xb or 0x1f: a level of threads, a level of cores, in leaf 0x1f one of dies if there are several, and the
/// end. The last level spans the package.
fn extended_topology(function: u32, id: u32, topology: &Topology) -> Vec<Entry> {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    const DIES: u32 = 5 << 8;
    let package = topology.per_package();
    let mut levels = vec![(topology.threads_per_core.into(), THREADS)];
    if function == 0x1f && topology.dies_per_package > 1 {
        levels.extend([(topology.per_die(), CORES), (package, DIES)]);
    } else {
        levels.push((package, CORES));
    }
    let mut levels: Vec<[u32; 3]> = levels
        .into_iter()
        .map(|(count, kind)| [bits(count), count, kind])
        .collect();
    levels.push([0; 3]);
    let entries = (0..).zip(levels);
    let entries = entries.map(|(index, [eax, ebx, kind])| Entry {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: id,
        ..Entry::default()
    });
    entries.collect()
}

/// Bits of an APIC id that number so many processors.
fn bits(count: u32) -> u32 {
    ids(count).trailing_zeros()
}

/// APIC ids that so many processors take.
fn ids(count: u32) -> u32 {
    count.next_power_of_two()
}

/// Bits of a guest-physical address (leaf 0x80000008).
pub fn physical_bits(entries: &[Entry]) -> u8 {
    /// Of processors without that leaf.
    const DEFAULT: u8 = 36;
    let leaf = entries.iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(DEFAULT, |entry| {
        let [all, _, guest, _] = entry.eax.to_le_bytes();
        // The second number is the width that nested paging can map, if that is less.
        if guest == 0 { all } else { all.min(guest) }
    })
}

fn is_amd(entries: &[Entry]) -> bool {
    let vendor = entries.iter().find(|entry| entry.function == 0);
    vendor.is_some_and(|entry| {
        let name = [entry.ebx, entry.edx, entry.ecx]
            .map(u32::to_le_bytes)
            .concat();
        name == b"AuthenticAMD" || name == b"HygonGenuine"
    })
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

fn set_bits(register: &mut u32, bits: std::ops::Range<u32>, value: u32) {
    let mask = ((1_u64 << bits.end) - (1_u64 << bits.start)) as u32;
    *register = (*register & !mask) | (value << bits.start & mask);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> Entry {
        let [eax, ebx, ecx, edx] = registers;
        Entry {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Entry::default()
        }
    }

    fn find(entries: &[Entry], function: u32, index: u32) -> [u32; 4] {
        let mut found = entries
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let entry = found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x} twice");
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    fn intel() -> Vec<Entry> {
        vec![
            entry(0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            entry(1, 0, [0x806f8, 0x0740_0800, 0, HTT]),
            entry(4, 0, [0xfc1b_c121, 0, 0, 0]),
            entry(4, 3, [0xfffb_c163, 0, 0, 0]),
            entry(4, 4, [0; 4]),
            entry(7, 0, [1, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff]),
            entry(7, 1, [0xffff_ffff, 0, 0, 0xffff_ffff]),
            entry(0xb, 0, [1, 2, 0x100, 77]),
            entry(0xd, 0, [0x207, 0, 0, 0]),
            entry(0x12, 0, [1, 1, 1, 1]),
            entry(0x1d, 0, [1, 0, 0, 0]),
            entry(0x1f, 0, [1, 2, 0x100, 77]),
            entry(
                0x4000_0000,
                0,
                [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
            ),
            entry(0x8000_0008, 0, [0x302e, 0, 0, 0]),
        ]
    }

    fn amd() -> Vec<Entry> {
        vec![
            entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(1, 0, [0xa10f11, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x30_3034, 0, 0x50ff, 0]),
            entry(0x8000_001d, 3, [0x3_c163, 0, 0, 0]),
            entry(0x8000_001e, 0, [9, 9, 9, 9]),
            entry(0x8000_001f, 0, [2, 0x33, 0, 0]),
            entry(0x8000_0026, 0, [1, 2, 3, 4]),
        ]
    }

    #[test]
    fn features_that_cannot_work_are_masked() {
        let entries = common(&intel(), true, CpuConfig::default());
        let [_, _, ecx, _] = find(&entries, 1, 0);
        assert_eq!(ecx, HYPERVISOR | X2APIC | TSC_DEADLINE);
        assert_eq!(
            find(&common(&intel(), false, CpuConfig::default()), 1, 0)[2],
            HYPERVISOR | X2APIC
        );
        assert_eq!(find(&entries, 7, 0), [1, !4, !(1 << 30), !0x0340_0000]);
        assert_eq!(find(&entries, 7, 1), [!(1 << 21), 0, 0, !0x100]);
        assert!(
            !entries
                .iter()
                .any(|entry| [0x12, 0x1d].contains(&entry.function))
        );
        assert_eq!(
            find(&entries, 0x4000_0000, 0),
            find(&intel(), 0x4000_0000, 0)
        );
        let entries = common(&amd(), true, CpuConfig::default());
        let dropped = [0x8000_001f, 0x8000_0026];
        assert!(
            !entries
                .iter()
                .any(|entry| dropped.contains(&entry.function))
        );
    }

    #[test]
    fn a_guest_runs_vms_only_if_it_is_offered() {
        let bits = |entries: &[Entry], function, bit: u32| {
            let mut found = entries.iter();
            found.any(|entry| entry.function == function && entry.ecx & bit != 0)
        };
        let vmx = [entry(1, 0, [0, 0, u32::MAX, 0])];
        let svm = [
            entry(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
            entry(SVM_LEAF, 0, [1, 8, 0, u32::MAX]),
        ];
        for (supported, leaf, bit) in [(&vmx[..], 1, VMX), (&svm[..], 0x8000_0001, SVM)] {
            assert!(offers_nested(supported));
            let plain = common(supported, true, CpuConfig::default());
            assert!(!bits(&plain, leaf, bit), "{leaf:#x}");
            assert!(!plain.iter().any(|entry| entry.function == SVM_LEAF));
            assert!(!offers_nested(&plain));
            let nested = CpuConfig {
                nested: true,
                ..CpuConfig::default()
            };
            let nested = common(supported, true, nested);
            assert!(bits(&nested, leaf, bit), "{leaf:#x}");
            assert_eq!(nested.len(), supported.len());
        }
    }

    #[test]
    fn addresses_have_at_most_so_many_bits() {
        let wide = [entry(0x8000_0008, 0, [0x30_3034, 0, 0, 0])];
        for (most, bits) in [(None, 48), (Some(46), 46), (Some(60), 48)] {
            let offer = CpuConfig {
                max_phys_bits: most,
                ..CpuConfig::default()
            };
            assert_eq!(physical_bits(&common(&wide, true, offer)), bits, "{most:?}");
        }
    }

    #[test]
    fn tiles_stay_where_the_process_may_use_them() {
        let mut supported = intel();
        supported
            .iter_mut()
            .find(|entry| entry.function == 0xd)
            .unwrap()
            .eax |= 3 << 17;
        let entries = common(&supported, true, CpuConfig::default());
        assert_eq!(find(&entries, 7, 0)[3], u32::MAX);
        assert_eq!(find(&entries, 0x1d, 0)[0], 1);
    }

    #[test]
    fn intel_topology_is_one_socket_of_single_threaded_cores() {
        let common = common(&intel(), true, CpuConfig::default());
        let third = of_processor(&common, 2, &Topology::flat(3));
        assert_eq!(find(&third, 1, 0)[1], 0x0204_0800);
        assert_eq!(find(&third, 1, 0)[3], HTT);
        assert_eq!(
            find(&third, 4, 0)[0],
            3 << 26 | 0x121,
            "first level: one core's own"
        );
        assert_eq!(
            find(&third, 4, 3)[0],
            3 << 26 | 3 << 14 | 0x163,
            "third level: shared"
        );
        assert_eq!(find(&third, 4, 4), [0; 4]);
        for leaf in [0xb, 0x1f] {
            assert_eq!(find(&third, leaf, 0), [0, 1, 0x100, 2]);
            assert_eq!(find(&third, leaf, 1), [2, 3, 0x201, 2]);
            assert_eq!(find(&third, leaf, 2), [0, 0, 2, 2]);
        }
        let only = of_processor(&common, 0, &Topology::flat(1));
        assert_eq!(find(&only, 1, 0)[1], 0x0001_0800);
        assert_eq!(find(&only, 1, 0)[3], 0);
        assert_eq!(find(&only, 0xb, 1), [0, 1, 0x201, 0]);
    }

    #[test]
    fn amd_topology_says_the_same() {
        let entries = of_processor(
            &common(&amd(), true, CpuConfig::default()),
            4,
            &Topology::flat(6),
        );
        assert_eq!(find(&entries, 0x8000_0001, 0)[2], CMP_LEGACY);
        assert_eq!(find(&entries, 0x8000_0008, 0), [0x30_3034, 0, 0x3005, 0]);
        assert_eq!(find(&entries, 0x8000_001d, 3)[0], 7 << 14 | 0x163);
        assert_eq!(find(&entries, 0x8000_001e, 0), [4, 4, 0, 0]);
        assert_eq!(find(&entries, 0xb, 1), [3, 6, 0x201, 4]);
        assert!(
            !entries.iter().any(|entry| entry.function == 0x1f),
            "beyond the last leaf"
        );
        let only = of_processor(
            &common(&amd(), true, CpuConfig::default()),
            0,
            &Topology::flat(1),
        );
        assert_eq!(find(&only, 0x8000_0001, 0)[2], 0);
    }

    /// Two packages of two dies of four cores of two threads.
    const DEEP: Topology = Topology {
        threads_per_core: 2,
        cores_per_die: 4,
        dies_per_package: 2,
        packages: 2,
    };

    #[test]
    fn intel_topology_tells_threads_cores_dies_and_packages_apart() {
        let common = common(&intel(), true, CpuConfig::default());
        // Package 1, die 1, core 2, thread 1.
        let one = of_processor(&common, 29, &DEEP);
        assert_eq!(find(&one, 1, 0)[1], 29 << 24 | 16 << 16 | 0x800);
        let of_core = 7 << 26 | 1 << 14 | 0x121;
        assert_eq!(find(&one, 4, 0)[0], of_core, "two threads share it");
        assert_eq!(find(&one, 4, 3)[0], 7 << 26 | 7 << 14 | 0x163, "a die's");
        assert_eq!(find(&one, 0xb, 0), [1, 2, 0x100, 29]);
        assert_eq!(find(&one, 0xb, 1), [4, 16, 0x201, 29]);
        assert_eq!(find(&one, 0xb, 2), [0, 0, 2, 29]);
        assert_eq!(find(&one, 0x1f, 0), [1, 2, 0x100, 29]);
        assert_eq!(find(&one, 0x1f, 1), [3, 8, 0x201, 29]);
        assert_eq!(find(&one, 0x1f, 2), [4, 16, 0x502, 29]);
        assert_eq!(find(&one, 0x1f, 3), [0, 0, 3, 29]);
    }

    #[test]
    fn amd_topology_tells_threads_cores_dies_and_packages_apart() {
        let one = of_processor(&common(&amd(), true, CpuConfig::default()), 29, &DEEP);
        assert_eq!(find(&one, 0x8000_0008, 0), [0x30_3034, 0, 0x400f, 0]);
        assert_eq!(find(&one, 0x8000_001d, 3)[0], 7 << 14 | 0x163);
        assert_eq!(find(&one, 0x8000_001e, 0), [29, 14 | 1 << 8, 3 | 1 << 8, 0]);
    }

    #[test]
    fn as_many_processors_as_there_can_be_have_numbers_of_their_own() {
        let common = common(&intel(), true, CpuConfig::default());
        for id in 0..254 {
            let one = of_processor(&common, id, &Topology::flat(254));
            assert_eq!(find(&one, 1, 0)[1], id << 24 | 0xff_0800);
            assert_eq!(find(&one, 4, 3)[0], 63 << 26 | 255 << 14 | 0x163);
            assert_eq!(find(&one, 0xb, 1), [8, 254, 0x201, id]);
        }
    }

    #[test]
    fn address_width_is_the_lesser_one() {
        assert_eq!(physical_bits(&intel()), 46);
        assert_eq!(physical_bits(&amd()), 48);
        assert_eq!(physical_bits(&[]), 36);
    }
}
