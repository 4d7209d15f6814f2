cimport cython
from libc.stdint cimport uint64_t

from sharedpool._calls cimport Gate
from sharedpool.clock cimport get_ident, monotonic_ns
from sharedpool.counting cimport bucket_of
from sharedpool.memory cimport Mark, Word
from sharedpool.held cimport Entry, Patience, Route
from sharedpool.layout cimport generation_of, holder_of, leased_word, opening_word
from sharedpool.lease cimport Lease
from sharedpool.returns cimport Returns
from sharedpool.sticky cimport steal_after
from sharedpool.table cimport Table
from sharedpool.waiting cimport WaitingRoom


cdef class Attachment:
    cdef public object watch
    cdef public object channel, chores, name, segment, welcome, words
    cdef public object lines, _dead, _tidying, _connect_seconds, _lease_seconds, _warmer
    cdef public object hooks, notices
    cdef public uint64_t _beat, _sweep_at, _sweeps
    cdef public list on_abandoned, on_checkout, _on_checkin
    cdef public dict entries, opening, permits, places, routes
    cdef public bint inert, lost, noting, _polls
    cdef public uint64_t gate, row, _scrap, _lease_bucket, _lease_sum
    cdef public Returns returns
    cdef public WaitingRoom room
    cdef public Table table
    cdef Word[::1] _words
    cdef object __weakref__

    @cython.locals(lease=Lease)
    cpdef checkout(self, Route route, patience, connect_timeout)

    @cython.locals(w=Word[::1], stack=list, entry=Entry, seen=uint64_t, at=uint64_t, lease=Lease, new=uint64_t,
                   counter=uint64_t, gate=Gate, quiet=bint)
    cpdef take_own(self, Route route)

    @cython.locals(lease=Lease, counter=uint64_t)
    cdef _checkout_slowly(self, Route route, long long limit, connect_timeout)

    @cython.locals(lease=Lease)
    cpdef Lease blank(self)

    @cython.locals(entry=Entry)
    cpdef bint equip(self, Route route, Lease lease, uint64_t counter, idle) except *

    @cython.locals(entry=Entry, at=uint64_t)
    cdef Entry _at_hand(self, Route route, Lease lease)

    @cython.locals(gate=Gate, quiet=bint)
    cdef bint _unpark(self, Entry entry) except *

    @cython.locals(w=Word[::1])
    cdef _lend(self, Lease lease, Entry entry, uint64_t counter)

    @cython.locals(counter=uint64_t, result=int)
    cdef _acquire(self, Route route, Lease lease, long long limit, set refused)

    @cython.locals(w=Word[::1], gate=uint64_t, ver=uint64_t, at=uint64_t, seen=uint64_t, result=int, straight=bint,
                   counter=uint64_t)
    cpdef attempt(self, Route route, Lease lease, long long limit, set refused, list line=*)

    @cython.locals(w=Word[::1], head=uint64_t)
    cdef bint _may_stick(self, Route route, uint64_t gate, uint64_t now) except *

    @cython.locals(w=Word[::1], head=uint64_t)
    cdef bint _keeps(self, Route route, uint64_t gate, uint64_t now) except *

    @cython.locals(w=Word[::1], word=uint64_t, entry=Entry, route=Route, gate=uint64_t, new=uint64_t,
                   now=cython.longlong, took=cython.longlong, bucket=uint64_t)
    cpdef checkin(self, Lease lease)


@cython.locals(seconds=double)
cdef long long _limit(patience) except? -1
