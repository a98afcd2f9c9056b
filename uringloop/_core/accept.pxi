# Accepting: from the listening socket's event to a transport, without a task and a socket object for each.
#
# Promise: protocol factory, connection_made() and everything after see what asyncio shows them (order, contexts,
# peername), and a process that runs out of descriptors stops accepting for a second, as asyncio does.

cdef union Address:
    sockaddr any
    sockaddr_in inet
    sockaddr_in6 inet6
    char room[128]  # for a path


cdef object address_object(Address *address):
    cdef char text[64]
    if address.any.sa_family == AF_INET:
        inet_ntop(AF_INET, &address.inet.sin_addr, text, sizeof(text))
        return (text.decode("ascii"), ntohs(address.inet.sin_port))
    inet_ntop(AF_INET6, &address.inet6.sin6_addr, text, sizeof(text))
    return (
        text.decode("ascii"), ntohs(address.inet6.sin6_port),
        ntohl(address.inet6.sin6_flowinfo), address.inet6.sin6_scope_id,
    )


def accept_all(LoopCore loop, tuple serving, context):
    """Accepts what waits on a listening TCP socket, at most one more than its backlog.

    `serving` are the arguments of asyncio's `_start_serving()`, which is called again a second later when
    descriptors or memory have run out. `context` is the server's (3.15), or None.
    """
    protocol_factory, sock, _, server, backlog = serving[:5]
    cdef Address address
    cdef socklen_t size
    cdef int fd, err, listener = sock.fileno(), _left
    for _left in range(<int>backlog, -1, -1):
        size = sizeof(address)
        fd = accept4(listener, &address.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0:
            open_connection(loop, fd, &address, protocol_factory, server, context)
            if sock.fileno() != listener:  # a protocol factory closed its server
                return
            continue
        err = errno
        if err == ECONNABORTED:
            continue
        if err == EAGAIN or err == EINTR:
            return
        if err not in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
            raise os_error(err)  # reported by the handle that called us
        loop.call_exception_handler({
            "message": "socket.accept() out of system resource",
            "exception": os_error(err),
            "socket": trsock.TransportSocket(sock),
        })
        loop.unwatch(listener, UL_READ)
        loop.call_later(constants.ACCEPT_RETRY_DELAY, loop._start_serving, *serving)
        return


cdef int open_connection(LoopCore loop, int fd, Address *peer, protocol_factory, server, context) except -1:
    cdef StreamTransport transport = StreamTransport.__new__(StreamTransport)
    cdef Address own
    cdef socklen_t size = sizeof(own)
    cdef int on = 1
    protocol = None
    own_context = None
    try:
        # asyncio runs a task for each connection: what its protocol factory sets is seen by that connection alone.
        own_context = PyContext_CopyCurrent() if context is None else context.copy()
        if PyContext_Enter(own_context) < 0:
            own_context = None
            ul_raise_again()
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
        sockname = address_object(&own) if getsockname(fd, &own.any, &size) == 0 else None
        peername = address_object(peer)
        if loop._debug:
            selector_events.logger.debug("%r got a new connection from %r: fd=%d", server, peername, fd)
        protocol = protocol_factory()
        transport.start(
            loop, fd, sockname, peername, protocol, None, server, None if context is None else own_context
        )
    except BaseException as exc:
        if transport.fd >= 0:
            transport.release()
        else:
            close(fd)
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            raise
        if loop._debug:
            report = {"message": "Error on transport creation for incoming connection", "exception": exc}
            if protocol is not None:
                report["protocol"] = protocol
            loop.call_exception_handler(report)
    finally:
        if own_context is not None:
            PyContext_Exit(own_context)
    return 0
