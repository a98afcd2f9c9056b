/*
 * The fd monitor: which file descriptors are ready? After QEMU's FDMonOps.
 *
 * Why it exists: one seam, three ways to wait (io_uring, epoll, poll), so that a loop keeps its behaviour where io_uring is
 * denied and even when it is taken away at run time. Promise: readiness is level-triggered on all three, that of a watch
 * that was removed is never reported, and a watch that was not removed is never lost.
 *
 * Words: a watch is a registered interest in a descriptor; a turn is collect (wait) then hand over (dispatch).
 * Collecting and running are kept apart: nothing here calls back into the user.
 *
 * Threads: every function locks the monitor, so that a call from the wrong thread cannot corrupt it; the lock is not held
 * while the kernel waits. The thread that calls ul_fdmon_turn() owns the ring; a turn elsewhere moves the monitor there.
 *
 * Errors are -errno. Times are nanoseconds; a negative timeout waits without limit.
 */
#ifndef UL_FDMON_H
#define UL_FDMON_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "ring.h"

/* What follows up to "cffi: end" is also the cdef of the Python module; ffi/build.py reads it from here. */
/* cffi: begin */
enum {
    UL_READ = 1, /* the values of selectors.EVENT_READ and EVENT_WRITE */
    UL_WRITE = 2,
    UL_ONCE = 4,                /* with them: the watch ends with its first report */
    UL_RECV = 8,                /* with UL_READ, on a stream socket: report data instead of readiness where the monitor can */
    UL_DATA = 16,               /* reported: a receive brought something */
    UL_SENT = 32,               /* reported: a send ended */
    UL_DOWNGRADED = 0x40000000, /* added to a turn's result, once after each downgrade */
};

enum ul_kind {
    UL_AUTO = 0, /* the first that works: io_uring, epoll, poll */
    UL_IO_URING = 1,
    UL_EPOLL = 2,
    UL_POLL = 3,
};

typedef struct ul_event {
    int32_t fd;
    uint32_t events; /* UL_READ | UL_WRITE: readiness; or UL_DATA alone; or UL_SENT alone */
    int32_t result;  /* UL_DATA: bytes at data, 0 the end of the stream, < 0 -errno; UL_SENT: bytes or -errno */
    uint32_t _reserved;
    const void *data; /* valid until the next ul_fdmon_turn() or ul_fdmon_prepare() */
} ul_event;

typedef struct ul_host_fd {
    int32_t fd;
    uint32_t poll_events; /* POLLIN, POLLOUT */
} ul_host_fd;

typedef struct ul_statistics {
    uint64_t turns, enters, sqes, cqes, overflows, downgrades, watches;
    uint64_t poll_ns, polled; /* how long a turn looks before it sleeps; turns that found something by looking */
} ul_statistics;

typedef struct ul_setup_info {
    const char *name;         /* the active monitor: "io_uring", "epoll", "poll" */
    const char *refused_step; /* what failed when a better monitor was tried or lost; NULL when nothing did */
    int32_t refused_errno;
    uint32_t ring_setup_flags, ring_features, sq_entries, cq_entries; /* 0 without a ring */
} ul_setup_info;

typedef struct ul_fdmon ul_fdmon;
typedef struct ul_ring ul_ring;

/* Makes a monitor. UL_AUTO falls back on any errno; another kind is that kind or an error. spare: a quiesced ring of this
 * thread from ul_fdmon_close(), or NULL; it is used or freed. On failure *info tells the refused step. */
int ul_fdmon_new(enum ul_kind kind, ul_ring *spare, ul_fdmon **out, ul_setup_info *info);

/* Ends the monitor: the verbs answer -EBADF from now on, the statistics stay. In the owner thread of a working ring it reaps
 * what is in flight and leaves that ring in *spare for this thread's next monitor, else it drops the ring and *spare is NULL.
 * -EBUSY, and nothing done, while another thread waits on it. */
int ul_fdmon_close(ul_fdmon *mon, ul_ring **spare);
void ul_fdmon_free(ul_fdmon *mon); /* a closed one, once no thread can call it any more */
void ul_ring_free(ul_ring *ring);

/* In a forked child, before anything else: lets go of the parent's kernel objects without touching them. The next use makes
 * own ones and watches the same descriptors. */
void ul_fdmon_after_fork_in_child(ul_fdmon *mon);

