#!/bin/sh
# drive HOW VENDOR:DEVICE [ARGUMENT]: drives a passed device by its driver, or its registers where it has none,
# and checks the data. The last line is "guest: drive=ok", or the reason in place of ok.
HOW=$1 ID=$2
shift 2

fail() {
    echo "guest: drive=$*"
    exit 1
}

# Waits up to 30 s for a command to succeed.
wait_for() {
    for try in $(seq 150); do
        "$@" && return
        sleep 0.2
    done
    return 1
}

# Sets DEVICE to the folder of the function with these ids that is the one to test.
find_device() {
    for folder in /sys/bus/pci/devices/*; do
        DEVICE=$(readlink -f "$folder")
        [ "$(cat "$DEVICE/vendor"):$(cat "$DEVICE/device")" = "0x${1%:*}:0x${1#*:}" ] && $TEST && return
    done
    return 1
}

# Sets NAME to what of a class is below the device: a disk, an interface, a terminal.
find_below() {
    for link in "/sys/$1"/*; do
        NAME=${link##*/}
        case $(readlink -f "$link") in "$DEVICE"/*) return ;; esac
    done
    return 1
}

# Memory decoding and bus mastering of a device without a driver; sets BAR to the address of its BAR number $1.
enable() {
    echo 1 >"$DEVICE/enable"
    printf '\006\000' | dd of="$DEVICE/config" bs=1 seek=4 conv=notrunc 2>/dev/null
    set_bar "$1"
}

set_bar() {
    BAR=$(sed -n "$(($1 + 1))p" "$DEVICE/resource" | cut -d' ' -f1)
}

# Number at this offset of the BAR, or to it.
peek() {
    echo $(($(devmem $((BAR + $1)) "${2:-32}")))
}
poke() {
    devmem $((BAR + $1)) "${3:-32}" "$2"
}

# A byte, or more, of the configuration space, as a number.
config() {
    echo $((0x$(xxd -p -s "$1" -l 1 "$DEVICE/config")))
}
set_config() {
    printf "$2" | dd of="$DEVICE/config" bs=1 seek="$1" conv=notrunc 2>/dev/null
}

sum() {
    sha256sum | cut -d' ' -f1
}

# The disk's contents have the checksum $1, and what is written to its last MiB is read again.
disk() {
    wait_for find_below block || fail "its disk does not appear"
    disk=/dev/$NAME
    found=$(dd if="$disk" bs=1M iflag=direct 2>/dev/null | sum)
    [ "$found" = "$1" ] || fail "its contents have the checksum $found"
    last=$(($(cat "/sys/block/$NAME/size") / 2048 - 1))
    dd if="$disk" of=/tmp/last bs=1M skip=$last iflag=direct 2>/dev/null
    dd if=/dev/urandom of=/tmp/new bs=1M count=1 2>/dev/null
    dd if=/tmp/new of="$disk" bs=1M seek=$last oflag=direct 2>/dev/null || fail "it cannot be written"
    echo 3 >/proc/sys/vm/drop_caches
    dd if="$disk" bs=1M skip=$last iflag=direct 2>/dev/null | cmp -s - /tmp/new || fail "it reads not what was written"
    dd if=/tmp/last of="$disk" bs=1M seek=$last oflag=direct 2>/dev/null
}

# A file that the neighbour 10.9.0.1 serves has the checksum $1, and 20 packets are echoed.
nic() {
    wait_for find_below class/net || fail "its interface does not appear"
    ip address add 10.9.0.2/24 dev "$NAME"
    ip link set "$NAME" up
    wait_for ping -q -c 1 -W 1 -I "$NAME" 10.9.0.1 >/dev/null || fail "its neighbour does not answer"
    echoed=$(ping -q -c 20 -i 0.05 -s 1400 -I "$NAME" 10.9.0.1 | grep -o '[0-9]* packets received')
    found=$(wget -q -O - http://10.9.0.1/data | sum)
    ip link set "$NAME" down
    ip address flush dev "$NAME"
    [ "$echoed" = "20 packets received" ] || fail "of 20 packets: $echoed"
    [ "$found" = "$1" ] || fail "the file that it carried has the checksum $found"
}

# The monitor's EDID is the one with the checksum $1, its memory keeps what is written, and the audio function
# leaves its reset.
display() {
    wait_for [ -e "$DEVICE/drm" ] || fail "no DRM driver"
    for edid in "$DEVICE"/drm/card*/card*/edid; do
        found=$(sum <"$edid")
    done
    [ "$found" = "$1" ] || fail "its EDID has the checksum $found"
    set_bar 0
    # Beyond what the driver draws.
    for at in $((0xc00000)) $((0xfffffc)); do
        poke $at $((0x600d0000 + at % 4096))
        [ "$(peek $at)" = $((0x600d0000 + at % 4096)) ] || fail "its memory keeps $(peek $at)"
    done
    find_device 8086:2668 || fail "no audio function"
    enable 0
    poke 8 0
    poke 8 1
    wait_for out_of_reset || fail "its audio function stays in reset"
}
out_of_reset() {
    [ "$(peek 8)" = 1 ]
}

