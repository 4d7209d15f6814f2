cimport cython
from libc.stdint cimport uint64_t

from sharedpool.memory cimport Mark, Word
from sharedpool.layout cimport with_state


cdef class Claim:
    cdef public uint64_t word


cdef class NoLease(Claim):
    pass


cdef class Table:
    cdef public object words, marks, mutex, find, geometry
    cdef Word[::1] _words
    cdef Mark[::1] _marks
    cdef public uint64_t slot_base, cell_base, kick_base, row, row_at, _misses
    cdef public object _progress

    cpdef uint64_t slot_at(self, uint64_t index)
    cpdef uint64_t slot_index(self, uint64_t at)
    cpdef uint64_t cell_at(self, uint64_t index)
    cpdef uint64_t cell_index(self, uint64_t at)
    cpdef uint64_t kick_index(self, uint64_t cell_at)
    cpdef uint64_t counter(self, uint64_t index)
    cpdef int missed(self, int rc) except -2
    @cython.locals(me=cython.ulonglong, mutex=object, rc=cython.int, w=object)
    cpdef int repair(self) except -2
    @cython.locals(done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, rc=cython.int, since=cython.ulonglong, w=Word[::1])
    cpdef int take_idle(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, Claim lease, uint64_t counter, uint64_t now) except -2
    @cython.locals(done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, rc=cython.int, since=cython.ulonglong, w=Word[::1])
    cpdef int take_idle_counted(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, uint64_t first, uint64_t waits, uint64_t most, Claim lease, uint64_t counter, uint64_t now, uint64_t keyed=*) except -2
    @cython.locals(done=cython.int, index=cython.ulonglong, me=cython.ulonglong, mutex=object, rc=cython.int, top=cython.ulonglong, w=Word[::1])
    cpdef int take_free(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, Claim lease, uint64_t key, uint64_t counter, uint64_t now, uint64_t first=*, uint64_t waits=*, uint64_t most=*, uint64_t keyed=*) except -2
    @cython.locals(bare=cython.ulonglong, done=cython.int, me=cython.ulonglong, mutex=object, owned=cython.ulonglong, rc=cython.int, w=Word[::1])
    cpdef int take_grant(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t cell, Claim lease, uint64_t key, uint64_t counter, uint64_t now) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, w=Word[::1])
    cpdef int swap(self, uint64_t at, uint64_t seen, uint64_t new, Claim lease, uint64_t expected, uint64_t bump, uint64_t now) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, w=Word[::1])
    cpdef int connected(self, uint64_t at, uint64_t seen, uint64_t new, Claim lease, uint64_t expected, uint64_t counter, uint64_t now) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, w=Word[::1])
    cpdef int reopen(self, uint64_t at, uint64_t seen, uint64_t new, Claim lease, uint64_t expected, uint64_t reason, uint64_t counter, uint64_t now) except -2
    @cython.locals(done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, rc=cython.int, since=cython.ulonglong, w=Word[::1])
    cpdef int put_idle(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, uint64_t tag, uint64_t now) except -2
    @cython.locals(done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, rc=cython.int, since=cython.ulonglong, w=Word[::1])
    cpdef int put_idle_counted(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, uint64_t first, uint64_t waits, uint64_t most, uint64_t tag, uint64_t now, uint64_t keyed=*) except -2
    @cython.locals(done=cython.int, idle=cython.ulonglong, key=cython.ulonglong, kick=cython.ulonglong, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, n=cython.ulonglong, p=cython.ulonglong, rc=cython.int, w=Word[::1])
    cpdef int hand(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, uint64_t cell, uint64_t cell_word, uint64_t old_cell, uint64_t now, uint64_t most=*, uint64_t keyed=*) except -2
    @cython.locals(done=cython.int, index=cython.ulonglong, key=cython.ulonglong, kick=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, n=cython.ulonglong, p=cython.ulonglong, rc=cython.int, top=cython.ulonglong, w=Word[::1])
    cpdef int hand_free(self, uint64_t at, uint64_t seen, uint64_t new, uint64_t gate, uint64_t cell, uint64_t cell_word, uint64_t now, uint64_t most=*, uint64_t keyed=*) except -2
    @cython.locals(done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, new=cython.ulonglong, rc=cython.int, w=Word[::1])
    cpdef int free(self, uint64_t at, uint64_t seen, uint64_t gate, uint64_t old_cell, uint64_t first=*, uint64_t waits=*, uint64_t most=*, uint64_t keyed=*) except -2
    @cython.locals(done=cython.int, idle=bint, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, new=cython.ulonglong, rc=cython.int, w=Word[::1])
    cpdef int close(self, uint64_t at, uint64_t seen, uint64_t since, uint64_t old_cell, uint64_t counter, uint64_t now, uint64_t ver=*) except -2
    @cython.locals(done=cython.int, index=cython.ulonglong, me=cython.ulonglong, mutex=object, owned=cython.ulonglong, rc=cython.int, top=cython.ulonglong, w=Word[::1])
    cpdef int claim_cell(self, uint64_t cell) except -2
    @cython.locals(closing=cython.ulonglong, done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, owned=cython.ulonglong, place=cython.ulonglong, queued=cython.ulonglong, rc=cython.int, tail=cython.ulonglong, ticket=cython.ulonglong, w=Word[::1], waiting=cython.ulonglong)
    cpdef int enqueue(self, uint64_t cell, uint64_t key, uint64_t gate, uint64_t ver, uint64_t evict, uint64_t evict_seen, uint64_t deadline, uint64_t counter, uint64_t now, uint64_t keyed=*, uint64_t evicted=*) except -2
    @cython.locals(closing=cython.ulonglong, done=cython.int, mark=cython.ulonglong, marks=Mark[::1], me=cython.ulonglong, mutex=object, owned=cython.ulonglong, place=cython.ulonglong, queued=cython.ulonglong, rc=cython.int, w=Word[::1])
    cpdef int enqueue_high(self, uint64_t cell, uint64_t key, uint64_t gate, uint64_t ver, uint64_t word, uint64_t after, uint64_t after_word, uint64_t before, uint64_t before_word, uint64_t passed, uint64_t ticket, uint64_t evict, uint64_t evict_seen, uint64_t deadline, uint64_t counter, uint64_t now, uint64_t keyed=*, uint64_t evicted=*) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, turn=cython.ulonglong, w=Word[::1], waiting=cython.ulonglong)
    cpdef int rejoin(self, uint64_t cell, uint64_t seen, uint64_t after, uint64_t before, uint64_t ver, uint64_t gate) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, n=cython.ulonglong, p=cython.ulonglong, rc=cython.int, w=Word[::1])
    cpdef int leave(self, uint64_t cell, uint64_t seen, uint64_t new) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, top=cython.ulonglong, w=Word[::1])
    cpdef int claim_line(self, uint64_t line, uint64_t key, uint64_t word) except -2
    @cython.locals(at=cython.ulonglong, done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, w=Word[::1])
    cpdef int set_row(self, uint64_t row, uint64_t seen, uint64_t new, uint64_t nonce, uint64_t now) except -2
    @cython.locals(done=cython.int, me=cython.ulonglong, mutex=object, rc=cython.int, unmade=cython.ulonglong, w=Word[::1])
    cpdef int set_limit(self, uint64_t maximum, uint64_t flags, uint64_t reserve=*, uint64_t per_key=*) except -2
