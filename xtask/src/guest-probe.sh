# What `cargo xtask vm` runs when it is given no command: what this kernel is and what of Bunter's needs it has.
echo "kernel $(uname -r), $(nproc) processors"
failed=0
have() {
	if eval "$2" >/dev/null 2>&1; then echo "  yes  $1"; else echo "  no   $1"; failed=1; fi
}
have "TLS in the kernel" "grep -q tls /proc/sys/net/ipv4/tcp_available_ulp"
have "AES-GCM by AES-NI" "modprobe aesni_intel && grep -q gcm-aes /proc/crypto"
have "cgroup2" "grep -q cgroup2 /proc/self/mounts"
have "BPF file system" "grep -q ' /sys/fs/bpf bpf ' /proc/1/mounts"
have "BTF" "test -s /sys/kernel/btf/vmlinux"
have "veth between network namespaces" "ip netns add probe && ip link add one type veth peer name two netns probe"
have "netem" "tc qdisc add dev one root netem delay 1ms"
have "socket diagnosis" "ss -tan"
have "nginx" "nginx -v"
have "redis" "redis-server --version"
have "curl" "curl --version"
have "openssl" "openssl rand -hex 8"
have "tcpdump" "tcpdump --version"
exit $failed
