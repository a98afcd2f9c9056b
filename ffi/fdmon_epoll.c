/*
 * Waiting on epoll: what most containers run, since their seccomp profile denies io_uring.
 *
 * Why it exists: the first fallback. Promise: the same readiness as the io_uring monitor reports, in nanoseconds of timeout,
 * with the errors of select.epoll at registration.
 */
#define _GNU_SOURCE
#include "fdmon.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { EPOLL_EVENTS_MIN = 64 };

static int control(ul_fdmon *mon, int op, int fd) {
    /* EPOLLIN and EPOLLOUT have the values of POLLIN and POLLOUT. */
    ul_watch *watch = &mon->watches[fd];
    uint32_t once = watch->events & UL_ONCE ? (uint32_t)EPOLLONESHOT : 0;
    struct epoll_event event = {.events = ul_poll_mask(ul_polled_events(mon, watch)) | once, .data = {.fd = fd}};
    if (epoll_ctl(mon->epoll_fd, op, fd, &event) < 0)
        return -errno;
    watch->in_epoll = true;
    return 0;
}

static int leave(ul_fdmon *mon, int fd) {
    mon->watches[fd].in_epoll = false;
    return epoll_ctl(mon->epoll_fd, EPOLL_CTL_DEL, fd, NULL) < 0 ? -errno : 0;
}

/* A UL_ONCE watch that was reported leaves a disabled entry, so that the next one costs a single call. Disabled means silent,
 * and it holds no file. But the number may have become another file by then, of which epoll has nothing (-ENOENT), and later,
 * by way of a duplicate, the old one again, of which we know nothing (-EEXIST). Tests:
 * a_number_used_again_after_its_only_report_is_the_new_file, a_number_that_becomes_another_file_and_again_the_old_one. */
static int epoll_update(ul_fdmon *mon, int fd, uint32_t old_events) {
    ul_watch *watch = &mon->watches[fd];
    if (!ul_polled_events(mon, watch))
        return watch->in_epoll ? leave(mon, fd) : 0;
    int op = watch->in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    int err = control(mon, op, fd);
    if (err == -ENOENT && (!old_events || (old_events | watch->events) & UL_ONCE))
        err = control(mon, EPOLL_CTL_ADD, fd);
    else if (err == -EEXIST)
        err = control(mon, EPOLL_CTL_MOD, fd);
    return err;
}

static int wait_ms(ul_fdmon *mon, int64_t timeout_ns, int max) {
    int64_t ms = timeout_ns < 0 ? -1 : timeout_ns / 1000000 + (timeout_ns % 1000000 != 0); /* up: a timer must not be early */
    return epoll_wait(mon->epoll_fd, mon->epoll_events, max, ms > INT32_MAX ? INT32_MAX : (int)ms);
}

/* epoll_pwait2 (5.11) takes nanoseconds. Old seccomp profiles do not know it and answer ENOSYS or EPERM. */
static int wait_ns(ul_fdmon *mon, int64_t timeout_ns, int max) {
    if (!mon->no_epoll_pwait2) {
        struct ul_timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
        int n = (int)syscall(SYS_epoll_pwait2, mon->epoll_fd, mon->epoll_events, max, timeout_ns < 0 ? NULL : &ts, NULL, 0);
        if (n >= 0 || (errno != ENOSYS && errno != EPERM))
            return n;
        mon->no_epoll_pwait2 = true;
    }
    return wait_ms(mon, timeout_ns, max);
}

/* Room for every watch: what a second epoll_wait returned would be the same level-triggered events again. Without memory for
 * that, the rest is reported by the next turns. */
static int reserve_events(ul_fdmon *mon) {
    size_t cap = mon->epoll_events_cap ? mon->epoll_events_cap : EPOLL_EVENTS_MIN;
    while (cap < mon->watches_live && cap < INT32_MAX / 2)
        cap *= 2;
    if (cap == mon->epoll_events_cap)
        return 0;
    struct epoll_event *events = realloc(mon->epoll_events, cap * sizeof *events);
    if (!events)
        return -ENOMEM;
    mon->epoll_events = events;
    mon->epoll_events_cap = cap;
    return 0;
}

static int epoll_mon_wait(ul_fdmon *mon, int64_t timeout_ns) {
    reserve_events(mon);
    mon->waiting = true;
    pthread_mutex_unlock(&mon->lock);
    int n = wait_ns(mon, timeout_ns, (int)mon->epoll_events_cap);
    int err = n < 0 ? -errno : 0;
    pthread_mutex_lock(&mon->lock);
    mon->waiting = false;
    for (int i = 0; i < n; i++) {
        if (mon->epoll_events[i].data.fd == UL_HOST_TIMER)
            mon->armed_ns = UL_NEVER;
        else if (mon->epoll_events[i].data.fd != UL_HOST_EVENT)
            ul_fdmon_collect(mon, mon->epoll_events[i].data.fd, mon->epoll_events[i].events);
    }
    return err == -EINTR ? 0 : err;
}

/* Only the kernel knows. */
static bool epoll_need_wait(ul_fdmon *mon) { return mon->watches_live > 0 || mon->timerfd >= 0; }

static void epoll_close(ul_fdmon *mon) {
    struct epoll_event event;
    /* EBADF, EINVAL: the application closed it, and the number may be another file's by now. */
    if (mon->epoll_fd >= 0 && (epoll_wait(mon->epoll_fd, &event, 1, 0) >= 0 || (errno != EBADF && errno != EINVAL)))
        close(mon->epoll_fd);
    mon->epoll_fd = -1;
}

static const FDMonOps epoll_ops = {
    .kind = UL_EPOLL,
    .name = "epoll",
    .update = epoll_update,
    .wait = epoll_mon_wait,
    .need_wait = epoll_need_wait,
    .dispatch = ul_fdmon_dispatch_ready,
    .close = epoll_close,
};

int ul_fdmon_epoll_setup(ul_fdmon *mon) {
    if (reserve_events(mon) < 0 && mon->epoll_events_cap == 0)
        return -ENOMEM;
    int fd = epoll_create1(EPOLL_CLOEXEC);
    if (fd < 0)
        return -errno;
    mon->epoll_fd = fd;
    for (size_t i = 0; i < mon->watches_cap; i++) {
        mon->watches[i].in_epoll = false; /* in another instance, perhaps: a forked child comes here too */
        if (!ul_wants_poll(mon, &mon->watches[i]))
            continue;
        int err = control(mon, EPOLL_CTL_ADD, (int)i);
        if (err == -ENOMEM || err == -ENOSPC) { /* epoll itself is full (fs.epoll.max_user_watches) */
            epoll_close(mon);
            return err;
        }
        if (err < 0)
            ul_fdmon_park(mon, (int)i);
    }
    mon->ops = &epoll_ops;
    mon->step = "epoll_wait";
    ul_host_moves_to_epoll(mon);
    return 0;
}