/* Watches fd for events (UL_READ | UL_WRITE); replaces what was watched before; 0 removes the watch. No io_uring_enter but
 * for the removal of an armed watch, or of UL_RECV, which returns when the kernel holds the file no more (from a foreign
 * thread beside a wait: when that wait ends). Errors are epoll_ctl's; -ENOMEM. A failed call changes nothing. Removing never
 * fails.
 * | UL_ONCE: the watch is removed when it is reported, without a call; the kernel does not hold the file then.
 * UL_READ | UL_RECV, | UL_WRITE or not: where the monitor can, bytes are received and reported as UL_DATA, else readiness is;
 * which one may change from one event to the next. After a UL_DATA without bytes nothing more is received before a call
 * without UL_RECV and one with it. What was received is reported, in its order and before readiness, also when UL_RECV or the
 * watch is taken away: then ul_fdmon_dispatch() has all of it, and only then is what is left the caller's to recv(). */
int ul_fdmon_update(ul_fdmon *mon, int fd, uint32_t events);

/* One turn: hands changes to the kernel, waits at most timeout_ns (0: not at all), stores up to out_max events (one of
 * readiness for a descriptor, any number of UL_DATA) and returns their number, perhaps | UL_DOWNGRADED. What there was no room
 * for comes with the next turns, before anything new. 0 before the timeout means "interrupted, ask again": the caller looks
 * after signals and the clock. -EBUSY: another thread is waiting on this monitor. -EBADF: it is closed. */
int ul_fdmon_turn(ul_fdmon *mon, int64_t timeout_ns, ul_event *out, int out_max);

/* Hands over what the last turn had no room for. Never blocks, never enters the kernel. */
int ul_fdmon_dispatch(ul_fdmon *mon, ul_event *out, int out_max);

/* True when a turn with timeout 0 has anything to do. Reads shared memory only. */
bool ul_fdmon_need_wait(ul_fdmon *mon);

/* A foreign main loop, the host, carries ours: in one thread it polls what ul_fdmon_host_fds() lists, calls ul_fdmon_turn() with
 * timeout 0 when that is readable or when ul_fdmon_prepare() says so, and ul_fdmon_prepare() before it sleeps, or after each
 * turn where it cannot know. Promise: the descriptors are readable whenever a turn is due, whatever was called since. */

/* What the host polls, and for what; makes it at first. Returns how many there are; with more than out_max, out is incomplete.
 * io_uring: an eventfd; epoll: its descriptor; poll: every watch and two of its own. *version changes with the list: on poll with
 * any watch (the host is woken then until it has asked again), else when the monitor is lost, and in a forked child. -errno when
 * a descriptor cannot be made; -EBADF: closed. */
int ul_fdmon_host_fds(ul_fdmon *mon, ul_host_fd *out, int out_max, uint64_t *version);

/* Readable whenever a turn is due, for an outer loop that leaves times to the caller. io_uring: an eventfd, because a poll on a
 * DEFER_TASKRUN ring is not woken. -EOPNOTSUPP on poll, which has none. */
int ul_fdmon_fileno(ul_fdmon *mon);

/* Adaptive polling, as QEMU's AioContext has it: a turn that may block first looks for events, again and again, for a time that
 * follows how long the turns before it had to wait. poll_max_ns 0, as at first: it does not. poll_grow: the factor for more, 0
 * means 2; poll_shrink: the divisor for less, 0 means none at all from then on. It begins anew with each call. While a turn
 * looks, it counts as waiting. Looking costs a processor: on io_uring it reads shared memory, on epoll and poll it calls the
 * kernel. */
void ul_fdmon_set_polling(ul_fdmon *mon, int64_t poll_max_ns, int64_t poll_grow, int64_t poll_shrink);

void ul_fdmon_statistics(ul_fdmon *mon, ul_statistics *out);
void ul_fdmon_setup_info(ul_fdmon *mon, ul_setup_info *out);
/* cffi: end */

/* Before the host sleeps: hands every change to the kernel, and what ul_event.data pointed to; has the host woken at wake_ns, a
 * CLOCK_MONOTONIC time (negative: none). That may be once too early, when an earlier call named an earlier time. Never blocks.
 * 1: a turn is due now, and a descriptor becomes readable at once; 0: none is known of, and none is readable but for what the
 * kernel reports by it. On poll the list is asked for first. -EBUSY: another thread is waiting on this monitor. -EBADF: closed.
 * -EMFILE and the like: no descriptor for the time. */
