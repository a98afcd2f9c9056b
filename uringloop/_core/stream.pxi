# StreamTransport: TCP and Unix stream sockets, driven by readiness, or by what the monitor has received.
#
# Promise: what protocols and libraries see is asyncio's `_SelectorSocketTransport`; every byte that was received
# is handed over once, in order, to whoever is the protocol at that moment, and every byte that write() took is
# sent or its connection is lost.
#
# What is queued for sending are bytes objects only: anything mutable is sent before write() returns, or copied.

cdef enum:
    CHUNKS_PER_SEND = 64     # of one sendmsg(); more of them take another one
    RELEASE_GIL_MIN = 64 * 1024  # bytes of one send
    RING_SEND_MAX = 16 * 1024  # what is longer gains nothing from sharing a system call
    SMALL_READS_MIN = 3      # in a row: the monitor receives from then on; twice as many with every change of mind
    SMALL_READS_MAX = 4096
    FULL_BUFFERS = 2         # in a row: it does not any more

cdef object NAME_DATA_RECEIVED = "data_received"
cdef str WRITE_TAKES = (
    "data argument must be a bytes-like object" if sys.version_info < (3, 14)
    else "data argument must be a bytes, bytearray, or memoryview object"
)


@cython.final
cdef class StreamTransport(Transport):
    """A stream transport. `EventLoop` makes it; its methods are those of `asyncio.Transport`."""

    cdef bint eof_written, buffered
    cdef bint send_waits        # the chunks wait for the end of the callback or turn, and were not tried yet
    cdef bint keeps_data        # the protocol keeps what it is given: it gets copies of the right size
    cdef int send_error         # of what the monitor has sent
    cdef int small_reads, small_reads_wanted, full_buffers  # in a row
    cdef object empty_waiter
    cdef PyObject **chunks      # queued bytes objects: chunks[first .. end-1]
    cdef Py_ssize_t first, end, room
    cdef Py_ssize_t offset      # how much of the first was sent
    cdef public object _start_tls_compatible, _sendfile_compatible

    def __cinit__(self, *args, **kwargs):
        self._start_tls_compatible, self._sendfile_compatible = True, constants._SendfileMode.TRY_NATIVE
        self.small_reads_wanted = SMALL_READS_MIN

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
        return self.begin(fd, waiter)

    cdef int handle(self, uint32_t event) except -1:
        if event == UL_SENT:
            return self.go_on_by_readiness()
        return self.write_ready() if event == UL_WRITE else self.read_and_answer(event)

    cdef object handler(self, uint32_t event):
        return self._write_ready if event & (UL_WRITE | UL_SENT) else self._read_ready

    cdef int read_and_answer(self, uint32_t event) except -1:
        cdef LoopCore loop = self.loop
        cdef StreamTransport before = loop.answering
        loop.answering = self if loop.in_pass and not loop.shares_gil else None
        try:
            if event == UL_DATA:
                self.hand_over_received()
            elif self.received:
                pass  # it has its turn first; that there is more in the socket will be reported again
            elif self.buffered:
                self.read_buffered(True)
            else:
                self.read_data()
        finally:
            if loop.answering is self and self.send_waits:
                self.send_waiting()
            loop.answering = before
        return 0

    def _read_ready(self):
        if not self.lost:
            self.read_and_answer(UL_DATA if self.received else UL_READ)

    def _write_ready(self):
        if not self.lost:
            self.write_ready()

    # -- receiving --

    cdef int read_data(self) except -1:
        """One read, into memory that stays in the caches. Small data leaves it as a copy of its size; large
        data is handed over where it lies, and if the protocol has let go of it when it returns, which is what a
        parser does, the next read goes there again.
        """
        cdef LoopCore loop = self.loop
        cdef ReadMemory memory = loop.memory
        cdef object buffer = memory.take_buffer(), data
        cdef ssize_t size = self.receive(PyBytes_AS_STRING(buffer), min(self.read_max, memory.size))
        cdef int err
        self.small_reads = self.small_reads + 1 if size < UL_BUFFER_BYTES else 0
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
        self.hand_over(data)
        if self.small_reads >= self.small_reads_wanted and loop.receive_mode == RECEIVE_AUTO \
                and self.interest & UL_READ and not self.buffered and not self.by_ring:
            self.receive_by_ring(True)
        return 0

    cdef inline ssize_t receive(self, void *memory, size_t size) noexcept:
        if self.number_is_lost():
            return -1
        return recv(self.fd, memory, size, MSG_DONTWAIT)

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

    cdef int read_buffered(self, bint from_socket) except -1:
        """Into the protocol's own memory: from the socket, or what the monitor had received for another protocol."""
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
        size = self.receive(view.buf, view.len) if from_socket else self.take_received(<char *>view.buf, view.len)
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

    # -- receiving by the monitor: docs/decisions.md 22 --

    cdef int receive_by_ring(self, bint by_ring) except -1:
        self.by_ring = by_ring
        self.noticed &= ~UL_READ  # a read now would be ahead of what the monitor receives
        self.small_reads = self.full_buffers = 0
        if self.interest & UL_READ and not self.loop.closed and self.loop.transport_at(self.fd) is self:
            self.loop.update(self.fd, self.loop.wanted_by_keys(self.fd))
        return 0

    cdef int keep(self, const char *data, int size) except -1:
        """Takes what the monitor received, out of its memory."""
        cdef int result = -EBADF if self.number_is_lost() else size
        if self.closing or self.received and type(self.received[len(self.received) - 1]) is int:
            return 0
        if not self.paused and not self.interest & UL_READ:  # the end was handed over: this is it again
            return 0
        if self.received is None:
            self.received = []
        if result > 0:
            if self.full_buffers < FULL_BUFFERS:
                self.full_buffers = self.full_buffers + 1 if size == UL_BUFFER_BYTES else 0
            try:
                self.received.append(self.loop.memory.small(data, size))
            except MemoryError:  # what was received is lost, and so is the connection
                self.received.append(-ENOMEM)
        else:
            self.received.append(result)
        if not self.paused:
            self.push(UL_DATA)
        return 0

    cdef int hand_over_received(self) except -1:
        """One callback, as a read would bring. What follows comes in the next pass, after what that has queued."""
        cdef list received = self.received
        if self.paused or self.closing or not received:
            return 0
        if type(received[0]) is int:
            size = received.pop(0)
            self.nothing_read(0 if size == 0 else -1, -<int>size)
        elif self.buffered:
            self.read_buffered(False)
        else:
            self.hand_over(self.next_received())
        if self.full_buffers >= FULL_BUFFERS and self.by_ring and self.interest & UL_READ \
                and self.loop.receive_mode == RECEIVE_AUTO:
            self.small_reads_wanted = min(2 * self.small_reads_wanted, SMALL_READS_MAX)
            self.receive_by_ring(False)
        return 0

    cdef ssize_t take_received(self, char *memory, Py_ssize_t room) except? -1:
        """As recv(). get_buffer(), which was called before, may have turned the loop."""
        cdef list received = self.received
        cdef bytes first
        cdef Py_ssize_t size
        if not received or type(received[0]) is int:
            set_errno(EAGAIN)
            return -1
        first = received[0]
        size = min(PyBytes_GET_SIZE(first), room)
        memcpy(memory, PyBytes_AS_STRING(first), size)
        received[:1] = [first[size:]] if size < PyBytes_GET_SIZE(first) else []
        return size

    cdef object next_received(self):
        """A message that came in several buffers is one again, as far as a read may go."""
        cdef list received = self.received
        cdef Py_ssize_t count = 1, size = PyBytes_GET_SIZE(received[0])
        if size > self.read_max:
            data = received[0][:self.read_max]
            received[0] = received[0][self.read_max:]
            return data
        if len(received) == 1:
            return received.pop()
        while count < len(received) and type(received[count]) is bytes:
            size += PyBytes_GET_SIZE(received[count])
            if size > self.read_max:
                break
            count += 1
        data = received[0] if count == 1 else b"".join(received[:count])
        del received[:count]
        return data

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
        if self.interest & UL_WRITE or self.sending:
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
        if self.send_waits or self.sending:
            return self.send_or_wait()
        self.start_writing()
        return self.maybe_pause_protocol()

    cdef int send_waiting(self) except -1:
        """The first try for what was queued."""
        self.send_waits = False
        if self.loop.send_policy == SEND_RING and self.loop.thread_id is not None \
                and self.buffer_size <= RING_SEND_MAX and self.send_by_ring():
            return self.maybe_pause_protocol()
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

    # -- sending by the monitor: docs/decisions.md 16 --

    cdef bint send_by_ring(self) except -1:
        cdef iovec pieces[CHUNKS_PER_SEND]
        cdef Py_ssize_t total, count = self.gather(pieces, &total)
        if self.number_is_lost() or ul_fdmon_send(self.loop.monitor, self.fd, pieces, count) < 0:
            return False
        self.sending = True
        if self.write_context is None:
            self.write_context = self.callback_context()
        self.hold()
        return True

    cdef int sent_by_ring(self, int result) except -1:
        if not self.sending:
            return 0
        self.sending = False
        self.send_error = self.take_result(result, -result)
        self.hold()
        if self.buffer_size or self.send_error or self.closing or self.eof_written or self.protocol_paused \
                or self.empty_waiter is not None:
            return self.push(UL_SENT)
        self.write_context = None
        return 0

    cdef int go_on_by_readiness(self) except -1:
        """After a send that was short, or whose end somebody waits for."""
        cdef int err = self.send_error
        self.send_error = 0
        if self.lost or self.sending and not err:
            return 0
        try:
            self.after_send(err or self.send_chunks())
        except OSError as exc:
            # Of shutdown(), which asyncio has called a turn earlier: the peer is gone, and the next read says so.
            if exc.errno != ENOTCONN or self.lost:
                raise
        if self.buffer_size and not (self.lost or self.sending or self.send_waits):  # else it goes on in another way
            self.start_writing()
        return 0

    cdef bint take_back_send(self) except -1:
        """False: not now, and the kernel goes on to read the chunks. Only a thread with no business here sees that."""
        cdef int result = ul_fdmon_cancel_send(self.loop.monitor, self.fd) if self.loop.monitor_is_open() else -EBADF
        if result == -EBUSY:
            return False
        self.sending = False
        self.hold()
        if result != -ENOENT and result != -EBADF:
            self.take_result(result, -result)
        return True

    cdef int send_by_itself(self) except -1:
        """What the monitor was to send."""
        cdef int result = ul_fdmon_cancel_send(self.loop.monitor, self.fd)
        self.sent_by_ring(-EAGAIN if result == -ENOENT else result)
        return self.after_first_try(self.send_chunks()) if self.buffer_size and not self.send_error else 0

    # -- after a send --

    cdef int write_ready(self) except -1:
        return self.after_send(self.send_chunks())

    cdef int after_send(self, int err) except -1:
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
        self.send_waits = False
        if self.sending and not self.take_back_send():
            return 0
        self.drop_chunks(self.end)
        self.first = self.end = self.offset = self.buffer_size = 0
        return 0

    def set_write_buffer_limits(self, high=None, low=None):
        self.set_limits(high, low)
        if self.send_waits:
            self.send_waiting()
        self.maybe_pause_protocol()

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

    # -- its end --

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

    def _force_close(self, exc):
        if not self.lost and (self.send_waits or self.sending and self.take_back_send()):
            self.send_chunks()  # asyncio has done that in write()
        Transport._force_close(self, exc)

    cdef int callback_failed(self, str message) except -1:
        try:
            ul_raise_again()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._fatal_error(exc, message)
        return 0

    def _call_connection_lost(self, exc):
        try:
            Transport._call_connection_lost(self, exc)
        finally:
            if self.empty_waiter is not None and not self.empty_waiter.done():
                self.empty_waiter.set_exception(ConnectionError("Connection is closed by peer"))

    # -- what it is --

    def set_protocol(self, protocol):
        Transport.set_protocol(self, protocol)
        self.keeps_data = False
        self.buffered = isinstance(protocol, protocols.BufferedProtocol)
        if self.buffered and self.by_ring:
            self.receive_by_ring(False)
        elif not self.buffered and self.loop is not None and self.loop.receive_mode == RECEIVE_RING:
            self.receive_by_ring(True)

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
    def _read_ready_cb(self):
        return None if self.closing else self._read_ready

    @property
    def _buffer(self):
        return collections.deque(<object>self.chunks[i] for i in range(self.first, self.end))

    @property
    def _empty_waiter(self):
        return self.empty_waiter

    @property
    def _eof(self):
        return self.eof_written


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
