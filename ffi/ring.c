/*
 * One io_uring: set-up, submission, completion. The contract stands in ring.h.
 *
 * Some facts about io_uring that decided this file:
 *
 * - SINGLE_ISSUER | DEFER_TASKRUN (kernel 6.1) makes completions run only inside our own enter: they come in batches and never
 *   interrupt another system call of the thread. The price: a completion is not visible in shared memory until the kernel has
 *   been entered; TASKRUN_FLAG tells when that is worth while.
 * - NO_SQARRAY (6.6) drops one indirection. Older kernels answer -EINVAL, so the ladder has exactly two steps. A kernel that
 *   knows neither is better served by epoll than by a third path that nobody tests.
 * - Emulators have answered io_uring_setup with success and done nothing after it. So a ring must carry a poll to its end, and
 *   a cancellation, before anybody trusts it.
 * - RLIMIT_MEMLOCK is charged per user since 6.14 and a closed ring's share comes back late. -ENOMEM therefore asks for a
 *   smaller ring, then waits a little, and is never taken for a denial.
 * - A forked child inherits the mapping and could submit into its parent's queue. MADV_DONTFORK keeps the mapping at home.
 */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    RING_FLAGS = UL_SETUP_SINGLE_ISSUER | UL_SETUP_DEFER_TASKRUN | UL_SETUP_TASKRUN_FLAG | UL_SETUP_SUBMIT_ALL |
        UL_SETUP_CLAMP | UL_SETUP_CQSIZE,
    RING_FEATURES = UL_FEAT_SINGLE_MMAP | UL_FEAT_NODROP | UL_FEAT_SUBMIT_STABLE | UL_FEAT_EXT_ARG,
    SMALL_SQ_ENTRIES = 64,
    SMALL_CQ_ENTRIES = 256,
    ENOMEM_RETRIES = 6,          /* sleeps of 0.5, 1, 2 .. 16 ms: 31.5 ms in all */
    SEND_MAX_BYTES = 0x7ffff000, /* what one system call sends at most */
    BUFFER_RING_BYTES = UL_BUFFERS_MAX * sizeof(struct ul_buffer_place),
};

static long sys_setup(uint32_t entries, struct ul_params *params) {
    long ret = syscall(SYS_io_uring_setup, entries, params);
    return ret < 0 ? -errno : ret;
}

static int setup_ladder(uint32_t sq_entries, uint32_t cq_entries, struct ul_params *params) {
    static const uint32_t ladder[] = {RING_FLAGS | UL_SETUP_NO_SQARRAY, RING_FLAGS};
    long fd = -EINVAL;
    for (unsigned i = 0; i < sizeof ladder / sizeof ladder[0] && fd == -EINVAL; i++) {
        memset(params, 0, sizeof *params);
        params->flags = ladder[i];
        params->cq_entries = cq_entries;
        fd = sys_setup(sq_entries, params);
        if (fd == -EAGAIN || fd == -EINTR)
            fd = sys_setup(sq_entries, params);
    }
    return (int)fd;
}

static int setup_within_memlock(uint32_t sq_entries, uint32_t cq_entries, struct ul_params *params) {
    int fd = setup_ladder(sq_entries, cq_entries, params);
    for (unsigned i = 0; fd == -ENOMEM && i <= ENOMEM_RETRIES; i++) {
        if (i > 0) {
            struct timespec pause = {0, 250000L << i};
            nanosleep(&pause, NULL);
        }
        uint32_t small_sq = sq_entries < SMALL_SQ_ENTRIES ? sq_entries : SMALL_SQ_ENTRIES;
        uint32_t small_cq = cq_entries < SMALL_CQ_ENTRIES ? cq_entries : SMALL_CQ_ENTRIES;
        fd = setup_ladder(small_sq, small_cq, params);
    }
    return fd;
}

static void *map_region(int fd, size_t size_bytes, uint64_t offset) {
    void *map = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
    if (map == MAP_FAILED)
        return NULL;
    if (madvise(map, size_bytes, MADV_DONTFORK) != 0) {
        munmap(map, size_bytes);
        return NULL;
    }
    return map;
}

static uint32_t *at(void *map, uint32_t offset) { return (uint32_t *)(void *)((char *)map + offset); }

