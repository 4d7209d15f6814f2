"""The tests of sharedpool. `core` needs no operating system, `system` uses real processes and sockets."""
