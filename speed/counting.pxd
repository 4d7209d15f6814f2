cpdef int bucket_of(long long nanoseconds) except -1
