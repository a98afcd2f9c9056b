# sock_recv(), sock_recv_into() and sock_sendall() on plain non-blocking sockets: one try.
#
# Promise: None means that nothing was taken and nothing was sent; everything else is the result. Who waits between two
# tries, and how, stands in loop.pxi; who tries again is a coroutine in loop.py. So a call that is cancelled while it
# waits has consumed no byte.

cdef bint is_laid_out_as_expected():
    """CPython's socket object begins with these three; whether it still does is looked at once."""
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_DGRAM) as sock:
        plain = <SocketObject *>sock
        return (
            plain.sock_fd == sock.fileno()
            and plain.sock_family == socket_module.AF_UNIX
            and plain.sock_type == socket_module.SOCK_DGRAM
        )


cdef bint socket_is_known = is_laid_out_as_expected()


cdef SocketObject *plain_socket(LoopCore loop, sock) except? NULL:
    """A socket whose methods nobody has replaced; NULL without an exception for any other object."""
    cdef bint plain = type(sock) is socket_module.socket
    if not plain:
        base_events._check_ssl_socket(sock)
    if loop._debug and sock.gettimeout() != 0:
        raise ValueError("the socket must be non-blocking")
    return <SocketObject *>sock if plain and socket_is_known else NULL


cdef object by_method(method, tuple arguments):
    try:
        return method(*arguments)
    except (BlockingIOError, InterruptedError):
        return None


cdef object nothing_done(int err):
    if err == EAGAIN or err == EINTR:
        return None
    raise os_error(err)


cdef object recv_now(LoopCore loop, sock, size):
    cdef SocketObject *plain = plain_socket(loop, sock)
    cdef ReadMemory memory = loop.memory
    cdef Py_ssize_t wanted = size
    # A datagram must fit, whatever its length; a stream may be read in pieces.
    if plain == NULL or wanted < 0 or (wanted > memory.size and plain.sock_type != SOCK_STREAM):
        return by_method(sock.recv, (size,))
    if wanted == 0:
        return b""
    cdef object buffer = memory.take_buffer(), data
    cdef ssize_t got = recv(plain.sock_fd, PyBytes_AS_STRING(buffer), min(wanted, memory.size), MSG_DONTWAIT)
    cdef int err = errno
    cdef PyObject *whole
    if got > COPIED_MAX:  # it stays where it lies; the rest of that memory is given back
        Py_INCREF(buffer)
        whole = <PyObject *>buffer
        buffer = None
        return ul_bytes_cut(whole, got)
    data = nothing_done(err) if got < 0 else memory.small(PyBytes_AS_STRING(buffer), got)
    memory.give_back(buffer)
    return data


cdef object recv_into_now(LoopCore loop, sock, buffer):
    cdef SocketObject *plain = plain_socket(loop, sock)
    cdef Py_buffer view
    cdef ssize_t got
    if plain == NULL:
        return by_method(sock.recv_into, (buffer,))
    try:
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    except (BufferError, TypeError):
        return by_method(sock.recv_into, (buffer,))  # which says it in its own words
    got = recv(plain.sock_fd, view.buf, view.len, MSG_DONTWAIT) if view.len else 0
    cdef int err = errno
    PyBuffer_Release(&view)
    return nothing_done(err) if got < 0 else got


cdef object send_now(LoopCore loop, sock, data, Py_ssize_t start):
    """What is sent now, beginning with byte `start`: how many bytes, or None."""
    cdef SocketObject *plain = plain_socket(loop, sock)
    cdef Py_buffer view
    cdef ssize_t sent
    if plain == NULL:
        return by_method(sock.send, (memoryview(data).cast("B")[start:] if start else data,))
    try:
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    except (BufferError, TypeError):
        return by_method(sock.send, (data,))
    sent = send_bytes(plain.sock_fd, <char *>view.buf + start, view.len - start)
    cdef int err = errno
    PyBuffer_Release(&view)
    return nothing_done(err) if sent < 0 else sent
