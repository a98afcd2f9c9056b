"""The hot path: what runs for every callback, every message and every connection.

Why it exists: asyncio's own turn costs a Python frame, a tuple and a handle for every event; this one
costs a few calls in C. Promise: whatever a program can see (order, contexts, exceptions, debug mode,
attributes that libraries reach for) is asyncio's; only the time is not.

The monitor is the C core's, through one pointer that `FDMon` owns and frees. Nothing here is safe
against another thread but for the GIL, as in asyncio: `call_soon_threadsafe` is the way in.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject, PyTypeObject
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_INCREF, Py_DECREF
from libc.errno cimport EAGAIN, EBADF, EBUSY, ECONNABORTED, EINTR, EMFILE, ENFILE, ENOBUFS, ENOENT, ENOMEM, ENOTCONN
from libc.errno cimport errno
from libc.math cimport INFINITY, ceil, nextafter
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy, memmove, memset
from uringloop._core.fdmon cimport *

import asyncio
import collections
import heapq
import os
import selectors
import socket as socket_module
import sys
import threading
from asyncio import base_events, constants, events, format_helpers, futures, protocols, selector_events, tasks, trsock

include "cpython.pxi"
include "queue.pxi"
include "handle.pxi"
include "loop.pxi"
include "memory.pxi"
include "transport.pxi"
include "stream.pxi"
include "accept.pxi"
include "sock.pxi"
include "datagram.pxi"
include "guard.pxi"

# "Exception in callback X._call_connection_lost()": X is what programs and logs know from asyncio.
(<PyTypeObject *>StreamTransport).tp_name = "asyncio.selector_events._SelectorSocketTransport"
(<PyTypeObject *>DatagramTransport).tp_name = "asyncio.selector_events._SelectorDatagramTransport"
