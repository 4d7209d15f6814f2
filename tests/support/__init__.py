"""What the system tests stand on: a counting back end, workers driven by commands, a private scope, a leak census.

Nothing here imports sharedpool except the commands that a worker carries out, so that this package can be tested
by itself (tests/system/test_support_*.py).
"""
