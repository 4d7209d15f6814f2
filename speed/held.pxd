from libc.stdint cimport uint64_t

from sharedpool._calls cimport Gate
from sharedpool.clock cimport monotonic_ns
from sharedpool.layout cimport tag_of


cdef class Entry:
    cdef public object conn, fileno, route, state
    cdef public list inside
    cdef public Gate gate
    cdef public uint64_t at, generation, version, word, thread
    cdef public int number, real
    cdef public bint stacked
    cdef object __weakref__


cdef class Route:
    cdef public object checks, clean, driver, host, matters, place, resets, settles, stateful, urgent, where
    cdef public list stack
    cdef public uint64_t counts, handoffs, key, reuses, stays, tag, takeovers
    cdef public int port
    cdef public bint always, direct, high, parks, sticky, strict
    cpdef void push(self, Entry entry)
    cpdef Entry pop(self)


cdef class Patience:
    cdef public long long limit
    cdef public int tries
