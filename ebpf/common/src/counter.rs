//! Indices into the per-CPU array `COUNTERS`, all counted in connections or packets since the maps were made.

/// Declares the counters, each with its number and the name under which people see it.
macro_rules! counters {
    ($($(#[$doc:meta])* $constant:ident = $number:literal, $name:literal;)*) => {
        $($(#[$doc])* pub const $constant: u32 = $number;)*
        /// Number of counters.
        pub const COUNT: u32 = [$($name),*].len() as u32;
        /// Their names, by number.
        pub const NAMES: [&str; COUNT as usize] = {
            let mut names = [""; COUNT as usize];
            $(
                assert!(names[$number].is_empty(), "two counters have one number");
                names[$number] = $name;
            )*
            names
        };
    };
}
counters! {
    /// Connections redirected to the agent.
    REDIRECTED = 0, "turned";
    /// Connections left alone.
    LEFT_ALONE = 1, "left-alone";
    /// Connections that a named bypass let pass.
    BYPASSED = 2, "bypassed";
    /// Connections refused at `connect`: no identity.
    REFUSED_NO_IDENTITY = 3, "refused-no-identity";
    /// Connections refused at `connect`: not allowed.
    REFUSED_NOT_ALLOWED = 4, "refused-not-allowed";
    /// Connections refused at `connect`: a map was full, or the user's share of it.
    REFUSED_MAP_FULL = 5, "refused-map-full";
    /// SYN packets, and answers to SYNs, that the egress guard dropped.
    GUARD_DROPPED = 6, "guard-dropped";
    /// UDP datagrams or associations allowed to a mesh destination.
    UDP_ALLOWED = 7, "udp-allowed";
    /// UDP datagrams or associations refused.
    UDP_REFUSED = 8, "udp-refused";
    /// Inbound connections redirected to the agent.
    REDIRECTED_INBOUND = 9, "steered";
    /// The agent's own upstream connections that were let through to a workload.
    UPSTREAMS_ADMITTED = 10, "legs-admitted";
    /// Connections, outbound or inbound, refused because no agent was there.
    REFUSED_NO_AGENT = 11, "refused-no-agent";
    /// Events that did not fit into the ring buffer.
    EVENTS_LOST = 12, "events-lost";
    /// Inbound connections refused because nobody had said yet whose the listener is.
    REFUSED_UNDECIDED = 13, "refused-undecided";
    /// Inbound segments to a port for which no listener is recorded: nobody listens, or the socket is not recorded.
    NO_LISTENER = 14, "no-listener";
    /// Connections of other network namespaces to addresses that are mesh destinations in this one.
    OTHER_NAMESPACES = 15, "other-namespaces";
    /// Packets of other protocols than TCP and UDP that the egress guard dropped.
    PROTOCOL_DROPPED = 16, "protocol-dropped";
    /// Sockets of which there was no room to record who bound them.
    UNRECORDED = 17, "unrecorded";
}
