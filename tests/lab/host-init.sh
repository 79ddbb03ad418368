#!/bin/sh
# Init of the lab host: mounts, modules, the agent; off when the agent ends.
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
# Built in, or there as modules, depending on the kernel.
for module in kvm_amd vfio_iommu_type1 vfio_pci; do
    modprobe $module 2>/dev/null
done
# A child, waited for: the shell reaps the orphans that end up here.
lab-agent &
wait $!
poweroff -f
