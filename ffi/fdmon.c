/*
 * The fd monitor: set-up, the table of watches, run-time downgrade. The contract stands in fdmon.h.
 *
 * Why it exists: everything that is the same for io_uring, epoll and poll stands here once. Promise: the floor (poll) is set
 * first, and whatever replaces it or is lost afterwards, every live watch moves along.
 */
#define _GNU_SOURCE
#include "fdmon_io_uring.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { WATCHES_MIN = 64 };

uint32_t ul_poll_mask(uint32_t events) {
    return (uint32_t)(((events & UL_READ) ? POLLIN : 0) | ((events & UL_WRITE) ? POLLOUT : 0));
}

int64_t ul_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- queues ---- */

static ul_item *item_at(const ul_queue *queue, uint32_t i) { return &queue->items[(queue->first + i) & (queue->cap - 1)]; }

static int reserve(ul_queue *queue, size_t needed) {
    ul_queue larger = {.count = queue->count, .cap = WATCHES_MIN};
    while (larger.cap < needed)
        larger.cap *= 2;
    if (larger.cap <= queue->cap)
        return 0;
    larger.items = malloc(larger.cap * sizeof *larger.items);
    if (!larger.items)
        return -ENOMEM;
    for (uint32_t i = 0; i < queue->count; i++)
        larger.items[i] = *item_at(queue, i);
    free(queue->items);
    *queue = larger;
    return 0;
}

void ul_queue_put(ul_queue *queue, ul_item item) { *item_at(queue, queue->count++) = item; }

ul_item ul_queue_pop(ul_queue *queue) {
    ul_item item = *item_at(queue, 0);
    queue->first++;
    if (--queue->count == 0)
        queue->first = 0; /* the same memory again, while it is hot */
    return item;
}

static int grow_table(ul_fdmon *mon, int fd) {
    if ((size_t)fd < mon->watches_cap)
        return 0;
    size_t cap = mon->watches_cap ? mon->watches_cap : WATCHES_MIN;
    while (cap <= (size_t)fd)
        cap *= 2;
    struct pollfd *pollfds = realloc(mon->pollfds, cap * sizeof *pollfds); /* so that the floor cannot fail */
    if (pollfds)
        mon->pollfds = pollfds;
    /* Collected can be, for each descriptor, its readiness, the end of its stream and of its send; and every buffer. */
    if (!pollfds || reserve(&mon->pending, cap) < 0 || reserve(&mon->collected, 3 * cap + UL_BUFFERS_MAX) < 0)
        return -ENOMEM;
    ul_watch *watches = realloc(mon->watches, cap * sizeof *watches);
    if (!watches)
        return -ENOMEM;
    memset(watches + mon->watches_cap, 0, (cap - mon->watches_cap) * sizeof *watches);
    mon->watches = watches;
    mon->watches_cap = cap;
    return 0;
}

/* ---- collecting and reporting ---- */

static void add_ready(ul_fdmon *mon, int fd, uint32_t events) {
    ul_watch *watch = &mon->watches[fd];
    mon->ready_live += !watch->revents && events;
    watch->revents |= (uint8_t)events;
    if (watch->on_ready || !watch->revents)
        return;
    watch->on_ready = true;
    ul_queue_put(&mon->collected, (ul_item){.fd = fd, .kind = UL_READ});
}

/* As EpollSelector reads them: whatever is not POLLOUT alone wakes a reader, whatever is not POLLIN alone wakes a writer, so
 * HUP and ERR wake both. Bits nobody asked for (io_uring adds POLLRDHUP) are dropped first. */
bool ul_fdmon_collect(ul_fdmon *mon, int fd, uint32_t revents) {
    uint32_t asked = ul_polled_events(mon, &mon->watches[fd]);
    revents &= ul_poll_mask(asked) | POLLERR | POLLHUP;
    uint32_t events = ((revents & ~(uint32_t)POLLOUT) ? UL_READ : 0) | ((revents & ~(uint32_t)POLLIN) ? UL_WRITE : 0);
    add_ready(mon, fd, events & asked);
    return events & asked;
}

void ul_fdmon_collect_data(ul_fdmon *mon, int fd, int32_t result, int32_t buffer) {
    ul_queue_put(&mon->collected, (ul_item){fd, UL_DATA, result, buffer});
    mon->watches[fd].data_queued++;
    mon->ready_live++;
}

