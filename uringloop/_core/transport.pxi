# Transport: what stream and datagram transports have in common: a descriptor that the monitor watches, callbacks
# in the contexts that asyncio would use, flow control, and one end.
#
# Promise: it is in the loop's table from its start until its descriptor is given back, exactly once.

cdef bint attach_takes_transport = asyncio.Server._attach.__code__.co_argcount > 1  # since 3.13


cdef class Transport(Entry):
    cdef object __weakref__
    cdef dict __dict__
    cdef LoopCore loop          # None once closed, like what follows
    cdef int fd, fd_shown       # -1 once closed; what it was, for repr()
    cdef uint32_t interest      # what the monitor watches
    cdef uint32_t noticed       # what it reported and was not handled yet
    cdef bint queued, closing, paused, connected, protocol_paused
    cdef bint sending           # the monitor sends for it; it reads the chunks until it has reported the end
    cdef bint by_ring           # the monitor receives for it, where it can
    cdef list received          # by the monitor and not handed over yet: bytes, at last 0 for the end or -errno
    cdef bint hidden            # asyncio's sendfile has taken it out of loop._transports for a while
    cdef Py_ssize_t lost        # 1 once connection_lost() is on its way; counts later writes
    cdef object protocol, server
    cdef object context, read_context, write_context  # 3.15 gives a connection one context
    cdef object sock, sock_shown, peername, sockname, extra
    cdef const int *sock_fd     # the number inside the socket object, or NULL: somebody may close that
    cdef Py_ssize_t buffer_size  # what waits to be sent
    cdef object high_water, low_water
    cdef Py_ssize_t high_bytes
    cdef Py_ssize_t read_max    # bytes of one read

    def __cinit__(self, *args, **kwargs):
        ul_drop_dict(self)
        self.fd = self.fd_shown = -1
        self.closing, self.lost = True, 1  # until it has started
        self.high_water, self.low_water, self.high_bytes = 65536, 16384, 65536

    # -- what each kind does in its own way --

    cdef int handle(self, uint32_t event) except -1:
        return 0

    cdef object handler(self, uint32_t event):
        """The method that asyncio would have called, for a report."""

    cdef int drop_unsent(self) except -1:
        return 0

    # -- its start --

    @cython.final
    cdef int begin(self, int fd, waiter) except -1:
        cdef LoopCore loop = self.loop
        if fd < 0:
            raise os_error(EBADF)
        self.fd = self.fd_shown = fd  # from here on it is ours to close
        self.closing, self.lost = False, 0
        loop.enter_transport(self)
        loop.call_soon_natively(self.protocol.connection_made, (self,), self.context)
        # connection_made() comes before the first byte, and before the waiter wakes.
        loop.call_soon_natively(self._start_reading, (), self.context)
        if waiter is not None:
            loop.call_soon_natively(futures._set_result_unless_cancelled, (waiter, None), self.context)
        return 0

    # -- watching --

    @cython.final
    cdef int watch(self, uint32_t interest) except -1:
        cdef uint32_t before = self.interest
        self.noticed &= interest | UL_DATA | UL_SENT
        if interest == before:
            return 0
        self.interest = interest
        if not self.loop.closed and self.loop.transport_at(self.fd) is self:
            try:
                self.loop.update(self.fd, self.loop.wanted_by_keys(self.fd))
            except BaseException:
                self.interest = before
                raise
        return self.hold()

    @cython.final
    cdef int hold(self) except -1:
        """It lives as long as the monitor works for it."""
        if self.interest or self.sending:
            self.loop.watched.add(self)
        else:
            self.loop.watched.discard(self)
        return 0

    @cython.final
    cdef inline object callback_context(self):
        return PyContext_CopyCurrent() if self.context is None else self.context

    def _start_reading(self):
        if not self.closing and not self.paused:
            self.read_context = self.callback_context()
            if self.received:
                self.push(UL_DATA)
            self.watch(self.interest | UL_READ)

    @cython.final
    cdef int start_writing(self) except -1:
        if self.write_context is None:
            self.write_context = self.callback_context()
        return self.watch(self.interest | UL_WRITE)

    @cython.final
    cdef int stop_writing(self) except -1:
        self.write_context = None
        return self.watch(self.interest & ~UL_WRITE)

    @cython.final
    cdef int notice(self, uint32_t events) except -1:
        events &= self.interest
        return self.push(events) if events else 0

    @cython.final
    cdef int push(self, uint32_t event) except -1:
        self.noticed |= event
        if not self.queued:
            self.loop.ready.push(self)
            self.queued = True
            if self.loop.host_waits:
                self.loop.wake_host()
        return 0

    @cython.final
    cdef int run(self) except -1:
        self.queued = False
        if self.noticed & UL_DATA:
            self.noticed &= ~(UL_DATA | UL_READ)  # one callback a pass: readiness will be reported again
            try:
                self.run_in(self.read_context, UL_DATA)
            except BaseException:
                if self.noticed & UL_SENT:  # it is said once
                    self.push(UL_SENT)
                raise
            finally:
                if self.received and not self.paused and not self.closing:
                    self.push(UL_DATA)
        if self.noticed & UL_SENT:
            self.noticed &= ~UL_SENT
            try:
                self.run_in(self.callback_context() if self.write_context is None else self.write_context, UL_SENT)
            except BaseException:
                if self.loop is not None:
                    self.push(UL_SENT)
                raise
        if self.noticed & UL_READ:
            self.noticed &= ~UL_READ
            self.run_in(self.read_context, UL_READ)
        if self.noticed & UL_WRITE:
            self.noticed &= ~UL_WRITE
            self.run_in(self.write_context, UL_WRITE)
        return 0

    @cython.final
    cdef int run_in(self, context, uint32_t event) except -1:
        """Handles an event as asyncio's handles do: in its context, and only SystemExit and KeyboardInterrupt
        leave it."""
        cdef LoopCore loop = self.loop
        try:
            if PyContext_Enter(context) < 0:
                ul_raise_again()
            try:
                self.handle(event)
            finally:
                PyContext_Exit(context)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            init_handle(Handle.__new__(Handle), loop, self.handler(event), (), context).report(exc)
        return 0

    @cython.final
    cdef inline bint number_is_lost(self) noexcept:
        """True, with errno set, when the socket was closed behind the transport's back: the number may be
        another connection's by now."""
        if self.sock_fd == NULL or self.sock_fd[0] == self.fd:
            return False
        set_errno(EBADF)
        return True

    # -- flow control --

    @cython.final
    cdef int maybe_pause_protocol(self) except -1:
        if self.buffer_size <= self.high_bytes or self.protocol_paused:
            return 0
        self.protocol_paused = True
        return self.tell_protocol("pause_writing")

    @cython.final
    cdef int maybe_resume_protocol(self) except -1:
        if not self.protocol_paused or self.buffer_size > self.low_water:
            return 0
        self.protocol_paused = False
        return self.tell_protocol("resume_writing")

    @cython.final
    cdef int tell_protocol(self, str name) except -1:
        try:
            getattr(self.protocol, name)()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self.loop.call_exception_handler({
                "message": f"protocol.{name}() failed",
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })
        return 0

    @cython.final
    cdef bint is_lost(self) except -1:
        if not self.lost:
            return False
        if self.lost >= constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
            selector_events.logger.warning("socket.send() raised exception.")
        self.lost += 1
        return True

    @cython.final
    cdef int set_limits(self, high, low) except -1:
        if high is None:
            high = 65536 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high_water, self.low_water = high, low
        self.high_bytes = int(min(high, sys.maxsize))
        return 0

    def get_write_buffer_limits(self):
        return (self.low_water, self.high_water)

    @cython.always_allow_keywords(False)
    def get_write_buffer_size(self):
        return self.buffer_size

    @cython.always_allow_keywords(False)
    def is_reading(self):
        return not self.closing and not self.paused

    def pause_reading(self):
        if self.closing or self.paused:
            return
        self.paused = True
        self.watch(self.interest & ~UL_READ)
        if self.loop._debug:
            selector_events.logger.debug("%r pauses reading", self)

    def resume_reading(self):
        if self.closing or not self.paused:
            return
        self.paused = False
        self._start_reading()
        if self.loop._debug:
            selector_events.logger.debug("%r resumes reading", self)

    # -- its end --

    @cython.always_allow_keywords(False)
    def is_closing(self):
        return self.closing

    def abort(self):
        self._force_close(None)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        if self.loop is None:
            return
        if isinstance(exc, OSError):
            if self.loop._debug:
                selector_events.logger.debug("%r: %s", self, message, exc_info=exc)
        else:
            self.loop.call_exception_handler({
                "message": message,
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })
        self._force_close(exc)

    def _force_close(self, exc):
        if self.lost:
            return
        self.drop_unsent()
        self.closing = True
        self.write_context = None
        self.watch(0)
        self.lost += 1
        self.loop.call_soon_natively(self._call_connection_lost, (exc,), self.context)

    def _call_connection_lost(self, exc):
        try:
            if self.connected:
                self.protocol.connection_lost(exc)
        finally:
            self.release()

    @cython.final
    cdef int release(self) except -1:
        """Gives back the descriptor and everything that this transport holds."""
        cdef LoopCore loop = self.loop
        cdef int fd = self.fd
        server, sock = self.server, self.sock
        _kept = self.protocol, self.read_context, self.write_context  # until the end: dropping them may call us
        if loop is None:
            return 0
        self.closing, self.lost = True, max(self.lost, 1)
        self.drop_unsent()
        self.watch(0)
        self.noticed, self.received = 0, None
        if loop.receive_mode and loop.monitor_is_open() and loop.transport_at(fd) is self:
            ul_fdmon_forget(loop.monitor, fd)
        loop.leave_transport(self)
        self.fd = -1
        self.sock_fd = NULL
        self.loop = self.protocol = self.server = self.sock = None
        self.read_context = self.write_context = self.context = None
        if sock is not None:
            sock.close()
        else:
            close(fd)
        if server is not None:
            if attach_takes_transport:
                server._detach(self)
            else:
                server._detach()
        return 0

    def __del__(self):
        if self.fd >= 0:
            if PyErr_ResourceWarning(self, 1, "unclosed transport %R", <PyObject *>self) < 0:
                PyErr_WriteUnraisable(self)  # warnings are errors here; what follows happens all the same
            self.release()

    # -- what it is --

    @cython.always_allow_keywords(False)
    def get_protocol(self):
        return self.protocol

    def set_protocol(self, protocol):
        self.protocol = protocol
        self.connected = True

    def get_extra_info(self, name, default=None):
        if name == "peername":
            return self.peername
        if name == "sockname":
            return self.sockname
        if name == "socket":
            if self.sock_shown is None:
                self.sock_shown = trsock.TransportSocket(self.python_socket())
            return self.sock_shown
        return default if self.extra is None else self.extra.get(name, default)

    @cython.final
    cdef object python_socket(self):
        """The socket object; an accepted connection has none before somebody asks."""
        if self.sock is None:
            if self.fd < 0:
                closed = socket_module.socket()
                closed.close()
                return closed
            self.sock = socket_module.socket(fileno=self.fd)
            self.sock.setblocking(False)
            self.sock_fd = number_in_socket(self.sock)
        return self.sock

    def __repr__(self):
        info = [self.__class__.__name__]
        if self.fd < 0:
            info.append("closed")
        elif self.closing:
            info.append("closing")
        info.append(f"fd={self.fd_shown}")
        if self.loop is not None and not self.loop.closed:
            info.append("read=polling" if self.interest & UL_READ else "read=idle")
            state = "polling" if self.interest & UL_WRITE else "idle"
            info.append(f"write=<{state}, bufsize={self.buffer_size}>")
        return f"<{' '.join(info)}>"

    # -- what asyncio and libraries reach for --

    @property
    def max_size(self):
        return self.read_max

    @max_size.setter
    def max_size(self, Py_ssize_t size):
        if size < 1:
            raise ValueError(f"max_size must be positive, not {size}")
        self.read_max = size

    @property
    def _loop(self):
        return self.loop

    @property
    def _sock(self):
        return None if self.fd < 0 else self.python_socket()

    @_sock.setter
    def _sock(self, sock):
        self.sock, self.sock_fd = sock, number_in_socket(sock)

    @property
    def _sock_fd(self):
        return self.fd_shown

    @property
    def _extra(self):
        names = {name: self.get_extra_info(name) for name in ("socket", "sockname", "peername")}
        return {**names, **(self.extra or {})}

    @property
    def _protocol(self):
        return self.protocol

    @property
    def _server(self):
        return self.server

    @property
    def _protocol_connected(self):
        return self.connected

    @property
    def _protocol_paused(self):
        return self.protocol_paused

    @property
    def _paused(self):
        return self.paused

    @property
    def _closing(self):
        return self.closing

    @property
    def _conn_lost(self):
        return self.lost

    @property
    def _high_water(self):
        return self.high_water

    @property
    def _low_water(self):
        return self.low_water


cdef const int *number_in_socket(sock) noexcept:
    """Where a socket object keeps its descriptor: first in CPython's struct, which is looked at to be sure."""
    cdef const int *number = &(<SocketObject *>sock).sock_fd
    if isinstance(sock, socket_module.socket) and number[0] == sock.fileno():
        return number
    return NULL


cdef object address_or_none(ask):
    try:
        return ask()
    except OSError:
        return None
