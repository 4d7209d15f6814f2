from libc.stdint cimport uint64_t

cpdef uint64_t tag_of(uint64_t key)
cpdef uint64_t generation_of(uint64_t word)
cpdef uint64_t holder_of(uint64_t word)
cpdef uint64_t ticket_of(uint64_t word)
cpdef bint is_high(uint64_t word)
cpdef uint64_t leased_word(uint64_t idle, uint64_t row)
cpdef uint64_t granted_word(uint64_t word, uint64_t cell)
cpdef uint64_t opening_word(uint64_t word, uint64_t row, uint64_t state=*)
cpdef uint64_t with_state(uint64_t word, uint64_t state)
