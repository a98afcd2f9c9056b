/*
 * A foreign main loop carries ours: which descriptors it polls, and how they become readable. The contract stands in fdmon.h.
 *
 * Why it exists: a host sleeps in a poll() of its own, and some (Tk) cannot be asked before they do. Promise: whenever a turn is
 * due, for whatever reason, a descriptor that the host polls is readable; and a host that has nothing to do sleeps.
 *
 * Some facts that decided this file:
 *
 * - A poll() on a DEFER_TASKRUN ring is not woken, a registered eventfd is, once for the first of several completions. So it is
 *   emptied before the ring is looked at: what comes later signals it again. Its own requests must be submitted: what lies in
 *   the queue happens never.
 * - On epoll and poll an eventfd does it for "at once", a timerfd for a time. (A time that is past would do for both, but costs
 *   an interrupt, some 30 us on a virtual machine.) The timer is set anew instead of read, which ends its readiness too, and is
 *   refused when the application has closed the number and has another file there.
 * - In the epoll set they are edge-triggered: were a number lost while a forked child has a copy, nobody could take it out.
 * - A timerfd is shared with a forked child. The child closes its copy and never sets it.
 */
#define _GNU_SOURCE
#include "fdmon_io_uring.h"

#include <errno.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

/* ---- the timer ---- */

/* To the host: on epoll as one of the set. An epoll instance that cannot take it is given up: poll can. */
static void show(ul_fdmon *mon, int fd, int32_t who) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data = {.fd = who}};
    mon->host_version++;
    if (mon->ops->kind == UL_EPOLL && epoll_ctl(mon->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        mon->step = "epoll_ctl";
        ul_fdmon_downgrade(mon, -errno);
    }
}

static int open_timer(ul_fdmon *mon) {
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    mon->timerfd = fd;
    show(mon, fd, UL_HOST_TIMER);
    return 0;
}

static int set_timer(ul_fdmon *mon, int64_t when_ns) {
    struct itimerspec spec = {0};
    if (when_ns != UL_NEVER)
        spec.it_value = (struct timespec){when_ns / 1000000000, when_ns % 1000000000};
    for (int tries = 0; tries < 2; tries++) {
        int err = mon->timerfd < 0 ? open_timer(mon) : 0;
        if (err < 0)
            return err;
        if (timerfd_settime(mon->timerfd, TFD_TIMER_ABSTIME, &spec, NULL) == 0) {
            mon->armed_ns = when_ns;
            return 0;
        }
        mon->timerfd = -1; /* it is not ours any more */
    }
    return -errno;
}

/* ---- wanting turns ---- */

void ul_host_want_turn(ul_fdmon *mon) {
    if (mon->eventfd >= 0 && write(mon->eventfd, &(uint64_t){1}, sizeof(uint64_t)) < 0)
        return; /* the counter is full, so it is readable */
}

static void empty_eventfd(ul_fdmon *mon) {
    uint64_t count;
    if (mon->eventfd >= 0 && read(mon->eventfd, &count, sizeof count) < 0)
        return; /* it was not readable */
}

/* As far as is known without asking the kernel, which makes its own descriptors readable. */
static bool is_due(ul_fdmon *mon) {
    bool list_unknown = mon->ops->kind == UL_POLL && mon->host_version != mon->host_version_told;
    return mon->ready_live || list_unknown || (mon->ops->kind == UL_IO_URING && mon->ops->need_wait(mon));
}

void ul_host_begin_turn(ul_fdmon *mon) {
    if (mon->ops->kind != UL_IO_URING) /* it has told of a downgrade */
        empty_eventfd(mon);
    if (mon->timerfd >= 0 && mon->armed_ns != UL_NEVER && mon->armed_ns <= ul_now_ns())
        set_timer(mon, UL_NEVER);
}

void ul_host_end_turn(ul_fdmon *mon) {
    if (mon->ops->kind == UL_IO_URING)
        empty_eventfd(mon); /* the turn's own completions have signalled it, too */
    if ((mon->hosted || mon->eventfd >= 0) && is_due(mon))
        ul_host_want_turn(mon);
}

static void close_timer(ul_fdmon *mon) {
    struct itimerspec spec;
    if (mon->timerfd >= 0 && timerfd_gettime(mon->timerfd, &spec) == 0) /* else it is the application's by now */
        close(mon->timerfd);
    if (mon->timerfd >= 0)
        mon->armed_ns = UL_NEVER;
    mon->timerfd = -1;
}

static void close_eventfd(ul_fdmon *mon) {
    if (mon->eventfd >= 0)
        close(mon->eventfd);
    mon->eventfd = -1;
}

static void end_hosting(ul_fdmon *mon) {
    close_timer(mon);
    mon->wake_ns = UL_NEVER; /* a timeout of the ring may fire once more, for nobody */
    mon->hosted = false;
    mon->host_version++;
}

void ul_host_close(ul_fdmon *mon) {
    end_hosting(mon);
    close_eventfd(mon);
    mon->armed_ns = UL_NEVER;
}

