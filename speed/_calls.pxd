from libc.stdint cimport uint32_t

cdef extern from "poll.h":
    struct pollfd:
        int fd
        short events
        short revents


cdef class Sleeper:
    cdef uint32_t *word
    cpdef void sleep(self, uint32_t value, long long nanoseconds)


cdef class Gate:
    cdef pollfd place
    cdef int number
    cdef int dead
    cpdef int quiet(self, int timeout)
