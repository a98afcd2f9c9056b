/*
 * The part of the kernel's io_uring interface that uringloop uses.
 *
 * Why it exists: Debian 12 ships kernel headers from 6.1 and liburing 2.3, both without half of these names, and a wheel may
 * not depend on either. Promise: numbers and layouts here are the kernel's, nothing else is in this file.
 */
#ifndef UL_URING_ABI_H
#define UL_URING_ABI_H

#include <stdint.h>
#include <sys/syscall.h>

/* The three numbers are the same on every architecture but alpha, whose headers define them. */
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_enter 426
#define SYS_io_uring_register 427
#endif
#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif

struct ul_sqe {
    uint8_t opcode;
    uint8_t flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off;
    uint64_t addr;
    uint32_t len;
    uint32_t op_flags;
    uint64_t user_data;
    uint16_t buf_index;
    uint16_t personality;
    int32_t file_index;
    uint64_t addr3;
    uint64_t pad;
};

struct ul_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};

struct ul_sqring_offsets {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv1;
    uint64_t user_addr;
};

struct ul_cqring_offsets {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1;
    uint64_t user_addr;
};

struct ul_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3];
    struct ul_sqring_offsets sq_off;
    struct ul_cqring_offsets cq_off;
};

struct ul_timespec {
    int64_t tv_sec, tv_nsec;
};

struct ul_getevents_arg {
    uint64_t sigmask;
    uint32_t sigmask_sz, min_wait_usec;
    uint64_t ts;
};

struct ul_buffer_place {
    uint64_t addr;
    uint32_t len;
    uint16_t number, tail; /* tail: the ring's, in its first place only */
};

struct ul_buffer_ring_registration {
    uint64_t ring_addr;
    uint32_t ring_entries;
    uint16_t group, flags;
    uint64_t _reserved[3];
};

enum {
    UL_OP_POLL_ADD = 6,
    UL_OP_SENDMSG = 9,
    UL_OP_TIMEOUT = 11,
    UL_OP_TIMEOUT_REMOVE = 12,
    UL_OP_ASYNC_CANCEL = 14,
    UL_OP_SEND = 26,
    UL_OP_RECV = 27,
    UL_POLL_ADD_MULTI = 1 << 0, /* in ul_sqe.len */
    UL_RECV_MULTISHOT = 1 << 1, /* in ul_sqe.ioprio */
    UL_TIMEOUT_ABS = 1 << 0,    /* in ul_sqe.op_flags */
    UL_TIMEOUT_UPDATE = 1 << 1,
    UL_IOSQE_BUFFER_SELECT = 1 << 5, /* in ul_sqe.flags */
    UL_CQE_F_BUFFER = 1 << 0,        /* in ul_cqe.flags, with the buffer's number above UL_CQE_BUFFER_SHIFT */
    UL_CQE_F_MORE = 1 << 1,
    UL_CQE_BUFFER_SHIFT = 16,
    UL_SETUP_CQSIZE = 1 << 3,
    UL_SETUP_CLAMP = 1 << 4,
    UL_SETUP_SUBMIT_ALL = 1 << 7,
    UL_SETUP_TASKRUN_FLAG = 1 << 9,
    UL_SETUP_SINGLE_ISSUER = 1 << 12,
    UL_SETUP_DEFER_TASKRUN = 1 << 13,
    UL_SETUP_NO_SQARRAY = 1 << 16,
    UL_FEAT_SINGLE_MMAP = 1 << 0,
    UL_FEAT_NODROP = 1 << 1,
    UL_FEAT_SUBMIT_STABLE = 1 << 2,
    UL_FEAT_EXT_ARG = 1 << 8,
    UL_FEAT_NO_IOWAIT = 1 << 17,
    UL_ENTER_GETEVENTS = 1 << 0,
    UL_ENTER_EXT_ARG = 1 << 3,
    UL_ENTER_NO_IOWAIT = 1 << 7,
    UL_SQ_CQ_OVERFLOW = 1 << 1, /* in *sq_flags */
    UL_SQ_TASKRUN = 1 << 2,
    UL_REGISTER_EVENTFD = 4,
    UL_UNREGISTER_EVENTFD = 5,
    UL_REGISTER_BUFFER_RING = 22,
    UL_UNREGISTER_BUFFER_RING = 23,
};

#define UL_OFF_RINGS 0x0ULL
#define UL_OFF_SQES 0x10000000ULL

_Static_assert(sizeof(struct ul_sqe) == 64, "the kernel's submission entry has 64 bytes");
_Static_assert(sizeof(struct ul_cqe) == 16, "the kernel's completion entry has 16 bytes");
_Static_assert(sizeof(struct ul_buffer_place) == 16, "struct io_uring_buf has 16 bytes");
_Static_assert(sizeof(struct ul_buffer_ring_registration) == 40, "struct io_uring_buf_reg has 40 bytes");
_Static_assert(sizeof(struct ul_params) == 120, "struct io_uring_params has 120 bytes");

#endif
