"""What native.py does through ctypes, as C calls. They keep the GIL, as there, except to sleep."""

import _socket as plain

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_SetFromErrno
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject_TypeCheck, PyTypeObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp

cdef extern from "pthread.h":
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_consistent(pthread_mutex_t *)

cdef extern from "poll.h":
    int POLLIN
    int POLLPRI
    int poll(pollfd *, unsigned long, int)

cdef extern from "sys/socket.h":
    int MSG_DONTWAIT
    ssize_t send_now "send"(int, const void *, size_t, int) nogil

cdef extern from "time.h":
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #include <wchar.h>

    extern int dup3(int, int, int);
    /* The first field of a socket object; checked below. */
    static int sharedpool_number(void *sock) { return *(int *) ((char *) sock + sizeof(PyObject)); }
    static long sharedpool_wait(unsigned *word, unsigned value, struct timespec *time) {
        return syscall(SYS_futex, word, FUTEX_WAIT, value, time, NULL, 0);
    }
    static long sharedpool_wake(unsigned *word) { return syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0); }
    """
    int O_CLOEXEC
    int dup3(int, int, int)
    int sharedpool_number(void *)
    long sharedpool_wait(uint32_t *, uint32_t, timespec *) nogil
    long sharedpool_wake(uint32_t *)
    ctypedef int wchar_t
    wchar_t *wmemchr(wchar_t *, wchar_t, size_t)


cdef class Mutex:
    """`-` trylock, `+` unlock, `~` make consistent."""

    cdef pthread_mutex_t *place

    def __init__(self, size_t address):
        self.place = <pthread_mutex_t *> address

    def __neg__(self):
        return pthread_mutex_trylock(self.place)

    def __pos__(self):
        return pthread_mutex_unlock(self.place)

    def __invert__(self):
        return pthread_mutex_consistent(self.place)


cdef class Waker:
    """`-` wakes one thread that sleeps on the word."""

    cdef uint32_t *word

    def __init__(self, size_t address):
        self.word = <uint32_t *> address

    def __neg__(self):
        return sharedpool_wake(self.word)


cdef class Sleeper:
    """Sleeps on one 32-bit word."""

    def __init__(self, size_t address):
        self.word = <uint32_t *> address

    cpdef void sleep(self, uint32_t value, long long nanoseconds):
        cdef timespec time
        time.tv_sec = nanoseconds // 1_000_000_000
        time.tv_nsec = nanoseconds % 1_000_000_000
        with nogil:
            sharedpool_wait(self.word, value, &time)


cdef class AnySet:
    """`-` is 0 while all of the words are 0."""

    cdef const char *words
    cdef char *zeros
    cdef size_t size

    def __cinit__(self, size_t address, size_t words):
        self.words = <char *> address
        self.size = 4 * words
        self.zeros = <char *> PyMem_Calloc(self.size, 1)
        if self.zeros == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.zeros)

    def __neg__(self):
        return memcmp(self.words, self.zeros, self.size)


cdef class Finder:
    """find(tag, start, stop) over the 32-bit marks."""

    cdef wchar_t *marks
    cdef uint64_t number

    def __init__(self, size_t address, uint64_t marks):
        self.marks = <wchar_t *> address
        self.number = marks

    def __call__(self, uint64_t tag, uint64_t start, uint64_t stop):
        if stop > self.number:
            stop = self.number
        if stop <= start:
            return -1
        cdef wchar_t *found = wmemchr(self.marks + start, <wchar_t> <uint32_t> tag, stop - start)
        return -1 if found == NULL else found - self.marks


cdef class Gate:
    """`quiet(0)` polls, `+` unparks, `-` parks."""

    def __init__(self, int real, int number, int dead):
        self.place.fd = real
        self.place.events = POLLIN | POLLPRI
        self.number = number
        self.dead = dead

    cpdef int quiet(self, int timeout):
        self.place.revents = 0
        return poll(&self.place, 1, timeout)

    def __pos__(self):
        return self.number if self.dead < 0 else dup3(self.place.fd, self.number, O_CLOEXEC)

    def __neg__(self):
        return self.number if self.dead < 0 else dup3(self.dead, self.number, O_CLOEXEC)


cdef PyTypeObject *_socket = <PyTypeObject *> plain.socket


cdef class FileNumber:
    """`FILENO[conn]`: conn.fileno(); the number in a socket object is read where it lies."""

    cdef bint there

    def __cinit__(self):
        probe = plain.socket()
        self.there = sharedpool_number(<void *> probe) == probe.fileno()
        probe.close()

    def __getitem__(self, sock):
        if self.there and PyObject_TypeCheck(sock, _socket):
            return sharedpool_number(<void *> sock)
        return sock.fileno()


def libpq_number(conn):
    """As native.libpq_number."""
    try:
        return conn.pgconn.socket
    except Exception:
        return -1


_fileno = plain.socket.fileno
_recv = plain.socket.recv
_recv_into = plain.socket.recv_into
_send = plain.socket.send
_sendall = plain.socket.sendall


def recv(self, bufsize, flags=0):
    """As socket.recv, and `inside` says so, as in drivers/sockets.py."""
    cdef list inside = self.inside
    inside.append(None)
    try:
        return _recv(self, bufsize, flags)
    finally:
        inside.pop()


def recv_into(self, buffer, nbytes=0, flags=0):
    """As socket.recv_into."""
    cdef list inside = self.inside
    inside.append(None)
    try:
        return _recv_into(self, buffer, nbytes, flags)
    finally:
        inside.pop()


def send(self, data, flags=0):
    """As socket.send."""
    cdef list inside = self.inside
    inside.append(None)
    try:
        return _send(self, data, flags)
    finally:
        inside.pop()


def sendall(self, data, int flags=0):
    """As socket.sendall, which asks first whether there is room: here only where there was none."""
    cdef list inside = self.inside
    inside.append(None)
    try:
        _send_all(self, data, flags)
    finally:
        inside.pop()


cdef _send_all(self, data, int flags):
    cdef Py_buffer view
    cdef ssize_t sent
    cdef int number = _fileno(self)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            sent = send_now(number, view.buf, view.len, flags | MSG_DONTWAIT)
        if sent == view.len:
            return
        if sent < 0 and errno != EAGAIN and errno != EINTR:
            PyErr_SetFromErrno(OSError)
    finally:
        PyBuffer_Release(&view)
    _sendall(self, memoryview(data).cast("B")[max(sent, 0):], flags)
