# StreamTransport: TCP and Unix stream sockets, driven by readiness.
#
# Promise: what protocols and libraries see is asyncio's `_SelectorSocketTransport`; every byte that was received
# is handed over once, in order, to whoever is the protocol at that moment, and every byte that write() took is
# sent or its connection is lost.
#
# What is queued for sending are bytes objects only: anything mutable is sent before write() returns, or copied.

cdef enum:
    CHUNKS_PER_SEND = 64     # of one sendmsg(); more of them take another one
    RELEASE_GIL_MIN = 64 * 1024  # bytes of one send

cdef object NAME_DATA_RECEIVED = "data_received"
cdef str WRITE_TAKES = (
    "data argument must be a bytes-like object" if sys.version_info < (3, 14)
    else "data argument must be a bytes, bytearray, or memoryview object"
)
cdef bint attach_takes_transport = asyncio.Server._attach.__code__.co_argcount > 1  # since 3.13


@cython.final
cdef class StreamTransport(Entry):
    """A stream transport. `EventLoop` makes it; its methods are those of `asyncio.Transport`."""

    cdef object __weakref__
    cdef dict __dict__
    cdef LoopCore loop          # None once closed, like what follows
    cdef int fd, fd_shown       # -1 once closed; what it was, for repr()
    cdef uint32_t interest      # what the monitor watches
    cdef uint32_t noticed       # what it reported and was not handled yet
    cdef bint queued, closing, paused, eof_written, connected, buffered, protocol_paused
    cdef bint send_waits        # the chunks wait for the end of the callback or turn, and were not tried yet
    cdef bint keeps_data        # the protocol keeps what it is given: it gets copies of the right size
    cdef Py_ssize_t lost        # 1 once connection_lost() is on its way; counts later writes
    cdef object protocol, server, empty_waiter
    cdef object context, read_context, write_context  # 3.15 gives a connection one context
    cdef object sock, sock_shown, peername, sockname, extra
    cdef PyObject **chunks      # queued bytes objects: chunks[first .. end-1]
    cdef Py_ssize_t first, end, room
    cdef Py_ssize_t offset, buffer_size  # how much of the first was sent; what is left in all
    cdef object high_water, low_water
    cdef Py_ssize_t high_bytes
    cdef Py_ssize_t read_max    # bytes of one read
    cdef const int *sock_fd     # the number inside the socket object, or NULL: somebody may close that
    cdef public object _start_tls_compatible, _sendfile_compatible
    cdef bint hidden            # asyncio's sendfile has taken it out of loop._transports for a while

    def __cinit__(self, *args, **kwargs):
        self.fd = self.fd_shown = -1
        self.closing, self.lost = True, 1  # until start()
        self._start_tls_compatible, self._sendfile_compatible = True, constants._SendfileMode.TRY_NATIVE
        self.high_water, self.low_water, self.high_bytes = 65536, 16384, 65536

    def __dealloc__(self):
        self.drop_chunks(self.end)
        free(self.chunks)

    def __init__(self, LoopCore loop, sock, protocol, waiter=None, extra=None, server=None, context=None):
        if self.fd >= 0:
            raise RuntimeError("a transport is made once")
        extra = dict(extra or ())
        peername = extra.pop("peername") if "peername" in extra else address_or_none(sock.getpeername)
        self.sock = sock
        self.sock_fd = number_in_socket(sock)
        self.extra = extra
        self.start(loop, sock.fileno(), address_or_none(sock.getsockname), peername, protocol, waiter, server, context)

    cdef int start(self, LoopCore loop, int fd, sockname, peername, protocol, waiter, server, context) except -1:
        self.loop = loop
        self.read_max = loop.memory.size
        self.sockname, self.peername, self.context = sockname, peername, context
        self.set_protocol(protocol)
        if server is not None:
            if attach_takes_transport:
                server._attach(self)
            else:
                server._attach()
            self.server = server
        self.fd = self.fd_shown = fd  # from here on it is ours to close
        self.closing, self.lost = False, 0
        loop.enter_transport(self)
        loop.call_soon_natively(protocol.connection_made, (self,), context)
        # connection_made() comes before the first byte, and before the waiter wakes.
        loop.call_soon_natively(self._start_reading, (), context)
        if waiter is not None:
            loop.call_soon_natively(futures._set_result_unless_cancelled, (waiter, None), context)
        return 0

    # -- watching --

    cdef int watch(self, uint32_t interest) except -1:
        cdef uint32_t before = self.interest
        self.noticed &= interest
        if interest == before:
            return 0
        self.interest = interest
        if not self.loop.closed and self.loop.transport_at(self.fd) is self:
            try:
                self.loop.update(self.fd, self.loop.wanted_by_keys(self.fd))
            except BaseException:
                self.interest = before
                raise
        if interest:
            self.loop.watched.add(self)
        else:
            self.loop.watched.discard(self)
        return 0

    cdef inline object callback_context(self):
        return PyContext_CopyCurrent() if self.context is None else self.context

    def _start_reading(self):
        if not self.closing and not self.paused:
            self.read_context = self.callback_context()
            self.watch(self.interest | UL_READ)

    cdef int start_writing(self) except -1:
        if self.write_context is None:
            self.write_context = self.callback_context()
        return self.watch(self.interest | UL_WRITE)

    cdef int stop_writing(self) except -1:
        self.write_context = None
        return self.watch(self.interest & ~UL_WRITE)

    cdef int notice(self, uint32_t events) except -1:
        self.noticed |= events & self.interest
        if self.noticed and not self.queued:
            self.loop.ready.push(self)
            self.queued = True
        return 0

    cdef int run(self) except -1:
        self.queued = False
        if self.noticed & UL_READ:
            self.noticed &= ~UL_READ
            self.run_in(self.read_context, UL_READ)
        if self.noticed & UL_WRITE:
            self.noticed &= ~UL_WRITE
            self.run_in(self.write_context, UL_WRITE)
        return 0

    cdef int run_in(self, context, uint32_t event) except -1:
        """Handles an event as asyncio's handles do: in its context, and only SystemExit and KeyboardInterrupt
        leave it."""
        cdef LoopCore loop = self.loop
        try:
            if PyContext_Enter(context) < 0:
                ul_raise_again()
            try:
                if event == UL_WRITE:
                    self.write_ready()
                else:
                    self.read_and_answer()
            finally:
                PyContext_Exit(context)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            callback = self._read_ready if event == UL_READ else self._write_ready
            init_handle(Handle.__new__(Handle), loop, callback, (), context).report(exc)
        return 0

    cdef int read_and_answer(self) except -1:
        cdef LoopCore loop = self.loop
        cdef StreamTransport before = loop.answering
        loop.answering = self if loop.in_pass and not loop.shares_gil else None
        try:
            if self.buffered:
                self.read_buffered()
            else:
                self.read_data()
        finally:
            if loop.answering is self and self.send_waits:
                self.send_waiting()
            loop.answering = before
        return 0

    def _read_ready(self):
        if not self.lost:
            self.read_and_answer()

    def _write_ready(self):
        if not self.lost:
            self.write_ready()

    # -- receiving --

    cdef int read_data(self) except -1:
        """One read, into memory that stays in the caches. Small data leaves it as a copy of its size; large
        data is handed over where it lies, and if the protocol has let go of it when it returns, which is what a
        parser does, the next read goes there again.
        """
        cdef ReadMemory memory = self.loop.memory
        cdef object buffer = memory.take_buffer(), data
        cdef ssize_t size = self.receive(PyBytes_AS_STRING(buffer), min(self.read_max, memory.size))
        cdef int err
        if size > COPIED_MAX and not self.keeps_data:
            ul_bytes_set_size(buffer, size)
            self.hand_over(buffer)
            if Py_REFCNT(buffer) > 1:
                self.keeps_data = True
            else:
                memory.give_back(buffer)
            return 0
        if size <= 0:
            err = errno
            memory.give_back(buffer)
            return self.nothing_read(size, err)
        try:
            data = memory.small(PyBytes_AS_STRING(buffer), size)
        except MemoryError as exc:  # what was received is lost, and so is the connection
            self._fatal_error(exc, "Fatal read error on socket transport")
            return 0
        memory.give_back(buffer)
        return self.hand_over(data)

    cdef inline ssize_t receive(self, void *memory, size_t size) noexcept:
        if self.number_is_lost():
            return -1
        return recv(self.fd, memory, size, MSG_DONTWAIT)

    cdef inline bint number_is_lost(self) noexcept:
        """True, with errno set, when the socket was closed behind the transport's back: the number may be
        another connection's by now."""
        if self.sock_fd == NULL or self.sock_fd[0] == self.fd:
            return False
        set_errno(EBADF)
        return True

    cdef int hand_over(self, object data) except -1:
        cdef object protocol = self.protocol
        cdef PyObject *arguments[2]
        cdef PyObject *result
        arguments[0], arguments[1] = <PyObject *>protocol, <PyObject *>data
        result = PyObject_VectorcallMethod(<PyObject *>NAME_DATA_RECEIVED, arguments, 2, NULL)
        if result == NULL:
            return self.callback_failed("Fatal error: protocol.data_received() call failed.")
        Py_XDECREF(result)
        return 0

    cdef int nothing_read(self, ssize_t size, int err) except -1:
        if size == 0:
            return self.end_received()
        if err != EAGAIN and err != EINTR:
            self._fatal_error(os_error(err), "Fatal read error on socket transport")
        return 0

    cdef int read_buffered(self) except -1:
        cdef Py_buffer view
        cdef ssize_t size
        cdef int err
        try:
            buffer = self.protocol.get_buffer(-1)
            if not len(buffer):
                raise RuntimeError("get_buffer() returned an empty buffer")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.get_buffer() call failed.")
            return 0
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        except (BufferError, TypeError):
            kind = f"recv_into() argument 1 must be read-write bytes-like object, not {type(buffer).__name__}"
            self._fatal_error(TypeError(kind), "Fatal read error on socket transport")
            return 0
        size = self.receive(view.buf, view.len)
        err = errno
        PyBuffer_Release(&view)
        if size <= 0:
            return self.nothing_read(size, err)
        try:
            self.protocol.buffer_updated(size)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.buffer_updated() call failed.")
        return 0

    cdef int end_received(self) except -1:
        if self.loop._debug:
            selector_events.logger.debug("%r received EOF", self)
        try:
            keep_open = self.protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, "Fatal error: protocol.eof_received() call failed.")
            return 0
        if not keep_open:
            self.close()
        elif self.loop is not None:
            self.watch(self.interest & ~UL_READ)
        return 0

    # -- sending --

    def write(self, data):
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"{WRITE_TAKES}, not {type(data).__name__!r}")
        if self.eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        if not data or self.is_lost():
            return
        if type(data) is bytes and (self.buffer_size or self.may_wait(PyBytes_GET_SIZE(data))):
            self.queue_chunk(data)
            self.send_or_wait()
        else:
            self.send_or_copy(data)

    def writelines(self, list_of_data):
        if self.eof_written:
            raise RuntimeError("Cannot call writelines() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError("unable to writelines; sendfile is in progress")
        if not list_of_data:
            return
        chunks = [data if type(data) is bytes else bytes(memoryview(data)) for data in list_of_data if data is not None]
        if self.is_lost():
            return
        for chunk in chunks:
            if chunk:
                self.queue_chunk(chunk)
        if self.buffer_size:
            self.send_or_wait()

    cdef bint is_lost(self) except -1:
        if not self.lost:
            return False
        if self.lost >= constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
            selector_events.logger.warning("socket.send() raised exception.")
        self.lost += 1
        return True

    cdef inline bint may_wait(self, Py_ssize_t size) noexcept:
        return self.loop.in_pass and self.loop.send_policy != SEND_NOW and size <= self.high_bytes

    cdef inline int queue_chunk(self, object data) except -1:
        if self.end == self.room:
            self.make_room()
        Py_INCREF(data)
        self.chunks[self.end] = <PyObject *>data
        self.end += 1
        self.buffer_size += PyBytes_GET_SIZE(data)
        return 0

    cdef int make_room(self) except -1:
        if self.first > self.room // 2:
            memmove(self.chunks, self.chunks + self.first, (self.end - self.first) * sizeof(PyObject *))
            self.end -= self.first
            self.first = 0
            return 0
        cdef Py_ssize_t room = max(2 * self.room, 2)
        cdef PyObject **chunks = <PyObject **>realloc(self.chunks, room * sizeof(PyObject *))
        if chunks == NULL:
            raise MemoryError
        self.chunks, self.room = chunks, room
        return 0

    cdef void drop_chunks(self, Py_ssize_t end) noexcept:
        while self.first < end:
            self.first += 1
            Py_XDECREF(self.chunks[self.first - 1])

    cdef int send_or_wait(self) except -1:
        """What was queued: wait, try at once, or follow what the kernel has no room for already."""
        if self.interest & UL_WRITE:
            self.maybe_pause_protocol()
        elif not self.may_wait(self.buffer_size):
            self.send_waiting()
        elif not self.send_waits:
            self.send_waits = True
            if self.loop.answering is not self:
                self.write_context = self.callback_context()
                self.loop.unsent.append(self)
        return 0

    cdef int send_or_copy(self, data) except -1:
        """Sends from where it lies what comes first; only the rest is kept, as a copy if it may change."""
        cdef Py_buffer view
        cdef ssize_t sent = 0
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except BaseException as exc:
            self._fatal_error(exc, "Fatal write error on socket transport")
            return 0
        try:
            if not self.buffer_size:
                sent = -1 if self.number_is_lost() else send_bytes(self.fd, view.buf, view.len)
                if sent < 0:
                    if errno != EAGAIN and errno != EINTR:
                        self._fatal_error(os_error(errno), "Fatal write error on socket transport")
                        return 0
                    sent = 0
                if sent == view.len:
                    return 0
            if type(data) is bytes:
                self.queue_chunk(data)
                self.offset = sent
                self.buffer_size -= sent
            else:
                self.queue_chunk(PyBytes_FromStringAndSize(<char *>view.buf + sent, view.len - sent))
        finally:
            PyBuffer_Release(&view)
        if self.send_waits:
            return self.send_or_wait()
        self.start_writing()
        return self.maybe_pause_protocol()

    cdef int send_waiting(self) except -1:
        """The first try for what was queued."""
        self.send_waits = False
        return self.after_first_try(self.send_chunks())

    cdef int after_first_try(self, int err) except -1:
        if err:
            self._fatal_error(os_error(err), "Fatal write error on socket transport")
        elif self.buffer_size:
            try:
                self.start_writing()
            except OSError as exc:
                self._fatal_error(exc, "Fatal write error on socket transport")
            else:
                self.maybe_pause_protocol()
        else:
            self.write_context = None
            self.maybe_resume_protocol()
        return 0

    cdef int write_ready(self) except -1:
        cdef int err = self.send_chunks()
        if err:
            exc = os_error(err)
            self._fatal_error(exc, "Fatal write error on socket transport")
            if self.empty_waiter is not None and not self.empty_waiter.done():
                self.empty_waiter.set_exception(exc)
            return 0
        self.maybe_resume_protocol()  # which may write or abort
        if self.buffer_size or self.loop is None:
            return 0
        self.stop_writing()
        if self.empty_waiter is not None and not self.empty_waiter.done():
            self.empty_waiter.set_result(None)
        if self.closing and not self.lost:
            self.lost += 1
            self._call_connection_lost(None)
        elif self.eof_written and not self.lost:
            self.shut_down()
        return 0

    cdef int send_chunks(self) except -1:
        """Sends as much as the kernel takes; returns 0, or the errno that ends the connection."""
        cdef iovec pieces[CHUNKS_PER_SEND]
        cdef Py_ssize_t count, total
        cdef ssize_t sent
        cdef int err
        while self.buffer_size:
            count = self.gather(pieces, &total)
            sent = -1 if self.number_is_lost() else send_pieces(self.fd, pieces, count, total)
            err = self.take_result(sent, errno)
            if err or sent < total:
                return err
        return 0

    cdef int take_result(self, ssize_t sent, int err) except -1:
        """Of a send: drops what was sent; returns 0, or the errno that ends the connection."""
        if sent < 0:
            return 0 if err == EAGAIN or err == EINTR else err
        if sent <= self.buffer_size:  # else another thread, which has no business here, has aborted meanwhile
            self.drop_sent(sent)
        return 0

    cdef Py_ssize_t gather(self, iovec *pieces, Py_ssize_t *total) noexcept:
        cdef Py_ssize_t count = 0, skipped = self.offset
        cdef PyObject *chunk
        total[0] = 0
        while count < CHUNKS_PER_SEND and self.first + count < self.end:
            chunk = self.chunks[self.first + count]
            pieces[count].iov_base = PyBytes_AS_STRING(<object>chunk) + skipped
            pieces[count].iov_len = PyBytes_GET_SIZE(<object>chunk) - skipped
            total[0] += pieces[count].iov_len
            skipped = 0
            count += 1
        return count

    cdef int drop_sent(self, Py_ssize_t sent) except -1:
        cdef Py_ssize_t left
        self.buffer_size -= sent
        while sent:
            left = PyBytes_GET_SIZE(<object>self.chunks[self.first]) - self.offset
            if sent < left:
                self.offset += sent
                return 0
            sent -= left
            self.offset = 0
            self.drop_chunks(self.first + 1)
        if not self.buffer_size:
            self.first = self.end = 0
        return 0

    cdef int drop_unsent(self) except -1:
        self.drop_chunks(self.end)
        self.first = self.end = self.offset = self.buffer_size = 0
        self.send_waits = False
        return 0

    def can_write_eof(self):
        return True

    def write_eof(self):
        if self.closing or self.eof_written:
            return
        self.eof_written = True
        if self.send_waits:
            self.send_waiting()
        if not self.buffer_size and not self.lost:
            self.shut_down()

    cdef int shut_down(self) except -1:
        if shutdown(self.fd, SHUT_WR) < 0:
            raise os_error(errno)
        return 0

    # -- flow control --

    cdef int maybe_pause_protocol(self) except -1:
        if self.buffer_size <= self.high_bytes or self.protocol_paused:
            return 0
        self.protocol_paused = True
        return self.tell_protocol("pause_writing")

    cdef int maybe_resume_protocol(self) except -1:
        if not self.protocol_paused or self.buffer_size > self.low_water:
            return 0
        self.protocol_paused = False
        return self.tell_protocol("resume_writing")

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

    def set_write_buffer_limits(self, high=None, low=None):
        if high is None:
            high = 65536 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high_water, self.low_water = high, low
        self.high_bytes = int(min(high, sys.maxsize))
        if self.send_waits:
            self.send_waiting()
        self.maybe_pause_protocol()

    def get_write_buffer_limits(self):
        return (self.low_water, self.high_water)

    def get_write_buffer_size(self):
        return self.buffer_size

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

    def is_closing(self):
        return self.closing

    def close(self):
        if self.closing:
            return
        self.closing = True
        self.watch(self.interest & ~UL_READ)
        if self.send_waits:
            self.send_waiting()
        if not self.buffer_size and not self.lost:
            self.lost += 1
            self.stop_writing()
            self.loop.call_soon_natively(self._call_connection_lost, (None,), self.context)

    def abort(self):
        self._force_close(None)

    def _force_close(self, exc):
        if self.lost:
            return
        if self.send_waits:  # asyncio has sent it in write()
            self.send_chunks()
        self.drop_unsent()
        self.closing = True
        self.write_context = None
        self.watch(0)
        self.lost += 1
        self.loop.call_soon_natively(self._call_connection_lost, (exc,), self.context)

    cdef int callback_failed(self, str message) except -1:
        try:
            ul_raise_again()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, message)
        return 0

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

    def _call_connection_lost(self, exc):
        try:
            if self.connected:
                self.protocol.connection_lost(exc)
        finally:
            self.release()
            if self.empty_waiter is not None and not self.empty_waiter.done():
                self.empty_waiter.set_exception(ConnectionError("Connection is closed by peer"))

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

    def get_protocol(self):
        return self.protocol

    def set_protocol(self, protocol):
        self.protocol = protocol
        self.connected = True
        self.keeps_data = False
        self.buffered = isinstance(protocol, protocols.BufferedProtocol)

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

    def _make_empty_waiter(self):
        if self.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        if self.send_waits:
            self.send_waiting()
        self.empty_waiter = self.loop.create_future()
        if not self.buffer_size:
            self.empty_waiter.set_result(None)
        return self.empty_waiter

    def _reset_empty_waiter(self):
        self.empty_waiter = None

    @property
    def __class__(self):
        return selector_events._SelectorSocketTransport

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
    def _read_ready_cb(self):
        return None if self.closing else self._read_ready

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
    def _buffer(self):
        return collections.deque(<object>self.chunks[i] for i in range(self.first, self.end))

    @property
    def _empty_waiter(self):
        return self.empty_waiter

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
    def _eof(self):
        return self.eof_written

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


cdef ssize_t send_bytes(int fd, const void *data, size_t size) noexcept:
    """send(), without the GIL when there is much to copy."""
    cdef ssize_t sent
    if size < RELEASE_GIL_MIN:
        return send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    with nogil:
        sent = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    return sent


cdef ssize_t send_pieces(int fd, iovec *pieces, size_t count, size_t total) noexcept:
    cdef msghdr message
    cdef ssize_t sent
    if count == 1:
        return send_bytes(fd, pieces[0].iov_base, pieces[0].iov_len)
    memset(&message, 0, sizeof(message))
    message.msg_iov, message.msg_iovlen = pieces, count
    if total < RELEASE_GIL_MIN:
        return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
    with nogil:
        sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
    return sent