/* The kernel would go on signalling an eventfd that nobody polls, with each completion. Another thread's ring keeps it. */
void ul_fdmon_end_hosting(ul_fdmon *mon) {
    pthread_mutex_lock(&mon->lock);
    if (!mon->closed && mon->hosted) {
        end_hosting(mon);
        if (!mon->has_fileno && (!mon->ring || ul_ring_set_eventfd(mon->ring, -1) == 0))
            close_eventfd(mon);
    }
    pthread_mutex_unlock(&mon->lock);
}

/* ---- what the host calls ---- */

/* Readable at first: the turn that follows registers it with the ring, in the ring's own thread. */
static int open_eventfd(ul_fdmon *mon) {
    if (mon->eventfd >= 0)
        return 0;
    int fd = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    mon->eventfd = fd;
    show(mon, fd, UL_HOST_EVENT);
    return 0;
}

void ul_host_moves_to_epoll(ul_fdmon *mon) {
    if (mon->eventfd >= 0)
        show(mon, mon->eventfd, UL_HOST_EVENT);
}

static int host(ul_fdmon *mon) {
    mon->hosted = true;
    int err = open_eventfd(mon);
    if (err == 0 && mon->ops->kind == UL_IO_URING)
        err = ul_requests_reserve(mon, mon->watches_live, mon->sends_made);
    else if (err == 0 && mon->timerfd < 0) /* now, so that the list is known before the host asks */
        err = set_timer(mon, UL_NEVER);
    return err;
}

static int list_poll_set(const ul_fdmon *mon, ul_host_fd *out, int out_max) {
    int n = 0;
    for (size_t i = 0; i < mon->pollfds_count; i++, n++)
        if (n < out_max)
            out[n] = (ul_host_fd){mon->pollfds[i].fd, (uint32_t)mon->pollfds[i].events};
    for (int i = 0; i < 2; i++) {
        int fd = i == 0 ? mon->eventfd : mon->timerfd;
        if (fd >= 0 && n++ < out_max)
            out[n - 1] = (ul_host_fd){fd, POLLIN};
    }
    return n;
}

/* Of the ring and of epoll only POLLIN: a ring is writable whenever its queue has room. */
static int list(const ul_fdmon *mon, ul_host_fd *out, int out_max) {
    if (mon->ops->kind == UL_POLL)
        return list_poll_set(mon, out, out_max);
    if (out_max > 0)
        *out = (ul_host_fd){mon->ops->kind == UL_EPOLL ? mon->epoll_fd : mon->eventfd, POLLIN};
    return 1;
}

int ul_fdmon_host_fds(ul_fdmon *mon, ul_host_fd *out, int out_max, uint64_t *version) {
    pthread_mutex_lock(&mon->lock);
    int n = -EBADF;
    if (!mon->closed) {
        ul_fdmon_renew(mon);
        n = host(mon);
    }
    if (n == 0)
        n = list(mon, out, out_max);
    if (n >= 0 && n <= out_max)
        mon->host_version_told = mon->host_version;
    *version = mon->host_version;
    pthread_mutex_unlock(&mon->lock);
    return n;
}

/* Submits first, then empties the eventfd, then looks: what comes after the look signals it again. On poll the timer is set each
 * time, since a number that the application has closed would make the host spin. */
static int prepare(ul_fdmon *mon, int64_t wake_ns) {
    ul_fdmon_renew(mon);
    ul_buffers_take_back(mon);
    mon->wake_ns = wake_ns < 0 || wake_ns <= ul_now_ns() ? UL_NEVER : wake_ns;
    int err = host(mon);
    if (err == 0 && mon->ops->kind == UL_IO_URING)
        err = ul_fdmon_wait(mon, 0);
    empty_eventfd(mon);
    int64_t now = ul_now_ns();
    bool set_anew = mon->ops->kind == UL_POLL || mon->armed_ns <= now || mon->wake_ns < mon->armed_ns;
    if (err == 0 && mon->ops->kind != UL_IO_URING && set_anew)
        err = set_timer(mon, mon->wake_ns);
    if (err < 0)
        return err;
    bool due = (wake_ns >= 0 && wake_ns <= now) || mon->downgrade_unreported || is_due(mon);
    if (due)
        ul_host_want_turn(mon);
    return due;
}

int ul_fdmon_prepare(ul_fdmon *mon, int64_t wake_ns) {
    pthread_mutex_lock(&mon->lock);
    int ret = mon->closed ? -EBADF : mon->waiting ? -EBUSY : 0;
    if (ret == 0)
        ret = prepare(mon, wake_ns);
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

void ul_fdmon_wake_host(ul_fdmon *mon) {
    pthread_mutex_lock(&mon->lock);
    if (!mon->closed)
        ul_host_want_turn(mon);
    pthread_mutex_unlock(&mon->lock);
}

int ul_fdmon_fileno(ul_fdmon *mon) {
    pthread_mutex_lock(&mon->lock);
    ul_fdmon_renew(mon);
    int fd = mon->closed ? -EBADF : -EOPNOTSUPP;
    if (!mon->closed && mon->ops->kind == UL_EPOLL)
        fd = mon->epoll_fd;
    else if (!mon->closed && mon->ops->kind == UL_IO_URING && (fd = open_eventfd(mon)) == 0)
        fd = mon->eventfd;
    mon->has_fileno |= fd >= 0;
    pthread_mutex_unlock(&mon->lock);
    return fd;
}
