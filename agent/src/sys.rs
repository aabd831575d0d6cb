//! Every system call that std, rustix and tokio lack. The only file of the agent that may say `unsafe`.
//!
//! Functions take `BorrowedFd` and give `OwnedFd` or plain values; each `unsafe` block says why it is sound (SAFETY) and
//! why it is there at all (JUSTIFICATION).
#![allow(unsafe_code)]
