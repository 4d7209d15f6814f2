"""Tests of the parts that need no arbiter and no worker: most of them need no operating system either."""
