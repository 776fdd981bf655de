#!/bin/sh
# Init of the busybox guest. Once a second it looks for damage and prints one line in the oracle's protocol:
#   LINUX line n=<sequence> clock_ms=<uptime> ticks=<what a second process has counted> sum=<of a file in memory>
#   DAMAGE <what> <detail>
# On the kernel's command line:
#   lab.lines=N              ends the guest after N lines, ...
#   lab.end=poweroff|reboot  ... in this way
#   lab.disk=DEVICE          a disk of 16 MiB to write to and to read back; line n is said only when record n is on it for good
#   lab.rng=1                an entropy source
#   lab.cpus=N               how many processors it must find
#   lab.net=ADDRESS/BITS     its network card's address
#   lab.memory=MIB          memory to fill where there is some to spare, and to read back
#   lab.hog=MIB             memory that is taken once, as soon as there is not so much to spare
#   lab.data=DEVICE          a file system for /data
#   lab.load=KIND,OPTION,... a load, run by lab-load, which speaks for itself; any number of times
# An emulated host may have one processor for all guests, on which a fork costs tens of milliseconds: so there are few new processes.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp

lines=0 end=poweroff disk= rng= cpus= net= memory= hog= data= loads=
bad='BUG:|Oops|stalls? on|stall detected|stalled for|lockup|WARNING:|Call Trace|Machine check|unchecked MSR'
for word in $(cat /proc/cmdline); do
  case $word in
    lab.lines=*) lines=${word#*=} ;;
    lab.end=*) end=${word#*=} ;;
    lab.disk=*) disk=/dev/${word#*=} ;;
    lab.rng=*) rng=${word#*=} ;;
    lab.net=*) net=${word#*=} ;;
    lab.data=*) data=/dev/${word#*=} ;;
    lab.load=*) loads=1 ;;
    lab.cpus=*) cpus=${word#*=} ;;
    lab.memory=*) memory=${word#*=} ;;
    lab.hog=*) hog=${word#*=} ;;
  esac
done

milliseconds() { # of uptime
  read -r seconds _ < /proc/uptime
  hundredths=${seconds#*.}
  echo "${seconds%.*}${hundredths}0"
}
sum() { # of what it is given
  set -- $(sha256sum)
  printf %.16s "$1" # every character costs an exit to the monitor
}

# The disk: 8 places of 64 KiB, 256 KiB apart, written in turn and never flushed; from 2 MiB a page for a count, written past the page
# cache twice a second and never flushed; from 4 MiB a sector for each record, flushed.
count_on_disk() {
  count=0
  while :; do
    count=$((count + 1))
    echo "$count" > /tmp/count.new
    dd if=/tmp/count.new of="$disk" bs=4k seek=512 conv=sync,notrunc oflag=direct 2>/dev/null || echo "DAMAGE disk count=$count"
    mv /tmp/count.new /tmp/count
    sleep 0.5
  done
}
check_disk() {
  read -r least < /tmp/count
  found=$(dd if="$disk" bs=4k skip=512 count=1 iflag=direct 2>/dev/null | head -n 1 | tr -d '\0')
  [ "${found:-0}" -ge "$least" ] || echo "DAMAGE disk count=$found written=$least"
  echo 3 > /proc/sys/vm/drop_caches
  if [ -n "$place" ]; then
    back=$(dd if="$disk" bs=64k skip=$((4 * place)) count=1 2>/dev/null | sum)
    [ "$back" = "$block" ] || echo "DAMAGE disk place=$place sum=$back written=$block"
  fi
  dd if=/dev/urandom of=/tmp/block bs=64k count=1 2>/dev/null
  place=$((n % 8)) block=$(sum < /tmp/block)
  dd if=/tmp/block of="$disk" bs=64k seek=$((4 * place)) conv=notrunc 2>/dev/null || echo "DAMAGE disk place=$place"
  echo "record $n" > /tmp/record
  dd if=/tmp/record of="$disk" bs=512 seek=$((8192 + n)) conv=sync,notrunc,fsync 2>/dev/null || echo "DAMAGE disk record=$n"
}

# The processor may be a source of its own, so the one meant is asked for by its name.
rngs=/sys/class/misc/hw_random
check_rng() {
  echo virtio_rng.0 > "$rngs/rng_current" 2>/dev/null || echo "DAMAGE rng available=$(cat "$rngs/rng_available")"
  found=$(dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sum)
  [ "$found" != "$random" ] || echo "DAMAGE rng same=$found"
  random=$found
}
random=$(sum < /dev/null)

available() { # MiB of memory to spare
  awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo
}

# What takes it is killed unless somebody gives memory up for it.
take_memory() {
  [ "$(available)" -lt "$hog" ] || return 0
  if dd if=/dev/zero of=/dev/null bs="${hog}M" count=1 2>/dev/null; then
    echo "LOAD line n=1 of=hog mib=$hog"
  else
    echo "DAMAGE hog mib=$hog"
  fi
  hog=
}

# Filled with copies of the file, which stay until the next time. Then the memory is left free for longer than Linux waits (2 s)
# before it reports free memory to its host.
fills=0 filled=
copies() {
  copy=0
  while [ "$copy" -lt "$memory" ]; do
    copy=$((copy + 1))
    cat /tmp/file
  done
}
use_memory() {
  if [ -f /tmp/fill ]; then
    found=$(sum < /tmp/fill)
    [ "$found" = "$filled" ] || echo "DAMAGE memory sum=$found right=$filled"
    rm /tmp/fill
    fills=$((fills + 1))
    echo "LOAD line n=$fills of=memory mib=$memory"
  fi
  [ $((n % 4)) = 0 ] || return 0
  if [ "$(available)" -ge $((memory + 24)) ]; then
    [ -n "$filled" ] || filled=$(copies | sum)
    copies > /tmp/fill || rm /tmp/fill
  fi
}

dd if=/dev/urandom of=/tmp/file bs=64k count=16 2>/dev/null
right=$(sum < /tmp/file)
# What the kernel complains of is told at once.
cat /dev/kmsg | awk -F ';' "/$bad/ { print \"DAMAGE kernel \" \$2; fflush() }" &
# A second process shows that the scheduler and timers serve more than one.
echo 0 > /tmp/ticks
( ticks=0; while :; do ticks=$((ticks + 1)); echo "$ticks" > /tmp/ticks; sleep 1; done ) &
# Typed on the serial port, `poweroff` and `reboot` end the guest.
( while read -r typed; do case $typed in poweroff | reboot) exec "$typed" -f ;; esac; done ) < /dev/ttyS0 &

echo 0 > /tmp/count
place=
[ -z "$disk" ] || count_on_disk &
if [ -n "$net" ]; then
  ip addr add "$net" dev eth0 && ip link set eth0 up || echo "DAMAGE net address=$net"
fi
[ -z "$data" ] || mount -t ext4 "$data" /data || echo "DAMAGE data device=$data"
[ -z "$loads" ] || lab-load together &

online=$(grep -c '^processor' /proc/cpuinfo)
[ -z "$cpus" ] || [ "$cpus" = "$online" ] || echo "DAMAGE processors online=$online given=$cpus"

[ -z "$memory" ] || echo "LOAD start of=memory"
[ -z "$hog" ] || echo "LOAD start of=hog"
echo "LINUX start release=$(uname -r) sum=$right"
n=0 before=$(milliseconds) ticks_before=0 wall_before=$(date +%s)
while :; do
  n=$((n + 1))
  now=$(milliseconds)
  [ "$now" -ge "$before" ] || echo "DAMAGE clock now=$now before=$before"
  before=$now
  wall=$(date +%s)
  [ "$wall" -ge "$wall_before" ] || echo "DAMAGE wall-clock now=$wall before=$wall_before"
  wall_before=$wall
  # Right now it may be written anew, and empty.
  read -r ticks < /tmp/ticks || ticks=$ticks_before
  [ "$ticks" -ge "$ticks_before" ] || echo "DAMAGE ticks now=$ticks before=$ticks_before"
  ticks_before=$ticks
  sum=$(sum < /tmp/file)
  [ "$sum" = "$right" ] || echo "DAMAGE file sum=$sum right=$right"
  [ -z "$disk" ] || check_disk
  [ -z "$rng" ] || check_rng
  [ -z "$memory" ] || use_memory
  [ -z "$hog" ] || take_memory
  echo "LINUX line n=$n clock_ms=$now ticks=$ticks sum=$sum"
  if [ "$n" = "$lines" ]; then
    echo "LINUX end how=$end"
    "$end" -f
  fi
  sleep 1
done
