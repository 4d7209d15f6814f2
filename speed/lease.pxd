from libc.stdint cimport uint64_t

from sharedpool.table cimport Claim


cdef class Lease(Claim):
    cdef public object _entry, _owner, conn
    cdef public uint64_t place
    cdef object __weakref__
    cpdef checkin(self)
