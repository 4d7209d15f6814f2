"""The figures of sharedpool, measured beside those of its peers in the same run."""
