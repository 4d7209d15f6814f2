"""Other libraries, and how they meet the pool.

Each module needs the library that it is named after; sharedpool itself loads none of them.
"""
