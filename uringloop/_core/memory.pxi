# Where received bytes lie: one buffer that every read of the loop goes through, and the small bytes objects of the
# last reads, which serve again.
#
# A bytes object that nobody else holds is plain memory: its content and length may change. So no read allocates
# more than it keeps, and a loop that answers what it reads allocates nothing. Promise: memory that somebody else
# holds is never touched. Numbers: docs/decisions.md 8.

cdef enum:
    COPIED_MAX = 64 * 1024  # longer reads are handed over where they lie
    RECENT = 64             # small objects that are looked after; a power of two
    RECENT_MIN = 480        # smaller ones are pymalloc's, which is as fast
    RECENT_MAX = 4096
    RECENT_SLACK = 63       # bytes that a reused object may be too long
    RECENT_TRIES = 4
    HEAP_STEP = 2 * 1024 * 1024


cdef void keep_the_heap() noexcept:
    """Has glibc keep what a turn frees.

    A turn allocates, say, 64 messages of 10 KiB and frees them at its end. That is more than the 128 KiB that glibc
    leaves at the top of the heap: it gives them back to the kernel and faults them in again in the next turn, a
    third of the time of such a server. Freeing one mapping of this size moves its thresholds for good (mmap from
    here on, trimming from twice this), unless MALLOC_TRIM_THRESHOLD_ and its kin are set. Elsewhere it does nothing.
    """
    PyMem_RawFree(PyMem_RawMalloc(HEAP_STEP))


@cython.final
cdef class ReadMemory:
    cdef Py_ssize_t size      # of one read
    cdef object buffer        # bytes; None while it is handed over
    cdef PyObject *recent[RECENT]
    cdef Py_ssize_t capacity[RECENT]
    cdef Py_ssize_t next

    def __cinit__(self):
        keep_the_heap()

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(RECENT):
            Py_XDECREF(self.recent[i])

    cdef inline object take_buffer(self):
        cdef object buffer = self.buffer
        self.buffer = None
        return PyBytes_FromStringAndSize(NULL, self.size) if buffer is None else buffer

    cdef inline int give_back(self, object buffer) except -1:
        if self.buffer is None:
            ul_bytes_set_size(buffer, self.size)
            self.buffer = buffer
        return 0

    cdef object small(self, const char *data, Py_ssize_t size):
        """A bytes object of these bytes."""
        cdef Py_ssize_t i, tries
        cdef object found
        if not RECENT_MIN <= size <= RECENT_MAX:
            return PyBytes_FromStringAndSize(data, size)
        for tries in range(RECENT_TRIES):
            i = (self.next + tries) & (RECENT - 1)
            if self.recent[i] == NULL or not size <= self.capacity[i] <= size + RECENT_SLACK:
                continue
            if ul_is_ours(self.recent[i]):
                found = <object>self.recent[i]
                memcpy(PyBytes_AS_STRING(found), data, size)
                ul_bytes_set_size(found, size)
                self.next = i + 1
                return found
        found = PyBytes_FromStringAndSize(data, size)
        i = self.next & (RECENT - 1)
        Py_INCREF(found)
        Py_XDECREF(self.recent[i])
        self.recent[i], self.capacity[i] = <PyObject *>found, size
        self.next = i + 1
        return found
