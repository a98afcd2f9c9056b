# What CPython and the kernel offer that Cython does not declare, or declares with a cost that the hot path
# should not pay (a PyObject* result is checked by hand).

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context)
    int PyContext_Exit(object context)
    PyObject *PyObject_Vectorcall(PyObject *callable, PyObject **args, size_t nargs, PyObject *names)
    PyObject *PyObject_VectorcallMethod(PyObject *name, PyObject **args, size_t nargs, PyObject *names)
    object PyObject_Call(object callable, object args, object kwargs)
    Py_ssize_t PyTuple_GET_SIZE(object tuple)
    PyObject **PySequence_Fast_ITEMS(object sequence)
    PyObject *PyDict_GetItemWithError(object mapping, object key) except? NULL
    ctypedef struct PyInterpreterState
    ctypedef struct PyThreadState
    PyInterpreterState *PyInterpreterState_Get()
    PyThreadState *PyInterpreterState_ThreadHead(PyInterpreterState *interpreter)
    PyThreadState *PyThreadState_Next(PyThreadState *thread)
    Py_ssize_t Py_REFCNT(object o)
    const char *PyUnicode_AsUTF8(object text) except NULL
    object PyUnicode_DecodeFSDefault(const char *text)
    void Py_XDECREF(PyObject *o)
    PyTypeObject *Py_TYPE(object o)
    int PyErr_ResourceWarning(object source, Py_ssize_t stack_level, const char *format, PyObject *argument)
    void PyErr_WriteUnraisable(object where)
    int PyObject_GenericSetAttr(object o, object name, PyObject *value) except -1

cdef extern from *:
    """
    #define UL_TUPLE_ITEMS(t) (((PyTupleObject *)(t))->ob_item)

    /* For an except clause around a call that has failed already: -1 with the error set. */
    static inline int ul_raise_again(void) { return -1; }

    struct ul_socket_object { PyObject_HEAD int sock_fd, sock_family, sock_type; };

    /* Cython makes an empty dict for each; while there is none, the interpreter specialises o.method(). */
    static inline void ul_drop_dict(PyObject *o) {
        Py_CLEAR(*(PyObject **)((char *)o + Py_TYPE(o)->tp_dictoffset));
    }

    static inline void ul_set_errno(int err) { errno = err; }

    static inline int ul_is_ours(PyObject *o) { return Py_REFCNT(o) == 1; }

    /* Only for a bytes object that nobody else holds: its hash is not known any more. */
    static inline void ul_bytes_set_size(PyObject *o, Py_ssize_t size) {
        Py_SET_SIZE((PyVarObject *)o, size);
        _Py_COMP_DIAG_PUSH
        _Py_COMP_DIAG_IGNORE_DEPR_DECLS
        ((PyBytesObject *)o)->ob_shash = -1;
        _Py_COMP_DIAG_POP
        PyBytes_AS_STRING(o)[size] = 0;
    }

    /* Gives back what a bytes object has too much; takes over the only reference to it. */
    static inline PyObject *ul_bytes_cut(PyObject *o, Py_ssize_t size) {
        _PyBytes_Resize(&o, size);
        return o;
    }
    """
    PyObject **UL_TUPLE_ITEMS(object tuple)
    int ul_raise_again() except -1
    ctypedef struct SocketObject "struct ul_socket_object":
        int sock_fd, sock_family, sock_type
    void set_errno "ul_set_errno" (int err) noexcept
    void ul_drop_dict(object o) noexcept
    bint ul_is_ours(PyObject *o)
    void ul_bytes_set_size(object o, Py_ssize_t size)
    object ul_bytes_cut(PyObject *o, Py_ssize_t size)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ctypedef unsigned int socklen_t
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
    struct sockaddr:
        unsigned short sa_family
    int AF_INET, AF_INET6, AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t recvfrom(int fd, void *buffer, size_t size, int flags, sockaddr *address, socklen_t *address_size)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    ssize_t sendto(int fd, const void *data, size_t size, int flags, const sockaddr *address, socklen_t address_size)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)
    int accept4(int fd, sockaddr *address, socklen_t *size, int flags)
    int getsockname(int fd, sockaddr *address, socklen_t *size)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        unsigned short sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        unsigned short sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    unsigned short ntohs(unsigned short value)
    uint32_t ntohl(uint32_t value)
    unsigned short htons(unsigned short value)
    uint32_t htonl(uint32_t value)
    int IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int family, const void *address, char *text, socklen_t size)
    int inet_pton(int family, const char *text, void *address)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)


cdef inline object os_error(int err):
    return OSError(err, os.strerror(err))


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline double monotonic() noexcept nogil:
    return <double>monotonic_ns() / 1e9
