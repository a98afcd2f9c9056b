# The C monitor, as fdmon.h declares it: what the turn and the transports call. One promise: nothing here that
# the header does not say; the struct itself stays closed but for its first field, by which a pointer is checked.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "fdmon.h" nogil:
    enum:
        UL_READ
        UL_WRITE
        UL_ONCE
        UL_RECV
        UL_DATA
        UL_SENT
        UL_DOWNGRADED
        UL_BUFFER_BYTES

    ctypedef struct ul_event:
        int32_t fd
        uint32_t events
        int32_t result
        const void *data

    ctypedef struct ul_fdmon:
        uint64_t layout

    uint64_t UL_FDMON_LAYOUT
    int ul_fdmon_update(ul_fdmon *mon, int fd, uint32_t events)
    int ul_fdmon_turn(ul_fdmon *mon, int64_t timeout_ns, ul_event *out, int out_max)
    int ul_fdmon_prepare(ul_fdmon *mon, int64_t wake_ns)
    void ul_fdmon_wake_host(ul_fdmon *mon)
    void ul_fdmon_end_hosting(ul_fdmon *mon)
    int ul_fdmon_send(ul_fdmon *mon, int fd, const void *pieces, int count)  # of struct iovec
    int ul_fdmon_cancel_send(ul_fdmon *mon, int fd)
    int ul_fdmon_forget(ul_fdmon *mon, int fd)
