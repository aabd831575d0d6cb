//! The lab itself, and the wire oracle: without them no other test proves anything.
