cimport cython
from libc.stdint cimport uint64_t

from sharedpool._calls cimport Sleeper
from sharedpool.clock cimport monotonic_ns
from sharedpool.counting cimport bucket_of
from sharedpool.memory cimport Mark, Word
from sharedpool.held cimport Patience, Route
from sharedpool.lease cimport Lease
from sharedpool.layout cimport generation_of, granted_word, holder_of, opening_word
from sharedpool.sticky cimport steal_after, unused_after
from sharedpool.table cimport Table


cdef class Waiter:
    cdef public uint64_t cell, kick
    cdef public bint apart
    cdef public Sleeper sleeper


cdef class WaitingRoom:
    cdef public object words, marks, _segment, _name, _lines, _tell_close, _tell_watch, _hooks, _any_idle
    cdef public list _apart, _free, _on_wait
    cdef public set _waiting
    cdef public uint64_t _looked_at, _owned, _waits, _attempts, _scrap, _leased, _wait_bucket, _wait_sum
    cdef public bint left
    cdef public object pause, returns
    cdef public Table _table
    cdef Word[::1] _words
    cdef Mark[::1] _marks

    @cython.locals(waiter=Waiter, joined=bint, result=int)
    cpdef int wait(self, Route route, Lease lease, uint64_t gate, uint64_t ver, long long limit, long long now, bint behind=*, uint64_t keyed=*, list line=*) except -2

    @cython.locals(w=Word[::1], sticky=bint, evict=uint64_t, seen=uint64_t, result=int)
    cdef int _enter(self, Waiter waiter, Route route, uint64_t gate, uint64_t ver, long long limit, long long now, bint behind, uint64_t keyed) except -2

    @cython.locals(w=Word[::1])
    cpdef bint leave(self, Waiter waiter, long long patience) except *

    @cython.locals(deadline=uint64_t, counter=uint64_t, evicted=uint64_t, result=int)
    cdef int _join(self, uint64_t cell, Route route, uint64_t gate, uint64_t ver, uint64_t evict, uint64_t seen, long long limit, uint64_t now, bint behind, uint64_t keyed) except -2

    @cython.locals(marks=Mark[::1], patience=Patience, kick=cython.uint, result=int, nap=cython.longlong, napped=bint)
    cdef _sleep_until_granted(self, Waiter waiter, Route route, Lease lease, long long limit, long long now)

    @cython.locals(w=Word[::1], cell=uint64_t, at=uint64_t, result=int, word=uint64_t)
    cpdef int look(self, Waiter waiter, Route route, Lease lease, long long limit, long long now) except -2

    @cython.locals(w=Word[::1], over=cython.longlong, unused=cython.longlong, behind=cython.longlong, victim=uint64_t,
                   gate=uint64_t)
    cdef long long _steal(self, uint64_t cell, Route route, long long now) except -1

    @cython.locals(nap=cython.longlong, look=cython.longlong)
    cpdef long long nap(self, Waiter waiter, Route route, long long left, long long now) except -1

    cpdef bint any_waiting(self) except *

    @cython.locals(w=Word[::1], at=uint64_t)
    cpdef waited(self, long long took)

    @cython.locals(table=Table, seen=uint64_t, new=uint64_t, counter=uint64_t, connects=bint)
    cdef int _take(self, uint64_t at, uint64_t cell, Route route, Lease lease, uint64_t now) except -2