int ul_fdmon_prepare(ul_fdmon *mon, int64_t wake_ns);

/* Between turns: makes a host's descriptor readable at once, for what is due outside of the monitor. Without a host it does
 * nothing. */
void ul_fdmon_wake_host(ul_fdmon *mon);

/* There is no host any more: its descriptors are closed, but for the one of ul_fdmon_fileno(). In the host's thread. */
void ul_fdmon_end_hosting(ul_fdmon *mon);

/* Queues one send of 1 to UL_PIECES_MAX pieces on a stream socket; it leaves with the next turn's enter and ends with UL_SENT.
 * It may be short; -EAGAIN, and as long as it has not ended: nothing was sent. The iovecs are copied; the bytes must stay as
 * they are until UL_SENT is reported or ul_fdmon_cancel_send(), ul_fdmon_forget() or ul_fdmon_close() has returned. -EALREADY:
 * one is under way or its UL_SENT is not reported yet. -EOPNOTSUPP: this monitor does not send. -EINVAL: the number of pieces.
 * -EBADF: closed, or no descriptor. -ENOMEM. */
int ul_fdmon_send(ul_fdmon *mon, int fd, const struct iovec *pieces, int count);

/* Ends the send of fd and returns when the kernel uses its bytes no more: the bytes sent, -EAGAIN when that is none, or the
 * send's error; UL_SENT does not come. -ENOENT: there is none. -EBUSY: another thread is waiting on this monitor. */
int ul_fdmon_cancel_send(ul_fdmon *mon, int fd);

/* Before fd is closed: removes its watch, cancels its send and drops what was received for it and not handed over.
 * What was handed over, and not looked at yet, is the caller's to drop: the number may be another connection's by then. 0, or
 * -EBUSY and nothing done while another thread is waiting on this monitor and the kernel has a send of fd. */
int ul_fdmon_forget(ul_fdmon *mon, int fd);

/* One registration, at watches[fd]. */
typedef struct ul_watch {
    uint8_t events;       /* UL_READ | UL_WRITE, | UL_ONCE or | UL_RECV; 0 = no watch */
    uint8_t revents;      /* readiness, collected and not handed over yet, in the same bits */
    bool on_ready;        /* has a place for it on mon->collected (kept when the watch is removed: the place stays) */
    bool on_pending;      /* has a place on mon->pending */
    bool edge;            /* io_uring: a one-shot poll would fire for ever with nothing that was asked for */
    bool parked;          /* its descriptor is bad: reported once, not armed again before it is changed */
    bool ended;           /* UL_RECV: receiving has ended; not again before UL_RECV was taken away and asked for anew */
    bool no_receive;      /* io_uring cannot receive from this file: UL_RECV means UL_READ */
    bool in_epoll;        /* epoll: the kernel has an entry, perhaps a disabled one that UL_ONCE has left */
    uint16_t data_queued; /* UL_DATA on mon->collected; with ended, the end is one of them */
    uint32_t request;     /* io_uring: index + 1 of the poll in flight; poll: index + 1 in the poll set; 0 = none */
    uint32_t receive;     /* io_uring: index + 1 of the receive in flight, also of one that is to end: never two at once */
    struct ul_send *send; /* until its end is reported; needs no watch */
} ul_watch;

enum {
    UL_PIECES_MAX = 64,
    UL_NO_BUFFER = -1,
    UL_BUFFER_BYTES = 2048, /* of one of the buffers for received data */
    UL_HOST_TIMER = -1,     /* epoll: in place of a watch's descriptor */
    UL_HOST_EVENT = -2,
};

typedef struct ul_item {
    int32_t fd;
    uint32_t kind;  /* of what was collected: UL_READ, readiness, in watches[fd].revents; UL_DATA; or UL_SENT */
    int32_t result; /* as in ul_event */
    int32_t buffer; /* UL_DATA: the number of the buffer that holds it, or UL_NO_BUFFER */
} ul_item;

typedef struct ul_queue {
    ul_item *items; /* a circle; there is room for all that can come, so that putting cannot fail */
    uint32_t first, count, cap;
} ul_queue;

