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

    cdef void replace_ring(self, list ring):
        self.ring = ring
        self.slots = PySequence_Fast_ITEMS(ring)
        self.mask = PyList_GET_SIZE(ring) - 1
        self.head = 0

    cdef int grow(self) except -1:
        cdef list items = list(self)
        self.replace_ring(items + [None] * len(items))
        return 0

    cdef inline int push(self, object entry) except -1:
        if self.count > self.mask:
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

    def remove(self, entry):
        entries = list(self)
        entries.remove(entry)
        self.clear()
        for entry in entries:
            self.push(entry)

    def __getitem__(self, i):
        return list(self)[i]

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([self.ring[(self.head + i) & self.mask] for i in range(self.count)])

    def __repr__(self):
        return f"ReadyQueue({list(self)!r})"
