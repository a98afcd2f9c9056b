/*
 * A kernel that refuses, lies or changes its mind, for tests linked with -Wl,--wrap=syscall.
 *
 * Why it exists: most refusals cannot be had from the kernel of the machine that runs the tests. Promise: where a test sets no
 * hook, the real kernel answers; a hook answers -errno, and may itself ask the real kernel.
 */
#ifndef FAKE_KERNEL_H
#define FAKE_KERNEL_H

#include <stdarg.h>

#include "support.h"

struct enter_call {
    long fd, to_submit, min_complete, flags, arg, arg_size;
};

static long (*on_setup)(unsigned entries, struct ul_params *params);
static long (*on_enter)(const struct enter_call *call);
static long (*on_register)(void);
static long (*on_epoll_pwait2)(void);
static int setup_calls, enter_calls, register_calls, epoll_pwait2_calls;

static inline void believe_the_kernel(void) {
    on_setup = NULL;
    on_enter = NULL;
    on_register = NULL;
    on_epoll_pwait2 = NULL;
    setup_calls = enter_calls = register_calls = epoll_pwait2_calls = 0;
}

long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);

static inline long or_errno(long ret) { return ret < 0 ? -errno : ret; }

static inline long real_setup(unsigned entries, struct ul_params *params) {
    return or_errno(__real_syscall(SYS_io_uring_setup, entries, params));
}

static inline long real_enter(const struct enter_call *call) {
    return or_errno(__real_syscall(SYS_io_uring_enter, call->fd, call->to_submit, call->min_complete, call->flags, call->arg,
                                   call->arg_size));
}

/* Takes six arguments where the caller may have given four: what it reads beside them is not used. */
__attribute__((no_sanitize_address)) long __wrap_syscall(long number, ...) {
    long a[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(arguments, long);
    va_end(arguments);
    struct enter_call call = {a[0], (uint32_t)a[1], (uint32_t)a[2], (uint32_t)a[3], a[4], a[5]};

    setup_calls += number == SYS_io_uring_setup;
    enter_calls += number == SYS_io_uring_enter && call.flags;
    register_calls += number == SYS_io_uring_register;
    epoll_pwait2_calls += number == SYS_epoll_pwait2;
    long ret;
    if (number == SYS_io_uring_setup && on_setup)
        ret = on_setup((unsigned)a[0], (struct ul_params *)a[1]);
    else if (number == SYS_io_uring_enter && on_enter && call.flags) /* 0: only asks whether it is a ring */
        ret = on_enter(&call);
    else if (number == SYS_io_uring_register && on_register)
        ret = on_register();
    else if (number == SYS_epoll_pwait2 && on_epoll_pwait2)
        ret = on_epoll_pwait2();
    else
        return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (ret >= 0)
        return ret;
    errno = (int)-ret;
    return -1;
}

#endif