void ul_fdmon_collect_sent(ul_fdmon *mon, int fd, int32_t result) {
    ul_queue_put(&mon->collected, (ul_item){fd, UL_SENT, result, UL_NO_BUFFER});
    mon->ready_live++;
}

void ul_fdmon_park(ul_fdmon *mon, int fd) {
    mon->watches[fd].parked = true;
    add_ready(mon, fd, mon->watches[fd].events & (UL_READ | UL_WRITE));
}

static bool report_readiness(ul_fdmon *mon, ul_item item, ul_event *out) {
    ul_watch *watch = &mon->watches[item.fd];
    if (watch->revents & UL_READ && watch->data_queued) { /* what may be read comes after what was received */
        ul_queue_put(&mon->collected, item);
        return false;
    }
    watch->on_ready = false;
    if (!watch->revents) /* removed or changed since it was collected */
        return false;
    *out = (ul_event){.fd = item.fd, .events = watch->revents};
    watch->revents = 0;
    mon->ready_live--;
    if (watch->events & UL_ONCE) {
        watch->events = 0;
        watch->parked = watch->edge = false;
        mon->watches_live--;
    }
    return true;
}

static void leave_queue(ul_fdmon *mon, ul_item item) {
    if (item.kind == UL_DATA)
        mon->watches[item.fd].data_queued--;
    mon->ready_live--;
}

static void free_send(ul_fdmon *mon, int fd) {
    ul_send *send = mon->watches[fd].send;
    mon->sends_queued -= send->state == UL_QUEUED;
    send->next_free = mon->sends_free;
    mon->sends_free = send;
    mon->watches[fd].send = NULL;
}

static void report_result(ul_fdmon *mon, ul_item item, ul_event *out) {
    *out = (ul_event){.fd = item.fd, .events = item.kind, .result = item.result};
    if (item.kind == UL_SENT)
        free_send(mon, item.fd);
    if (item.buffer != UL_NO_BUFFER)
        out->data = ul_buffers_hand_over(mon, (uint16_t)item.buffer);
    leave_queue(mon, item);
}

int ul_fdmon_dispatch_ready(ul_fdmon *mon, ul_event *out, int out_max) {
    int n = 0;
    while (n < out_max && mon->collected.count) {
        ul_item item = ul_queue_pop(&mon->collected);
        bool reported = true;
        if (item.kind == UL_READ)
            reported = report_readiness(mon, item, &out[n]);
        else
            report_result(mon, item, &out[n]);
        n += reported;
    }
    return n;
}

static void drop(ul_fdmon *mon, int fd, uint32_t kind) {
    for (uint32_t n = mon->collected.count; n > 0; n--) {
        ul_item item = ul_queue_pop(&mon->collected);
        if (item.fd != fd || item.kind != kind) {
            ul_queue_put(&mon->collected, item);
            continue;
        }
        if (item.buffer != UL_NO_BUFFER)
            ul_buffers_give_back(mon, (uint16_t)item.buffer);
        leave_queue(mon, item);
    }
}

/* ---- choosing a monitor ---- */

static void refused(ul_fdmon *mon, const char *step, int err) {
    mon->info.refused_step = step;
    mon->info.refused_errno = -err;
}

static int choose(ul_fdmon *mon, ul_ring *spare) {
    int ret = 0;
    ul_fdmon_poll_setup(mon); /* the floor needs nothing from the kernel */
    if (mon->kind == UL_AUTO || mon->kind == UL_IO_URING) {
        ret = ul_fdmon_io_uring_setup(mon, spare);
        if (ret < 0)
            refused(mon, mon->step, ret);
        if (ret < 0 && mon->kind == UL_AUTO) {
            ul_fdmon_epoll_setup(mon); /* or it stays poll */
            ret = 0;
        }
        return ret;
    }
    ul_ring_free(spare);
    if (mon->kind == UL_EPOLL && (ret = ul_fdmon_epoll_setup(mon)) < 0)
        refused(mon, "epoll_create1", ret);
    return ret;
}

