"""Other libraries, and how they meet the pool. Each module needs the library that it is named after; none is loaded
by sharedpool itself."""
