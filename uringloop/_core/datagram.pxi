# DatagramTransport: UDP and Unix datagram sockets, driven by readiness.
#
# Promise: what protocols and libraries see is asyncio's `_SelectorDatagramTransport`: each datagram is handed over
# whole, with the address that recvfrom() gives, to whoever is the protocol at that moment, and what its callback has
# queued runs before the next one is read.

cdef enum:
    DATAGRAMS_PER_TURN = 64       # docs/decisions.md 21
    INET_DATAGRAM_MAX = 64 * 1024
    UNIX_DATAGRAM_MAX = 256 * 1024  # asyncio's max_size: what is longer is cut, as there

cdef double DRAINED_MAX_S = 1e-3  # in an older turn each transport reads one: others, and timers, wait no longer
cdef object NAME_DATAGRAM_RECEIVED = "datagram_received"
cdef Py_ssize_t HEADER_SIZE = 8 if sys.version_info >= (3, 13) else 0  # since then, empty datagrams are sent too


@cython.final
cdef class DatagramTransport(Transport):
    """A datagram transport. `EventLoop` makes it; its methods are those of `asyncio.DatagramTransport`."""

    cdef public object _address  # where all goes to, or None
    cdef int family
    cdef bint has_peer           # the kernel knows where to send
    cdef readonly object _buffer  # deque of (bytes, address): what the kernel had no room for

    def __cinit__(self, *args, **kwargs):
        self._buffer = collections.deque()

    def __init__(self, LoopCore loop, sock, protocol, address=None, waiter=None, extra=None):
        if self.fd >= 0:
            raise RuntimeError("a transport is made once")
        extra = dict(extra or ())
        self.peername = extra.pop("peername") if "peername" in extra else address_or_none(sock.getpeername)
        self.sockname = address_or_none(sock.getsockname)
        self.has_peer, self.family = bool(self.peername), sock.family
        self.read_max = UNIX_DATAGRAM_MAX
        self.loop, self.sock, self.extra, self._address = loop, sock, extra, address
        self.sock_fd = number_in_socket(sock)
        self.set_protocol(protocol)
        self.begin(sock.fileno(), waiter)

    cdef int handle(self, uint32_t event) except -1:
        return self.read_ready() if event == UL_READ else self.write_ready()

    cdef object handler(self, uint32_t event):
        return self._read_ready if event == UL_READ else self._sendto_ready

    def _read_ready(self):
        if not self.lost:
            self.receive()

    def _sendto_ready(self):
        if self.loop is not None:
            self.write_ready()

    # -- receiving --

    cdef int read_ready(self) except -1:
        """Reads until nothing is left, or something else has to come first."""
        cdef LoopCore loop = self.loop
        cdef object context = self.read_context  # another one, once reading was paused and resumed
        cdef Py_ssize_t queued = loop.ready.count, _left
        for _left in range(DATAGRAMS_PER_TURN):
            if not self.receive() or loop.ready.count != queued or loop._stopping:
                break
            if not self.interest & UL_READ or self.read_context is not context:
                break
            if monotonic() > loop.turned_s + DRAINED_MAX_S:
                break
        return 0

    cdef bint receive(self) except -1:
        """Hands over one datagram, or an error; whether there may be another one."""
        cdef ReadMemory memory = self.loop.memory
        cdef Address address
        cdef socklen_t address_size = sizeof(address.room) - 1
        cdef object buffer = memory.take_buffer(), data = None, source = None
        cdef ssize_t size = self.read(memory, PyBytes_AS_STRING(buffer), &address, &address_size)
        cdef int err = errno
        if size >= 0:
            try:
                data = datagram(memory, PyBytes_AS_STRING(buffer), size)
                source = address_given(&address, address_size)
            except MemoryError as exc:
                self._fatal_error(exc, "Fatal read error on datagram transport")
                return False
            memory.give_back(buffer)
            return self.hand_over(data, source)
        memory.give_back(buffer)
        if err == EBADF:  # closed behind it: a poll that is pending would report the old socket, or the new, for ever
            self.watch(self.interest & ~UL_READ)
        if err != EAGAIN and err != EINTR:
            self.protocol.error_received(os_error(err))
        return False

    cdef ssize_t read(self, ReadMemory memory, char *buffer, Address *address, socklen_t *address_size) except? -1:
        """One datagram: into `buffer` what it has room for, the rest into the spill."""
        cdef Py_ssize_t wanted = self.read_max
        cdef iovec pieces[2]
        cdef msghdr message
        cdef ssize_t size
        if self.family != AF_UNIX:
            wanted = min(wanted, <Py_ssize_t>INET_DATAGRAM_MAX)
        if self.number_is_lost():
            return -1
        if wanted <= memory.size:
            return recvfrom(self.fd, buffer, wanted, MSG_DONTWAIT, &address.any, address_size)
        memset(&message, 0, sizeof(message))
        message.msg_name, message.msg_namelen = address, address_size[0]
        message.msg_iov, message.msg_iovlen = pieces, 2
        pieces[0].iov_base, pieces[0].iov_len = buffer, memory.size
        pieces[1].iov_base, pieces[1].iov_len = spill(wanted - memory.size), wanted - memory.size
        size = recvmsg(self.fd, &message, MSG_DONTWAIT)
        address_size[0] = message.msg_namelen
        return size

    cdef bint hand_over(self, object data, object source) except -1:
        cdef object protocol = self.protocol
        cdef PyObject *arguments[3]
        cdef PyObject *result
        arguments[0], arguments[1], arguments[2] = <PyObject *>protocol, <PyObject *>data, <PyObject *>source
        result = PyObject_VectorcallMethod(<PyObject *>NAME_DATAGRAM_RECEIVED, arguments, 3, NULL)
        if result == NULL:
            ul_raise_again()
        Py_XDECREF(result)
        return True

    # -- sending --

    def sendto(self, data, addr=None):
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if HEADER_SIZE == 0 and not data:
            return
        if self._address:
            if addr is not None and addr != self._address:
                raise ValueError(f"Invalid address: must be None or {self._address}")
            if self.is_lost():
                return
            addr = self._address
        elif self.loop is None:
            raise AttributeError("sendto() on a datagram transport whose connection_lost() was called")
        if not self._buffer:
            try:
                if self.send(data, addr):
                    return
            except OSError as exc:
                self.protocol.error_received(exc)
                return
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                self._fatal_error(exc, "Fatal write error on datagram transport")
                return
            self.write_context = self.callback_context()
            self.watch(self.interest | UL_WRITE)
        data = bytes(data)
        self._buffer.append((data, addr))
        self.buffer_size += PyBytes_GET_SIZE(data) + HEADER_SIZE
        self.maybe_pause_protocol()

    cdef bint send(self, data, addr) except -1:
        """Whether the kernel has taken it. Raises what the socket's own method raises."""
        cdef LoopCore loop = self.loop
        cdef Address to
        cdef socklen_t to_size = 0
        cdef Py_buffer view
        cdef ssize_t sent = -1
        cdef int err
        if not self.has_peer:
            to_size = address_taken(self.family, addr, &to)
            if to_size == 0:
                return self.send_by_socket(data, addr)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)  # may run code that closes the socket
        if not self.number_is_lost():
            sent = send_datagram(self.fd, view.buf, view.len, &to.any if to_size else NULL, to_size, loop.shares_gil)
        err = errno
        PyBuffer_Release(&view)
        if sent < 0 and err != EAGAIN and err != EINTR:
            raise os_error(err)
        return sent >= 0

    cdef bint send_by_socket(self, data, addr) except -1:
        """To a host name or a path; or it says what is wrong."""
        try:
            self.sock.sendto(data, addr)
        except (BlockingIOError, InterruptedError):
            return False
        return True

    cdef int write_ready(self) except -1:
        while self._buffer:
            data, addr = self._buffer.popleft()
            self.buffer_size -= PyBytes_GET_SIZE(data) + HEADER_SIZE
            try:
                if not self.send(data, addr):
                    self._buffer.appendleft((data, addr))
                    self.buffer_size += PyBytes_GET_SIZE(data) + HEADER_SIZE
                    break
            except OSError as exc:
                self.protocol.error_received(exc)
                return 0  # the rest with the next event
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                self._fatal_error(exc, "Fatal write error on datagram transport")
                return 0
        self.maybe_resume_protocol()  # which may send, close or abort
        if self._buffer or self.loop is None:
            return 0
        self.stop_writing()
        if self.closing and not self.lost:
            self.lost += 1
            self._call_connection_lost(None)
        return 0

    cdef int drop_unsent(self) except -1:
        self._buffer.clear()
        self.buffer_size = 0
        return 0

    def set_write_buffer_limits(self, high=None, low=None):
        self.set_limits(high, low)
        self.maybe_pause_protocol()

    # -- its end --

    def close(self):
        if self.closing:
            return
        self.closing = True
        self.watch(self.interest & ~UL_READ)
        if not self._buffer:
            self.lost += 1
            self.stop_writing()
            self.loop.call_soon_natively(self._call_connection_lost, (None,), None)

    @property
    def __class__(self):
        return selector_events._SelectorDatagramTransport


