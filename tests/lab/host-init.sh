#!/bin/sh
# Init of the lab host: mounts, modules, the agent; it restarts when the agent ends.
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts -o ptmxmode=666 pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
hostname lab
ip link set lo up
ulimit -c 0
# Debian's modprobe, where it is there, reads an index of its own; the shell's depmod makes none.
[ -e /bin/kmod ] && /bin/depmod
# Built in, or there as modules, depending on the kernel.
for module in kvm_amd vfio_iommu_type1 vfio_pci; do
    modprobe $module 2>/dev/null
done
disk=$(grep -ls GANTRY-DEBIAN /sys/class/nvme/nvme*/serial) && ln -s "$(basename "${disk%/*}")n1" /dev/debian
# KVM compares the TSC's frequency as measured when it was loaded with the one refined later. Where
# they differ by more than this, it fails to scale the guests' TSC and their timers never fire.
echo 100000 >/sys/module/kvm/parameters/tsc_tolerance_ppm
# Not in the background, where a shell makes its children ignore ^C; the waiting shell reaps the
# orphans that end up here.
lab-agent
# With the wire to it gone, the lab is of no use. It restarts, which ends QEMU in another way than a
# poweroff that was asked for.
echo "<2>lab: the agent ended with status $?" >/dev/kmsg
reboot -f
