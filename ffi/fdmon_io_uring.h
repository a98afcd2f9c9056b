/*
 * What the two files of the io_uring monitor share: fdmon_io_uring.c, which owns the ring, its requests and the polls, and
 * stream_io_uring.c, which owns receives, sends and the memory that data arrives in.
 *
 * Why it exists: one record for everything that the kernel has, one rule for its end. Promise: a request is free only after
 * its last completion, or after the ring is gone. Everything here is called with mon->lock held.
 */
#ifndef UL_FDMON_IO_URING_H
#define UL_FDMON_IO_URING_H

#include "fdmon.h"

/* fdmon_io_uring.c: a new request of fd, and the submission entry to fill in for it. NULL: *err says why. */
struct ul_sqe *ul_request_new(ul_fdmon *mon, int fd, uint32_t *id, int *err);
uint64_t ul_request_user_data(const ul_fdmon *mon, uint32_t id);
/* Queues the end of a request; it has ended when its completion comes. */
int ul_request_cancel(ul_fdmon *mon, uint32_t id);
void ul_want_armed(ul_fdmon *mon, int fd); /* looked after in the next turn */
/* Ends requests (0 is none) and returns when the kernel has let go of them; beside a wait, that is when the wait ends. */
void ul_requests_end(ul_fdmon *mon, const uint32_t *ids, int count);
int ul_requests_reserve(ul_fdmon *mon, size_t watches, size_t sends);

/* stream_io_uring.c: gives the kernel what a watch needs that has UL_RECV, or a receive. */
int ul_stream_arm(ul_fdmon *mon, int fd);
int ul_stream_arm_send(ul_fdmon *mon, int fd);
void ul_stream_received(ul_fdmon *mon, const ul_request *request, const struct ul_cqe *cqe);
void ul_stream_sent(ul_fdmon *mon, int fd, int32_t result);

/* The memory of received data: the kernel's to fill, collected, handed over, and with the next turn the kernel's again. */
const void *ul_buffers_hand_over(ul_fdmon *mon, uint16_t number);
void ul_buffers_take_back(ul_fdmon *mon); /* all that were handed over */
void ul_buffers_give_back(ul_fdmon *mon, uint16_t number);
void ul_buffers_free(ul_buffers *buffers);

#endif
