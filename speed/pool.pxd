cimport cython

from sharedpool.lease cimport Lease


cdef class _Handle:
    cdef public object name, transport, _given, _app, _attached, _connect, _lock, _notices, _patience
    cdef public bint _limited, _update
    cdef public dict _routes, _warm
    cdef public list _callbacks
    cdef object __weakref__

    @cython.locals(lease=Lease)
    cdef _take(self, host, port, transport, checkout_timeout, connect_timeout, priority)

    cpdef tuple plan(self, attached, host, port, transport, checkout_timeout, connect_timeout, priority)

    cpdef checkin(self, Lease lease)


cdef class _Leasing:
    cdef _Handle _pool
    cdef object _connect, _host, _patience, _port, _priority, _transport
    cdef Lease _lease