cdef ssize_t send_datagram(
    int fd, const void *data, size_t size, const sockaddr *to, socklen_t to_size, bint without_gil
) noexcept:
    cdef ssize_t sent
    if not without_gil:
        return sendto(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL, to, to_size)
    with nogil:
        sent = sendto(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL, to, to_size)
    return sent


cdef object SPILL = b""  # where the end of a datagram goes that is longer than the loop's buffer; under the GIL


cdef char *spill(Py_ssize_t size) except NULL:
    global SPILL
    if PyBytes_GET_SIZE(SPILL) < size:
        SPILL = PyBytes_FromStringAndSize(NULL, size)
    return PyBytes_AS_STRING(SPILL)


cdef object datagram(ReadMemory memory, const char *buffer, Py_ssize_t size):
    if size <= memory.size:
        return memory.small(buffer, size)
    cdef object data = PyBytes_FromStringAndSize(NULL, size)
    memcpy(PyBytes_AS_STRING(data), buffer, memory.size)
    memcpy(PyBytes_AS_STRING(data) + memory.size, PyBytes_AS_STRING(SPILL), size - memory.size)
    return data


# -- addresses: the kernel's and Python's --
#
# The tuples of the last senders are kept: who answers gives one of them back, and nothing has to be parsed.

cdef enum:
    ADDRESSES = 1024  # a power of two
    ADDRESS_TRIES = 4

