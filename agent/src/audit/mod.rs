//! audit: exactly one `Record` per connection attempt.
