"""PostgreSQL sessions that move between processes, for psycopg 3 and psycopg2; pools shaped like psycopg_pool's.

Nothing is loaded here: `sharedpool.postgres.psycopg3` and `.psycopg2` need the library that they are named after.
"""