/* A send. The kernel reads message and pieces when it takes the request, the bytes until the request ends. */
typedef struct ul_send {
    struct msghdr message;
    struct iovec pieces[UL_PIECES_MAX];
    enum { UL_QUEUED, UL_SENDING, UL_ENDED } state;
    int32_t result;
    uint32_t request; /* index + 1 */
    struct ul_send *next_free;
} ul_send;

typedef struct ul_buffers ul_buffers;

/* The verbs. Each is called with mon->lock held. */
typedef struct FDMonOps {
    enum ul_kind kind;
    const char *name;
    bool streams; /* looks after UL_RECV and sends */

    /* The watch of fd changed from old_events; mon->watches[fd].events has the new value. An error undoes the change. */
    int (*update)(ul_fdmon *mon, int fd, uint32_t old_events);

    /* Collects readiness with ul_fdmon_collect(). May release the lock while the kernel waits (mon->waiting is set then).
     * Returns 0, also when interrupted or when time ran out. Any error means that this monitor is lost. */
    int (*wait)(ul_fdmon *mon, int64_t timeout_ns);

    /* True when wait(0) could find or do anything. */
    bool (*need_wait)(ul_fdmon *mon);

    /* Hands over what wait() collected; never blocks. */
    int (*dispatch)(ul_fdmon *mon, ul_event *out, int out_max);

    /* Lets go of the kernel's objects; the watches stay, for the next monitor. A number that became the application's stays. */
    void (*close)(ul_fdmon *mon);
} FDMonOps;

/* What the kernel has. user_data = generation << 32 | index + 1: never an fd, because a request outlives the number. */
typedef struct ul_request {
    int32_t fd; /* -1: of none */
    uint32_t generation;
    enum { UL_POLLS = 0, UL_RECEIVES, UL_SENDS, UL_TIMEOUTS } kind;
    enum { UL_FREE = 0, UL_ARMED, UL_DYING } state;
    uint8_t events; /* of a poll */
    bool multishot;
    bool forgotten; /* what this receive still brings is nobody's */
    uint32_t next_free;
} ul_request;

#define UL_NEVER INT64_MAX /* of times in nanoseconds */

#define UL_FDMON_LAYOUT ((uint64_t)1 << 32 | sizeof(ul_fdmon))

struct ul_fdmon {
    uint64_t layout; /* UL_FDMON_LAYOUT of the extension that made it: another one takes a pointer to it */
    pthread_mutex_t lock;
    const FDMonOps *ops;
    enum ul_kind kind; /* what was asked for */
    bool stale;        /* the kernel objects are gone (fork): set up again before the next use */
    bool closed;
    bool waiting; /* a thread is in the kernel, without the lock */

    ul_watch *watches; /* by fd */
    size_t watches_cap, watches_live;
    ul_queue pending;   /* io_uring: to be (re-)armed in the next enter */
    ul_queue collected; /* to be dispatched, in the order in which it came */
    size_t ready_live;  /* without the readiness of watches that were removed or changed since */

    ul_buffers *buffers; /* NULL before the first UL_RECV on io_uring; outlives the ring, since data waits in it */
    bool no_receive;     /* refused by the kernel, for good */
    ul_send *sends_free;
    size_t sends_made; /* records: those, and the ones of watches */
    size_t sends_queued;

    ul_ring *ring;
    pthread_t ring_owner;
    ul_request *requests;
    uint32_t requests_cap, requests_in_flight, requests_dying, requests_free; /* free: index + 1 of the first free one */
    bool uncancelled; /* some that are to end go on, and nobody has told the kernel: to be done before the turn ends */
    int errors_in_a_row;
    const char *step; /* what is being done with the ring: named when it fails */
    int eventfd;      /* -1 until somebody asks for a descriptor */

    bool hosted;                              /* somebody has asked for the host's descriptors */
    bool has_fileno;                          /* ul_fdmon_fileno() has handed one out */
    uint64_t host_version, host_version_told; /* of the list of descriptors */
    int64_t wake_ns, armed_ns;                /* when the host wants to be woken; what the kernel knows of that */
    int timerfd;                              /* epoll, poll: -1 before the first host */
    uint32_t timeout;                         /* io_uring: index + 1 of the request in flight */
    int timeout_refused;                      /* -errno: io_uring does not know timeouts */
    struct ul_timespec timeout_at;

