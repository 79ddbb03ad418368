#!/bin/sh
# Init of a guest: does what the word task=... of the kernel's command line says.
# Lines for tests begin with "guest: ".
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo "guest: init"
echo "guest: cpus=$(nproc)"
echo "guest: memory_kib=$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"

say_nvme() {
    for device in /sys/class/nvme/nvme*; do
        [ -e "$device" ] || continue
        name=${device##*/}
        bdf=$(basename "$(readlink -f "$device/device")")
        echo "guest: $name.bdf=$bdf"
        echo "guest: $name.model=$(sed 's/ *$//' "$device/model")"
        echo "guest: $name.serial=$(sed 's/ *$//' "$device/serial")"
        # With multipath, the disk belongs to a subsystem that has the serial as well.
        for block in /sys/block/nvme*; do
            disk=/dev/${block##*/}
            [ -e "$disk" ] && cmp -s "$block/device/serial" "$device/serial" && break
        done
        echo "guest: $name.bytes=$(($(cat "$block/size") * 512))"
        echo "guest: $name.sha256=$(dd if="$disk" bs=1M iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1)"
        grep "${name}q" /proc/interrupts | while read -r line; do
            echo "guest: $name.irq=$line"
        done
        # The sum over all of the disk's vectors and processors.
        echo "guest: $name.msix=$(grep "${name}q" /proc/interrupts | awk '{ for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }')"
        # It looks for a module index, of which there is none.
        lspci -nn -s "$bdf" 2>/dev/null
        lspci -vv -s "$bdf" 2>/dev/null
    done
}

# For the bench: between the two lines nothing is written, and the first disk is read 8 times.
read_nvme_silently() {
    while [ ! -b /dev/nvme0n1 ]; do sleep 0.1; done
    echo "guest: reading"
    sleep 1
    for pass in 1 2 3 4 5 6 7 8; do
        dd if=/dev/nvme0n1 of=/dev/null bs=1M iflag=direct 2>/dev/null || echo "guest: bad disk"
    done
    sleep 1
    echo "guest: read"
}

# For the bench: 10,000 blocks of its disk are read, or 10,000 packets go to 10.9.0.1 and back; between the two lines
# nothing is written.
keep_busy() {
    until disk=$(ls /dev/nvme0n1 /dev/sda 2>/dev/null); [ "$disk" ] || [ -e /sys/class/net/eth0/device ]; do
        sleep 0.1
    done
    if [ ! "$disk" ]; then
        ip address add 10.9.0.2/24 dev eth0 && ip link set eth0 up
        until ping -q -c 1 -W 1 10.9.0.1 >/dev/null; do :; done
    fi
    before=$(interrupts)
    echo "guest: begins"
    sleep 1
    if [ "$disk" ]; then
        for pass in 1 2 3 4 5; do
            dd if=$disk of=/dev/null bs=4k count=2000 iflag=direct 2>/dev/null && operations=$((operations + 2000))
        done
    else
        echoed=$(ping -q -A -c 5000 10.9.0.1 | grep -o '[0-9]* packets received')
        operations=$((${echoed%% *} * 2))
    fi
    after=$(interrupts)
    sleep 1
    echo "guest: did operations=$operations interrupts=$((after - before)) vectors=$(vectors)"
    sleep 1000000
}
vectors() {
    grep -cE 'nvme0q|ahci|eth0' /proc/interrupts
}
interrupts() {
    awk '/nvme0q|ahci|eth0/ { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' /proc/interrupts
}

# For the demo: commands as at a prompt, each with what it prints, and then a line is waited for.
at_prompt() {
    echo "guest# $*"
    "$@"
}
show_disk() {
    for try in $(seq 100); do
        [ -b /dev/nvme0n1 ] && break
        sleep 0.1
    done
    at_prompt uname -r
    # It looks for a module index, of which there is none.
    at_prompt lspci -k -s 01:00.0 2>/dev/null
    at_prompt cat /sys/class/nvme/nvme0/serial
    at_prompt sha256sum /dev/nvme0n1
    at_prompt grep nvme /proc/interrupts
    echo "guest: waits for a line"
    read -r -t 60 _
    echo "guest# poweroff -f"
}

# Of each network card of its own.
say_net() {
    for try in $(seq 50); do
        [ -e /sys/class/net/eth0/device ] && break
        sleep 0.1
    done
    for interface in /sys/class/net/*; do
        [ -e "$interface/device" ] || continue
        name=${interface##*/}
        echo "guest: $name.driver=$(basename "$(readlink -f "$interface/device/driver")")"
        echo "guest: $name.mac=$(cat "$interface/address")"
        ip link set "$name" up && echo "guest: $name.up=yes"
    done
}

case "$task" in
net) say_net ;;
demo) show_disk ;;
nvme) say_nvme ;;
read-silently) read_nvme_silently ;;
busy) keep_busy ;;
# For the bench: a line when the driver of a disk that comes later is ready.
watch)
    echo "guest: watches"
    grep -m 1 queues /dev/kmsg >/dev/null
    echo "guest: driver"
    sleep 1000000
    ;;
reboot) reboot -f ;;
# For people who try a VM of their own as well.
"" | shell) setsid cttyhack sh ;;
crash)
    # Debian's kernel has it as a module; the lab's says nothing when it panics.
    insmod /lib/pvpanic.ko 2>/dev/null && insmod /lib/pvpanic_mmio.ko
    echo c >/proc/sysrq-trigger
    ;;
spin) while :; do :; done ;;
sleep) sleep 1000000 ;;
esac
echo "guest: done"
poweroff -f