cdef struct Known:
    sockaddr_in6 address
    socklen_t size
    PyObject *given

cdef Known KNOWN[ADDRESSES]
cdef unsigned short PLACES[ADDRESSES]  # of the tuple in KNOWN, by its own address


cdef inline size_t place(object given) noexcept:
    return (<size_t><PyObject *>given >> 4) & (ADDRESSES - 1)


cdef object address_given(Address *address, socklen_t size):
    """What socket.recvfrom() gives."""
    cdef char *path = address.room + sizeof(unsigned short)
    if size == 0:
        return None
    if address.any.sa_family != AF_UNIX:
        return known_address(address, size)
    address.room[size] = 0
    if size > sizeof(unsigned short) and path[0] == 0:
        return PyBytes_FromStringAndSize(path, size - sizeof(unsigned short))
    return PyUnicode_DecodeFSDefault(path)


cdef object known_address(Address *address, socklen_t size):
    cdef const uint32_t *words = <const uint32_t *>address
    cdef uint32_t mixed = 0
    cdef unsigned int i
    cdef Known *known
    cdef object given
    cdef PyObject *before
    for i in range(<unsigned int>size // 4):
        mixed = (mixed ^ words[i]) * <uint32_t>0x9E3779B1
        mixed ^= mixed >> 15
    for i in range(<unsigned int>ADDRESS_TRIES):
        known = &KNOWN[(mixed + i) & (ADDRESSES - 1)]
        if known.given == NULL:
            break
        if known.size == size and memcmp(&known.address, address, size) == 0:
            return <object>known.given
    else:
        known = &KNOWN[mixed & (ADDRESSES - 1)]
    given = address_object(address)
    Py_INCREF(given)
    memcpy(&known.address, address, size)
    before, known.given, known.size = known.given, <PyObject *>given, size
    PLACES[place(given)] = known - KNOWN
    Py_XDECREF(before)
    return given


cdef socklen_t address_taken(int family, object given, Address *address) except? 0:
    """The kernel's form of what socket.sendto() takes, and its size; 0 when that shall say it itself."""
    cdef const Known *known = &KNOWN[PLACES[place(given)]]
    cdef Py_ssize_t count = PyTuple_GET_SIZE(given) if type(given) is tuple else 0
    if known.given == <PyObject *>given and (<const sockaddr *>&known.address).sa_family == family:
        memcpy(address, &known.address, known.size)  # the table may change while the GIL is let go
        return known.size
    if (family != AF_INET or count != 2) and (family != AF_INET6 or not 2 <= count <= 4):
        return 0
    host, port = given[0], given[1]
    if type(host) is not str or not host.isascii() or "\0" in host or type(port) is not int or not 0 <= port <= 0xffff:
        return 0
    memset(address, 0, sizeof(sockaddr_in6))
    address.any.sa_family = family
    if family == AF_INET:
        address.inet.sin_port = htons(port)
        return sizeof(sockaddr_in) if inet_pton(family, PyUnicode_AsUTF8(host), &address.inet.sin_addr) == 1 else 0
    for number in given[2:]:
        if type(number) is not int or not 0 <= number <= 0xfffff:  # a larger scope is seldom
            return 0
    address.inet6.sin6_port = htons(port)
    address.inet6.sin6_flowinfo = htonl(given[2]) if count > 2 else 0
    address.inet6.sin6_scope_id = given[3] if count > 3 else 0
    return sizeof(sockaddr_in6) if inet_pton(family, PyUnicode_AsUTF8(host), &address.inet6.sin6_addr) == 1 else 0
