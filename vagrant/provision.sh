#!/bin/sh
# Prepares a node for Bunter: `provision.sh [alpha|beta|stranger]`. The Vagrantfile runs it as root on each of its
# machines, and the guests of `cargo xtask test vm` run the same file, so it cannot rot. What a machine does not have
# (apt, systemd, a built agent) is skipped; running it again changes nothing.
set -eu
role=${1:-guest}
here=$(dirname "$0")

# Packages: the programs of the demo. A guest brings its own.
if [ "$role" != guest ]; then
	export DEBIAN_FRONTEND=noninteractive
	apt-get -q update
	apt-get -q install -y --no-install-recommends nginx-light redis-server redis-tools curl openssl tcpdump iproute2
fi

# Modules: kernel TLS with its ciphers, and the socket diagnosis that closes a connection whose right has ended. A
# kernel that has them built in, or has none, is no error: `bunter doctor` says what it found.
for module in tls gcm aesni_intel ghash_clmulni_intel chacha20poly1305 veth inet_diag tcp_diag sch_netem; do
	modprobe -q "$module" 2>/dev/null || true
done
if [ -d /etc/modules-load.d ]; then
	printf 'tls\ntcp_diag\n' >/etc/modules-load.d/bunter.conf
fi

# File systems: the cgroup hierarchy that the programs are attached to, and the place where they are pinned,
# which the agent never mounts by itself.
if ! grep -q ' cgroup2 ' /proc/self/mounts; then
	mkdir -p /sys/fs/cgroup
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
if ! grep -q ' /sys/fs/bpf bpf ' /proc/self/mounts; then
	mount -t bpf -o nosuid,nodev,noexec,mode=0700 bpf /sys/fs/bpf
fi

# A burst of connections waits in the listeners' queues while their handshakes go on.
settings='net.core.somaxconn=4096
net.ipv4.tcp_max_syn_backlog=4096'
echo "$settings" | while read -r setting; do
	sysctl -q -w "$setting"
done
if [ -d /etc/sysctl.d ]; then
	echo "$settings" >/etc/sysctl.d/60-bunter.conf
fi

# The agent, on the machines that are to have one. Build it on the host first: cargo xtask build
if [ "$role" = guest ]; then
	exit 0
fi
if ! grep -q ' beta$' /etc/hosts; then
	printf '192.168.57.11 alpha\n192.168.57.12 beta\n192.168.57.13 stranger\n' >>/etc/hosts
fi
if [ "$role" = stranger ]; then
	exit 0
fi
target=$here/../target
if [ ! -x "$target/release/bunter" ] || [ ! -d "$target/vagrant-ca" ]; then
	echo "no agent or no authority below target/: run 'cargo xtask build' and 'vagrant up' on the host" >&2
	exit 1
fi
install -m 755 "$target/release/bunter" /usr/local/bin/bunter
mkdir -p /etc/bunter/policies /var/lib/bunter /var/log/bunter
if [ ! -d /etc/bunter/ca ]; then
	cp -r "$target/vagrant-ca" /etc/bunter/ca
	chown -R root:root /etc/bunter/ca
	chmod -R go= /etc/bunter/ca
fi
cp "$here/policies/lab.toml" /etc/bunter/policies/lab.toml
cp "$here/agent.toml" /etc/bunter/agent.toml
cp "$here/bunter.service" /etc/systemd/system/bunter.service

# Debian's Redis listens on loopback alone; here it is the agents that keep strangers out.
if [ "$role" = beta ]; then
	mkdir -p /etc/systemd/system/redis-server.service.d
	printf '[Service]\nExecStart=\nExecStart=/usr/bin/redis-server /etc/redis/redis.conf --bind 0.0.0.0 --protected-mode no\n' \
		>/etc/systemd/system/redis-server.service.d/lab.conf
fi
systemctl daemon-reload
bunter check --config /etc/bunter/agent.toml
systemctl enable --now bunter.service
systemctl restart nginx.service redis-server.service
bunter status
