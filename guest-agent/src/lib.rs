//! guest-agent
