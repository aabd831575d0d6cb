//! The corridor: calls the rooms in order.
