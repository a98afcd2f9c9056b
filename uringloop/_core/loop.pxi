# LoopCore: the turn. Compute the timeout, ask the kernel, collect due timers, run what was ready, send what was
# written.
#
# Promise: the order of callbacks is asyncio's: what was queued, then descriptors, then timers; what is queued
# meanwhile runs in the next pass. A subclass that overrides a building block of the turn gets asyncio's own turn.

cdef enum:
    EVENTS_PER_TURN = 64  # docs/decisions.md 10

cdef double GIL_KEPT_MAX_S = 500e-6

cdef double SELECT_TIMEOUT_MAX_S = 24 * 3600
cdef object tuple_new = tuple.__new__
cdef object run_once_of_asyncio = asyncio.SelectorEventLoop._run_once
cdef object running_loop = asyncio._get_running_loop
cdef dict task_names = vars(tasks), future_names = vars(futures)  # somebody may replace Task and Future there
cdef object create_task_of_asyncio = asyncio.SelectorEventLoop.create_task
cdef bint tasks_take_options = sys.version_info >= (3, 14)  # before, the loop looks at create_task()'s options

cdef enum SendPolicy:
    SEND_NOW
    SEND_CALLBACK
    SEND_TURN
    SEND_RING  # as SEND_TURN; on io_uring the sends are requests of the turn's enter

cdef enum ReceiveMode:
    RECEIVE_READINESS  # the monitor says when, the transport reads
    RECEIVE_AUTO       # the monitor receives for a transport while its messages are small
    RECEIVE_RING       # always, but for BufferedProtocol

cdef struct FirstTry:
    int fd, err
    iovec piece
    Py_ssize_t size, sent

# Whoever replaces one of these wants to be asked at every step.
cdef tuple BUILDING_BLOCKS = (
    "time", "call_soon", "call_at", "call_later", "_run_once", "_process_events", "_add_callback"
)


