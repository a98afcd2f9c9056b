# The ready queue: what runs in this pass and the next, first in first out.
#
# A ring in a Python list, so that the garbage collector sees what stands in it: a loop that is dropped unclosed
# with callbacks queued is a cycle. Promise: push and pop run no Python code, so a finalizer or a signal handler
# may queue something at any moment.

cdef class Entry:
    """What the ready queue holds: a handle, or a transport with something to do."""

    cdef bint is_cancelled(self) noexcept:
        return False

    cdef int run(self) except -1:
        return 0

    @property
    def _cancelled(self):
        return self.is_cancelled()

    # What asyncio asks of any handle when it reports or logs.

    @property
    def _callback(self):
        return None

    @property
    def _source_traceback(self):
        return None

    def _run(self):
        self.run()


@cython.final
cdef class ReadyQueue:
    """The ready queue as `loop._ready`: as much of a deque as asyncio and its patchers use."""

    cdef list ring
    cdef PyObject **slots
    cdef Py_ssize_t mask, head, count

    def __cinit__(self):
        self.replace_ring([None] * 64)

    cdef int replace_ring(self, list ring) except -1:
        self.ring = ring
        self.slots = PySequence_Fast_ITEMS(ring)
        self.mask = PyList_GET_SIZE(ring) - 1
        self.head = 0
        return 0

    cdef int grow(self) except -1:
        """Doubles the ring. Up to 3.11 an allocation may collect garbage, and a finalizer may push or even grow:
        allocate first, look again, then move the references without allocating."""
        cdef list ring = [None] * (2 * (self.mask + 1)), _before
        cdef PyObject **slots = PySequence_Fast_ITEMS(ring)
        cdef Py_ssize_t i
        if self.count <= self.mask or PyList_GET_SIZE(ring) <= self.count:
            return 0
        for i in range(self.count):
            slots[i], self.slots[(self.head + i) & self.mask] = self.slots[(self.head + i) & self.mask], slots[i]
        _before = self.ring  # holds None alone, and is dropped last
        self.replace_ring(ring)
        return 0

    cdef inline int push(self, object entry) except -1:
        while self.count > self.mask:
            self.grow()
        cdef PyObject **slot = &self.slots[(self.head + self.count) & self.mask]
        Py_INCREF(entry)
        slot[0] = <PyObject *>entry
        Py_DECREF(None)
        self.count += 1
        return 0

    cdef inline object pop(self):
        """The first entry; the queue must not be empty."""
        cdef PyObject **slot = &self.slots[self.head & self.mask]
        cdef object entry = <object>slot[0]
        Py_INCREF(None)
        slot[0] = <PyObject *>None
        Py_DECREF(entry)
        self.head = (self.head + 1) & self.mask
        self.count -= 1
        return entry

    def append(self, entry):
        self.push(entry)

    def popleft(self):
        if not self.count:
            raise IndexError("pop from an empty deque")
        return self.pop()

    def clear(self):
        while self.count:
            self.pop()

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([self.ring[(self.head + i) & self.mask] for i in range(self.count)])

    def __repr__(self):
        return f"ReadyQueue({list(self)!r})"
