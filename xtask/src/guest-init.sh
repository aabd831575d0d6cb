#!/bin/sh
# The first process of a guest: what a kernel does not do by itself, then vagrant/provision.sh as on any other node,
# then /job. The verdict is printed with a mark from the command line, which no program in the guest prints by accident.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/lib/busybox
export HOME=/root TERM=dumb LANG=C.UTF-8 BUNTER_GUEST=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp /dev/shm
ln -s /proc/self/fd /dev/fd
ip link set lo up
hostname guest
ulimit -n 524288
mark=$(sed 's/.*bunter.mark=\([^ ]*\).*/\1/' /proc/cmdline)
code=125
if sh /bunter/vagrant/provision.sh guest; then
	echo "$mark:begin"
	sh /job
	code=$?
fi
echo "$mark $code"
sync
poweroff -f
