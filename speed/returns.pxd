cimport cython
from libc.stdint cimport uint64_t

from sharedpool.clock cimport monotonic_ns
from sharedpool.memory cimport Mark, Word
from sharedpool.held cimport Patience, Route
from sharedpool.layout cimport generation_of, with_state
from sharedpool.sticky cimport steal_after
from sharedpool.table cimport Table


cdef class Returns:
    cdef public object words, _lines, _own_waiter, _segment, _tell_close
    cdef public dict _wakers
    cdef public uint64_t _cells
    cdef public Table _table
    cdef Word[::1] _words

    @cython.locals(w=Word[::1], gate=uint64_t, cell=uint64_t, cell_word=uint64_t, new=uint64_t, now=uint64_t)
    cpdef bint straight_on(self, uint64_t at, uint64_t word, Route route) except *