void ul_fdmon_free(ul_fdmon *mon) {
    if (!mon)
        return;
    pthread_mutex_destroy(&mon->lock);
    for (size_t fd = 0; fd < mon->watches_cap; fd++)
        free(mon->watches[fd].send);
    for (ul_send *send; (send = mon->sends_free); free(send))
        mon->sends_free = send->next_free;
    free(mon->watches);
    free(mon->pending.items);
    free(mon->collected.items);
    ul_buffers_free(mon->buffers);
    free(mon->requests);
    free(mon->epoll_events);
    free(mon->pollfds);
    free(mon->pollfds_in_kernel);
    free(mon);
}

int ul_fdmon_new(enum ul_kind kind, ul_ring *spare, ul_fdmon **out, ul_setup_info *info) {
    ul_fdmon *mon = calloc(1, sizeof *mon);
    memset(info, 0, sizeof *info);
    if (!mon) {
        ul_ring_free(spare);
        return -ENOMEM;
    }
    mon->layout = UL_FDMON_LAYOUT;
    pthread_mutex_init(&mon->lock, NULL);
    mon->kind = kind;
    mon->eventfd = mon->epoll_fd = mon->timerfd = -1;
    mon->wake_ns = mon->armed_ns = UL_NEVER;
    int ret = choose(mon, spare);
    ul_fdmon_setup_info(mon, info);
    if (ret < 0) {
        mon->ops->close(mon);
        ul_fdmon_free(mon);
        return ret;
    }
    *out = mon;
    return 0;
}

