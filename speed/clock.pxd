# What `time.monotonic_ns` and `threading.get_ident` tell, without making Python numbers of it.
cdef extern from *:
    """
    #include <time.h>
    static inline long long sharedpool_now(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000LL + now.tv_nsec;
    }
    """
    long long monotonic_ns "sharedpool_now" ()
    unsigned long get_ident "PyThread_get_thread_ident" ()
