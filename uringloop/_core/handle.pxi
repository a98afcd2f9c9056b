# Handle and TimerHandle: a callback to be run, in its context, once.
#
# Promise: a program cannot tell them from asyncio's (isinstance, attributes, repr, comparison, weak references),
# and what is rare is asyncio's own code, called with our handle.

cdef object format_callback_source = format_helpers._format_callback_source
cdef object thread_safe_class = getattr(events, "_ThreadSafeHandle", None)
cdef bint takes_debug = "debug" in format_callback_source.__code__.co_varnames  # 3.13: arguments only in debug mode


cdef class Handle(Entry):
    cdef object __weakref__
    cdef LoopCore loop
    cdef object callback, args, context
    cdef list debug_info  # None, or [source traceback, the repr that cancel() kept]
    cdef bint cancelled_

    cdef bint is_cancelled(self) noexcept:
        return self.cancelled_

    cdef int run(self) except -1:
        # The callback may cancel this very handle: what is being called is held here.
        cdef object callback = self.callback, args = self.args, context = self.context
        cdef PyObject *result
        if PyContext_Enter(context) < 0:
            return self.report_failure()
        result = PyObject_Vectorcall(<PyObject *>callback, UL_TUPLE_ITEMS(args), PyTuple_GET_SIZE(args), NULL)
        if PyContext_Exit(context) < 0 or result == NULL:
            Py_XDECREF(result)
            return self.report_failure()
        Py_XDECREF(result)
        return 0

    cdef int report_failure(self) except -1:
        try:
            ul_raise_again()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.report(exc)
        return 0

    cdef int report(self, exc) except -1:
        if takes_debug:
            source = format_callback_source(self.callback, self.args, debug=self.loop._debug)
        else:
            source = format_callback_source(self.callback, self.args)
        report = {"message": f"Exception in callback {source}", "exception": exc, "handle": self}
        if self._source_traceback:
            report["source_traceback"] = self._source_traceback
        self.loop.call_exception_handler(report)
        return 0

    def cancel(self):
        self.forget()

    cdef int forget(self) except -1:
        if not self.cancelled_:
            self.cancelled_ = True
            if self.loop._debug:
                if self.debug_info is None:
                    self.debug_info = [None, None]
                self.debug_info[1] = repr(self)
            self.callback = self.args = None
        return 0

    def cancelled(self):
        return self.cancelled_

    @property
    def get_context(self):
        # Since 3.12; where it is missing, asyncio calls the exception handler outside this context.
        if sys.version_info < (3, 12):
            raise AttributeError("get_context")
        return self.own_context

    def own_context(self):
        return self.context

    def __repr__(self):
        return events.Handle.__repr__(self)

    def _repr_info(self):
        return events.Handle._repr_info(self)

    @property
    def __class__(self):
        return events.Handle

    @property
    def _callback(self):
        return self.callback

    @property
    def _args(self):
        return self.args

    @property
    def _context(self):
        return self.context

    @property
    def _loop(self):
        return self.loop

    @property
    def _source_traceback(self):
        return None if self.debug_info is None else self.debug_info[0]

    @property
    def _repr(self):
        return None if self.debug_info is None else self.debug_info[1]


@cython.final
cdef class ThreadSafeHandle(Handle):
    """What call_soon_threadsafe() returns since 3.14: another thread's cancel() or cancelled() waits while the
    callback runs. Only then is there anything to lock; asyncio makes a lock for each."""

    cdef unsigned long running_in  # the thread that runs the callback, or 0
    cdef object finished           # threading.Event, made by who has to wait

    cdef int run(self) except -1:
        self.running_in = PyThread_get_thread_ident()
        try:
            Handle.run(self)
        finally:
            self.running_in = 0
            if self.finished is not None:
                self.finished.set()
        return 0

    cdef int wait_for_callback(self) except -1:
        while self.running_in and self.running_in != PyThread_get_thread_ident():
            if self.finished is None:
                self.finished = threading.Event()
            self.finished.wait()
        return 0

    def cancel(self):
        self.wait_for_callback()
        self.forget()

    def cancelled(self):
        self.wait_for_callback()
        return self.cancelled_

    @property
    def __class__(self):
        return thread_safe_class