static int map_ring(ul_ring *ring, const struct ul_params *params) {
    size_t sq_bytes = (params->flags & UL_SETUP_NO_SQARRAY) ? 0 : params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    size_t cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct ul_cqe);
    ring->rings_size_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    ring->sqes_size_bytes = params->sq_entries * sizeof(struct ul_sqe);
    ring->rings_map = map_region(ring->fd, ring->rings_size_bytes, UL_OFF_RINGS);
    if (!ring->rings_map)
        return -errno;
    ring->sqes_map = map_region(ring->fd, ring->sqes_size_bytes, UL_OFF_SQES);
    if (!ring->sqes_map)
        return -errno;

    ring->sq_head = at(ring->rings_map, params->sq_off.head);
    ring->sq_ktail = at(ring->rings_map, params->sq_off.tail);
    ring->sq_flags = at(ring->rings_map, params->sq_off.flags);
    ring->sq_mask = *at(ring->rings_map, params->sq_off.ring_mask);
    ring->sq_tail = *ring->sq_ktail;
    ring->sqes = ring->sqes_map;
    ring->cq_head = at(ring->rings_map, params->cq_off.head);
    ring->cq_ktail = at(ring->rings_map, params->cq_off.tail);
    ring->cq_mask = *at(ring->rings_map, params->cq_off.ring_mask);
    ring->cqes = (struct ul_cqe *)(void *)((char *)ring->rings_map + params->cq_off.cqes);
    if (!(params->flags & UL_SETUP_NO_SQARRAY)) {
        uint32_t *array = at(ring->rings_map, params->sq_off.array);
        for (uint32_t i = 0; i < params->sq_entries; i++)
            array[i] = i;
    }
    return 0;
}

/* Enters until the completion with this user_data is there. Bounded: what a working kernel does in one enter gets eight. */
static int expect_completion(ul_ring *ring, uint64_t user_data, int32_t *res) {
    for (int i = 0; i < 8; i++) {
        int ret = ul_ring_enter(ring, 1, 10000000);
        if (ret < 0 && ret != -EINTR && ret != -ETIME && ret != -EAGAIN)
            return ret;
        const struct ul_cqe *cqe;
        bool found = false;
        while ((cqe = ul_ring_peek(ring))) {
            if (cqe->user_data == user_data) {
                *res = cqe->res;
                found = true;
            }
            ul_ring_seen(ring);
        }
        if (found)
            return 0;
    }
    return -EOPNOTSUPP;
}

static int self_test_with(ul_ring *ring, int fd) {
    enum { FIRES = 1, WAITS = 2 };
    int32_t res = 0;
    ul_prep_poll_add(ul_ring_get_sqe(ring), fd, POLLOUT, false, FIRES);
    int ret = expect_completion(ring, FIRES, &res);
    if (ret < 0 || !(res > 0 && (res & POLLOUT)))
        return ret < 0 ? ret : -EOPNOTSUPP;
    ul_prep_poll_add(ul_ring_get_sqe(ring), fd, POLLIN, false, WAITS);
    ul_prep_cancel(ul_ring_get_sqe(ring), WAITS);
    ret = expect_completion(ring, WAITS, &res);
    if (ret < 0 || res != -ECANCELED)
        return ret < 0 ? ret : -EOPNOTSUPP;
    return 0;
}

static int self_test(ul_ring *ring) {
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    int ret = self_test_with(ring, fd);
    close(fd);
    while (ret == 0 && ul_ring_peek(ring))
        ul_ring_seen(ring);
    return ret;
}

int ul_ring_open(ul_ring *ring, uint32_t sq_entries, uint32_t cq_entries, ul_ring_counts *counts, const char **step) {
    struct ul_params params;
    memset(ring, 0, sizeof *ring);
    ring->counts = counts;
    *step = "io_uring_setup";
    ring->fd = setup_within_memlock(sq_entries, cq_entries, &params);
    if (ring->fd < 0)
        return ring->fd;
    ring->pid = getpid();
    ring->setup_flags = params.flags;
    ring->features = params.features;
    ring->sq_entries = params.sq_entries;
    ring->cq_entries = params.cq_entries;
    /* A wait with requests in flight counts as I/O wait: an idle loop would show as a core at 100 % iowait. */
    ring->enter_flags = (params.features & UL_FEAT_NO_IOWAIT) ? UL_ENTER_NO_IOWAIT : 0;

    int ret = -EOPNOTSUPP, fd = ring->fd;
    *step = "io_uring features";
    if ((params.features & RING_FEATURES) == RING_FEATURES) {
        *step = "mmap of the io_uring";
        ret = map_ring(ring, &params);
        if (ret == 0) {
            *step = "io_uring self-test";
            ret = self_test(ring);
        }
    }
    if (ret < 0) {
        ring->fd = -1;
        ul_ring_close(ring);
        close(fd); /* whatever it is, the kernel gave it to us a moment ago */
    }
    return ret;
}

