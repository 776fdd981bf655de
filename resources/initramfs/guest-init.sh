#!/bin/sh
# Init of the busybox guest. Once a second it looks for damage and prints one line in the oracle's protocol:
#   LINUX line n=<sequence> clock_ms=<uptime> ticks=<what a second process has counted> sum=<of a file in memory>
#   DAMAGE <what> <detail>
# On the kernel's command line: lab.lines=N ends the guest after N lines, lab.end=poweroff|reboot says how.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp

lines=0 end=poweroff
bad='BUG:|Oops|stalls? on|stall detected|stalled for|lockup|WARNING:|Call Trace|Machine check|unchecked MSR'
for word in $(cat /proc/cmdline); do
  case $word in
    lab.lines=*) lines=${word#*=} ;;
    lab.end=*) end=${word#*=} ;;
  esac
done

milliseconds() { # of uptime
  read -r seconds _ < /proc/uptime
  hundredths=${seconds#*.}
  echo "${seconds%.*}${hundredths}0"
}
sum() {
  set -- $(sha256sum /tmp/file)
  printf %.16s "$1" # every character costs an exit to the monitor
}

dd if=/dev/urandom of=/tmp/file bs=64k count=16 2>/dev/null
right=$(sum)
# A second process shows that the scheduler and timers serve more than one.
echo 0 > /tmp/ticks
( ticks=0; while :; do ticks=$((ticks + 1)); echo "$ticks" > /tmp/ticks.new; mv /tmp/ticks.new /tmp/ticks; sleep 1; done ) &
# Typed on the serial port, `poweroff` ends the guest.
( while read -r typed; do [ "$typed" = poweroff ] && exec poweroff -f; done ) < /dev/ttyS0 &

echo "LINUX start release=$(uname -r) sum=$right"
n=0 before=$(milliseconds) ticks_before=0 wall_before=$(date +%s) complaints=0
while :; do
  n=$((n + 1))
  now=$(milliseconds)
  [ "$now" -ge "$before" ] || echo "DAMAGE clock now=$now before=$before"
  before=$now
  wall=$(date +%s)
  [ "$wall" -ge "$wall_before" ] || echo "DAMAGE wall-clock now=$wall before=$wall_before"
  wall_before=$wall
  read -r ticks < /tmp/ticks
  [ "$ticks" -ge "$ticks_before" ] || echo "DAMAGE ticks now=$ticks before=$ticks_before"
  ticks_before=$ticks
  sum=$(sum)
  [ "$sum" = "$right" ] || echo "DAMAGE file sum=$sum right=$right"
  found=$(dmesg | grep -cE "$bad")
  if [ "$found" -ne "$complaints" ]; then
    complaints=$found
    dmesg | grep -E "$bad" | tail -n 1 | while read -r line; do echo "DAMAGE kernel $line"; done
  fi
  echo "LINUX line n=$n clock_ms=$now ticks=$ticks sum=$sum"
  if [ "$n" = "$lines" ]; then
    echo "LINUX end how=$end"
    "$end" -f
  fi
  sleep 1
done