    int epoll_fd;
    bool no_epoll_pwait2;
    struct epoll_event *epoll_events;
    size_t epoll_events_cap;

    struct pollfd *pollfds, *pollfds_in_kernel;
    size_t pollfds_count;

    int64_t poll_ns, poll_max_ns, poll_grow, poll_shrink; /* ul_fdmon_set_polling() */
    int64_t looked_since_ns;                              /* the last turn did so in vain: this one sleeps */

    ul_ring_counts counts;
    uint64_t turns, downgrades, polled;
    bool downgrade_unreported;
    ul_setup_info info; /* of the last ring and the last refusal */
};

/* Each makes its kernel object, takes over every live watch and sets mon->ops; or returns -errno and changes nothing. */
int ul_fdmon_io_uring_setup(ul_fdmon *mon, ul_ring *spare);
int ul_fdmon_epoll_setup(ul_fdmon *mon);
void ul_fdmon_poll_setup(ul_fdmon *mon); /* never fails */

/* The owner of a quiet ring gives it away: cancels, reaps, unregisters. NULL when that is not possible. */
ul_ring *ul_fdmon_io_uring_release(ul_fdmon *mon);
void ul_fdmon_io_uring_after_fork(ul_fdmon *mon);

/* The rule: how long to look, after a turn that looked for poll_ns was woken by an event after block_ns. */
int64_t ul_adjusted_poll_ns(int64_t poll_ns, int64_t block_ns, int64_t poll_max_ns, int64_t poll_grow, int64_t poll_shrink);

/* Services for the three monitors. */
uint32_t ul_poll_mask(uint32_t events);                         /* UL_* to poll(2) bits */
bool ul_fdmon_collect(ul_fdmon *mon, int fd, uint32_t revents); /* poll(2) bits; false: nothing that was asked for */
void ul_fdmon_collect_data(ul_fdmon *mon, int fd, int32_t result, int32_t buffer);
void ul_fdmon_collect_sent(ul_fdmon *mon, int fd, int32_t result);

/* The readiness to wait for: without UL_READ where a receive looks after it. */
static inline uint32_t ul_polled_events(const ul_fdmon *mon, const ul_watch *watch) {
    bool receiving = mon->ring && mon->ring->buffer_ring && !mon->no_receive && !watch->no_receive;
    return watch->events & (watch->events & UL_RECV && (receiving || watch->ended) ? UL_WRITE : UL_READ | UL_WRITE);
}

/* Not that of a bad descriptor, and not when UL_ONCE's only report is on its way already. */
static inline bool ul_wants_poll(const ul_fdmon *mon, const ul_watch *watch) {
    return ul_polled_events(mon, watch) && !watch->parked && !(watch->events & UL_ONCE && watch->revents);
}

void ul_fdmon_park(ul_fdmon *mon, int fd); /* bad descriptor: report once, then leave it alone */
void ul_queue_put(ul_queue *queue, ul_item item);
ul_item ul_queue_pop(ul_queue *queue); /* of one that is not empty */
int ul_fdmon_dispatch_ready(ul_fdmon *mon, ul_event *out, int out_max);
int ul_fd_pollable(int fd); /* 0 or what epoll_ctl would answer */
int64_t ul_now_ns(void);    /* CLOCK_MONOTONIC */

/* For the host; hosting.c. */
void ul_host_want_turn(ul_fdmon *mon);  /* makes it call us, if there is one */
void ul_host_begin_turn(ul_fdmon *mon); /* what was wanted until now is done by this turn ... */
void ul_host_end_turn(ul_fdmon *mon);   /* ... and what it has left wants the next one */
void ul_host_moves_to_epoll(ul_fdmon *mon);
void ul_host_close(ul_fdmon *mon); /* also in a forked child: touches nothing that the parent has */

/* fdmon.c, for the host and for polling. */
void ul_fdmon_renew(ul_fdmon *mon);                   /* makes the kernel objects again after a fork */
void ul_fdmon_downgrade(ul_fdmon *mon, int err);      /* mon->step has failed */
int ul_fdmon_wait(ul_fdmon *mon, int64_t timeout_ns); /* of the monitor, or of the one that takes its place */

int ul_polling_wait(ul_fdmon *mon, int64_t timeout_ns); /* looks, then waits; polling.c */

#endif
