//! Routers, plans, dispatch, expert banks, balance losses, statistics.
#![forbid(unsafe_code)]