/* The application may have closed our descriptor (a daemon's closerange), and the number be another file by now. */
static bool number_is_lost(int err) { return err == EBADF || err == EOPNOTSUPP; }

void ul_ring_close(ul_ring *ring) {
    bool mapped_here = ring->pid == getpid();
    if (ring->sqes_map && mapped_here)
        munmap(ring->sqes_map, ring->sqes_size_bytes);
    if (ring->rings_map && mapped_here)
        munmap(ring->rings_map, ring->rings_size_bytes);
    if (ring->buffer_ring && mapped_here)
        munmap(ring->buffer_ring, BUFFER_RING_BYTES);
    if (ring->fd >= 0 && (syscall(SYS_io_uring_enter, ring->fd, 0, 0, 0, NULL, 0) >= 0 || !number_is_lost(errno)))
        close(ring->fd);
    ring->sqes_map = ring->rings_map = NULL;
    ring->buffer_ring = NULL;
    ring->fd = -1;
}

uint32_t ul_ring_unsubmitted(const ul_ring *ring) { return ring->sq_tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE); }

struct ul_sqe *ul_ring_get_sqe(ul_ring *ring) {
    if (ul_ring_unsubmitted(ring) >= ring->sq_entries)
        return NULL;
    struct ul_sqe *sqe = &ring->sqes[ring->sq_tail++ & ring->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    return sqe;
}

int ul_ring_enter(ul_ring *ring, uint32_t min_complete, int64_t timeout_ns) {
    struct ul_timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    struct ul_getevents_arg arg = {.ts = (uint64_t)(uintptr_t)&ts};
    bool timed = min_complete > 0 && timeout_ns >= 0;
    uint32_t flags = UL_ENTER_GETEVENTS | ring->enter_flags | (timed ? UL_ENTER_EXT_ARG : 0);
    uint32_t to_submit = ul_ring_unsubmitted(ring);

    __atomic_store_n(ring->sq_ktail, ring->sq_tail, __ATOMIC_RELEASE);
    __atomic_add_fetch(&ring->counts->enters, 1, __ATOMIC_RELAXED);
    long ret =
        syscall(SYS_io_uring_enter, ring->fd, to_submit, min_complete, flags, timed ? &arg : NULL, timed ? sizeof arg : 0);
    if (ret < 0) {
        int err = errno;
        if (number_is_lost(err))
            ring->fd = -1;
        return -err;
    }
    __atomic_add_fetch(&ring->counts->sqes, (uint64_t)ret, __ATOMIC_RELAXED);
    return (int)ret;
}

bool ul_ring_overflowed(const ul_ring *ring) { return __atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & UL_SQ_CQ_OVERFLOW; }

bool ul_ring_has_work(const ul_ring *ring) {
    return ul_ring_peek(ring) || (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & (UL_SQ_CQ_OVERFLOW | UL_SQ_TASKRUN));
}

const struct ul_cqe *ul_ring_peek(const ul_ring *ring) {
    uint32_t head = *ring->cq_head; /* only we write it */
    if (head == __atomic_load_n(ring->cq_ktail, __ATOMIC_ACQUIRE))
        return NULL;
    return &ring->cqes[head & ring->cq_mask];
}

void ul_ring_seen(ul_ring *ring) {
    ring->counts->cqes++; /* never beside a wait, as the others are: needs no atomic */
    __atomic_store_n(ring->cq_head, *ring->cq_head + 1, __ATOMIC_RELEASE);
}

int ul_ring_set_eventfd(ul_ring *ring, int eventfd) {
    unsigned op = eventfd >= 0 ? UL_REGISTER_EVENTFD : UL_UNREGISTER_EVENTFD;
    if (eventfd < 0 && !ring->has_eventfd)
        return 0;
    if (syscall(SYS_io_uring_register, ring->fd, op, eventfd >= 0 ? &eventfd : NULL, eventfd >= 0 ? 1 : 0) < 0)
        return -errno;
    ring->has_eventfd = eventfd >= 0;
    return 0;
}

/* The memory is ours, since kernels before 6.4 cannot map theirs. It cannot grow. */
int ul_ring_register_buffers(ul_ring *ring) {
    void *map = mmap(NULL, BUFFER_RING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (map == MAP_FAILED)
        return -ENOMEM;
    struct ul_buffer_ring_registration registration = {.ring_addr = (uint64_t)(uintptr_t)map, .ring_entries = UL_BUFFERS_MAX};
    if (madvise(map, BUFFER_RING_BYTES, MADV_DONTFORK) != 0 ||
        syscall(SYS_io_uring_register, ring->fd, UL_REGISTER_BUFFER_RING, &registration, 1) < 0) {
        int err = errno;
        munmap(map, BUFFER_RING_BYTES);
        return -err;
    }
    ring->buffer_ring = map;
    ring->buffer_ring_tail = 0;
    return 0;
}

int ul_ring_unregister_buffers(ul_ring *ring) {
    struct ul_buffer_ring_registration registration = {0};
    if (!ring->buffer_ring)
        return 0;
    if (syscall(SYS_io_uring_register, ring->fd, UL_UNREGISTER_BUFFER_RING, &registration, 1) < 0)
        return -errno;
    munmap(ring->buffer_ring, BUFFER_RING_BYTES);
    ring->buffer_ring = NULL;
    return 0;
}

void ul_ring_give_buffer(ul_ring *ring, void *buffer, uint32_t size_bytes, uint16_t number) {
    struct ul_buffer_place *place = &ring->buffer_ring[ring->buffer_ring_tail++ & (UL_BUFFERS_MAX - 1)];
    place->addr = (uint64_t)(uintptr_t)buffer;
    place->len = size_bytes;
    place->number = number;
    __atomic_store_n(&ring->buffer_ring[0].tail, ring->buffer_ring_tail, __ATOMIC_RELEASE);
}

void ul_prep_poll_add(struct ul_sqe *sqe, int fd, uint32_t poll_events, bool multishot, uint64_t user_data) {
    sqe->opcode = UL_OP_POLL_ADD;
    sqe->fd = fd;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    poll_events = (poll_events << 16) | (poll_events >> 16); /* the kernel reads this field as two halves */
#endif
    sqe->op_flags = poll_events;
    sqe->len = multishot ? UL_POLL_ADD_MULTI : 0;
    sqe->user_data = user_data;
}

void ul_prep_receive(struct ul_sqe *sqe, int fd, uint64_t user_data) {
    sqe->opcode = UL_OP_RECV;
    sqe->flags = UL_IOSQE_BUFFER_SELECT; /* from group 0 */
    sqe->ioprio = UL_RECV_MULTISHOT;
    sqe->fd = fd;
    sqe->user_data = user_data;
}

void ul_prep_send(struct ul_sqe *sqe, int fd, const struct msghdr *message, uint64_t user_data) {
    bool plain = message->msg_iovlen == 1;
    size_t size_bytes = message->msg_iov->iov_len;
    sqe->opcode = plain ? UL_OP_SEND : UL_OP_SENDMSG;
    sqe->fd = fd;
    sqe->addr = (uint64_t)(uintptr_t)(plain ? message->msg_iov->iov_base : message);
    sqe->len = !plain ? 1 : size_bytes < SEND_MAX_BYTES ? (uint32_t)size_bytes : SEND_MAX_BYTES;
    sqe->op_flags = MSG_NOSIGNAL;
    sqe->user_data = user_data;
}

void ul_prep_timeout(struct ul_sqe *sqe, const struct ul_timespec *when, uint64_t user_data) {
    sqe->opcode = UL_OP_TIMEOUT;
    sqe->fd = -1;
    sqe->addr = (uint64_t)(uintptr_t)when;
    sqe->len = 1;
    sqe->op_flags = UL_TIMEOUT_ABS;
    sqe->user_data = user_data;
}

void ul_prep_timeout_update(struct ul_sqe *sqe, const struct ul_timespec *when, uint64_t target_user_data) {
    sqe->opcode = UL_OP_TIMEOUT_REMOVE;
    sqe->fd = -1;
    sqe->addr = target_user_data;
    sqe->off = (uint64_t)(uintptr_t)when;
    sqe->op_flags = UL_TIMEOUT_UPDATE | UL_TIMEOUT_ABS;
}

void ul_prep_cancel(struct ul_sqe *sqe, uint64_t target_user_data) {
    sqe->opcode = UL_OP_ASYNC_CANCEL;
    sqe->fd = -1;
    sqe->addr = target_user_data;
}
