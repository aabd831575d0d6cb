//! With TLS stacks that are not ours: rustls as others use it, and OpenSSL's own programs.