int ul_fdmon_close(ul_fdmon *mon, ul_ring **spare) {
    *spare = NULL;
    pthread_mutex_lock(&mon->lock);
    int ret = mon->waiting ? -EBUSY : 0;
    if (ret == 0 && !mon->closed) {
        *spare = ul_fdmon_io_uring_release(mon);
        mon->ops->close(mon);
        ul_host_close(mon);
        mon->watches_live = mon->ready_live = 0;
        mon->closed = true;
    }
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

/* ---- losing a monitor ---- */

/* The kernel takes io_uring away (a seccomp filter installed later, a descriptor closed behind our back): the same watches go
 * on living on epoll, on poll if even that fails. Level-triggered readiness makes this lossless: whatever is ready is reported
 * by the next monitor again. Tests: test_traffic_survives_a_seccomp_filter_installed_later. */
void ul_fdmon_downgrade(ul_fdmon *mon, int err) {
    bool was_epoll = mon->ops->kind == UL_EPOLL;
    refused(mon, mon->step, err);
    mon->ops->close(mon);
    mon->stale = false;
    mon->info.ring_setup_flags = mon->info.ring_features = mon->info.sq_entries = mon->info.cq_entries = 0;
    if (was_epoll || ul_fdmon_epoll_setup(mon) < 0)
        ul_fdmon_poll_setup(mon);
    mon->downgrades++;
    mon->downgrade_unreported = true;
    mon->host_version++;
    ul_host_want_turn(mon);
}

/* Asked for by every verb that needs them. */
void ul_fdmon_renew(ul_fdmon *mon) {
    if (!mon->stale)
        return;
    mon->stale = false;
    mon->step = "epoll_create1";
    int ret = mon->ops->kind == UL_EPOLL ? ul_fdmon_epoll_setup(mon) : 0;
    if (ret < 0)
        ul_fdmon_downgrade(mon, ret);
}

void ul_fdmon_after_fork_in_child(ul_fdmon *mon) {
    pthread_mutex_init(&mon->lock, NULL); /* the thread that held it may not exist here */
    mon->waiting = false;
    ul_fdmon_io_uring_after_fork(mon);
    if (mon->epoll_fd >= 0)
        close(mon->epoll_fd);
    mon->epoll_fd = -1;
    ul_host_close(mon);
    mon->stale = !mon->closed;
}

/* epoll refuses what has no poll method; io_uring would report it as always ready. A socket and a FIFO always have one;
 * anything else is asked once, of epoll itself, so that the answer is the one users of EpollSelector know. */
int ul_fd_pollable(int fd) {
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISSOCK(st.st_mode) || S_ISFIFO(st.st_mode))
        return 0;
    int probe = epoll_create1(EPOLL_CLOEXEC);
    if (probe < 0)
        return S_ISREG(st.st_mode) || S_ISDIR(st.st_mode) ? -EPERM : 0;
    struct epoll_event event = {.events = EPOLLIN};
    int ret = epoll_ctl(probe, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
    close(probe);
    return ret;
}

/* Only for what is open: a wrong number may be two thousand million. */
static int reach(ul_fdmon *mon, int fd) {
    if ((size_t)fd < mon->watches_cap)
        return 0;
    return fcntl(fd, F_GETFD) < 0 ? -errno : grow_table(mon, fd);
}

static int set_watch(ul_fdmon *mon, int fd, uint32_t events) {
    int ret = 0;
    if ((size_t)fd >= mon->watches_cap && (events == 0 || (ret = reach(mon, fd)) < 0))
        return ret;
    ul_watch *watch = &mon->watches[fd];
    ul_watch before = *watch;
    if (before.events == 0 && events == 0)
        return 0;
    watch->events = (uint8_t)events;
    watch->revents = 0;
    watch->parked = watch->edge = watch->no_receive = false;
    watch->ended = before.ended && (before.data_queued || before.events & events & UL_RECV);
    ret = mon->ops->update(mon, fd, before.events);
    if (ret < 0 && events) {
        *watch = before;
        return ret;
    }
    mon->watches_live += (events != 0);
    mon->watches_live -= (before.events != 0);
    mon->ready_live -= (before.revents != 0);
    return 0;
}

static bool makes_sense(uint32_t events) {
    static const uint32_t once = UL_READ | UL_WRITE | UL_ONCE, receive = UL_READ | UL_WRITE | UL_RECV;
    if (events & UL_RECV)
        return events & UL_READ && !(events & ~receive);
    return events != UL_ONCE && !(events & ~once);
}

/* io_uring knows of it after a turn, the host of poll's watches when it asks for them again; epoll at once. */
static void changed(ul_fdmon *mon) {
    if (mon->ops->kind != UL_EPOLL)
        ul_host_want_turn(mon);
}

int ul_fdmon_update(ul_fdmon *mon, int fd, uint32_t events) {
    if (fd < 0)
        return -EBADF;
    if (!makes_sense(events))
        return -EINVAL;
    pthread_mutex_lock(&mon->lock);
    int ret = -EBADF;
    if (!mon->closed) {
        ul_fdmon_renew(mon);
        ret = set_watch(mon, fd, events);
    }
    if (ret == 0)
        changed(mon);
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

static ul_send *new_send(ul_fdmon *mon) {
    ul_send *send = mon->sends_free;
    if (send)
        mon->sends_free = send->next_free;
    else if (ul_requests_reserve(mon, mon->watches_live, mon->sends_made + 1) == 0 && (send = malloc(sizeof *send)))
        mon->sends_made++;
    return send;
}

static int queue_send(ul_fdmon *mon, int fd, const struct iovec *pieces, int count) {
    int err = reach(mon, fd);
    if (err < 0 || mon->watches[fd].send)
        return err < 0 ? err : -EALREADY;
    ul_send *send = new_send(mon);
    if (!send)
        return -ENOMEM;
    memcpy(send->pieces, pieces, (size_t)count * sizeof *pieces);
    send->message = (struct msghdr){.msg_iov = send->pieces, .msg_iovlen = (size_t)count};
    send->state = UL_QUEUED;
    mon->watches[fd].send = send;
    mon->sends_queued++;
    ul_want_armed(mon, fd);
    changed(mon);
    return 0;
}

int ul_fdmon_send(ul_fdmon *mon, int fd, const struct iovec *pieces, int count) {
    if (fd < 0)
        return -EBADF;
    if (count < 1 || count > UL_PIECES_MAX)
        return -EINVAL;
    pthread_mutex_lock(&mon->lock);
    int ret = mon->closed ? -EBADF : -EOPNOTSUPP;
    if (!mon->closed && mon->ops->streams)
        ret = queue_send(mon, fd, pieces, count);
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

static int cancel_send(ul_fdmon *mon, int fd) {
    ul_send *send = fd >= 0 && (size_t)fd < mon->watches_cap ? mon->watches[fd].send : NULL;
    if (!send)
        return -ENOENT;
    if (send->state == UL_SENDING && mon->waiting)
        return -EBUSY;
    if (send->state == UL_SENDING)
        ul_requests_end(mon, &send->request, 1);
    int ret = send->state == UL_ENDED ? send->result : -EAGAIN;
    if (send->state == UL_ENDED)
        drop(mon, fd, UL_SENT);
    free_send(mon, fd);
    return ret;
}

int ul_fdmon_cancel_send(ul_fdmon *mon, int fd) {
    pthread_mutex_lock(&mon->lock);
    int ret = mon->closed ? -EBADF : cancel_send(mon, fd);
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

static int forget(ul_fdmon *mon, int fd) {
    ul_watch *watch = &mon->watches[fd];
    if (cancel_send(mon, fd) == -EBUSY)
        return -EBUSY;
    if (watch->receive)
        mon->requests[watch->receive - 1].forgotten = true;
    set_watch(mon, fd, 0);
    if (watch->data_queued)
        drop(mon, fd, UL_DATA);
    changed(mon);
    return 0;
}

int ul_fdmon_forget(ul_fdmon *mon, int fd) {
    pthread_mutex_lock(&mon->lock);
    int ret = !mon->closed && fd >= 0 && (size_t)fd < mon->watches_cap ? forget(mon, fd) : 0;
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

int ul_fdmon_wait(ul_fdmon *mon, int64_t timeout_ns) {
    int ret = mon->ops->wait(mon, timeout_ns);
    for (int lost = 0; ret < 0 && lost < 2 && mon->ops->kind != UL_POLL; lost++) {
        ul_fdmon_downgrade(mon, ret);
        ret = mon->ops->wait(mon, 0);
    }
    return ret;
}

int ul_fdmon_turn(ul_fdmon *mon, int64_t timeout_ns, ul_event *out, int out_max) {
    pthread_mutex_lock(&mon->lock);
    int ret = mon->closed ? -EBADF : mon->waiting ? -EBUSY : 0;
    if (ret == 0) {
        mon->turns++;
        ul_fdmon_renew(mon);
        ul_buffers_take_back(mon);
        /* Else the rest of earlier turns fills this one; but a send does not wait for it. */
        if (mon->ready_live == 0 || mon->ready_live < (size_t)out_max || mon->sends_queued) {
            ul_host_begin_turn(mon);
            timeout_ns = mon->ready_live ? 0 : timeout_ns;
            if (timeout_ns != 0 && mon->poll_max_ns > 0) {
                ret = ul_polling_wait(mon, timeout_ns);
            } else {
                mon->looked_since_ns = 0;
                ret = timeout_ns != 0 || mon->ops->need_wait(mon) ? ul_fdmon_wait(mon, timeout_ns) : 0;
            }
        }
        if (ret >= 0)
            ret = mon->ops->dispatch(mon, out, out_max);
        ul_host_end_turn(mon);
        if (ret >= 0 && mon->downgrade_unreported) {
            mon->downgrade_unreported = false;
            ret |= UL_DOWNGRADED;
        }
    }
    pthread_mutex_unlock(&mon->lock);
    return ret;
}

int ul_fdmon_dispatch(ul_fdmon *mon, ul_event *out, int out_max) {
    pthread_mutex_lock(&mon->lock);
    int n = mon->closed ? 0 : mon->ops->dispatch(mon, out, out_max);
    pthread_mutex_unlock(&mon->lock);
    return n;
}

bool ul_fdmon_need_wait(ul_fdmon *mon) {
    pthread_mutex_lock(&mon->lock);
    bool need = !mon->closed && (mon->stale || mon->ready_live > 0 || mon->ops->need_wait(mon));
    pthread_mutex_unlock(&mon->lock);
    return need;
}

void ul_fdmon_statistics(ul_fdmon *mon, ul_statistics *out) {
    pthread_mutex_lock(&mon->lock);
    out->turns = mon->turns;
    out->enters = __atomic_load_n(&mon->counts.enters, __ATOMIC_RELAXED);
    out->sqes = __atomic_load_n(&mon->counts.sqes, __ATOMIC_RELAXED);
    out->cqes = __atomic_load_n(&mon->counts.cqes, __ATOMIC_RELAXED);
    out->overflows = __atomic_load_n(&mon->counts.overflows, __ATOMIC_RELAXED);
    out->downgrades = mon->downgrades;
    out->watches = mon->watches_live;
    out->poll_ns = (uint64_t)mon->poll_ns;
    out->polled = mon->polled;
    pthread_mutex_unlock(&mon->lock);
}

void ul_fdmon_setup_info(ul_fdmon *mon, ul_setup_info *out) {
    pthread_mutex_lock(&mon->lock);
    *out = mon->info;
    out->name = mon->ops->name;
    pthread_mutex_unlock(&mon->lock);
}