cdef class LoopCore:
    """The native half of `uringloop.EventLoop`; its other half is `asyncio.SelectorEventLoop`."""

    # What asyncio's half reads and writes by these names.
    cdef public list _scheduled
    cdef public bint _debug, _stopping
    cdef public object _current_handle, _task_factory, slow_callback_duration
    cdef public double _clock_resolution
    cdef public Py_ssize_t _timer_cancelled_count

    cdef bint closed
    cdef object thread_id
    cdef ReadyQueue ready
    cdef ul_fdmon *monitor
    cdef object fdmon, monitor_owner, selector
    cdef dict keys               # descriptor -> SelectorKey of add_reader() and add_writer()
    cdef bint stepwise           # asyncio's own turn, because a building block was replaced
    cdef bint awake              # running callbacks: the ready queue is looked at before the kernel is
    cdef bint woken              # the wake-up byte is under way
    cdef readonly bint _hosted   # a foreign main loop waits: ours never does
    cdef bint host_waits         # it has to be told of what is queued
    cdef double turned_s         # when the monitor answered last
    cdef double gil_shared_s
    cdef bint shares_gil         # this turn's answers leave together, without the GIL
    cdef bint in_pass            # writes may wait, for the end of their callback or of the turn
    cdef SendPolicy send_policy
    cdef list unsent             # transports with writes that wait
    cdef StreamTransport answering  # the one whose read callback runs: its writes leave when that returns
    cdef set watched             # transports that the monitor watches: they live as long as that
    cdef dict sock_readers, sock_writers  # descriptor -> future of sock_recv(), sock_sendall() and their kin
    cdef public bint _has_foreign_transports
    cdef PyObject **transports   # by descriptor, borrowed
    cdef int transports_size
    cdef ReadMemory memory
    cdef ReceiveMode receive_mode

    def __cinit__(self, *args, **kwargs):
        self.closed = True  # nothing to close before asyncio's __init__ has run
        self.ready = ReadyQueue()
        self._scheduled = []
        self.unsent = []
        self.watched = set()
        self.sock_readers, self.sock_writers = {}, {}

    def __dealloc__(self):
        free(self.transports)

    def _open(self, selector, str send_policy, str receive_mode, Py_ssize_t read_size):
        """Takes over the selector's monitor. Before asyncio's __init__, which watches the wake-up descriptor."""
        self.selector = selector
        self.fdmon = selector._fdmon
        address, self.monitor_owner = self.fdmon.pointer()
        self.monitor = <ul_fdmon *><size_t>address
        if self.monitor.layout != UL_FDMON_LAYOUT:
            raise ImportError("uringloop's two extensions were built from different sources; install it again")
        self.keys = selector._fd_to_key
        self.send_policy = {
            "now": SEND_NOW, "callback": SEND_CALLBACK, "turn": SEND_TURN, "ring": SEND_RING
        }[send_policy]
        if self.fdmon.name == "io_uring":
            self.receive_mode = {
                "readiness": RECEIVE_READINESS, "auto": RECEIVE_AUTO, "ring": RECEIVE_RING
            }[receive_mode]
        self.memory = ReadMemory()
        self.memory.size = read_size
        self.examine_building_blocks()

    @property
    def _closed(self):
        return self.closed

    @_closed.setter
    def _closed(self, bint closed):
        self.closed = closed
        if closed:  # nothing is watched any more: transports that nobody holds are unclosed, and say so
            self.watched.clear()
            self.sock_readers.clear()
            self.sock_writers.clear()

    @property
    def _thread_id(self):
        return self.thread_id

    @_thread_id.setter
    def _thread_id(self, thread_id):
        # asyncio sets it when a run begins. By then a patcher has done its work: a derived class, another class
        # put in its place (looptime), attributes of this object, another select().
        self.thread_id = thread_id
        if thread_id is not None:
            self.examine_building_blocks()
        elif self.send_policy == SEND_RING:  # no turn follows, with which they would leave
            self.take_back_sends()

    def __setattr__(self, name, value):
        PyObject_GenericSetAttr(self, name, <PyObject *>value)
        if name in BUILDING_BLOCKS or name == "__class__":
            self.examine_building_blocks()

    def __delattr__(self, name):
        PyObject_GenericSetAttr(self, name, NULL)
        if name in BUILDING_BLOCKS:
            self.examine_building_blocks()

    cdef int examine_building_blocks(self) except -1:
        self.stepwise = "select" in vars(self.selector) or not all(map(self._is_original, BUILDING_BLOCKS))
        return 0

    def _is_original(self, name):
        """Whether a building block of the turn is asyncio's or ours."""
        if name in vars(self):
            return False
        owner = next(cls for cls in type(self).__mro__ if name in vars(cls))
        return owner is LoopCore or owner.__module__.startswith("asyncio.")

    @property
    def _ready(self):
        return self.ready

    @_ready.setter
    def _ready(self, entries):
        self.ready.clear()
        for entry in entries:
            self.ready.push(entry)

    # -- calling soon and later --

    cdef inline int check_open(self) except -1:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        return 0

    cdef inline int check_call(self, object callback, str method, bint in_thread) except -1:
        self.check_open()
        if self._debug:
            if in_thread:
                self._check_thread()
            self._check_callback(callback, method)
        return 0

    cdef inline Handle queue(self, object callback, object args, object context):
        cdef Handle handle = init_handle(Handle.__new__(Handle), self, callback, args, context)
        self.ready.push(handle)
        if self.host_waits:
            self.wake_host()
        return handle

    cdef int call_soon_natively(self, object callback, tuple args, object context) except -1:
        """For our own callers: by way of an override where there is one."""
        if self.stepwise:
            self.call_soon(callback, *args, context=context)
        else:
            self.check_open()
            self.queue(callback, args, context)
        return 0

    def call_soon(self, callback, *args, context=None):
        self.check_call(callback, "call_soon", True)
        return self.queue(callback, args, context)

    def call_soon_threadsafe(self, callback, *args, context=None):
        self.check_call(callback, "call_soon_threadsafe", False)
        cdef Handle handle
        if thread_safe_class is None:
            handle = Handle.__new__(Handle)
        else:
            handle = ThreadSafeHandle.__new__(ThreadSafeHandle)
        self.ready.push(init_handle(handle, self, callback, args, context))
        if not self.awake and (self.stepwise or not self.woken):
            self.woken = True  # before the write, which lets the GIL go: the loop may wake and wait again meanwhile
            try:
                self._write_to_self()
            except BaseException:
                self.woken = False
                raise
        return handle

    cdef TimerHandle schedule(self, double when, object given, object callback, object args, object context):
        cdef TimerHandle timer = TimerHandle.__new__(TimerHandle)
        timer.when_ = when
        timer.when_given = given
        init_handle(timer, self, callback, args, context)
        heap_push(self._scheduled, timer)
        timer.scheduled = True
        if self.host_waits:
            self.wake_host()
        return timer

    def call_later(self, delay, callback, *args, context=None):
        if self.stepwise or not isinstance(delay, (float, int)):
            if delay is None:
                raise TypeError("delay must not be None")
            return self.call_at(self.time() + delay, callback, *args, context=context)
        self.check_call(callback, "call_at", True)
        return self.schedule(monotonic() + <double>delay, None, callback, args, context)

    def call_at(self, when, callback, *args, context=None):
        if when is None:
            raise TypeError("when cannot be None")
        self.check_call(callback, "call_at", True)
        return self.schedule(<double>when, when, callback, args, context)

    def _timer_handle_cancelled(self, handle):
        if handle._scheduled:
            self._timer_cancelled_count += 1

    def _add_callback(self, handle):
        if not handle._cancelled:
            self.ready.push(handle)
            if self.host_waits:
                self.wake_host()

    def stop(self):
        self._stopping = True
        if self.host_waits:
            self.wake_host()

    # -- small questions that tasks and futures ask all the time --

    @cython.always_allow_keywords(False)
    def time(self):
        return monotonic()

    @cython.always_allow_keywords(False)
    def get_debug(self):
        return self._debug

    @cython.always_allow_keywords(False)
    def is_closed(self):
        return self.closed

    @cython.always_allow_keywords(False)
    def is_running(self):
        return self.thread_id is not None

    @cython.always_allow_keywords(False)
    def create_future(self):
        future_class = future_names["Future"]
        return future_class() if running_loop() is self else future_class(loop=self)

    def create_task(self, coro, **kwargs):
        if self._debug or self._task_factory is not None or kwargs and (not tasks_take_options or "loop" in kwargs):
            return create_task_of_asyncio(self, coro, **kwargs)
        self.check_open()
        if running_loop() is not self:
            kwargs["loop"] = self
        task_class = task_names["Task"]
        return PyObject_Call(task_class, (coro,), kwargs) if kwargs else task_class(coro)

    # -- the turn --

    def _run_once(self):
        if self.stepwise:
            run_once_of_asyncio(self)
            return
        if self.monitor == NULL:
            raise RuntimeError("this loop was never initialised")
        if self.in_pass or self.unsent:  # a turn within a callback; or the last one ended in an exception
            self._before_select()
        self.sweep_timers()
        self.poll(self.timeout_ns())
        self.collect_due_timers()
        self.awake = self.in_pass = True
        try:
            self.run_ready()
        finally:
            self.awake = self.in_pass = False
            if self.unsent:
                self.send_unsent()

    cdef int sweep_timers(self) except -1:
        """Drops cancelled timers: from the top, and from everywhere when half of them are, as asyncio does."""
        cdef list heap = self._scheduled
        cdef Py_ssize_t size = PyList_GET_SIZE(heap)
        if size > 100 and self._timer_cancelled_count * 2 > size:
            kept = []
            for timer in heap:
                if timer._cancelled:
                    timer._scheduled = False
                else:
                    kept.append(timer)
            heapq.heapify(kept)
            self._scheduled = kept
            self._timer_cancelled_count = 0
            return 0
        while PyList_GET_SIZE(heap) and is_cancelled(PyList_GET_ITEM(heap, 0)):
            self._timer_cancelled_count -= 1
            heap_pop(heap)._scheduled = False
        return 0

    cdef inline int64_t timeout_ns(self) except? -2:
        return 0 if self._hosted else self.due_in_ns()

    cdef int64_t due_in_ns(self) except? -2:
        """When the next pass is due; 0 is now, -1 never."""
        cdef double delay_s
        if self.ready.count or self._stopping:
            return 0
        if not PyList_GET_SIZE(self._scheduled):
            return -1
        delay_s = first_due(self._scheduled) - (<double>self.time() if self.stepwise else monotonic())
        if not delay_s > 0:  # nan, which sorts anywhere, is due
            return 0
        return <int64_t>ceil((delay_s if delay_s < SELECT_TIMEOUT_MAX_S else SELECT_TIMEOUT_MAX_S) * 1e9)

    cdef int poll(self, int64_t timeout_ns) except -1:
        cdef ul_event events[EVENTS_PER_TURN]
        cdef int result = self.turn(timeout_ns, events), i
        for i in range(result & ~UL_DOWNGRADED):
            if not events[i].events & (UL_DATA | UL_SENT):
                self.deliver(events[i].fd, events[i].events)
        if result & UL_DOWNGRADED:
            self.fdmon.log_downgrade()
        return 0

    cdef int turn(self, int64_t timeout_ns, ul_event *events) except -1:
        """One turn of the monitor. The GIL is kept when that cannot block: letting it go costs more than asking.
        What is said once is delivered here, before readiness, whose delivery may fail, and before Python code."""
        cdef int n, i
        self.woken = False
        if timeout_ns == 0 and not self.shares_gil:
            n = ul_fdmon_turn(self.monitor, 0, events, EVENTS_PER_TURN)
        else:  # it may block, or the last turn had nothing to send
            with nogil:
                n = ul_fdmon_turn(self.monitor, timeout_ns, events, EVENTS_PER_TURN)
        self.share_gil()
        if n < 0:
            raise self.fdmon.error(n)
        for i in range(n & ~UL_DOWNGRADED):
            if events[i].events & (UL_DATA | UL_SENT):
                self.deliver_result(&events[i])
        return n

    cdef int share_gil(self) except -1:
        """Every half a millisecond a loop that is never idle sends the answers of one turn without the GIL.

        A thread that waits for it needs some microseconds to wake up, and would find it taken again after one
        short system call: it takes a row of them. Without this it waits for the interpreter's switch interval of
        5 ms. Nothing is done for a process without other threads. docs/decisions.md 17
        """
        cdef double now = monotonic()
        self.turned_s, self.shares_gil = now, False
        if now > self.gil_shared_s + GIL_KEPT_MAX_S:
            self.gil_shared_s = now
            self.shares_gil = PyThreadState_Next(PyInterpreterState_ThreadHead(PyInterpreterState_Get())) != NULL
        return 0

    cdef int deliver(self, int fd, uint32_t events) except -1:
        cdef Transport transport = self.transport_at(fd)
        if transport is not None and transport.interest & events:
            transport.notice(events)
            if not self.keys:
                return 0
        if self.sock_readers or self.sock_writers:
            self.wake_sock_calls(fd, events)
        cdef PyObject *found = PyDict_GetItemWithError(self.keys, fd)
        if found == NULL:
            return 0
        file, _, wanted, (reader, writer) = <object>found
        events &= <uint32_t>wanted
        if events & UL_READ and reader is not None:
            if reader._cancelled:
                self._remove_reader(file)
            else:
                self.ready.push(reader)
        if events & UL_WRITE and writer is not None:
            if writer._cancelled:
                self._remove_writer(file)
            else:
                self.ready.push(writer)
        return 0

    cdef int deliver_result(self, const ul_event *event) except -1:
        """What the monitor received leaves its buffer here: the next turn fills it again."""
        cdef Transport transport = self.transport_at(event.fd)
        if not isinstance(transport, StreamTransport):
            return 0
        if event.events == UL_DATA:
            return (<StreamTransport>transport).keep(<const char *>event.data, event.result)
        return (<StreamTransport>transport).sent_by_ring(event.result)

    cdef int collect_due_timers(self) except -1:
        cdef list heap = self._scheduled
        cdef double now, end
        if not PyList_GET_SIZE(heap):
            return 0
        now = monotonic()
        end = max(now + self._clock_resolution, nextafter(now, INFINITY))
        while PyList_GET_SIZE(heap) and not first_due(heap) >= end:
            timer = heap_pop(heap)
            timer._scheduled = False
            self.ready.push(timer)
        return 0

    cdef int run_ready(self) except -1:
        cdef Py_ssize_t left = self.ready.count
        cdef object entry
        while left > 0 and self.ready.count:
            left -= 1
            entry = self.ready.pop()
            if isinstance(entry, Entry) and not self._debug:
                if not (<Entry>entry).is_cancelled():
                    (<Entry>entry).run()
            elif not entry._cancelled:
                self.run_watched(entry)
            if self.send_policy == SEND_CALLBACK and self.unsent:
                self.send_unsent()
        return 0

    cdef int run_watched(self, entry) except -1:
        """Runs what is not ours, or anything in debug mode, which says what took long."""
        if not self._debug:
            entry._run()
            return 0
        self._current_handle = entry
        cdef double started = monotonic(), took
        try:
            entry._run()
            took = monotonic() - started
            if took >= self.slow_callback_duration:
                base_events.logger.warning("Executing %s took %.3f seconds", base_events._format_handle(entry), took)
        finally:
            self._current_handle = None
        return 0

    cdef int send_unsent(self) except -1:
        """Sends what was written in this turn, connection after connection."""
        cdef list unsent = self.unsent
        cdef Py_ssize_t sent = 0
        cdef StreamTransport transport
        self.unsent = []
        try:
            if self.shares_gil and self.send_policy != SEND_RING:
                self.shares_gil = False
                self.send_without_gil(unsent)
            for transport in unsent:
                sent += 1
                if transport.send_waits:
                    transport.send_waiting()
        finally:
            if sent < len(unsent):  # an exception handler let KeyboardInterrupt through
                self.unsent += unsent[sent:]
        return 0

    cdef int send_without_gil(self, list unsent) except -1:
        """Tries what consists of one chunk; the rest is left to `send_unsent`."""
        cdef FirstTry tries[EVENTS_PER_TURN]
        cdef int count = 0, i
        cdef StreamTransport transport
        cdef list held = []  # another thread may drop the transports and their chunks meanwhile
        for transport in unsent:
            if count == EVENTS_PER_TURN:
                break
            if transport.send_waits and transport.end - transport.first == 1 and not transport.number_is_lost():
                transport.send_waits = False  # it may stand in the list twice
                held.append((transport, <object>transport.chunks[transport.first]))
                tries[count].fd = transport.fd
                transport.gather(&tries[count].piece, &tries[count].size)
                count += 1
        with nogil:
            for i in range(count):
                tries[i].sent = send(tries[i].fd, tries[i].piece.iov_base, tries[i].size, MSG_DONTWAIT | MSG_NOSIGNAL)
                tries[i].err = errno
        for i in range(count):
            transport = held[i][0]
            tries[i].err = transport.take_result(tries[i].sent, tries[i].err)
        i = 0
        try:
            while i < count:
                transport = held[i][0]
                i += 1
                if not transport.lost:
                    transport.after_first_try(tries[i - 1].err)
        finally:
            for transport, _ in held[i:]:  # an exception handler let KeyboardInterrupt through
                transport.send_waits = True
                self.unsent.append(transport)
        return 0

    # -- for asyncio's own turn: its selector hands the events of our transports to us --

    def _before_select(self):
        """A nested or foreign turn is about to wait: nothing may wait for the end of ours."""
        self.awake = self.in_pass = self.woken = False
        self.send_what_waits()

    cdef int send_what_waits(self) except -1:
        """Sends what waits for the end of a callback or of the turn."""
        cdef StreamTransport transport = self.answering
        if transport is not None and transport.send_waits:
            transport.send_waiting()
        if self.unsent:
            self.send_unsent()
        return 0

    def _before_fork(self):
        """What the monitor is to send would be sent by both processes."""
        self.send_what_waits()
        self.take_back_sends()

    cdef int take_back_sends(self) except -1:
        for transport in list(self.watched):
            if (<Transport>transport).sending:
                (<StreamTransport>transport).send_by_itself()
        return 0

    def _turn(self, int64_t timeout_ns):
        """As FDMon.turn(), of which our own transports and calls have had their part."""
        cdef ul_event events[EVENTS_PER_TURN]
        cdef Transport transport
        cdef list ready = []
        cdef int result = self.turn(timeout_ns, events), fd, i
        for i in range(result & ~UL_DOWNGRADED):
            fd = events[i].fd
            transport = self.transport_at(fd)
            if transport is not None:
                transport.notice(events[i].events)
            self.wake_sock_calls(fd, events[i].events)
            ready.append((fd, events[i].events))
        if result & UL_DOWNGRADED:
            self.fdmon.log_downgrade()
        return ready

    # -- inside a foreign main loop: see hosted.py --

    def _host(self, bint hosted):
        self._hosted, self.host_waits = hosted, False
        if not hosted:
            ul_fdmon_end_hosting(self.monitor)

    cdef int wake_host(self) except -1:
        """Something was queued by a callback of the host's: it may have looked at its descriptors already."""
        self.host_waits = False
        ul_fdmon_wake_host(self.monitor)
        return 0

    def _prepare_host(self):
        """Has the host woken when a pass is due. Whether that is now."""
        try:
            return self.arm_host()
        except BaseException:
            self.wake_host()
            raise

    cdef bint arm_host(self) except -1:
        if self.in_pass or self.unsent:
            self._before_select()
        if not self.stepwise:
            self.sweep_timers()
        cdef int64_t wake_ns = self.due_in_ns()
        if wake_ns > 0:
            wake_ns += monotonic_ns()  # after the look at the clock: never early
        cdef int due = ul_fdmon_prepare(self.monitor, wake_ns)
        if due < 0:
            raise self.fdmon.error(due)
        self.host_waits = not due
        return due != 0

    def _is_due(self):
        """Whether a callback or a timer waits for a pass. What the kernel has shows at its descriptors."""
        return self.due_in_ns() == 0

    def _dispatch_host(self):
        """One pass, without waiting. No signal handler runs between the pass and what wakes the host for the next."""
        self.host_waits = False
        try:
            self._run_once()
        finally:
            self._prepare_host()

    def _send_what_waits(self):
        """A main loop that a callback has opened sleeps: the callback's writes go before."""
        self.send_what_waits()

    # -- sock_recv() and its kin: see sock.pxi --

    def _recv_now(self, sock, size):
        return recv_now(self, sock, size)

    def _recv_into_now(self, sock, buffer):
        return recv_into_now(self, sock, buffer)

    def _call_now(self, sock, str method, *arguments):
        plain_socket(self, sock)
        return by_method(getattr(sock, method), arguments)

    def _send_now(self, sock, data, Py_ssize_t start):
        return send_now(self, sock, data, start)

    def _wait_once(self, int fd, uint32_t event):
        """A future that is done when the descriptor is ready for UL_READ or UL_WRITE, or may be. As in asyncio, who
        waits last takes the place of whoever waited for that before: a call, a reader or a writer."""
        self.check_open()
        if fd < 0:
            raise ValueError(f"Invalid file descriptor: {fd}")
        if self._has_foreign_transports or self.transport_at(fd) is not None:
            self._ensure_fd_no_transport(fd)
        if fd in self.keys:
            self.unwatch(fd, event)
        cdef dict calls = self.sock_readers if event == UL_READ else self.sock_writers
        # Who waited before may have done so on another socket that had this number: the watch is made anew.
        if fd in self.sock_readers or fd in self.sock_writers:
            ul_fdmon_update(self.monitor, fd, 0)
        waiter = calls[fd] = self.create_future()
        try:
            self.update(fd, self.wanted_by_keys(fd))
        except BaseException:
            del calls[fd]
            raise
        return waiter

    def _wait_no_more(self, int fd, uint32_t event, waiter):
        """Its call was cancelled."""
        if (self.sock_readers if event == UL_READ else self.sock_writers).get(fd) is waiter:
            try:
                self.drop_sock_call(fd, event)
            except OSError:  # the socket was closed meanwhile: the cancellation goes on, and who else waits finds out
                self.wake_sock_calls(fd, UL_READ | UL_WRITE)

    cdef bint drop_sock_call(self, int fd, uint32_t event) except -1:
        waiter = (self.sock_readers if event == UL_READ else self.sock_writers).pop(fd, None)
        if waiter is None:
            return False
        if not self.closed:
            self.update(fd, self.wanted_by_keys(fd))
        return True

    cdef int wake_sock_calls(self, int fd, uint32_t events) except -1:
        """The watch has ended with this report, unless somebody else needs it."""
        reader = self.sock_readers.pop(fd, None) if events & UL_READ else None
        writer = self.sock_writers.pop(fd, None) if events & UL_WRITE else None
        if reader is not None and not reader.done():
            reader.set_result(None)
        if writer is not None and not writer.done():
            writer.set_result(None)
        if reader is None and writer is None:
            return 0
        if fd in self.sock_readers or fd in self.sock_writers or fd in self.keys or self.transport_at(fd) is not None:
            try:
                self.update(fd, self.wanted_by_keys(fd))
            except OSError:  # closed under them: their next try says so
                self.wake_sock_calls(fd, UL_READ | UL_WRITE)
        return 0

    # -- descriptors --

    cdef int update(self, int fd, uint32_t wanted_by_keys) except -1:
        """Has the monitor watch a descriptor for its transport and for add_reader() and add_writer(), which meet
        on it during sendfile, or when the transport is closing; and once for sock_recv() and its kin."""
        cdef Transport transport = self.transport_at(fd)
        cdef uint32_t events = wanted_by_keys | (0 if transport is None else transport.interest)
        cdef uint32_t once = (UL_READ if fd in self.sock_readers else 0) | (UL_WRITE if fd in self.sock_writers else 0)
        if once:
            events |= once if events else once | UL_ONCE
        elif transport is not None and transport.by_ring and events & UL_READ and not wanted_by_keys & UL_READ:
            events |= 0 if transport.number_is_lost() else UL_RECV
        cdef int result = ul_fdmon_update(self.monitor, fd, events) if self.monitor != NULL else -EBADF
        if result < 0 and (events or not self.fdmon.closed):
            raise self.fdmon.error(result)
        return 0

    cdef bint monitor_is_open(self) except -1:
        """Else its memory may be gone: the collector ends a closed loop, its monitor and transports in any order."""
        return self.monitor != NULL and not self.fdmon.closed

    cdef uint32_t wanted_by_keys(self, int fd) except? 0xffff:
        key = self.keys.get(fd) if self.keys else None
        return 0 if key is None else key[2]

    def _add_reader(self, fd, callback, *args, context=None):
        return self.watch(fd, UL_READ, callback, args, context)

    def _add_writer(self, fd, callback, *args, context=None):
        return self.watch(fd, UL_WRITE, callback, args, context)

    def _remove_reader(self, fd):
        return self.unwatch(fd, UL_READ)

    def _remove_writer(self, fd):
        return self.unwatch(fd, UL_WRITE)

    cdef Handle watch(self, file, uint32_t event, callback, tuple args, context):
        self.check_open()
        cdef Handle handle = init_handle(Handle.__new__(Handle), self, callback, args, context)
        cdef int fd = self.selector._descriptor(file)
        if fd in self.sock_readers or fd in self.sock_writers:
            self.drop_sock_call(fd, event)
        key = self.keys.get(fd)
        cdef uint32_t before = 0
        reader = writer = None
        if key is not None:
            file, _, before, (reader, writer) = key
        if not before & event:
            try:
                self.update(fd, before | event)
            except BaseException:
                if key is not None:  # as EpollSelector: a descriptor gone bad is not registered
                    del self.keys[fd]
                    self.update(fd, 0)
                raise
        if event == UL_READ:
            replaced, reader = reader, handle
        else:
            replaced, writer = writer, handle
        self.keys[fd] = tuple_new(selectors.SelectorKey, (file, fd, before | event, (reader, writer)))
        if replaced is not None:
            replaced.cancel()
        return handle

    cdef bint unwatch(self, file, uint32_t event) except -1:
        if self.closed:
            return False
        cdef int fd = self.selector._descriptor(file)
        key = self.keys.get(fd)
        if key is None:
            return self.drop_sock_call(fd, event)
        file, _, wanted, (reader, writer) = key
        cdef uint32_t left = <uint32_t>wanted & ~event
        if event == UL_READ:
            removed, reader = reader, None
        else:
            removed, writer = writer, None
        if not left:
            del self.keys[fd]
        if left != <uint32_t>wanted:
            self.update(fd, left)
        if left:
            self.keys[fd] = tuple_new(selectors.SelectorKey, (file, fd, left, (reader, writer)))
        if removed is None:
            return self.drop_sock_call(fd, event)
        removed.cancel()
        return True

    # -- the table of transports --

    def _transport_at(self, int fd):
        cdef Transport transport = self.transport_at(fd)
        return None if transport is None or transport.hidden else transport

    cdef inline Transport transport_at(self, int fd):
        if not 0 <= fd < self.transports_size or self.transports[fd] == NULL:
            return None
        return <Transport>self.transports[fd]

    def _transport_fds(self):
        return [fd for fd in range(self.transports_size) if self._transport_at(fd) is not None]

    def _hide_transport(self, Transport transport, bint hidden):
        """As asyncio's sendfile does: others may watch the descriptor for a while."""
        transport.hidden = hidden

    cdef int enter_transport(self, Transport transport) except -1:
        cdef int fd = transport.fd, size = max(self.transports_size, 64)
        cdef PyObject **grown
        while size <= fd:
            size *= 2
        if size > self.transports_size:
            grown = <PyObject **>realloc(self.transports, size * sizeof(PyObject *))
            if grown == NULL:
                raise MemoryError
            memset(grown + self.transports_size, 0, (size - self.transports_size) * sizeof(PyObject *))
            self.transports, self.transports_size = grown, size
        elif self.transports[fd] != NULL:  # its socket was closed behind its back, and the number is used again
            ul_fdmon_forget(self.monitor, fd)
            (<Transport>self.transports[fd]).sending = False
        self.sock_readers.pop(fd, None)  # who takes a socket over takes the place of calls that wait on it
        self.sock_writers.pop(fd, None)
        self.transports[fd] = <PyObject *>transport
        return 0

    cdef void leave_transport(self, Transport transport) noexcept:
        if 0 <= transport.fd < self.transports_size and self.transports[transport.fd] == <PyObject *>transport:
            self.transports[transport.fd] = NULL