@cython.final
cdef class TimerHandle(Handle):
    cdef double when_
    cdef object when_given  # None, or what call_at() was given, for when()
    cdef bint scheduled

    def cancel(self):
        if not self.cancelled_:
            if self.scheduled:
                self.loop._timer_cancelled_count += 1
            self.forget()

    def when(self):
        return self.when_ if self.when_given is None else self.when_given

    @property
    def __class__(self):
        return events.TimerHandle

    @property
    def _when(self):
        return self.when()

    @property
    def _scheduled(self):
        return self.scheduled

    @_scheduled.setter
    def _scheduled(self, bint value):
        self.scheduled = value

    def _repr_info(self):
        return events.TimerHandle._repr_info(self)

    def __hash__(self):
        return hash(self.when())

    def __lt__(self, other):
        return events.TimerHandle.__lt__(self, other)

    def __le__(self, other):
        return events.TimerHandle.__le__(self, other)

    def __gt__(self, other):
        return events.TimerHandle.__gt__(self, other)

    def __ge__(self, other):
        return events.TimerHandle.__ge__(self, other)

    def __eq__(self, other):
        return events.TimerHandle.__eq__(self, other)


cdef inline Handle init_handle(Handle handle, LoopCore loop, object callback, object args, object context):
    handle.loop = loop
    handle.callback = callback
    handle.args = args
    handle.context = PyContext_CopyCurrent() if context is None else context
    if loop._debug:
        handle.debug_info = [stack_of_caller(), None]
    return handle


cdef object stack_of_caller():
    try:
        return format_helpers.extract_stack(sys._getframe())
    except ValueError:  # a thread that runs no Python function
        return None


# The timers are a binary heap in a plain list, `loop._scheduled`, which heapq understands too: patched loops pop
# from it, and somebody's asyncio.TimerHandle may stand in it.

cdef inline double when_of(PyObject *timer) except? -1:
    if Py_TYPE(<object>timer) is <PyTypeObject *>TimerHandle:
        return (<TimerHandle>timer).when_
    return (<object>timer)._when


cdef inline bint is_cancelled(PyObject *timer) except -1:
    if Py_TYPE(<object>timer) is <PyTypeObject *>TimerHandle:
        return (<TimerHandle>timer).cancelled_
    return (<object>timer)._cancelled


cdef inline double first_due(list heap) except? -1:
    return when_of(PyList_GET_ITEM(heap, 0))


cdef int heap_push(list heap, TimerHandle timer) except -1:
    cdef Py_ssize_t at = PyList_GET_SIZE(heap), parent
    cdef PyObject **items
    heap.append(timer)
    while at > 0:
        parent = (at - 1) >> 1
        items = PySequence_Fast_ITEMS(heap)
        if not timer.when_ < when_of(items[parent]):
            break
        items[at], items[parent] = items[parent], items[at]
        at = parent
    return 0


cdef object heap_pop(list heap):
    cdef object last = heap.pop(), first
    cdef Py_ssize_t end = PyList_GET_SIZE(heap), at = 0, child
    cdef PyObject **items
    cdef double when
    if end == 0:
        return last
    first = heap[0]
    heap[0] = last
    when = when_of(<PyObject *>last)
    while True:
        child = 2 * at + 1
        if child >= end:
            break
        items = PySequence_Fast_ITEMS(heap)
        if child + 1 < end and when_of(items[child + 1]) < when_of(items[child]):
            child += 1
        if not when_of(items[child]) < when:
            break
        items[at], items[child] = items[child], items[at]
        at = child
    return first
