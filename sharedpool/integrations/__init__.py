"""Other libraries, and how they meet the pool.

Each module needs the library that it is named after (but gunicorn, which only its configuration file needs);
sharedpool itself loads none of them.
"""