# QEMU's docs/specs/edu.rst: computes, copies from and to memory beyond what the kernel uses, and its MSI, sent as
# an NMI, arrives.
edu() {
    enable 0
    poke 4 $((0x12345678))
    [ "$(peek 4)" = $((0xffffffff - 0x12345678)) ] || fail "its liveness check says $(peek 4)"
    poke 8 10
    wait_for [ "$(peek 8)" = 3628800 ] || fail "10! is $(peek 8)"
    memory=$(($1))
    devmem $memory 32 $((0x600dda7a))
    devmem $((memory + 4096)) 32 0
    copy $memory $((0x40000)) 1
    copy $((0x40000)) $((memory + 4096)) 3
    found=$(devmem $((memory + 4096)))
    [ $((found)) = $((0x600dda7a)) ] || fail "DMA left $found"
    # Address, data and enable of its MSI capability.
    cap=$(config 0x34)
    set_config $((cap + 4)) '\000\000\340\376\000\000\000\000'
    set_config $((cap + 12)) '\000\004'
    set_config $((cap + 2)) "\\$(printf %03o $(($(config $((cap + 2))) | 1)))"
    before=$(nmis)
    poke $((0x60)) 1
    wait_for more_nmis || fail "no MSI arrives"
    poke $((0x64)) 1
}
# From, to, command; its DMA takes 100 ms.
copy() {
    poke $((0x80)) "$1"
    poke $((0x88)) "$2"
    poke $((0x90)) 4
    poke $((0x98)) "$3"
    wait_for copied || fail "its DMA does not end"
}
copied() {
    [ $(($(peek $((0x98))) & 1)) = 0 ]
}
# Raises edu's pin, with MSI off: the interrupts of the line, which eth0 has too, go on until it is acknowledged.
pin() {
    enable 0
    ip link set eth0 up || fail "no eth0"
    before=$(of_eth0)
    poke $((0x60)) 1
    wait_for more_of_eth0 || fail "its pin raises no interrupt of the line of eth0"
    [ $(($(config 6) & 8)) = 8 ] || fail "its status shows no interrupt"
    poke $((0x64)) 1
    [ $(($(config 6) & 8)) = 0 ] || fail "its status still shows an interrupt"
    ip link set eth0 down
}
of_eth0() {
    grep eth0 /proc/interrupts | tr -s ' ' | cut -d' ' -f3
}
more_of_eth0() {
    [ "$(of_eth0)" -gt $((before + 1)) ]
}
nmis() {
    grep NMI: /proc/interrupts | tr -s ' ' | cut -d' ' -f3
}
more_nmis() {
    [ "$(nmis)" -gt "$before" ]
}

# QEMU's docs/specs/pci-testdev.rst, with a BAR 2 of $1 GiB: the first test of its BAR 0 counts a write.
testdev() {
    enable 0
    poke 0 0 8
    poke "$(peek 4)" "$(peek 8 8)" 8
    [ "$(peek 12)" = 1 ] || fail "it counts $(peek 12) writes"
}

# Linux's samples/vfio-mdev/mtty.c: an UART that receives what it sends. Its driver takes none without interrupts, so
# its I/O ports are accessed here.
mtty() {
    enable 0
    printf '\001\000' | dd of="$DEVICE/config" bs=1 seek=4 conv=notrunc 2>/dev/null
    for byte in 41 7e; do
        printf "\\x$byte" | dd of="$DEVICE/resource0" bs=1 conv=notrunc 2>/dev/null || fail "it sends nothing"
        found=$(dd if="$DEVICE/resource0" bs=1 count=1 2>/dev/null | xxd -p)
        [ "$found" = "$byte" ] || fail "it receives $found"
    done
}

# Linux's samples/vfio-mdev/mdpy-defs.h: its memory keeps what is written, first and last pixel.
mdpy() {
    enable 0
    pixels=$((($(config 0x48) + ($(config 0x49) << 8)) * ($(config 0x4c) + ($(config 0x4d) << 8))))
    [ $pixels -gt 0 ] || fail "it has no pixels"
    for at in 0 $((pixels * 4 - 4)); do
        poke $at $((0x600d0000 + pixels % 4096))
        [ "$(peek $at)" = $((0x600d0000 + pixels % 4096)) ] || fail "it keeps $(peek $at)"
    done
}

# Whether the BAR 2 of DEVICE has so many GiB.
has_gib() {
    sed -n 3p "$DEVICE/resource" | {
        read -r start end _
        [ $((end - start + 1)) = $(($1 << 30)) ]
    }
}

TEST=true
[ "$HOW" = testdev ] && TEST="has_gib $1"
wait_for find_device "$ID" || fail "the guest has no $ID"
$HOW "$@"
echo "guest: drive=ok"
