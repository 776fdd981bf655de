#!/bin/sh
# live-update.sh: carries a running guest through a change of this host's kernel, on a real host.
#
#   live-update.sh --guest-kernel FILE --next-kernel FILE [OPTIONS]    checks the host, starts a guest, updates
#   live-update.sh after [--name NAME]                                 under the next kernel: restores, tells the times
#
# Needs a kernel with CONFIG_LIVEUPDATE, booted with `kho=on liveupdate=on`, KVM, root, and `vmm` on PATH.
# Any POSIX shell will do, that of busybox in an initramfs too.
set -eu

name=demo memory=256M timeout=30 wait=120
guest_kernel='' guest_initrd='' guest_append='console=ttyS0 panic=-1' guest_log=''
next_kernel='' next_initrd='' next_append='' rehearse='' half=before

usage() {
    cat <<END
usage: live-update.sh --guest-kernel FILE --next-kernel FILE [OPTIONS]
       live-update.sh after [--name NAME]

The guest:
  --guest-kernel FILE    its kernel
  --guest-initrd FILE    its initial RAM file system
  --guest-append STRING  its command line                     ($guest_append)
  --guest-log FILE       where its serial port is written to  (/run/vmm-NAME.serial)
  --name NAME            its name                             ($name)
  --memory SIZE          its memory                           ($memory)
  --wait SECONDS         how long it may take to say anything ($wait)
The next kernel of this host:
  --next-kernel FILE     its image
  --next-initrd FILE     its initial RAM file system, which has to bring up this host as its present one did
  --next-append STRING   its command line                     (that of the running kernel)
  --timeout SECONDS      how long each phase may take         ($timeout)
  --rehearse             do everything but change the kernel
END
}

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'live-update.sh: %s\n' "$*" >&2; exit 1; }

if [ "${1:-}" = after ]; then half=after; shift; fi
while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) rehearse=--rehearse; shift; continue ;;
        --help | -h) usage; exit 0 ;;
    esac
    [ $# -ge 2 ] || { usage >&2; exit 2; }
    case $1 in
        --name) name=$2 ;;
        --memory) memory=$2 ;;
        --wait) wait=$2 ;;
        --timeout) timeout=$2 ;;
        --guest-kernel) guest_kernel=$2 ;;
        --guest-initrd) guest_initrd=$2 ;;
        --guest-append) guest_append=$2 ;;
        --guest-log) guest_log=$2 ;;
        --next-kernel) next_kernel=$2 ;;
        --next-initrd) next_initrd=$2 ;;
        --next-append) next_append=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[ -n "$guest_log" ] || guest_log=/run/vmm-$name.serial

command -v vmm >/dev/null || fail 'vmm is not on PATH'
[ "$(id -u)" = 0 ] || fail 'this needs root'

if [ "$half" = after ]; then
    say "restoring under kernel $(uname -r)"
    # 21 is no failure where a unit or the initramfs has restored already.
    status=0
    vmm restore --all || status=$?
    case $status in
        0 | 21) ;;
        22) vmm list; fail 'not all guests could be restored' ;;
        *) fail "vmm restore ended with status $status" ;;
    esac
    say "the way of guest $name from the last kernel to this one"
    vmm status "$name"
    exit 0
fi

[ -n "$guest_kernel" ] && [ -n "$next_kernel" ] || { usage >&2; exit 2; }

say "checking this host, kernel $(uname -r)"
for file in "$guest_kernel" "$guest_initrd" "$next_kernel" "$next_initrd"; do
    [ -z "$file" ] || [ -r "$file" ] || fail "cannot read $file"
done
case $(uname -m) in
    aarch64) no_kvm='has the firmware or the hypervisor started this kernel at EL2?' ;;
    *) no_kvm='load kvm_intel or kvm_amd, and see that virtualization is enabled in the firmware' ;;
esac
[ -c /dev/kvm ] || fail "there is no /dev/kvm: $no_kvm"
[ -c /dev/liveupdate ] || fail 'there is no /dev/liveupdate: boot a kernel with CONFIG_LIVEUPDATE and kho=on liveupdate=on (7.2 or newer)'
# Without it the guest's memory is handed over in pieces of 4 KiB instead of 2 MiB, which takes longer.
thp=/sys/kernel/mm/transparent_hugepage/shmem_enabled
if [ -w $thp ] && grep -q '\[never\]' $thp; then
    echo advise >$thp && echo "$thp set to advise"
fi
vmm list

say "starting guest $name, its serial port goes to $guest_log"
: >"$guest_log"
set -- run --name "$name" --kernel "$guest_kernel" --memory "$memory" --serial "file=$guest_log" --append "$guest_append"
[ -z "$guest_initrd" ] || set -- "$@" --initrd "$guest_initrd"
# Away from this terminal, so that the guest does not end with it.
if command -v setsid >/dev/null; then
    setsid vmm "$@" </dev/null >/dev/null 2>"$guest_log.vmm" &
else
    vmm "$@" </dev/null >/dev/null 2>"$guest_log.vmm" &
fi
guest=$!
second=0
while [ ! -s "$guest_log" ]; do
    kill -0 $guest 2>/dev/null || { cat "$guest_log.vmm" >&2; fail "guest $name has ended"; }
    [ $second -lt "$wait" ] || fail "guest $name has said nothing for $wait s"
    second=$((second + 1))
    sleep 1
done
# A few seconds more, so that it does something worth carrying over.
sleep 5
vmm status "$name"
tail -n 3 "$guest_log"

say "replacing this host's kernel by $next_kernel"
[ -n "$rehearse" ] || echo "Then, under it: live-update.sh after --name $name"
set -- update --kernel "$next_kernel" --timeout "$timeout"
[ -z "$next_initrd" ] || set -- "$@" --initrd "$next_initrd"
if [ -n "$next_append" ]; then set -- "$@" --append "$next_append"; else set -- "$@" --reuse-cmdline; fi
[ -z "$rehearse" ] || set -- "$@" --rehearse
# Returns only where the kernel was not changed.
vmm "$@"
