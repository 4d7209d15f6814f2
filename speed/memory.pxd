# Shared memory is volatile to the compiler: no store may be left out or moved, because a SIGKILL may come at any of them.
cdef extern from *:
    """
    typedef volatile unsigned long long sharedpool_word;
    typedef volatile unsigned int sharedpool_mark;
    """
    ctypedef unsigned long long Word "sharedpool_word"
    ctypedef unsigned int Mark "sharedpool_mark"
