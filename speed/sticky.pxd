cimport cython
from libc.stdint cimport uint64_t

from sharedpool.memory cimport Word


@cython.locals(given=uint64_t, measured=uint64_t)
cpdef uint64_t steal_after(Word[::1] w, uint64_t stays) except? 0

@cython.locals(unused=uint64_t)
cpdef uint64_t unused_after(Word[::1] w, uint64_t stays) except? 0
