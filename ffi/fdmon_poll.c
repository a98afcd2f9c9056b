/*
 * Waiting with ppoll: the floor that needs nothing from the kernel but itself.
 *
 * Why it exists: a monitor must exist before anything else is tried, and when descriptors or epoll itself have run out.
 * Promise: set-up does not fail, and the behaviour is that of the other two, at the cost of O(watches) a turn.
 */
#define _GNU_SOURCE
#include "fdmon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

static void leave_set(ul_fdmon *mon, int fd) {
    uint32_t id = mon->watches[fd].request;
    if (!id)
        return;
    struct pollfd *last = &mon->pollfds[--mon->pollfds_count];
    mon->pollfds[id - 1] = *last;
    mon->watches[last->fd].request = id;
    mon->watches[fd].request = 0;
    mon->host_version++;
}

static void enter_set(ul_fdmon *mon, int fd) {
    ul_watch *watch = &mon->watches[fd];
    if (!watch->request)
        watch->request = (uint32_t)++mon->pollfds_count; /* there is a place for every watch */
    mon->pollfds[watch->request - 1] = (struct pollfd){.fd = fd, .events = (short)ul_poll_mask(ul_polled_events(mon, watch))};
    mon->host_version++;
}

static int poll_update(ul_fdmon *mon, int fd, uint32_t old_events) {
    (void)old_events;
    bool polled = ul_polled_events(mon, &mon->watches[fd]);
    int err = mon->watches[fd].events ? ul_fd_pollable(fd) : 0;
    if (err == 0 && polled)
        enter_set(mon, fd);
    else if (err == 0)
        leave_set(mon, fd);
    return err;
}

/* The kernel gets a copy, so that another thread's change cannot move the set during the wait. */
static int copy_set(ul_fdmon *mon, size_t *count) {
    *count = mon->pollfds_count;
    if (*count == 0)
        return 0;
    struct pollfd *copy = realloc(mon->pollfds_in_kernel, *count * sizeof *copy);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, mon->pollfds, *count * sizeof *copy);
    mon->pollfds_in_kernel = copy;
    return 0;
}

static void collect_polled(ul_fdmon *mon, const struct pollfd *polled) {
    ul_watch *watch = &mon->watches[polled->fd];
    if (!watch->events || !polled->revents)
        return;
    if (polled->revents & POLLNVAL) {
        if (fcntl(polled->fd, F_GETFD) >= 0)
            return; /* it was another thread's removal that we saw, and the number is in use again */
        leave_set(mon, polled->fd);
        ul_fdmon_park(mon, polled->fd);
    } else {
        ul_fdmon_collect(mon, polled->fd, (uint32_t)polled->revents);
        if (!ul_wants_poll(mon, watch))
            leave_set(mon, polled->fd);
    }
}

static int poll_wait(ul_fdmon *mon, int64_t timeout_ns) {
    size_t count;
    int err = copy_set(mon, &count);
    if (err < 0)
        return err;
    struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    mon->waiting = true;
    pthread_mutex_unlock(&mon->lock);
    int n = ppoll(mon->pollfds_in_kernel, count, timeout_ns < 0 ? NULL : &ts, NULL);
    err = n < 0 ? -errno : 0;
    pthread_mutex_lock(&mon->lock);
    mon->waiting = false;
    for (size_t i = 0; n > 0 && i < count; i++)
        collect_polled(mon, &mon->pollfds_in_kernel[i]);
    return err == -EINTR ? 0 : err;
}

static bool poll_need_wait(ul_fdmon *mon) { return mon->pollfds_count > 0; }

static void poll_close(ul_fdmon *mon) {
    for (size_t i = 0; i < mon->pollfds_count; i++)
        mon->watches[mon->pollfds[i].fd].request = 0;
    mon->pollfds_count = 0;
}

static const FDMonOps poll_ops = {
    .kind = UL_POLL,
    .name = "poll",
    .update = poll_update,
    .wait = poll_wait,
    .need_wait = poll_need_wait,
    .dispatch = ul_fdmon_dispatch_ready,
    .close = poll_close,
};

void ul_fdmon_poll_setup(ul_fdmon *mon) {
    mon->ops = &poll_ops;
    for (size_t fd = 0; fd < mon->watches_cap; fd++)
        if (ul_wants_poll(mon, &mon->watches[fd]))
            enter_set(mon, (int)fd);
}
