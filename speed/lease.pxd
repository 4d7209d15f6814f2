from libc.stdint cimport uint64_t


cdef class Lease:
    cdef public object _entry, _owner, conn
    cdef public uint64_t place, word
    cdef object __weakref__
